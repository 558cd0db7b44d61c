"""The two kinds of failure that a command reports in one line, without a traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: says in one line what is wrong and how to mend it. Commands exit with 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on (NaN loss, full disk): says in one line where. Commands exit with 1."""


_notices: list[str] = []


def notice(message: str) -> None:
    """A line on the terminal about something legal, once a process; the run that is opened next logs it too."""
    if message not in _notices and os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
        _notices.append(message)


def notices() -> list[str]:
    """What was said by ``notice`` since it was last asked for."""
    said = _notices.copy()
    _notices.clear()
    return said


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_label(label: str, methods: Iterable[str]) -> tuple[str, bool]:
    """A label of ``methods``: ``"dml+adm" -> ("dml", True)``. Raises: InputError offering the nearest one."""
    known = list(methods)
    name, plus, extra = label.partition("+")
    if name in known and (not plus or extra == "adm"):
        return name, bool(plus)
    raise unknown("method", label, [f"{m}{suffix}" for m in known for suffix in ("", "+adm")])


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for an unknown name, offering the nearest known one, e.g. ``unknown("method", "dmll", METHODS)``."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} {name!r}: {hint}")
