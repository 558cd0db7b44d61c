"""Tiny runs of the training commands: their arguments, ways to stop one, what it left, and two compared bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# What the clock says, and what else differs from one start to the next.
TIMES = ("seconds", "wall_seconds_of_last_start", "images_per_second", "metrics_size", "peak_memory_bytes", "sha256")

# --- arguments --------------------------------------------------------------------------------------------------------

RECIPE = ROOT / "classification/recipes/digits.yaml"
CPU = ["--fit.device", "cpu", "--fit.trackers", "[]"]
TEACHER, STUDENT = "cifar_wrn_10_2", "cifar_resnet8"  # last maps of 128 and 64 channels


def digits(classes: int, per_class: int, batch_size: int) -> list[str]:
    """So many images of so many digits, at 8 pixels."""
    data = ["--data.name", "digits", "--data.classes", str(classes), "--data.per_class", str(per_class)]
    return [*data, "--data.image_size", "8", "--batch_size", str(batch_size)]


SMALL = digits(3, 10, 12)  # 30 images: epochs of 12, 12 and 6
ENOUGH = digits(5, 120, 50)  # to learn from: epochs of 12 steps, and 180 test images


def arguments(out: Path, *more: str, method: str = "dml+adm") -> list[str]:
    """Of classification's command: four epochs of three steps; the last maps have 128 and 64 channels."""
    fit = ["--fit.epochs", "4", "--fit.log_every", "2", *CPU]
    return ["--config", str(RECIPE), "--method", method, "--out", str(out), *SMALL, *fit, *more]


def learning_arguments(out: Path, *more: str, method: str = "dml+adm") -> list[str]:
    """Of classification's command: six epochs of twelve steps, after which the networks know 5 digits."""
    fit = ["--fit.epochs", "6", "--schedule.milestones", "[5]", "--fit.log_every", "7", *CPU]
    run = ["--config", str(RECIPE), "--method", method, "--out", str(out), *ENOUGH, *fit]
    return [*run, "--optimizer.lr", "0.05", *more]


def offline_arguments(
    out: Path, teacher: Path | str, *more: str, method: str = "kd+adm", student: str = STUDENT
) -> list[str]:
    """Of offline_kd's command: two epochs of 24, 24 and 12 images of 5 digits, and 180 test images."""
    networks = ["--networks.teacher.name", TEACHER, "--networks.teacher.weights", str(teacher)]
    networks += ["--networks.student.name", student, "--method", method, "--out", str(out)]
    return [*digits(5, 12, 24), "--fit.epochs", "2", "--fit.log_every", "2", *CPU, *networks, *more]


# --- runs in this process ---------------------------------------------------------------------------------------------


@contextmanager
def undrawn() -> Iterator[pytest.MonkeyPatch]:
    """Training commands inside draw no curves (half a second each) and leave no state of Accelerate behind."""
    from accelerate.state import AcceleratorState

    from core.training.run import RunFolder

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "draw", lambda self: None)
            yield patch
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def train_whole(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """A run from its start to its end, for the fixtures that many tests read."""
    with undrawn():
        assert main(argv) == 0


def stop_at(
    monkeypatch: pytest.MonkeyPatch, *steps: int, of: Any = None, where: Callable[[Any], bool] = lambda distiller: True
) -> None:
    """Sends SIGTERM to this process during the given steps.

    Args: ``of``, the distillers' class, classification's otherwise; ``where``, whether a distiller is meant.
    """
    if of is None:
        from classification.distiller import ClassificationDistiller as of
    real = of.after_step

    def after_step(self: Any, batch: Any, progress: Any) -> None:
        real(self, batch, progress)
        if progress.step + 1 in steps and where(self):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(of, "after_step", after_step)


def cut_at(step: int, argv: list[str], command: Callable[[list[str]], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command of classification that gets SIGTERM in that step of 12: it saves and says so."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        code, _, said = command(argv)
    assert code == 130 and f"interrupted at step {step} of 12" in said


# --- what a run left --------------------------------------------------------------------------------------------------


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def lines(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What was logged, of one kind ("train", "evaluation") or of all."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """``lines`` without what the clock says."""
    return [without_times(line) for line in lines(run, kind)]


LINE = re.compile(
    r"(?P<unit>step|iteration) (?P<step>\d+)/(?P<total>\d+)  (?P<losses>.*)  lr (?P<lr>\S+)  (?P<speed>\S+) images/s"
    r"  (?P<memory>\S+) GiB(?:  (?P<left>\d+:\d\d:\d\d) left)?"
)


def said_while_training(run: Path) -> list[dict[str, Any]]:
    """The training lines of ``log.txt`` of a run that nothing interrupted, as ``metrics.jsonl`` would have them."""
    found = []
    for line in (run / "log.txt").read_text().splitlines():
        if said := LINE.fullmatch(line[20:]):  # behind date and time
            values: dict[str, Any] = {"step": int(said["step"]), "lr": float(said["lr"])}
            for part in said["losses"].split("  "):
                role, _, terms = part.partition(" ")
                values |= {f"{role}/{t.split()[0]}": float(t.split()[1]) for t in terms.split(", ")}
            assert float(said["speed"].replace(",", "")) > 0 and float(said["memory"]) > 0
            assert bool(said["left"]) == bool(found), line  # the first step says nothing of the rest
            found.append(values)
    return found


def check_log(run: Path, *words: str, stderr: str | None = None) -> None:
    """That ``log.txt`` says what trains where, where files lie, and of the first step and each log point what it was.

    Args: ``words``, what its start says besides; ``stderr``, where it was kept: it says each of these lines once.
    """
    from core.training.run import RunFolder, read_config

    rows, see = lines(run, "train"), RunFolder(run, read_config(run / "config.yaml")).shown
    shown = said_while_training(run)
    assert [row["step"] for row in shown] == sorted({1, *(row["step"] for row in rows)})
    by_step = {row["step"]: row for row in shown}
    for row in rows:
        wanted = {see(name): value for name, value in row.items() if "/" in name or name in ("step", "lr")}
        assert by_step[row["step"]] == pytest.approx(wanted, rel=0.01, abs=1e-12)
    text = (run / "log.txt").read_text()
    (start,) = (line for line in text.splitlines() if " parameters)" in line)
    (files,) = (line for line in text.splitlines() if "metrics.jsonl (every value)" in line)
    assert str(run / "log.txt") in files
    for word in (*words, "training images", "cpu, fp32", "1 process of "):
        assert word in start, start
    for line in text.splitlines() if stderr is not None else ():
        assert stderr.splitlines().count(line[20:]) == 1, line


def last_checkpoint(run: Path) -> Any:
    """Everything that the last checkpoint holds, of this loop or of mmengine's."""
    from core.training.checkpoint import goal, read_checkpoint

    if (run / "checkpoints/last").exists():
        return read_checkpoint(goal(run / "checkpoints/last"))
    whole = torch.load(run / "checkpoints/last.pth", weights_only=True)
    parts = {part: whole[part] for part in ("state_dict", "optimizer", "param_schedulers", "run")}
    return {**parts, "step": whole["meta"]["iter"]}


# --- two runs ---------------------------------------------------------------------------------------------------------


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise equality of nested values, durations apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in TIMES:
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_runs(a: Path, b: Path) -> None:
    """Bitwise: weights, optimiser, schedule, generators, position, every logged number, the summary, and the best."""
    from core.training.checkpoint import goal

    assert_same(last_checkpoint(a), last_checkpoint(b))
    assert metrics(a) == metrics(b)
    summaries = [without_times(read(run / "summary.json")) for run in (a, b)]
    assert {"status", "step", "last", "best"} <= summaries[0].keys()
    assert_same(*summaries, "summary")
    names = ("last", "best", "last.pth", "best.pth")
    places = ([run / "checkpoints" / name for name in names] for run in (a, b))
    links = [{place.name: goal(place).name for place in found if place.exists()} for found in places]
    assert links[0] == links[1] and links[0]


# --- core as others see it --------------------------------------------------------------------------------------------


def adm_on_path(folder: Path) -> Path:
    """A folder for PYTHONPATH in which ``core`` goes by its installed name, ``adm``; no other package is in it."""
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    (packages / "adm").symlink_to(ROOT / "core")
    return packages


# --- two processes ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Of a process on one core that finds the product and the tests' modules as this one does."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def torchrun(*command: object) -> list[str]:
    """A script and its words, by two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launch, *map(str, command)]


def in_two_processes(*command: object, good: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a script by two processes (gloo, CPU); ``good``: they must end well."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(torchrun(*command), env=environment(), cwd=ROOT, **options)
    assert done.returncode == 0 or not good, done.stderr[-3000:]
    return done


Gradients = list[list[Tensor | None]]
"""Of each optimiser step, of each parameter."""


@contextmanager
def gradients_of(optimizer: type[torch.optim.Optimizer]) -> Iterator[tuple[pytest.MonkeyPatch, Gradients]]:
    """The gradients of each step of such an optimiser; training commands inside share one process group, undrawn."""
    from accelerate.state import PartialState

    from core.training.run import RunFolder

    gradients: Gradients = []
    real = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda self: None)
        patch.setattr(PartialState, "destroy_process_group", lambda self, group=None: None)
        patch.setattr(optimizer, "step", step)
        yield patch, gradients
