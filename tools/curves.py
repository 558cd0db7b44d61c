"""The figure of a comparison: scores over epochs, or side by side."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from tools.groups import PERCENT, Comparison, Group, lower_is_better, named, score
from tools.stats import mean_std, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_of(compared: Comparison) -> Figure:
    """The score over epochs, a panel for each role: the mean over seeds in a band of one sample standard deviation.

    Of runs that are evaluated at their end alone (diffusion) one panel: the roles side by side, with error bars.
    """
    curves = any(curve(group, role) for group in compared.groups for role in compared.roles)
    return (make_curves if curves else make_points)(compared)


def curve(group: Group, role: str) -> list[tuple[float, float, float]]:
    """(epoch, mean score, its sample standard deviation over seeds; 0 of one run) at each epoch that all runs have.

    Iterations stand for epochs where a run counts those.
    """
    by_epoch: dict[float, list[float]] = {}
    for run in group.runs.values():
        for line in run.evaluations:
            value = score(line, role, group.measure)
            if value is not None:
                by_epoch.setdefault(round(line.get("epoch", line["step"]), 6), []).append(value)
    full = ((epoch, *mean_std(values)) for epoch, values in sorted(by_epoch.items()) if len(values) == len(group.runs))
    return [(epoch, mean or 0.0, std or 0.0) for epoch, mean, std in full]


def make_points(compared: Comparison) -> Figure:
    """The last scores, the roles along the x axis; a panel for what stands behind their comma ("..., guidance 4")."""
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for role in compared.roles:
        panels.setdefault(role.partition(", ")[2], []).append(role)
    groups = compared.groups
    figure = Figure(figsize=(5.6 * len(panels), 3.8 + 0.2 * len(groups)), layout="constrained")
    for axis, (title, members) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, group in enumerate(groups):
            scores = [mean_std(list(group.scores(role, "last").values()) or [math.nan]) for role in members]
            x = [position + 0.08 * (number - (len(groups) - 1) / 2) for position in range(len(members))]
            y, s = [mean for mean, _ in scores], [std or 0.0 for _, std in scores]
            text = textwrap.fill(f"{group.label} (n = {len(group.runs)})", 56)
            axis.errorbar(x, y, s, fmt="o-", color=f"C{number % 10}", markersize=4, linewidth=1, capsize=3, label=text)
        axis.set_xticks(range(len(members)), [role.partition(", ")[0].replace(" ", "\n") for role in members])
        lower = " (lower is better)" if lower_is_better(compared.measure) else ""
        axis.set(title=title, ylabel=f"{named(compared.measure)}{lower}")
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), borderaxespad=0)
    return figure


def make_curves(compared: Comparison) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups, roles, measure = compared.groups, compared.roles, named(compared.measure)
    unit = "epoch" if any("epoch" in line for run in compared.runs for line in run.evaluations) else "iteration"

    def text(group: Group, role: str) -> str:
        return textwrap.fill(
            f"{group.label}: {spread(group.scores(role, 'last').values())} (n = {len(group.runs)})", 56
        )

    lines = max(sum(text(group, role).count("\n") + 1 for group in groups) for role in roles)
    figure = Figure(figsize=(5.6 * len(roles), 4.2 + 0.2 * lines), layout="constrained")  # legends stand below
    for axis, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
        for number, group in enumerate(groups):
            points = curve(group, role)
            if not points:
                continue
            x, y, s = zip(*points, strict=True)
            style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            marker = "o" if len(x) <= 30 else None
            axis.plot(x, y, **style, marker=marker, markersize=3, linewidth=1.4, label=text(group, role))
            low, high = [m - d for m, d in zip(y, s, strict=True)], [m + d for m, d in zip(y, s, strict=True)]
            axis.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axis.set(title=role, xlabel=unit, ylabel=f"{measure} (%)" if compared.measure in PERCENT else measure)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3, linewidth=0.6)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "borderaxespad": 0}
        axis.legend(fontsize="small", title=f"last {measure}, mean ± std over seeds", title_fontsize="small", **below)
    return figure
