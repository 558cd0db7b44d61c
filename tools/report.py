"""Reports what was run for the paper's tables beside the paper's numbers: Markdown, CSV and a page of its own.

    python tools/reproduce.py report                            # runs/reproduce and what results/ keeps
    python tools/reproduce.py report results/methods_32 --baseline dml --out runs/report
    python tools/reproduce.py report --document                 # docs/results.md from results/ alone

A run of the small setting is a proxy and called so: other data, networks and durations than the paper's, so that its
difference from the paper says nothing of the paper; what the methods differ by may be compared. Needs no torch.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

from tools import compare
from tools.compare import Group, LineParser, Run, WrongInput
from tools.document import numbered, render
from tools.tables import PAPER, Cell, Metric, Row, Scale, Table, TableError, load_tables

ROOT = Path(__file__).resolve().parents[1]
read_run = cache(compare.read_run)  # a run may stand in several tables
WIDTH = 1000  # pixels of an embedded picture, at most
INTRODUCTION = (
    "Ours are means ± sample standard deviations over seeds (their number in parentheses), of the last evaluation. "
    "A **proxy** is a small stand-in with other data, networks and durations than the paper's: its difference from the "
    "paper says nothing of how well the paper is reproduced."
)


@dataclass(frozen=True)
class Line:
    """A number of ours, with the paper's where there is one. ``scale``: "" outside the paper's tables."""

    part: str
    row: str
    column: str
    metric: Metric
    scale: str
    by_seed: Mapping[int, float]
    paper: float | None = None
    paper_std: float | None = None
    label: str | None = None

    @property
    def what(self) -> str:
        return f"{self.row}, {self.column}"

    @property
    def measure(self) -> str:
        """What ours is: a proxy's may be another measure than the paper's."""
        return (self.metric.proxy if self.scale == "proxy" else None) or self.metric.name

    @property
    def mean(self) -> float | None:
        return fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def std(self) -> float | None:
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where both are the same measure."""
        same = self.measure == self.metric.name
        return self.mean - self.paper if same and self.mean is not None and self.paper is not None else None


@dataclass(frozen=True)
class Grid:
    """A table as text, its first row the head."""

    caption: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Part:
    """A table of the paper at one scale, or a folder of runs."""

    name: str
    title: str
    words: Sequence[str]
    lines: Sequence[Line]
    grids: Sequence[Grid]
    groups: Sequence[Group]
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # PNG by caption


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: WrongInput, TableError."""
    options = make_parser().parse_args(argv)
    if options.baseline is not None and not options.folders:
        raise WrongInput("--baseline is one of the folders' runs, and no folder is named")
    read_run.cache_clear()
    if options.document is not None:
        _write(Path(options.document), render(Path(options.results)))
        print(f"written: {options.document}")
        return 0
    tables, place = load_tables(Path(options.tables)), (Path(options.runs), Path(options.results))
    parts: list[Part] = []
    left: list[str] = []
    for table in tables.values():
        found = [paper_part(table, scale, *place) for scale in get_args(Scale)]
        parts += [part for part in found if part is not None]
        if not any(found):
            why = [reason for scale in get_args(Scale) for reason in gather(table, scale, *place)[1]]
            left.append(f"{table.label} ({', '.join([table.title, *why])})")
    parts += [folder_part(folder, runs, options.baseline) for folder, runs in run_folders(options.folders).items()]
    if not parts:
        raise WrongInput(f"no run of the paper's tables in {options.runs} or {options.results}: name folders of runs")
    _save(parts, left, Path(options.out))
    print(f"written to {options.out}: report.md, report.csv, report.html")
    return 0


def make_parser() -> argparse.ArgumentParser:
    first = (__doc__ or "").split("\n")[0]
    parser = LineParser(prog="reproduce.py report", description=first, allow_abbrev=False)
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="besides the paper's tables: run folders, or folders of them")
    add(
        "--runs",
        default="runs/reproduce",
        metavar="FOLDER",
        help="where reproduce.py run has put its runs; %(default)s",
    )
    add("--results", default=str(ROOT / "results"), metavar="FOLDER", help="kept results; those of the repository")
    add("--out", default="runs/reproduce/report", metavar="FOLDER", help="where the report goes; %(default)s")
    add("--baseline", metavar="METHOD", help="of the folders named: differences from it, paired by seed")
    add("--tables", default=str(PAPER), metavar="FOLDER", help="the tables as data; tools/paper")
    add(
        "--document", nargs="?", const=str(ROOT / "docs/results.md"), metavar="FILE",
        help="write docs/results.md, or FILE, from the kept results, and nothing else",
    )  # fmt: skip
    return parser


# --- the paper's tables -----------------------------------------------------------------------------------------------


def find_runs(table: Table, run_id: str, scale: Scale, runs: Path, results: Path) -> tuple[dict[int, Run], list[str]]:
    """By seed the finished runs behind a run of a table; and why others do not count.

    From ``runs``, else from ``results``: from ``reproduce`` there, laid out like ``runs``, or where the table says.
    """
    if scale not in table.runs[run_id].settings:
        return {}, []
    setting = table.setting(run_id, scale)
    found: dict[int, Run] = {}
    left: dict[int, str] = {}
    for stem in (setting.stem(scale, runs), *setting.kept_stems(scale, results)):
        for seed, folder in numbered(stem).items():
            try:
                run = read_run(folder)
            except WrongInput as error:
                left[seed] = str(error)
                continue
            if run.finished:
                found.setdefault(seed, run)
            else:
                left[seed] = f"{folder} is not finished"
    return dict(sorted(found.items())), [why for seed, why in left.items() if seed not in found]


def paper_lines(table: Table, scale: Scale, members: Mapping[str, Mapping[int, Run]]) -> list[Line]:
    """Every cell of a table that has a number. ``members``: the finished runs by id and seed."""
    lines = []
    for row, cell in table.cells():
        values = {seed: table.value(cell, run.path) for seed, run in members.get(cell.run or "", {}).items()}
        by_seed = {seed: value for seed, value in values.items() if value is not None}
        if cell.show is None and (cell.paper is not None or by_seed):
            numbers = (by_seed, cell.paper, cell.paper_std, cell.label)
            lines.append(Line(table.label, row.name, column_of(table, row, cell), cell.metric, scale, *numbers))
    return lines


def column_of(table: Table, row: Row, cell: Cell) -> str:
    """Its column, with its measure where that is neither the table's nor told by row or column."""
    own = cell.metric.name not in (table.metric.name, row.name) and cell.metric.name not in cell.column
    return f"{cell.column}, {cell.metric.name}" if own else cell.column


def gains(table: Table, lines: Sequence[Line]) -> list[list[str]]:
    """What each run of ours adds to its baseline: what, baseline, the paper's difference, ours paired by seed."""
    found = []
    known = {(line.row, line.column): line.by_seed for line in lines}
    for row, cell in table.cells():
        baseline = table.baseline(row, cell)
        if baseline is None:
            continue
        other_row, other = baseline
        ours = known.get((row.name, column_of(table, row, cell)), {})
        theirs = known.get((other_row.name, column_of(table, other_row, other)), {})
        pairs = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
        if pairs:
            both = cell.paper is not None and other.paper is not None
            paper = f"{cell.paper - other.paper:+.2f}" if both else ""  # type: ignore[operator]
            to = other_row.name if other.column == cell.column else other.column
            lower = "" if cell.metric.higher_is_better else " (lower is better)"
            found.append([f"{row.name}, {column_of(table, row, cell)}{lower}", to, paper, _interval(pairs)])
    return found


def gather(table: Table, scale: Scale, runs: Path, results: Path) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """The finished runs of a table by id and seed, as ``find_runs`` finds them; and why others do not count."""
    looked = {run_id: find_runs(table, run_id, scale, runs, results) for run_id in table.runs}
    members = {run_id: found for run_id, (found, _) in looked.items() if found}
    return members, list(dict.fromkeys(why for _, left in looked.values() for why in left))


def paper_grids(table: Table, scale: Scale, lines: Sequence[Line]) -> list[Grid]:
    """The paper's numbers and ours, and what each run adds to its baseline, in both."""
    if not lines:
        return []
    ours = "ours (proxy)" if scale == "proxy" else "ours"
    head = ["row, column", "paper", ours, "proxy less paper" if scale == "proxy" else "difference"]
    unit = f" ({table.metric.unit})" if table.metric.unit else ""
    caption = f"{table.label}: {table.metric.name}{unit}{'' if table.metric.higher_is_better else ', lower is better'}"
    others = {f"{line.measure} for {line.metric.name}": 0 for line in lines if line.measure != line.metric.name}
    proxies = f"; the proxy: {', '.join(others)}" if others else ""
    grids = [Grid(caption + proxies, [head, *_rows(lines)])]
    if rows := gains(table, lines):
        caption = f"What it adds, paired by seed with a 95 % t interval, not corrected for {len(rows)} comparisons"
        grids.append(Grid(caption + proxies, [["row, column", "added to", "paper", ours], *rows]))
    return grids


def paper_part(table: Table, scale: Scale, runs: Path, results: Path) -> Part | None:
    """What was run for a table at one scale; None where nothing is finished."""
    members, left = gather(table, scale, runs, results)
    if not members:
        return None
    lines = paper_lines(table, scale, members)
    grids = paper_grids(table, scale, lines)
    recipes = sorted({table.setting(run_id, scale).recipe for run_id in members})
    words = [f"**Proxy**: {', '.join(recipes)} instead of the paper's setting."] if scale == "proxy" else []
    words += [table.notes] if table.notes else []
    missing = sorted({cell.run for _, cell in table.cells() if cell.run is not None and cell.run not in members})
    words += [f"Not run: {', '.join(missing)}."] if missing else []
    words += [f"Left out: {'; '.join(left)}."] if left else []
    words += sorted({f"Not run, {cell.column}: {cell.why}" for _, cell in table.cells() if cell.run is None})
    groups = [Group(found, next(iter(found.values())).config, run_id) for run_id, found in members.items()]
    shown = {group.label: [c.show for _, c in table.cells() if c.run == group.label and c.show] for group in groups}
    pictures = pictures_of(groups, shown)
    if not lines and not pictures:
        return None
    for recipe in recipes if lines else []:
        of = [group for group in groups if table.setting(group.label, scale).recipe == recipe]
        proxy = "proxy " if scale == "proxy" else ""
        pictures |= {f"{title}, {proxy}{recipe}": png for title, png in curves(of).items()}
    title = f"{table.label}, {'proxy' if scale == 'proxy' else 'the setting of the paper'}: {table.title}"
    return Part(f"{table.name} {scale}", title, words, lines, [*grids, *attention(groups)], groups, pictures)


def _rows(lines: Sequence[Line]) -> list[list[str]]:
    """What, the paper's, ours, difference; numbers of one measure with as many digits as the paper's longest."""
    printed: dict[Metric, int] = {}
    for line in lines:
        length = 0 if line.paper is None else len(f"{line.paper:g}".partition(".")[2])
        printed[line.metric] = max(length, printed.get(line.metric, 0))
    rows = []
    for line in lines:
        digits = max(2, printed[line.metric])
        paper = "" if line.paper is None else f"{line.paper:.{printed[line.metric]}f}"
        paper += f" ± {line.paper_std:g}" if line.paper_std else ""
        std = "" if line.std is None else f" ± {line.std:.{digits}f}"
        ours = "not run" if line.mean is None else f"{line.mean:.{digits}f}{std} ({len(line.by_seed)})"
        difference = "" if line.difference is None else f"{line.difference:+.{digits}f}"
        rows.append([line.what, f"{paper} {line.label or ''}".strip(), ours, difference])
    return rows


def _interval(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.2f} (one seed)"
    low, high = compare.interval(values)
    return f"{fmean(values):+.2f} ({low:+.2f} to {high:+.2f})"


# --- folders of runs --------------------------------------------------------------------------------------------------


def run_folders(folders: Sequence[str]) -> dict[Path, list[Path]]:
    """The run folders among ``folders`` and directly in them, by the folder that they lie in. Raises: WrongInput."""
    found: dict[Path, list[Path]] = {}
    for folder in map(Path, folders):
        runs = (
            [folder] if (folder / "config.yaml").is_file() else sorted(f.parent for f in folder.glob("*/config.yaml"))
        )
        if not runs:
            raise WrongInput(f"{folder} is no run folder and holds none (no config.yaml)")
        found.setdefault(runs[0].parent, []).extend(runs)
    return found


def folder_part(folder: Path, paths: Sequence[Path], baseline: str | None) -> Part:
    """The finished runs of a folder, as compare.py groups them. Raises: WrongInput."""
    read = [read_run(path) for path in dict.fromkeys(paths)]
    runs = [run for run in read if run.finished]
    if not runs:
        raise WrongInput(f"no run in {folder} is finished")
    words = ["Runs outside the paper's tables: no number of the paper stands beside them."]
    words += [f"Not finished: {', '.join(str(run.path) for run in read if not run.finished)}."] if read != runs else []
    lines: list[Line] = []
    grids: list[Grid] = []
    pictures: dict[str, bytes] = {}
    everything = compare.make_groups(runs)
    if baseline is not None:
        compare.find_baselines(everything, baseline)
    for groups in alike(everything):
        roles, measure = compare.common_roles(_runs(groups)), groups[0].measure
        unit = "%" if measure in compare.PERCENT else ""
        metric = Metric(compare.named(measure), unit, not compare.lower_is_better(measure))
        of = ((group, role, which) for group in groups for role in roles for which in ("last", "best"))
        found = [(group.label, f"{role} {which}", group.scores(role, which)) for group, role, which in of]
        own = [Line(str(folder), row, column, metric, "", scores) for row, column, scores in found if scores]
        grids.append(
            Grid(
                f"{metric.name} {unit}".strip(),
                [["group, role", "ours"], *([what, ours] for what, _, ours, _ in _rows(own))],
            )
        )
        lines += own
        if baseline is not None and any(baseline in (group.label, group.config.get("method")) for group in groups):
            told = compare.difference_rows(compare.differences_from(baseline, groups, roles))[1:]
            rows = [[f"{group}, {role}", f"{mean} ({span})", n] for group, role, n, mean, span, _ in told]
            caption = f"Difference from {baseline}, paired by seed, 95 % t interval, not corrected for {len(rows)}"
            grids.append(Grid(f"{caption} comparisons", [["group, role", "difference", "n"], *rows]))
        pictures |= curves(groups)
    title, grids = f"{folder}{_heading(folder)}", [*grids, *attention(everything)]
    return Part(str(folder), title, words, lines, grids, everything, {**pictures, **pictures_of(everything, {})})


def alike(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in sets that have a network in common by one measure."""
    sets: list[list[Group]] = []
    for group in groups:
        for members in sets:
            try:
                compare.common_roles(_runs([*members, group]))
            except WrongInput:
                continue
            members.append(group)
            break
        else:
            sets.append([group])
    return sets


def _runs(groups: Sequence[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs.values()]


def _heading(folder: Path) -> str:
    """What the folder's notes call it."""
    notes = folder / "notes.md"
    return f": {notes.read_text().partition(chr(10))[0].lstrip('# ')}" if notes.is_file() else ""


# --- what stands beside the numbers -----------------------------------------------------------------------------------


def attention(groups: Sequence[Group]) -> list[Grid]:
    """Both attention weights within an image, as in Table 17, and the mean similarity S: at the end, over seeds."""
    rows = []
    for group in groups:
        means: dict[str, float] = {}
        for name in {key for run in group.runs.values() for key in run.last if key.startswith("attention/")}:
            values = [run.last[name] for run in group.runs.values() if run.last.get(name) is not None]
            means |= {name.removeprefix("attention/"): fmean(values)} if values else {}
        told = [
            f"{means[f'{kind}_min']:.3f} .. {means[f'{kind}_max']:.3f} ({means[f'{kind}_variance']:.4f})"
            if f"{kind}_min" in means
            else ""
            for kind in ("consensus", "divergence")
        ]
        if means:
            rows.append([group.label, *told, f"{means['similarity']:.3f}" if "similarity" in means else ""])
    caption = "Attention at the end, means over seeds: minimum .. maximum (variance) within an image"
    grids = [Grid(caption, [["run", "consensus", "divergence", "S"], *rows])] if rows else []
    if rounds := [row for group in groups for row in _rounds(group)]:
        caption = (
            "Last log point of each round, means over seeds: S, its extremes, the attention's deviation within an image"
        )
        grids.append(Grid(caption, [["run, round", "S", "extremes", "deviation"], *rounds]))
    return grids


def _rounds(group: Group) -> Iterator[list[str]]:
    """The similarity of student and teacher in the rounds of a chain of diffusion models."""
    keys = ("similarity", "similarity_min", "similarity_max", "attention_std")
    logs = [file for run in group.runs.values() for file in run.path.glob("round-*/metrics.jsonl")]
    for name in sorted({file.parent.name for file in logs}, reverse=True):
        last = [json.loads(file.read_text().splitlines()[-1]) for file in logs if file.parent.name == name]
        if all(f"adm/{key}" in line for line in last for key in keys):
            mean, low, high, deviation = (fmean(line[f"adm/{key}"] for line in last) for key in keys)
            yield [f"{group.label}, {name}", f"{mean:.3f}", f"{low:.3f} .. {high:.3f}", f"{deviation:.4f}"]


def curves(groups: Sequence[Group]) -> dict[str, bytes]:
    """compare.py's figure of each network, all numbers of steps in one; none where the groups have none in common."""
    try:
        roles = compare.common_roles(_runs(groups))
    except WrongInput:
        return {}
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        for of in [[role] for role in roles] if compare.has_best(groups) else [roles]:
            compare.draw(groups, of, Path(folder) / "curves.png")
            drawn[f"Curves, {', '.join(of)}"] = (Path(folder) / "curves.png").read_bytes()
    return drawn


def pictures_of(groups: Sequence[Group], shown: Mapping[str, Sequence[str | None]]) -> dict[str, bytes]:
    """Of each group's first run the similarity maps that visualize.py left, and what ``shown`` names."""
    found = {}
    for group in groups:
        run = next(iter(group.runs.values()))
        named = [run.path / name for name in shown.get(group.label, ()) if name]
        maps = sorted([*run.path.glob("figures/maps*.png"), *run.path.glob("**/similarity-*.png")])
        for file in dict.fromkeys([*named, *maps]):
            if file.is_file():
                found[f"{group.label}, seed {run.seed}: {file.relative_to(run.path)}"] = small(file)
    return found


def small(file: Path) -> bytes:
    """A picture as PNG, no wider than a page shows it."""
    from PIL import Image

    with Image.open(file) as image:
        picture = image.convert("RGB")
        if picture.width > WIDTH:
            picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def environments(groups: Sequence[Group]) -> list[str]:
    """On what, with what and from which commit the runs ran."""
    found: Counter[str] = Counter()
    for start in (start for group in groups for start, _ in _starts(group)):
        commit = f"commit {(start.get('commit') or 'unknown')[:10]}{'*' if start.get('uncommitted_changes') else ''}"
        torch = start.get("versions", {}).get("torch", "?")
        versions = f"torch {torch}, Python {start.get('python', '?')}"
        found[f"{commit}, {versions}, {start.get('device_name', '?')}, {start.get('threads', '?')} threads"] += 1
    return [f"{told}: {count} run{'s' if count > 1 else ''}" for told, count in found.items()]


def commands(groups: Sequence[Group]) -> list[str]:
    """The command of each group's first run, with the seeds of all."""
    told = []
    for group in groups:
        start = next(_starts(group), (None, None))[0]
        if start is not None and start.get("command"):
            seeds = ", ".join(map(str, group.runs))
            also = ", in paths too" if len(group.runs) > 1 else ""
            told.append(f"{shlex.join(['python', *start['command']])}  # seeds: {seeds}{also}")
    return told


def _starts(group: Group) -> Iterator[tuple[dict, Run]]:
    for run in group.runs.values():
        file = run.path / "environment.json"
        if file.is_file() and (starts := json.loads(file.read_text()).get("starts")):
            yield starts[-1], run


# --- writing ----------------------------------------------------------------------------------------------------------


def as_csv(parts: Sequence[Part]) -> str:
    """One line a number, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "part row column metric unit higher_is_better scale paper paper_std paper_label"
    writer.writerow([*head.split(), "ours_is", "ours_mean", "ours_std", "n", "ours_less_paper"])
    for line in (line for part in parts for line in part.lines):
        m = line.metric
        paper = [line.paper, line.paper_std, line.label]
        ours = [line.measure, line.mean, line.std, len(line.by_seed), line.difference]
        writer.writerow(
            [line.part, line.row, line.column, m.name, m.unit, m.higher_is_better, line.scale, *paper, *ours]
        )
    return out.getvalue()


def as_markdown(parts: Sequence[Part], left: Sequence[str]) -> str:
    """The report, its pictures as files beside it."""
    text = [f"# The paper's tables and ours\n\n{INTRODUCTION}\n"]
    for part in parts:
        text.append(f"## {part.title}\n")
        text += [f"{word}\n" for word in part.words]
        text += [f"{grid.caption}:\n\n{compare.table(grid.rows)}\n" for grid in part.grids]
        text += [f"![{caption}]({_file(part, n)})\n" for n, caption in enumerate(part.pictures)]
        text.append("".join(f"- {told}\n" for told in environments(part.groups)))
        text.append("```bash\n" + "\n".join(commands(part.groups)) + "\n```\n")
    return "\n".join([*text, *_not_run(left)])


def _not_run(left: Sequence[str]) -> list[str]:
    return [f"Nothing is finished for: {'; '.join(left)}.\n"] if left else []


def _file(part: Part, number: int) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', part.name.lower()).strip('-')}-{number}.png"


def as_html(parts: Sequence[Part], left: Sequence[str]) -> str:
    """One page that needs nothing else: style, script and pictures are in it."""
    body = ["<h1>The paper's tables and ours</h1>", _paragraph(INTRODUCTION), "<nav>"]
    body += [f'<a href="#{n}">{html.escape(part.title.partition(":")[0])}</a>' for n, part in enumerate(parts)]
    body.append("</nav>")
    for n, part in enumerate(parts):
        body.append(f'<h2 id="{n}">{html.escape(part.title)}</h2>')
        body += map(_paragraph, part.words)
        body += map(_table, part.grids)
        for caption, png in part.pictures.items():
            data = base64.b64encode(png).decode()
            told = html.escape(caption, quote=True)
            body.append(
                f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'
            )
        body.append("<details><summary>Environment and commands</summary><ul>")
        body += [f"<li>{html.escape(told)}</li>" for told in environments(part.groups)]
        body.append("</ul><ul>")
        body += [f"<li><code>{html.escape(told)}</code></li>" for told in commands(part.groups)]
        body.append("</ul></details>")
    body += map(_paragraph, _not_run(left))
    return Path(__file__).with_suffix(".html").read_text().replace("<!-- body -->", "\n".join(body))


def _paragraph(text: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return f"<p>{bold}</p>"


def _table(grid: Grid) -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(cell)}</button></th>' for cell in grid.rows[0])
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>\n" for row in grid.rows[1:])
    caption = f"<caption>{html.escape(grid.caption)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"


def _save(parts: Sequence[Part], left: Sequence[str], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(f"cannot make the folder {out}: {error.strerror}") from error
    for part in parts:
        for n, png in enumerate(part.pictures.values()):
            (out / _file(part, n)).write_bytes(png)
    _write(out / "report.md", as_markdown(parts, left))
    _write(out / "report.csv", as_csv(parts))
    _write(out / "report.html", as_html(parts, left))


def _write(file: Path, text: str) -> None:
    try:
        compare.write(file, text)
    except OSError as error:
        raise WrongInput(f"cannot write {file}: {error.strerror}") from error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (WrongInput, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
