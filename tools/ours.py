"""Our numbers beside the paper's: what was run for a table, and what each method adds to its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from tools.paper import Cell, Metric, Scale, Setting, Table
from tools.runs import Run, read_run, seeds_of
from tools.stats import Grid, mean_std, paired, spread


@dataclass(frozen=True)
class Number:
    """A cell of a table, and ours by seed."""

    cell: Cell
    column: str
    """Its column, with its measure where that is neither the table's nor told by row or column."""
    measure: str
    """What ours is: a proxy's may be another measure than the paper's."""
    by_seed: Mapping[int, float]

    @property
    def difference(self) -> float | None:
        """Our mean less the paper's number, where both are the same measure."""
        mean, _ = mean_std(self.by_seed.values())
        same = self.measure == self.cell.metric.name
        return mean - self.cell.paper if same and mean is not None and self.cell.paper is not None else None


def finished_runs(setting: Setting, runs: Path, results: Path) -> tuple[list[tuple[int, Run]], dict[int, str]]:
    """The finished runs of a setting with their seeds; and by seed why others do not count.

    Those in ``runs`` first, then those in ``results``: in ``reproduce`` there, laid out like ``runs``, or where the
    table says.
    """
    found: list[tuple[int, Run]] = []
    why: dict[int, str] = {}
    for stem in (setting.stem(runs), *setting.kept_stems(results)):
        for seed, path in seeds_of(stem).items():
            try:
                if not (run := read_run(path)).finished:
                    raise InputError(f"{path} is not finished")
                found.append((seed, run))
            except InputError as error:
                why[seed] = str(error)
    return found, why


def gather(table: Table, scale: Scale, runs: Path, results: Path) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """The finished runs of a table by id and seed, of one seed the first; and why others do not count."""
    members: dict[str, dict[int, Run]] = {}
    left: dict[str, None] = {}
    for run_id, settings in table.runs.items():
        found, why = finished_runs(settings[scale], runs, results) if scale in settings else ([], {})
        if by_seed := dict(reversed(found)):
            members[run_id] = dict(sorted(by_seed.items()))
        left |= {reason: None for seed, reason in why.items() if seed not in by_seed}
    return members, list(left)


def numbers(table: Table, scale: Scale, members: Mapping[str, Mapping[int, Run]]) -> list[Number]:
    """Every cell of a table that has a number. ``members``: the finished runs by id and seed."""
    found = []
    for cell in table.cells:
        values = {seed: cell.value(run) for seed, run in members.get(cell.run or "", {}).items()}
        by_seed = {seed: value for seed, value in values.items() if value is not None}
        if cell.show is None and (cell.paper is not None or by_seed):
            name = cell.metric.name
            own = name not in (table.metric.name, cell.row) and name not in cell.column
            column = f"{cell.column}, {name}" if own else cell.column
            found.append(Number(cell, column, (scale == "proxy" and cell.metric.proxy) or name, by_seed))
    return found


def grids(table: Table, scale: Scale, found: Sequence[Number]) -> dict[str, Grid]:
    """By caption: the paper's numbers and ours, and what each run adds to its baseline, in both."""
    if not found:
        return {}
    ours = "ours (proxy)" if scale == "proxy" else "ours"
    head = ["row, column", "paper", ours, "proxy less paper" if scale == "proxy" else "difference"]
    unit = f" ({table.metric.unit})" if table.metric.unit else ""
    caption = f"{table.label}: {table.metric.name}{unit}{'' if table.metric.higher_is_better else ', lower is better'}"
    pairs = ((one.measure, one.cell.metric.name) for one in found)
    others = dict.fromkeys(f"{measure} for {name}" for measure, name in pairs if measure != name)
    proxies = f"; the proxy: {', '.join(others)}" if others else ""
    made: dict[str, Grid] = {caption + proxies: [head, *_beside(found)]}
    if rows := _gains(table, found):
        caption = f"What it adds, paired by seed with a 95 % t interval, not corrected for {len(rows)} comparisons"
        made[caption + proxies] = [["row, column", "added to", "paper", ours], *rows]
    return made


def _beside(found: Sequence[Number]) -> list[list[str]]:
    """What, the paper's, ours, difference; numbers of one measure with as many digits as the paper's longest."""
    printed: dict[Metric, int] = {}
    for cell in (one.cell for one in found):
        length = 0 if cell.paper is None else len(f"{cell.paper:g}".partition(".")[2])
        printed[cell.metric] = max(length, printed.get(cell.metric, 0))
    rows = []
    for one in found:
        cell, exact = one.cell, printed[one.cell.metric]
        digits = max(2, exact)
        paper = "" if cell.paper is None else f"{cell.paper:.{exact}f}"
        ours = f"{spread(one.by_seed.values(), digits)} ({len(one.by_seed)})" if one.by_seed else "not run"
        difference = "" if one.difference is None else f"{one.difference:+.{digits}f}"
        rows.append([f"{cell.row}, {one.column}", f"{paper} {cell.label or ''}".strip(), ours, difference])
    return rows


def _gains(table: Table, found: Sequence[Number]) -> list[list[str]]:
    """What each run of ours adds to its baseline: what, baseline, the paper's difference, ours paired by seed."""
    rows = []
    for one in found:
        cell, baseline = one.cell, table.baseline(one.cell)
        for theirs in (other for other in found if other.cell is baseline):
            base, added = theirs.cell, paired(one.by_seed, theirs.by_seed)
            if not added.by_seed:
                continue
            paper = "" if cell.paper is None or base.paper is None else f"{cell.paper - base.paper:+.2f}"
            to = base.row if base.column == cell.column else base.column
            lower = "" if cell.metric.higher_is_better else " (lower is better)"
            rows.append([f"{cell.row}, {one.column}{lower}", to, paper, added.told()])
    return rows
