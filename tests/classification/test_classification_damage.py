"""Every file of a run damaged in every way: each command gives the undamaged run's result or one line with the file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import Outcome, Trials, outcome, shelled
from runs import CPU, STUDENT, TEACHER, assert_same_runs, digits, stop_at, undrawn

from classification.tools import evaluate as evaluating
from classification.tools import visualize as visualizing
from classification.tools.train import main as training
from core.training.checkpoint import goal, numbered
from tools.compare import main as comparing
from tools.reproduce import main as reproducing

train, evaluate = shelled(training), shelled(evaluating.main)


def argv(out: Path, seed: int = 0, *more: str) -> list[str]:
    """Three epochs of three steps with Eq. 12's store and noisy labels."""
    networks = ["--networks.teacher.name", TEACHER, "--networks.student.name", STUDENT, "--method", "dml+adm"]
    options = ["--adm.divergence", "kd", "--data.noise", "0.2", "--fit.epochs", "3", "--fit.keep", "2", *CPU]
    return [*digits(3, 10, 12), *networks, *options, "--seed", str(seed), "--out", str(out), *more]


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        yield


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    with undrawn():
        root = tmp_path_factory.mktemp("trials")
        yield Trials(
            root, "table01/proxy/resnet-dml+adm-0", (training, evaluating.main, visualizing.main), argv, stopped
        )


def test_a_damage_of_each_file(trials: Trials) -> None:
    """The whole product is among the slow tests."""
    assert not (found := trials.some_problems()), "\n\n".join(found)


@pytest.mark.slow
def test_every_damage_of_each_file(trials: Trials) -> None:
    assert not (found := trials.all_problems()), "\n\n".join(found)


# --- kept lines -------------------------------------------------------------------------------------------------------


def said_of(results: Path) -> list[Outcome]:
    return [
        outcome(shelled(comparing), [str(results / "reproduce")]),
        outcome(
            shelled(reproducing),
            ["report", "--runs", str(results / "none"), "--results", str(results), "--out", str(results / "told")],
        ),
    ]


def test_damaged_lines_of_kept_runs_are_named(trials: Trials, tmp_path: Path) -> None:
    from tools.runs import keep, read_run

    file = tmp_path / "reproduce/runs.jsonl"
    keep([read_run(trials.run("finished"))], file.parent)
    other = json.loads(file.read_text())
    good = file.read_bytes()
    assert [done.code for done in said_of(tmp_path)] == [0, 0]
    half = len(good) // 2
    for spoiled, number in (
        (good[:half], 1),
        (bytes(len(good)), 1),
        (good[:half] + bytes([good[half] ^ 4]) + good[half + 1 :], 1),
        (good + good[:half], 2),
        (good + good, 2),
        (good + b"\xff\xfe\n", 2),
        (good + b'{"run": "table01/proxy/x-0", "summary": 3}\n', 2),
        (good + json.dumps({**other, "run": "table01/proxy/resnet-dml+adm-1"}).encode() + b"\n", 2),
    ):
        file.write_bytes(spoiled)
        for done in said_of(tmp_path):
            assert done.code in (0, 2), done.said
            text = (tmp_path / "told/report.md").read_text() if not done.code else done.said
            assert f"{file}, line {number}" in text.replace("\\", ""), (number, done.said)
            assert not done.code or len(done.error) == 1, done.said
    # A line of another commit is as good as any.
    del other["sha256"]
    other["run"] = "table01/proxy/resnet-dml+adm-1"
    other["config"]["seed"], other["environment"]["starts"][-1]["commit"] = 1, "0" * 40
    file.write_bytes(good + json.dumps(other).encode() + b"\n")
    done = said_of(tmp_path)
    assert [one.code for one in done] == [0, 0] and "different commits" in done[0].said


# --- file systems without links ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_file_system_without_links_trains_resumes_evaluates_and_teaches(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: object, target_is_directory: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = tmp_path / "run"
    with stopped():
        assert outcome(train, argv(run)).code == 130
    assert (run / "checkpoints/last").read_text() == "step-00000005\n"
    assert outcome(train, argv(run)).code == 0
    assert not any(path.is_symlink() for path in run.rglob("*"))
    whole = trials.run("finished")
    for name in ("last", "best"):
        assert goal(run / "checkpoints" / name).name == goal(whole / "checkpoints" / name).name
        assert outcome(evaluate, [str(run), "--checkpoint", name, "--out", str(tmp_path / f"{name}.json")]).code == 0
    assert_same_runs(whole, run)
    for place in (run, run / "checkpoints/best"):
        weights = ["--networks.teacher.weights", str(place), "--dry-run"]
        done = outcome(train, argv(tmp_path / "next", 0, *weights))
        assert done.code == 0, done.said


@pytest.mark.usefixtures("quick")
def test_a_finished_run_that_was_killed_in_its_last_pruning_is_pruned(trials: Trials, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(trials.run("finished"), tmp_path / "run", symlinks=True)
    kept = [path.name for path in numbered(run / "checkpoints")]
    for unfinished in (False, True):
        shutil.copytree(run / "checkpoints" / kept[-1], run / "checkpoints/step-00000001")
        if unfinished:
            (run / "summary.json").unlink()
        assert outcome(train, argv(run)).code == 0
        assert [path.name for path in numbered(run / "checkpoints")] == kept
    assert_same_runs(trials.run("finished"), run)
