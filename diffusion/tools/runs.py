"""What the tools share: the networks of a run, the data it was trained on, and where to compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import InputError
from diffusion.data import DataConfig


def find_students(folders: Sequence[str | Path], steps: Sequence[int] = ()) -> list[Path]:
    """The network folders among ``folders``, and of each run of a chain its rounds' students, most steps first.

    Args: ``steps``: of a run, only the students that sample in so many steps.
    Raises: InputError for a folder that is neither, and where a run has no student of one of these step counts.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if (folder / "config.json").is_file():
            found.append(folder)
            continue
        rounds = {int(path.parent.name.removeprefix("round-")): path for path in folder.glob("round-*/student")}
        if not rounds:
            raise InputError(f"{folder} is neither a network's folder (config.json) nor a run with a finished round")
        if missing := sorted(set(steps) - set(rounds)):
            raise InputError(f"{folder} has no student of {missing[0]} steps, only of {sorted(rounds, reverse=True)}")
        found += [rounds[n] for n in sorted(steps or rounds, reverse=True)]
    return found


def home(folder: str | Path) -> Path:
    """Where results go: a run's folder; for a network's folder, which stays as diffusers wrote it, the round's."""
    folder = Path(folder)
    return folder.parent if (folder / "config.json").is_file() else folder


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.yaml`` of a run, or of the round or run around a network's folder; empty where there is none."""
    import yaml

    for place in (folder, folder.parent, folder.parent.parent):
        file = place / "config.yaml"
        if file.is_file():
            return yaml.safe_load(file.read_text()) or {}
    return {}


def data_of(folder: Path) -> DataConfig:
    """The images that a run, or a network of it, was trained on; the defaults where that is not known."""
    return DataConfig(**read_config(folder).get("data", {}))
