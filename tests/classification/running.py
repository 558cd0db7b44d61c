"""What the tests of the training command share: a small run on real digits, ways to stop it and to compare it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from comparing import assert_same, without_times

from classification.distiller import ClassificationDistiller
from core.training.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "classification/recipes/digits.yaml"
# 30 images of 3 digits at 8 pixels: epochs of 12, 12 and 6. The last maps have 128 and 64 channels.
SMALL = ["--data.classes", "3", "--data.per_class", "10", "--data.image_size", "8", "--batch_size", "12"]


def arguments(out: Path, *more: str, method: str = "dml+adm") -> list[str]:
    fit = ["--fit.epochs", "4", "--fit.log_every", "2", "--fit.device", "cpu", "--fit.trackers", "[]"]
    return ["--config", str(RECIPE), "--method", method, "--out", str(out), *SMALL, *fit, *more]


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Sends SIGTERM to this process during the given steps."""
    real = ClassificationDistiller.after_step

    def after_step(self: ClassificationDistiller, batch: Any, progress: Any) -> None:
        real(self, batch, progress)
        if progress.step + 1 in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ClassificationDistiller, "after_step", after_step)


def metrics(path: Path) -> list[dict[str, Any]]:
    return without_times([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()])


def assert_same_runs(a: Path, b: Path) -> None:
    one, two = read_checkpoint(a / "checkpoints/last"), read_checkpoint(b / "checkpoints/last")
    assert one[0].keys() == {"teacher", "student"}
    assert_same(one, two)
    assert metrics(a) == metrics(b)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (a, b)]
    for key in ("status", "step", "last", "best", "networks", "selected_on"):
        assert summaries[0][key] == summaries[1][key], key
    assert os.readlink(a / "checkpoints/best") == os.readlink(b / "checkpoints/best")
