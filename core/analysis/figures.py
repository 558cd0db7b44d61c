"""Writing a figure so that a reader never meets half of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write ``figure`` in the format of the suffix (.png, .pdf, .svg, ...).

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
