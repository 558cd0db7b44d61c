"""Reports what was run for the paper's tables beside the paper's numbers: Markdown, CSV and a page of its own.

It is ``reproduce.py report``: of runs/reproduce and what results/ keeps. Needs no torch.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from core.analysis.pages import page_template
from core.errors import InputError
from core.files import make_folder, write_atomically
from core.progress import progress_bar
from tools.document import render
from tools.findings import RULE, Added, differences, gains, gains_caption, once, said
from tools.hardware import differing_in_pairs, processor, unknown_processors
from tools.ours import Members, Number, amount_of, by_role, first_uses, gather, numbers, reused, setting_of
from tools.overview import LEGEND, SETTINGS, forest, what_is_missing, what_was_run
from tools.paper import SCALES, Scale, Table, load_tables
from tools.pictures import Picture, curves, pictures_of, shown_by
from tools.printed import Printed, printed
from tools.stats import Grid, counted, markdown, mean_std

INTRODUCTION = (
    "In each cell the paper's number, then **ours**: the mean ± sample standard deviation over seeds (their number in "
    "parentheses), of the last evaluation. A **proxy** is a small stand-in with other data, networks and durations "
    "than the paper's: next to the paper's number it says nothing of how well the paper is reproduced."
)


@dataclass(frozen=True)
class Part:
    """What was run for a table of the paper at one scale. ``grids`` and ``pictures`` by caption."""

    table: Table
    scale: Scale
    words: Sequence[str]
    numbers: Sequence[Number]
    printed: Printed | None
    added: Sequence[Added]
    grids: Mapping[str, Grid]
    members: Members
    pictures: Mapping[str, Picture]
    first: Mapping[Path, tuple[str, str]]
    """Where each run of the report is counted first."""

    @property
    def title(self) -> str:
        return f"{self.table.label}, {SETTINGS[self.scale]}: {self.table.title}"

    @property
    def files(self) -> dict[str, bytes]:
        """The pictures by the names that they have beside the report."""
        pictures = self.pictures.values()
        return {f"{self.table.name}-{self.scale}-{n}.png": picture.png for n, picture in enumerate(pictures)}


@dataclass(frozen=True)
class Report:
    """Its parts, and what the first screen says of them."""

    parts: Sequence[Part]
    missing: Sequence[str]

    @property
    def every(self) -> list[Added]:
        """All differences, each but once."""
        return once(added for part in self.parts for added in part.added)

    @property
    def summary(self) -> str:
        """What was run at which scale, in a sentence."""
        told = []
        for scale in reversed(SCALES):
            of = [part for part in self.parts if part.scale == scale]
            runs = {run.path for part in of for by_seed in part.members.values() for run in by_seed.values()}
            where = "in the setting of the paper" if scale == "paper" else "at proxy scale, small stand-ins"
            tables = f", for {counted(len(of), 'table or figure')}" if of else ""
            told.append(f"**{counted(len(runs), 'run')}** {where}{tables}")
        return f"{'; '.join(told)}.".replace("**0 runs**", "**no run**").replace(
            "table or figures", "tables and figures"
        )

    @property
    def ran(self) -> Grid:
        return what_was_run((part.table, part.scale, part.members) for part in self.parts)

    @property
    def said(self) -> list[str]:
        return said(self.every)


def main(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises: InputError."""
    if options.document is not None:
        save(options.document, render(options.results).encode())
        print(f"written: {options.document}")
        return 0
    report = make_report(load_tables(options.tables), options.runs, options.results)
    texts = {"report.md": as_markdown(report), "report.csv": as_table(report.parts), "report.html": as_html(report)}
    pictures = {name: png for part in report.parts for name, png in part.files.items()}
    for name, content in [*pictures.items(), *((name, text.encode()) for name, text in texts.items())]:
        save(options.out / name, content)
    print(f"written to {options.out}: {', '.join(texts)}")
    return 0


@dataclass(frozen=True)
class Shared:
    """What the tables have in common."""

    first: Mapping[Path, tuple[str, str]]
    """Where each run is counted first."""
    shown: Set[Path]
    """The pictures that some table shows."""
    drawn: set[Path]
    """The pictures, and the runs whose curves, that the parts so far have."""


def make_report(tables: Mapping[str, Table], runs: Path, results: Path) -> Report:
    """Raises: InputError where nothing is run."""
    gathered: dict[tuple[str, Scale], tuple[Members, list[str]]] = {}
    with progress_bar(len(tables) * len(SCALES), "reading runs", "table", many=1) as bar:
        for scale, name in product(SCALES, tables):
            gathered[name, scale] = gather(tables[name], scale, runs, results)
            bar.update()
    found = [(tables[name], members) for (name, _), (members, _) in gathered.items()]
    every = ((table, run_id, run) for table, members in found for run_id in members for run in members[run_id].values())
    shared = Shared(first_uses(found), {picture for one in every for picture in shown_by(*one)}, set())
    parts: list[Part] = []
    left: list[str] = []  # why runs of tables of which nothing is finished do not count
    with progress_bar(len(tables), "drawing", "table", many=1) as bar:
        for name, table in tables.items():
            made = [paper_part(table, scale, *gathered[name, scale], shared) for scale in SCALES]
            parts += [part for part in made if part is not None]
            if not any(made):
                left += [f"{table.label}, {why}" for scale in SCALES for why in gathered[name, scale][1]]
            bar.update()
    if not parts:
        raise InputError("; ".join([f"no run of the paper's tables in {runs} or {results}: reproduce.py run", *left]))
    missing = what_is_missing(tables.values(), {(part.table.name, part.scale): part.numbers for part in parts})
    return Report(parts, [*missing, *([f"Left out: {'; '.join(left)}."] if left else [])])


def paper_part(table: Table, scale: Scale, members: Members, left: Sequence[str], shared: Shared) -> Part | None:
    """What was run for a table at one scale, None where nothing is finished. ``left``: why other runs do not count."""
    recipes = sorted({table.runs[run_id][scale].recipe for run_id in members})
    words = [f"**Proxy**: {', '.join(recipes)} instead of the paper's setting."] if scale == "proxy" else []
    words += [f"Ours: {'; '.join(of)}."] if (of := ours(members)) else []
    words += [table.notes] if table.notes else []
    missing = sorted({cell.run for cell in table.cells if cell.run is not None and cell.run not in members})
    words += [f"Not run: {', '.join(missing)}."] if missing else []
    words += [f"Left out: {'; '.join(left)}."] if left else []
    words += [*differing_in_pairs(members, table.baselines), *unknown_processors(members)]
    words += sorted({f"Not run, {cell.column}: {cell.why}" for cell in table.cells if cell.run is None})
    found = numbers(table, scale, members) if members else []
    pictures, before = pictures_of(table, members, shared.shown, shared.drawn)
    if not found and not pictures and not before:
        return None
    words += [f"Its pictures stand before: {'; '.join(before)}."] if before else []
    pictures |= curves(members, shared.drawn) if found else {}
    first = shared.first
    own = {name: runs for name, runs in members.items() if any(first[r.path][0] == table.label for r in runs.values())}
    made = printed(table, scale, found, first), differences(table, scale, found), attention(own)
    return Part(table, scale, words, found, *made, members, pictures, first)


def ours(members: Members) -> list[str]:
    """Our networks, data and durations."""
    every = [run for runs in members.values() for run in runs.values()]
    return list(dict.fromkeys(f"{setting_of(run)} ({amount_of(run)})" for run in every if setting_of(run)))


# --- what stands beside the numbers -----------------------------------------------------------------------------------


def attention(members: Members) -> dict[str, Grid]:
    """Both attention weights within an image, as in Table 17, and the mean similarity S: at the end, over seeds."""
    rows, rounds = [["run", "consensus", "divergence", "S"]], [["run, round", "S", "extremes", "deviation"]]
    keys = ("similarity", "similarity_min", "similarity_max", "attention_std")
    for run_id, runs in members.items():
        told = []
        for form, names in (
            ("{:.3f} .. {:.3f} ({:.4f})", ("consensus_min", "consensus_max", "consensus_variance")),
            ("{:.3f} .. {:.3f} ({:.4f})", ("divergence_min", "divergence_max", "divergence_variance")),
            ("{:.3f}", ("similarity",)),
        ):
            found = [[run.number(f"last.attention/{name}") for run in runs.values()] for name in names]
            means = [mean_std(value for value in values if value is not None)[0] for values in found]
            told.append("" if None in means else form.format(*means))
        rows += [[run_id, *told]] if any(told) else []
        chains = [run.files.get("rounds", {}) for run in runs.values()]
        for name in sorted({name for chain in chains for name in chain}, reverse=True):
            last = [chain[name].get("last", {}) for chain in chains if name in chain]
            if all(f"adm/{key}" in line for line in last for key in keys):
                mean, low, high, deviation = (fmean(line[f"adm/{key}"] for line in last) for key in keys)
                rounds.append([f"{run_id}, {name}", f"{mean:.3f}", f"{low:.3f} .. {high:.3f}", f"{deviation:.4f}"])
    attention = "Attention at the end, means over seeds: minimum .. maximum (variance) within an image"
    similarity = (
        "Last log point of each round, means over seeds: S, its extremes, the attention's deviation within an image"
    )
    return {caption: grid for caption, grid in ((attention, rows), (similarity, rounds)) if len(grid) > 1}


def environments(members: Members) -> list[str]:
    """On what, with what and from which commit the runs ran."""
    found: Counter[str] = Counter()
    for start in (run.start for runs in members.values() for run in runs.values() if run.start):
        commit = f"commit {(start.get('commit') or 'unknown')[:10]}{'*' if start.get('uncommitted_changes') else ''}"
        torch = start.get("versions", {}).get("torch", "?")
        versions = f"torch {torch}, Python {start.get('python', '?')}"
        found[f"{commit}, {versions}, {processor(start)}, {start.get('threads', '?')} threads"] += 1
    return [f"{told}: {count} run{'s' if count > 1 else ''}" for told, count in found.items()]


def commands(members: Members) -> list[str]:
    """The command of the first run of each id, with the seeds of all."""
    told = []
    for runs in members.values():
        start = next((run.start for run in runs.values() if run.start), {})
        if start.get("command"):
            also = ", in paths too" if len(runs) > 1 else ""
            told.append(f"{shlex.join(['python', *start['command']])}  # seeds: {', '.join(map(str, runs))}{also}")
    return told


# --- writing ----------------------------------------------------------------------------------------------------------


def as_table(parts: Sequence[Part]) -> str:
    """CSV, a line a number, in full precision."""
    head = "part row column metric unit higher_is_better scale paper paper_label ours_is ours_mean ours_std n"
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write([*head.split(), "ours_less_paper", "our_network_and_data", "runs_of"])
    for of, one in ((part, number) for part in parts for number in part.numbers):
        cell, metric = one.cell, one.cell.metric
        paper = [metric.name, metric.unit, metric.higher_is_better, of.scale, cell.paper, cell.label]
        less = one.difference if of.scale == "paper" else None
        mine = [one.measure, *mean_std(one.by_seed.values()), len(one.by_seed), less]
        named = by_role(one) if one.runs else ""
        write([of.table.label, cell.row, one.column, *paper, *mine, named, reused(of.table, one, of.first)])
    return out.getvalue()


def as_markdown(report: Report) -> str:
    """The report, its pictures as files beside it."""

    def table_of(grid: Grid) -> str:
        return f"{markdown([[plain(cell) for cell in row] for row in grid], aligned=True)}\n"

    text = [f"# The paper's tables and ours\n\n{INTRODUCTION}\n", f"## What was run\n\n{table_of(report.ran)}"]
    text.append("## What can be said\n")
    text += [f"{plain(word, bold=True)}\n" for word in [RULE, *report.said]]
    text += [f"## What is missing\n\n{' '.join(map(plain, report.missing))}\n"]
    for part in report.parts:
        text.append(f"## {plain(part.title)}\n")
        text += [f"{plain(word, bold=True)}\n" for word in part.words]
        made = {part.printed.caption: part.printed.grid} if part.printed else {}
        made |= {gains_caption(part.added): gains(part.added)} if part.added else {}
        for caption, grid in {**made, **part.grids}.items():
            text.append(f"{plain(caption)}:\n\n{table_of(grid)}")
        text += [f"![{plain(caption)}]({file})\n" for caption, file in zip(part.pictures, part.files, strict=True)]
        text.append("".join(f"- {plain(told)}\n" for told in environments(part.members)))
        told = "\n".join(commands(part.members))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", told)), default=0))
        text.append(f"{fence}bash\n{told}\n{fence}\n")
    return "\n".join(text)


def plain(text: str, *, bold: bool = False) -> str:
    """A line of Markdown that shows a text as it is. ``bold``: but what stands between double asterisks."""
    line = re.sub(r"[\\`*<|\[\]&~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"^(\d*)(?=(?:[#+.)-]|#+) |>|[=-]+$)", r"\1\\", line)  # what begins a heading, a list or a quotation
    return re.sub(r"\\\*\\\*(.+?)\\\*\\\*", r"**\1**", line) if bold else line


def as_html(report: Report) -> str:
    """One page that needs nothing else: style and pictures are in it."""
    from markupsafe import Markup, escape

    template = page_template(
        Path(__file__).with_suffix(".html"),
        bold=lambda text: Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text)))),
        gains=gains,
        gains_caption=gains_caption,
        environments=environments,
        commands=commands,
    )
    axes = forest(report.every)
    return template.render(report=report, axes=axes, introduction=INTRODUCTION, rule=RULE, legend=LEGEND)


def save(file: Path, content: bytes) -> None:
    """Raises: InputError where its folder cannot be made, TrainingError where it cannot be written."""
    make_folder(file.parent)
    write_atomically(file, lambda temporary: temporary.write_bytes(content))
