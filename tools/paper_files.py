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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from core.errors import InputError
from tools.paper import SCALES, Cell, Metric, Scale, Setting, Table
from tools.runs import Loader

PAPER = Path(__file__).resolve().parent / "paper"
TASKS = ("classification", "offline_kd", "segmentation", "diffusion", "none")

_SETTING = {"recipe", "overrides", "after", "task", "command", "same_as", "results"}
_RUN = {"base", "method", "all_scales", "proxy", *_SETTING} - {"results"}
_INHERITED = {"run", "read", "where", "at", "metric"}  # what cells take from their row or column
_CELL = {"column", "paper", "label", "why", "show", *_INHERITED}
_REQUIRED = ("title", "task", "metric", "columns", "rows")
_TABLE = {"table", "figure", "notes", "command", "seeds", "needs", "bases", "runs", "baselines", *_REQUIRED}


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
    if missing := [key for key in _REQUIRED if key not in values]:
        raise InputError(f"{name}: {missing[0]} is missing")
    kind = "table" if "table" in values else "figure"
    if name != f"{kind}{values.get(kind, 0):02d}":
        raise InputError(f"{name}: the file says it is {kind} {values.get(kind)}")
    if values["task"] not in TASKS:
        raise InputError(f"{name}: task {values['task']!r} is none of {', '.join(TASKS)}")
    metric = _metric(name, values["metric"])
    found = {run_id: {s: _setting(name, run_id, s, raw) for s in SCALES} for run_id in values.get("runs") or {}}
    runs = {run_id: {s: one for s, one in of.items() if one is not None} for run_id, of in found.items()}
    if undefined := next((run_id for run_id, settings in runs.items() if not settings), None):
        raise InputError(f"{name}, run {undefined}: neither recipe nor same_as")
    columns = {}
    for column in values["columns"]:
        given = column if isinstance(column, dict) else {"name": column}
        columns[str(given.get("name"))] = _known(f"{name}, column", given, {"name", *_INHERITED})
    rows = [_known(f"{name}, row", row, {"name", "cells", *_INHERITED}) for row in values["rows"]]
    names = [str(row.get("name")) for row in rows]
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
        cells=tuple(cell for row in rows for cell in _cells(name, row, metric, columns, runs)),
        runs=runs,
        baselines=baselines,
        needs=_known(f"{name}, needs", values.get("needs") or {}, set(SCALES)),
    )


def _metric(named: str, values: Any) -> Metric:
    return Metric(**_known(f"{named}, metric", values, {"name", "unit", "higher_is_better", "proxy"}))


def _cells(
    name: str, row: Mapping[str, Any], metric: Metric, columns: Mapping[str, Mapping[str, Any]], runs: Mapping
) -> Iterator[Cell]:
    """The cells of a row."""
    for given in row.get("cells") or ():
        column = str(_known(f"{name}, row {row.get('name')}", given, _CELL).get("column"))
        values = {**columns.get(column, {}), **row, **given}
        named, run = f"{name}, row {row.get('name')}, {column}", values.get("run")
        for wrong, says in (
            (column not in columns, f"no column {column}; there are {', '.join(columns)}"),
            (run is None and not values.get("why"), "no run and no why"),
            (run is not None and run not in runs, f"no run {run}"),
            (run is not None and "show" not in values and values.get("read") is None, "neither read nor show"),
        ):
            if wrong:
                raise InputError(f"{named}: {says}")
        own = {key: value for key, value in values.items() if key in _CELL}
        own |= {"column": column, "metric": _metric(named, values["metric"]) if "metric" in values else metric}
        yield Cell(str(row.get("name")), **own)


def _setting(name: str, run_id: str, scale: Scale, raw: Mapping[str, dict[str, Any]]) -> Setting | None:
    """The run at a scale, found where it is defined; None where it is not of that scale."""
    run, named = _merged(name, run_id, raw[name]), f"{name}, run {run_id}"
    values = run if scale == "paper" else _known(f"{named}, proxy", run.get("proxy") or {}, _SETTING)
    if same := values.get("same_as") or ("recipe" not in values and run.get("same_as")):
        table, _, other = same.partition("/")
        if other not in (raw.get(table, {}).get("runs") or {}):
            raise InputError(f"{named}: same_as {same}, and there is no such run")
        found = _setting(table, other, scale, raw)
        return found and replace(found, after=(*found.after, *(values.get("after") or run.get("after") or ())))
    if "recipe" not in values:
        return None
    needs: dict[tuple[str, str], None] = {}

    def folder(match: re.Match[str]) -> str:
        other = _setting(name, match[1], scale, raw) if match[1] in (raw[name].get("runs") or {}) else None
        if other is None:
            raise InputError(f"{named}: {match[0]}, and there is no such run")
        needs[other.table, other.run] = None
        return f"{{run:{other.table}/{other.run}}}"

    def qualify(text: Any) -> Any:
        return re.sub(r"\{run:([^}]+)\}", folder, text) if isinstance(text, str) else text

    method = {"method": run["method"]} if "method" in run else {}
    overrides = {**method, **(values.get("overrides") or {}), **(run.get("all_scales") or {})}
    task = values.get("task") or run.get("task") or raw[name]["task"]
    command = values.get("command") or run.get("command") or raw[name].get("command")
    return Setting(
        table=name,
        run=run_id,
        scale=scale,
        task=task,
        command=command if task == "diffusion" else None,
        recipe=values["recipe"],
        overrides={key: qualify(value) for key, value in overrides.items()},
        after=tuple(map(qualify, values.get("after") or ())),
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
