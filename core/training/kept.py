"""Runs of which the numbers alone are kept, a line each in a ``runs.jsonl``: no tool can load them. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError

KEPT = "runs.jsonl"


def refuse_kept(path: Path | str) -> None:
    """Raises: InputError where a path that holds no run names one, or several, whose numbers alone are kept."""
    path = Path(path)
    for folder in (path, *path.parents):
        if (file := folder / KEPT).is_file():
            begin = "" if folder == path else path.relative_to(folder).as_posix()
            if any(name == begin or not begin or name.startswith(f"{begin}/") for name in _names(file)):
                raise InputError(
                    f"{path} is a kept result, and weights are not kept: {file} has its numbers, "
                    "which tools/compare.py reads, and its command, which trains it anew"
                )
            return


def _names(file: Path) -> list[str]:
    """The runs in a file, as far as it is whole: who reads their numbers says what is damaged."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            found.append(str(json.loads(line)["run"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found
