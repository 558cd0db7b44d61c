"""Our runs of a table of the paper: their numbers, and with which networks on which data they ran."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import InputError
from tools.paper import Cell, Scale, Setting, Table
from tools.runs import Run, read_run, seeds_of
from tools.stats import mean_std

Members = Mapping[str, Mapping[int, Run]]
"""A table's finished runs, by id and seed."""


@dataclass(frozen=True)
class Number:
    """A cell of a table, and ours by seed."""

    cell: Cell
    column: str
    """Its column, with its measure where that is neither the table's nor told by row or column."""
    measure: str
    """What ours is: a proxy's may be another measure than the paper's."""
    by_seed: Mapping[int, float]
    runs: Mapping[int, Run]
    """The runs behind ``by_seed``."""

    @property
    def difference(self) -> float | None:
        """Our mean less the paper's number, where both are the same measure."""
        mean, _ = mean_std(self.by_seed.values())
        same = self.measure == self.cell.metric.name
        return mean - self.cell.paper if same and mean is not None and self.cell.paper is not None else None


# --- runs and numbers -------------------------------------------------------------------------------------------------


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


def numbers(table: Table, scale: Scale, members: Members) -> list[Number]:
    """Every cell of a table that has a number. ``members``: the finished runs by id and seed."""
    found = []
    for cell in table.cells:
        runs = members.get(cell.run or "", {})
        values = {seed: cell.value(run) for seed, run in runs.items()}
        by_seed = {seed: value for seed, value in values.items() if value is not None}
        if cell.show is None and (cell.paper is not None or by_seed):
            name = cell.metric.name
            own = name not in (table.metric.name, cell.row) and name not in cell.column
            column = f"{cell.column}, {name}" if own else cell.column
            measure = (scale == "proxy" and cell.metric.proxy) or name
            found.append(Number(cell, column, measure, by_seed, {seed: runs[seed] for seed in by_seed}))
    return found


def first_uses(gathered: Iterable[tuple[Table, Members]]) -> dict[Path, tuple[str, str]]:
    """For each run, by its path, the label of the first table that counts it, and its id there."""
    first: dict[Path, tuple[str, str]] = {}
    for table, members in gathered:
        for run_id, runs in members.items():
            for run in runs.values():
                first.setdefault(run.path, (table.label, run_id))
    return first


def reused(table: Table, one: Number, first: Mapping[Path, tuple[str, str]]) -> str:
    """The table whose runs these are, "Table 1", or this table's other run ("its run vanilla"); "" for its own."""
    for run in one.runs.values():
        label, run_id = first.get(run.path, (table.label, one.cell.run or ""))
        if label != table.label:
            return label
        if run_id != one.cell.run:
            return f"its {run_id}"
    return ""


# --- our networks and data --------------------------------------------------------------------------------------------


def network_of(run: Run, role: str) -> str:
    """A network as the run names it: "cifar_resnet8", "U-Net of width 32"; "" where it has none in this role."""
    config, known = run.config, run.summary.get("networks") or {}
    name = (known.get(role) or {}).get("name") or config.get(f"networks.{role}.name")
    if name or role != "student":
        return str(name or "")
    if config.get("network.width"):
        return f"U-Net of width {config['network.width']}"
    size = f"of width {config.get('student.width')} and depth {config.get('student.depth')}"
    return f"DiT {config.get('student.size') or size}" if "student.width" in config else ""


def pair_of(run: Run) -> str:
    """Both networks, the teacher first; or the only one."""
    return " with ".join(dict.fromkeys(name for role in ("teacher", "student") if (name := network_of(run, role))))


def data_of(run: Run) -> str:
    """The data set's name, of a folder its own; "" where the run does not say."""
    name = run.config.get("data.name", "folder")
    return str(
        Path(str(run.config.get("data.root") or run.config.get("data_root") or "")).name if name == "folder" else name
    )


def amount_of(run: Run) -> str:
    """How much of the data, and how long: "20 classes, 250 images each, 8 epochs"."""
    config, summary = run.config, run.summary
    told = [f"{config['data.classes']} classes"] if config.get("data.classes") else []
    told += [f"{config['data.per_class']} images each"] if config.get("data.per_class") else []
    told += [f"{config['data.limit']} images"] if config.get("data.limit") else []
    if steps := config.get("train_cfg.max_iters") or config.get("fit.steps") or config.get("rounds.steps"):
        told.append(f"{steps} iterations{' a round' if config.get('rounds.steps') else ''}")
    elif summary.get("epoch"):
        told.append(f"{summary['epoch']:g} epoch{'' if summary['epoch'] == 1 else 's'}")
    return ", ".join(told)


def by_role(one: Number) -> str:
    """ "cifar_resnet8 on digits": the network whose number it is, else both."""
    run = next(iter(one.runs.values()))
    role = re.match(r"(?:\w+\.)?(teacher|student)\w*[/.]", one.cell.read or "")
    return " on ".join(filter(None, [(role and network_of(run, role[1])) or pair_of(run), data_of(run)]))


def by_pair(one: Number) -> str:
    return setting_of(next(iter(one.runs.values())))


def setting_of(run: Run) -> str:
    """ "cifar_resnet20 with cifar_resnet8 on digits"."""
    return " on ".join(filter(None, [pair_of(run), data_of(run)]))


@dataclass(frozen=True)
class Named:
    """Our networks and data at the widest place of a table where they are one: over it all, by row, column or cell."""

    all: str = ""
    rows: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[tuple[str, str], str] = field(default_factory=dict)


def named(found: Sequence[Number]) -> Named:
    """Where a table says what ours are."""
    ran = [one for one in found if one.runs]
    if not ran:
        return Named()

    def told(text: Callable[[Number], str], place: Callable[[Number], str]) -> dict[str, str] | None:
        texts: dict[str, set[str]] = {}
        for one in ran:
            texts.setdefault(place(one), set()).add(text(one))
        return {key: min(of) for key, of in texts.items()} if all(len(of) == 1 for of in texts.values()) else None

    if (everywhere := told(by_role, lambda one: "")) is not None:
        return Named(all=everywhere[""])
    if (rows := told(by_role, lambda one: one.cell.row)) is not None:
        return Named(rows=rows)
    if (everywhere := told(by_pair, lambda one: "")) is not None:
        return Named(all=everywhere[""])
    if (rows := told(by_pair, lambda one: one.cell.row)) is not None:
        return Named(rows=rows)
    if (columns := told(by_pair, lambda one: one.cell.column)) is not None:
        return Named(columns=columns)
    return Named(cells={(one.cell.row, one.cell.column): by_role(one) for one in ran})
