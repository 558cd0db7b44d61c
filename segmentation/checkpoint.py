"""mmengine's checkpoints in a run folder: ``checkpoints/iter_<N>.pth``; ``last.pth`` and ``best.pth`` are links."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import leftover
from core.training.checkpoint import link
from core.weights import read_torch

LAST, BEST = "last.pth", "best.pth"


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"iter_{step}.pth"


def numbered(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [p for p in (run / "checkpoints").glob("iter_*.pth") if re.fullmatch(r"iter_\d+", p.stem)]
    return sorted(found, key=lambda p: int(p.stem.removeprefix("iter_")))


def point(run: Path, name: str, step: int) -> None:
    """Lets ``last.pth`` or ``best.pth`` be the checkpoint of an iteration."""
    link(run / "checkpoints", name, checkpoint_path(run, step))


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` and the two that have a name."""
    named = {os.readlink(p) for name in (LAST, BEST) if (p := run / "checkpoints" / name).is_symlink()}
    for old in numbered(run)[:-keep]:
        if old.name not in named:
            old.unlink()


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Raises: InputError for a file that is missing, cut off, no checkpoint, or holds more than plain values."""
    if not file.is_file():
        raise InputError(f"no checkpoint {file}")
    checkpoint = read_torch(file)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{file} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def latest_checkpoint(run: Path, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest readable checkpoint, None where there is none. A damaged newer one is reported and removed.

    For one process alone: it moves ``last.pth`` and clears what a killed save left behind.
    Raises: InputError where there are checkpoints but none is readable.
    """
    for path in (run / "checkpoints").glob("*"):
        if leftover(path):
            path.unlink()
    damaged: list[Path] = []
    for candidate in numbered(run)[::-1]:
        try:
            checkpoint = read_checkpoint(candidate)
        except InputError as error:
            log(f"{error}: looking for the one before it")
            damaged.append(candidate)
            continue
        for bad in damaged:
            log(f"resuming from {candidate} instead of {bad.name}")
            bad.unlink()
        point(run, LAST, int(candidate.stem.removeprefix("iter_")))
        best = run / "checkpoints" / BEST
        if best.is_symlink() and not best.exists():
            best.unlink()
        return checkpoint
    if damaged:
        raise InputError(f"none of the checkpoints of {run} can be read: move the run folder away to start anew")
    return None


def find_checkpoint(run: Path, name: str) -> Path:
    """A run's checkpoint "last", "best" or "iter_400" as its numbered file. Raises: InputError naming all."""
    file = run / "checkpoints" / f"{name}.pth"
    if not file.is_file():
        named = [n for n in (LAST, BEST) if (run / "checkpoints" / n).is_file()]
        known = ", ".join(Path(n).stem for n in (*named, *(p.name for p in numbered(run))))
        raise InputError(f"{run} has no checkpoint {name!r}: " + (f"it has {known}" if known else "none was saved yet"))
    return file.resolve()
