"""Two processes (gloo, CPU) against one: same gradients, losses and scores, and the teacher unmoved on both.

The test starts this very file under torchrun (`work` below) and compares what it leaves with what one process computes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import gradients_of, in_two_processes, metrics, read
from runs import offline_arguments as arguments
from torch import nn

METHODS = ("vanilla", "kd+adm")
# Batches of 14, 14, 14, 14 and 4 images (a last one of 2 and 2), and 180 test images.
SHORT = ["--batch_size", "14", "--fit.epochs", "1", "--fit.log_every", "1", "--progress_bar", "false"]


def train(out: Path, teacher: Path, method: str) -> dict[str, Any]:
    """One epoch without what is not a sum over images: {gradients of each step; the teacher's state at the end}.

    That is BatchNorm's statistics (frozen here), and phi's own loss, a quotient of two sums over the batch.
    """
    import classification.training
    from offline_kd.tools.train import main

    built: list[Any] = []
    real_build = classification.training.build

    def build(command: Any) -> Any:
        built.append(real_build(command))
        return built[-1]

    with gradients_of(torch.optim.SGD) as (patch, gradients):
        patch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
        patch.setattr(classification.training, "build", build)
        phi = ["--adm.phi_loss", "feature"] if "+" in method else []
        assert main(arguments(out, teacher, *SHORT, *phi, method=method)) == 0
    return {"gradients": gradients, "teacher": built[0].distiller.networks["teacher"].state_dict()}


def work(out: Path, teacher: Path) -> None:
    """What each of the two processes does."""
    report = {method: train(out / method, teacher, method) for method in METHODS}
    torch.save(report, out.parent / f"report{os.environ['RANK']}.pt")


@pytest.mark.usefixtures("quick")
def test_two_processes_train_as_one(tmp_path: Path, teacher: Path) -> None:
    from core.training.checkpoint import read_checkpoint

    in_two_processes(__file__, tmp_path / "two", teacher)
    reports = [torch.load(tmp_path / f"report{rank}.pt", weights_only=True) for rank in (0, 1)]
    weights = read_checkpoint(teacher / "checkpoints/last")[0]["teacher"]
    for method in METHODS:
        one = train(tmp_path / "one" / method, teacher, method)
        assert len(one["gradients"]) == 5
        for report in reports:
            for expected, found in zip(one["gradients"], report[method]["gradients"], strict=True):
                for a, b in zip(expected, found, strict=True):
                    assert (a is None) == (b is None)
                    if a is not None and b is not None:
                        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()) + 1e-7)
            assert report[method]["teacher"].keys() == weights.keys()
            assert all(torch.equal(value, weights[name]) for name, value in report[method]["teacher"].items())
        runs = [tmp_path / "one" / method, tmp_path / "two" / method]
        summaries = [read(run / "summary.json") for run in runs]
        scores = [{k: v for k, v in summary["teacher"].items() if k != "split"} for summary in summaries]
        assert scores[1] == pytest.approx(scores[0], rel=1e-5)
        for expected, found in zip(*map(metrics, runs), strict=True):
            assert found.keys() == expected.keys()
            for name in expected.keys() - {"kind", "split"}:
                assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
