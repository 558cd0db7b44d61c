"""What a figure says of its numbers: which axis, which scale, and that a legend covers no curve."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from core.analysis import curves, maps
from core.analysis.curves import draw_curves
from core.analysis.maps import draw_maps


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are drawn, in their order."""
    kept: list[Figure] = []
    for module in (curves, maps):
        monkeypatch.setattr(module, "save_figure", lambda figure, *_, **__: kept.append(figure))
    return kept


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (axis for axis in figure.axes if axis.get_title() == title)
    return found


def training(count: int) -> list[dict[str, object]]:
    """Lines as diffusion's and SwitOKD's training log them, the rate a cosine."""
    return [
        {"kind": "train", "step": i, "lr": 0.05 * (1 + math.cos(math.pi * i / count)), "student/mse": 10.0 ** -(i % 4)}
        | {"adm/similarity": 0.5, "adm/similarity_min": 0.001, "adm/similarity_max": 0.9, "adm/attention_std": 0.1}
        | {"adm/active": 0.25, "teacher/paused": 0.5}
        for i in range(count)
    ]


def test_what_training_watches_is_no_loss_and_stands_on_a_linear_axis(figures: list[Figure]) -> None:
    draw_curves(training(12), "curves.png")
    titles = [axis.get_title() for axis in figures[0].axes if axis.axison]
    assert [title for title in titles if "loss" in title] == ["training loss: student"]
    assert panel(figures[0], "training loss: student").get_yscale() == "log"
    similarity = panel(figures[0], "similarity of the maps in training")
    assert similarity.get_yscale() == "linear" and similarity.get_ylabel() == "cosine S"
    lowest = next(line for line in similarity.lines if line.get_label() == "smallest")
    assert np.asarray(lowest.get_ydata()).tolist() == [0.001] * 12
    for title, value in (("images with ADM", 0.25), ("pauses", 0.5)):
        (line,) = panel(figures[0], title).lines
        assert set(np.asarray(line.get_ydata()).tolist()) == {value}
        assert panel(figures[0], title).get_ylim() == (-0.03, 1.03)


def test_a_smooth_learning_rate_has_no_cliffs_and_a_stepwise_one_keeps_them(figures: list[Figure]) -> None:
    draw_curves(training(12), "curves.png")
    steps = [{"kind": "train", "step": i, "lr": 0.1 ** (1 + i // 4), "student/ce": 1.0} for i in range(12)]
    draw_curves(steps, "curves.png")
    smooth, stepwise = (panel(figure, "learning rate") for figure in figures)
    assert (smooth.get_yscale(), smooth.lines[0].get_drawstyle()) == ("linear", "default")
    assert (stepwise.get_yscale(), stepwise.lines[0].get_drawstyle()) == ("log", "steps-pre")


def test_legends_cover_no_panel_and_markers_tell_curves_apart(figures: list[Figure]) -> None:
    terms = ("ce", "kd", "consensus", "feature", "phi")
    draw_curves([{"epoch": i, **{f"student/{term}": 1.0 for term in terms}} for i in (1.0, 2.0)], "curves.png")
    (figure,) = figures
    figure.savefig(Path("/dev/null"), format="png")
    for axis in figure.axes:
        legend = axis.get_legend()
        assert legend is not None and not legend.get_window_extent().overlaps(axis.get_window_extent())
        assert len({line.get_marker() for line in axis.lines}) == len(axis.lines) == len(terms)


@pytest.mark.parametrize(("strongest", "end"), [(1.3, 2.0), (4.0, 4.0)])
def test_all_attention_has_one_scale_from_zero(figures: list[Figure], strongest: float, end: float) -> None:
    ones = torch.ones(1, 2, 2)
    found = {"similarity S": 0.9 * ones, "consensus attention": ones, "divergence attention": strongest * ones}
    draw_maps(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), found, "maps.png")
    axes = figures[0].axes
    limits = [axis.images[1].get_clim() for axis in axes[2:4]]
    assert limits[0] == limits[1] == pytest.approx((2.0 - end, end))  # 1 in the middle, where the colour is neutral
    assert [axes[4 + i].get_xlim() for i in (2, 3)] == [pytest.approx((0.0, end))] * 2
    assert axes[1].images[1].get_cmap().name == "viridis"
