"""Two processes (gloo, CPU) against one: same gradients, losses and scores; one writer; exact resuming.

The tests start this very file under torchrun (`work` below) and compare what it leaves with what one process computes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import (
    ROOT,
    Gradients,
    assert_same_runs,
    digits,
    environment,
    gradients_of,
    in_two_processes,
    metrics,
    read,
    torchrun,
    undrawn,
)  # fmt: skip
from torch import nn

# 33 images in batches of 14, 14 and 5 (a last batch of 3 and 2), and 107 test images.
SMALL = [*digits(3, 11, 14), "--progress_bar", "false"]
FROZEN = {
    "plain": [],
    "accumulated": ["--fit.accumulate", "3"],
    "alternate": ["--dml.update", "alternate"],
    "three": ["--networks.student_2.name", "cifar_resnet8"],
    "noise": ["--data.noise", "0.3"],
    "mixed": ["--data.mixup", "0.8", "--data.cutmix", "1.0"],
    "mixed accumulated": ["--data.mixup", "0.8", "--fit.accumulate", "3"],
    "kdcl": ["--method", "kdcl"],
    "kdcl linear": ["--method", "kdcl+adm", "--kdcl.variant", "linear"],
    "switokd": ["--method", "switokd+adm"],
    "shake": ["--method", "shake+adm", "--shake.online_teacher", "true"],
    "afd": ["--method", "afd+adm"],
    # Of seed 0, a ReLU flips by rounding alone, in one process with --fit.accumulate 5 too.
    "afid": ["--method", "afid+adm", "--seed", "1"],
}
LIVE = ["--fit.epochs", "3", "--fit.log_every", "2"]


def arguments(out: Path, *more: str) -> list[str]:
    return runs.arguments(out, *SMALL, *more)


def train(out: Path, *more: str) -> tuple[int, Gradients]:
    from classification.tools.train import main

    with gradients_of(torch.optim.SGD) as (_, gradients):
        return main(arguments(out, *more)), gradients


def frozen(out: Path, name: str) -> Gradients:
    """One epoch without what is not a sum over images: the gradients of each step.

    That is BatchNorm's statistics (frozen here), and phi's own loss, a quotient of two sums over the batch.
    """
    import classification.training

    phi = [] if name == "kdcl" else ["--adm.phi_loss", "feature"]  # without ADM it is refused
    more = ["--fit.epochs", "1", "--fit.log_every", "1", "--optimizer.lr", "0.01", *phi]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
        patch.setattr(classification.training, "check_batch", lambda *arguments: None)
        code, gradients = train(out / name, *more, *FROZEN[name])
    assert code == 0
    return gradients


class Killed(Exception):
    pass


def work(out: Path) -> None:
    """What each of the two processes does."""
    from classification.distiller import ClassificationDistiller

    rank = int(os.environ["RANK"])
    written: list[str] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def audit(event: str, values: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate")
        opens = event == "open" and isinstance(values[2], int) and values[2] & writing
        if (changes or opens) and str(values[0]).startswith(str(out)):
            written.append(f"{event} {values[0]}")

    sys.addaudithook(audit)
    report: dict[str, Any] = {name: frozen(out, name) for name in FROZEN}
    distillers: list[ClassificationDistiller] = []
    real = ClassificationDistiller.after_step

    def after_step(self: ClassificationDistiller, batch: Any, progress: Any) -> None:
        real(self, batch, progress)
        distillers[:] = [self]
        if progress.step + 1 == hooks.get("kill"):
            raise Killed
        if progress.step + 1 == hooks.get("stop") and rank == 1:  # only one of them is told
            os.kill(os.getpid(), signal.SIGTERM)

    hooks: dict[str, int] = {}
    ClassificationDistiller.after_step = after_step  # type: ignore[method-assign]
    assert train(out / "whole", *LIVE)[0] == 0
    hooks["kill"] = 4
    try:
        train(out / "cut", *LIVE)
    except Killed:
        hooks.clear()
    hooks["stop"] = 5
    report["stopped"] = train(out / "cut", *LIVE)[0]
    hooks.clear()
    report["finished"] = train(out / "cut", *LIVE)[0]
    report["weights"] = distillers[0].state_dict()
    report["buffers"] = {name: buffer.clone() for name, buffer in distillers[0].named_buffers()}
    report["written"] = list(written)
    torch.save(report, out.parent / f"report{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes left: the folder of their runs, and each one's report."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(__file__, folder / "runs")
    return folder / "runs", [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Gradients]]:
    """The same frozen runs in this one process."""
    folder = tmp_path_factory.mktemp("one")
    with undrawn():
        return folder, {name: frozen(folder, name) for name in FROZEN}


@pytest.mark.parametrize("name", FROZEN)
def test_gradients_and_losses_are_those_of_one_process(
    one: tuple[Path, dict[str, Gradients]], two: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    wanted = one[1][name]
    assert len(wanted) == (6 if name == "alternate" else 3)
    for report in two[1]:
        assert len(report[name]) == len(wanted)
        for step, (a, b) in enumerate(zip(report[name], wanted, strict=True)):
            scale = max(float(g.abs().max()) for g in b if g is not None)
            for x, y in zip(a, b, strict=True):
                if y is None:
                    assert x is None or not x.any()
                else:
                    assert x is not None
                    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6 * scale, msg=f"step {step}")
    for line, other in zip(metrics(two[0] / name), metrics(one[0] / name), strict=True):
        assert line.keys() == other.keys() and line["step"] == other["step"]
        for key, value in other.items():
            assert line[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), key
    # 107 images: each counted once, so that the scores are whole numbers of them.
    right = metrics(two[0] / name)[-1]["student/top1"] / 100 * 107
    assert right == pytest.approx(round(right), abs=1e-6)


def test_both_hold_the_same_weights(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (report["weights"] for report in two[1])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_first_writes(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (report["written"] for report in two[1])
    assert len(first) > 50 and second == []


def test_killed_stopped_and_resumed_equals_uninterrupted(two: tuple[Path, list[dict[str, Any]]]) -> None:
    from core.training.checkpoint import read_checkpoint

    folder, reports = two
    assert [report["stopped"] for report in reports] == [130, 130]
    assert [report["finished"] for report in reports] == [0, 0]
    log = (folder / "cut/log.txt").read_text()
    # Told at step 5, they leave together at the next log point.
    assert "resuming from step 3" in log and "interrupted at step 6 of 9" in log and "resuming from step 6" in log
    assert_same_runs(folder / "whole", folder / "cut")
    assert len(read_checkpoint(folder / "whole/checkpoints/last")[1]["processes"]) == 2
    assert read(folder / "cut/summary.json")["status"] == "finished"


def test_scores_are_those_of_the_saved_weights(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """BatchNorm's statistics differ between processes until the next forward: all must score with the saved ones."""
    from classification.evaluation import evaluate
    from classification.experiment import command_of, restore
    from core.training.checkpoint import find_checkpoint

    run = two[0] / "whole"
    experiment = restore(command_of(run), find_checkpoint(run, "last"))
    values = evaluate(experiment.distiller, experiment.evaluation_loader(experiment.datasets.test)).values
    logged = metrics(run)[-1]
    assert logged["kind"] == "evaluation"
    for name, value in values.items():
        assert logged[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_torchrun_killed_then_terminated_then_resumed(tmp_path: Path) -> None:
    import psutil

    command = torchrun(ROOT / "classification/tools/train.py")
    more = ["--fit.epochs", "8", "--fit.log_every", "1"]

    def start(out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *arguments(out, *more)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip

    def wait_for(file: Path, count: int) -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until and not (file.exists() and len(file.read_text().splitlines()) >= count):
            time.sleep(0.02)

    process = start(tmp_path / "cut")
    wait_for(tmp_path / "cut/metrics.jsonl", 6)
    both = psutil.Process(process.pid).children()  # in sessions of their own: torchrun's death would not reach them
    assert len(both) == 2
    for killed in [psutil.Process(process.pid), *both]:
        killed.kill()
    process.communicate()
    psutil.wait_procs(both, timeout=30)
    assert not (tmp_path / "cut/summary.json").exists()

    process = start(tmp_path / "cut")
    wait_for(tmp_path / "cut/metrics.jsonl", 10)
    process.terminate()
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0 and "interrupted at step" in said and "resuming from step 3" in said
    assert read(tmp_path / "cut/summary.json")["status"] == "interrupted"

    for name in ("cut", "whole"):
        process = start(tmp_path / name)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_wrong_input_and_nan_end_all_processes(tmp_path: Path) -> None:
    for more, message in (
        (["--fit.epochs", "0"], "error: nothing to train"),
        (["--batch_size", "13"], "error: batch_size 13 cannot be shared by 2 process(es)"),
        (["--optimizer.lr", "1e9"], "error: the loss is not finite"),
    ):
        words = [ROOT / "classification/tools/train.py", *arguments(tmp_path / "run", *more)]
        done = in_two_processes(*words, good=False)
        assert done.returncode == 1 and message in done.stderr, done.stderr


if __name__ == "__main__":
    work(Path(sys.argv[1]))
