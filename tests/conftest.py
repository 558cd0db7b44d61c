"""What all tests share: the small real data of the developers, where it is, and quiet, repeatable torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data and weights; ADM_SHARED_DATA names it, `../shared/data` is looked at otherwise."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ADM_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"needs the folder of small real data: {folder} is absent (name it by ADM_SHARED_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
