"""Reports what was run for the paper's tables beside the paper's numbers: Markdown, CSV and a page of its own.

It is ``reproduce.py report``: of runs/reproduce and what results/ keeps. Needs no torch.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from core.errors import InputError
from core.files import make_folder, write_atomically
from tools.compare import figure_of
from tools.document import render
from tools.groups import Comparison, Group, common_roles, measure_of
from tools.hardware import differing_in_pairs, processor, unknown_processors
from tools.ours import Number, gather, grids, numbers
from tools.paper import SCALES, Scale, Table, load_tables
from tools.runs import Run
from tools.stats import Grid, markdown, mean_std

WIDTH = 1000  # pixels of an embedded picture, at most
INTRODUCTION = (
    "Ours are means ± sample standard deviations over seeds (their number in parentheses), of the last evaluation. "
    "A **proxy** is a small stand-in with other data, networks and durations than the paper's: its difference from the "
    "paper says nothing of how well the paper is reproduced."
)
Members = Mapping[str, dict[int, Run]]
"""A table's finished runs, by id and seed."""


@dataclass(frozen=True)
class Part:
    """What was run for a table of the paper at one scale. ``grids``, and ``pictures`` as PNG: by caption."""

    table: Table
    scale: Scale
    words: Sequence[str]
    numbers: Sequence[Number]
    grids: Mapping[str, Grid]
    members: Members
    pictures: Mapping[str, bytes]

    @property
    def title(self) -> str:
        setting = "proxy" if self.scale == "proxy" else "the setting of the paper"
        return f"{self.table.label}, {setting}: {self.table.title}"

    @property
    def files(self) -> dict[str, bytes]:
        """The pictures by the names that they have beside the report."""
        return {f"{self.table.name}-{self.scale}-{n}.png": png for n, png in enumerate(self.pictures.values())}


def main(options: argparse.Namespace) -> int:
    """Returns the exit code. Raises: InputError."""
    if options.document is not None:
        save(options.document, render(options.results).encode())
        print(f"written: {options.document}")
        return 0
    parts: list[Part] = []
    left: list[str] = []
    out: list[str] = []  # of these why their runs do not count
    for table in load_tables(options.tables).values():
        found = [paper_part(table, scale, options.runs, options.results) for scale in SCALES]
        made = [part for part, _ in found if part is not None]
        parts += made
        if not made:
            reasons = [why for _, others in found for why in others]
            out += reasons
            left.append(f"{table.label} ({', '.join([table.title, *reasons])})")
    if not parts:
        where = f"{options.runs} or {options.results}"
        raise InputError("; ".join([f"no run of the paper's tables in {where}: reproduce.py run", *out]))
    last = [f"Nothing is finished for: {'; '.join(left)}."] if left else []
    texts = {"report.md": as_markdown(parts, last), "report.csv": as_table(parts), "report.html": as_html(parts, last)}
    pictures = {name: png for part in parts for name, png in part.files.items()}
    for name, content in [*pictures.items(), *((name, text.encode()) for name, text in texts.items())]:
        save(options.out / name, content)
    print(f"written to {options.out}: {', '.join(texts)}")
    return 0


def paper_part(table: Table, scale: Scale, runs: Path, results: Path) -> tuple[Part | None, list[str]]:
    """What was run for a table at one scale, None where nothing is finished; and why other runs do not count."""
    members, left = gather(table, scale, runs, results)
    recipes = sorted({table.runs[run_id][scale].recipe for run_id in members})
    words = [f"**Proxy**: {', '.join(recipes)} instead of the paper's setting."] if scale == "proxy" else []
    words += [table.notes] if table.notes else []
    missing = sorted({cell.run for cell in table.cells if cell.run is not None and cell.run not in members})
    words += [f"Not run: {', '.join(missing)}."] if missing else []
    words += [f"Left out: {'; '.join(left)}."] if left else []
    words += [*differing_in_pairs(members, table.baselines), *unknown_processors(members)]
    words += sorted({f"Not run, {cell.column}: {cell.why}" for cell in table.cells if cell.run is None})
    found = numbers(table, scale, members) if members else []
    pictures = pictures_of(table, members)
    if not found and not pictures:
        return None, left
    for recipe in recipes if found else []:
        proxy = "proxy " if scale == "proxy" else ""
        of = {run_id: runs for run_id, runs in members.items() if table.runs[run_id][scale].recipe == recipe}
        pictures |= {f"{title}, {proxy}{recipe}": png for title, png in curves(of).items()}
    made = {**grids(table, scale, found), **attention(members)}
    return Part(table, scale, words, found, made, members, pictures), left


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


def curves(members: Members) -> dict[str, bytes]:
    """compare.py's figure of each network, all numbers of steps in one; none where the runs have none in common."""
    every = [run for runs in members.values() for run in runs.values()]
    try:
        (measure,) = {measure_of(run) for run in every}
        roles = common_roles(every, measure)
    except ValueError:  # several measures, or no role in common
        return {}
    compared = Comparison(measure, [Group(runs, {}, run_id) for run_id, runs in members.items()], roles)
    drawn = {}
    for of in [[role] for role in roles] if compared.has_best else [roles]:
        png = io.BytesIO()
        figure_of(replace(compared, roles=of)).savefig(png, dpi=120, format="png")
        drawn[f"Curves, {', '.join(of)}"] = png.getvalue()
    return drawn


def pictures_of(table: Table, members: Members) -> dict[str, bytes]:
    """Of the first run of each id what the table shows of it, and the similarity maps that visualize.py left."""
    found = {}
    for run_id, runs in members.items():
        run = next(iter(runs.values()))
        shown = [run.path / cell.show for cell in table.cells if cell.run == run_id and cell.show]
        maps = sorted([*run.path.glob("figures/maps*.png"), *run.path.glob("**/similarity-*.png")])
        for file in dict.fromkeys([*shown, *maps]):
            if file.is_file():
                found[f"{run_id}, seed {run.seed}: {file.relative_to(run.path)}"] = small(file)
    return found


def small(file: Path) -> bytes:
    """A picture as PNG, no wider than a page shows it."""
    from PIL import Image

    with Image.open(file) as image:
        picture = image.convert("RGB")
        picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS, reducing_gap=None)
        out = io.BytesIO()
        picture.save(out, "PNG", optimize=True)
    return out.getvalue()


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
    write([*head.split(), "ours_less_paper"])
    for of, one in ((part, number) for part in parts for number in part.numbers):
        cell, metric = one.cell, one.cell.metric
        paper = [metric.name, metric.unit, metric.higher_is_better, of.scale, cell.paper, cell.label]
        ours = [one.measure, *mean_std(one.by_seed.values()), len(one.by_seed), one.difference]
        write([of.table.label, cell.row, one.column, *paper, *ours])
    return out.getvalue()


def as_markdown(parts: Sequence[Part], last: Sequence[str]) -> str:
    """The report, its pictures as files beside it. ``last``: words at its end."""
    text = [f"# The paper's tables and ours\n\n{INTRODUCTION}\n"]
    for part in parts:
        text.append(f"## {plain(part.title)}\n")
        text += [f"{plain(word, bold=True)}\n" for word in part.words]
        for caption, grid in part.grids.items():
            cells = [[plain(cell) for cell in row] for row in grid]
            text.append(f"{plain(caption)}:\n\n{markdown(cells, aligned=True)}\n")
        text += [f"![{plain(caption)}]({file})\n" for caption, file in zip(part.pictures, part.files, strict=True)]
        text.append("".join(f"- {plain(told)}\n" for told in environments(part.members)))
        told = "\n".join(commands(part.members))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", told)), default=0))
        text.append(f"{fence}bash\n{told}\n{fence}\n")
    return "\n".join([*text, *(f"{plain(word)}\n" for word in last)])


def plain(text: str, *, bold: bool = False) -> str:
    """A line of Markdown that shows a text as it is. ``bold``: but what stands between double asterisks."""
    line = re.sub(r"[\\`*<|\[\]&~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"^(\d*)(?=(?:[#+.)-]|#+) |>|[=-]+$)", r"\1\\", line)  # what begins a heading, a list or a quotation
    return re.sub(r"\\\*\\\*(.+?)\\\*\\\*", r"**\1**", line) if bold else line


def as_html(parts: Sequence[Part], last: Sequence[str]) -> str:
    """One page that needs nothing else: style, script and pictures are in it. ``last``: words at its end."""
    from jinja2 import Environment
    from markupsafe import Markup, escape

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["bold"] = lambda text: Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text))))
    page.filters["base64"] = lambda png: base64.b64encode(png).decode()
    page.globals |= {"introduction": INTRODUCTION, "environments": environments, "commands": commands}
    return page.from_string(Path(__file__).with_suffix(".html").read_text()).render(parts=parts, last=last)


def save(file: Path, content: bytes) -> None:
    """Raises: InputError where its folder cannot be made, TrainingError where it cannot be written."""
    make_folder(file.parent)
    write_atomically(file, lambda temporary: temporary.write_bytes(content))
