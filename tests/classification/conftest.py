"""Fixtures of the tests that run the training command in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from classification.tools.train import main
from core.training.command import run_command
from core.training.run import RunFolder


@pytest.fixture
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "is_whole" not in request.node.name:
        monkeypatch.setattr(RunFolder, "draw", lambda self: None)
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str, str]]:
    """Runs the command in this process as a shell would see it: (exit code, stdout, stderr)."""

    def run(argv: list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(lambda: main(argv))
        said = capfd.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run
