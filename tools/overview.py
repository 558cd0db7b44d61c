"""The first screen of the report: what was run at which scale, what can be said, every difference, what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from core.analysis.colors import BLUE, GREEN
from core.analysis.looks import ADM, CONTROLS
from tools.findings import KINDS, POINT, Added
from tools.groups import method_of
from tools.ours import Members, Number, amount_of, data_of, pair_of
from tools.paper import SCALES, Scale, Table
from tools.runs import Run
from tools.stats import Grid, counted

SETTINGS: Mapping[Scale, str] = {"paper": "the setting of the paper", "proxy": "proxy"}


# --- what was run -----------------------------------------------------------------------------------------------------


def what_was_run(parts: Iterable[tuple[Table, Scale, Members]]) -> Grid:
    """A line for each pair of networks on some data: how many runs, of which seeds, on what, for which tables."""
    found: dict[tuple[str, str, str], dict[object, tuple[Run, int]]] = {}
    tables: dict[tuple[str, str, str], dict[str, None]] = {}
    for table, scale, members in parts:
        for seed, run in ((seed, run) for runs in members.values() for seed, run in runs.items()):
            key = (SETTINGS[scale], pair_of(run), data_of(run))
            found.setdefault(key, {})[run.path] = run, seed
            tables.setdefault(key, {})[table.label] = None
    rows = [["scale", "our networks", "data", "how much", "runs", "seeds", "on", "hours", "for"]]
    for key, runs in found.items():
        amounts = dict.fromkeys(amount_of(run) for run, _ in runs.values())
        devices = dict.fromkeys(device_of(run) for run, _ in runs.values())
        hours = sum(run.seconds for run, _ in runs.values()) / 3600
        seeds = sorted({seed for _, seed in runs.values()})
        told = [_few(amounts), str(len(runs)), _range(seeds), _few(devices), f"{hours:.1f}"]
        rows.append([*key, *told, _together(tables[key])])
    return rows


def device_of(run: Run) -> str:
    """ "CPU", or the GPU's name."""
    if not run.start:
        return "unknown"
    return "CPU" if str(run.start.get("device", "")).startswith("cpu") else str(run.start.get("device_name", "?"))


def _few(words: Iterable[str], most: int = 2) -> str:
    known = [word for word in words if word]
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return "; ".join(known[:most]) + more


def _together(labels: Iterable[str]) -> str:
    """ "Table 1, 3, 10; Figure 10"."""
    kinds: dict[str, list[str]] = {}
    for kind, _, number in (label.partition(" ") for label in labels):
        kinds.setdefault(kind, []).append(number)
    return "; ".join(f"{kind} {', '.join(numbers)}" for kind, numbers in kinds.items())


def _range(seeds: Sequence[int]) -> str:
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def what_is_missing(tables: Iterable[Table], found: Mapping[tuple[str, Scale], Sequence[Number]]) -> list[str]:
    """In words. ``found``: the numbers by table and scale; of a part that was run."""
    told = []
    every = list(tables)
    if not any(scale == "paper" for _, scale in found):
        told.append("Nothing is run in the paper's own setting.")
    for scale in SCALES:
        numbers = [one for (_, of), part in found.items() if of == scale for one in part]
        empty = [one for one in numbers if not one.by_seed]
        single = [one for one in numbers if len(one.by_seed) == 1]
        if numbers:
            where = "At proxy scale" if scale == "proxy" else "In the paper's setting"
            of = f"{where}, of {len(numbers)} numbers of the tables below"
            told.append(f"{of}, {len(empty)} are not run and {len(single)} have one seed.")
    nothing = [table.label for table in every if not any((table.name, scale) in found for scale in SCALES)]
    if nothing:
        told.append(f"Nothing is finished for {_together(nothing)}.")
    return told


# --- every difference, as a forest plot -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A difference as the page draws it: places in percent of the width, 50 being no difference and right better."""

    added: Added
    color: str
    shape: str
    at: float
    left: float
    width: float
    open_left: bool
    """Whether the interval, or the point itself, goes on beyond this side."""
    open_right: bool


@dataclass(frozen=True)
class Axis:
    """Differences that share a scale."""

    title: str
    limit: float
    band: float
    """Percent of the width to either side of the middle that one point takes; 0 of other measures."""
    tables: Sequence[tuple[str, Sequence[Bar]]]
    """By the label of the table."""

    @property
    def count(self) -> str:
        """ "8 differences, 1 gain, 0 losses"."""
        words = [bar.added.verdict for _, bars in self.tables for bar in bars]
        gains, losses = (counted(words.count(word), word) for word in ("gain", "loss"))
        return f"{counted(len(words), 'difference')}, {gains}, {losses}"


def forest(every: Sequence[Added]) -> list[Axis]:
    """Measures in percent on one axis, any other on one of its own in each table."""
    groups: dict[tuple[str, str], list[Added]] = {}
    for added in every:
        measure, table = added.one.measure, added.table.label
        words = "in points of percent" if added.percent else f"{table}: {measure}"
        groups.setdefault((SETTINGS[added.scale], words), []).append(added)
    axes = []
    for (scale, words), group in groups.items():
        limit = limit_of(group)
        sign = "" if group[0].sign > 0 else "; lower is better, so that the axis runs the other way"
        bars = [(label, [bar(one, limit) for one in of]) for label, of in groupby(group, lambda one: one.table.label)]
        band = 50 * POINT / limit if group[0].percent else 0
        axes.append(Axis(f"{words[0].upper()}{words[1:]}, {scale}{sign}", limit, band, bars))
    return axes


def limit_of(group: Sequence[Added]) -> float:
    """Where an axis ends: beyond the means that have an interval, at 1, 2 or 5 times a power of ten."""
    means = [abs(one.difference.mean or 0.0) for one in group]
    certain = [mean for mean, one in zip(means, group, strict=True) if one.difference.interval is not None]
    least = 1.5 * max(certain or means) or 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def bar(added: Added, limit: float) -> Bar:
    """The difference on an axis that ends at ``limit`` to both sides."""
    method, control = method_of(next(iter(added.one.runs.values())))
    color, shape = CONTROLS[control] if control else ADM if method.endswith("+adm") else (BLUE, "o")
    color, shape = (GREEN, "s") if added.kind == "attention" else (color, shape)
    mean = added.sign * (added.difference.mean or 0.0)
    low, high = sorted(added.sign * end for end in added.difference.interval or (added.difference.mean or 0.0,) * 2)

    def place(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / limit)), 1)

    left, right = place(low), place(high)
    return Bar(added, color, SHAPES.get(shape, "square"), place(mean), left, right - left, low < -limit, high > limit)


SHAPES = {"o": "circle", "D": "diamond"}
LEGEND = [
    (ADM[0], "diamond", KINDS["ADM"]),
    (CONTROLS["uniform"][0], "square", "the control with uniform attention, less the same baseline"),
    (CONTROLS["shuffled"][0], "square", "the control with shuffled attention, less the same baseline"),
    (GREEN, "square", KINDS["attention"]),
    (BLUE, "circle", KINDS["method"]),
]
