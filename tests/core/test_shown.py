"""DML's own term: kept by the name that every imitation has, and shown by its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.analysis import curves
from core.training.recorder import Recorder
from core.training.run import RunFolder

LOSSES = {"student/ce": 1.0, "student/kd": 0.5, "teacher_2/kd": 0.25}


@pytest.mark.parametrize(("method", "name"), [("dml+adm", "dml"), ("dml", "dml"), ("kd+adm", "kd"), ("kdcl", "kd")])
def test_the_term_of_mutual_learning_is_shown_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    drawn: list[Any] = []
    tracked: dict[str, float] = {}
    monkeypatch.setattr(curves, "draw_curves", lambda metrics, path: drawn.extend(metrics))
    run = RunFolder(tmp_path / "run", {"method": method})
    run.open()
    recorder = Recorder(
        run, torch.device("cpu"), 1, lambda x: x, lambda x: [x], "", total=1, log_every=1, keep=1,
        track=lambda values, step: tracked.update(values),
    )  # fmt: skip
    recorder.evaluated(1, LOSSES)
    recorder.draw()
    shown = {"student/ce": 1.0, f"student/{name}": 0.5, f"teacher_2/{name}": 0.25}
    assert tracked == {f"evaluation/{key}": value for key, value in shown.items()}
    assert drawn == [{"kind": "evaluation", "step": 1, **shown}]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == {"kind": "evaluation", "step": 1, **LOSSES}
