"""Reports what was run for the paper's tables beside the paper's numbers: Markdown, CSV and a page of its own.

    python tools/reproduce.py report                            # runs/reproduce and what results/ keeps
    python tools/reproduce.py report --document                 # docs/results.md from results/ alone

A run of the small setting is a proxy and called so: other data, networks and durations than the paper's, so that its
difference from the paper says nothing of the paper; what the methods differ by may be compared. Needs no torch.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from core.errors import InputError
from core.files import write_atomically
from core.training.command import LineParser, run_command
from tools.curves import figure_of
from tools.groups import Comparison, Group, common_roles, measure_of
from tools.ours import Captioned, Number, gather, grids, numbers
from tools.paper import ROOT, SCALES, Scale, Table
from tools.paper_files import PAPER, load_tables
from tools.runs import make_folder
from tools.stats import as_csv, markdown, mean_std

WIDTH = 1000  # pixels of an embedded picture, at most
INTRODUCTION = (
    "Ours are means ± sample standard deviations over seeds (their number in parentheses), of the last evaluation. "
    "A **proxy** is a small stand-in with other data, networks and durations than the paper's: its difference from the "
    "paper says nothing of how well the paper is reproduced."
)


@dataclass(frozen=True)
class Part:
    """What was run for a table of the paper at one scale. ``pictures``: PNG by caption."""

    name: str
    title: str
    words: Sequence[str]
    numbers: Sequence[Number]
    grids: Sequence[Captioned]
    groups: Sequence[Group]
    pictures: Mapping[str, bytes]

    @property
    def files(self) -> dict[str, bytes]:
        """The pictures by the names that they have beside the report."""
        return {f"{self.name.replace(' ', '-')}-{n}.png": png for n, png in enumerate(self.pictures.values())}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError."""
    options = make_parser().parse_args(argv)
    results = Path(options.results)
    if options.document is not None:
        from tools.document import render

        save(Path(options.document), render(results))
        print(f"written: {options.document}")
        return 0
    parts: list[Part] = []
    left: list[str] = []
    for table in load_tables(Path(options.tables)).values():
        found = [paper_part(table, scale, Path(options.runs), results) for scale in SCALES]
        parts += [part for part, _ in found if part is not None]
        if not any(part for part, _ in found):
            left.append(
                f"{table.label} ({', '.join([table.title, *(why for _, reasons in found for why in reasons)])})"
            )
    if not parts:
        raise InputError(f"no run of the paper's tables in {options.runs} or {options.results}: reproduce.py run")
    out = Path(options.out)
    for name, png in (item for part in parts for item in part.files.items()):
        save(out / name, png)
    save(out / "report.md", as_markdown(parts, left))
    save(out / "report.csv", as_table(parts))
    save(out / "report.html", as_html(parts, left))
    print(f"written to {options.out}: report.md, report.csv, report.html")
    return 0


def make_parser() -> argparse.ArgumentParser:
    first = (__doc__ or "").split("\n")[0]
    parser = LineParser(prog="reproduce.py report", description=first, allow_abbrev=False)
    add = parser.add_argument
    runs = "where reproduce.py run has put its runs; %(default)s"
    add("--runs", default="runs/reproduce", metavar="FOLDER", help=runs)
    add("--results", default=str(ROOT / "results"), metavar="FOLDER", help="kept results; those of the repository")
    add("--out", default="runs/reproduce/report", metavar="FOLDER", help="where the report goes; %(default)s")
    add("--tables", default=str(PAPER), metavar="FOLDER", help="the tables as data; tools/paper")
    add(
        "--document", nargs="?", const=str(ROOT / "docs/results.md"), metavar="FILE",
        help="write docs/results.md, or FILE, from the kept results, and nothing else",
    )  # fmt: skip
    return parser


def paper_part(table: Table, scale: Scale, runs: Path, results: Path) -> tuple[Part | None, list[str]]:
    """What was run for a table at one scale, None where nothing is finished; and why other runs do not count."""
    members, left = gather(table, scale, runs, results)
    recipes = sorted({table.setting(run_id, scale).recipe for run_id in members})
    words = [f"**Proxy**: {', '.join(recipes)} instead of the paper's setting."] if scale == "proxy" else []
    words += [table.notes] if table.notes else []
    missing = sorted({cell.run for _, cell in table.cells() if cell.run is not None and cell.run not in members})
    words += [f"Not run: {', '.join(missing)}."] if missing else []
    words += [f"Left out: {'; '.join(left)}."] if left else []
    words += sorted({f"Not run, {cell.column}: {cell.why}" for _, cell in table.cells() if cell.run is None})
    found = numbers(table, scale, members) if members else []
    groups = [Group(of, next(iter(of.values())).config, "", run_id) for run_id, of in members.items()]
    shown = {group.label: [c.show for _, c in table.cells() if c.run == group.label and c.show] for group in groups}
    pictures = pictures_of(groups, shown)
    if not found and not pictures:
        return None, left
    for recipe in recipes if found else []:
        of = [group for group in groups if table.setting(group.label, scale).recipe == recipe]
        proxy = "proxy " if scale == "proxy" else ""
        pictures |= {f"{title}, {proxy}{recipe}": png for title, png in curves(of).items()}
    title = f"{table.label}, {'proxy' if scale == 'proxy' else 'the setting of the paper'}: {table.title}"
    made = [*grids(table, scale, found), *attention(groups)]
    return Part(f"{table.name} {scale}", title, words, found, made, groups, pictures), left


# --- what stands beside the numbers -----------------------------------------------------------------------------------


def attention(groups: Sequence[Group]) -> list[Captioned]:
    """Both attention weights within an image, as in Table 17, and the mean similarity S: at the end, over seeds."""
    rows = []
    for group in groups:

        def mean(name: str, group: Group = group) -> float | None:
            found = (run.number(f"last.attention/{name}") for run in group.runs.values())
            return mean_std(value for value in found if value is not None)[0]

        told = []
        for kind in ("consensus", "divergence"):
            low, high, variance = (mean(f"{kind}_{what}") for what in ("min", "max", "variance"))
            told.append("" if low is None else f"{low:.3f} .. {high:.3f} ({variance:.4f})")
        similarity = mean("similarity")
        told.append("" if similarity is None else f"{similarity:.3f}")
        if any(told):
            rows.append([group.label, *told])
    caption = "Attention at the end, means over seeds: minimum .. maximum (variance) within an image"
    made = [Captioned(caption, [["run", "consensus", "divergence", "S"], *rows])] if rows else []
    if rounds := [row for group in groups for row in _rounds(group)]:
        caption = (
            "Last log point of each round, means over seeds: S, its extremes, the attention's deviation within an image"
        )
        made.append(Captioned(caption, [["run, round", "S", "extremes", "deviation"], *rounds]))
    return made


def _rounds(group: Group) -> Iterator[list[str]]:
    """The similarity of student and teacher in the rounds of a chain of diffusion models."""
    keys = ("similarity", "similarity_min", "similarity_max", "attention_std")
    chains = [run.files.get("rounds", {}) for run in group.runs.values()]
    for name in sorted({name for chain in chains for name in chain}, reverse=True):
        last = [chain[name].get("last", {}) for chain in chains if name in chain]
        if all(f"adm/{key}" in line for line in last for key in keys):
            mean, low, high, deviation = (fmean(line[f"adm/{key}"] for line in last) for key in keys)
            yield [f"{group.label}, {name}", f"{mean:.3f}", f"{low:.3f} .. {high:.3f}", f"{deviation:.4f}"]


def curves(groups: Sequence[Group]) -> dict[str, bytes]:
    """compare.py's figure of each network, all numbers of steps in one; none where the groups have none in common."""
    runs = [run for group in groups for run in group.runs.values()]
    try:
        (measure,) = {measure_of(run) for run in runs}
        roles = common_roles(runs, measure)
    except ValueError:  # several measures, or no role in common
        return {}
    groups = [Group(group.runs, group.config, measure, group.label) for group in groups]
    drawn = {}
    for of in [[role] for role in roles] if Comparison(groups, roles).has_best else [roles]:
        png = io.BytesIO()
        figure_of(Comparison(groups, of)).savefig(png, dpi=120, format="png")
        drawn[f"Curves, {', '.join(of)}"] = png.getvalue()
    return drawn


def pictures_of(groups: Sequence[Group], shown: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Of each group's first run the similarity maps that visualize.py left, and what ``shown`` names."""
    found = {}
    for group in groups:
        run = next(iter(group.runs.values()))
        maps = sorted([*run.path.glob("figures/maps*.png"), *run.path.glob("**/similarity-*.png")])
        for file in dict.fromkeys([*(run.path / name for name in shown[group.label]), *maps]):
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
    for start in (run.start for group in groups for run in group.runs.values() if run.start):
        commit = f"commit {(start.get('commit') or 'unknown')[:10]}{'*' if start.get('uncommitted_changes') else ''}"
        torch = start.get("versions", {}).get("torch", "?")
        versions = f"torch {torch}, Python {start.get('python', '?')}"
        found[f"{commit}, {versions}, {start.get('device_name', '?')}, {start.get('threads', '?')} threads"] += 1
    return [f"{told}: {count} run{'s' if count > 1 else ''}" for told, count in found.items()]


def commands(groups: Sequence[Group]) -> list[str]:
    """The command of each group's first run, with the seeds of all."""
    told = []
    for group in groups:
        start = next((run.start for run in group.runs.values() if run.start), {})
        if start.get("command"):
            seeds = ", ".join(map(str, group.runs))
            also = ", in paths too" if len(group.runs) > 1 else ""
            told.append(f"{shlex.join(['python', *start['command']])}  # seeds: {seeds}{also}")
    return told


# --- writing ----------------------------------------------------------------------------------------------------------


def as_table(parts: Sequence[Part]) -> str:
    """CSV, a line a number, in full precision."""
    head = "part row column metric unit higher_is_better scale paper paper_label ours_is ours_mean ours_std n"
    lines: list[list[object]] = [[*head.split(), "ours_less_paper"]]
    for one in (one for part in parts for one in part.numbers):
        paper = [one.metric.name, one.metric.unit, one.metric.higher_is_better, one.scale, one.paper, one.label]
        ours = [one.measure, *mean_std(one.by_seed.values()), len(one.by_seed), one.difference]
        lines.append([one.table, one.row, one.column, *paper, *ours])
    return as_csv(lines)


def as_markdown(parts: Sequence[Part], left: Sequence[str]) -> str:
    """The report, its pictures as files beside it."""
    text = [f"# The paper's tables and ours\n\n{INTRODUCTION}\n"]
    for part in parts:
        text.append(f"## {part.title}\n")
        text += [f"{word}\n" for word in part.words]
        text += [f"{one.caption}:\n\n{markdown(one.grid, aligned=True)}\n" for one in part.grids]
        text += [f"![{caption}]({file})\n" for caption, file in zip(part.pictures, part.files, strict=True)]
        text.append("".join(f"- {told}\n" for told in environments(part.groups)))
        text.append("```bash\n" + "\n".join(commands(part.groups)) + "\n```\n")
    return "\n".join([*text, *(f"{word}\n" for word in _not_run(left))])


def _not_run(left: Sequence[str]) -> list[str]:
    return [f"Nothing is finished for: {'; '.join(left)}."] if left else []


def as_html(parts: Sequence[Part], left: Sequence[str]) -> str:
    """One page that needs nothing else: style, script and pictures are in it."""
    from jinja2 import Environment
    from markupsafe import Markup, escape

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["bold"] = lambda text: Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text))))
    page.filters["base64"] = lambda png: base64.b64encode(png).decode()
    template = page.from_string(Path(__file__).with_suffix(".html").read_text())
    return template.render(
        introduction=INTRODUCTION, parts=parts, left=_not_run(left), environments=environments, commands=commands
    )


def save(file: Path, content: str | bytes) -> None:
    """Raises: InputError where its folder cannot be made, TrainingError where it cannot be written."""
    data = content.encode() if isinstance(content, str) else content
    make_folder(file.parent)
    write_atomically(file, lambda temporary: temporary.write_bytes(data))


if __name__ == "__main__":
    run_command(main)
