"""One figure of a training run: losses, accuracy, learning rate, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import save_figure
from .colors import SIDES, TERMS, role_color

Line = Mapping[str, Any]
Series = tuple[list[float], list[float]]  # x, y

SMOOTHED_FROM = 200  # points; shorter curves are drawn as they are
LOG_FROM = 30.0  # ratio of the largest to the smallest value of a panel
SCORES = ("top1", "top5", "ece")  # every other term of a training line is a loss
STYLES = ("-", "--", ":")


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    unit: str
    curves: list[tuple[Series, dict[str, Any]]]  # points, how matplotlib draws them
    logarithmic: bool = False  # where the values are far apart


def draw_curves(metrics: Sequence[Line], path: str | Path) -> None:
    """Draw the lines of a run's ``metrics.jsonl``: a panel for whatever they hold, none for what they lack.

    Training loss terms (a panel for each role), top-1, calibration error and mIoU of every role and split, learning
    rate, and the attention statistics of Table 17, over epochs (over steps where no line has an epoch). Values that are
    missing or not finite are left out.
    Raises: InputError where there is nothing to draw or ``path`` cannot be written (see ``save_figure``).
    """
    x = "epoch" if any("epoch" in line for line in metrics) else "step"
    training = [line for line in metrics if line.get("kind") != "evaluation"]
    evaluation = [line for line in metrics if line.get("kind") == "evaluation"]
    panels = [*_loss_panels(training, x), *_score_panels(evaluation, x)]
    if (rates := _series(training, "lr", x))[0]:
        look = {"color": "0.2", "marker": "o" if len(rates[0]) == 1 else None, "drawstyle": "steps-post"}
        panels.append(Panel("learning rate", "learning rate", [(rates, look)], logarithmic=True))
    panels += _attention_panels(evaluation, x)
    if not panels:
        raise InputError(f"cannot draw {path}: the metrics hold no loss, accuracy, learning rate or attention yet")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 4 if len(panels) > 6 else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    end = max((float(line[x]) for line in metrics if _finite(line.get(x))), default=0.0)
    for axis, panel in zip(axes, panels, strict=False):
        for points, look in panel.curves:
            axis.plot(*points, **look)
        values = [y for (_, ys), _ in panel.curves for y in ys]
        if panel.logarithmic and min(values) > 0 and max(values) > LOG_FROM * min(values):
            axis.set_yscale("log")
        axis.set(title=panel.title, ylabel=panel.unit)
        axis.set_xlabel(x)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=end > 3))
        if end > 0:  # the same stretch of training in every panel
            axis.set_xlim(-0.03 * end, 1.03 * end)
        axis.grid(alpha=0.3, linewidth=0.6)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    save_figure(figure, path)


def _series(lines: Sequence[Line], key: str, x: str) -> Series:
    """The points of one key in the order of the lines."""
    points = [(float(line[x]), float(line[key])) for line in lines if _finite(line.get(x)) and _finite(line.get(key))]
    return [point[0] for point in points], [point[1] for point in points]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _by_split(evaluation: Sequence[Line]) -> dict[str, list[Line]]:
    splits: dict[str, list[Line]] = {}
    for line in evaluation:
        splits.setdefault(line.get("split", ""), []).append(line)
    return splits


def _keys(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Every ``role/term`` of the lines, split; teachers first, then students, in the order of their numbers."""
    names = {tuple(key.split("/", 1)) for line in lines for key in line if "/" in key}
    order = {"teacher": 0, "student": 1}

    def rank(name: tuple[str, ...]) -> tuple[int, str, int, str]:
        kind, _, number = name[0].partition("_")
        return order.get(kind, 2), kind, int(number) if number.isdigit() else 1, name[1]

    return [(name[0], name[1]) for name in sorted(names, key=rank)]


def _curve(points: Series, label: str, color: str, style: str = "-") -> tuple[Series, dict[str, Any]]:
    # Few points need markers: a curve of one point is invisible without.
    marker = "o" if len(points[0]) <= 30 else None
    look = {"linestyle": style, "color": color, "marker": marker, "markersize": 3, "linewidth": 1.4, "label": label}
    return points, look


def _loss_panels(training: Sequence[Line], x: str) -> list[Panel]:
    losses: dict[str, dict[str, Series]] = {}  # role -> term -> points
    for role, term in _keys(training):
        points = _series(training, f"{role}/{term}", x)
        if role != "attention" and term not in SCORES and points[0]:
            losses.setdefault(role, {})[term] = points
    terms = sorted({term for by_term in losses.values() for term in by_term})
    others = [term for term in terms if term not in SIDES]
    colors = SIDES | {term: TERMS[i % len(TERMS)] for i, term in enumerate(others)}  # of a term, in all panels
    panels = []
    for role, by_term in losses.items():
        title, curves = f"training loss: {role}", []
        for term, (xs, ys) in by_term.items():
            if len(ys) >= SMOOTHED_FROM:
                curves.append(((xs, ys), {"color": colors[term], "linewidth": 0.6, "alpha": 0.25}))
                ys, title = _running_mean(ys, len(ys) // 50), f"training loss: {role} (running mean)"
            curves.append(_curve((xs, ys), term, colors[term]))
        panels.append(Panel(title, "loss term", curves, logarithmic=True))
    return panels


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, ``window`` at most."""
    sums = list(accumulate(values, initial=0.0))
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1) for i in range(len(values))]


def _score_panels(evaluation: Sequence[Line], x: str) -> list[Panel]:
    panels = []
    for term, title, unit, best in (
        ("top1", "top-1 accuracy", "top-1 (%)", max),
        ("ece", "expected calibration error", "ECE (%)", min),
        ("mIoU", "mean intersection over union", "mIoU (%)", max),
    ):
        scores = {
            (role, split): points
            for role, key in _keys(evaluation)
            for split, lines in _by_split(evaluation).items()
            if key == term and (points := _series(lines, f"{role}/{term}", x))[0]
        }
        splits = list(dict.fromkeys(split for _, split in scores))
        curves = []
        for (role, split), points in scores.items():
            label = f"{role} {split}".strip() + f": last {points[1][-1]:.2f}, best {best(points[1]):.2f}"
            color, style = role_color(role), STYLES[splits.index(split) % len(STYLES)]
            curves.append(_curve(points, label, color, style))
        if curves:
            panels.append(Panel(title, unit, curves))
    return panels


_EXTREMES = {f"{side}_{of}": (side if of == "max" else "", SIDES[side]) for side in SIDES for of in ("max", "min")}
_ATTENTION = {  # title -> unit, name of the statistic -> label and colour
    "extremes of the attention": ("smallest and largest weight", _EXTREMES),
    "variance of the attention": ("variance over locations", {f"{k}_variance": (k, c) for k, c in SIDES.items()}),
    "similarity of the maps": ("mean cosine S", {"similarity": ("", "0.2")}),
}


def _attention_panels(evaluation: Sequence[Line], x: str) -> list[Panel]:
    """Table 17's statistics, of the first split that has any."""
    for split, lines in _by_split(evaluation).items():
        where, panels = f" ({split})" if split else "", []
        for title, (unit, names) in _ATTENTION.items():
            found = ((_series(lines, f"attention/{name}", x), look) for name, look in names.items())
            if curves := [_curve(points, *look) for points, look in found if points[0]]:
                panels.append(Panel(f"{title}{where}", unit, curves))
        if panels:
            return panels
    return []
