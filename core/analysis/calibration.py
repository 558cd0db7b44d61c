"""Figure 10: how far a network's confidence may be trusted (expected calibration error, reliability diagram)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import save_figure
from .attention import RunningSums
from .colors import GREEN, PURPLE


class Calibration(RunningSums):
    """Samples in ``bins`` equal bins of confidence, the largest softmax probability at temperature 1.

    Bin b holds confidences in ``(b / bins, (b + 1) / bins]``, edges rounded to the confidences' own precision, so that
    an edge belongs to the bin below it and 1.0 to the last. 15 bins are the usual choice; the paper gives none.
    """

    def __init__(self, bins: int = 15, device: torch.device | str = "cpu") -> None:
        super().__init__(3, bins, device=device)
        self.bins = bins

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, *, probabilities: bool = False) -> None:
        """Add a batch: logits ``[B, K]`` (their softmax with ``probabilities=True``), classes ``[B]``. No host sync."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        confidence, prediction = (scores if probabilities else scores.softmax(dim=1)).max(dim=1)  # [B], [B]
        bins = torch.arange(self.bins, device=scores.device)
        edges = bins[1:].to(confidence.dtype) / self.bins  # the inner ones
        member = bins[:, None] == torch.bucketize(confidence, edges)  # [bins, B]
        # A product with the membership rather than scatter_add, whose order of additions varies on a GPU.
        values = torch.stack([torch.ones_like(confidence), confidence, (prediction == target).to(confidence.dtype)])
        self._add(values[:, None] * member)  # [3, bins, B]

    def reliability(self) -> Tensor:
        """``[3, bins]``, float64, on the CPU: each bin's samples, mean confidence and accuracy (nan where none)."""
        count, confidence, correct = self.sums.cpu().double()
        return torch.stack([count, confidence / count, correct / count])

    def ece(self) -> float:
        """Expected calibration error in percent: ``100 sum_b |b| / n |accuracy_b - confidence_b|``.

        Raises: InputError without any sample.
        """
        count, confidence, correct = self.sums.cpu().double()
        if count.sum() == 0:
            raise InputError("no calibration error: not one sample was evaluated")
        return 100.0 * ((correct - confidence).abs().sum() / count.sum()).item()


def draw_reliability(calibrations: Mapping[str, Calibration], path: str | Path) -> None:
    """Figure 10: a reliability diagram for each name (role), side by side, over the share of samples per bin.

    Raises: InputError without anything to draw or where ``path`` cannot be written (see ``save_figure``).
    """
    if not calibrations:
        raise InputError("no reliability diagram: no network was given")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(0.6 + 4.2 * len(calibrations), 5.6), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = figure.subplots(2, len(calibrations), sharex=True, sharey="row", squeeze=False, height_ratios=[3.2, 1])
    for column, (name, calibration) in enumerate(calibrations.items()):
        _draw_diagram(axes[0, column], calibration.reliability(), f"{name}: ECE {calibration.ece():.2f} %")
        _draw_histogram(axes[1, column], calibration)
    for axis in axes.flat:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("samples (%)")
    legend = [
        Patch(facecolor=_ACCURACY, label="accuracy"),
        Patch(facecolor="none", edgecolor=_OVER, hatch="////", label="overconfident by"),
        Patch(facecolor="none", edgecolor=_UNDER, hatch="////", label="underconfident by"),
        Line2D([], [], color="black", marker="o", markersize=3.5, linewidth=1, label="accuracy over confidence"),
        Line2D([], [], color="0.3", linestyle="--", linewidth=1, label="perfect calibration"),
    ]
    columns = 2 if len(calibrations) == 1 else len(legend)
    figure.legend(handles=legend, fontsize="small", loc="outside upper center", ncols=columns)
    save_figure(figure, path)


_ACCURACY, _OVER, _UNDER = "0.85", PURPLE, GREEN


def _draw_diagram(axis: Any, reliability: Tensor, title: str) -> None:
    """Bars of accuracy with their gaps to the mean confidence, and accuracy over mean confidence."""
    used, width = reliability[0] > 0, 1.0 / reliability.shape[1]
    centre = ((torch.arange(len(used)) + 0.5) * width)[used].numpy()
    confidence, accuracy = reliability[1:, used].numpy()
    axis.bar(centre, accuracy, width, color=_ACCURACY, edgecolor="white")
    for color, gap in ((_OVER, confidence > accuracy), (_UNDER, confidence < accuracy)):
        low, high = accuracy[gap], confidence[gap]
        axis.bar(centre[gap], high - low, width, bottom=low, facecolor="none", edgecolor=color, hatch="////")
    axis.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
    axis.plot(confidence, accuracy, color="black", marker="o", markersize=3.5, linewidth=1)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_title(title, parse_math=False)


def _draw_histogram(axis: Any, calibration: Calibration) -> None:
    """The share of the samples in each bin, with the mean confidence and the accuracy over all of them."""
    count, confidence, correct = calibration.sums.cpu().double()
    total, width = count.sum(), 1.0 / calibration.bins
    centre = (torch.arange(calibration.bins) + 0.5) * width
    mean_confidence, accuracy = (confidence.sum() / total).item(), (correct.sum() / total).item()
    axis.bar(centre.numpy(), (count / total).numpy(), width, color="0.6", edgecolor="white", linewidth=0.6)
    axis.axvline(mean_confidence, color=PURPLE, label=f"mean confidence {100 * mean_confidence:.1f} %")
    axis.axvline(accuracy, color=GREEN, linestyle="--", label=f"accuracy {100 * accuracy:.1f} %")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.4), ncols=2, frameon=False)
    axis.set_xlabel(f"confidence (%), {int(total):,} samples, {calibration.bins} bins")
