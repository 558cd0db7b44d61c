"""Fixtures of the tests that run the training command in this process: a teacher, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offline_running import DIGITS, FIT, TEACHER

from core.training.run import RunFolder
from offline_kd.tools.train import main


@pytest.fixture
def command(shell: Any) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs the command in this process as a shell would see it: (exit code, stdout, stderr)."""
    return lambda argv: shell(main, argv)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a teacher that knows 5 digits: trained by classification's command."""
    from accelerate.state import AcceleratorState

    from classification.tools.train import main as train_online

    out = tmp_path_factory.mktemp("teacher") / "run"
    networks = ["--networks.teacher.name", TEACHER, "--method", "vanilla"]
    schedule = ["--optimizer.lr", "0.05", "--schedule.milestones", "[6]", "--fit.epochs", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda self: None)
        assert train_online([*DIGITS, *FIT, *networks, *schedule, "--out", str(out)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return out
