"""Fixtures of the segmentation tests: data made on the spot, and the commands run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from street import make_street

pytest.importorskip("mmseg", reason="needs the [segmentation] extra")


@pytest.fixture(scope="session")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like Cityscapes: 8 images to train on, 4 to evaluate on, 48 x 64 pixels."""
    return make_street(tmp_path_factory.mktemp("street") / "data")


@pytest.fixture
def train(shell: Any, quick: None) -> Callable[..., Any]:
    """Runs the training command as a shell would see it, without curves but where a test's name says "is_whole"."""
    from segmentation.tools.train import main

    return lambda argv: shell(main, argv)
