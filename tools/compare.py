"""Compares runs: mean and spread over seeds, last and best apart, paired differences from a baseline, and curves.

    python tools/compare.py runs/dml-0 runs/dml-1 runs/dml+adm-0 runs/dml+adm-1 --baseline dml --out runs/compared

Runs that differ in nothing but their seed make a group. Prints the tables; `--out` also writes them (`compare.md`), all
numbers (`compare.json`) and the curves (`compare.png`). Reads run folders alone and needs no torch. Of a diffusion run
it takes what evaluate.py wrote beside it, a column for each number of sampling steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where and on what a run ran, and how much it said meanwhile: no different experiment.
IGNORED = (
    "seed",
    "data.root",
    "data.download",
    "data.workers",
    "fit.device",
    "fit.keep",
    "fit.log_every",
    "fit.trackers",
    "progress_bar",
    "data_root",
    "run.",
    "train_dataloader.num_workers",
    "val_dataloader",
    "env_cfg",
    "visualizer",
    "log_level",
    "custom_imports",
)

MEASURES = {"top1": "top-1", "mIoU": "mIoU"}
"""What is compared, in percent, and how it is called: the first of these that a run has, else what its evaluation files
hold first (a FID)."""

KINDS = ("distance", "score")  # what an evaluation of images calls its FID and its IS
PERCENT = (*MEASURES, "top5", "aAcc", "ece")


class WrongInput(ValueError):
    """Ends as one line on stderr and exit code 2 (core's own error would take in torch)."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    config: Mapping[str, Any]  # flat: {"adm.alpha": 0.01}
    seed: Any
    finished: bool
    last: Mapping[str, Any]
    best: Mapping[str, Any] | None
    chosen: str  # by what and on which split best was chosen
    evaluations: Sequence[Mapping[str, Any]]
    commit: str | None
    measure: str


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, by seed."""

    runs: Mapping[Any, Run]
    config: Mapping[str, Any]
    label: str = ""

    @property
    def measure(self) -> str:
        """What is compared: the same for all runs."""
        return next(iter(self.runs.values())).measure

    def scores(self, role: str, which: str) -> dict[Any, float]:
        """The measure by seed, of "last" or "best"."""
        found = {s: score(r.last if which == "last" else r.best, role, r.measure) for s, r in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Difference:
    """A group's last score less that of its baseline (as the command named it), paired by seed, in points."""

    group: str
    role: str
    baseline: str
    by_seed: Mapping[Any, float]
    mean: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        if not self.by_seed:
            return f"no seed in common with a {self.baseline} of these settings"
        if self.interval is None:
            return "one seed in common: no interval"
        if self.interval[0] <= 0 <= self.interval[1]:
            return f"not distinguishable from {self.baseline}"
        return f"{'higher' if self.interval[0] > 0 else 'lower'} than {self.baseline}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: WrongInput."""
    options = make_parser().parse_args(argv)
    runs = [read_run(Path(path)) for path in dict.fromkeys(os.path.normpath(path) for path in options.runs)]
    left_out = [] if options.partial else [run for run in runs if not run.finished]
    runs = [run for run in runs if run not in left_out]
    if not runs:
        names = ", ".join(str(run.path) for run in left_out)
        raise WrongInput(f"not one run is finished ({names}): --partial takes them as far as they are")
    if options.measure is not None:
        runs = [replace(run, measure=options.measure) for run in runs]
    roles = common_roles(runs)
    groups = make_groups(runs)
    differences = [] if options.baseline is None else differences_from(options.baseline, groups, roles)
    text = render(groups, roles, differences, left_out)
    print(text)
    if options.out is not None:
        folder = Path(options.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report = as_json(groups, roles, differences, left_out)
            write(folder / "compare.json", json.dumps(report, indent=2) + "\n")
            write(folder / "compare.md", f"# Comparison\n\n{text}\n")
            draw(groups, roles, folder / "compare.png")
        except OSError as error:
            raise WrongInput(f"cannot write into {folder}: {error.strerror}") from error
        print(f"\nwritten to {folder}: compare.json, compare.md, compare.png")
    return 0


class LineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as a WrongInput: core's twin would import torch."""

    def error(self, message: str) -> NoReturn:
        raise WrongInput(f"{message} (see --help)")


def make_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="compare.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--baseline", help="a method, or a group's label: paired differences from it, at equal settings"
    )
    parser.add_argument("--measure", help="what is compared, as top5 or IS; top1, mIoU or the FID unless given")
    parser.add_argument("--out", metavar="FOLDER", help="where to write compare.json, compare.md and compare.png")
    parser.add_argument("--partial", action="store_true", help="take unfinished runs too, as far as they are")
    return parser


def read_run(path: Path) -> Run:
    """Raises: WrongInput where the folder is no run, is damaged, or holds no evaluation."""
    if not path.is_dir():
        raise WrongInput(f"no run folder {path}")
    if not (path / "config.yaml").is_file():
        raise WrongInput(f"{path} is no run folder: it has no config.yaml")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C's is ten times as fast
        config = flatten(yaml.load((path / "config.yaml").read_text(), loader) or {})
        summary = read_json(path / "summary.json")
        starts = read_json(path / "environment.json").get("starts", [{}])
        metrics = path / "metrics.jsonl"
        # A line that is still being written has no end yet.
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.is_file() else []
        evaluations = [line for line in map(json.loads, lines) if line.get("kind") == "evaluation"]
        written = read_evaluations(path)
    except (ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise WrongInput(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    finished = summary.get("status") == "finished"
    last = summary.get("last") if finished else (evaluations[-1] if evaluations else None)
    if last is None and not written and finished:
        raise WrongInput(f"{path} holds no evaluation to compare (of a diffusion run: evaluate.py writes it)")
    last = {**(last or {}), **written}
    best = summary.get("best")
    chosen = f"{best.get('selected_by')} on {summary.get('selected_on', best.get('split'))}" if best else "-"
    seed = config.get("seed", summary.get("seed"))
    held = [key.rpartition("/")[2] for key in last]
    measure = next((m for m in [*MEASURES, *(key.rpartition("/")[2] for key in written)] if m in held), "top1")
    return Run(path, config, seed, finished, last, best, chosen, evaluations, starts[-1].get("commit"), measure)


def read_evaluations(path: Path) -> dict[str, float]:
    """{"4 steps/FID": 4.7, "4 steps/IS": 9.0, ...} from a diffusion run's ``evaluation*.json``, FID before proxies.

    A run that is looked at several times, or with several weights of guidance, has those for roles.
    """
    found: dict[str, float] = {}
    for file in sorted(path.glob("evaluation*.json"), key=lambda f: (f.stem != "evaluation-inception", f.name)):
        report = read_json(file)
        for row in report["rows"] if "features" in report else ():  # else it is another task's
            role = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
            if row.get("guidance") is not None:
                role = f"iteration {row['iteration']}, guidance {row['guidance']:g}"
            found |= {f"{role}/{name}": row[name] for key, name in report["features"].items() if key in KINDS}
    return found


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def score(values: Mapping[str, Any] | None, role: str, measure: str) -> float | None:
    """Percent. On the test set also where another split was used to choose."""
    values = values or {}
    return values.get(f"test/{role}/{measure}", values.get(f"{role}/{measure}"))


def common_roles(runs: Sequence[Run]) -> list[str]:
    """The roles that all runs evaluate by one measure, teachers first. Raises: WrongInput where there is none."""
    if len({run.measure for run in runs}) > 1:
        told = "; ".join(f"{run.path}: {named(run.measure)}" for run in runs)
        raise WrongInput(f"the runs measure different things ({told})")
    pattern = re.compile(rf"([^/]+)/{re.escape(runs[0].measure)}")
    by_run = [{m[1] for key in run.last if (m := pattern.fullmatch(key))} for run in runs]
    common = set.intersection(*by_run)
    if not common:
        told = "; ".join(f"{run.path}: {', '.join(sorted(r)) or 'none'}" for run, r in zip(runs, by_run, strict=True))
        raise WrongInput(f"the runs have no role in common with a {named(runs[0].measure)} ({told})")
    order = {"teacher": 0, "student": 1}
    return sorted(common, key=lambda role: (order.get(role.partition("_")[0], 2), len(role), role))


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but their seed, in the order of their first run.

    Raises: WrongInput where two runs of one group have the same seed: it would count twice.
    """
    found: dict[str, dict[Any, Run]] = {}
    for run in runs:
        members = found.setdefault(repr(sorted(experiment(run).items())), {})
        if run.seed in members:
            raise WrongInput(
                f"{members[run.seed].path} and {run.path} are one experiment with one seed: give one of them"
            )
        members[run.seed] = run
    groups = [Group(members, experiment(next(iter(members.values())))) for members in found.values()]
    return [Group(group.runs, group.config, label(group, groups)) for group in groups]


def experiment(run: Run) -> dict[str, Any]:
    """The part of the config that decides what is computed, options that are not set left out.

    Weights that a network starts from count by their path, in which the run's own seed reads ``{seed}``: each seed of
    an experiment may have a teacher of its own.
    """
    kept = {}
    for key, value in run.config.items():
        if value is None or key.startswith(IGNORED) or key.endswith("sha256"):
            continue
        if (key in ("teacher", "init") or key.endswith((".weights", ".teacher_weights"))) and isinstance(value, str):
            value = re.sub(rf"(?<!\d){re.escape(str(run.seed))}(?!\d)", "{seed}", value)
        kept[key] = value
    return kept


def label(group: Group, groups: Sequence[Group]) -> str:
    """The method, and whatever else tells this group from others that have that option too."""
    method = group.config.get("method", "run")
    told = []
    for key, value in group.config.items():
        rivals = [g.config for g in groups if key in g.config or g.config.get("method") == group.config.get("method")]
        if key != "method" and any(rival.get(key) != value for rival in rivals):
            told.append(f"{key.removeprefix('networks.').removesuffix('.name')}={value}")
    return " ".join([str(method), *told])


def find_baselines(groups: Sequence[Group], name: str) -> list[Group]:
    """The group of that label, else all of that method. Raises: WrongInput naming the labels."""
    fits = [g for g in groups if g.label == name] or [g for g in groups if g.config.get("method") == name]
    if not fits:
        labels = ", ".join(repr(group.label) for group in groups)
        raise WrongInput(f"no group is {name!r}: --baseline is a method or one of {labels}")
    return fits


def match(group: Group, rivals: Sequence[Group]) -> Group | None:
    """The only baseline; of several the one that agrees in every option that both have, the method aside."""
    if len(rivals) == 1:
        return rivals[0]
    for rival in rivals:
        shared = (group.config.keys() & rival.config.keys()) - {"method"}
        if all(group.config[key] == rival.config[key] for key in shared):
            return rival
    return None


def differences_from(baseline: str, groups: Sequence[Group], roles: Sequence[str]) -> list[Difference]:
    """Of each other group in each role. Raises: WrongInput where no group has that name."""
    rivals = find_baselines(groups, baseline)
    others = [group for group in groups if group not in rivals]
    return [paired(group, match(group, rivals), role, baseline) for group in others for role in roles]


def paired(group: Group, rival: Group | None, role: str, baseline: str) -> Difference:
    """The difference of the last score over the common seeds, with its 95 % t interval from two seeds on."""
    ours, theirs = group.scores(role, "last"), rival.scores(role, "last") if rival is not None else {}
    by_seed = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
    values, n = list(by_seed.values()), len(by_seed)
    if n < 2:
        return Difference(group.label, role, baseline, by_seed, values[0] if values else None)
    return Difference(group.label, role, baseline, by_seed, fmean(values), interval(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % t interval of the mean of two values or more."""
    mean, reach = fmean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """t with ``P(|T| < t) = confidence`` at f whole degrees of freedom, by bisection of ``atan(t / sqrt(f))``."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def t_probability(angle: float, freedom: int) -> float:
    """``P(|T| < sqrt(f) tan(angle))``: the finite sums of Abramowitz and Stegun, 26.7.3 (odd f) and 26.7.4 (even f)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    total, term = 0.0, (cosine if freedom % 2 else 1.0)
    for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def render(
    groups: Sequence[Group], roles: Sequence[str], differences: Sequence[Difference], left_out: Sequence[Run]
) -> str:
    """Both tables and what must be known to read them, as Markdown that is legible as it is."""
    measure, percent = named(groups[0].measure), groups[0].measure in PERCENT
    better = ", lower is better" if lower_is_better(groups[0].measure) else ""
    parts = [
        f"{measure.replace('top', 'Top')}{' in percent' if percent else better}: mean ± sample standard deviation over "
        "seeds.",
        table(score_rows(groups, roles)),
    ]
    chosen = {run.chosen for group in groups for run in group.runs.values()}
    if any(c.endswith(" on test") for c in chosen):
        parts.append("Best was chosen by test accuracy, which flatters it: read last.")
    if differences:
        parts.append(
            f"Difference of the {'last ' if has_best(groups) else ''}{measure} from {differences[0].baseline}"
            f"{', in points' if percent else better}, paired by seed; t interval"
            + (f", not corrected for {len(differences)} comparisons." if len(differences) > 1 else ".")
        )
        parts.append(table(difference_rows(differences)))
    unfinished = [run for group in groups for run in group.runs.values() if not run.finished]
    if unfinished:
        told = ", ".join(f"{run.path} ({when(run.last)})" for run in unfinished)
        parts.append(f"Not finished, taken as far as they are: {told}.")
    if left_out:
        parts.append(f"Left out, not finished: {', '.join(str(run.path) for run in left_out)}.")
    if len({run.commit for group in groups for run in group.runs.values()}) > 1:
        parts.append("These runs come from different commits (see each run's environment.json).")
    return "\n\n".join(parts)


def when(values: Mapping[str, Any]) -> str:
    """Where in its run an evaluation stands."""
    if "epoch" in values:
        return f"epoch {values['epoch']:g}"
    return f"iteration {values['step']}" if "step" in values else "not at its end"


def named(measure: str) -> str:
    return MEASURES.get(measure, measure)


def lower_is_better(measure: str) -> bool:
    return measure.startswith(("FID", "FD-")) or measure in ("nll", "ece")


def has_best(groups: Sequence[Group]) -> bool:
    """Whether a best evaluation was chosen in any run: where images are evaluated there is but one."""
    return any(run.best is not None for group in groups for run in group.runs.values())


def score_rows(groups: Sequence[Group], roles: Sequence[str]) -> list[list[str]]:
    """The table of scores, its head first: last and best apart, where there is a best."""
    if not has_best(groups):
        rows = [["group", "n", *(f"{role} {named(groups[0].measure)}" for role in roles)]]
        for group in groups:
            cells = [spread(list(group.scores(role, "last").values())) for role in roles]
            rows.append([group.label, str(len(group.runs)), *cells])
        return rows
    heads = [f"{role} {which}" for role in roles for which in ("last", "best")]
    rows = [["group", "n", *heads, "best chosen by"]]
    for group in groups:
        cells = [spread(list(group.scores(role, which).values())) for role in roles for which in ("last", "best")]
        chosen = ", ".join(sorted({run.chosen for run in group.runs.values()}))
        rows.append([group.label, str(len(group.runs)), *cells, chosen])
    return rows


def difference_rows(differences: Sequence[Difference]) -> list[list[str]]:
    """The table of differences, its head first."""
    rows = [["group", "role", "n", "difference", "95 % interval", "verdict"]]
    for d in differences:
        mean = f"{d.mean:+.2f}" if d.mean is not None else "-"
        between = f"{d.interval[0]:+.2f} to {d.interval[1]:+.2f}" if d.interval is not None else "-"
        rows.append([d.group, d.role, str(len(d.by_seed)), mean, between, d.verdict])
    return rows


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first row its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def as_json(
    groups: Sequence[Group], roles: Sequence[str], differences: Sequence[Difference], left_out: Sequence[Run]
) -> dict[str, Any]:
    """Everything in full precision; a standard deviation of one run is null."""

    def summary(values: Mapping[Any, float]) -> dict[str, Any]:
        numbers = list(values.values())
        return {
            "n": len(numbers),
            "mean": fmean(numbers) if numbers else None,
            "std": stdev(numbers) if len(numbers) > 1 else None,
            "by_seed": values,
        }

    return {
        "command": sys.argv,
        "groups": [
            {
                "label": group.label,
                "config": group.config,
                "runs": [
                    {"path": str(run.path), "seed": seed, "finished": run.finished, "commit": run.commit}
                    for seed, run in group.runs.items()
                ],
                "best_chosen_by": sorted({run.chosen for run in group.runs.values()}),
                group.measure: {role: {w: summary(group.scores(role, w)) for w in ("last", "best")} for role in roles},
            }
            for group in groups
        ],
        "differences": [
            {
                "group": d.group,
                "role": d.role,
                "baseline": d.baseline,
                "n": len(d.by_seed),
                "by_seed": d.by_seed,
                "mean": d.mean,
                "interval": d.interval,
                "verdict": d.verdict,
            }
            for d in differences
        ],
        "left_out": [str(run.path) for run in left_out],
    }


def curve(group: Group, role: str) -> list[tuple[float, float, float]]:
    """(epoch, mean score, its sample standard deviation over seeds; 0 of one run) at each epoch that all runs have.

    Iterations stand for epochs where a run counts those.
    """
    by_epoch: dict[float, list[float]] = {}
    for run in group.runs.values():
        for line in run.evaluations:
            value = score(line, role, run.measure)
            if value is not None:
                by_epoch.setdefault(round(line.get("epoch", line["step"]), 6), []).append(value)
    return [
        (epoch, fmean(values), stdev(values) if len(values) > 1 else 0.0)
        for epoch, values in sorted(by_epoch.items())
        if len(values) == len(group.runs)
    ]


def draw(groups: Sequence[Group], roles: Sequence[str], path: Path) -> None:
    """The score over epochs, a panel for each role: the mean over seeds in a band of one sample standard deviation.

    Of runs that are evaluated at their end alone (diffusion) one panel: the roles side by side, with error bars.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    curves = any(curve(group, role) for group in groups for role in roles)
    (make_curves if curves else make_points)(groups, roles).savefig(beside, dpi=120, format="png")
    beside.replace(path)


def make_points(groups: Sequence[Group], roles: Sequence[str]) -> Figure:
    """The last scores, the roles along the x axis; a panel for what stands behind their comma ("..., guidance 4")."""
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for role in roles:
        panels.setdefault(role.partition(", ")[2], []).append(role)
    figure = Figure(figsize=(5.6 * len(panels), 3.8 + 0.2 * len(groups)), layout="constrained")
    for axis, (title, members) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, group in enumerate(groups):
            scores = [list(group.scores(role, "last").values()) or [math.nan] for role in members]
            x = [place + 0.08 * (number - (len(groups) - 1) / 2) for place in range(len(members))]
            y, s = [fmean(values) for values in scores], [stdev(v) if len(v) > 1 else 0.0 for v in scores]
            label = textwrap.fill(f"{group.label} (n = {len(group.runs)})", 56)
            axis.errorbar(x, y, s, fmt="o-", color=f"C{number % 10}", markersize=4, linewidth=1, capsize=3, label=label)
        axis.set_xticks(range(len(members)), [role.partition(", ")[0].replace(" ", "\n") for role in members])
        lower = " (lower is better)" if lower_is_better(groups[0].measure) else ""
        axis.set(title=title, ylabel=f"{named(groups[0].measure)}{lower}")
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), borderaxespad=0)
    return figure


def make_curves(groups: Sequence[Group], roles: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measure = named(groups[0].measure)
    epochs = any("epoch" in line for group in groups for run in group.runs.values() for line in run.evaluations)
    unit = "epoch" if epochs else "iteration"
    texts = {
        (group.label, role): textwrap.fill(
            f"{group.label}: {spread(list(group.scores(role, 'last').values()))} (n = {len(group.runs)})", 56
        )
        for group in groups
        for role in roles
    }
    lines = max(sum(texts[group.label, role].count("\n") + 1 for group in groups) for role in roles)
    figure = Figure(figsize=(5.6 * len(roles), 4.2 + 0.2 * lines), layout="constrained")  # legends stand below
    for axis, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
        for number, group in enumerate(groups):
            points = curve(group, role)
            if not points:
                continue
            x, y, s = zip(*points, strict=True)
            look: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            marker = "o" if len(x) <= 30 else None
            axis.plot(x, y, **look, marker=marker, markersize=3, linewidth=1.4, label=texts[group.label, role])
            low, high = [m - d for m, d in zip(y, s, strict=True)], [m + d for m, d in zip(y, s, strict=True)]
            axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
        axis.set(title=role, xlabel=unit, ylabel=f"{measure} (%)" if groups[0].measure in PERCENT else measure)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3, linewidth=0.6)
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "borderaxespad": 0}
        axis.legend(fontsize="small", title=f"last {measure}, mean ± std over seeds", title_fontsize="small", **place)
    return figure


def write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WrongInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
