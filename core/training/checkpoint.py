"""Checkpoints: one folder per save, written beside and renamed, so that a cut or a full disk never costs a good one.

``checkpoints/step-00000123/`` holds ``<role>.safetensors`` of each trained network and ``state.pt`` (all else that an
exact resume needs, loadable with ``weights_only=True``); ``last`` and ``best`` are links to such folders.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, TrainingError, first_line
from ..files import leftover, remove, write_atomically

LAST, BEST = "last", "best"


def link(folder: Path, name: str, target: Path) -> None:
    """Points ``folder/name`` at ``target`` (a sibling), atomically."""
    write_atomically(folder / name, lambda path: path.symlink_to(target.name))


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
    from safetensors.torch import save_file

    tensors = {role: {k: v.detach().contiguous().cpu() for k, v in sd.items()} for role, (sd, _) in networks.items()}
    for owner, values in [*tensors.items(), ("outside the networks", state.get("extra", {}))]:
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise TrainingError(f"{owner}: the weight {name} is not finite at step {step}; nothing was saved")

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for role, values in tensors.items():
            # Without clones, tensors that share storage (tied weights) are refused by the format.
            save_file(_untied(values), temporary / f"{role}.safetensors", dict(networks[role][1]))
        torch.save(dict(state), temporary / "state.pt")

    target = folder / f"step-{step:08d}"
    write_atomically(target, write)
    link(folder, LAST, target)
    if best:
        link(folder, BEST, target)
    for old in numbered(folder)[:-keep]:
        if old.name != os.readlink(folder / LAST) and old.name != _best_name(folder):
            shutil.rmtree(old)
    return target


def _untied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, value in values.items():
        pointer = value.untyped_storage().data_ptr()
        result[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return result


def _best_name(folder: Path) -> str | None:
    return os.readlink(folder / BEST) if (folder / BEST).is_symlink() else None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """``({role: state dict}, state)`` of one checkpoint folder. Raises whatever a damaged file raises."""
    from safetensors.torch import load_file

    networks = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return networks, torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def latest_checkpoint(
    folder: Path, log: Callable[[str], None]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest readable checkpoint, None where there is none. A damaged newer one is reported and removed.

    For one process alone: it moves ``last`` to what it returns and clears what a killed save left behind.
    Raises: InputError where there are checkpoints but none is readable.
    """
    for path in list(folder.glob("*")):
        if leftover(path):
            remove(path)
    candidates = numbered(folder)[::-1]
    damaged: list[Path] = []
    for candidate in candidates:
        try:
            checkpoint = read_checkpoint(candidate)
        except Exception as error:
            log(f"checkpoint {candidate} is damaged ({first_line(error)}): looking for the one before it")
            damaged.append(candidate)
            continue
        for bad in damaged:
            log(f"resuming from {candidate} instead of {bad.name}")
            shutil.rmtree(bad)
        link(folder, LAST, candidate)
        if (folder / BEST).is_symlink() and not (folder / BEST).exists():
            (folder / BEST).unlink()
        return checkpoint
    if candidates:
        raise InputError(f"none of the checkpoints in {folder} can be read: move the run folder away to start anew")
    return None
