"""What every training command does around its training: refuse, recognise a finished run, look only, exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import leftover, remove
from .checkpoint import prune
from .command import DONE, INTERRUPTED
from .run import RunFolder, is_main_process


def open_run(
    out: Path | str, resolved: Mapping[str, Any], may_change: Sequence[str], *, keep: int, main: bool | None = None
) -> RunFolder | None:
    """The run folder of a command, with nothing written into it; None where its run is finished, which is said.

    Whoever trains calls its ``open()`` after every check has passed: a refused command leaves nothing behind.

    Args and errors: as of ``RunFolder``; ``keep``: checkpoints that a finished run keeps besides the best, should it
    have been killed before it removed the others; ``main``: by this process's RANK unless given.
    """
    run = RunFolder(out, resolved, main=is_main_process() if main is None else main, may_change=may_change)
    if not run.finished:
        return run
    if run.main:
        prune(run.checkpoints, keep)
        if left := [path for path in run.path.glob("*") if leftover(path)]:  # killed in its last drawing
            for path in left:
                remove(path)
            run.draw()
    run.log(f"{run.path} is finished; its results are in {run.path / 'summary.json'}")
    return None


def exit_code(result: Mapping[str, Any]) -> int:
    """Of a command whose run ended with this summary."""
    return DONE if result["status"] == "finished" else INTERRUPTED


def dry_run(resolved: Mapping[str, Any], lines: Iterable[str], seconds: Callable[[], Iterable[str]] | None) -> int:
    """Prints the config, then ``lines`` as they come and, with ``--time``, those of ``seconds()``.

    ``lines``: networks, parameters, map shapes, memory. ``seconds``: takes real steps; None without ``--time``.
    """
    import yaml

    from ..files import plain

    print(yaml.safe_dump(plain(resolved), sort_keys=False))
    for line in lines:
        print(line, flush=True)
    for line in seconds() if seconds is not None else ["how long it takes: --dry-run --time"]:
        print(line, flush=True)
    return DONE


def estimate(steps: int, seconds: float, device: object) -> list[str]:
    """What ``--dry-run --time`` says of a run of so many steps."""
    return [
        f"{seconds:.3f} s a step on {device}",
        f"estimate: {steps * seconds / 3600:.2f} hours, evaluation not counted",
    ]


def gigabytes(size: int) -> str:
    """The line on memory of a dry run, from bytes (see ``core.training.step.memory_estimate``)."""
    return f"memory: about {size / 2**30:.2f} GiB a process for weights, gradients, optimiser and activations"
