"""Every kind of target in every form, against plain Python loops; what is ignored has no gradient, or it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core import (
    ADMLoss,
    InputError,
    consensus_kd_loss,
    consensus_loss,
    divergence_kd_loss,
    divergence_loss,
    mutual_loss,
    spatial_similarity,
)
from core.adm import attend, consensus_attention, divergence_attention
from core.targets import blended_loss, imitation_loss, kd_loss, label_loss, read_criterion

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
B, C, K, SIZE = 3, 4, 5, (2, 3)
IGNORED = 255

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.1, 1.0, 3.0], dtype=torch.float64)
POSITIVE = torch.tensor([1.0, 4.0, 0.3, 2.0, 1.5], dtype=torch.float64)


# The logits of one place are a list; targets, of one place, too. Everything is one sum at a time.


def places_of(x: Tensor) -> list[Any]:
    """``[B, K, ...]`` -> the B * P lists of K numbers."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1).tolist() if x.dim() > 2 else x.tolist()


def log_softmax(z: list[float]) -> list[float]:
    top = max(z)
    total = top + math.log(sum(math.exp(x - top) for x in z))
    return [x - total for x in z]


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def loop_kl(z: list[float], t: list[float], tau: float) -> float:
    log_p, log_q = log_softmax([x / tau for x in z]), log_softmax([x / tau for x in t])
    return tau**2 * sum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))


def loop_bernoulli_kl(z: float, t: float, tau: float) -> float:
    yes, no = math.exp(log_sigmoid(t / tau)), math.exp(log_sigmoid(-t / tau))
    kl = yes * (log_sigmoid(t / tau) - log_sigmoid(z / tau)) + no * (log_sigmoid(-t / tau) - log_sigmoid(-z / tau))
    return tau**2 * kl


def loop_imitation(z: Tensor, t: Tensor, y: Tensor, tau: float, weights: list[float], ignored: int = IGNORED) -> float:
    """Over the labelled places: sum w[y] KL / sum w[y]."""
    total = count = 0.0
    for a, b, label in zip(places_of(z), places_of(t), y.flatten().tolist(), strict=True):
        if label != ignored:
            total, count = total + weights[label] * loop_kl(a, b, tau), count + weights[label]
    return total / count


def loop_blended(
    z: Tensor, y: Tensor, previous: Tensor, deltas: list[float], weights: list[float], smoothing: float
) -> float:
    """sum over the labelled places of (1 - delta) CE(z, y) + delta w[y] CE(z, previous), by sum w[y].

    PyTorch's smoothed cross-entropy weighs each class of the uniform part by its own weight.
    """
    total = count = 0.0
    places = y[0].numel()
    for i, (a, q, label) in enumerate(zip(places_of(z), places_of(previous), y.flatten().tolist(), strict=True)):
        if label == IGNORED:
            continue
        log_p, delta = log_softmax(a), deltas[i // places]
        hard = -(1 - smoothing) * weights[label] * log_p[label]
        hard -= smoothing / K * sum(w * x for w, x in zip(weights, log_p, strict=True))
        soft = -weights[label] * sum(p * x for p, x in zip(q, log_p, strict=True))
        total, count = total + (1 - delta) * hard + delta * soft, count + weights[label]
    return total / count


# The inputs.


def logits_of(dense: bool) -> Tensor:
    return torch.randn(B, K, *(SIZE if dense else ()), dtype=torch.float64, requires_grad=True)


def labels_of(dense: bool) -> Tensor:
    """Class indices, some of them ignored."""
    y = torch.randint(K, (B, *SIZE) if dense else (B,))
    y[1] = IGNORED
    if dense:
        y[0, 0, 1] = IGNORED
    return y


def ignored_at(y: Tensor, x: Tensor) -> Tensor:
    """Which entries of x ``[B, C, ...]`` belong to ignored targets."""
    return (y == IGNORED).unsqueeze(1).expand_as(x)


class DenseHead(nn.Module):
    """A 1x1 classifier: each place has logits of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, K, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, K, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(2))


def maps() -> tuple[Tensor, Tensor]:
    s, t = (torch.randn(B, C, *SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return s, t


# Imitation (Eq. 2 and 11).


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_imitation_averages_as_cross_entropy(dense: bool, weights: Tensor | None, tau: float) -> None:
    z, t, y = logits_of(dense), logits_of(dense), labels_of(dense)
    criterion = nn.CrossEntropyLoss(weights, ignore_index=IGNORED)
    loss = imitation_loss(z, t, tau, y, criterion)
    w = [1.0] * K if weights is None else weights.tolist()
    assert loss.item() == pytest.approx(loop_imitation(z, t, y, tau, w), rel=1e-10)
    gradients = torch.autograd.grad(loss, [z, t], allow_unused=True)
    assert gradients[1] is None
    assert gradients[0][ignored_at(y, z)].abs().max() == 0 and gradients[0][~ignored_at(y, z)].abs().min() > 0
    assert torch.autograd.gradcheck(lambda x: imitation_loss(x, t, tau, y, criterion), (z,))


def test_imitation_where_nothing_is_ignored_is_the_plain_one_to_the_last_bit() -> None:
    for size in [(n,) for n in range(1, 70)] + [(5, 3), (11, 2, 3), (7, 7, 7)]:
        z, t = torch.randn(2, size[0], K, *size[1:])
        z.requires_grad_()
        y = torch.randint(K, (size[0], *size[1:]))
        losses = [kd_loss(z, t, 3.0), imitation_loss(z, t, 3.0, y), imitation_loss(z, t, 3.0)]
        losses.append(imitation_loss(z, t, 3.0, y, nn.CrossEntropyLoss(ignore_index=255, label_smoothing=0.1)))
        gradients = [torch.autograd.grad(loss, z)[0] for loss in losses]
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_pytorchs_default_ignores_minus_100_in_every_form() -> None:
    z, t, y = logits_of(True), logits_of(True), labels_of(True).where(labels_of(True) != IGNORED, -100)
    expected = loop_imitation(z, t, y, 2.0, [1.0] * K, ignored=-100)
    assert imitation_loss(z, t, 2.0, y).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("dense", [False, True])
def test_imitation_with_probabilities(weights: Tensor | None, dense: bool) -> None:
    """Mixup: a distribution weighs sum_k w_k q_k, and the mean is over all, as in PyTorch's cross-entropy."""
    z, t, q = logits_of(dense), logits_of(dense), logits_of(dense).softmax(1).detach()
    w = [1.0] * K if weights is None else weights.tolist()
    rows = list(zip(places_of(z), places_of(t), places_of(q), strict=True))
    expected = sum(sum(a * b for a, b in zip(w, p, strict=True)) * loop_kl(x, y, 2.0) for x, y, p in rows) / len(rows)
    loss = imitation_loss(z, t, 2.0, q, nn.CrossEntropyLoss(weights))
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_imitation_of_several_labels(dense: bool, weighed: bool) -> None:
    """KL of Bernoullis, summed over the classes; pos_weight counts where the target is 1."""
    z, t = logits_of(dense), logits_of(dense)
    y = torch.rand(z.shape, dtype=torch.float64).round()
    y[0] = 0.3  # smoothed
    shape = (K, 1, 1) if dense else (K,)
    positive = POSITIVE.view(shape) if weighed else None
    each = torch.linspace(0.5, 1.5, K, dtype=torch.float64).view(shape) if weighed else None
    loss = imitation_loss(z, t, 2.0, y, nn.BCEWithLogitsLoss(each, pos_weight=positive))
    total = 0.0
    rows = list(zip(places_of(z), places_of(t), places_of(y), strict=True))
    for a, b, labels in rows:
        for k in range(K):
            weight = (labels[k] * POSITIVE[k].item() + 1 - labels[k]) * (0.5 + k / (K - 1)) if weighed else 1.0
            total += weight * loop_bernoulli_kl(a[k], b[k], 2.0)
    assert loss.item() == pytest.approx(total / len(rows), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: imitation_loss(x, t, 2.0, y, nn.BCEWithLogitsLoss()), (z,))
    assert imitation_loss(z, z, 2.0, y, nn.BCEWithLogitsLoss()).item() == pytest.approx(0, abs=1e-12)


# Eq. 12.


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_blended_targets(dense: bool, weights: Tensor | None, smoothing: float) -> None:
    z, y, previous = logits_of(dense), labels_of(dense), logits_of(dense).softmax(1)
    criterion = nn.CrossEntropyLoss(weights, ignore_index=IGNORED, label_smoothing=smoothing)
    w = [1.0] * K if weights is None else weights.tolist()
    for deltas in ([0.4] * B, [0.0, 0.3, 0.9]):
        given = deltas[0] if deltas[0] else torch.tensor(deltas, dtype=torch.float64)
        loss = blended_loss(z, y, previous, given, criterion)
        assert loss.item() == pytest.approx(loop_blended(z, y, previous, deltas, w, smoothing), rel=1e-10)
        gradient = torch.autograd.grad(loss, z)[0]
        assert gradient[ignored_at(y, z)].abs().max() == 0 and gradient[~ignored_at(y, z)].abs().max() > 0
    torch.testing.assert_close(blended_loss(z, y, previous, 0.0, criterion), criterion(z, y), **EXACT)
    assert torch.autograd.gradcheck(lambda x: blended_loss(x, y, previous, 0.4, criterion), (z,))


def test_a_delta_of_each_sample_is_not_one_of_each_column() -> None:
    z = torch.randn(3, K, 3, 3, dtype=torch.float64)
    y, previous = torch.randint(K, (3, 3, 3)), torch.randn(3, K, 3, 3, dtype=torch.float64).softmax(1)
    deltas = [0.1, 0.5, 0.9]
    expected = sum(blended_loss(z[i : i + 1], y[i : i + 1], previous[i : i + 1], deltas[i]).item() for i in range(3))
    loss = blended_loss(z, y, previous, torch.tensor(deltas, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-10)


def test_blended_probabilities() -> None:
    """Mixup and Eq. 12: cross-entropy towards the mixture of both, class weights as in PyTorch."""
    z, q, previous = logits_of(False), logits_of(False).softmax(1).detach(), logits_of(False).softmax(1)
    mixed = 0.6 * q + 0.4 * previous.detach()
    plain = -(mixed * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(blended_loss(z, q, previous, 0.4), plain, **EXACT)
    hard = -(q * CLASS_WEIGHTS * z.log_softmax(1)).sum(1)
    soft = -(q @ CLASS_WEIGHTS) * (previous.detach() * z.log_softmax(1)).sum(1)
    weighed = blended_loss(z, q, previous, 0.4, nn.CrossEntropyLoss(CLASS_WEIGHTS))
    torch.testing.assert_close(weighed, (0.6 * hard + 0.4 * soft).mean(), **EXACT)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    smoothed = 0.6 * (0.9 * q + 0.1 / K) + 0.4 * previous.detach()
    wanted = -(smoothed * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(blended_loss(z, q, previous, 0.4, smooth), wanted, **EXACT)


@pytest.mark.parametrize("dense", [False, True])
def test_blended_labels_of_several_classes(dense: bool) -> None:
    z, y, previous = logits_of(dense), logits_of(dense).sigmoid().round().detach(), logits_of(dense).sigmoid()
    positive = POSITIVE.view(K, 1, 1) if dense else POSITIVE
    deltas = [0.0, 0.3, 0.9]
    total = 0.0
    rows = list(zip(places_of(z), places_of(y), places_of(previous), strict=True))
    for i, (a, labels, old) in enumerate(rows):
        delta = deltas[i * B // len(rows)]
        for k in range(K):
            target = (1 - delta) * labels[k] + delta * old[k]
            total -= POSITIVE[k].item() * target * log_sigmoid(a[k]) + (1 - target) * log_sigmoid(-a[k])
    criterion = nn.BCEWithLogitsLoss(pos_weight=positive)
    loss = blended_loss(z, y, previous, torch.tensor(deltas, dtype=torch.float64), criterion)
    assert loss.item() == pytest.approx(total / z.numel(), rel=1e-10)
    torch.testing.assert_close(blended_loss(z, y, previous, 0.0, criterion), criterion(z, y), **EXACT)


# Against labels.


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_label_loss_is_the_criterion(dense: bool, smoothing: float, weights: Tensor | None) -> None:
    z, y = logits_of(dense), labels_of(dense)
    criterion = nn.CrossEntropyLoss(weights, ignore_index=IGNORED, label_smoothing=smoothing)
    loss, wanted = label_loss(z, y, criterion), criterion(z, y)
    assert torch.equal(loss, wanted)
    assert torch.equal(*(torch.autograd.grad(x, z)[0] for x in (loss, wanted)))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_where_everything_is_ignored_losses_are_zero(dense: bool, smoothing: float, weights: Tensor | None) -> None:
    z, t = logits_of(dense), logits_of(dense)
    y = torch.full_like(labels_of(dense), IGNORED)
    criterion = nn.CrossEntropyLoss(weights, ignore_index=IGNORED, label_smoothing=smoothing)
    assert criterion(z, y).isnan()  # what would end a run
    for loss in (
        label_loss(z, y, criterion),
        imitation_loss(z, t, 2.0, y, criterion),
        blended_loss(z, y, t.softmax(1), 0.4, criterion),
    ):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, z)[0].abs().max() == 0


def test_classes_that_weigh_nothing_are_ignored() -> None:
    z, t, y = logits_of(False), logits_of(False), torch.tensor([2, 2, 2])
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64))
    for loss in (label_loss(z, y, criterion), imitation_loss(z, t, 2.0, y, criterion)):
        assert loss.item() == 0 and torch.autograd.grad(loss, z)[0].abs().max() == 0
    y[0] = 1
    torch.testing.assert_close(label_loss(z, y, criterion), F.cross_entropy(z[:1], y[:1]), **EXACT)


def test_pytorchs_functions_are_its_modules() -> None:
    z, t, y = logits_of(True), logits_of(True), labels_of(True)
    written = partial(F.cross_entropy, weight=CLASS_WEIGHTS, ignore_index=IGNORED)
    criterion = nn.CrossEntropyLoss(CLASS_WEIGHTS, ignore_index=IGNORED)
    assert torch.equal(label_loss(z, y, written), criterion(z, y))
    assert torch.equal(imitation_loss(z, t, 2.0, y, written), imitation_loss(z, t, 2.0, y, criterion))
    several = torch.rand(z.shape, dtype=torch.float64).round()
    written = partial(F.binary_cross_entropy_with_logits, pos_weight=POSITIVE.view(K, 1, 1))
    expected = nn.BCEWithLogitsLoss(pos_weight=POSITIVE.view(K, 1, 1))
    assert torch.equal(label_loss(z, several, written), expected(z, several))
    assert isinstance(read_criterion(F.binary_cross_entropy_with_logits), nn.BCEWithLogitsLoss)


# ADMLoss and mutual_loss.


def settings() -> list[Any]:
    """(name, criterion, targets, head) of every kind."""
    several = torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0.1, 0.9, 0.1, 0.1, 0.9]], dtype=torch.float64)
    soft = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1.0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    dense = torch.tensor([[[0, IGNORED, 2], [3, 4, 0]], [[IGNORED] * 3] * 2, [[1, 1, 1], [2, IGNORED, 4]]])
    cross = nn.CrossEntropyLoss
    return [
        pytest.param(cross(CLASS_WEIGHTS, ignore_index=IGNORED), torch.tensor([1, IGNORED, 4]), Head, id="indices"),
        pytest.param(cross(CLASS_WEIGHTS), soft, Head, id="probabilities"),
        pytest.param(cross(CLASS_WEIGHTS, ignore_index=IGNORED), dense, DenseHead, id="dense"),
        pytest.param(nn.BCEWithLogitsLoss(pos_weight=POSITIVE), several, Head, id="several labels"),
    ]


@pytest.mark.parametrize(("criterion", "y", "head"), settings())
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_every_form_of_adm_keeps_to_the_criterion(
    criterion: Any, y: Tensor, head: Callable[[], nn.Module], tau: float
) -> None:
    s, t = maps()
    head_s, head_t = head(), head()
    similarity = spatial_similarity(s, t)
    z_s, z_t = head_s(attend(s, similarity, consensus_attention)), head_t(attend(t, similarity, consensus_attention))
    d_t = head_t(attend(t, similarity, divergence_attention))
    previous = d_t.detach().roll(1, 1)
    previous = previous.sigmoid() if isinstance(criterion, nn.BCEWithLogitsLoss) else previous.softmax(1)
    wanted = {
        ("consensus", "ce"): criterion(z_s, y),
        ("consensus", "kd"): imitation_loss(z_s, z_t, tau, y, criterion),
        ("divergence", "ce"): criterion(d_t, y),
        ("divergence", "kd"): blended_loss(d_t, y, previous, 0.4, criterion),
    }
    everything = [s, t, *head_s.parameters(), *head_t.parameters()]
    for form in ("ce", "kd"):
        adm = ADMLoss(0.3, 0.7, consensus=form, divergence=form, tau=tau, criterion=criterion)  # type: ignore[arg-type]
        terms = adm.terms(s, t, y, head_s, head_t, previous=previous, delta=0.4)
        for name, weight in (("consensus", 0.3), ("divergence", 0.7)):
            expected = weight * wanted[name, form]
            torch.testing.assert_close(terms[name], expected, **EXACT)
            pairs = [
                torch.autograd.grad(x, everything, allow_unused=True, retain_graph=True)
                for x in (terms[name], expected)
            ]
            for mine, its in zip(*pairs, strict=True):
                assert mine is its is None or torch.allclose(mine, its, rtol=1e-10, atol=1e-12)
    functions = {
        ("consensus", "ce"): consensus_loss(similarity, s, y, head_s, criterion),
        ("consensus", "kd"): consensus_kd_loss(similarity, s, t, head_s, head_t, tau, target=y, criterion=criterion),
        ("divergence", "ce"): divergence_loss(similarity, t, y, head_t, criterion),
        ("divergence", "kd"): divergence_kd_loss(similarity, t, y, head_t, previous, 0.4, criterion),
    }
    for key, value in functions.items():
        torch.testing.assert_close(value, wanted[key], **EXACT)


@pytest.mark.parametrize("form", ["ce", "kd"])
def test_ignored_places_send_nothing_into_the_maps(form: Any) -> None:
    s, t = maps()
    y = labels_of(True)
    adm = ADMLoss(1.0, 1.0, consensus=form, divergence=form, criterion=nn.CrossEntropyLoss(ignore_index=IGNORED))
    previous = torch.randn(B, K, *SIZE, dtype=torch.float64).softmax(1)
    adm(s, t, y, DenseHead(), DenseHead(), previous=previous, delta=0.5).backward()
    for x in (s, t):
        assert x.grad is not None
        assert x.grad[ignored_at(y, x)].abs().max() == 0 and x.grad[~ignored_at(y, x)].abs().max() > 0
    s.grad = t.grad = None
    loss = adm(s, t, torch.full_like(y, IGNORED), DenseHead(), DenseHead(), previous=previous, delta=0.5)
    loss.backward()
    assert loss.item() == 0 and s.grad is not None and s.grad.abs().max() == 0


@pytest.mark.parametrize(("criterion", "y", "head"), settings())
def test_mutual_learning_keeps_to_the_criterion(criterion: Any, y: Tensor, head: Callable[[], nn.Module]) -> None:
    logits = {"teacher": logits_of(y.shape[1:] == SIZE), "student": logits_of(y.shape[1:] == SIZE)}
    losses = mutual_loss(logits, y, {"teacher": 0.3}, 2.0, criterion=criterion)
    for role, other, weight in (("teacher", "student", 0.3), ("student", "teacher", 1.0)):
        torch.testing.assert_close(losses[role]["ce"], criterion(logits[role], y), **EXACT)
        expected = weight * imitation_loss(logits[role], logits[other], 2.0, y, criterion)
        torch.testing.assert_close(losses[role]["kd"], expected, **EXACT)
        gradient = torch.autograd.grad(losses[role]["ce"] + losses[role]["kd"], logits[role], retain_graph=True)[0]
        if not y.is_floating_point():
            assert gradient[ignored_at(y, gradient)].abs().max() == 0


def test_consensus_by_imitation_needs_no_targets() -> None:
    s, t = maps()
    head_s, head_t = Head(), Head()
    adm = ADMLoss(0.3, 0.0, consensus="kd")
    torch.testing.assert_close(
        adm(s, t, None, head_s, head_t), adm(s, t, torch.zeros(B, dtype=torch.long), head_s, head_t), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    """Tiny class weights do not vanish in it, and the imitation is computed in float32."""
    z, t, y = torch.randn(B, K).to(dtype), torch.randn(B, K).to(dtype), torch.tensor([0, 1, IGNORED])
    criterion = nn.CrossEntropyLoss(torch.full((K,), 1e-9), ignore_index=IGNORED)
    loss = imitation_loss(z, t, 2.0, y, criterion)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kd_loss(z[:2].float(), t[:2].float(), 2.0))
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(
            label_loss(z, y, criterion), F.cross_entropy(z[:2].float(), y[:2]), rtol=2e-2, atol=0
        )


def test_a_criterions_weights_move_and_are_saved_with_the_loss() -> None:
    assert not ADMLoss(0.1, 0.1).state_dict()
    adm = ADMLoss(0.1, 0.1, criterion=nn.CrossEntropyLoss(torch.ones(K)))
    assert not list(adm.parameters())
    assert [b.dtype for b in adm.double().buffers()] == [torch.float64]


# What is refused.


def own(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


class Focal(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return super().forward(logits, target) ** 2


@pytest.mark.parametrize("criterion", [own, Focal(), lambda z, y: own(z, y)])
def test_an_own_criterion_serves_the_ce_forms_alone(criterion: Any) -> None:
    s, t = maps()
    y, head_s, head_t = torch.randint(K, (B,)), Head(), Head()
    similarity = spatial_similarity(s, t)
    terms = ADMLoss(1.0, 1.0, criterion=criterion).terms(s, t, y, head_s, head_t)
    expected = criterion(head_s(attend(s, similarity, consensus_attention)), y)
    torch.testing.assert_close(terms["consensus"], expected, **EXACT)
    ADMLoss(0.0, 1.0, consensus="kd", criterion=criterion)  # that side is off
    logits = {"a": torch.zeros(B, K), "b": torch.zeros(B, K)}
    previous = torch.full((B, K), 1 / K).double()
    for call in (
        lambda: ADMLoss(1.0, 0.0, consensus="kd", criterion=criterion),
        lambda: ADMLoss(0.0, 1.0, divergence="kd", criterion=criterion),
        lambda: mutual_loss(logits, y, criterion=criterion),
        lambda: divergence_kd_loss(similarity, t, y, head_t, previous, 0.5, criterion),
        lambda: consensus_kd_loss(similarity, s, t, head_s, head_t, target=y, criterion=criterion),
    ):
        with pytest.raises(InputError, match=r"cannot honour the criterion .* nn\.CrossEntropyLoss") as error:
            call()
        assert "\n" not in str(error.value)
    assert set(mutual_loss({"a": torch.zeros(B, K)}, y, criterion=criterion)["a"]) == {"ce"}
    assert set(mutual_loss(logits, y, 0.0, criterion=criterion)["a"]) == {"ce"}


def test_label_smoothing_needs_a_label() -> None:
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(InputError, match="consensus='kd' has no label that label_smoothing could smooth"):
        ADMLoss(0.1, 0.1, consensus="kd", criterion=smooth)
    for form in ("ce", "kd"):
        ADMLoss(0.0, 0.1, consensus="kd", divergence=form, criterion=smooth)  # type: ignore[arg-type]
    z = {"a": torch.randn(B, K), "b": torch.randn(B, K)}
    y = torch.randint(K, (B,))
    losses = mutual_loss(z, y, criterion=smooth)["a"]  # its labels are smoothed, its imitation has none
    torch.testing.assert_close(losses["ce"], smooth(z["a"], y))
    torch.testing.assert_close(losses["kd"], kd_loss(z["a"], z["b"]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
def test_another_reduction_is_refused(kind: Any, reduction: str) -> None:
    with pytest.raises(InputError, match="reduction must be 'mean'"):
        ADMLoss(0.1, 0.1, criterion=kind(reduction=reduction))
    with pytest.raises(InputError, match="reduction must be 'mean'"):
        ADMLoss(0.1, 0.1, criterion=partial(F.cross_entropy, reduction=reduction))


CROSS, BINARY = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()


@pytest.mark.parametrize(
    ("criterion", "logits", "target", "says"),
    [
        (CROSS, (B, K), torch.zeros(B, *SIZE, dtype=torch.long), r"class indices \(3,\)"),
        (CROSS, (B, K), torch.zeros(B, K, dtype=torch.long), r"probabilities \(3, 5\) \(floating point\)"),
        (CROSS, (B, K), torch.zeros(B), "integers"),
        (CROSS, (B, K), torch.zeros(B - 1, dtype=torch.long), r"\(2,\)"),
        (CROSS, (B, K), torch.zeros(B, K + 1), r"\(3, 6\)"),
        (CROSS, (B, K, *SIZE), torch.zeros(B, dtype=torch.long), r"class indices \(3, 2, 3\)"),
        (CROSS, (B, K, *SIZE), torch.zeros(B, 1, *SIZE, dtype=torch.long), r"class indices \(3, 2, 3\)"),
        (CROSS, (B, K, *SIZE), torch.zeros(B, K), r"probabilities \(3, 5, 2, 3\)"),
        (nn.CrossEntropyLoss(ignore_index=255), (B, K), torch.zeros(B, K), "ignore_index means class indices"),
        (BINARY, (B, K), torch.zeros(B, dtype=torch.long), r"floating point numbers \(3, 5\) in \[0, 1\]"),
        (BINARY, (B, K), torch.zeros(B, K, dtype=torch.long), r"floating point numbers \(3, 5\)"),
        (BINARY, (B, K), torch.zeros(B, 1), r"floating point numbers \(3, 5\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused_in_every_form(
    criterion: Any, logits: tuple[int, ...], target: Tensor, says: str
) -> None:
    z = torch.zeros(logits)
    for call in (
        lambda: label_loss(z, target, criterion),
        lambda: imitation_loss(z, z, 1.0, target, criterion),
        lambda: blended_loss(z, target, z.softmax(1), 0.5, criterion),
        lambda: mutual_loss({"a": z, "b": z}, target, criterion=criterion),
    ):
        with pytest.raises(ValueError, match=says) as error:
            call()
        assert isinstance(error.value, InputError) and "\n" not in str(error.value)


def test_other_shapes_that_would_broadcast_are_refused() -> None:
    z = torch.zeros(B, K, *SIZE)
    with pytest.raises(InputError, match="previous"):
        blended_loss(z, torch.zeros(B, *SIZE, dtype=torch.long), torch.zeros(B, K), 0.5)
    with pytest.raises(InputError, match="one a distribution"):
        kd_loss(torch.zeros(B, K), torch.zeros(B, K), 1.0, torch.ones(B, *SIZE))
