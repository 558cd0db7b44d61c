"""Offline distillation that ends where its student gets no better."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from runs import lines, offline_arguments, read

pytestmark = pytest.mark.usefixtures("quick")


def test_the_student_decides_and_the_fixed_teacher_does_not(
    command: Callable[[list[str]], tuple[int, str, str]], teacher: Path, tmp_path: Path
) -> None:
    more = ["--data.validation", "0.2", "--fit.epochs", "20", "--fit.patience", "1"]
    code, _, error = command(offline_arguments(tmp_path / "run", teacher, *more))
    assert code == 0 and "stopped early" in error
    scores = [line["student/top1"] for line in lines(tmp_path / "run", "evaluation")]
    assert scores[-1] <= scores[-2] and all(b > a for a, b in pairwise(scores[:-1]))
    summary = read(tmp_path / "run/summary.json")
    assert summary["status"] == "finished" and summary["best"]["student/top1"] == scores[-2]
