"""Compares runs: mean and spread over seeds, last and best apart, paired differences from a baseline, and curves.

    python tools/compare.py runs/dml-0 runs/dml-1 runs/dml+adm-0 runs/dml+adm-1 --baseline dml --out runs/compared
    python tools/compare.py results/methods_32 --baseline dml

Takes run folders, folders of them, and what `results/` keeps. Runs that differ in nothing but their seed make a group.
Prints the tables; `--out` also writes them (`compare.md`), all numbers (`compare.json`) and the curves (`compare.png`).
Of a diffusion run it takes what evaluate.py wrote beside it, a column for each number of sampling steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from core.errors import InputError
from core.files import save_figure, save_json, write_atomically
from core.training.command import LineParser, run_command
from tools.curves import figure_of
from tools.groups import PERCENT, Comparison, Group, Versus, chosen_by, compare_runs, lower_is_better, named
from tools.runs import Run, make_folder, read_run, runs_in
from tools.stats import Grid, markdown, mean_std, spread


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError."""
    options = make_parser().parse_args(argv)
    paths = dict.fromkeys(path for word in options.runs for path in runs_in(word))
    runs = [read_run(path) for path in paths]
    left_out = [] if options.partial else [run for run in runs if not run.finished]
    runs = [run for run in runs if run not in left_out]
    if not runs:
        names = ", ".join(str(run.path) for run in left_out)
        raise InputError(f"not one run is finished ({names}): --partial takes them as far as they are")
    compared = compare_runs(runs, options.measure, options.baseline)
    text = render(compared, left_out)
    print(text)
    if options.out is not None:
        folder = make_folder(options.out)
        save_json(as_json(compared, left_out), folder / "compare.json")
        write_atomically(folder / "compare.md", lambda file: file.write_text(f"# Comparison\n\n{text}\n"))
        save_figure(figure_of(compared), folder / "compare.png")
        print(f"\nwritten to {folder}: compare.json, compare.md, compare.png")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="compare.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, folders of them, kept runs or experiments of results/"
    )
    parser.add_argument(
        "--baseline", help="a method, or a group's label: paired differences from it, at equal settings"
    )
    parser.add_argument("--measure", help="what is compared, as top5 or IS; top1, mIoU or the FID unless given")
    parser.add_argument("--out", metavar="FOLDER", help="where to write compare.json, compare.md and compare.png")
    parser.add_argument("--partial", action="store_true", help="take unfinished runs too, as far as they are")
    return parser


def render(compared: Comparison, left_out: Sequence[Run]) -> str:
    """The tables and what must be known to read them, as Markdown that is legible as it is."""
    measure, percent = named(compared.measure), compared.measure in PERCENT
    better = ", lower is better" if lower_is_better(compared.measure) else ""
    parts = [
        f"{measure.replace('top', 'Top')}{' in percent' if percent else better}: mean ± sample standard deviation over "
        "seeds.",
        markdown(score_rows(compared), aligned=True),
    ]
    if any(chosen_by(run).endswith(" on test") for run in compared.runs):
        parts.append("Best was chosen by test accuracy, which flatters it: read last.")
    if compared.versus:
        parts.append(
            f"Difference of the {'last ' if compared.has_best else ''}{measure} from {compared.versus[0].baseline}"
            f"{', in points' if percent else better}, paired by seed; t interval"
            + (f", not corrected for {len(compared.versus)} comparisons." if len(compared.versus) > 1 else ".")
        )
        parts.append(markdown(difference_rows(compared.versus), aligned=True))
    unfinished = [run for run in compared.runs if not run.finished]
    if unfinished:
        told = ", ".join(f"{run.path} ({when(run.last)})" for run in unfinished)
        parts.append(f"Not finished, taken as far as they are: {told}.")
    if left_out:
        parts.append(f"Left out, not finished: {', '.join(str(run.path) for run in left_out)}.")
    if len({run.start.get("commit") for run in compared.runs}) > 1:
        parts.append("These runs come from different commits (see the environment of each).")
    return "\n\n".join(parts)


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
        cells = [spread(group.scores(role, which).values()) for role in compared.roles for which in kinds]
        chosen = [", ".join(sorted({chosen_by(run) for run in group.runs.values()}))] if compared.has_best else []
        rows.append([group.label, str(len(group.runs)), *cells, *chosen])
    return rows


def difference_rows(versus: Sequence[Versus]) -> Grid:
    """The table of differences, its head first."""
    rows = [["group", "role", "n", "difference", "95 % interval", "verdict"]]
    for one in versus:
        d = one.difference
        mean = f"{d.mean:+.2f}" if d.mean is not None else "-"
        between = f"{d.interval[0]:+.2f} to {d.interval[1]:+.2f}" if d.interval is not None else "-"
        rows.append([one.group, one.role, str(len(d.by_seed)), mean, between, one.verdict])
    return rows


def as_json(compared: Comparison, left_out: Sequence[Run]) -> dict[str, Any]:
    """Everything in full precision; a standard deviation of one run is null."""

    def described(values: Mapping[Any, float]) -> dict[str, Any]:
        mean, std = mean_std(values.values())
        return {"n": len(values), "mean": mean, "std": std, "by_seed": values}

    def scores(group: Group, role: str) -> dict[str, Any]:
        return {which: described(group.scores(role, which)) for which in ("last", "best")}

    groups = [
        {
            "label": group.label,
            "config": group.config,
            "runs": [
                {"path": str(run.path), "seed": s, "finished": run.finished, "commit": run.start.get("commit")}
                for s, run in group.runs.items()
            ],
            "best_chosen_by": sorted({chosen_by(run) for run in group.runs.values()}),
            group.measure: {role: scores(group, role) for role in compared.roles},
        }
        for group in compared.groups
    ]
    differences = [
        {"group": one.group, "role": one.role, "baseline": one.baseline, "n": len(one.difference.by_seed),
         **asdict(one.difference), "verdict": one.verdict}
        for one in compared.versus
    ]  # fmt: skip
    left = [str(run.path) for run in left_out]
    return {"command": sys.argv, "groups": groups, "differences": differences, "left_out": left}


if __name__ == "__main__":
    run_command(main)
