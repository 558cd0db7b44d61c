"""Fixtures of the tests that run the training command in this process: a teacher, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import CPU, ENOUGH, TEACHER, train_whole

from offline_kd.tools.train import main


@pytest.fixture
def command(shell: Any) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs the command in this process as a shell would see it: (exit code, stdout, stderr)."""
    return lambda argv: shell(main, argv)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a teacher that knows 5 digits: trained by classification's command."""
    from classification.tools.train import main as train_online

    out = tmp_path_factory.mktemp("teacher") / "run"
    networks = ["--networks.teacher.name", TEACHER, "--method", "vanilla"]
    schedule = ["--optimizer.lr", "0.05", "--schedule.milestones", "[6]", "--fit.epochs", "8", "--fit.log_every", "7"]
    train_whole(train_online, [*ENOUGH, *CPU, *networks, *schedule, "--out", str(out)])
    return out
