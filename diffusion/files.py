"""What commands find around them: JSON beside a network, and the packages that they need."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import InputError, first_line
from core.files import files_hash, write_atomically
from core.training import run
from core.training.command import missing_extra

ABOUT = "adm.json"
LAYERS = 1024
"""At most: diffusers would build millions of them for hours."""


def read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises: InputError where it is damaged."""
    if not file.is_file():
        return {}
    return run.read_json(file)


def read_about(folder: Path) -> dict[str, Any]:
    """What ``adm.json`` says of an exported network; empty where there is none.

    Raises: InputError naming the file that is damaged, missing, or not the one that was exported.
    """
    said = read_json(folder / ABOUT)
    for name, digest in said.pop("files", {}).items():
        if not (folder / name).is_file() or files_hash([folder / name]) != digest:
            raise InputError(
                f"{folder / name} is missing, or not the file that was exported: bring it back, or delete {folder}"
            )
    return said


def check_layers(folder: Path) -> None:
    """Raises: InputError where the ``config.json`` of a diffusers network is damaged, or says layers without end."""
    said = read_json(folder / "config.json")
    for key in ("num_layers", "layers_per_block"):
        if isinstance(value := said.get(key), (int, float)) and not 1 <= value <= LAYERS:
            raise InputError(f"{folder}/config.json says {key} {value}: a network has 1 to {LAYERS} layers")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Says in a line what diffusers finds wrong with a folder. Raises: InputError, beginning with ``what``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # values of a wrong kind in a folder's JSON can raise anything
        raise InputError(f"{what}: {first_line(error)}") from error


def save_pipeline(
    folder: Path, network: Any, place: str, pipeline: str, scheduler: Any, about: Any, **parts: list[str | None]
) -> None:
    """Writes a folder of a diffusers pipeline and our ``adm.json``, whole or not at all.

    Args: ``place``: the network's folder in it, "." for the folder itself; the pipeline's class; what
        scheduler_config.json and adm.json say; the pipeline's further ``parts``, library and class.
    Raises: TrainingError where the disk is full.
    """
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet" if place == "." else place: ["diffusers", type(network).__name__],
        **parts,
    }

    def write(temporary: Path) -> None:
        network.save_pretrained(temporary / place)
        (temporary / "scheduler").mkdir()
        for name, content in {"scheduler/scheduler_config.json": scheduler, "model_index.json": index}.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        digests = {file.relative_to(temporary).as_posix(): files_hash([file]) for file in files}
        run.save_signed_json({**about, "files": digests}, temporary / ABOUT)

    write_atomically(folder, write)


def need_packages(*names: str) -> None:
    """Imports them, after the command line is read, so that --help is quick. Raises: InputError for a missing one."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(error, "diffusion") from error
