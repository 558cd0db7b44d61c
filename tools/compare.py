"""Compares runs: mean and spread over seeds, last and best apart, paired differences from a baseline, and curves.

    python tools/compare.py runs/dml-0 runs/dml-1 runs/dml+adm-0 runs/dml+adm-1 --baseline dml --out runs/compared
    python tools/compare.py results/methods_32 --baseline dml

Takes run folders, folders of them, and what `results/` keeps. Runs that differ in nothing but their seed make a group.
Prints the tables; `--out` also writes them (`compare.md`), all numbers (`compare.json`) and the curves (`compare.png`).
Of a diffusion run it takes what evaluate.py wrote beside it, a column for each number of sampling steps. Where the runs
come from different hardware, or from different commits, it says so.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.analysis.looks import method_looks
from core.errors import InputError
from core.files import make_folder, save_figure, save_json, write_atomically
from core.training.command import LineParser, run_command
from tools.groups import PERCENT, Comparison, Group, compare_runs, lower_is_better, method_of, named, score
from tools.hardware import differing_hardware, unknown_processors
from tools.runs import Run, read_runs
from tools.stats import Grid, markdown, mean_std, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError."""
    options = make_parser().parse_args(argv)
    given = read_runs(options.runs)
    runs = [run for run in given if run.finished or options.partial]
    left_out = [run for run in given if run not in runs]
    if not runs:
        names = ", ".join(str(run.path) for run in left_out)
        raise InputError(f"not one run is finished ({names}): --partial takes them as far as they are")
    compared = compare_runs(runs, options.measure, options.baseline)
    text = render(compared, left_out)
    print("\n".join(brief(compared)) if options.brief else text)
    if options.out is not None:
        folder = make_folder(Path(options.out))
        save_json(as_json(compared, left_out), folder / "compare.json")
        write_atomically(folder / "compare.md", lambda file: file.write_text(f"# Comparison\n\n{text}\n"))
        save_figure(figure_of(compared), folder / "compare.png")
        print(f"\nwritten to {folder}: compare.json, compare.md, compare.png")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="compare.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    option = parser.add_argument
    option("runs", nargs="+", metavar="RUN", help="run folders, folders of them, kept runs or experiments of results/")
    option("--baseline", help="a method, or a group's label: paired differences from it, at equal settings")
    option("--measure", help="what is compared, as top5 or IS; top1, mIoU or the FID unless given")
    option("--out", metavar="FOLDER", help="where to write compare.json, compare.md and compare.png")
    option("--brief", action="store_true", help="print a line for each group of its students, and not the tables")
    option("--partial", action="store_true", help="take unfinished runs too, as far as they are")
    return parser


def render(compared: Comparison, left_out: Sequence[Run]) -> str:
    """The tables and what must be known to read them, as Markdown that is legible as it is."""
    measure, percent = named(compared.measure), compared.measure in PERCENT
    better = ", lower is better" if lower_is_better(compared.measure) else ""
    what = f"{measure.replace('top', 'Top')}{' in percent' if percent else better}"
    parts = [f"{what}: mean ± sample standard deviation over seeds.", markdown(score_rows(compared), aligned=True)]
    if any(told.endswith(" on test") for group in compared.groups for told in group.chosen_by):
        parts.append("Best was chosen by test accuracy, which flatters it: read last.")
    if compared.versus:
        what = f"{'last ' if compared.has_best else ''}{measure} from {compared.baseline}"
        points = ", in points" if percent else better
        several = f", not corrected for {len(compared.versus)} comparisons" if len(compared.versus) > 1 else ""
        parts.append(f"Difference of the {what}{points}, paired by seed; t interval{several}.")
        parts.append(markdown(difference_rows(compared), aligned=True))
    unfinished = [run for run in compared.runs if not run.finished]
    if unfinished:
        told = ", ".join(f"{run.path} ({when(run.last)})" for run in unfinished)
        parts.append(f"Not finished, taken as far as they are: {told}.")
    if left_out:
        parts.append(f"Left out, not finished: {', '.join(str(run.path) for run in left_out)}.")
    if len({run.start.get("commit") for run in compared.runs}) > 1:
        parts.append("These runs come from different commits (see the environment of each).")
    groups = {group.label: group.runs for group in compared.groups}
    parts += [*differing_hardware(groups), *unknown_processors(groups)]
    return "\n\n".join(parts)


def brief(compared: Comparison) -> list[str]:
    """A line for each group: its students' last score, the difference from the baseline and what may be said of it."""
    roles = [role for role in compared.roles if role.startswith("student")] or compared.roles
    seeds = max(len(group.runs) for group in compared.groups)
    beside = f"; difference from {compared.baseline} (95 % interval)" if compared.baseline else ""
    lines = [f"Last {named(compared.measure)}, mean of {seeds} seed{'s' if seeds > 1 else ''}{beside}"]
    names = {group.label: group.label.replace(" adm.control=none", "") for group in compared.groups}
    width = max(map(len, names.values()))
    for role in roles:
        lines.append(f"{role}:")
        for group in compared.groups:
            mean, _ = mean_std(compared.scores(group, role).values())
            found = compared.versus.get((group.label, role))
            told = f"  {found.told()}  {found.verdict(str(compared.baseline))}" if found is not None else ""
            lines.append(f"  {names[group.label].ljust(width)}  {'-' if mean is None else f'{mean:.2f}'}{told}")
    return lines


def when(values: Mapping[str, Any]) -> str:
    """Where in its run an evaluation stands."""
    if "epoch" in values:
        return f"epoch {values['epoch']:g}"
    return f"iteration {values['step']}" if "step" in values else "not at its end"


def score_rows(compared: Comparison) -> Grid:
    """The table of scores, its head first: last and best apart, where there is a best."""
    measure, kinds = named(compared.measure), ("last", "best") if compared.has_best else ("last",)
    heads = [f"{role} {which if compared.has_best else measure}" for role in compared.roles for which in kinds]
    rows = [["group", "n", *heads, *(["best chosen by"] if compared.has_best else [])]]
    for group in compared.groups:
        cells = [spread(compared.scores(group, role, which).values()) for role in compared.roles for which in kinds]
        chosen = [", ".join(group.chosen_by)] if compared.has_best else []
        rows.append([group.label, str(len(group.runs)), *cells, *chosen])
    return rows


def difference_rows(compared: Comparison) -> Grid:
    """The table of differences, its head first."""
    rows = [["group", "role", "n", "difference", "95 % interval", "verdict"]]
    for place, found in compared.versus.items():
        mean = f"{found.mean:+.2f}" if found.mean is not None else "-"
        between = f"{found.interval[0]:+.2f} to {found.interval[1]:+.2f}" if found.interval is not None else "-"
        rows.append([*place, str(len(found.by_seed)), mean, between, found.verdict(str(compared.baseline))])
    return rows


def as_json(compared: Comparison, left_out: Sequence[Run]) -> dict[str, Any]:
    """Everything in full precision; a standard deviation of one run is null."""

    def described(values: Mapping[Any, float]) -> dict[str, Any]:
        mean, std = mean_std(values.values())
        return {"n": len(values), "mean": mean, "std": std, "by_seed": values}

    groups = []
    for group in compared.groups:
        runs = [
            {"path": str(run.path), "seed": seed, "finished": run.finished, "commit": run.start.get("commit")}
            for seed, run in group.runs.items()
        ]
        known = {"label": group.label, "config": group.config, "runs": runs, "best_chosen_by": group.chosen_by}
        scores = {
            role: {which: described(compared.scores(group, role, which)) for which in ("last", "best")}
            for role in compared.roles
        }
        groups.append({**known, compared.measure: scores})
    differences = [
        {"group": group, "role": role, "baseline": compared.baseline, "n": len(found.by_seed), **asdict(found),
         "verdict": found.verdict(str(compared.baseline))}
        for (group, role), found in compared.versus.items()
    ]  # fmt: skip
    left = [str(run.path) for run in left_out]
    return {"command": sys.argv, "groups": groups, "differences": differences, "left_out": left}


# --- the figure -------------------------------------------------------------------------------------------------------


def figure_of(compared: Comparison) -> Figure:
    """The score over epochs, a panel for each role: the mean over seeds in a band of one sample standard deviation.

    Of runs that are evaluated at their end alone (diffusion) the last scores over iterations or sampling steps, with
    error bars: a panel for what stands behind a role's comma ("..., guidance 4"). A method looks the same in every
    figure (``core.analysis.looks``).
    """
    from matplotlib.figure import Figure

    found = {role: [curve(compared, group, role) for group in compared.groups] for role in compared.roles}
    curves = any(points for by_group in found.values() for points in by_group)
    moving = [role for role in compared.roles if any(y != points[0][1] for points in found[role] for _, y, _ in points)]
    drawn = moving or compared.roles  # a fixed teacher has no curve
    panels: dict[str, list[str]] = {}
    for role in drawn:
        panels.setdefault(role if curves else role.partition(", ")[2], []).append(role)
    texts = [[_told(compared, group, role) for group in compared.groups] for role in drawn]
    lines = max(sum(text.count("\n") + 1 for text in by_group) for by_group in texts)
    figure = Figure(figsize=(5.6 * len(panels), 4.2 + 0.2 * lines), layout="constrained")
    for part, (title, roles) in zip(figure.subfigures(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis = part.subplots()
        (draw_curves if curves else draw_points)(axis, compared, roles)
        axis.set_title(title)
        axis.grid(alpha=0.3, linewidth=0.6)
        told = f"last {named(compared.measure)}, mean ± std over seeds" if curves else "mean ± std over seeds"
        small = {"fontsize": "small", "title_fontsize": "small"}
        part.legend(*axis.get_legend_handles_labels(), loc="outside lower center", title=told, **small)
    return figure


def looks(compared: Comparison) -> list[dict[str, str]]:
    """How each group is drawn."""
    return method_looks([method_of(next(iter(group.runs.values()))) for group in compared.groups])


def curve(compared: Comparison, group: Group, role: str) -> list[tuple[float, float, float]]:
    """(epoch, mean score, its sample standard deviation over seeds; 0 of one run) at each epoch that all runs have.

    Iterations stand for epochs where a run counts those.
    """
    by_epoch: dict[float, list[float]] = {}
    for line in (line for run in group.runs.values() for line in run.evaluations):
        value = score(line, role, compared.measure)
        if value is not None:
            by_epoch.setdefault(round(line.get("epoch", line["step"]), 6), []).append(value)
    full = ((epoch, *mean_std(values)) for epoch, values in sorted(by_epoch.items()) if len(values) == len(group.runs))
    return [(epoch, mean or 0.0, std or 0.0) for epoch, mean, std in full]


def draw_points(axis: Any, compared: Comparison, roles: Sequence[str]) -> None:
    """The roles are "4 steps", or "iteration 600, ...": each group's point stands at that very number."""
    first = roles[0].partition(", ")[0]
    numbers = [[int(word) for word in role.partition(", ")[0].split() if word.isdecimal()] for role in roles]
    known = all(len(found) == 1 for found in numbers)
    at = [found[0] for found in numbers] if known else list(range(len(roles)))
    for group, look in zip(compared.groups, looks(compared), strict=True):
        scores = [mean_std(list(compared.scores(group, role).values()) or [math.nan]) for role in roles]
        y, s = [mean for mean, _ in scores], [std or 0.0 for _, std in scores]
        text = textwrap.fill(f"{group.label} (n = {len(group.runs)})", 56)
        axis.errorbar(at, y, s, **look, markersize=5, linewidth=1.2, elinewidth=0.8, capsize=3, label=text)
    if known and first.startswith("iteration"):
        axis.set(xlabel="iteration", xticks=at)
    elif known:
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(number) for number in at])
        axis.set_xlabel("sampling steps")
    else:
        axis.set_xticks(at, [role.partition(", ")[0] for role in roles])
    better = " (lower is better)" if lower_is_better(compared.measure) else ""
    axis.set_ylabel(f"{named(compared.measure)}{better}")


def draw_curves(axis: Any, compared: Comparison, roles: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    (role,), measure = roles, named(compared.measure)
    unit = "epoch" if any("epoch" in line for run in compared.runs for line in run.evaluations) else "iteration"
    for group, look in zip(compared.groups, looks(compared), strict=True):
        points = curve(compared, group, role)
        if not points:
            continue
        x, y, s = zip(*points, strict=True)
        every = max(1, len(x) // 12)  # markers tell the curves apart: a dozen do
        axis.plot(x, y, **look, markevery=every, markersize=4, linewidth=1.4, label=_told(compared, group, role))
        low, high = [m - d for m, d in zip(y, s, strict=True)], [m + d for m, d in zip(y, s, strict=True)]
        axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axis.set(xlabel=unit, ylabel=f"{measure} (%)" if compared.measure in PERCENT else measure)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _told(compared: Comparison, group: Group, role: str) -> str:
    return textwrap.fill(f"{group.label}: {spread(compared.scores(group, role).values())} (n = {len(group.runs)})", 56)


if __name__ == "__main__":
    run_command(main)
