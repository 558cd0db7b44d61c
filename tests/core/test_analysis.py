"""Analysis: every number against an independent float64 loop, every figure written, filled and never half there."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from torch import Tensor, nn

from core.analysis import curves
from core.analysis.attention import KEYS, AttentionStatistics
from core.analysis.calibration import Calibration, draw_reliability
from core.analysis.curves import draw_curves
from core.analysis.maps import (
    box_share,
    cam,
    draw_maps,
    pair_maps,
    relative_cam,
    upsample,
)
from core.errors import InputError, TrainingError
from core.files import save_figure


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------- attention statistics (Table 17)


def attention_by_loops(similarity: Tensor) -> dict[str, float]:
    rows = []
    for image in similarity.double().numpy():
        row = []
        for weight in (1 + image, 1 - image):
            cells = [w / (weight.sum() / weight.size + 1e-5) for w in weight.flatten()]
            mean = sum(cells) / len(cells)
            row += [min(cells), max(cells), sum((c - mean) ** 2 for c in cells) / len(cells)]
        rows.append([*row, image.sum() / image.size])
    return dict(zip(KEYS, np.mean(rows, axis=0), strict=True))


def test_attention_statistics_equal_loops_over_uneven_batches() -> None:
    similarity = cosines(11, 4, 7)
    statistics = AttentionStatistics()
    for batch in similarity.split(4):
        statistics.update(batch)
    assert statistics.compute() == pytest.approx(attention_by_loops(similarity), rel=1e-5)


def test_attention_extremes_are_of_each_image_and_then_averaged() -> None:
    flat, edge = torch.zeros(1, 2, 2), torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]])
    statistics = AttentionStatistics()
    statistics.update(torch.cat([flat, edge]))
    values = statistics.compute()
    # The flat image weighs 1 everywhere, the other from 0 to 2: over the data set the minimum would be 0.
    assert values["attention/consensus_min"] == pytest.approx(0.5, abs=1e-4)
    assert values["attention/divergence_max"] == pytest.approx(1.5, abs=1e-4)
    assert values["attention/divergence_variance"] == pytest.approx(0.25, abs=1e-4)
    assert values["attention/similarity"] == 0.0


def test_attention_statistics_where_the_maps_agree_everywhere() -> None:
    statistics = AttentionStatistics()
    statistics.update(torch.ones(3, 5, 5))
    values = statistics.compute()
    assert [values[f"attention/divergence_{name}"] for name in ("min", "max", "variance")] == [0.0, 0.0, 0.0]
    assert values["attention/consensus_min"] == pytest.approx(1.0, abs=1e-4)
    assert values["attention/consensus_max"] == pytest.approx(1.0, abs=1e-4)
    assert values["attention/similarity"] == 1.0


def test_attention_statistics_reduce_by_addition() -> None:
    similarity = cosines(9, 4, 4)
    whole, first, second, idle = (AttentionStatistics() for _ in range(4))
    whole.update(similarity)
    first.update(similarity[:2])
    second.update(similarity[2:])
    reduced = torch.stack([process.sums for process in (first, second, idle)]).sum(dim=0)
    for process in (first, idle):
        process.sums = reduced
        assert process.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_accumulating_never_reads_the_device() -> None:
    # A meta tensor has no values: whatever reads one back to the host raises.
    statistics, calibration = AttentionStatistics(device="meta"), Calibration(device="meta")
    statistics.update(torch.rand(4, 3, 3, device="meta"))
    calibration.update(torch.rand(4, 10, device="meta"), torch.zeros(4, dtype=torch.long, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        statistics.compute()


def test_statistics_of_nothing_are_an_error() -> None:
    with pytest.raises(InputError, match="not one image"):
        AttentionStatistics().compute()
    with pytest.raises(InputError, match="not one sample"):
        Calibration().ece()


# ---------------------------------------------------------------- calibration (Figure 10)


def ece_by_loops(logits: Tensor, target: Tensor, bins: int) -> float:
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.double().numpy(), target.tolist(), strict=True):
        exponentials = np.exp(row - row.max())
        probabilities = exponentials / exponentials.sum()
        confidence = probabilities.max()
        number = next(b for b in range(bins) if confidence <= (b + 1) / bins or b == bins - 1)
        members[number].append((confidence, float(probabilities.argmax() == label)))
    gaps = [abs(sum(c for c, _ in member) - sum(right for _, right in member)) for member in members]
    return 100 * sum(gaps) / len(target)


def logits_and_target(count: int, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2.5 * torch.randn(count, classes, generator=generator)
    noisy = logits + 2.0 * torch.randn(count, classes, generator=generator)
    return logits, noisy.argmax(dim=1)


def with_confidence(confidence: Tensor, classes: int = 40) -> Tensor:
    """Probabilities ``[N, classes]`` whose largest is exactly ``confidence``, of class 0."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes - 1)
    return torch.cat([confidence[:, None], rest], dim=1)


def ece_of(logits: Tensor, target: Tensor, bins: int = 15, *, probabilities: bool = False) -> float:
    calibration = Calibration(bins)
    calibration.update(logits, target, probabilities=probabilities)
    return calibration.ece()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_equals_loops(bins: int) -> None:
    logits, target = logits_and_target(500)
    expected = ece_by_loops(logits, target, bins)
    assert 1.0 < expected < 50.0
    assert ece_of(logits, target, bins) == pytest.approx(expected, abs=1e-4)
    probabilities = logits.softmax(dim=1)
    assert ece_of(probabilities, target, bins, probabilities=True) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(dtype: torch.dtype) -> None:
    for bins in (10, 15):
        edges = torch.arange(1, bins + 1, dtype=torch.float64).div(bins).to(dtype)
        for number, edge in enumerate(edges):
            calibration = Calibration(bins)
            calibration.update(with_confidence(edge[None]), torch.zeros(1, dtype=torch.long), probabilities=True)
            assert calibration.reliability()[0].nonzero().item() == number
        above = torch.nextafter(edges[:-1], torch.ones((), dtype=dtype))
        calibration = Calibration(bins)
        calibration.update(with_confidence(above), torch.zeros(bins - 1, dtype=torch.long), probabilities=True)
        assert calibration.reliability()[0].tolist() == [0] + [1] * (bins - 1)


def test_certainty_falls_into_the_last_bin() -> None:
    calibration = Calibration(15)
    calibration.update(torch.tensor([[0.0, -math.inf], [90.0, -90.0]]), torch.tensor([0, 1]))
    samples, confidence, accuracy = calibration.reliability()
    assert samples.tolist() == [0] * 14 + [2]
    assert confidence[-1] == 1.0 and accuracy[-1] == 0.5
    assert confidence[:-1].isnan().all()
    assert calibration.ece() == 50.0


def test_perfect_calibration_is_zero_and_a_known_gap_is_itself() -> None:
    confidence = torch.tensor([0.75] * 4 + [0.5] * 2)
    target = torch.tensor([0, 0, 0, 1, 0, 1])  # 3 of 4 and 1 of 2 right
    assert ece_of(with_confidence(confidence), target, probabilities=True) == 0.0
    # All six wrong: 4/6 of the samples are off by 0.75, 2/6 by 0.5.
    assert ece_of(with_confidence(confidence), torch.ones(6, dtype=torch.long), probabilities=True) == pytest.approx(
        100 * (4 * 0.75 + 2 * 0.5) / 6
    )


def test_gaps_of_one_bin_cancel_and_those_of_two_do_not() -> None:
    probabilities = with_confidence(torch.tensor([0.75, 0.75]))
    right_and_wrong = torch.tensor([0, 1])
    assert ece_of(probabilities, right_and_wrong, probabilities=True) == pytest.approx(25.0)
    apart = with_confidence(torch.tensor([0.75, 0.25]))
    assert ece_of(apart, right_and_wrong, probabilities=True) == pytest.approx(25.0)
    assert ece_of(apart, right_and_wrong, bins=1, probabilities=True) == pytest.approx(0.0)


def test_summed_halves_equal_the_whole() -> None:
    logits, target = logits_and_target(301)
    whole, first, second = Calibration(15), Calibration(15), Calibration(15)
    whole.update(logits, target)
    first.update(logits[:100], target[:100])
    for batch, labels in zip(logits[100:].split(64), target[100:].split(64), strict=True):
        second.update(batch, labels)
    first.sums += second.sums
    assert torch.equal(first.reliability()[0], whole.reliability()[0])
    torch.testing.assert_close(first.sums, whole.sums, rtol=1e-12, atol=0)
    assert first.ece() == pytest.approx(whole.ece(), rel=1e-9)


def test_half_precision_logits_are_softened_in_float32() -> None:
    logits, target = logits_and_target(200)
    logits = logits.bfloat16()
    calibration = Calibration()
    calibration.update(logits, target)
    assert calibration.ece() == pytest.approx(ece_by_loops(logits, target, 15), abs=1e-4)


# ---------------------------------------------------------------- maps (Figure 1)


def bilinear_by_loops(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    result = np.empty(size)
    for i in range(size[0]):
        for j in range(size[1]):
            # Pixel centres, repeated at the border.
            y = min(max((i + 0.5) * values.shape[0] / size[0] - 0.5, 0), values.shape[0] - 1)
            x = min(max((j + 0.5) * values.shape[1] / size[1] - 0.5, 0), values.shape[1] - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, values.shape[0] - 1), min(x0 + 1, values.shape[1] - 1)
            top = values[y0, x0] * (1 - x + x0) + values[y0, x1] * (x - x0)
            bottom = values[y1, x0] * (1 - x + x0) + values[y1, x1] * (x - x0)
            result[i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return result


def test_similarity_at_the_size_of_the_image() -> None:
    similarity = cosines(2, 3, 4)
    expected = np.stack([bilinear_by_loops(image, (12, 10)) for image in similarity.double().numpy()])
    np.testing.assert_allclose(upsample(similarity, (12, 10)).numpy(), expected, atol=1e-6)


class Head(nn.Module):
    def __init__(self, channels: int, classes: int, preactivation: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)
        self.preactivation = preactivation

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.fc((F.relu(feature_map) if self.preactivation else feature_map).mean(dim=(2, 3)))


@pytest.mark.parametrize("preactivation", [False, True])
def test_cam_equals_zhous_sum_over_channels(preactivation: bool) -> None:
    torch.manual_seed(0)
    head = Head(4, 6, preactivation)  # as many channels as images: weights must not cross images
    feature_map, target = torch.randn(4, 4, 3, 5), torch.tensor([5, 0, 2, 2])
    result = cam(feature_map, head, target)
    weight = head.fc.weight.detach().double().numpy()
    for b in range(4):
        for i in range(3):
            for j in range(5):
                features = feature_map[b, :, i, j].double().numpy()
                if preactivation:
                    features = np.maximum(features, 0)
                expected = sum(weight[target[b], c] * features[c] for c in range(4))
                assert result[b, i, j].item() == pytest.approx(expected, abs=1e-5)
    logits = head(feature_map).detach().gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(result.mean(dim=(1, 2)) + head.fc.bias.detach()[target], logits)


def test_cam_leaves_gradients_alone_and_works_without_them() -> None:
    torch.manual_seed(0)
    head, features = Head(3, 2, True), torch.randn(2, 3, 2, 2)
    target = torch.tensor([0, 1])
    expected = cam(features, head, target)
    assert all(parameter.grad is None for parameter in head.parameters())
    assert not expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(cam(features, head, target), expected)
    with torch.inference_mode():
        torch.testing.assert_close(cam(features + 0, head, target + 0), expected)
    head.requires_grad_(False)
    torch.testing.assert_close(cam(features, head, target), expected)


def test_cam_of_a_head_that_is_not_linear_is_its_linear_part() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    features, target = torch.randn(1, 5, 2, 3, dtype=torch.float64), torch.tensor([1])
    step = 1e-6
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for c in range(5):
        for i in range(2):
            for j in range(3):
                moved = [features.clone(), features.clone()]
                moved[0][0, c, i, j] += step
                moved[1][0, c, i, j] -= step
                with torch.no_grad():
                    slope = (head(moved[0])[0, 1] - head(moved[1])[0, 1]) / (2 * step)
                expected[i, j] += 6 * slope * features[0, c, i, j]
    torch.testing.assert_close(cam(features, head, target)[0], expected, rtol=1e-6, atol=1e-7)


def test_relative_cam_is_the_positive_part_over_each_images_peak() -> None:
    activation = torch.tensor([[[4.0, -2.0], [1.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
    assert relative_cam(activation).tolist() == [[[1.0, 0.0], [0.25, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]


def box_share_by_loops(weights: np.ndarray, box: list[float], size: tuple[int, int]) -> float:
    cell_height, cell_width = size[0] / weights.shape[0], size[1] / weights.shape[1]
    inside = 0.0
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            tall = min(box[3], (i + 1) * cell_height) - max(box[1], i * cell_height)
            wide = min(box[2], (j + 1) * cell_width) - max(box[0], j * cell_width)
            if tall > 0 and wide > 0:
                inside += weights[i, j] * tall * wide / (cell_height * cell_width)
    return inside / weights.sum()


BOXES = torch.tensor(
    [
        [3.0, 2.0, 17.0, 21.0],  # cuts cells
        [0.0, 0.0, 40.0, 24.0],  # the whole image
        [7.25, 3.5, 8.75, 4.25],  # smaller than a cell
        [-5.0, -5.0, 10.0, 50.0],  # reaches outside
        [10.0, 6.0, 20.0, 12.0],  # whole cells
        [9.0, 9.0, 9.0, 20.0],  # no area
    ]
)


def test_box_share_equals_loops() -> None:
    weights = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = [
        box_share_by_loops(map_, box, (24, 40))
        for map_, box in zip(weights.double().numpy(), BOXES.tolist(), strict=True)
    ]
    np.testing.assert_allclose(box_share(weights, BOXES, (24, 40)).numpy(), expected, rtol=1e-12)
    assert expected[1] == pytest.approx(1.0) and expected[5] == 0.0 and 0 < expected[2] < 0.1


def test_box_share_of_a_uniform_map_is_the_boxs_area() -> None:
    expected = [14 * 19 / 960, 1.0, 1.5 * 0.75 / 960, 10 * 24 / 960, 60 / 960, 0.0]
    for size in ((4, 5), (7, 7), (1, 1), (24, 40)):  # also where cells and pixels share no edge
        share = box_share(torch.full((6, *size), 0.3), BOXES, (24, 40))
        np.testing.assert_allclose(share.numpy(), expected, rtol=1e-12)


def test_box_share_by_hand() -> None:
    weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    # Half of the left and a quarter of the right column's width is covered, upper row only: 0.5 * 1 + 0.5 * 2.
    assert box_share(weights, torch.tensor([[4.0, 0.0, 12.0, 8.0]]), (16, 16)).item() == pytest.approx(1.5 / 10)
    assert box_share(torch.zeros(1, 2, 2), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), (16, 16)).isnan().all()


def test_box_share_refuses_what_has_no_share() -> None:
    with pytest.raises(InputError, match="not x, y, width, height"):
        box_share(torch.ones(1, 1, 1), torch.tensor([[5.0, 5.0, 3.0, 8.0]]), (16, 16))


# ---------------------------------------------------------------- figures


def digits(count: int) -> Tensor:
    """Real handwritten digits, uint8 ``[count, 1, 8, 8]``."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[:count] * 15).to(torch.uint8).unsqueeze(1)


def colours(path: Path) -> int:
    pixels = (imread(path)[..., :3] * 255).round().astype(np.int64)
    return len(np.unique(pixels @ [65536, 256, 1]))


def points(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def drawn(monkeypatch: pytest.MonkeyPatch, module: str) -> list[Figure]:
    """The figures that a module hands to ``save_figure``, which still writes them."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: str | Path, **options: int) -> None:
        figures.append(figure)
        save_figure(figure, path, **options)

    monkeypatch.setattr(f"core.analysis.{module}.save_figure", keep)
    return figures


def test_maps_are_drawn_over_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch, "maps")
    similarity = cosines(2, 4, 4)
    maps = pair_maps(similarity, cosines(2, 4, 4, seed=1), cosines(2, 2, 2, seed=2))
    boxes = torch.tensor([[1.0, 1.0, 6.0, 7.0], [0.0, 0.0, 8.0, 8.0]])
    draw_maps(digits(2), maps, tmp_path / "maps.png", labels=["zero", "one"], boxes=boxes)
    assert colours(tmp_path / "maps.png") > 100
    panels = [axis for axis in figures[0].axes if axis.images]
    assert len(panels) == 2 * (1 + len(maps))
    assert [axis.get_title() for axis in figures[0].axes[:7]] == ["image", *maps]
    shown = np.asarray(panels[1].images[1].get_array())
    np.testing.assert_allclose(shown, upsample(similarity, (8, 8))[0].numpy(), atol=1e-6)
    scales = [axis.images[1].get_clim() for axis in (panels[3], panels[7 + 3])]  # consensus attention, both rows
    assert scales[0] == scales[1] and sum(scales[0]) == pytest.approx(2.0)


def test_a_constant_map_and_a_colour_image_can_be_drawn(tmp_path: Path) -> None:
    ones = torch.ones(1, 3, 3)
    draw_maps(digits(1).expand(-1, 3, -1, -1), pair_maps(ones, -ones, ones), tmp_path / "maps.png")
    assert colours(tmp_path / "maps.png") > 100


def test_reliability_is_drawn_for_each_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch, "calibration")
    logits, target = logits_and_target(300)
    teacher, student = Calibration(), Calibration()
    teacher.update(logits, target)
    student.update(3 * logits, target)  # more confident, no more often right
    draw_reliability({"teacher": teacher, "student": student}, tmp_path / "reliability.png")
    assert colours(tmp_path / "reliability.png") > 20
    titles = [axis.get_title() for axis in figures[0].axes[:2]]
    assert titles == [f"teacher: ECE {teacher.ece():.2f} %", f"student: ECE {student.ece():.2f} %"]
    samples, confidence, accuracy = teacher.reliability()
    used = samples > 0
    heights = [bar.get_height() for bar in figures[0].axes[0].containers[0]]
    assert heights == pytest.approx(accuracy[used].tolist())
    gaps = sorted(bar.get_height() for group in figures[0].axes[0].containers[1:] for bar in group)
    expected = (confidence - accuracy)[used]
    assert gaps == pytest.approx(sorted(expected[expected != 0].tolist()))


def test_reliability_without_gaps_and_without_networks(tmp_path: Path) -> None:
    perfect = Calibration()
    perfect.update(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    draw_reliability({"student": perfect}, tmp_path / "perfect.svg")
    assert (tmp_path / "perfect.svg").read_text().rstrip().endswith("</svg>")
    with pytest.raises(InputError, match="no network"):
        draw_reliability({}, tmp_path / "none.png")
    with pytest.raises(InputError, match="not one sample"):
        draw_reliability({"student": Calibration()}, tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["perfect.svg"]


def run_lines(epochs: int, lines_per_epoch: int = 3) -> list[dict]:
    lines: list[dict] = []
    for epoch in range(epochs):
        for part in range(lines_per_epoch):
            at = epoch + (part + 1) / lines_per_epoch
            lines.append(
                {"kind": "train", "step": int(10 * at), "epoch": at, "lr": 0.1, "images_per_second": 900.0}
                | {"teacher/ce": 2 / (1 + at), "teacher/divergence": 0.1 / (1 + at)}
                | {"student/ce": 3 / (1 + at), "student/kd": 0.5, "student/consensus": 0.2}
            )
        for split, shift in (("validation", 1.0), ("test", 0.0)):
            lines.append(
                {"kind": "evaluation", "step": 10 * epoch + 10, "epoch": epoch + 1.0, "split": split}
                | {"teacher/top1": 70.0 + epoch + shift, "student/top1": 60.0 - epoch + shift, "student/ece": 5.0}
                | {key: 0.1 * i for i, key in enumerate(KEYS)}
            )
    return lines


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.axison]


def test_curves_show_what_the_metrics_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch, "curves")
    draw_curves(run_lines(4), tmp_path / "curves.png")
    assert colours(tmp_path / "curves.png") > 50
    assert titles(figures[0]) == [
        "training loss: teacher",
        "training loss: student",
        "top-1 accuracy",
        "expected calibration error",
        "learning rate",
        "extremes of the attention (validation)",
        "variance of the attention (validation)",
        "similarity of the maps (validation)",
    ]
    teacher, student, top1 = figures[0].axes[:3]
    assert [line.get_label() for line in student.lines] == ["ce", "consensus", "kd"]
    assert teacher.lines[0].get_color() == student.lines[0].get_color()
    epochs, ce = points(teacher.lines[0])
    assert epochs == pytest.approx([(i + 1) / 3 for i in range(12)])
    assert ce == pytest.approx([2 / (1 + (i + 1) / 3) for i in range(12)])
    by_label = {line.get_label(): points(line)[1] for line in top1.lines}
    assert by_label == {
        "teacher validation: last 74.00, best 74.00": [71.0, 72.0, 73.0, 74.0],
        "teacher test: last 73.00, best 73.00": [70.0, 71.0, 72.0, 73.0],
        "student validation: last 58.00, best 61.00": [61.0, 60.0, 59.0, 58.0],
        "student test: last 57.00, best 60.00": [60.0, 59.0, 58.0, 57.0],
    }


def test_curves_of_one_point_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch, "curves")
    draw_curves([{"kind": "train", "step": 1, "lr": 0.1, "student/ce": 2.0}], tmp_path / "one.png")
    assert titles(figures[0]) == ["training loss: student", "learning rate"]
    assert figures[0].axes[0].get_xlabel() == "step"
    assert all(line.get_marker() == "o" for axis in figures[0].axes for line in axis.lines)
    draw_curves([{"kind": "evaluation", "epoch": 0.0, "student/top1": 1.0}], tmp_path / "start.png")
    assert titles(figures[1]) == ["top-1 accuracy"]
    assert colours(tmp_path / "one.png") > 10 and colours(tmp_path / "start.png") > 10


def test_curves_pass_over_what_is_missing_or_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch, "curves")
    lines = [
        {"kind": "train", "epoch": 1.0, "student/ce": 2.0},
        {"kind": "train", "epoch": 2.0, "student/ce": math.nan, "student_2/ce": 1.0, "teacher_2/ce": 1.0},
        {"kind": "train", "epoch": 3.0, "student/ce": 1.0, "teacher/ce": None, "student/top1": 40.0},
        {"kind": "train", "student/ce": 9.0},
        {"kind": "evaluation", "epoch": 3.0, "split": "test", "attention/similarity": 0.4},
        {},
    ]
    draw_curves(lines, tmp_path / "curves.png")
    assert titles(figures[0]) == [
        "training loss: teacher_2",
        "training loss: student",
        "training loss: student_2",
        "similarity of the maps (test)",
    ]
    assert points(figures[0].axes[1].lines[0]) == ([1.0, 3.0], [2.0, 1.0])


def test_curves_without_anything_to_draw_are_an_error(tmp_path: Path) -> None:
    for lines in ([], [{"kind": "train", "step": 1}]):
        with pytest.raises(InputError, match="no loss, accuracy"):
            draw_curves(lines, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_long_curves_are_smoothed_over_the_raw_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch, "curves")
    values = np.random.default_rng(0).random(300) + 1
    draw_curves([{"step": i, "student/ce": value} for i, value in enumerate(values)], tmp_path / "long.png")
    raw, smooth = figures[0].axes[0].lines
    assert titles(figures[0]) == ["training loss: student (running mean)"]
    assert points(raw)[1] == values.tolist()
    expected = [values[max(0, i - 5) : i + 1].mean() for i in range(300)]  # the last 300 / 50
    assert points(smooth)[1] == pytest.approx(expected)
    assert len(values) >= curves.SMOOTHED_FROM


def a_figure() -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


def test_a_figure_for_a_missing_folder_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*gone; create it"):
        save_figure(a_figure(), tmp_path / "gone" / "figure.png")
    with pytest.raises(InputError, match=r"must end in one of .*\.png"):
        save_figure(a_figure(), tmp_path / "figure.xyz")
    with pytest.raises(InputError, match="must end in"):
        save_figure(a_figure(), tmp_path / "figure")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_figure_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "figure.png"
    save_figure(a_figure(), path)
    old = path.read_bytes()

    def half(self: Figure, target: Path, **options: object) -> None:
        target.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(Figure, "savefig", half)
    expected = TrainingError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is TrainingError else None):
        save_figure(a_figure(), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["figure.png"]
