"""Every file of an offline run and of its teacher's damaged: the undamaged run's result, or one line with the file."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import DAMAGES, Trials, damaged, outcome, shelled
from runs import CPU, TEACHER, assert_same_runs, digits, offline_arguments, stop_at, train_whole, undrawn

from classification.tools.train import main as train_online
from core.training.checkpoint import goal
from offline_kd.tools.evaluate import main as evaluate
from offline_kd.tools.train import main as train
from offline_kd.tools.visualize import main as visualize


class Taught(Trials):
    """Runs with a teacher of their own, which lies at ``<root>/teachers/<seed>``."""

    def __init__(self, root: Path) -> None:
        for seed in ("0", "1"):
            fit = ["--fit.epochs", "1", *CPU, "--seed", seed, "--networks.teacher.name", TEACHER, "--method", "vanilla"]
            train_whole(train_online, [*digits(5, 12, 24), *fit, "--out", str(root / "teachers" / seed)])

        def argv(out: Path, seed: int) -> list[str]:
            return offline_arguments(out, root / "teachers" / "0", "--seed", str(seed))

        super().__init__(root, "table09/proxy/kd+adm-0", (train, evaluate, visualize), argv, stopped)


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        yield


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    with undrawn():
        yield Taught(tmp_path_factory.mktemp("trials"))


def test_a_damage_of_each_file(trials: Trials) -> None:
    """The whole product is among the slow tests."""
    assert not (found := trials.some_problems()), "\n\n".join(found)


@pytest.mark.slow
def test_every_damage_of_each_file(trials: Trials) -> None:
    assert not (found := trials.all_problems()), "\n\n".join(found)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow if n % 3 else ()) for n, how in enumerate(DAMAGES)]
)
@pytest.mark.parametrize("name", ["teacher.safetensors", "state.pt"])
def test_a_teacher_that_is_not_what_it_was_is_refused_and_nothing_is_written(
    name: str, how: str, trials: Trials, tmp_path: Path
) -> None:
    """From its run folder, by a resumed run and by a new one."""
    teachers = trials.root / "teachers"
    shutil.copytree(teachers, tmp_path / "teachers", symlinks=True)
    file = goal(teachers / "0/checkpoints/last").relative_to(teachers.resolve() / "0") / name
    spoiled = damaged(teachers / "0", teachers / "1", tmp_path / "teachers/0", str(file), how)
    run = tmp_path / "run"
    shutil.copytree(trials.run("interrupted"), run, symlinks=True)
    for out in (run, tmp_path / "new"):
        argv = offline_arguments(out, spoiled, "--seed", "0")
        done = outcome(shelled(train), argv)
        if done.code == 0 and name == "state.pt" and how == "missing":  # the weights alone teach as well
            assert out != run or assert_same_runs(trials.run("finished"), run) is None
            continue
        assert done.code == 2 and len(done.error) == 1 and str(spoiled) in done.error[0], done.said
        assert not (tmp_path / "new").exists()
