"""A table of the paper as the paper prints it, the paper's number and ours in one cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.ours import Number, named, reused
from tools.paper import Metric, Scale, Table
from tools.stats import Grid, spread


@dataclass(frozen=True)
class Shown:
    """A cell as text: what the paper prints, ours, and what must be known of ours."""

    paper: str
    ours: str
    """``60.58 ± 0.63 (3)``: over so many seeds; "" where nothing was run."""
    less: str = ""
    """Ours less the paper's; "" at another scale than the paper's."""
    first: str = ""
    """Whose runs these are, where another cell counts them first: "Table 1"."""
    network: str = ""
    """Ours, where neither its row nor its column says it."""

    @property
    def text(self) -> str:
        """In one line: ``72.33 / 60.58 ± 0.63 (3), of Table 1``."""
        if not self.ours:
            return f"{self.paper} / not run" if self.paper else "not run"
        ours = ", ".join(filter(None, [self.ours, self.less, self.network, self.first and f"of {self.first}"]))
        return f"{self.paper or '-'} / {ours}"


@dataclass(frozen=True)
class Printed:
    """``columns`` and the names of ``rows`` come with our networks and data, "" where another place says them."""

    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, str, Sequence[Shown | None]]]

    @property
    def compared(self) -> bool:
        """Whether the paper prints anything of it."""
        return any(cell.paper for _, _, cells in self.rows for cell in cells if cell)

    @property
    def grid(self) -> Grid:
        """The table as lines of text."""

        def head(name: str, ours: str) -> str:
            return f"{name} (ours: {ours})" if ours else name

        lines = [[head(name, ours), *(cell.text if cell else "" for cell in cells)] for name, ours, cells in self.rows]
        return [["paper / ours", *(head(*column) for column in self.columns)], *lines]


def printed(
    table: Table, scale: Scale, found: Sequence[Number], first: Mapping[Path, tuple[str, str]]
) -> Printed | None:
    """Of these numbers; None where there are none. ``first``: where each run is counted first."""
    if not found:
        return None
    digits, where = digits_of(found), named(found)
    shown = {(one.cell.row, one.cell.column): show(table, scale, one, digits[one.cell.metric], first) for one in found}
    cells = {place: replace(cell, network=where.cells.get(place, "")) for place, cell in shown.items()}
    columns = [name for name in table.columns if any(column == name for _, column in cells)]
    rows = [name for name in table.rows if any(row == name for row, _ in cells)]
    unit = f" ({table.metric.unit})" if table.metric.unit else ""
    better = "" if table.metric.higher_is_better else ", lower is better"
    pairs = ((one.measure, one.cell.metric.name) for one in found)
    others = dict.fromkeys(f"{measure} for {name}" for measure, name in pairs if measure != name)
    proxies = f"; the proxy: {', '.join(others)}" if others else ""
    ours = f"; ours: {where.all}" if where.all else ""
    return Printed(
        f"{table.label}: {table.metric.name}{unit}{better}{proxies}{ours}",
        [(name, where.columns.get(name, "")) for name in columns],
        [(name, where.rows.get(name, ""), [cells.get((name, column)) for column in columns]) for name in rows],
    )


def show(table: Table, scale: Scale, one: Number, exact: int, first: Mapping[Path, tuple[str, str]]) -> Shown:
    """A cell, the paper's number with ``exact`` digits."""
    cell, digits = one.cell, max(2, exact)
    paper = f"{'' if cell.paper is None else f'{cell.paper:.{exact}f}'} {cell.label or ''}".strip()
    measure = one.column.removeprefix(f"{cell.column}, ") if one.column != cell.column else ""
    paper = f"{measure} {paper}".strip() if measure else paper
    if not one.by_seed:
        return Shown(paper, "")
    less = f"{one.difference:+.{digits}f}" if scale == "paper" and one.difference is not None else ""
    return Shown(paper, f"{spread(one.by_seed.values(), digits)} ({len(one.by_seed)})", less, reused(table, one, first))


def digits_of(found: Sequence[Number]) -> dict[Metric, int]:
    """As many digits after the point as the paper's longest number of this metric."""
    digits: dict[Metric, int] = {}
    for cell in (one.cell for one in found):
        length = 0 if cell.paper is None else len(f"{cell.paper:g}".partition(".")[2])
        digits[cell.metric] = max(length, digits.get(cell.metric, 0))
    return digits
