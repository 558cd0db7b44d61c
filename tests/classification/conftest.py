"""Fixtures of the tests that run the training command in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from classification.tools.train import main


@pytest.fixture
def command(shell: Any) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs the command in this process as a shell would see it: (exit code, stdout, stderr)."""
    return lambda argv: shell(main, argv)
