"""ADM (Eq. 6 to 9, 11, 12) against plain Python loops over the formulas, who gets a gradient, and the hard corners."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import core
from core import InputError
from core.adm import (
    ADMConfig,
    ADMLoss,
    Control,
    attend,
    consensus_attention,
    control,
    divergence_attention,
    resize_similarity,
    spatial_similarity,
)

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
B, C, H, W, K = 3, 4, 3, 5, 6

Vector = list[float]
Grid = list[list[float]]


# The formulas in plain Python: floats and lists, one sum at a time.


def loop_similarity(map_student: Tensor, map_teacher: Tensor) -> list[Grid]:
    """Eq. 6."""
    images = []
    for s, t in zip(map_student.tolist(), map_teacher.tolist(), strict=True):
        grid = []
        for i in range(len(s[0])):
            row = []
            for j in range(len(s[0][0])):
                u, v = [c[i][j] for c in s], [c[i][j] for c in t]
                dot = sum(a * b for a, b in zip(u, v, strict=True))
                row.append(dot / (math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v))))
            grid.append(row)
        images.append(grid)
    return images


def loop_attention(similarity: list[Grid], sign: int) -> list[Grid]:
    """(1 + S) / (1 + S_bar) for sign 1, (1 - S) / (1 - S_bar) for sign -1, with Algorithm 1's 1e-5 below the line."""
    images = []
    for grid in similarity:
        values = [x for row in grid for x in row]
        mean = sum(values) / len(values)
        images.append([[(1 + sign * x) / (1 + sign * mean + 1e-5) for x in row] for row in grid])
    return images


def loop_logits(attention: list[Grid], feature_map: Tensor, weight: Tensor, bias: Tensor) -> list[Vector]:
    """W(GAP(a * F)) of a linear classifier."""
    result = []
    for a, f in zip(attention, feature_map.tolist(), strict=True):
        locations = [(i, j) for i in range(len(a)) for j in range(len(a[0]))]
        pooled = [sum(a[i][j] * channel[i][j] for i, j in locations) / len(locations) for channel in f]
        rows = zip(weight.tolist(), bias.tolist(), strict=True)
        result.append([sum(w * x for w, x in zip(row, pooled, strict=True)) + b for row, b in rows])
    return result


def loop_log_softmax(logits: Vector) -> Vector:
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - log_sum for z in logits]


def loop_soft_cross_entropy(logits: list[Vector], targets: list[Vector]) -> float:
    losses = []
    for z, q in zip(logits, targets, strict=True):
        losses.append(-sum(p * log_p for p, log_p in zip(q, loop_log_softmax(z), strict=True)))
    return sum(losses) / len(losses)


def loop_one_hot(target: Tensor, classes: int = K) -> list[Vector]:
    return [[float(k == y) for k in range(classes)] for y in target.tolist()]


def loop_kd(logits: list[Vector], target_logits: list[Vector], tau: float) -> float:
    """Eq. 2: tau^2 KL(p_n || p_m)."""
    losses = []
    for z_m, z_n in zip(logits, target_logits, strict=True):
        log_m, log_n = loop_log_softmax([z / tau for z in z_m]), loop_log_softmax([z / tau for z in z_n])
        losses.append(tau**2 * sum(math.exp(n) * (n - m) for m, n in zip(log_m, log_n, strict=True)))
    return sum(losses) / len(losses)


def loop_pool(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling: cell i covers floor(i H / h) .. ceil((i + 1) H / h)."""
    b, c, height, width = feature_map.shape
    pooled = torch.zeros(b, c, *size, dtype=feature_map.dtype)
    for i in range(size[0]):
        rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
        for j in range(size[1]):
            columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
            pooled[:, :, i, j] = feature_map[:, :, rows, columns].mean(dim=(2, 3))
    return pooled


def loop_bilinear(similarity: list[Grid], size: tuple[int, int]) -> list[Grid]:
    """Bilinear resizing with pixel centres at (i + 0.5) (align_corners=False), the border repeated."""

    def taps(position: int, length: int, new_length: int) -> list[tuple[int, float]]:
        source = max((position + 0.5) * length / new_length - 0.5, 0.0)
        low = min(int(source), length - 1)
        high = min(low + 1, length - 1)
        return [(low, 1 - (source - low)), (high, source - low)]

    images = []
    for grid in similarity:
        rows = [taps(i, len(grid), size[0]) for i in range(size[0])]
        columns = [taps(j, len(grid[0]), size[1]) for j in range(size[1])]
        images.append([[sum(a * b * grid[i][j] for i, a in r for j, b in c) for c in columns] for r in rows])
    return images


# The inputs.


class LinearHead(nn.Module):
    """Average pooling and a linear classifier; remembers each call and whether gradients were on."""

    def __init__(self, channels: int = C, classes: int = K, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes, dtype=dtype)
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.fc(x.mean(dim=(2, 3)))


def random_maps(
    channels: tuple[int, int] = (C, C),
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((H, W), (H, W)),
    batch: int = B,
) -> tuple[Tensor, Tensor, Tensor]:
    """(student map, teacher map, target) in float64; the maps ask for gradients."""
    s, t = (torch.randn(batch, c, *size, dtype=torch.float64) for c, size in zip(channels, sizes, strict=True))
    return s.requires_grad_(), t.requires_grad_(), torch.randint(K, (batch,))


def reached(loss: Tensor, **tensors: Tensor) -> set[str]:
    """The names of those tensors that the loss sends a gradient to, which must be a real one (finite, not all 0)."""
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    names = set()
    for name, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            assert gradient.isfinite().all() and gradient.abs().max() > 0, name
            names.add(name)
    return names


# Formulas.


def test_similarity_is_the_cosine_at_each_location() -> None:
    s, t, _ = random_maps()
    similarity = core.spatial_similarity(s, t)
    assert similarity.shape == (B, H, W)
    torch.testing.assert_close(similarity, torch.tensor(loop_similarity(s, t), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(("attention", "sign"), [(core.consensus_attention, 1), (core.divergence_attention, -1)])
def test_attention(attention: Callable[[Tensor], Tensor], sign: int) -> None:
    similarity = torch.rand(B, H, W, dtype=torch.float64) * 2 - 1
    expected = torch.tensor(loop_attention(similarity.tolist(), sign), dtype=torch.float64)
    assert attention(similarity).shape == (B, 1, H, W)
    torch.testing.assert_close(attention(similarity).squeeze(1), expected, **EXACT)


@pytest.mark.parametrize("size", [(H, W), (4, 4)], ids=["plain", "batch, channels, height and width equal"])
def test_consensus_and_divergence_losses(size: tuple[int, int]) -> None:
    """Eq. 7, 8, 9. With B == C == H == W the attention of Algorithm 1 as printed runs, on other images' weights."""
    s, t, y = random_maps(sizes=(size, size), batch=C if size == (4, 4) else B)
    head_s, head_t = LinearHead(), LinearHead()
    similarity, loops = core.spatial_similarity(s, t), loop_similarity(s, t)
    logits_s = loop_logits(loop_attention(loops, 1), s, head_s.fc.weight, head_s.fc.bias)
    logits_t = loop_logits(loop_attention(loops, -1), t, head_t.fc.weight, head_t.fc.bias)
    consensus = core.consensus_loss(similarity, s, y, head_s)
    divergence = core.divergence_loss(similarity, t, y, head_t)
    assert consensus.item() == pytest.approx(loop_soft_cross_entropy(logits_s, loop_one_hot(y)), rel=1e-10)
    assert divergence.item() == pytest.approx(loop_soft_cross_entropy(logits_t, loop_one_hot(y)), rel=1e-10)
    total = core.ADMLoss(0.2, 0.6)(s, t, y, head_s, head_t)  # Eq. 9
    assert total.item() == pytest.approx(0.2 * consensus.item() + 0.6 * divergence.item(), rel=1e-10)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_form_of_consensus(tau: float) -> None:
    """Eq. 11: both maps under the consensus attention."""
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    attention = loop_attention(loop_similarity(s, t), 1)
    logits_s = loop_logits(attention, s, head_s.fc.weight, head_s.fc.bias)
    logits_t = loop_logits(attention, t, head_t.fc.weight, head_t.fc.bias)
    expected = loop_kd(logits_s, logits_t, tau)
    loss = core.consensus_kd_loss(core.spatial_similarity(s, t), s, t, head_s, head_t, tau)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    weighted = core.ADMLoss(0.3, 0.0, consensus="kd", tau=tau)(s, t, y, head_s, head_t)
    assert weighted.item() == pytest.approx(0.3 * expected, rel=1e-10)


def test_kd_form_of_divergence() -> None:
    """Eq. 12: soft cross-entropy towards (1 - delta) onehot(y) + delta p_t."""
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    logits = loop_logits(loop_attention(loop_similarity(s, t), -1), t, head_t.fc.weight, head_t.fc.bias)
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1)
    for delta in (0.2, 0.6, 1.0):
        pairs = zip(loop_one_hot(y), previous.tolist(), strict=True)
        targets = [[(1 - delta) * q + delta * p for q, p in zip(one_hot, old, strict=True)] for one_hot, old in pairs]
        expected = loop_soft_cross_entropy(logits, targets)
        for given in (delta, torch.tensor(delta, dtype=torch.float64)):
            loss = core.divergence_kd_loss(core.spatial_similarity(s, t), t, y, head_t, previous, given)
            assert loss.item() == pytest.approx(expected, rel=1e-10)
        adm = core.ADMLoss(0.0, 0.5, divergence="kd")
        weighted = adm(s, t, y, head_s, head_t, previous=previous, delta=delta)
        assert weighted.item() == pytest.approx(0.5 * expected, rel=1e-10)


def test_kd_form_of_divergence_with_a_delta_for_each_sample() -> None:
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    similarity = core.spatial_similarity(s, t)
    logits = loop_logits(loop_attention(loop_similarity(s, t), -1), t, head_t.fc.weight, head_t.fc.bias)
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1)
    previous[1] = 0  # nothing is known of this one: its delta is 0
    deltas = [0.3, 0.0, 0.6]
    rows = zip(deltas, loop_one_hot(y), previous.tolist(), strict=True)
    targets = [[(1 - d) * q + d * p for q, p in zip(one_hot, old, strict=True)] for d, one_hot, old in rows]
    expected = loop_soft_cross_entropy(logits, targets)
    delta = torch.tensor(deltas, dtype=torch.float64)
    loss = core.divergence_kd_loss(similarity, t, y, head_t, previous, delta)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    adm = core.ADMLoss(0.0, 0.5, divergence="kd")
    for given in (previous, previous.float()):  # in half the memory
        weighted = adm(s, t, y, head_s, head_t, previous=given, delta=delta)
        assert weighted.dtype == torch.float64 and weighted.item() == pytest.approx(0.5 * expected, rel=1e-7)
    even = core.divergence_kd_loss(similarity, t, y, head_t, previous.softmax(dim=1), torch.full((B,), 0.4).double())
    torch.testing.assert_close(
        even, core.divergence_kd_loss(similarity, t, y, head_t, previous.softmax(dim=1), 0.4), rtol=1e-7, atol=0
    )


def test_kd_form_of_divergence_without_a_previous_epoch_or_delta_is_the_ce_form() -> None:
    s, t, y = random_maps()
    head = LinearHead()
    similarity = core.spatial_similarity(s, t)
    expected = core.divergence_loss(similarity, t, y, head)
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(core.divergence_kd_loss(similarity, t, y, head), expected, **EXACT)
    torch.testing.assert_close(core.divergence_kd_loss(similarity, t, y, head, None, 0.6), expected, **EXACT)
    torch.testing.assert_close(core.divergence_kd_loss(similarity, t, y, head, previous, 0.0), expected, **EXACT)


def test_kd_form_of_divergence_has_the_gradient_of_the_kl_divergence() -> None:
    s, t, y = random_maps()
    head = LinearHead()
    similarity = core.spatial_similarity(s, t)
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1)
    soft = 0.6 * F.one_hot(y, K).double() + 0.4 * previous
    kl = F.kl_div(head(attend(t, similarity, core.divergence_attention)).log_softmax(1), soft, reduction="batchmean")
    expected = torch.autograd.grad(kl, [t, head.fc.weight])
    loss = core.divergence_kd_loss(similarity, t, y, head, previous, 0.4)
    for mine, its in zip(torch.autograd.grad(loss, [t, head.fc.weight]), expected, strict=True):
        torch.testing.assert_close(mine, its, **EXACT)


def test_phi_loss_is_the_relative_squared_residual() -> None:
    """mean_BHW sum_C (F_t - phi(F_s))^2 / mean_BHW sum_C F_t^2, inside the scalar that ADMLoss returns."""
    s, t, y = random_maps((C, 6))
    adapter = core.Adapter(C, 6).double()
    assert adapter.conv is not None
    weight = adapter.conv.weight[:, :, 0, 0].tolist()
    residual = energy = 0.0
    for b in range(B):
        for i in range(H):
            for j in range(W):
                for c, row in enumerate(weight):
                    projected = sum(w * x for w, x in zip(row, s[b, :, i, j].tolist(), strict=True))
                    residual += (t[b, c, i, j].item() - projected) ** 2
                    energy += t[b, c, i, j].item() ** 2
    terms = core.ADMLoss(0.2, 0.6, adapter).terms(s, t, y, LinearHead(), LinearHead(6))
    assert terms["phi"].item() == pytest.approx(residual / energy, rel=1e-10)
    assert core.phi_loss(t.detach(), t).item() == 0.0
    assert core.phi_loss(torch.zeros_like(t), t).item() == pytest.approx(1.0)


def test_phi_loss_of_a_large_student_map() -> None:
    """The denominator is at least a quarter of the student's energy, at the size at which the maps are compared."""
    s, t, y = random_maps((C, 6), ((6, 6), (3, 3)))
    s = (100 * s.detach()).requires_grad_()
    adapter = core.Adapter(C, 6).double()
    small = loop_pool(s, (3, 3))
    energy = sum(x**2 for x in small.flatten().tolist()) / 4
    pairs = zip(adapter(small).flatten().tolist(), t.flatten().tolist(), strict=True)
    residual = sum((b - a) ** 2 for a, b in pairs)
    terms = core.ADMLoss(0.2, 0.6, adapter).terms(s, t, y, LinearHead(), LinearHead(6))
    assert terms["phi"].item() == pytest.approx(residual / energy, rel=1e-10)
    assert core.phi_loss(adapter(small), t, s).item() == pytest.approx(residual / energy, rel=1e-10)
    assert reached(core.phi_loss(adapter(small.detach()), t, s), s=s, t=t, phi=next(adapter.parameters())) == {"phi"}


def test_unequal_channels_compare_the_projected_student_map() -> None:
    s, t, y = random_maps((C, 6))
    adapter = core.Adapter(C, 6).double()
    head_s, head_t = LinearHead(), LinearHead(6)
    loops = loop_similarity(adapter(s), t)
    logits_s = loop_logits(loop_attention(loops, 1), s, head_s.fc.weight, head_s.fc.bias)
    logits_t = loop_logits(loop_attention(loops, -1), t, head_t.fc.weight, head_t.fc.bias)
    terms = core.ADMLoss(1.0, 1.0, adapter).terms(s, t, y, head_s, head_t)
    assert terms["consensus"].item() == pytest.approx(loop_soft_cross_entropy(logits_s, loop_one_hot(y)), rel=1e-10)
    assert terms["divergence"].item() == pytest.approx(loop_soft_cross_entropy(logits_t, loop_one_hot(y)), rel=1e-10)


@pytest.mark.parametrize(
    ("size_s", "size_t"),
    [((6, 8), (3, 4)), ((3, 4), (6, 8)), ((7, 7), (4, 4)), ((4, 4), (7, 7)), ((7, 8), (7, 7)), ((5, 3), (4, 3))],
)
def test_unequal_sizes(size_s: tuple[int, int], size_t: tuple[int, int]) -> None:
    """S at the smaller size, resized bilinearly for the larger map, its mean taken only then."""
    s, t, y = random_maps(sizes=(size_s, size_t))
    small = (min(size_s[0], size_t[0]), min(size_s[1], size_t[1]))
    similarity = core.spatial_similarity(s, t)
    loops = loop_similarity(loop_pool(s, small), loop_pool(t, small))
    torch.testing.assert_close(similarity, torch.tensor(loops, dtype=torch.float64), **EXACT)

    attention_s, attention_t = (
        loop_attention(loop_bilinear(loops, size), sign) for size, sign in ((size_s, 1), (size_t, -1))
    )
    head_s, head_t = LinearHead(), LinearHead()
    logits_s = loop_logits(attention_s, s, head_s.fc.weight, head_s.fc.bias)
    logits_t = loop_logits(attention_t, t, head_t.fc.weight, head_t.fc.bias)
    terms = core.ADMLoss(1.0, 1.0).terms(s, t, y, head_s, head_t)
    assert terms["consensus"].item() == pytest.approx(loop_soft_cross_entropy(logits_s, loop_one_hot(y)), rel=1e-10)
    assert terms["divergence"].item() == pytest.approx(loop_soft_cross_entropy(logits_t, loop_one_hot(y)), rel=1e-10)

    for size, attention in ((size_s, core.consensus_attention), (size_t, core.divergence_attention)):
        mean = attention(resize_similarity(similarity, size)).mean(dim=(1, 2, 3))
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-3)


def test_unequal_sizes_and_channels_at_once() -> None:
    s, t, y = random_maps((C, 6), ((6, 6), (3, 3)))
    adapter = core.Adapter(C, 6).double()
    adm = core.ADMLoss(1.0, 1.0, adapter)
    similarity = core.spatial_similarity(adm.project(s, t), t)
    expected = loop_similarity(loop_pool(adapter(s), (3, 3)), t)
    torch.testing.assert_close(similarity, torch.tensor(expected, dtype=torch.float64), **EXACT)
    adm(s, t, y, LinearHead(), LinearHead(6)).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (s, t, *adapter.parameters()))


def test_own_criterion() -> None:
    """Segmentation: a per-pixel head without pooling, a label to ignore."""
    s, t, _ = random_maps()
    weight = torch.randn(K, C, 1, 1, dtype=torch.float64)
    y = torch.randint(K, (B, H, W))
    y[0, 0] = 255
    criterion = partial(F.cross_entropy, ignore_index=255)
    adm = core.ADMLoss(0.5, 2.0, criterion=criterion)
    terms = adm.terms(s, t, y, partial(F.conv2d, weight=weight), partial(F.conv2d, weight=-weight))
    loops = loop_similarity(s, t)
    for name, factor, sign, feature_map, w in (("consensus", 0.5, 1, s, weight), ("divergence", 2.0, -1, t, -weight)):
        attention = loop_attention(loops, sign)
        losses = []
        for b in range(B):
            for i in range(H):
                for j in range(W):
                    if y[b, i, j] != 255:
                        x = [attention[b][i][j] * value for value in feature_map[b, :, i, j].tolist()]
                        rows = w[:, :, 0, 0].tolist()
                        logits = [sum(p * q for p, q in zip(row, x, strict=True)) for row in rows]
                        losses.append(-loop_log_softmax(logits)[int(y[b, i, j])])
        assert terms[name].item() == pytest.approx(factor * sum(losses) / len(losses), rel=1e-10)


# Gradients.


def test_gradcheck() -> None:
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    similarity = core.spatial_similarity(s, t)
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1)
    weight, bias = (p.detach().clone().requires_grad_() for p in head_s.parameters())

    def head(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x.mean(dim=(2, 3)), weight, bias)

    losses: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x, w, b: core.consensus_loss(similarity, x, y, head(w, b)), s),
        (lambda x, w, b: core.divergence_loss(similarity, x, y, head(w, b)), t),
        (lambda x, w, b: core.consensus_kd_loss(similarity, x, t, head(w, b), head_t, 2.0), s),
        (lambda x, w, b: core.divergence_kd_loss(similarity, x, y, head(w, b), previous, 0.3), t),
    ]
    for loss, x in losses:
        assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: core.phi_loss(x, t), (s,))


def test_no_gradient_flows_through_the_similarity() -> None:
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    assert not core.spatial_similarity(s, t).requires_grad
    gradients = torch.autograd.grad(core.ADMLoss(0.5, 2.0)(s, t, y, head_s, head_t), [s, t])
    constant = torch.tensor(loop_similarity(s, t), dtype=torch.float64)
    a_s, a_t = (torch.tensor(loop_attention(constant.tolist(), sign), dtype=torch.float64) for sign in (1, -1))
    loss = 0.5 * F.cross_entropy(head_s(a_s[:, None] * s), y) + 2.0 * F.cross_entropy(head_t(a_t[:, None] * t), y)
    for mine, expected in zip(gradients, torch.autograd.grad(loss, [s, t]), strict=True):
        torch.testing.assert_close(mine, expected, **EXACT)


@pytest.mark.parametrize("form", ["ce", "kd"])
def test_who_gets_a_gradient(form: str) -> None:
    s, t, y = random_maps((C, 6))
    adapter, head_s, head_t = core.Adapter(C, 6).double(), LinearHead(), LinearHead(6)
    adm = core.ADMLoss(0.2, 0.6, adapter, consensus=form, divergence=form)  # type: ignore[arg-type]
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1).requires_grad_()
    terms = adm.terms(s, t, y, head_s, head_t, previous=previous, delta=0.4)
    everything = {
        "map_s": s,
        "map_t": t,
        "head_s": head_s.fc.weight,
        "head_t": head_t.fc.weight,
        "phi": next(adapter.parameters()),
        "previous": previous,
    }
    assert reached(terms["consensus"], **everything) == {"map_s", "head_s"}
    assert reached(terms["divergence"], **everything) == {"map_t", "head_t"}
    assert reached(terms["phi"], **everything) == {"phi"}


@pytest.mark.parametrize(
    ("alpha", "beta", "form", "student_calls", "teacher_calls"),
    [
        (0.5, 0.5, "ce", [True], [True]),
        (0.5, 0.0, "ce", [True], []),
        (0.0, 0.5, "ce", [], [True]),
        (0.0, 0.0, "ce", [], []),
        (0.5, 0.5, "kd", [True], [False, True]),
        (0.5, 0.0, "kd", [True], [False]),
        (0.0, 0.5, "kd", [], [True]),
    ],
)
def test_how_often_the_heads_are_called(
    alpha: float, beta: float, form: str, student_calls: list[bool], teacher_calls: list[bool]
) -> None:
    """A weight of 0 leaves that side's head alone; the kd form of consensus asks the teacher's without gradients."""
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    adm = core.ADMLoss(alpha, beta, consensus=form)  # type: ignore[arg-type]
    loss = adm(s, t, y, head_s, head_t)
    assert (head_s.calls, head_t.calls) == (student_calls, teacher_calls)
    assert loss.shape == () and (loss.item() > 0) == (alpha + beta > 0)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_phi_learns_the_teacher_map(scale: float) -> None:
    """By its own loss alone at the recipes' rate, whatever alpha and beta are and however large the student map is."""
    x = scale * torch.randn(8, C, H, W)
    t = torch.einsum("dc,bchw->bdhw", torch.randn(6, C), x / scale)
    adm = core.ADMLoss(0.0, 0.0, core.Adapter(C, 6))
    optimizer = torch.optim.SGD(adm.parameters(), lr=0.1, momentum=0.9)
    before = core.spatial_similarity(adm.project(x, t), t).mean()
    for _ in range(150):
        optimizer.zero_grad()
        adm(x, t, torch.zeros(8, dtype=torch.long), LinearHead(), LinearHead()).backward()
        optimizer.step()
    assert before < 0.6
    assert core.spatial_similarity(adm.project(x, t), t).mean() > 0.98


def test_phi_trained_by_the_feature_loss() -> None:
    s, t, y = random_maps((C, 6))
    adapter = core.Adapter(C, 6).double()
    adm = core.ADMLoss(0.2, 0.6, adapter, train_adapter=False)
    assert set(adm.terms(s, t, y, LinearHead(), LinearHead(6))) == {"consensus", "divergence"}


# Images do not mix.


def test_an_image_is_weighted_by_its_own_similarity_alone() -> None:
    s, t, _ = random_maps((C, C), ((C, C), (C, C)), batch=C)
    before = attend(s, core.spatial_similarity(s, t), core.consensus_attention)
    assert before.shape == s.shape
    changed = t.detach().clone()
    changed[1] = torch.randn_like(changed[1])
    after = attend(s, core.spatial_similarity(s, changed), core.consensus_attention)
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], **EXACT)
    assert not torch.allclose(after[1], before[1])


def test_permuting_the_batch_permutes_the_attention_and_keeps_the_loss() -> None:
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    order = torch.tensor([2, 0, 1])
    similarity = core.spatial_similarity(s, t)
    permuted = core.spatial_similarity(s[order], t[order])
    torch.testing.assert_close(permuted, similarity[order], **EXACT)
    for attention in (core.consensus_attention, core.divergence_attention):
        torch.testing.assert_close(attention(permuted), attention(similarity)[order], **EXACT)
    for form in ("ce", "kd"):
        adm = core.ADMLoss(0.2, 0.6, consensus=form)
        loss, other = adm(s, t, y, head_s, head_t), adm(s[order], t[order], y[order], head_s, head_t)
        torch.testing.assert_close(other, loss, **EXACT)


# Corners.


@pytest.mark.parametrize(("attention", "value"), [(core.divergence_attention, 1.0), (core.consensus_attention, -1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_learn_from(attention: Callable[[Tensor], Tensor], value: float, dtype: torch.dtype) -> None:
    """S == 1: the divergence attention is exactly 0 and L_di the head's loss at a zero map; S == -1: L_co's is."""
    similarity = torch.full((B, H, W), value, dtype=dtype)
    assert torch.equal(attention(similarity), torch.zeros(B, 1, H, W, dtype=dtype))
    feature_map = torch.randn(B, C, H, W, dtype=dtype, requires_grad=True)
    y = torch.randint(K, (B,))
    head = LinearHead(dtype=dtype)
    side = core.divergence_loss if value > 0 else core.consensus_loss
    loss = side(similarity, feature_map, y, head)
    torch.testing.assert_close(loss, F.cross_entropy(head.fc.bias.expand(B, K), y))
    gradients = torch.autograd.grad(loss, [feature_map, head.fc.weight, head.fc.bias])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].abs().max() == 0 and gradients[2].abs().max() > 0


@pytest.mark.parametrize("m", [1e-5, 1e-4, 1e-2, 0.1, 1.0, 1.9])
@pytest.mark.parametrize(("attention", "sign"), [(core.consensus_attention, 1), (core.divergence_attention, -1)])
def test_the_mean_attention(attention: Callable[[Tensor], Tensor], sign: int, m: float) -> None:
    """m / (m + 1e-5) with m = 1 +- S_bar: 1 to 1e-3 from m = 1e-2 on, a half at 1e-5."""
    weight = torch.rand(B, H, W, dtype=torch.float64)
    weight = m * weight / weight.mean(dim=(1, 2), keepdim=True)
    mean = attention(sign * (weight - 1)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean, torch.full_like(mean, m / (m + 1e-5)), rtol=1e-9, atol=0)
    if m >= 1e-2:
        assert (mean - 1).abs().max() < 1e-3
    if m == 1e-5:
        torch.testing.assert_close(mean, torch.full_like(mean, 0.5), rtol=1e-9, atol=0)


def test_equal_maps_never_give_a_negative_attention() -> None:
    """Float32 cosines of equal vectors reach beyond 1; the divergence attention must not follow them below 0."""
    x = torch.randn(16, 512, 7, 7)
    raw = (x * x).sum(1) / (x.norm(dim=1) * x.norm(dim=1))
    assert raw.max() > 1, "this input does not show the rounding"
    for other, attention in ((x.clone(), core.divergence_attention), (-x, core.consensus_attention)):
        similarity = core.spatial_similarity(x, other)
        assert similarity.min() >= -1 and similarity.max() <= 1
        assert attention(similarity).min() >= 0 and attention(similarity).isfinite().all()
    y = torch.randint(K, (16,))
    x.requires_grad_()
    heads = LinearHead(512, dtype=torch.float32), LinearHead(512, dtype=torch.float32)
    core.ADMLoss(0.2, 0.6)(x, x, y, *heads).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_resizing_never_gives_a_negative_attention() -> None:
    """Interpolating between values close to 1 rounds beyond 1, too."""
    near_one = 1 - torch.rand(200, 3, 3) * 1e-7
    raw = F.interpolate(near_one.unsqueeze(1), size=(7, 7), mode="bilinear", align_corners=False)
    assert raw.max() > 1, "this input does not show the rounding"
    assert core.divergence_attention(resize_similarity(near_one, (7, 7))).min() >= 0
    assert core.consensus_attention(resize_similarity(-near_one, (7, 7))).min() >= 0


def test_zero_vectors_have_similarity_zero() -> None:
    s, t, y = (x.detach().float() if x.is_floating_point() else x for x in random_maps())
    s[0, :, 0, 0] = 0
    t[1] = 0
    s[2], t[2] = 0, 0
    s.requires_grad_(), t.requires_grad_()
    similarity = core.spatial_similarity(s, t)
    assert similarity[0, 0, 0] == 0 and (similarity[1:] == 0).all() and (similarity[0, 1] != 0).all()
    core.ADMLoss(0.2, 0.6)(s, t, y, LinearHead(dtype=torch.float32), LinearHead(dtype=torch.float32)).backward()
    assert s.grad is not None and s.grad.isfinite().all() and t.grad is not None and t.grad.isfinite().all()


def test_zero_maps_leave_phi_finite() -> None:
    s, t, y = random_maps((C, 6))
    adapter = core.Adapter(C, 6).double()
    for map_s, map_t in ((s, t * 0), (s * 0, t), (s * 0, t * 0)):
        adapter.zero_grad()
        core.ADMLoss(0.2, 0.6, adapter)(map_s, map_t, y, LinearHead(), LinearHead(6)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_a_single_location_is_left_as_it_is() -> None:
    """The functions say what they say; ADMLoss refuses such maps (test_maps.py)."""
    s, t, y = random_maps(sizes=((1, 1), (1, 1)))
    head_s, head_t = LinearHead(), LinearHead()
    similarity = core.spatial_similarity(s, t)
    consensus, divergence = (
        core.consensus_loss(similarity, s, y, head_s),
        core.divergence_loss(similarity, t, y, head_t),
    )
    torch.testing.assert_close(consensus, F.cross_entropy(head_s(s), y), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(divergence, F.cross_entropy(head_t(t), y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_similarity_does_not_depend_on_magnitude(scale: float) -> None:
    s, t, _ = (x.detach().float() for x in random_maps((64, 64)))
    s, t = F.normalize(s, dim=1), F.normalize(t, dim=1)
    expected = core.spatial_similarity(s, t)
    torch.testing.assert_close(core.spatial_similarity(s * scale, t * scale), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(core.spatial_similarity(s * scale, t), expected, rtol=0, atol=1e-6)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarity_and_attention_are_computed_in_float32(dtype: torch.dtype) -> None:
    s, t = torch.randn(B, 64, 8, 8).to(dtype), torch.randn(B, 64, 4, 4).to(dtype)
    with torch.autocast("cpu", dtype):
        similarity = core.spatial_similarity(s, t)
        assert similarity.dtype == torch.float32
        assert core.consensus_attention(similarity).dtype == torch.float32
        assert core.divergence_attention(resize_similarity(similarity, (8, 8))).dtype == torch.float32
        assert attend(s, similarity, core.consensus_attention).dtype == dtype  # the head's matter again
    torch.testing.assert_close(similarity, core.spatial_similarity(s.float(), t.float()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forms", [("ce", "ce"), ("kd", "ce"), ("kd", "kd")])
def test_losses_under_autocast(dtype: torch.dtype, forms: tuple[str, str]) -> None:
    stems = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 24, 3)
    head_s, head_t = LinearHead(16, dtype=torch.float32), LinearHead(24, dtype=torch.float32)
    adm = core.ADMLoss(1.0, 1.0, core.Adapter(16, 24), consensus=forms[0], divergence=forms[1])  # type: ignore[arg-type]
    modules = nn.ModuleList([*stems, head_s, head_t, adm])
    x, y, previous = torch.randn(8, 3, 9, 9), torch.randint(K, (8,)), torch.randn(8, K).softmax(1)

    def losses() -> dict[str, Tensor]:
        maps = [stem(x) for stem in stems]
        return adm.terms(maps[0], maps[1], y, head_s, head_t, previous=previous.to(dtype), delta=0.3)

    expected = losses()
    with torch.autocast("cpu", dtype):
        terms = losses()
    for name, value in terms.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=3e-2, atol=1e-3)
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in modules.named_parameters():  # none lost to a cast that was cached under no_grad
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# Shape of the interface.


def test_unequal_channels_need_an_adapter() -> None:
    s, t, y = random_maps((C, 6))
    with pytest.raises(ValueError, match=r"ADMLoss\(alpha, beta, adapter=Adapter\(4, 6\)\).*adm\.parameters\(\)"):
        core.ADMLoss(0.2, 0.6)(s, t, y, LinearHead(), LinearHead(6))
    with pytest.raises(ValueError, match="Adapter"):
        core.spatial_similarity(s, t)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        core.spatial_similarity(s.flatten(1), s.flatten(1))
    with pytest.raises(ValueError, match="equal B"):
        core.spatial_similarity(s, s[:1])


def test_adapter() -> None:
    same = core.Adapter(C, C)
    x = torch.randn(B, C, 7, 7, dtype=torch.float64)
    assert not list(same.parameters()) and not same.state_dict()
    assert torch.equal(same(x), x)
    torch.testing.assert_close(same(x, (3, 3)), loop_pool(x, (3, 3)), **EXACT)
    phi = core.Adapter(C, 6).double()
    assert [tuple(p.shape) for p in phi.parameters()] == [(6, C, 1, 1)]
    torch.testing.assert_close(phi(x, (3, 3)), loop_pool(phi(x), (3, 3)), **EXACT)  # pooling and phi commute
    torch.testing.assert_close(phi(x, (3, 3), frozen=True), phi(x, (3, 3)), **EXACT)


def test_parameters_are_those_of_the_adapter_alone() -> None:
    assert not list(core.ADMLoss(0.2, 0.6).parameters())
    assert not list(core.ADMLoss(0.2, 0.6, core.Adapter(C, C)).parameters())
    assert [p.numel() for p in core.ADMLoss(0.2, 0.6, core.Adapter(C, 6)).parameters()] == [6 * C]


def test_an_adapter_between_equal_channels_changes_nothing() -> None:
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    terms = core.ADMLoss(0.2, 0.6, core.Adapter(C, C)).terms(s, t, y, head_s, head_t)
    assert set(terms) == {"consensus", "divergence"}
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, core.ADMLoss(0.2, 0.6)(s, t, y, head_s, head_t), **EXACT)


def test_an_adapter_that_always_projects_learns_by_its_own_loss_and_leaves_the_networks_alone() -> None:
    """Both maps have the same channels: S compares F_t with phi(F_s) all the same."""
    s, t, y = random_maps()
    head_s, head_t = LinearHead(), LinearHead()
    adapter = core.Adapter(C, C, always=True).double()
    terms = core.ADMLoss(1.0, 1.0, adapter).terms(s, t, y, head_s, head_t)
    logits = loop_logits(loop_attention(loop_similarity(adapter(s), t), 1), s, head_s.fc.weight, head_s.fc.bias)
    assert terms["consensus"].item() == pytest.approx(loop_soft_cross_entropy(logits, loop_one_hot(y)), rel=1e-10)
    phi = next(adapter.parameters())
    assert reached(terms["phi"], s=s, t=t, phi=phi) == {"phi"}
    assert reached(terms["consensus"] + terms["divergence"], s=s, t=t, phi=phi) == {"s", "t"}


@pytest.mark.parametrize("forms", [("ce", "ce"), ("kd", "kd")])
def test_the_terms_sum_to_the_loss(forms: tuple[str, str]) -> None:
    s, t, y = random_maps((C, 6))
    head_s, head_t = LinearHead(), LinearHead(6)
    adm = core.ADMLoss(0.2, 0.6, core.Adapter(C, 6).double(), consensus=forms[0], divergence=forms[1])  # type: ignore[arg-type]
    previous = torch.randn(B, K, dtype=torch.float64).softmax(dim=1)
    terms = adm.terms(s, t, y, head_s, head_t, previous=previous, delta=0.3)
    assert list(terms) == ["consensus", "divergence", "phi"]
    loss = adm(s, t, y, head_s, head_t, previous=previous, delta=0.3)
    assert loss.item() == pytest.approx(sum(v.item() for v in terms.values()), rel=1e-10)


@pytest.mark.parametrize("weights", [(-0.1, 0.1), (0.1, -0.1)])
def test_negative_weights_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="negative"):
        core.ADMLoss(*weights)


@pytest.mark.parametrize("side", ["consensus", "divergence"])
def test_unknown_forms_are_refused(side: str) -> None:
    with pytest.raises(ValueError, match=f"unknown value of adm.{side} 'KL': known: ce, kd"):
        core.ADMLoss(0.1, 0.1, **{side: "KL"})  # type: ignore[arg-type]


# Compiling and exporting.


class Step(nn.Module):
    """A user's loss: two heads, an adapter for unequal channels and sizes, ADMLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.head_s = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, K))
        self.head_t = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K))
        self.adm = core.ADMLoss(0.2, 0.6, core.Adapter(C, 6), consensus="kd")

    def forward(self, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.adm(s, t, y, self.head_s, self.head_t)


def step_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(B, C, 4, 4, requires_grad=True),
        torch.randn(B, 6, 2, 2, requires_grad=True),
        torch.randint(K, (B,)),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: str) -> None:
    step, inputs = Step(), step_inputs()
    parameters = [*inputs[:2], *step.parameters()]
    loss = step(*inputs)
    expected = torch.autograd.grad(loss, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
        gradients = torch.autograd.grad(compiled, parameters)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-6)
    for mine, its in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_compiles_once_for_maps_of_several_sizes() -> None:
    """The look at the maps' shapes is no obstacle, and maps that it refuses are refused there too."""
    step = Step()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((4, 8), (6, 8), (7, 10)):
        s, t, y = (
            torch.randn(batch, C, size, size),
            torch.randn(batch, 6, size // 2, size // 2),
            torch.randint(K, (batch,)),
        )
        torch.testing.assert_close(compiled(s, t, y), step(s, t, y))
    with pytest.raises(ValueError, match="single place"):
        torch.compile(step, backend="aot_eager")(
            torch.randn(3, C, 1, 1), torch.randn(3, 6, 1, 1), torch.zeros(3).long()
        )


def test_exports() -> None:
    step, (s, t, y) = Step(), step_inputs()
    program = torch.export.export(step, (s.detach(), t.detach(), y))
    other_s, other_t, other_y = (x.detach() for x in step_inputs())
    torch.testing.assert_close(program.module()(other_s, other_t, other_y), step(other_s, other_t, other_y))


# --- controls ---------------------------------------------------------------------------------------------------------


def pair(batch: int = 6, channels: int = 5, size: int = 4) -> tuple[Tensor, Tensor, Tensor, nn.Module, nn.Module]:
    """Maps with gradient, class indices, and a linear head behind average pooling for each, in float64."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    target = torch.randint(3, (batch,), generator=generator)
    torch.manual_seed(1)
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)).double() for _ in range(2)]
    return maps[0].requires_grad_(), maps[1].requires_grad_(), target, heads[0], heads[1]


def test_uniform_is_a_second_cross_entropy() -> None:
    student, teacher, target, student_head, teacher_head = pair()
    alpha, beta = 0.2, 0.6
    terms = ADMLoss(alpha, beta, control="uniform").terms(student, teacher, target, student_head, teacher_head)
    plain = F.cross_entropy(student_head(student), target), F.cross_entropy(teacher_head(teacher), target)
    # Of the whole loss, its own cross-entropies with it; Algorithm 1's guard makes the attention 1 / (1 + 1e-5).
    both = plain[0] + plain[1]
    torch.testing.assert_close(
        both + terms["consensus"] + terms["divergence"], both + alpha * plain[0] + beta * plain[1], rtol=1e-6, atol=0
    )
    assert terms["consensus"].item() != pytest.approx(
        ADMLoss(alpha, beta).terms(student, teacher, target, student_head, teacher_head)["consensus"].item(), rel=1e-4
    )


def test_shuffled_keeps_each_images_values_and_moves_them() -> None:
    similarity = torch.rand(8, 5, 7) * 2 - 1
    shuffled = control(similarity, "shuffled")
    assert shuffled.shape == similarity.shape and not torch.equal(shuffled, similarity)
    assert torch.equal(shuffled.flatten(1).sort().values, similarity.flatten(1).sort().values)
    # Of a batch in another order, the values stay with their images.
    order = torch.randperm(8)
    again = control(similarity[order], "shuffled")
    assert torch.equal(again.flatten(1).sort().values, similarity[order].flatten(1).sort().values)
    assert control(similarity) is similarity
    assert control(similarity, "uniform").count_nonzero() == 0
    with pytest.raises(ValueError, match="'none', 'uniform' or 'shuffled'"):
        control(similarity, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["ce", "kd"])
@pytest.mark.parametrize("kind", ["uniform", "shuffled"])
def test_under_a_control_gradients_go_where_they_go_without(form: Literal["ce", "kd"], kind: Control) -> None:
    def reached(control: Control) -> list[bool]:
        student, teacher, target, student_head, teacher_head = pair()
        loss = ADMLoss(0.5, 0.5, consensus=form, control=control)
        loss(student, teacher, target, student_head, teacher_head).backward()
        owners = [student, teacher, student_head[-1].weight, teacher_head[-1].weight]  # type: ignore[index]
        return [owner.grad is not None and bool(owner.grad.any()) for owner in owners]

    assert reached(kind) == reached("none")


def test_one_permutation_serves_both_terms_of_a_pair() -> None:
    student, teacher, target, *_ = pair()
    seen: list[Tensor] = []

    def head(feature_map: Tensor) -> Tensor:
        seen.append(feature_map.mean(dim=1))
        return feature_map.mean(dim=(2, 3))[:, :3]

    loss = ADMLoss(1.0, 1.0, control="shuffled")
    torch.manual_seed(0)
    expected = control(spatial_similarity(student, teacher), "shuffled")
    torch.manual_seed(0)
    loss.terms(student, teacher, target, head, head)
    consensus, divergence = seen
    torch.testing.assert_close(consensus, (consensus_attention(expected) * student).mean(dim=1))
    torch.testing.assert_close(divergence, (divergence_attention(expected) * teacher).mean(dim=1))


def test_a_config_refuses_words_that_it_does_not_know() -> None:
    for field in ("control", "consensus", "divergence", "feature_filter", "phi_loss"):
        with pytest.raises(InputError, match=f"adm.{field}"):
            ADMConfig(**{field: "unifrom"})
