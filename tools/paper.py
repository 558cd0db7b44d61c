"""What a table or figure of the paper is: rows, columns, the paper's numbers, and for each cell the run behind it.

``tools/paper/tableNN.yaml`` and ``figureNN.yaml`` hold them. A run is one call of a task's own ``train.py``, at one of
two scales: ``paper``, and ``proxy``, a small stand-in for a CPU. Needs no torch.

A file:

    table: 1                       # or figure: 1, or evidence: 1 for a comparison of our own
    title, notes                   # notes: what is open or wrong in the paper, and what is done here
    task: classification           # offline_kd, segmentation, diffusion; none: nothing to run, notes say why
    command: progressive           # diffusion's sub-command
    metric: {name: top-1, unit: "%"}        # also higher_is_better: false, and proxy: NAME of what stands in
    seeds: 5                       # runs that the paper averages; null where it does not say
    needs: {paper: TEXT, proxy: TEXT}       # data and files that the runs read
    bases: {ID: RUN}               # parts of runs, for `base`
    runs: {ID: RUN}
    baselines: {ID: ID}            # to a run the one that it adds to: what the difference is taken from
    columns: [NAME, ...]           # or {name: NAME, ...}
    rows: [{name: ..., cells: [CELL, ...]}]

RUN: ``base: ID`` (merged below it), ``method``, ``all_scales: {flag: value}`` at either scale, and for the paper's
scale ``recipe``, ``overrides: {flag: value}``, ``after: [COMMAND, ...]`` (what to call when it is trained) and
``task``; ``proxy:`` holds the same keys for the small run, and ``results: FOLDER/NAME`` where such runs are kept as
``results/FOLDER/NAME-<seed>``, besides ``results/tableNN/ID-<seed>``. ``same_as: tableNN/ID``, of a run or of its proxy
alone, is a run of another table, with what ``after`` adds. ``{run}`` in a text is the run's folder, ``{run:ID}`` that
of another run of the same scale and seed, which must be finished before.

CELL: ``column``, ``paper`` (a number, or null where the paper prints none), ``label`` (what it prints besides),
``run: ID``, and ``read`` or ``show``; ``run: null`` with ``why`` for a cell that nothing here yields. ``read`` is a
query of the run, with ``where`` and ``at`` as ``tools/runs.py`` explains them. ``show`` is an image in its folder.
``run``, ``read``, ``where``, ``at`` and ``metric`` of a column or, before it, of a row hold for the cells that have
none of their own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from core.errors import InputError
from core.training.run import load_yaml
from tools.runs import Run, read_run

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "tools/paper"
TASKS = ("classification", "offline_kd", "segmentation", "diffusion", "none")
SEGMENTATION_FLAGS = ("method", "amp", "data_root")  # of its train.py; all else are options of the config

Scale = Literal["paper", "proxy"]
SCALES: tuple[Scale, ...] = get_args(Scale)

_SETTING = {"recipe", "overrides", "after", "task", "same_as", "results"}
_RUN = {"base", "method", "all_scales", "proxy", *_SETTING} - {"results"}
_INHERITED = {"run", "read", "where", "at", "metric"}  # what cells take from their row or column
_REQUIRED = ("title", "task", "metric", "columns", "rows")
KINDS = ("table", "figure", "evidence")  # in this order; the last are comparisons of our own, at the small scale alone
_TABLE = {*KINDS, "notes", "command", "seeds", "needs", "bases", "runs", "baselines", *_REQUIRED}


@dataclass(frozen=True)
class Metric:
    """What a number is."""

    name: str
    unit: str = ""
    higher_is_better: bool = True
    proxy: str | None = None


@dataclass(frozen=True)
class Setting:
    """A run of a table at one scale, but for its seed."""

    table: str
    """The table and the id whose folder it has: another table's where that has the same run."""
    run: str
    scale: Scale
    task: str
    command: str | None
    recipe: str
    """From the repository's root, as all paths here."""
    overrides: Mapping[str, Any]
    after: tuple[str, ...]
    needs: Mapping[str, tuple[str, str]]
    """(table, id) of the runs that must be finished before, of the same scale and seed, by how the texts call them."""
    results: str | None = None

    def stem(self, out: Path | str) -> Path:
        """``<stem>-<seed>`` is the run folder below ``out``."""
        return Path(out) / self.table / self.scale / self.run

    def folder(self, seed: int, out: Path | str) -> Path:
        """The run folder, ``<out>/table01/<scale>/<run id>-<seed>``, of the table that first has it."""
        return self.stem(out).with_name(f"{self.run}-{seed}")

    def kept_stems(self, results: Path) -> list[Path]:
        """``<stem>-<seed>`` is where such runs may be kept: in ``reproduce``, as they were run, in the table's own
        folder, or in ``results``."""
        own = [results / self.table / self.run, *([results / self.results] if self.results else [])]
        return [self.stem(results / "reproduce"), *own]

    def commands(self, seed: int, out: Path | str) -> list[list[str]]:
        """What to call after ``python``, in the repository's root: the task's train.py, then what scores the run."""
        texts = {"run": str(self.folder(seed, out)), "seed": str(seed)}
        for name, (table, needed) in self.needs.items():
            texts[f"run:{name}"] = str(Path(out) / table / self.scale / f"{needed}-{seed}")
        words = [f"{self.task}/tools/train.py", *([self.command] if self.command else [])]
        words += [self.recipe] if self.task == "segmentation" else ["--config", self.recipe]
        options = []
        for key, value in self.overrides.items():
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            if self.task != "segmentation":
                words += [f"--{key}", text]
            elif key in SEGMENTATION_FLAGS:
                words += [f"--{key.replace('_', '-')}", text]
            else:  # mmengine reads Python's words
                options.append(f"{key}={value if value is None or isinstance(value, bool) else text}")
        words += ["--seed", str(seed), "--out", texts["run"]]
        words += ["--cfg-options", *options] if options else []  # they take all that follows
        commands = [words, *(line.split() for line in self.after)]
        known = re.compile(r"\{(run:[^}]+|run|seed)\}")
        return [[known.sub(lambda match: texts[match[1]], word) for word in command] for command in commands]


@dataclass(frozen=True)
class Cell:
    """A number (or picture) of the paper and where ours is."""

    row: str
    column: str
    metric: Metric
    paper: float | None = None
    label: str | None = None
    run: str | None = None
    why: str | None = None
    read: str | None = None
    where: Mapping[str, Any] | None = None
    at: float | None = None
    show: str | None = None

    def value(self, run: Run) -> float | None:
        """Ours; None where it is not there (yet)."""
        return None if self.read is None else run.number(self.read, self.where, self.at)


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper."""

    name: str
    """``table01`` or ``figure04``: the file's."""
    title: str
    task: str
    metric: Metric
    notes: str
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Row by row, as printed."""
    runs: Mapping[str, Mapping[Scale, Setting]]
    """By id, at the scales that it can be run at."""
    baselines: Mapping[str, str]
    needs: Mapping[str, str]

    @property
    def label(self) -> str:
        """``Table 1``."""
        return f"{self.name[:-2].capitalize()} {int(self.name[-2:])}"

    @property
    def rows(self) -> list[str]:
        """The names of the rows, as printed."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    def baseline(self, cell: Cell) -> Cell | None:
        """The cell of the same measure whose run this cell's adds to; of several the one in its row."""
        wanted = (self.baselines.get(cell.run or "", ""), None, cell.metric, cell.where, cell.at)
        same = [
            other
            for other in self.cells
            if (other.run, other.show or cell.show, other.metric, other.where, other.at) == wanted
            and (other.row == cell.row or other.read == cell.read)
        ]
        return max(same, key=lambda other: other.row == cell.row, default=None)

    def complete(self, run_id: str, folder: Path) -> bool:
        """Whether a run has ended in this folder, and left every number and picture that the table takes from it."""
        try:
            run = read_run(folder)
        except InputError:  # not or only begun, or damaged
            return False
        own = [cell for cell in self.cells if cell.run == run_id]
        there = (cell.value(run) is not None if cell.show is None else (folder / cell.show).is_file() for cell in own)
        return folder.is_dir() and run.finished and all(there)


def find_table(name: str, tables: Mapping[str, Table]) -> Table:
    """By its name, or a table by its number alone. Raises: InputError."""
    asked = f"table{int(name):02d}" if name.isdecimal() else name
    if asked not in tables:
        near = [] if name.isdecimal() else difflib.get_close_matches(asked, tables, n=1)
        raise InputError(f"no table {name}: " + (f"did you mean {near[0]}?" if near else "list names them"))
    return tables[asked]


# --- reading ----------------------------------------------------------------------------------------------------------


def load_tables(folder: Path = PAPER) -> dict[str, Table]:
    """All tables, figures and comparisons of our own by name, in this order. Raises: InputError naming file and key."""
    files = [file for kind in KINDS for file in sorted(folder.glob(f"{kind}*.yaml"))]
    raw = {file.stem: _read(file) for file in files}
    if not raw:
        raise InputError(f"no tables in {folder}: they are files as table01.yaml")
    try:
        return {name: _table(name, raw) for name in raw}
    except RecursionError as error:
        raise InputError(f"{folder}: a run starts from itself, by base, same_as or {{run:...}}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is no table: it holds no keys")
    return values


def _refuse(named: str, *wrong: tuple[object, str]) -> None:
    """Raises: InputError with the first text beside which something stands."""
    for found, says in wrong:
        if found:
            raise InputError(f"{named}: {says}")


def _known(named: str, values: Any, keys: set[str]) -> dict[str, Any]:
    _refuse(named, (not isinstance(values, dict), f"{values!r} has no keys"))
    unknown = sorted(map(str, set(values) - keys))
    _refuse(named, (unknown, f"unknown key {''.join(unknown[:1])}; known are {', '.join(sorted(keys))}"))
    return values


def _table(name: str, raw: Mapping[str, dict[str, Any]]) -> Table:
    values = _known(name, raw[name], _TABLE)
    _refuse(name, *((key not in values, f"{key} is missing") for key in _REQUIRED))
    kind = next((kind for kind in KINDS if kind in values), KINDS[0])
    task, metric = values["task"], _metric(name, values["metric"])
    _refuse(
        name,
        (name != f"{kind}{values.get(kind, 0):02d}", f"the file says it is {kind} {values.get(kind)}"),
        (task not in TASKS, f"task {task!r} is none of {', '.join(TASKS)}"),
    )
    runs: dict[str, dict[Scale, Setting]] = {}
    for run_id in values.get("runs") or {}:
        runs[run_id] = {scale: one for scale in SCALES if (one := _setting(name, run_id, scale, raw))}
        _refuse(f"{name}, run {run_id}", (not runs[run_id], "neither recipe nor same_as"))
    columns = {}
    for column in values["columns"]:
        given = column if isinstance(column, dict) else {"name": column}
        columns[str(given.get("name"))] = _known(f"{name}, column", given, {"name", *_INHERITED})
    rows = [_known(f"{name}, row", row, {"name", "cells", *_INHERITED}) for row in values["rows"]]
    names = [str(row.get("name")) for row in rows]
    _refuse(name, *((names.count(one) > 1, f"two rows are named {one}") for one in names))
    baselines = _known(f"{name}, baselines", values.get("baselines") or {}, set(runs))
    _refuse(f"{name}, baselines", *((one not in runs, f"no run {one}") for one in baselines.values()))
    return Table(
        name=name,
        title=values["title"],
        task=task,
        metric=metric,
        notes=" ".join((values.get("notes") or "").split()),
        columns=tuple(columns),
        cells=tuple(cell for row in rows for cell in _cells(name, row, metric, columns, runs)),
        runs=runs,
        baselines=baselines,
        needs=_known(f"{name}, needs", values.get("needs") or {}, set(SCALES)),
    )


def _metric(named: str, values: Any) -> Metric:
    return Metric(**_known(f"{named}, metric", values, {field.name for field in fields(Metric)}))


def _cells(
    name: str, row: Mapping[str, Any], metric: Metric, columns: Mapping[str, Mapping[str, Any]], runs: Mapping
) -> Iterator[Cell]:
    """The cells of a row."""
    keys, in_row = {field.name for field in fields(Cell)} - {"row"}, f"{name}, row {row.get('name')}"
    for given in row.get("cells") or ():
        column = str(_known(in_row, given, keys).get("column"))
        values = {**columns.get(column, {}), **row, **given}
        named, run = f"{in_row}, {column}", values.get("run")
        _refuse(
            named,
            (column not in columns, f"no column {column}; there are {', '.join(columns)}"),
            (run is None and not values.get("why"), "no run and no why"),
            (run is not None and run not in runs, f"no run {run}"),
            (run is not None and "show" not in values and values.get("read") is None, "neither read nor show"),
        )
        own = {key: value for key, value in values.items() if key in keys}
        own |= {"column": column, "metric": _metric(named, values["metric"]) if "metric" in values else metric}
        yield Cell(str(row.get("name")), **own)


def _setting(name: str, run_id: str, scale: Scale, raw: Mapping[str, dict[str, Any]]) -> Setting | None:
    """The run at a scale, found where it is defined; None where it is not of that scale."""
    run, named = _merged(name, run_id, raw[name]), f"{name}, run {run_id}"
    values = run if scale == "paper" else _known(f"{named}, proxy", run.get("proxy") or {}, _SETTING)
    if same := values.get("same_as") or ("recipe" not in values and run.get("same_as")):
        table, _, other = same.partition("/")
        known = raw.get(table, {}).get("runs") or {}
        _refuse(named, (other not in known, f"same_as {same}, and there is no such run"))
        found = _setting(table, other, scale, raw)
        return found and replace(found, after=(*found.after, *(values.get("after") or run.get("after") or ())))
    if "recipe" not in values:
        return None
    method = {"method": run["method"]} if "method" in run else {}
    overrides = {**method, **(values.get("overrides") or {}), **(run.get("all_scales") or {})}
    after, needs = tuple(values.get("after") or ()), {}
    for needed in re.findall(r"\{run:([^}]+)\}", " ".join(map(str, [*overrides.values(), *after]))):
        found = _setting(name, needed, scale, raw) if needed in (raw[name].get("runs") or {}) else None
        if found is None:
            raise InputError(f"{named}: {{run:{needed}}}, and there is no such run")
        needs[needed] = (found.table, found.run)
    task = values.get("task") or run.get("task") or raw[name]["task"]
    return Setting(
        table=name,
        run=run_id,
        scale=scale,
        task=task,
        command=raw[name].get("command") if task == "diffusion" else None,
        recipe=values["recipe"],
        overrides=overrides,
        after=after,
        needs=needs,
        results=values.get("results"),
    )


def _merged(name: str, run_id: str, table: Mapping[str, Any], kind: str = "runs") -> dict[str, Any]:
    """A run with its base below it: of mappings the keys of both, of all else the run's own."""
    named = f"{name}, {kind[:-1]} {run_id}"
    known = table.get(kind) or {}
    _refuse(named, (run_id not in known, f"there is no such {kind[:-1]}"))
    run = dict(_known(named, known[run_id], _RUN))
    return _over(_merged(name, run.pop("base"), table, "bases"), run) if "base" in run else run


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    if "same_as" in above:  # replaces what it stands in
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged
