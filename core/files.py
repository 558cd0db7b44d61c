"""Files that are whole or not there: written beside and renamed; their hash. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, TrainingError, first_line

_PENDING = ".writing"
_PROXIES = ("tiny-imagenet-32", "cifar10-jpeg", "cifar10-jpeg-2000", "camvid")


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_atomically(
    path: Path, write: Callable[[Path], object], *, flush: Callable[[Path], object] | None = None
) -> None:
    """Calls ``write(temporary)`` and renames the file or folder to ``path``. Nothing is left where it fails.

    ``flush``: brings what was written to the disk; unless given, file by file, which takes minutes of 100,000.

    Raises: TrainingError where the disk is full or not writable; InputError where a file would take a folder's place,
    or a device's.
    """
    temporary = path.with_name(f"{path.name}{_PENDING}")
    try:
        remove(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if not temporary.is_symlink():
            (flush or _sync)(temporary)
        _check_kind(path, temporary)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        # torch.save reports a failed write as RuntimeError, safetensors as its own error: both end here too.
        if isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError":
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise TrainingError(f"cannot write {path}: {reason}; what stood there before is untouched") from error
        raise


def _check_kind(path: Path, temporary: Path) -> None:
    if path.is_symlink() or temporary.is_symlink() or not path.exists():
        return
    if not (path.is_dir() if temporary.is_dir() else path.is_file()):
        kind = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"cannot write {path}: it is {kind}; choose another name")


def leftover(path: Path) -> bool:
    """Whether a killed ``write_atomically`` left this file or folder behind."""
    return path.name.endswith(_PENDING)


def remove(path: Path) -> None:
    """Deletes a file, a link or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _sync(path: Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def proxy_of(path: Path) -> str | None:
    """The data of the tables' proxies, or their weights, that a path names, as tools/prepare_data.py calls them."""
    if re.fullmatch(r"resnet\d+-cifar10\.safetensors", path.name):
        return "cifar10-resnets"
    return next((part for part in reversed(path.parts) if part in _PROXIES), None)


def how_to_make(path: str | Path) -> str:
    """For an error about data that are not there: what makes them, if they are the tables' proxies'; else nothing."""
    name = proxy_of(Path(path))
    return "" if name is None else f"; tools/prepare_data.py {name} --from DOWNLOAD makes it (docs/proxies.md)"


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
