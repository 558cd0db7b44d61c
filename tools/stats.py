"""Means, spreads and paired differences over seeds, and grids of text as Markdown or plain columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Grid = Sequence[Sequence[str]]
"""Lines of cells, the first line the head."""


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None for a mean of nothing and a deviation of one value."""
    found = list(values)
    return fmean(found) if found else None, stdev(found) if len(found) > 1 else None


def spread(values: Iterable[float], digits: int = 2, sign: str = "") -> str:
    """``60.58 ± 0.63``; the value alone where there is one, ``-`` where there is none. ``sign``: "+" writes a plus."""
    mean, std = mean_std(values)
    if mean is None:
        return "-"
    return f"{mean:{sign}.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % t interval of the mean of two values or more."""
    from scipy.special import stdtrit

    reach = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - reach, fmean(values) + reach


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided, of the t test that the mean of these is 0; None of one value, or of equal ones."""
    from scipy.special import stdtr

    if len(values) < 2:
        return None
    error = stdev(values) / math.sqrt(len(values))
    return float(2 * stdtr(len(values) - 1, -abs(fmean(values)) / error)) if error > 0 else None


@dataclass(frozen=True)
class Difference:
    """What is left of our values less theirs, seed by seed; its mean; its 95 % t interval from two seeds on."""

    by_seed: Mapping[Any, float]
    mean: float | None
    interval: tuple[float, float] | None

    def told(self, digits: int = 2) -> str:
        """``+0.28 (-0.10 to +0.66)``, ``+0.28 (one seed)``, or nothing where no seed is common."""
        if self.mean is None:
            return ""
        if self.interval is None:
            return f"{self.mean:+.{digits}f} (one seed)"
        low, high = self.interval
        return f"{self.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"

    def verdict(self, baseline: str) -> str:
        """What may be said of it: a difference only where the interval leaves out zero."""
        if not self.by_seed:
            return f"no seed in common with a {baseline} of these settings"
        if self.interval is None:
            return "one seed in common: no interval"
        low, high = self.interval
        return f"{'higher than' if low > 0 else 'lower than' if high < 0 else 'not distinguishable from'} {baseline}"


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Difference:
    """The difference over the seeds that both have."""
    by_seed = {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}
    values = list(by_seed.values())
    return Difference(by_seed, mean_std(values)[0], interval(values) if len(values) > 1 else None)


def markdown(grid: Grid, *, aligned: bool = False) -> str:
    """A Markdown table. ``aligned``: its columns stand below each other, so that it is legible as it is."""
    widths = _widths(grid) if aligned else [0] * len(grid[0])
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in grid]
    lines.insert(1, "|" + "".join("-" * max(3, w + 2) + "|" for w in widths))
    return "\n".join(lines)


def columns(grid: Grid) -> str:
    """Plain columns for a terminal."""
    widths = _widths(grid)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in grid)


def _widths(grid: Grid) -> list[int]:
    return [max(map(len, column)) for column in zip(*grid, strict=True)]


def counted(number: int, word: str) -> str:
    """ "1 loss", "2 losses"."""
    return f"{number} {word}{'' if number == 1 else 'es' if word.endswith('s') else 's'}"
