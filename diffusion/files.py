"""What commands find around them: JSON beside a network, and the packages that they need."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from core.errors import InputError, first_line
from core.training.command import missing_extra


def read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises: InputError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}") from error


def need_packages(*names: str) -> None:
    """Imports them, after the command line is read, so that --help is quick. Raises: InputError for a missing one."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(error, "diffusion") from error
