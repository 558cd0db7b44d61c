"""One figure of a training run: losses, accuracy, learning rate, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]
Series = tuple[list[float], list[float]]  # x, y
Panel = Callable[["Axes"], None]

SMOOTHED_FROM = 200  # points; shorter curves are drawn as they are
LOG_FROM = 30.0  # ratio of the largest to the smallest value of a panel
SCORES = ("top1", "top5", "ece")  # every other term of a training line is a loss
STYLES = ("-", "--", ":")


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
    panels = [
        *_loss_panels(training, x),
        *_score_panels(evaluation, x),
        *_rate_panels(training, x),
        *_attention_panels(evaluation, x),
    ]
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
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis)
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


def _loss_panels(training: Sequence[Line], x: str) -> list[Panel]:
    losses: dict[str, dict[str, Series]] = {}  # role -> term -> points
    for role, term in _keys(training):
        points = _series(training, f"{role}/{term}", x)
        if role != "attention" and term not in SCORES and points[0]:
            losses.setdefault(role, {})[term] = points
    terms = sorted({term for by_term in losses.values() for term in by_term})
    colors = {term: f"C{i % 10}" for i, term in enumerate(terms)}  # a term has one colour in all panels
    return [partial(_draw_losses, role=role, losses=by_term, colors=colors) for role, by_term in losses.items()]


def _draw_losses(axis: Axes, role: str, losses: Mapping[str, Series], colors: Mapping[str, str]) -> None:
    smoothed = False
    for term, (xs, ys) in losses.items():
        if len(ys) >= SMOOTHED_FROM:
            axis.plot(xs, ys, color=colors[term], linewidth=0.6, alpha=0.25)
            ys, smoothed = _running_mean(ys, len(ys) // 50), True
        _plot(axis, (xs, ys), term, colors[term])
    _log_if_wide(axis, [y for _, ys in losses.values() for y in ys])
    axis.set_title(f"training loss: {role}" + (" (running mean)" if smoothed else ""))
    axis.set_ylabel("loss term")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, ``window`` at most."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1) for i in range(len(values))]


def _score_panels(evaluation: Sequence[Line], x: str) -> list[Panel]:
    panels: list[Panel] = []
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
        if scores:
            panels.append(partial(_draw_scores, scores=scores, title=title, unit=unit, best=best))
    return panels


def _draw_scores(
    axis: Axes,
    scores: Mapping[tuple[str, str], Series],
    title: str,
    unit: str,
    best: Callable[[Sequence[float]], float],
) -> None:
    roles = list(dict.fromkeys(role for role, _ in scores))
    splits = list(dict.fromkeys(split for _, split in scores))
    for (role, split), points in scores.items():
        label = f"{role} {split}".strip() + f": last {points[1][-1]:.2f}, best {best(points[1]):.2f}"
        _plot(axis, points, label, f"C{roles.index(role) % 10}", STYLES[splits.index(split) % len(STYLES)])
    axis.set_title(title)
    axis.set_ylabel(unit)


def _rate_panels(training: Sequence[Line], x: str) -> list[Panel]:
    points = _series(training, "lr", x)
    return [partial(_draw_rate, points=points)] if points[0] else []


def _draw_rate(axis: Axes, points: Series) -> None:
    axis.plot(*points, color="0.2", marker="o" if len(points[0]) == 1 else None, drawstyle="steps-post")
    _log_if_wide(axis, points[1])
    axis.set_title("learning rate")
    axis.set_ylabel("learning rate")


def _attention_panels(evaluation: Sequence[Line], x: str) -> list[Panel]:
    """Table 17's statistics, of the first split that has any."""
    for split, lines in _by_split(evaluation).items():
        found = {term: _series(lines, f"attention/{term}", x) for role, term in _keys(lines) if role == "attention"}
        found = {term: points for term, points in found.items() if points[0]}
        if found:
            where = f" ({split})" if split else ""
            panels = {
                f"extremes of the attention{where}": ("smallest and largest weight", _EXTREMES),
                f"variance of the attention{where}": ("variance over locations", _VARIANCES),
                f"similarity of the maps{where}": ("mean cosine S", _SIMILARITY),
            }
            return [
                partial(_draw_attention, found=found, title=title, unit=unit, curves=curves)
                for title, (unit, curves) in panels.items()
                if found.keys() & curves.keys()
            ]
    return []


# Name of the statistic -> label, colour, style.
_EXTREMES = {
    "consensus_max": ("consensus", "C0", "-"),
    "consensus_min": ("", "C0", "-"),
    "divergence_max": ("divergence", "C3", "-"),
    "divergence_min": ("", "C3", "-"),
}
_VARIANCES = {"consensus_variance": ("consensus", "C0", "-"), "divergence_variance": ("divergence", "C3", "-")}
_SIMILARITY = {"similarity": ("", "0.2", "-")}


def _draw_attention(
    axis: Axes, found: Mapping[str, Series], title: str, unit: str, curves: Mapping[str, tuple[str, str, str]]
) -> None:
    for name, (label, color, style) in curves.items():
        if name in found:
            _plot(axis, found[name], label, color, style)
    axis.set_title(title)
    axis.set_ylabel(unit)


def _plot(axis: Axes, points: Series, label: str, color: str, style: str = "-") -> None:
    # Few points need markers: a curve of one point is invisible without.
    marker = "o" if len(points[0]) <= 30 else None
    axis.plot(*points, linestyle=style, color=color, marker=marker, markersize=3, linewidth=1.4, label=label)


def _log_if_wide(axis: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > LOG_FROM * min(values):
        axis.set_yscale("log")
