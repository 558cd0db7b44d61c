"""docs/results.md from results/: the prose of each folder's notes.md, its tables computed from the runs kept there.

results/notes.md is the beginning, and its block ``sections`` names the folders in order. In a folder's notes.md a
fenced block is replaced by what it stands for, and says in YAML what that is:

- ``table``: ``rows`` (texts, or mappings of variables; or ``each``, a mapping of variables to lists, for their product)
  and ``columns`` by their heads. A column that is a text stands for itself; in texts, ``runs``, ``file`` and ``where``,
  ``{row}`` and the row's other variables are filled in. Else it is a mapping, with what it lacks taken from the table:
  ``runs``, the folders ``<runs>-<seed>``; ``read``, a dotted key (or a list: their values with a slash between) of
  ``file`` (summary.json) or of the one of its rows that agrees with ``where``. The cell is the mean and the sample
  standard deviation over seeds, or, with ``less``, the difference from those other runs, paired by seed, with its 95 %
  t interval. ``scale`` is a factor, ``digits`` those after the point, ``sign`` writes a plus, ``count`` the number of
  runs alone (``only``) or behind the value; ``missing`` stands where there is nothing.
- ``compare``: a table of tools/compare.py over ``runs``: ``show: scores``, or ``differences`` from ``baseline``.
- ``paper``: a ``table`` of the paper, as table01, and ours at ``scale`` (proxy): from the folder's own
  ``table01/<scale>/<run>-<seed>``, else from the runs that the table says are kept; with ``finished: true`` without the
  numbers that were not run.
- ``benchmark``: rows of tools/benchmark.py: a mapping of files to their rows' names.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from tools import compare
from tools.compare import WrongInput
from tools.tables import load_table

NOTE = (
    "<!-- Made by `python tools/reproduce.py report --document` from results/: edit the notes.md there, not this. -->"
)
BLOCK = re.compile(r"^```(table|compare|paper|benchmark|sections)\n(.*?)^```\n", flags=re.M | re.S)


def render(results: Path) -> str:
    """The whole document. Raises: WrongInput naming the notes.md whose block is wrong or whose runs are not there."""
    sections = {folder.parent.name for folder in results.glob("*/notes.md")}
    text = fill(results)
    for name in _blocks(results, "sections"):
        if name not in sections:
            raise WrongInput(f"{results}/notes.md names the section {name}: there is no {results}/{name}/notes.md")
        sections.discard(name)
        text += "\n" + fill(results / name)
    if sections:
        raise WrongInput(f"{results}/notes.md does not name the section {min(sections)}")
    return f"{NOTE}\n\n{text}"


def _blocks(folder: Path, kind: str) -> list[Any]:
    return [item for m in BLOCK.finditer((folder / "notes.md").read_text()) if m[1] == kind for item in _yaml(m[2])]


def _yaml(text: str) -> Any:
    return yaml.safe_load(text)


def fill(folder: Path) -> str:
    """A folder's notes.md with its blocks replaced. Raises: WrongInput."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "sections":
            return ""
        try:
            made = KINDS[match[1]](folder, yaml.safe_load(match[2]))
        except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
            what = f"lacks {error}" if type(error) is KeyError else str(error).splitlines()[0]
            raise WrongInput(f"{folder}/notes.md, block {match[1]} {_first(match[2])}: {what}") from error
        return made + "\n"

    return BLOCK.sub(replace, (folder / "notes.md").read_text()).rstrip() + "\n"


def _first(text: str) -> str:
    return repr(text.partition("\n")[0][:40])


def table(folder: Path, spec: Mapping[str, Any]) -> str:
    """The block ``table``."""
    if "each" in spec:
        rows = [dict(zip(spec["each"], v, strict=True)) for v in itertools.product(*spec["each"].values())]
    else:
        rows = [row if isinstance(row, dict) else {"row": row} for row in spec["rows"]]
    shared = {key: value for key, value in spec.items() if key not in ("rows", "each", "columns")}
    lines = [list(spec["columns"])]
    for row in rows:
        lines.append([cell(folder, _column(column, shared), row) for column in spec["columns"].values()])
    return markdown(lines)


def _column(column: Any, shared: Mapping[str, Any]) -> Any:
    return {**shared, **column} if isinstance(column, Mapping) else column


def cell(folder: Path, column: Any, row: Mapping[str, Any]) -> str:
    """A cell of a table: a text, or the mean, spread or difference of what is read from runs."""
    if not isinstance(column, Mapping):
        return str(column).format_map(row)
    keys = column["read"] if isinstance(column["read"], list) else [column["read"]]
    ours = [values(folder, column["runs"].format_map(row), key, column, row) for key in keys]
    missing = column.get("missing")
    if not all(ours):
        if missing is None:
            raise ValueError(f"no run {column['runs'].format_map(row)}-<seed> holds {' or '.join(keys)}")
        return str(missing)
    if column.get("count") == "only":
        return str(len(ours[0]))
    if "less" in column:
        other = column["less"].format_map(row)
        if other == column["runs"].format_map(row):
            return ""
        return difference(ours[0], values(folder, other, keys[0], column, row), column)
    told = " / ".join(spread(list(found.values()), column) for found in ours)
    return f"{told} ({len(ours[0])})" if column.get("count") else told


def values(folder: Path, runs: str, key: str, column: Mapping[str, Any], row: Mapping[str, Any]) -> dict[int, float]:
    """By seed, what the runs hold under ``key``. Raises: ValueError for a run that is not finished."""
    found = {}
    for seed, run in find(folder, runs).items():
        document = read(run / str(column.get("file", "summary.json")).format_map(row))
        if document.get("status", "finished") != "finished":
            raise ValueError(f"{run} is not finished")
        if "where" in column:
            where = {k: yaml.safe_load(str(v).format_map(row)) for k, v in column["where"].items()}
            fits = [line for line in document.get("rows", ()) if all(line.get(k) == v for k, v in where.items())]
            document = fits[0] if len(fits) == 1 else {}
        value = look_up(document, key)
        if value is not None:
            found[seed] = column.get("scale", 1) * value
    return found


def find(folder: Path, runs: str) -> dict[int, Path]:
    """By seed the folders ``<runs>-<seed>``; else the folder of that very name, as seed 0."""
    return numbered(folder / runs) or ({0: folder / runs} if (folder / runs).is_dir() else {})


def numbered(stem: Path) -> dict[int, Path]:
    """The folders ``<stem>-<number>`` by their numbers."""
    folders = stem.parent.iterdir() if stem.parent.is_dir() else ()
    matches = ((re.fullmatch(re.escape(stem.name) + r"-(\d+)", folder.name), folder) for folder in folders)
    return dict(sorted((int(match[1]), folder) for match, folder in matches if match))


def read(file: Path) -> dict[str, Any]:
    """A JSON document; the evaluations of a ``.jsonl`` as its ``rows``; nothing where there is no such file."""
    if not file.is_file():
        return {}
    if file.suffix != ".jsonl":
        return json.loads(file.read_text())
    lines = map(json.loads, file.read_text().splitlines())
    return {"rows": [line for line in lines if line.get("kind") == "evaluation"]}


def look_up(document: Any, key: str) -> Any:
    """The value under a dotted key, whose parts may hold dots themselves; None where there is none."""
    if not key:
        return document
    if not isinstance(document, Mapping):
        return None
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:n]), ".".join(parts[n:])
        if name in document and (found := look_up(document[name], rest)) is not None:
            return found
    return None


def spread(numbers: Sequence[float], column: Mapping[str, Any]) -> str:
    digits, sign = column.get("digits", 2), "+" if column.get("sign") else ""
    mean = f"{fmean(numbers):{sign}.{digits}f}"
    return f"{mean} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], column: Mapping[str, Any]) -> str:
    """Paired by seed, with its 95 % t interval."""
    pairs = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not pairs:
        raise ValueError(f"no seed in common with {column['less']}")
    digits = column.get("digits", 2)
    if len(pairs) == 1:
        return f"{pairs[0]:+.{digits}f} (one seed)"
    low, high = compare.interval(pairs)
    return f"{fmean(pairs):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def compared(folder: Path, spec: Mapping[str, Any]) -> str:
    """The block ``compare``."""
    runs = [compare.read_run(path) for name in spec["runs"] for path in find(folder, name).values()]
    roles, groups = compare.common_roles(runs), compare.make_groups(runs)
    if spec["show"] == "scores":
        return markdown(compare.score_rows(groups, roles))
    return markdown(compare.difference_rows(compare.differences_from(spec["baseline"], groups, roles)))


def paper(folder: Path, spec: Mapping[str, Any]) -> str:
    """The block ``paper``."""
    from tools import report  # takes in this module

    of, scale = load_table(spec["table"]), spec.get("scale", "proxy")
    lines = report.paper_lines(of, scale, report.gather(of, scale, folder, folder.parent)[0])
    if not any(line.by_seed for line in lines):
        raise ValueError(f"no run of {spec['table']} is kept")
    grids = report.paper_grids(of, scale, [line for line in lines if line.by_seed or not spec.get("finished")])
    return "\n\n".join(f"{grid.caption}:\n\n{markdown(grid.rows)}" for grid in grids)


def benchmark(folder: Path, spec: Mapping[str, Sequence[str]]) -> str:
    """The block ``benchmark``."""
    lines = [["row", "what", "median", "quartiles", "95 % of the median", "target", "reached", "on"]]
    for file, names in spec.items():
        rows = {row["row"]: row for row in read(folder / file)["rows"]}
        for row in map(rows.__getitem__, names):
            quartiles, interval = (f"{low:.3f} to {high:.3f}" for low, high in (row["quartiles"], row["interval"]))
            target = "" if row["target"] is None else f"{'>=' if row['at_least'] else '<='} {row['target']:g}"
            reached = {True: "yes", False: "no", None: ""}[row["reached"]]
            noise = "" if row["certain"] or row["reached"] is None else ", within the noise"
            median = f"{row['median']:.3f} {row['unit']}".rstrip()
            name = f"`{row['row']}`"
            lines.append([name, row["what"], median, quartiles, interval, target, reached + noise, row["on"]])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first line its head."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


KINDS = {"table": table, "compare": compared, "paper": paper, "benchmark": benchmark}
