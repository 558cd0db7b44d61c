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
from .looks import MARKERS, role_marker

Line = Mapping[str, Any]
Series = tuple[list[float], list[float]]  # x, y

SMOOTHED_FROM = 200  # points; shorter curves are drawn as they are
LOG_FROM = 30.0  # ratio of the largest to the smallest value of a panel
SCORES = ("top1", "top5", "ece")  # every other term of a training line is a loss
STYLES = ("-", "--", ":")
WATCHED = ("attention", "adm")  # roles of no network, and terms of no loss
PAUSED = "paused"  # a share of the steps and no loss


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    unit: str
    curves: list[tuple[Series, dict[str, Any]]]  # points, how matplotlib draws them
    logarithmic: bool = False  # where the values are far apart


def draw_curves(metrics: Sequence[Line], path: str | Path) -> None:
    """Draw the lines of a run's ``metrics.jsonl``: a panel for whatever they hold, none for what they lack.

    Training loss terms (a panel for each role), top-1, calibration error and mIoU of every role and split, learning
    rate, what training and evaluation log of S and the attention (Table 17), and the shares of steps and images that a
    method leaves out, over epochs (over steps where no line has an epoch). Values that are missing or not finite are
    left out. Losses far apart, and a learning rate that falls by steps, stand on a logarithmic axis.
    Raises: InputError where there is nothing to draw or ``path`` cannot be written (see ``save_figure``).
    """
    x = "epoch" if any("epoch" in line for line in metrics) else "step"
    training = [line for line in metrics if line.get("kind") != "evaluation"]
    evaluation = [line for line in metrics if line.get("kind") == "evaluation"]
    panels = [*_loss_panels(training, x), *_score_panels(evaluation, x)]
    if (rates := _series(training, "lr", x))[0]:
        stepwise = len(set(rates[1])) <= len(rates[1]) // 3  # of a schedule with milestones: most points repeat
        look = {"color": "0.2", "marker": "o" if len(rates[0]) == 1 else None}
        look["drawstyle"] = "steps-pre" if stepwise else "default"
        panels.append(Panel("learning rate", "learning rate", [(rates, look)], logarithmic=stepwise))
    panels += _watched_panels(training, x) + _attention_panels(evaluation, x)
    if not panels:
        raise InputError(f"cannot draw {path}: the metrics hold no loss, accuracy, learning rate or attention yet")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 4 if len(panels) > 6 else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
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
        if panel.unit.startswith("share"):
            axis.set_ylim(-0.03, 1.03)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=end > 3))
        if end > 0:  # the same stretch of training in every panel
            axis.set_xlim(-0.03 * end, 1.03 * end)
        axis.grid(alpha=0.3, linewidth=0.6)
        if axis.get_legend_handles_labels()[0]:  # below the panel, where it covers no curve
            longest = max(len(str(look.get("label", ""))) for _, look in panel.curves)
            columns = 1 if longest > 24 else 2 if longest > 14 else 3
            axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns, frameon=False)
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


def _curve(
    points: Series, label: str, color: str, style: str = "-", marker: str = "o"
) -> tuple[Series, dict[str, Any]]:
    """A dozen markers tell curves apart without their colours, and one point is invisible without."""
    look = {"linestyle": style, "color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4, "label": label}
    return points, look | {"markevery": max(1, len(points[0]) // 12)}


def _loss_panels(training: Sequence[Line], x: str) -> list[Panel]:
    losses: dict[str, dict[str, Series]] = {}  # role -> term -> points
    for role, term in _keys(training):
        points = _series(training, f"{role}/{term}", x)
        if role not in WATCHED and term not in (*SCORES, PAUSED) and points[0]:
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
            curves.append(_curve((xs, ys), term, colors[term], marker=MARKERS[terms.index(term) % len(MARKERS)]))
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
            curves.append(_curve(points, label, color, style, role_marker(role)))
        if curves:
            panels.append(Panel(title, unit, curves))
    return panels


_LOGGED = {  # title -> unit, name of what a training line logs -> label, colour, line and marker
    "similarity of the maps in training": (
        "cosine S",
        {
            "adm/similarity": ("mean", "0.2", "-", "o"),
            "adm/similarity_max": ("largest", "0.2", "--", "^"),
            "adm/similarity_min": ("smallest", "0.2", ":", "v"),
        },
    ),
    "attention in training": (
        "weight (mean 1)",
        {"adm/attention_std": ("standard deviation in an image", SIDES["consensus"], "-", "D")},
    ),
    "images with ADM": ("share of a batch", {"adm/active": ("", "0.2", "-", "o")}),
}
_ATTENTION: dict[str, tuple[str, dict[str, tuple[str, str, str, str]]]] = {
    "extremes of the attention": (
        "smallest and largest weight",
        {
            f"attention/{side}_{of}": (f"{side}, {said}", SIDES[side], line, marker)
            for side in SIDES
            for of, said, line, marker in (("max", "largest", "-", "^"), ("min", "smallest", "--", "v"))
        },
    ),
    "variance of the attention": (
        "variance over locations",
        {
            f"attention/{side}_variance": (side, color, "-", marker)
            for (side, color), marker in zip(SIDES.items(), "Do", strict=True)
        },
    ),
    "similarity of the maps": ("mean cosine S", {"attention/similarity": ("", "0.2", "-", "o")}),
}


def _named_panels(lines: Sequence[Line], x: str, named: Mapping[str, Any], where: str = "") -> list[Panel]:
    """Those of a table of panels that the lines hold."""
    panels = []
    for title, (unit, names) in named.items():
        found = ((_series(lines, name, x), look) for name, look in names.items())
        if curves := [_curve(points, *look) for points, look in found if points[0]]:
            panels.append(Panel(f"{title}{where}", unit, curves))
    return panels


def _watched_panels(training: Sequence[Line], x: str) -> list[Panel]:
    """What training logs beside the losses: diffusion's S, attention and gates, and a teacher's pauses (SwitOKD)."""
    paused = [role for role, term in _keys(training) if term == PAUSED]
    curves = [
        _curve(_series(training, f"{role}/{PAUSED}", x), role, role_color(role), "-", role_marker(role))
        for role in paused
    ]
    pauses = [Panel("pauses", "share of the steps", curves)] if curves else []
    return _named_panels(training, x, _LOGGED) + pauses


def _attention_panels(evaluation: Sequence[Line], x: str) -> list[Panel]:
    """Table 17's statistics, of the first split that has any."""
    for split, lines in _by_split(evaluation).items():
        if panels := _named_panels(lines, x, _ATTENTION, f" ({split})" if split else ""):
            return panels
    return []
