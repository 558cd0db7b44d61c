"""Figures of the page of a run: accuracy by class, and which confusions changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from core.files import save_figure

WIDEST = 24  # characters of a class name


def short(name: str) -> str:
    """A class name as it fits beside an axis: the first of its synonyms, cut."""
    first = name.split(",")[0]
    return first if len(first) <= WIDEST else f"{first[: WIDEST - 1]}…"


def draw_classes(
    names: Sequence[str],
    counts: Sequence[int],
    accuracies: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
    path: Path,
) -> None:
    """A row for each class with a dot for each network.

    Args: class names; how many images of each were evaluated; by network the accuracies in percent; its colour; the
        file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.3 + 0.3 * len(names)), layout="constrained")
    axis = figure.subplots()
    rows = range(len(names))
    columns = list(zip(*accuracies.values(), strict=True))
    axis.hlines(rows, [min(c) for c in columns], [max(c) for c in columns], color="0.75", linewidth=1.5, zorder=1)
    markers = "osD^v<>"
    for number, (label, values) in enumerate(accuracies.items()):
        beside = [row + 0.15 * (number - (len(accuracies) - 1) / 2) for row in rows]  # equal values stay apart
        look: dict[str, Any] = {"color": colors[label], "edgecolor": "white", "linewidth": 0.6, "s": 36}
        axis.scatter(values, beside, marker=markers[number % len(markers)], label=label, zorder=2, alpha=0.9, **look)
    labels = [f"{short(name)} (n = {count:,})" for name, count in zip(names, counts, strict=True)]
    axis.set_yticks(rows, labels, parse_math=False)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("right answers (% of the images of the class)")
    axis.grid(axis="x", alpha=0.3, linewidth=0.6)
    for text in figure.legend(fontsize="small", loc="outside upper center", ncols=len(accuracies)).get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def draw_changes(change: Tensor, names: Sequence[str], path: Path) -> None:
    """How many images more (or fewer) of each class are taken for each other one.

    Args: ``[K, K]``, after less before; the diagonal, which is no confusion, is left out.
    """
    from matplotlib.figure import Figure

    classes, reach = len(names), max(1, int(change.abs().fill_diagonal_(0).max()))
    side = 1.7 + 0.22 * classes
    figure = Figure(figsize=(side + 0.7, side), layout="constrained")
    axis = figure.subplots()
    shown = change.clone().double().fill_diagonal_(float("nan"))
    axis.set_facecolor("0.85")
    drawn = axis.imshow(shown.numpy(), cmap="PuOr_r", vmin=-reach, vmax=reach)
    for true, said in change.clone().fill_diagonal_(0).nonzero().tolist() if classes <= 20 else ():
        value = int(change[true, said])
        color = "white" if abs(value) > 0.6 * reach else "black"
        axis.text(said, true, f"{value:+d}", ha="center", va="center", fontsize=7, color=color)
    labels = [short(name) for name in names]
    axis.set_xticks(range(classes), labels, rotation=90, fontsize="small", parse_math=False)
    axis.set_yticks(range(classes), labels, fontsize="small", parse_math=False)
    axis.set(xlabel="taken for", ylabel="true class")
    figure.colorbar(drawn, ax=axis, shrink=0.8, label="images more or fewer")
    save_figure(figure, path, dpi=100)
