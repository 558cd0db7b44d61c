"""Our numbers beside the paper's: what was run for a table, and what each method adds to its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from tools.paper import Cell, Metric, Row, Scale, Table
from tools.runs import Run, read_run, seeds_of
from tools.stats import Grid, mean_std, paired, spread


@dataclass(frozen=True)
class Number:
    """A cell of a table: the paper's number where there is one, and ours by seed."""

    table: str
    row: str
    column: str
    metric: Metric
    scale: Scale
    by_seed: Mapping[int, float]
    paper: float | None = None
    label: str | None = None

    @property
    def measure(self) -> str:
        """What ours is: a proxy's may be another measure than the paper's."""
        return (self.metric.proxy if self.scale == "proxy" else None) or self.metric.name

    @property
    def difference(self) -> float | None:
        """Our mean less the paper's number, where both are the same measure."""
        mean, _ = mean_std(self.by_seed.values())
        same = self.measure == self.metric.name
        return mean - self.paper if same and mean is not None and self.paper is not None else None


@dataclass(frozen=True)
class Captioned:
    """A grid with what stands above it."""

    caption: str
    grid: Grid


def gather(table: Table, scale: Scale, runs: Path, results: Path) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """The finished runs of a table by id and seed; and why others do not count.

    From ``runs``, else from ``results``: from ``reproduce`` there, laid out like ``runs``, or where the table says.
    """
    members: dict[str, dict[int, Run]] = {}
    left: dict[str, None] = {}
    for run_id, settings in table.runs.items():
        if scale not in settings:
            continue
        found: dict[int, Run] = {}
        why: dict[int, str] = {}
        for stem in (settings[scale].stem(runs), *settings[scale].kept_stems(results)):
            for seed, path in seeds_of(stem).items():
                try:
                    run = read_run(path)
                except InputError as error:
                    why[seed] = str(error)
                    continue
                if run.finished:
                    found.setdefault(seed, run)
                else:
                    why[seed] = f"{path} is not finished"
        left |= {reason: None for seed, reason in why.items() if seed not in found}
        if found:
            members[run_id] = dict(sorted(found.items()))
    return members, list(left)


def numbers(table: Table, scale: Scale, members: Mapping[str, Mapping[int, Run]]) -> list[Number]:
    """Every cell of a table that has a number. ``members``: the finished runs by id and seed."""
    found = []
    for row, cell in table.cells():
        values = {seed: cell.value(run) for seed, run in members.get(cell.run or "", {}).items()}
        by_seed = {seed: value for seed, value in values.items() if value is not None}
        if cell.show is None and (cell.paper is not None or by_seed):
            column = column_of(table, row, cell)
            found.append(Number(table.label, row.name, column, cell.metric, scale, by_seed, cell.paper, cell.label))
    return found


def column_of(table: Table, row: Row, cell: Cell) -> str:
    """Its column, with its measure where that is neither the table's nor told by row or column."""
    own = cell.metric.name not in (table.metric.name, row.name) and cell.metric.name not in cell.column
    return f"{cell.column}, {cell.metric.name}" if own else cell.column


def grids(table: Table, scale: Scale, found: Sequence[Number]) -> list[Captioned]:
    """The paper's numbers and ours, and what each run adds to its baseline, in both."""
    if not found:
        return []
    ours = "ours (proxy)" if scale == "proxy" else "ours"
    head = ["row, column", "paper", ours, "proxy less paper" if scale == "proxy" else "difference"]
    unit = f" ({table.metric.unit})" if table.metric.unit else ""
    caption = f"{table.label}: {table.metric.name}{unit}{'' if table.metric.higher_is_better else ', lower is better'}"
    others = dict.fromkeys(f"{one.measure} for {one.metric.name}" for one in found if one.measure != one.metric.name)
    proxies = f"; the proxy: {', '.join(others)}" if others else ""
    made = [Captioned(caption + proxies, [head, *_beside(found)])]
    if rows := _gains(table, found):
        caption = f"What it adds, paired by seed with a 95 % t interval, not corrected for {len(rows)} comparisons"
        made.append(Captioned(caption + proxies, [["row, column", "added to", "paper", ours], *rows]))
    return made


def _beside(found: Sequence[Number]) -> list[list[str]]:
    """What, the paper's, ours, difference; numbers of one measure with as many digits as the paper's longest."""
    printed: dict[Metric, int] = {}
    for one in found:
        length = 0 if one.paper is None else len(f"{one.paper:g}".partition(".")[2])
        printed[one.metric] = max(length, printed.get(one.metric, 0))
    rows = []
    for one in found:
        digits = max(2, printed[one.metric])
        paper = "" if one.paper is None else f"{one.paper:.{printed[one.metric]}f}"
        ours = f"{spread(one.by_seed.values(), digits)} ({len(one.by_seed)})" if one.by_seed else "not run"
        difference = "" if one.difference is None else f"{one.difference:+.{digits}f}"
        rows.append([f"{one.row}, {one.column}", f"{paper} {one.label or ''}".strip(), ours, difference])
    return rows


def _gains(table: Table, found: Sequence[Number]) -> list[list[str]]:
    """What each run of ours adds to its baseline: what, baseline, the paper's difference, ours paired by seed."""
    rows = []
    known = {(one.row, one.column): one.by_seed for one in found}
    for row, cell in table.cells():
        baseline = table.baseline(row, cell)
        if baseline is None:
            continue
        other_row, other = baseline
        ours = known.get((row.name, column_of(table, row, cell)), {})
        theirs = known.get((other_row.name, column_of(table, other_row, other)), {})
        added = paired(ours, theirs)
        if added.by_seed:
            paper = "" if cell.paper is None or other.paper is None else f"{cell.paper - other.paper:+.2f}"
            to = other_row.name if other.column == cell.column else other.column
            lower = "" if cell.metric.higher_is_better else " (lower is better)"
            rows.append([f"{row.name}, {column_of(table, row, cell)}{lower}", to, paper, added.told()])
    return rows
