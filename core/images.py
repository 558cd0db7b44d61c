"""Image files: which there are below a folder, and what is in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def image_files(folder: Path | str) -> list[str]:
    """The paths of all images in a folder and below it, relative to it and sorted; hidden files are left out.

    Strings: a million of them take seconds and little memory. Links to folders are followed.
    """
    folder = str(folder)
    return sorted(
        os.path.join(place, file)[len(folder) + 1 :]
        for place, _, members in os.walk(folder, followlinks=True)
        for file in members
        if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
    )


def open_image(file: Path | str | BinaryIO, name: str | None = None) -> Any:
    """The decoded PIL image, RGB. ``name``: what a message calls it, its path unless given.

    Raises: InputError for what is broken or no image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    # Pillow's plug-ins raise these three for unknown, truncated and damaged files.
    except (OSError, SyntaxError, ValueError) as error:
        raise broken_image(name or str(file)) from error


def broken_image(name: str) -> InputError:
    """What to say of an image that cannot be decoded."""
    return InputError(f"cannot decode {name}: broken or no image; replace or delete it")
