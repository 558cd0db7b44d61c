"""Files that are whole or not there: written beside and renamed; their hash. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, TrainingError, first_line

_PENDING = ".writing"


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write(temporary)`` and renames the file or folder to ``path``. Nothing is left where it fails.

    Raises: TrainingError where the disk is full or not writable.
    """
    temporary = path.with_name(f"{path.name}{_PENDING}")
    try:
        remove(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if not temporary.is_symlink():
            _sync(temporary)
        if path.is_dir() and not path.is_symlink():
            if not temporary.is_dir() and any(path.iterdir()):  # a checkpoint's folder gives way, a user's never
                raise InputError(f"{path} is a folder with files in it: name a file")
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException as error:
        remove(temporary)
        # torch.save reports a failed write as RuntimeError, safetensors as its own error: both end here too.
        if isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError":
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise TrainingError(f"cannot write {path}: {reason}; what stood there before is untouched") from error
        raise


def leftover(path: Path) -> bool:
    """Whether a killed ``write_atomically`` left this file or folder behind."""
    return path.name.endswith(_PENDING)


def remove(path: Path) -> None:
    """Deletes a file, a link or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def make_folder(folder: Path, option: str = "") -> Path:
    """The folder, which is there then. Raises: InputError where there can be none, naming also the ``option``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}{option and f' ({option})'}: {error.strerror}") from error
    return folder


def save_figure(figure: Any, path: str | Path, dpi: int = 120) -> None:
    """Writes a matplotlib ``figure`` in the format of the suffix (.png, .pdf, .svg, ...).

    Raises: InputError for a missing folder or an unknown suffix; TrainingError where writing fails (full disk, no
    permission). After an error there is neither a half file nor a changed old one.
    """
    path = Path(path)
    suffix, known = path.suffix.lstrip(".").lower(), figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise InputError(f"cannot draw {path}: its name must end in one of .{', .'.join(sorted(known))}")
    if not path.parent.is_dir():
        raise InputError(f"cannot draw {path}: there is no folder {path.parent}; create it first")
    write_atomically(path, lambda file: figure.savefig(file, dpi=dpi, format=suffix))


def save_json(values: Mapping[str, Any], path: str | Path) -> None:
    """Writes ``values`` atomically; JSON has no NaN or infinity, so that these become null.

    Raises: TrainingError where writing fails (see ``write_atomically``).
    """
    text = json.dumps(plain(values, finite=True), indent=2) + "\n"
    write_atomically(Path(path), lambda file: file.write_text(text))


def plain(value: Any, *, finite: bool = False) -> Any:
    """Nested values as JSON and YAML have them: tuples are lists, paths are text.

    ``finite``: numbers that are not are None, for JSON has no word for them (YAML has).
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v, finite=finite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, finite=finite) for v in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
