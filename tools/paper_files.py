"""Reads the paper's tables and figures from ``tools/paper/tableNN.yaml`` and ``figureNN.yaml``.

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

RUN: ``base: ID`` (merged below it), ``method``, ``all_scales: {flag: value}`` at either scale, and for the paper's
scale ``recipe``, ``overrides: {flag: value}``, ``after: [COMMAND, ...]`` (what to call when it is trained), ``task``,
``command``; ``proxy:`` holds the same keys for the small run, and ``results: FOLDER/NAME`` where such runs are kept as
``results/FOLDER/NAME-<seed>``. ``same_as: tableNN/ID``, of a run or of its proxy alone, is a run of another table, with
what ``after`` adds. ``{run}`` in a text is the run's folder, ``{run:ID}`` that of another run of the same scale and
seed, which must be finished before.

CELL: ``column``, ``paper`` (a number, or null where the paper prints none), ``label`` (what it prints besides),
``run: ID``, and ``read`` or ``show``; ``run: null`` with ``why`` for a cell that nothing here yields. ``read`` is a
query of the run, with ``where`` and ``at`` as ``tools/runs.py`` explains them. ``show`` is an image in its folder.
``run``, ``read``, ``where``, ``at`` and ``metric`` of a column or, before it, of a row hold for the cells that have
none of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from core.errors import InputError
from tools.paper import SCALES, Cell, Metric, Row, Scale, Setting, Table
from tools.runs import Loader

PAPER = Path(__file__).resolve().parent / "paper"
TASKS = ("classification", "offline_kd", "segmentation", "diffusion", "none")

_SETTING = {"recipe", "overrides", "after", "task", "command", "same_as", "results"}
_RUN = {"base", "method", "all_scales", "proxy", *_SETTING} - {"results"}
_INHERITED = {"run", "read", "where", "at", "metric"}  # what cells take from their row or column
_CELL = {"column", "paper", "label", "why", "show", *_INHERITED}
_TABLE = {
    "table", "figure", "title", "notes", "task", "command", "metric", "seeds", "needs", "bases", "runs", "baselines",
    "columns", "rows",
}  # fmt: skip


def load_tables(folder: Path = PAPER) -> dict[str, Table]:
    """All tables and figures by name, tables first. Raises: InputError naming file and key."""
    raw = _read_all(folder)
    return {name: _table(name, raw) for name in raw}


def load_table(name: str, folder: Path = PAPER) -> Table:
    """One of them. Raises: InputError as ``load_tables``, and for an unknown name."""
    raw = _read_all(folder)
    if name not in raw:
        raise InputError(f"no {name}: {', '.join(raw)}")
    return _table(name, raw)


def _read_all(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(folder.glob("*.yaml"), key=lambda file: (file.stem[0] != "t", file.stem))
    return {file.stem: _read(file) for file in files}


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is no table: it holds no keys")
    return values


def _known(named: str, values: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{named}: {values!r} has no keys")
    if unknown := sorted(map(str, set(values) - keys)):
        raise InputError(f"{named}: unknown key {unknown[0]}; known are {', '.join(sorted(keys))}")
    return values


def _table(name: str, raw: Mapping[str, dict[str, Any]]) -> Table:
    values = _known(name, raw[name], _TABLE)
    missing = [key for key in ("title", "task", "metric", "columns", "rows") if key not in values]
    if missing:
        raise InputError(f"{name}: {missing[0]} is missing")
    kind = "table" if "table" in values else "figure"
    if name != f"{kind}{values.get(kind, 0):02d}":
        raise InputError(f"{name}: the file says it is {kind} {values.get(kind)}")
    if values["task"] not in TASKS:
        raise InputError(f"{name}: task {values['task']!r} is none of {', '.join(TASKS)}")
    metric = _metric(name, values["metric"])
    runs = {run_id: _settings(name, run_id, raw) for run_id in values.get("runs") or {}}
    columns = dict(_column(name, column) for column in values["columns"])
    rows = tuple(_row(name, row, metric, columns, runs) for row in values["rows"])
    names = [row.name for row in rows]
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise InputError(f"{name}: two rows are named {twice}")
    baselines = _known(f"{name}, baselines", values.get("baselines") or {}, set(runs))
    if unknown := next((one for one in baselines.values() if one not in runs), None):
        raise InputError(f"{name}, baselines: no run {unknown}")
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


def _metric(named: str, values: Any) -> Metric:
    return Metric(**_known(f"{named}, metric", values, {"name", "unit", "higher_is_better", "proxy"}))


def _column(name: str, values: Any) -> tuple[str, dict[str, Any]]:
    """Its name, and what it gives its cells."""
    if not isinstance(values, dict):
        return str(values), {}
    given = dict(_known(f"{name}, column", values, {"name", *_INHERITED}))
    return str(given.pop("name", None)), given


def _row(name: str, values: Any, metric: Metric, columns: Mapping[str, Mapping[str, Any]], runs: Mapping) -> Row:
    values = _known(f"{name}, row", values, {"name", "cells", *_INHERITED})
    named = f"{name}, row {values.get('name')}"
    own = {key: value for key, value in values.items() if key in _INHERITED}
    cells = []
    for given in values.get("cells") or ():
        column = str(_known(named, given, _CELL).get("column"))
        if column not in columns:
            raise InputError(f"{named}: no column {column}; there are {', '.join(columns)}")
        cell = {**columns[column], **own, **given, "column": column}
        cells.append(_cell(f"{named}, {column}", cell, metric, runs))
    return Row(str(values.get("name")), tuple(cells))


def _cell(named: str, values: dict[str, Any], metric: Metric, runs: Mapping) -> Cell:
    if values.get("run") is None:
        if not values.get("why"):
            raise InputError(f"{named}: no run and no why")
        values = {**values, "read": None, "where": None, "at": None}
    elif values["run"] not in runs:
        raise InputError(f"{named}: no run {values['run']}")
    elif "show" in values:
        values = {**values, "read": None}
    elif values.get("read") is None:
        raise InputError(f"{named}: neither read nor show")
    own = _metric(named, values["metric"]) if "metric" in values else metric
    return Cell(**{**values, "metric": own})


def _settings(name: str, run_id: str, raw: Mapping[str, dict[str, Any]]) -> dict[Scale, Setting]:
    """The run at its scales, found where it is defined."""
    run = _merged(name, run_id, raw[name])
    named = f"{name}, run {run_id}"
    settings: dict[Scale, Setting] = {}
    for scale in SCALES:
        values = run if scale == "paper" else run.get("proxy") or {}
        _known(named if scale == "paper" else f"{named}, proxy", values, _RUN if scale == "paper" else _SETTING)
        same = values.get("same_as") or (run.get("same_as") if scale == "proxy" and "recipe" not in values else None)
        if same is not None:
            table, _, other = same.partition("/")
            if other not in (raw.get(table, {}).get("runs") or {}):
                raise InputError(f"{named}: same_as {same}, and there is no such run")
            found = _settings(table, other, raw)
            if scale in found:
                more = values.get("after") or run.get("after") or ()
                settings[scale] = replace(found[scale], after=(*found[scale].after, *more))
        elif "recipe" in values:
            settings[scale] = _setting(name, run_id, scale, run, values, raw)
    if not settings:
        raise InputError(f"{named}: neither recipe nor same_as")
    return settings


def _setting(
    name: str, run_id: str, scale: Scale, run: Mapping[str, Any], values: Mapping[str, Any], raw: Mapping[str, Any]
) -> Setting:
    table = raw[name]
    task = values.get("task") or run.get("task") or table["task"]
    overrides = {**(values.get("overrides") or {}), **(run.get("all_scales") or {})}
    if "method" in run:
        overrides = {"method": run["method"], **overrides}
    needs: dict[tuple[str, str], None] = {}

    def folder(match: re.Match[str]) -> str:
        if match[1] not in (table.get("runs") or {}):
            raise InputError(f"{name}, run {run_id}: {match[0]}, and there is no such run")
        other = _settings(name, match[1], raw)[scale]
        needs[other.table, other.run] = None
        return f"{{run:{other.table}/{other.run}}}"

    def qualify(text: Any) -> Any:
        return re.sub(r"\{run:([^}]+)\}", folder, text) if isinstance(text, str) else text

    overrides = {key: qualify(value) for key, value in overrides.items()}
    after = tuple(map(qualify, values.get("after") or ()))
    command = values.get("command") or run.get("command") or table.get("command")
    return Setting(
        table=name,
        run=run_id,
        scale=scale,
        task=task,
        command=command if task == "diffusion" else None,
        recipe=values["recipe"],
        overrides=overrides,
        after=after,
        needs=tuple(needs),
        results=values.get("results"),
    )


def _merged(name: str, run_id: str, table: Mapping[str, Any], kind: str = "runs") -> dict[str, Any]:
    """A run with its base below it: of mappings the keys of both, of all else the run's own."""
    named = f"{name}, {kind[:-1]} {run_id}"
    known = table.get(kind) or {}
    if run_id not in known:
        raise InputError(f"{named}: there is no such {kind[:-1]}")
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
