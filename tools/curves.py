"""The figure of a comparison: scores over epochs, or side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tools.groups import PERCENT, Comparison, Group, lower_is_better, named, score
from tools.stats import mean_std, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_of(compared: Comparison) -> Figure:
    """The score over epochs, a panel for each role: the mean over seeds in a band of one sample standard deviation.

    Of runs that are evaluated at their end alone (diffusion) the last scores side by side, with error bars: the roles
    along the x axis, a panel for what stands behind their comma ("..., guidance 4").
    """
    from matplotlib.figure import Figure

    curves = any(curve(compared, group, role) for group in compared.groups for role in compared.roles)
    panels: dict[str, list[str]] = {}
    for role in compared.roles:
        panels.setdefault(role if curves else role.partition(", ")[2], []).append(role)
    if curves:
        lines = max(sum(_told(compared, g, role).count("\n") + 1 for g in compared.groups) for role in compared.roles)
    height = 4.2 + 0.2 * lines if curves else 3.8 + 0.2 * len(compared.groups)  # legends stand below
    figure = Figure(figsize=(5.6 * len(panels), height), layout="constrained")
    for axis, (title, roles) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        (draw_curves if curves else draw_points)(axis, compared, roles)
        axis.set_title(title)
        axis.grid(alpha=0.3, linewidth=0.6)
    return figure


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
    for number, group in enumerate(compared.groups):
        scores = [mean_std(list(compared.scores(group, role).values()) or [math.nan]) for role in roles]
        x = [position + 0.08 * (number - (len(compared.groups) - 1) / 2) for position in range(len(roles))]
        y, s = [mean for mean, _ in scores], [std or 0.0 for _, std in scores]
        text = textwrap.fill(f"{group.label} (n = {len(group.runs)})", 56)
        axis.errorbar(x, y, s, fmt="o-", color=f"C{number % 10}", markersize=4, linewidth=1, capsize=3, label=text)
    axis.set_xticks(range(len(roles)), [role.partition(", ")[0].replace(" ", "\n") for role in roles])
    axis.set_ylabel(named(compared.measure) + (" (lower is better)" if lower_is_better(compared.measure) else ""))
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), borderaxespad=0)


def draw_curves(axis: Any, compared: Comparison, roles: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    (role,), measure = roles, named(compared.measure)
    unit = "epoch" if any("epoch" in line for run in compared.runs for line in run.evaluations) else "iteration"
    for number, group in enumerate(compared.groups):
        points = curve(compared, group, role)
        if not points:
            continue
        x, y, s = zip(*points, strict=True)
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        marker, told = "o" if len(x) <= 30 else None, _told(compared, group, role)
        axis.plot(x, y, **style, marker=marker, markersize=3, linewidth=1.4, label=told)
        low, high = [m - d for m, d in zip(y, s, strict=True)], [m + d for m, d in zip(y, s, strict=True)]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.set(xlabel=unit, ylabel=f"{measure} (%)" if compared.measure in PERCENT else measure)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "borderaxespad": 0}
    axis.legend(fontsize="small", title=f"last {measure}, mean ± std over seeds", title_fontsize="small", **below)


def _told(compared: Comparison, group: Group, role: str) -> str:
    return textwrap.fill(f"{group.label}: {spread(compared.scores(group, role).values())} (n = {len(group.runs)})", 56)
