"""Checkpoints: one folder per save, written beside and renamed, so that a cut or a full disk never costs a good one.

``checkpoints/step-00000123/`` holds ``<role>.safetensors`` of each trained network and ``state.pt`` (all else that an
exact resume needs, loadable with ``weights_only=True``); ``last`` and ``best`` are links to such folders, or text files
with their names where a file system has no links.

Segmentation's are mmengine's files: ``checkpoints/iter_123.pth``, with the links ``last.pth`` and ``best.pth``.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, TrainingError, first_line
from ..files import files_hash, leftover, remove, write_atomically
from ..weights import read_state_dict, read_torch, save_tensors

LAST, BEST = "last", "best"
_NAME = re.compile(r"step-\d+|iter_\d+\.pth")
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems say that have no symbolic links: exFAT, many mounted drives."""


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = (p for p in folder.glob("*") if _NAME.fullmatch(p.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step, by its name, after which a checkpoint was saved."""
    return int(re.split("[-_]", checkpoint.stem)[1])


def point(name: str, target: Path) -> None:
    """Lets ``last`` or ``best`` be this checkpoint, atomically."""

    def write(path: Path) -> None:
        try:
            path.symlink_to(target.name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            path.write_text(f"{target.name}\n")

    write_atomically(target.with_name(f"{name}{target.suffix}"), write)


def goal(path: Path) -> Path:
    """The checkpoint that ``last`` or ``best`` names, be it by a link or by a text file; any other path is itself."""
    name = path.read_text(errors="replace").strip() if path.is_file() and path.stat().st_size < 64 else ""
    return Path(os.path.realpath(path.with_name(name) if _NAME.fullmatch(name) else path))  # a link to itself is itself


def name_and_prune(target: Path, *, best: bool, keep: int) -> None:
    """Lets ``last`` (and ``best``) be a new checkpoint; removes all but the newest ``keep`` and those two."""
    for name in (LAST, BEST) if best else (LAST,):
        point(name, target)
    prune(target.parent, keep)


def prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the newest ``keep`` and those that ``last`` and ``best`` name."""
    named = {goal(folder / f"{name}{suffix}").name for name in (LAST, BEST) for suffix in ("", ".pth")}
    for old in numbered(folder)[:-keep]:
        if old.name not in named:
            remove(old)


def find_checkpoint(run: Path, name: str) -> Path:
    """``run``'s checkpoint "last", "best" or "step-00000123" ("iter_123"). Raises: InputError naming all it has."""
    folder = run / "checkpoints"
    places = ((n, goal(folder / f"{n}{suffix}")) for n in (name, LAST, BEST) for suffix in ("", ".pth"))
    found = {n: path for n, path in places if path.exists()}
    if name not in found or not name or name != Path(name).name:  # not a path to another run's
        found.pop(name, None)
        known = ", ".join([*found, *(path.stem for path in numbered(folder))])
        raise InputError(
            f"{run} has no checkpoint {name!r}: " + (f"it has {known}" if known else "nothing was saved yet")
        )
    return found[name]


def require_finite(owner: str, values: Mapping[str, Any], when: str) -> None:
    """Raises: TrainingError naming the first of the ``owner``'s weights that is not finite; other values count not."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingError(f"{owner}: the weight {name} is not finite at {when}; nothing was saved")


def save_checkpoint(
    folder: Path,
    step: int,
    networks: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    state: Mapping[str, Any],
    *,
    best: bool = False,
    keep: int = 2,
) -> Path:
    """Saves ``{role: (state dict, metadata)}`` and the state, moves ``last`` (and ``best``), prunes all but ``keep``.

    Raises: TrainingError naming a network whose weights are not finite, or a disk that takes no more: whatever was
    saved before stays.
    """
    # Clones, since the format refuses tensors that share storage (tied weights).
    tensors = {r: {k: v.detach().cpu().contiguous().clone() for k, v in sd.items()} for r, (sd, _) in networks.items()}
    for owner, values in [*tensors.items(), ("outside the networks", state.get("extra", {}))]:
        require_finite(owner, values, f"step {step}")

    def write(temporary: Path) -> None:
        temporary.mkdir()
        files = {role: temporary / f"{role}.safetensors" for role in tensors}
        digests = {file.name: save_tensors(tensors[role], file, networks[role][1]) for role, file in files.items()}
        torch.save({**state, "files": digests}, temporary / "state.pt")

    target = folder / f"step-{step:08d}"
    write_atomically(target, write)
    name_and_prune(target, best=best, keep=keep)
    return target


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """``({role: state dict}, state)`` of one checkpoint folder.

    Raises: InputError for a file that is missing, damaged or not the one that was saved.
    """
    state = read_state(folder)
    return {file.stem: read_state_dict(file) for file in sorted(folder.glob("*.safetensors"))}, state


def read_state(folder: Path) -> dict[str, Any]:
    """What ``state.pt`` of a checkpoint folder says. Raises: InputError where that, or a weight file, is not whole."""
    state = read_torch(folder / "state.pt")
    if not isinstance(state, dict):
        raise InputError(f"{folder / 'state.pt'} is no checkpoint's: it holds a {type(state).__name__}")
    for name, digest in state.get("files", {}).items():
        if not (folder / name).is_file() or files_hash([folder / name]) != digest:
            raise InputError(f"{folder / name} is missing, or not the file that was saved there")
    return state


def latest_checkpoint(
    folder: Path, log: Callable[[str], None], read: Callable[[Path], Any] = read_checkpoint
) -> Any | None:
    """The newest checkpoint that ``read`` can, None where there is none. A damaged newer one is reported and removed.

    For one process alone: it moves ``last`` to what it returns and clears what a killed save left behind.
    Raises: InputError where there are checkpoints but none is readable.
    """
    for path in list(folder.glob("*")):
        if leftover(path):
            remove(path)
    candidates = numbered(folder)[::-1]
    for damaged, candidate in enumerate(candidates):
        try:
            checkpoint = read(candidate)
        except Exception as error:
            log(f"checkpoint {candidate} is damaged ({first_line(error)}): looking for the one before it")
            continue
        for bad in candidates[:damaged]:
            log(f"resuming from {candidate} instead of {bad.name}")
            remove(bad)
        point(LAST, candidate)
        best = candidate.with_name(f"{BEST}{candidate.suffix}")
        if not goal(best).exists():
            if os.path.lexists(best) and not damaged:  # else it is said already
                log(f"{best} is damaged: it names {goal(best).name}, which is not there")
            remove(best)
        return checkpoint
    if candidates:
        raise InputError(f"none of the checkpoints in {folder} can be read: move the run folder away to start anew")
    return None
