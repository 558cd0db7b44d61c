"""Which numbers an option may be, said once, in its type: checked wherever a config is made, and shown by --help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from .errors import InputError

HUGE = 10**9
"""No option has a use for more, nor for infinity: it would hang, fill the memory, or lie beyond what float32 can do."""


@dataclass(frozen=True)
class Range:
    """An interval; ``ends`` says by brackets whether its ends belong to it. NaN lies in none."""

    least: float = -HUGE
    most: float = HUGE
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value >= self.least if self.ends[0] == "[" else value > self.least
        return above and (value <= self.most if self.ends[1] == "]" else value < self.most)

    def __str__(self) -> str:
        if self.most != HUGE:
            return f"in {self.ends[0]}{self.least}, {self.most}{self.ends[1]}"
        return "positive" if self.ends[0] == "(" and self.least == 0 else f"at least {self.least}"

    def says(self, value: float) -> str:
        """What a value outside of it must be."""
        if value != value:
            return "must be a number"
        if value > self.most == HUGE:
            return f"must be at most {self.most}"
        return "must not be negative" if str(self) == "at least 0" else f"must be {self}"

    def check(self, name: str, value: float) -> None:
        """Raises: InputError, beginning with ``name``, where the value is outside."""
        if value not in self:
            raise InputError(f"{name} {self.says(value)}: {value}")


Positive = Annotated[float, Range(0, ends="(]")]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, "[)")]
"""1 does not belong to it."""
Factor = Annotated[float, Range(0, 1, "(]")]
Unit = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Pixels = Annotated[int, Range(4, 4096)]
"""Along the side of an image."""
Size = Annotated[int, Range(1, 16384)]
"""Of a part of a network: channels, heads."""
Layers = Annotated[int, Range(1, 1024)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""What every generator takes."""


def range_of(hint: Any) -> Range:
    """The range that a type says, within ``| None``, lists and tuples too; else all that is finite and not huge."""
    return next(_ranges(hint), Range())


@cache
def ranges(kind: type) -> dict[str, Range]:
    """The range of each field of a dataclass; of one whose type has none, all that is finite and not huge."""
    return {name: range_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _ranges(hint: Any) -> Iterator[Range]:
    yield from (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range))
    for part in get_args(hint):
        yield from _ranges(part)


def check_ranges(prefix: str, config: Any) -> None:
    """Raises: InputError naming the first field of a dataclass, with ``prefix``, that has a number out of its range."""
    kind: Any = type(config)
    for name, bounds in ranges(kind).items():
        for value in _numbers(getattr(config, name, None)):
            bounds.check(f"{prefix}{name}", value)


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raises: InputError naming the first parsed option, nested ones too, that is NaN, infinite or beyond any use."""
    bounds = Range(-(2**32), 2**32)
    for name, values in options.items():
        for value in _numbers(values):
            bounds.check(f"--{name}", value)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)
