"""Two processes (gloo, CPU) against one: the whole chain has the same gradients, metrics and students.

The test starts this very file under torchrun (`work` below) and compares what it leaves with what one process computes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, ROOT, Gradients, gradients_of, in_two_processes, metrics

pytest.importorskip("diffusers")

from core.training.distiller import Progress
from diffusion.progressive.distiller import BaseDistiller, ProgressiveDistiller
from diffusion.sampling import load_student
from diffusion.tools.train import main

ARGUMENTS = [
    "progressive", "--config", str(ROOT / "diffusion/recipes/digits_progressive.yaml"), "--network.width", "8",
    "--network.groups", "4", "--chain", "[4,2,1]", "--base.steps", "2", "--rounds.steps", "2", "--rounds.last_steps",
    "2", "--batch_size", "8", "--fit.log_every", "1", *CPU, "--progress_bar", "false",
]  # fmt: skip
ROUNDS = ("base", "round-0002", "round-0001")


def train(out: Path) -> Gradients:
    """The chain with times and noise that follow from each image; the gradients of each optimiser step."""

    def drawn(batch: Any, times: int, stride: int) -> Any:
        image = batch["image"]
        k = 1 + (image.abs().sum((1, 2, 3)) * 7919).long() % times
        return {**batch, "t": k * stride, "noise": torch.sin(50 * image + torch.arange(64.0).view(1, 1, 8, 8))}

    def base(self: BaseDistiller, batch: Any, progress: Progress) -> Any:
        return drawn(batch, self.schedule.timesteps, 1)

    def halving(self: ProgressiveDistiller, batch: Any, progress: Progress) -> Any:
        return drawn(batch, self.steps, self.stride)

    with gradients_of(torch.optim.Adam) as (patch, gradients):
        patch.setattr(BaseDistiller, "before_step", base)
        patch.setattr(ProgressiveDistiller, "before_step", halving)
        assert main([*ARGUMENTS, "--out", str(out)]) == 0
    return gradients


def work(out: Path) -> None:
    """What each of the two processes does."""
    torch.save(train(out), out.parent / f"gradients{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    in_two_processes(__file__, tmp_path / "two")
    one = train(tmp_path / "one")
    assert len(one) == 6
    for rank in (0, 1):
        two = torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True)
        for expected, found in zip(one, two, strict=True):
            largest = max(float(a.abs().max()) for a in expected)
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * largest)
    for name in ROUNDS:
        runs = [tmp_path / processes / name for processes in ("one", "two")]
        for row, other in zip(*map(metrics, runs), strict=True):
            for key in row.keys() - {"kind", "adm/similarity_min", "adm/similarity_max"}:
                assert other[key] == pytest.approx(row[key], rel=2e-3, abs=1e-6), (name, key)
        role = "teacher" if name == "base" else "student"
        students = [load_student(tmp_path / processes / name / role) for processes in ("one", "two")]
        for a, b in zip(*(student.model.parameters() for student in students), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-4)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
