"""docs/results.md from results/: the prose of each folder's notes.md, its tables computed from the runs kept there.

results/notes.md is the beginning, and its block ``sections`` names the folders in order. In a folder's notes.md a
fenced block is replaced by what it stands for, and says in YAML what that is:

- ``table``: ``rows`` (texts, or mappings of variables; or ``each``, a mapping of variables to lists, for their product)
  and ``columns`` by their heads. A column that is a text stands for itself; in texts, ``runs`` and ``where``, ``{row}``
  and the row's other variables are filled in. Else it is a mapping, with what it lacks taken from the table: ``runs``,
  the runs ``<runs>-<seed>`` (or the run of that very name); ``read``, a query of theirs (or a list: their values with a
  slash between) with its ``where``, as tools/runs.py explains. The cell is the mean and the sample standard deviation
  over seeds, or, with ``less``, the difference from those other runs, paired by seed, with its 95 % t interval.
  ``scale`` is a factor, ``digits`` those after the point, ``sign`` writes a plus, ``count`` the number of runs alone
  (``only``) or behind the value; ``missing`` stands where there is nothing; ``partial`` takes unfinished runs too.
- ``compare``: a table of tools/compare.py over ``runs``: ``show: scores``, or ``differences`` from ``baseline``.
- ``paper``: a ``table`` of the paper, as table01, and ours at ``scale`` (proxy): from the folder's own
  ``table01/<scale>/<run>-<seed>``, else from the runs that the table says are kept; with ``finished: true`` without the
  numbers that were not run.
- ``benchmark``: rows of tools/benchmark: a mapping of files to their rows' names.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.errors import InputError
from tools.compare import difference_rows, score_rows
from tools.findings import differences, gains, gains_caption
from tools.groups import compare_runs
from tools.ours import first_uses, gather, numbers
from tools.paper import find_table, load_tables
from tools.printed import printed
from tools.runs import Run, read_run, seeds_of
from tools.stats import markdown, paired, spread

COMMAND = "python tools/reproduce.py report --document"
NOTE = f"<!-- Made by `{COMMAND}` from results/: edit the notes.md there, not this. -->"
BLOCK = re.compile(r"^```(table|compare|paper|benchmark|sections)\n(.*?)^```\n", flags=re.M | re.S)


def render(results: Path) -> str:
    """The whole document. Raises: InputError naming the notes.md whose block is wrong or whose runs are not there."""
    sections = {folder.parent.name for folder in results.glob("*/notes.md")}
    text = fill(results)
    blocks = [match for match in BLOCK.finditer((results / "notes.md").read_text()) if match[1] == "sections"]
    for name in (name for match in blocks for name in yaml.safe_load(match[2])):
        if name not in sections:
            raise InputError(f"{results}/notes.md names the section {name}: there is no {results}/{name}/notes.md")
        sections.discard(name)
        text += "\n" + fill(results / name)
    if sections:
        raise InputError(f"{results}/notes.md does not name the section {min(sections)}")
    return f"{NOTE}\n\n{text}"


def fill(folder: Path) -> str:
    """A folder's notes.md with its blocks replaced. Raises: InputError."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "sections":
            return ""
        try:
            return BLOCKS[match[1]](folder, yaml.safe_load(match[2])) + "\n"
        except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
            what = f"lacks {error}" if type(error) is KeyError else str(error).splitlines()[0]
            first = match[2].partition("\n")[0][:40]
            raise InputError(f"{folder}/notes.md, block {match[1]} {first!r}: {what}") from error

    return BLOCK.sub(replace, (folder / "notes.md").read_text()).rstrip() + "\n"


def table_block(folder: Path, spec: Mapping[str, Any]) -> str:
    """The block ``table``."""
    if "each" in spec:
        rows = [dict(zip(spec["each"], v, strict=True)) for v in itertools.product(*spec["each"].values())]
    else:
        rows = [row if isinstance(row, dict) else {"row": row} for row in spec["rows"]]
    given = {key: value for key, value in spec.items() if key not in ("rows", "each", "columns")}
    columns = [{**given, **column} if isinstance(column, Mapping) else column for column in spec["columns"].values()]
    return markdown([list(spec["columns"]), *([cell(folder, column, row) for column in columns] for row in rows)])


def cell(folder: Path, column: Any, row: Mapping[str, Any]) -> str:
    """A cell of a table: a text, or the mean, spread or difference of what is read from runs."""
    if not isinstance(column, Mapping):
        return str(column).format_map(row)
    runs, digits = column["runs"].format_map(row), column.get("digits", 2)
    queries = column["read"] if isinstance(column["read"], list) else [column["read"]]
    ours = [values(folder, runs, query, column, row) for query in queries]
    if not all(ours):
        if "missing" not in column:
            raise ValueError(f"no run {runs}-<seed> holds {' or '.join(queries)}")
        return str(column["missing"])
    if column.get("count") == "only":
        return str(len(ours[0]))
    if "less" in column:
        other = column["less"].format_map(row)
        difference = paired(ours[0], values(folder, other, queries[0], column, row))
        if not difference.by_seed:
            raise ValueError(f"no seed in common with {column['less']}")
        return "" if other == runs else difference.told(digits)
    told = " / ".join(spread(found.values(), digits, "+" if column.get("sign") else "") for found in ours)
    return f"{told} ({len(ours[0])})" if column.get("count") else told


def values(folder: Path, runs: str, query: str, column: Mapping[str, Any], row: Mapping[str, Any]) -> dict[int, float]:
    """By seed, what the runs hold. Raises: ValueError for a run that is not finished."""
    where = {key: yaml.safe_load(str(value).format_map(row)) for key, value in column.get("where", {}).items()}
    found = {}
    for seed, run in find(folder, runs).items():
        if run.summary.get("status", "finished") != "finished" and not column.get("partial"):
            raise ValueError(f"{run.path} is not finished")
        value = run.number(query, where)
        if value is not None:
            found[seed] = column.get("scale", 1) * value
    return found


def find(folder: Path, name: str) -> dict[int, Run]:
    """By seed the runs ``<name>-<seed>``; else the run of that very name, as seed 0."""
    runs = {seed: read_run(path) for seed, path in seeds_of(folder / name).items()}
    if not runs:
        with contextlib.suppress(InputError):
            runs = {0: read_run(folder / name)}
    return runs


def compare_block(folder: Path, spec: Mapping[str, Any]) -> str:
    """The block ``compare``."""
    runs = [run for name in spec["runs"] for run in find(folder, name).values()]
    if spec["show"] == "scores":
        return markdown(score_rows(compare_runs(runs)))
    return markdown(difference_rows(compare_runs(runs, baseline=spec["baseline"])))


def paper_block(folder: Path, spec: Mapping[str, Any]) -> str:
    """The block ``paper``."""
    tables, scale = load_tables(), spec.get("scale", "proxy")
    table = find_table(spec["table"], tables)
    members = {one.name: gather(one, scale, folder, folder.parent)[0] for one in tables.values()}
    found = numbers(table, scale, members[table.name])
    if not any(one.by_seed for one in found):
        raise ValueError(f"no run of {spec['table']} is kept")
    shown = [one for one in found if one.by_seed or not spec.get("finished")]
    made = printed(table, scale, shown, first_uses((tables[name], of) for name, of in members.items()))
    assert made is not None  # there is a number
    added = differences(table, scale, found)
    more = [f"{gains_caption(added)}:\n\n{markdown(gains(added))}"] if added else []
    return "\n\n".join([f"{made.caption}:\n\n{markdown(made.grid)}", *more])


def benchmark_block(folder: Path, spec: Mapping[str, Sequence[str]]) -> str:
    """The block ``benchmark``."""
    lines = [["row", "what", "median", "quartiles", "95 % of the median", "target", "reached", "on"]]
    for file, names in spec.items():
        rows = {row["row"]: row for row in json.loads((folder / file).read_text())["rows"]}
        for row in map(rows.__getitem__, names):
            quartiles, interval = (f"{low:.3f} to {high:.3f}" for low, high in (row["quartiles"], row["interval"]))
            target = "" if row["target"] is None else f"{'>=' if row['at_least'] else '<='} {row['target']:g}"
            reached = {True: "yes", False: "no", None: ""}[row["reached"]]
            noise = "" if row["certain"] or row["reached"] is None else ", within the noise"
            median = f"{row['median']:.3f} {row['unit']}".rstrip()
            name = f"`{row['row']}`"
            lines.append([name, row["what"], median, quartiles, interval, target, reached + noise, row["on"]])
    return markdown(lines)


BLOCKS = {"table": table_block, "compare": compare_block, "paper": paper_block, "benchmark": benchmark_block}
