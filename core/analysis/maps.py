"""Figure 1: where teacher and student agree, and where each of them looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adm import consensus_attention, divergence_attention
from ..errors import InputError
from ..files import save_figure

Size = tuple[int, int]  # height, width

UNITS = {  # a word in a map's name -> what its scale says
    "similarity": "cosine",
    "discrepancy": "1 - cosine",
    "attention": "weight (mean 1)",
    "CAM": "share of the image's peak",
}


def upsample(maps: Tensor, size: Size) -> Tensor:
    """``[B, h, w] -> [B, H, W]``, bilinear, as the attention itself is resized (align_corners=False)."""
    return F.interpolate(maps.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)


def cam(feature_map: Tensor, head: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Class activation map (Zhou et al., 2016) of any network: ``H W sum_c dz_y/dF_c F_c``, ``[B, H, W]``, signed.

    For a head of average pooling and one linear layer this is Zhou's ``sum_c w_yc F_c`` exactly, and with a ReLU before
    the pooling (pre-activation maps) ``sum_c w_yc relu(F_c)``: ReLU's slope times its input is its output. Its mean
    over locations is then the logit without its bias. For any other head it is the linear part at this very map.
    (Grad-CAM averages the gradient over locations first, which is wrong on pre-activation maps.)

    Args: ``feature_map [B, C, H, W]``; ``head`` the network's ``forward_head``, in evaluation mode; classes ``[B]``.
    Leaves every gradient as it was; works under ``no_grad`` and ``inference_mode``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = feature_map.detach().clone().requires_grad_()
        score = head(leaf).gather(1, target.clone().unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(score, leaf)
    height, width = feature_map.shape[-2:]
    return height * width * (gradient * leaf.detach()).sum(dim=1)


def relative_cam(activation: Tensor) -> Tensor:
    """A CAM's positive part relative to each image's peak, ``[B, H, W]`` in [0, 1]; 0 where nothing is positive."""
    positive = activation.clamp_min(0.0)
    return positive / positive.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(positive.dtype).tiny)


def box_share(weights: Tensor, boxes: Tensor, image_size: Size) -> Tensor:
    """Share of a non-negative map's mass that lies inside each image's object box: ``[B]`` in [0, 1], float64.

    A map's cell is a rectangle of the image with its weight spread evenly, so that a cell the box cuts counts by its
    covered area, and a uniform map gives exactly the box's share of the image: what any share is by chance.

    Args:
        weights: ``[B, h, w]`` at any resolution, e.g. an attention, 1 - S, ``relative_cam``.
        boxes: ``[B, 4]`` as x0, y0, x1, y1 in image pixels from the upper left corner, x1 and y1 exclusive: a box over
            the whole image is 0, 0, width, height. (Add 1 to inclusive corners.) Parts outside the image do not count.
        image_size: height and width of the image in pixels.
    Returns: nan for a map without any mass (average with ``nanmean``).
    Raises: InputError for a box with x1 < x0 or y1 < y0.
    """
    boxes, weights = boxes.double(), weights.double()
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise InputError("a box has x1 < x0 or y1 < y0: boxes are x0, y0, x1, y1 in pixels, not x, y, width, height")

    def covered(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:  # [B], [B] -> [B, cells]
        edges = torch.arange(cells + 1, device=boxes.device, dtype=torch.float64) * (pixels / cells)
        overlap = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
        return overlap.clamp_min(0.0) * (cells / pixels)

    rows = covered(boxes[:, 1], boxes[:, 3], image_size[0], weights.shape[1])
    columns = covered(boxes[:, 0], boxes[:, 2], image_size[1], weights.shape[2])
    return (weights * (rows[:, :, None] * columns[:, None, :])).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))


def pair_maps(similarity: Tensor, cam_teacher: Tensor, cam_student: Tensor) -> dict[str, Tensor]:
    """The maps of Figure 1 by name, ready for ``draw_maps``: from S and both networks' CAM, each ``[B, h, w]``."""
    return {
        "similarity S": similarity,
        "discrepancy 1 - S": 1.0 - similarity,
        "consensus attention": consensus_attention(similarity).squeeze(1),
        "divergence attention": divergence_attention(similarity).squeeze(1),
        "CAM teacher": relative_cam(cam_teacher),
        "CAM student": relative_cam(cam_student),
    }


def draw_maps(
    images: Tensor,
    maps: Mapping[str, Tensor],
    path: str | Path,
    labels: Sequence[str] | None = None,
    boxes: Tensor | None = None,
    pictures: Mapping[str, Tensor] | None = None,
    legend: Mapping[str, Sequence[int]] | None = None,
    side: float = 1.7,
) -> None:
    """Figure 1: a row for each image, the image first, then each map in colour over the grey image.

    The colours of a column mean the same in all its rows (scale below it). All maps with "attention" in their name
    share one two-sided scale around 1, the weight of plain average pooling: from 0 to 2, or further up where one of
    them goes further, so that the stronger one looks stronger.

    Args:
        images: uint8 ``[B, 1 or 3, H, W]``.
        maps: name -> ``[B, h, w]`` at any resolution, drawn in this order (see ``pair_maps``).
        labels: a text for each row, e.g. its class.
        boxes: object boxes ``[B, 4]`` to outline, as in ``box_share``.
        pictures: name -> uint8 ``[B, 3, H, W]`` to show as they are, between image and maps (class maps in colour).
        legend: name -> colour (red, green, blue, 0 to 255) of what ``pictures`` show, below everything.
        side: inches across an image.
    Raises: InputError where ``path`` cannot be written (see ``save_figure``).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch, Rectangle

    count, _, height, width = images.shape
    pictures, shape = pictures or {}, side * height / width
    columns = 1 + len(pictures) + len(maps)
    figure = Figure(
        figsize=(side * columns + 0.6, (shape + 0.06) * count + 1.0 + (0.4 if legend else 0.0)),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, rect=(0, 0, 0.985, 1)),  # the last scale's end label
    )
    # Below the images a row for the scale of each map.
    axes = figure.subplots(count + 1, columns, squeeze=False, height_ratios=[shape] * count + [0.09])
    for row, panels in enumerate(axes[:count]):
        for axis in panels:
            axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))  # image coordinates
            if boxes is not None:
                x0, y0, x1, y1 = boxes[row].tolist()
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="lime", linewidth=1.2))
    shown = {"image": images.expand(-1, 3, -1, -1), **pictures}
    for column, (name, values) in enumerate(shown.items()):
        axes[count, column].set_axis_off()
        axes[0, column].set_title(name, fontsize=9)
        for row, picture in enumerate(values.cpu().permute(0, 2, 3, 1).numpy()):
            axes[row, column].imshow(picture, extent=(0, width, height, 0))
    for row, text in enumerate(labels or []):
        axes[row, 0].set_ylabel(text, fontsize=8, parse_math=False)  # a class may be called $a$
    if legend:
        look: dict[str, Any] = {"edgecolor": "0.4", "linewidth": 0.5}
        patches = [Patch(facecolor=f"#{bytes(color).hex()}", label=name, **look) for name, color in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=2 * columns, fontsize=8, frameon=False)
    grey = images.cpu().float().mean(dim=1)
    drawn = {name: values.detach().float().cpu() for name, values in maps.items()}
    weights = [values - 1.0 for name, values in drawn.items() if "attention" in name]
    reach = max(1.0, *(values.abs().max().item() for values in weights), 0.0)
    for column, (name, values) in enumerate(drawn.items(), start=len(shown)):
        _draw_column(axes[:, column], name, values, grey, reach)
    save_figure(figure, path, dpi=150)


def _draw_column(axes: Any, name: str, values: Tensor, grey: Tensor, reach: float) -> None:
    """One map over every grey image ``[B, H, W]`` in one scale, which goes into the last of the ``B + 1`` axes.

    ``reach``: how far any attention is from 1.
    """
    height, width = grey.shape[-2:]
    extent = (0, width, height, 0)
    low, high, colors = values.min().item(), values.max().item(), "viridis"  # even in brightness, also in grey
    if "attention" in name:
        low, high, colors = 1.0 - reach, 1.0 + reach, "coolwarm"
    if high - low < 1e-6:  # a constant map: a scale of some width around it
        low, high = low - 0.5, high + 0.5
    for axis, below, above in zip(axes, grey, upsample(values, (height, width)), strict=False):
        axis.imshow(below.numpy(), cmap="gray", vmin=0, vmax=255, extent=extent)
        look = {"cmap": colors, "vmin": low, "vmax": high, "alpha": 0.65, "interpolation": "bilinear"}
        drawn = axis.imshow(above.numpy(), extent=extent, **look)
    axes[0].set_title(name, fontsize=9)
    bar = axes[-1].figure.colorbar(drawn, cax=axes[-1], orientation="horizontal")
    if "attention" in name:
        bar.ax.set_xlim(0.0, high)  # no weight is negative
    bar.set_label(next((unit for word, unit in UNITS.items() if word in name), ""), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=3)
