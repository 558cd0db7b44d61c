"""Image files: which there are below a folder, and what is in one. The same for every task.

Hidden files and folders (``.ipynb_checkpoints``, ``._x.png``) do not count. Pixels are taken as they are stored: an
EXIF orientation is not applied, as torchvision and timm do not. Grey of 16 bits is scaled to 8, transparency dropped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, notice

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def image_files(folder: Path | str) -> list[str]:
    """The paths of all images in a folder and below it, relative to it and sorted; hidden ones are left out, and said.

    Strings: a million of them take seconds and little memory. Links to folders are followed.
    Raises: InputError naming what cannot be read: a link in a circle or to nothing, a pipe, a forbidden folder.
    """
    found, hidden = _below(str(folder))
    _say_hidden(folder, hidden)
    return found


def class_folders(folder: Path | str) -> dict[str, list[str]]:
    """The images of each class, a sub-folder each, by its name; as ``image_files``, names and paths sorted."""
    entries, hidden = _entries(str(folder))
    classes, total = {}, sum(_is_folder(entry) for entry in hidden)
    for name in sorted(entry.name for entry in entries if _is_folder(entry)):
        classes[name], count = _below(os.path.join(folder, name), (os.path.realpath(folder),))
        total += count
    _say_hidden(folder, total)
    return classes


def is_image_name(name: str) -> bool:
    """Whether a file of that name counts as an image, by its suffix."""
    return name.lower().endswith(EXTENSIONS)


def _say_hidden(folder: Path | str, count: int) -> None:
    if count:
        notice(f"{folder}: {count} hidden file(s) and folder(s), whose names begin with a dot, are left out")


def _below(folder: str, above: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """Images below a folder, sorted, and how many hidden images and folders were left out.

    ``above``: the real paths of the folders on the way to it, none of which may lie in it again.
    """
    found, skipped = [], 0
    for path, own in _walk(folder, "", above):
        found += [path] if own else []
        skipped += not own
    return sorted(found), skipped


def _walk(folder: str, place: str, above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"{folder} is a link to {real}, in which it lies: a circle; delete it")
    entries, hidden = _entries(folder)
    yield from ((place + entry.name, False) for entry in hidden if is_image_name(entry.name) or _is_folder(entry))
    for entry in entries:
        if _is_folder(entry):
            yield from _walk(entry.path, f"{place}{entry.name}/", (*above, real))
        elif is_image_name(entry.name):
            check_file(entry)
            yield place + entry.name, True


def _entries(folder: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    return [e for e in entries if not e.name.startswith(".")], [e for e in entries if e.name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Raises: InputError for a link to nothing or to itself, which would be left out without a word."""
    try:
        if entry.is_symlink() and not entry.name.startswith("."):
            os.stat(entry.path)
        return entry.is_dir()
    except OSError as error:
        raise InputError(f"{entry.path} is a link that leads nowhere ({error.strerror}): delete it") from error


def check_file(entry: os.DirEntry[str] | Path) -> None:
    """Raises: InputError for what is no file that can be read to its end: a pipe, a socket, a device."""
    if not entry.is_file():
        raise InputError(f"{os.fspath(entry)} is no regular file: replace or delete it")


def open_image(file: Path | str | BinaryIO, name: str | None = None) -> Any:
    """The decoded PIL image, RGB. ``name``: what a message calls it, its path unless given.

    Raises: InputError for what is broken or no image, of more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (a bomb), or of
    32 bits a channel, whose range is unknown.
    """
    from PIL import Image

    name = name or str(file)
    if isinstance(file, (str, os.PathLike)):
        check_file(Path(file))
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image.load()
            return image if image.mode == "RGB" else _to_rgb(image, name)
    except InputError:
        raise
    except Exception as error:  # a damaged image can raise anything
        raise broken_image(name, error) from error


def read_header(file: Path) -> tuple[str, tuple[int, int]]:
    """Mode and size (width, height) of an image, which is not decoded.

    Raises: InputError for what is no image, or a PNG that is cut off.
    """
    from PIL import Image

    check_file(file)
    try:
        with open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(opened) as image:
                mode, size, kind = image.mode, image.size, image.format
            if kind == "PNG" and not _ends_as_png(file):
                raise ValueError("cut off")
    except Exception as error:  # a damaged image can raise anything
        raise broken_image(str(file), error) from error
    return mode, size


def _ends_as_png(file: Path) -> bool:
    with open(file, "rb") as opened:
        opened.seek(-min(1024, file.stat().st_size), os.SEEK_END)
        return b"IEND" in opened.read()


def _to_rgb(image: Any, name: str) -> Any:
    """Pillow would clip more than 8 bits to white."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits a pixel, and what they mean is unknown: save it with 8 or 16 bits")
    return image.convert("RGB")


def broken_image(name: str, error: BaseException | None = None) -> InputError:
    """What to say of an image that cannot be decoded."""
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return InputError(f"cannot decode {name}: more than {most:,} pixels; replace or delete it")
    return InputError(f"cannot decode {name}: broken or no image; replace or delete it")
