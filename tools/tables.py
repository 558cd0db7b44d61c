"""The paper's tables and figures as data: rows, columns, the paper's numbers, and for each cell the run behind it.

``tools/paper/tableNN.yaml`` and ``figureNN.yaml`` hold them; ``load_tables()`` reads them all. A run is one call of a
task's own ``train.py``, at one of two scales: ``paper``, and ``proxy``, a small stand-in for a CPU. Needs no torch.

A file:

    table: 1                       # or figure: 1
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

RUN: ``base: ID`` (merged below it), ``method``, ``both: {flag: value}`` at either scale, and for the paper's scale
``recipe``, ``overrides: {flag: value}``, ``then: [COMMAND, ...]`` (what to call afterwards), ``task``, ``command``;
``proxy:`` holds the same keys for the small run, and ``kept: FOLDER/NAME`` where ``results/FOLDER/NAME-<seed>`` may be
such a run. ``same_as: tableNN/ID``, of a run or of its proxy alone, is a run of another table, with what ``then`` adds.
``{run}`` in a text is the run's folder, ``{run:ID}`` that of another run of the same scale and seed, which must be
finished before.

CELL: ``column``, ``paper`` (a number, or null where the paper prints none), ``paper_std``, ``label`` (what it prints
besides), ``run: ID``, and ``read`` or ``show``; ``run: null`` with ``why`` for a cell that nothing here yields.
``read``: ``last.student/top1`` or ``teacher.top1`` is a path in ``summary.json``; ``evaluation.distance`` (or
``.score``) is read from ``evaluation.json``, from the row that ``row: {steps: 4}`` describes. ``at: 0.05`` means after
that share of the training, of the evaluations (``read`` is then a key of theirs) or of an evaluation's rows. ``show``
is an image in the run's folder. ``run``, ``read``, ``row``, ``at`` and ``metric`` of a column or, before it, of a row
hold for the cells that have none of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAPER = Path(__file__).resolve().parent / "paper"
SCALES = ("paper", "proxy")
TASKS = ("classification", "offline_kd", "segmentation", "diffusion", "none")
SEGMENTATION_FLAGS = ("method", "amp")  # of its train.py; all else are options of the config
DATA_KEYS = ("data.root", "data_root")

Scale = Literal["paper", "proxy"]

_SETTING = {"recipe", "overrides", "then", "task", "command", "same_as", "kept"}
_RUN = {"base", "method", "both", "proxy", *_SETTING} - {"kept"}
_CELL = {"column", "paper", "paper_std", "label", "run", "why", "read", "row", "at", "show", "metric"}
_SHARED = {"run", "read", "row", "at", "metric"}  # what cells take from their row or column
_TABLE = {
    "table", "figure", "title", "notes", "task", "command", "metric", "seeds", "needs", "bases", "runs", "baselines",
    "columns", "rows",
}  # fmt: skip


class TableError(ValueError):
    """A file that does not follow the schema, or a name that is not there, in one line.

    No InputError, which would take in torch.
    """


@dataclass(frozen=True)
class Metric:
    """What a number is."""

    name: str
    unit: str = ""
    higher_is_better: bool = True
    proxy: str | None = None
    """What the proxy's number is, where that is another measure."""


@dataclass(frozen=True)
class Setting:
    """A run at one scale."""

    table: str
    """The table and the id whose folder it has: another table's where that has the same run."""
    run: str
    task: str
    command: str | None
    recipe: str
    """From the repository's root, as all paths here."""
    overrides: Mapping[str, Any]
    then: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    """(table, id) of the runs that must be finished before, of the same scale and seed."""
    kept: str | None = None
    """``FOLDER/NAME`` where ``results/FOLDER/NAME-<seed>`` may hold this run."""

    @property
    def data(self) -> str | None:
        """The folder of the data set as the table names it, below ``data``; None for one that needs none."""
        return next((str(self.overrides[key]) for key in DATA_KEYS if key in self.overrides), None)

    def folder(self, scale: Scale, seed: int, out: Path | str) -> Path:
        """The run folder below ``out``."""
        return Path(f"{self.stem(scale, out)}-{seed}")

    def stem(self, scale: Scale, out: Path | str) -> Path:
        """``<stem>-<seed>`` is the run folder below ``out``."""
        return Path(out) / self.table / scale / self.run

    def kept_stems(self, scale: Scale, results: Path) -> list[Path]:
        """``<stem>-<seed>`` is where such runs may be kept: in ``reproduce``, as they were run, or as ``kept`` says."""
        return [self.stem(scale, results / "reproduce"), *([results / self.kept] if self.kept else [])]


@dataclass(frozen=True)
class Run:
    """A training run, at the scales that it can be run at."""

    id: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class Cell:
    """A number (or picture) of the paper and where ours is."""

    column: str
    metric: Metric
    paper: float | None = None
    paper_std: float | None = None
    label: str | None = None
    run: str | None = None
    why: str | None = None
    read: str | None = None
    row: Mapping[str, Any] | None = None
    at: float | None = None
    show: str | None = None


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]


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
    rows: tuple[Row, ...]
    runs: Mapping[str, Run]
    baselines: Mapping[str, str] = field(default_factory=dict)
    """By run the one that it adds to."""
    seeds: int | None = None
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``Table 1``."""
        kind, number = re.fullmatch(r"([a-z]+)(\d+)", self.name).groups()  # type: ignore[union-attr]
        return f"{kind.capitalize()} {int(number)}"

    def cells(self) -> Iterator[tuple[Row, Cell]]:
        """Every cell with its row, as printed."""
        for row in self.rows:
            for cell in row.cells:
                yield row, cell

    def baseline(self, row: Row, cell: Cell) -> tuple[Row, Cell] | None:
        """The cell of the same measure whose run this cell's adds to; of several the one in its row."""
        baseline = self.baselines.get(cell.run or "")
        if baseline is None or cell.show is not None:
            return None
        same = [
            (other_row, other)
            for other_row, other in self.cells()
            if other.run == baseline
            and (other.metric, other.row, other.at) == (cell.metric, cell.row, cell.at)
            and (other_row is row or other.read == cell.read)
        ]
        return max(same, key=lambda one: one[0] is row, default=None)

    def setting(self, run_id: str, scale: Scale) -> Setting:
        """Raises: TableError where there is no such run, or none at this scale."""
        if run_id not in self.runs:
            raise TableError(f"{self.name} has no run {run_id}: {', '.join(self.runs) or 'nothing is run for it'}")
        if scale not in self.runs[run_id].settings:
            raise TableError(f"{self.name} has no run {run_id} of the scale {scale}")
        return self.runs[run_id].settings[scale]

    def folder(self, run_id: str, scale: Scale, seed: int, out: Path | str) -> Path:
        """The run's folder: ``<out>/table01/<scale>/<run id>-<seed>``, of the table that first has it."""
        return self.setting(run_id, scale).folder(scale, seed, out)

    def commands(
        self, run_id: str, scale: Scale, seed: int, out: Path | str, data: Path | str = "data"
    ) -> list[list[str]]:
        """What to call after ``python``, in the repository's root: the task's train.py, then what scores the run.

        Args: ``data``: the folder that holds the data sets, by the names that the table gives them below ``data``.
        Raises: TableError as ``setting``.
        """
        setting = self.setting(run_id, scale)
        place = {"run": str(setting.folder(scale, seed, out)), "seed": str(seed)}
        for table, needed in setting.needs:
            place[f"run:{table}/{needed}"] = str(Path(out) / table / scale / f"{needed}-{seed}")
        train = [f"{setting.task}/tools/train.py"]
        if setting.command is not None:
            train.append(setting.command)
        overrides = {key: _moved(key, value, data) for key, value in setting.overrides.items()}
        flags = _segmentation_flags(overrides) if setting.task == "segmentation" else _flags(overrides)
        train += [setting.recipe] if setting.task == "segmentation" else ["--config", setting.recipe]
        train += [_filled(flag, place) for flag in flags]
        train += ["--seed", str(seed), "--out", place["run"]]
        if setting.task == "segmentation" and "--cfg-options" in train:  # it takes what follows: to the end with it
            start = train.index("--cfg-options")
            end = next((i for i in range(start + 1, len(train)) if train[i].startswith("--")), len(train))
            train = train[:start] + train[end:] + train[start:end]
        return [train, *([_filled(word, place) for word in line.split()] for line in setting.then)]

    def value(self, cell: Cell, folder: Path | str) -> float | None:
        """Ours, from a run's folder; None where it is not there (yet)."""
        if cell.read is None:
            return None
        folder = Path(folder)
        head, _, key = cell.read.partition(".")
        if head.startswith("evaluation"):
            report = _json(folder / f"{head}.json")
            chosen = _row_of(report.get("rows", ()), cell)
            return _number(chosen.get(report.get("features", {}).get(key, key)))
        if cell.at is not None:
            return _number(_evaluation_at(folder, cell.at).get(cell.read))
        found: Any = _json(folder / "summary.json")
        for part in (head, key) if key else (head,):
            found = found.get(part) if isinstance(found, Mapping) else None
        return _number(found)

    def complete(self, run_id: str, folder: Path | str) -> bool:
        """Whether a run's folder has every number and picture that the table takes from it."""
        folder = Path(folder)
        own = [cell for _, cell in self.cells() if cell.run == run_id]
        return all(
            self.value(cell, folder) is not None if cell.show is None else (folder / cell.show).is_file()
            for cell in own
        )


def load_tables(folder: Path = PAPER) -> dict[str, Table]:
    """All tables and figures by name, tables first. Raises: TableError naming file and key."""
    raw = {file.stem: _read(file) for file in sorted(folder.glob("*.yaml"), key=lambda f: (f.stem[0] != "t", f.stem))}
    return {name: _table(name, raw) for name in raw}


def load_table(name: str, folder: Path = PAPER) -> Table:
    """One of them. Raises: TableError for an unknown name."""
    tables = load_tables(folder)
    if name not in tables:
        raise TableError(f"no {name}: {', '.join(tables)}")
    return tables[name]


def _read(file: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), loader)
    except yaml.YAMLError as error:
        raise TableError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise TableError(f"{file} is no table: it holds no keys")
    return values


def _known(place: str, values: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TableError(f"{place}: {values!r} has no keys")
    if unknown := sorted(map(str, set(values) - keys)):
        raise TableError(f"{place}: unknown key {unknown[0]}; known are {', '.join(sorted(keys))}")
    return values


def _table(name: str, raw: Mapping[str, dict[str, Any]]) -> Table:
    values = _known(name, raw[name], _TABLE)
    missing = [key for key in ("title", "task", "metric", "columns", "rows") if key not in values]
    if missing:
        raise TableError(f"{name}: {missing[0]} is missing")
    kind = "table" if "table" in values else "figure"
    if name != f"{kind}{values.get(kind, 0):02d}":
        raise TableError(f"{name}: the file says it is {kind} {values.get(kind)}")
    if values["task"] not in TASKS:
        raise TableError(f"{name}: task {values['task']!r} is none of {', '.join(TASKS)}")
    metric = _metric(name, values["metric"])
    runs = {id_: Run(id_, _settings(name, id_, raw)) for id_ in values.get("runs") or {}}
    columns = dict(_column(name, column) for column in values["columns"])
    rows = tuple(_row(name, row, metric, columns, runs) for row in values["rows"])
    names = [row.name for row in rows]
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise TableError(f"{name}: two rows are named {twice}")
    baselines = _known(f"{name}, baselines", values.get("baselines") or {}, set(runs))
    if unknown := next((one for one in baselines.values() if one not in runs), None):
        raise TableError(f"{name}, baselines: no run {unknown}")
    return Table(
        name=name,
        title=values["title"],
        task=values["task"],
        metric=metric,
        notes=" ".join((values.get("notes") or "").split()),
        columns=tuple(columns),
        rows=rows,
        runs=runs,
        baselines=baselines,
        seeds=values.get("seeds"),
        needs=_known(f"{name}, needs", values.get("needs") or {}, set(SCALES)),
    )


def _metric(place: str, values: Any) -> Metric:
    return Metric(**_known(f"{place}, metric", values, {"name", "unit", "higher_is_better", "proxy"}))


def _column(name: str, values: Any) -> tuple[str, dict[str, Any]]:
    """Its name, and what it gives its cells."""
    if not isinstance(values, dict):
        return str(values), {}
    given = dict(_known(f"{name}, column", values, {"name", *_SHARED}))
    return str(given.pop("name", None)), given


def _row(
    name: str, values: Any, metric: Metric, columns: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Run]
) -> Row:
    values = _known(f"{name}, row", values, {"name", "cells", *_SHARED})
    place = f"{name}, row {values.get('name')}"
    shared = {key: value for key, value in values.items() if key in _SHARED}
    cells = []
    for given in values.get("cells") or ():
        column = str(_known(place, given, _CELL).get("column"))
        if column not in columns:
            raise TableError(f"{place}: no column {column}; there are {', '.join(columns)}")
        cells.append(
            _cell(f"{place}, {column}", {**columns[column], **shared, **given, "column": column}, metric, runs)
        )
    return Row(str(values.get("name")), tuple(cells))


def _cell(place: str, values: dict[str, Any], metric: Metric, runs: Mapping[str, Run]) -> Cell:
    if values.get("run") is None:
        if not values.get("why"):
            raise TableError(f"{place}: no run and no why")
        values = {**values, "read": None, "row": None, "at": None}
    elif values["run"] not in runs:
        raise TableError(f"{place}: no run {values['run']}")
    elif "show" in values:
        values = {**values, "read": None}
    elif values.get("read") is None:
        raise TableError(f"{place}: neither read nor show")
    own = _metric(place, values["metric"]) if "metric" in values else metric
    return Cell(**{**values, "metric": own})


def _settings(name: str, id_: str, raw: Mapping[str, dict[str, Any]]) -> dict[str, Setting]:
    """The run at its scales, found where it is defined."""
    run = _merged(name, id_, raw[name])
    place = f"{name}, run {id_}"
    settings: dict[str, Setting] = {}
    for scale in SCALES:
        values = run if scale == "paper" else run.get("proxy") or {}
        _known(place if scale == "paper" else f"{place}, proxy", values, _RUN if scale == "paper" else _SETTING)
        same = values.get("same_as") or (run.get("same_as") if scale == "proxy" and "recipe" not in values else None)
        if same is not None:
            table, _, other = same.partition("/")
            if other not in (raw.get(table, {}).get("runs") or {}):
                raise TableError(f"{place}: same_as {same}, and there is no such run")
            found = _settings(table, other, raw)
            if scale in found:
                then = (*found[scale].then, *(values.get("then") or run.get("then") or ()))
                settings[scale] = replace(found[scale], then=then)
        elif "recipe" in values:
            settings[scale] = _setting(name, id_, scale, run, values, raw)
    if not settings:
        raise TableError(f"{place}: neither recipe nor same_as")
    return settings


def _setting(
    name: str, id_: str, scale: str, run: Mapping[str, Any], values: Mapping[str, Any], raw: Mapping[str, Any]
) -> Setting:
    table = raw[name]
    task = values.get("task") or run.get("task") or table["task"]
    overrides = {**(values.get("overrides") or {}), **(run.get("both") or {})}
    if "method" in run:
        overrides = {"method": run["method"], **overrides}
    then = tuple(values.get("then") or ())
    needs: dict[tuple[str, str], None] = {}

    def qualify(text: Any) -> Any:
        if not isinstance(text, str):
            return text

        def folder(match: re.Match[str]) -> str:
            if match[1] not in (table.get("runs") or {}):
                raise TableError(f"{name}, run {id_}: {match[0]}, and there is no such run")
            other = _settings(name, match[1], raw)[scale]
            needs[other.table, other.run] = None
            return f"{{run:{other.table}/{other.run}}}"

        return re.sub(r"\{run:([^}]+)\}", folder, text)

    overrides = {key: qualify(value) for key, value in overrides.items()}
    then = tuple(map(qualify, then))
    command = values.get("command") or run.get("command") or table.get("command")
    return Setting(
        table=name,
        run=id_,
        task=task,
        command=command if task == "diffusion" else None,
        recipe=values["recipe"],
        overrides=overrides,
        then=then,
        needs=tuple(needs),
        kept=values.get("kept"),
    )


def _merged(name: str, id_: str, table: Mapping[str, Any], kind: str = "runs") -> dict[str, Any]:
    """A run with its base below it: of mappings the keys of both, of all else the run's own."""
    place = f"{name}, {kind[:-1]} {id_}"
    known = table.get(kind) or {}
    if id_ not in known:
        raise TableError(f"{place}: there is no such {kind[:-1]}")
    run = dict(_known(place, known[id_], _RUN))
    if "base" not in run:
        return run
    return _over(_merged(name, run.pop("base"), table, "bases"), run)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    if "same_as" in above:  # replaces what it stands in
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = _over(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def _moved(key: str, value: Any, data: Path | str) -> Any:
    """A data set's folder below ``data`` instead."""
    if key not in DATA_KEYS or not (value == "data" or str(value).startswith("data/")):
        return value
    return str(Path(data) / str(value).removeprefix("data").lstrip("/"))


def _flags(overrides: Mapping[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", _text(value))]


def _segmentation_flags(overrides: Mapping[str, Any]) -> list[str]:
    flags, options = [], []
    for key, value in overrides.items():
        if key in SEGMENTATION_FLAGS:
            flags += [f"--{key}", _text(value)]
        elif key == "data_root":
            flags += ["--data-root", _text(value)]
        else:
            options.append(f"{key}={value if value is None or isinstance(value, bool) else _text(value)}")
    return flags + (["--cfg-options", *options] if options else [])


def _text(value: Any) -> str:
    """A value as a command line says it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))


def _filled(text: str, place: Mapping[str, str]) -> str:
    return re.sub(r"\{(run:[^}]+|run|seed)\}", lambda match: place[match[1]], text)


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _row_of(rows: Sequence[Mapping[str, Any]], cell: Cell) -> Mapping[str, Any]:
    """The only row that a cell means; empty where there is none, or not one alone."""
    fitting = [row for row in rows if all(row.get(key) == value for key, value in (cell.row or {}).items())]
    if cell.at is not None:
        last = max((row.get("iteration") or 0 for row in fitting), default=0)
        fitting = [row for row in fitting if row.get("iteration") == round(cell.at * last)]
    return fitting[0] if len(fitting) == 1 else {}


def _evaluation_at(folder: Path, share: float) -> Mapping[str, Any]:
    """The evaluation after that share of the epochs; empty where there is none, or the run is not finished."""
    summary, file = _json(folder / "summary.json"), folder / "metrics.jsonl"
    epochs = summary.get("epoch")
    if epochs is None or summary.get("status") != "finished" or not file.is_file():
        return {}
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values.get("kind") == "evaluation" and abs(values.get("epoch", -1) - share * epochs) < 1e-6 * epochs:
            return values
    return {}
