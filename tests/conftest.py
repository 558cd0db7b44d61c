"""What all tests share: the small real data of the developers, where it is, and quiet, repeatable torch."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import undrawn

# Data workers that a stopped run left are waited for where garbage is collected, be it in another test: not 5 s each.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2

Shell = Callable[[Callable[[list[str]], int], list[str]], tuple[int, str, str]]


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections of garbage, of which mmengine starts many, need not look at it."""
    gc.collect()
    gc.freeze()


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
    from core.errors import notices

    torch.manual_seed(0)
    notices()  # what a refused command said before is not the next run's to log


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs of training commands in this process: no curves but where a test's name says "is_whole", no state left."""
    from core.training.run import RunFolder

    draw = RunFolder.draw
    with undrawn() as patch:
        if "is_whole" in request.node.name:
            patch.setattr(RunFolder, "draw", draw)
        yield


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    """Runs a tool's ``main`` in this process as a shell would see it: (exit code, stdout, stderr)."""
    from core.training.command import run_command

    def run(main: Callable[[list[str]], int], argv: list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(lambda: main(argv))
        said = capfd.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run
