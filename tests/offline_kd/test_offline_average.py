"""The moving average of a student under a fixed teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_runs, lines, offline_arguments, read, stop_at

from offline_kd.tools.evaluate import main as evaluate

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]


@pytest.mark.parametrize("method", ["kd", "kd+adm"])
def test_it_is_resumed_and_evaluated(
    command: Command, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Any, method: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--fit.ema_decay", "0.5"]
    assert command(offline_arguments(whole, teacher, *more, method=method))[0] == 0
    stop_at(monkeypatch, 4)
    assert [command(offline_arguments(cut, teacher, *more, method=method))[0] for _ in range(2)] == [130, 0]
    assert_same_runs(whole, cut)
    files = {file.stem for file in (whole / "checkpoints/last").glob("*.safetensors")}
    assert files == {"student", "student_ema"}
    assert shell(evaluate, [str(whole), "--device", "cpu"])[0] == 0
    values, last = read(whole / "evaluation-last-test.json")["values"], lines(whole, "evaluation")[-1]
    for role in ("teacher", "student", "student_ema"):
        assert values[f"{role}/top1"] == last[f"{role}/top1"]


def test_norm_refuses_it(command: Command, teacher: Path, tmp_path: Path) -> None:
    code, _, error = command(offline_arguments(tmp_path / "run", teacher, "--fit.ema_decay", "0.5", method="norm"))
    assert code == 2 and len(error.splitlines()) == 1 and "fit.ema_decay" in error
