"""DKD: its two parts against softmax loops and against KD, saturated logits, the warm-up, and who learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig
from classification.methods.base import Output
from classification.networks import create_network
from core.adm import ADMConfig
from core.distillation import kd_loss
from core.errors import InputError
from core.training.distiller import Progress
from offline_kd.methods import METHODS
from offline_kd.methods.dkd import DKD, DKDOptions, decoupled, dkd_losses, dkd_terms, warmup_weight

CLASSES = 5


def logits(count: int = 4, classes: int = CLASSES, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher ``[B, K]`` in float64, class indices ``[B]``."""
    torch.manual_seed(seed)
    s, t = torch.randn(2, count, classes, dtype=torch.float64) * scale
    return s, t, torch.arange(count) % classes


def softmax(row: list[float], tau: float) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [p / sum(powers) for p in powers]


def terms_by_loops(s: Tensor, t: Tensor, target: Tensor, tau: float) -> list[tuple[float, float]]:
    """(KL(b_t || b_s), KL(q_t || q_s)) of each sample, from probabilities alone."""
    result = []
    for row_s, row_t, y in zip(s.tolist(), t.tolist(), target.tolist(), strict=True):
        p, q = softmax(row_s, tau), softmax(row_t, tau)
        binary = q[y] * math.log(q[y] / p[y]) + (1 - q[y]) * math.log((1 - q[y]) / (1 - p[y]))
        others = 0.0
        for c in range(len(p)):
            if c != y:
                given_s, given_t = p[c] / (1 - p[y]), q[c] / (1 - q[y])
                others += given_t * math.log(given_t / given_s)
        result.append((binary, others))
    return result


def terms_by_logarithms(s: Tensor, t: Tensor, target: Tensor, tau: float) -> list[tuple[float, float]]:
    """The same where probabilities are 0 or 1 to the last bit: ``log p[y] = z_y - lse(z)``, and so on."""

    def lse(row: list[float]) -> float:
        return max(row) + math.log(sum(math.exp(z - max(row)) for z in row))

    result = []
    for row_s, row_t, y in zip((s / tau).tolist(), (t / tau).tolist(), target.tolist(), strict=True):
        rest_s, rest_t = row_s[:y] + row_s[y + 1 :], row_t[:y] + row_t[y + 1 :]
        yes_s, yes_t = row_s[y] - lse(row_s), row_t[y] - lse(row_t)
        no_s, no_t = lse(rest_s) - lse(row_s), lse(rest_t) - lse(row_t)
        binary = math.exp(yes_t) * (yes_t - yes_s) + math.exp(no_t) * (no_t - no_s)
        given = [(a - lse(rest_s), b - lse(rest_t)) for a, b in zip(rest_s, rest_t, strict=True)]
        result.append((binary, sum(math.exp(b) * (b - a) for a, b in given)))
    return result


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_both_parts_are_those_of_the_paper(tau: float, classes: int) -> None:
    s, t, target = logits(7, classes)
    binary, others = dkd_terms(s, t, target, tau)
    wanted = torch.tensor(terms_by_loops(s, t, target, tau), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([binary, others], dim=1), wanted, rtol=1e-10, atol=1e-12)
    tckd, nckd = dkd_losses(s, t, target, tau)
    assert tckd.item() == pytest.approx(tau**2 * sum(wanted[:, 0].tolist()) / 7, rel=1e-10)
    assert nckd.item() == pytest.approx(tau**2 * sum(wanted[:, 1].tolist()) / 7, rel=1e-10, abs=1e-12)
    assert binary.min() > 0 and others.min() >= 0


def test_decoupled_holds_the_target_and_all_others() -> None:
    z, _, target = logits(6)
    odds, log_q = decoupled(z, target, 2.0)
    for i, y in enumerate(target.tolist()):
        p = softmax(z[i].tolist(), 2.0)
        assert math.exp(odds[i].item()) == pytest.approx(p[y] / (1 - p[y]), rel=1e-12)
        assert log_q[i].exp().tolist() == pytest.approx([p[c] / (1 - p[y]) for c in range(CLASSES) if c != y])


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_with_the_teachers_own_weight_it_is_kd(tau: float) -> None:
    """KL(p_t || p_s) = KL(b_t || b_s) + (1 - p_t[y]) KL(q_t || q_s), in value and in gradient."""
    s, t, target = logits(6)
    s.requires_grad_()
    binary, others = dkd_terms(s, t, target, tau)
    beta = 1 - F.softmax(t / tau, dim=1)[torch.arange(6), target]
    both = tau**2 * (binary + beta * others).mean()
    kd = kd_loss(s, t, tau)
    assert both.item() == pytest.approx(kd.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, s)[0] for loss in (both, kd)))


def test_the_parts_do_not_see_what_is_the_others() -> None:
    """TCKD depends on p[y] alone; NCKD not on the target's logit at all."""
    s, t, target = logits(6)
    binary, others = dkd_terms(s, t, target, 4.0)
    shifted = s + 7.0 * F.one_hot(target, CLASSES)
    again = dkd_terms(shifted, t, target, 4.0)
    torch.testing.assert_close(again[1], others)
    assert ((again[0] - binary).abs() > 1e-3).all()
    mask = F.one_hot(target, CLASSES).bool()
    swapped = s.clone()
    swapped[~mask] = s[~mask].view(6, -1).flip(1).flatten()  # the others' logits among themselves
    again = dkd_terms(swapped, t, target, 4.0)
    torch.testing.assert_close(again[0], binary)
    assert ((again[1] - others).abs() > 1e-3).all()
    assert all(value.abs().max() < 1e-12 for value in dkd_terms(t + 3.0, t, target, 4.0))  # the same softmax: nothing


def test_gradcheck() -> None:
    s, t, target = logits(3)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.stack(dkd_losses(x, t, target, 4.0)), s)


def test_the_gradient_goes_to_the_student_alone() -> None:
    s, t, target = logits()
    s.requires_grad_()
    t.requires_grad_()
    for loss in dkd_losses(s, t, target, 4.0):
        grad_s, grad_t = torch.autograd.grad(loss, (s, t), retain_graph=True, allow_unused=True)
        assert grad_s.abs().max() > 1e-3 and grad_t is None


def test_two_classes_have_no_others_among_themselves() -> None:
    s, t, target = logits(5, 2)
    s.requires_grad_()
    tckd, nckd = dkd_losses(s, t, target, 4.0)
    assert nckd.item() == 0 and torch.autograd.grad(nckd, s, retain_graph=True)[0].abs().max() == 0
    torch.testing.assert_close(tckd, kd_loss(s, t, 4.0))  # KL of two classes is the binary one
    assert torch.autograd.grad(tckd, s)[0].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", ["student right", "student wrong", "teacher right", "teacher wrong", "both"])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_saturated_logits_are_finite_and_right(dtype: torch.dtype, side: str, tau: float) -> None:
    """p[y] is 1 or 0 to the last bit, where log(1 - p[y]) or log(p[y]) of a probability would be -inf."""
    s, t, target = logits(4, scale=1.0)
    spike = 800.0 * F.one_hot(target if "right" in side else (target + 1) % CLASSES, CLASSES)
    s, t = (z + spike if name in side or side == "both" else z for name, z in (("student", s), ("teacher", t)))
    s, t = s.to(dtype).requires_grad_(), t.to(dtype)
    losses = dkd_losses(s, t, target, tau)
    samples = terms_by_logarithms(s.detach().double(), t.double(), target, tau)
    for loss, values in zip(losses, zip(*samples, strict=True), strict=True):
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert loss.item() == pytest.approx(tau**2 * sum(values) / 4, rel=1e-4, abs=1e-4)
        (gradient,) = torch.autograd.grad(loss, s, retain_graph=True)
        assert gradient.dtype == dtype and gradient.isfinite().all()
    if side == "student wrong":  # KL to a student that gives y no probability: about z / tau a sample
        assert losses[0].item() > 0.05 * tau * 800
        assert torch.autograd.grad(losses[0], s)[0].abs().max() > 0


def test_half_precision_and_autocast_compute_in_float32() -> None:
    s, t, target = logits(8, 100)
    s, t = s.half(), t.half()
    wanted = dkd_losses(s.float(), t.float(), target, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        given = dkd_losses(s, t, target, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize(
    ("s", "t", "said"), [((3, 5), (3, 4), "differ in shape"), ((3, 1), (3, 1), "needs at least 2 classes")]
)
def test_wrong_logits_are_refused(s: tuple[int, int], t: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dkd_losses(torch.zeros(s), torch.zeros(t), torch.zeros(3, dtype=torch.long), 4.0)


# --- warm-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "warmup", "weight"),
    [
        (0.0, 20, 1 / 20),  # the first epoch is number 1
        (0.99, 20, 1 / 20),
        (1.0, 20, 2 / 20),
        (9.5, 20, 10 / 20),
        (18.999, 20, 19 / 20),
        (19.0, 20, 1.0),
        (200.0, 20, 1.0),
        (0.0, 1, 1.0),  # ImageNet: none
        (0.0, 0, 1.0),
        (57.3, 0, 1.0),
    ],
)
def test_warmup_by_epoch(epoch: float, warmup: int, weight: float) -> None:
    assert warmup_weight(epoch, warmup, torch.zeros(2, dtype=torch.float64)).item() == pytest.approx(weight, rel=1e-12)


def test_the_warmup_is_constant_within_an_epoch_of_any_length() -> None:
    for length in (3, 7, 391, 781):
        weights = [warmup_weight(step / length, 20, torch.zeros(1)).item() for step in range(3 * length)]
        assert weights == pytest.approx([(step // length + 1) / 20 for step in range(3 * length)])


def test_losses_are_weighted_and_warmed_up() -> None:
    s, t, target = logits()
    outputs = {"student": Output(s, [], lambda x: x), "teacher": Output(t, [], lambda x: x)}
    tckd, nckd = (value.item() for value in dkd_losses(s, t, target, 2.0))
    method = DKD(DKDOptions(alpha=0.7, beta=3.0, tau=2.0, warmup=4, ce=0.5))
    for epoch, warm in ((0.3, 0.25), (2.0, 0.75), (10.0, 1.0)):
        losses = method.losses(outputs, {"target": target}, Progress(0, epoch, 100, 10.0))
        assert losses.keys() == {"student"} and losses["student"].keys() == {"ce", "tckd", "nckd"}
        assert losses["student"]["ce"].item() == pytest.approx(0.5 * F.cross_entropy(s, target).item())
        assert losses["student"]["tckd"].item() == pytest.approx(warm * 0.7 * tckd)
        assert losses["student"]["nckd"].item() == pytest.approx(warm * 3.0 * nckd)


def test_a_compiled_loss_is_not_compiled_anew_in_every_epoch() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    s, t, target = logits()
    outputs = {"student": Output(s, [], lambda x: x), "teacher": Output(t, [], lambda x: x)}
    counter, method = CompileCounterWithBackend("aot_eager"), DKD()
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: method.losses(outputs, {"target": target}, p)["student"], backend=counter)
    for step in range(24):
        progress = Progress(step, step / 2, 24, 12.0)
        wanted = method.losses(outputs, {"target": target}, progress)["student"]
        for name, value in compiled(progress).items():
            assert value.item() == pytest.approx(wanted[name].item(), rel=1e-6)
    assert counter.frame_count <= 2  # once for the first step, once for numbers that change


# --- as a method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adm", [None, ADMConfig(alpha=1.0, beta=0.0, gamma=0.0)])
def test_only_the_student_learns(adm: ADMConfig | None) -> None:
    networks = {
        r: create_network(n, CLASSES) for r, n in {"teacher": "cifar_wrn_10_2", "student": "cifar_vgg8"}.items()
    }
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    distiller = ClassificationDistiller(
        networks,
        {role: NetworkConfig(role) for role in networks},
        dict.fromkeys(networks, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))),
        METHODS["dkd"](with_adm=adm is not None),
        adm,
        OptimizerConfig(lr=0.05, weight_decay=0.1),
        images[:2],
        num_classes=CLASSES,
    ).train()
    before = {name: value.clone() for name, value in distiller.networks["teacher"].state_dict().items()}
    optim = distiller.optimizer.make(distiller.parameter_groups())
    batch = {"image": images, "target": torch.arange(6) % CLASSES, "index": torch.arange(6)}
    losses, _ = distiller(batch, Progress(0, 0.0, 10, 1.0))
    names = {"ce", "tckd", "nckd"} | ({"consensus", "phi"} if adm is not None else set())
    assert losses.keys() == {"student"} and losses["student"].keys() == names
    total = sum(losses["student"].values())
    assert isinstance(total, Tensor)
    distiller.backward(losses, total, SimpleNamespace(scaler=None))
    assert all(p.grad is None for p in distiller.networks["teacher"].parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.networks["student"].parameters())
    optim.step()
    after = distiller.networks["teacher"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def refusal(build: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        build()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tau": 0.0}, "dkd.tau must be positive"),
        ({"alpha": -1.0}, "dkd.alpha must not be negative"),
        ({"beta": -0.5}, "dkd.beta must not be negative"),
        ({"ce": -1.0}, "dkd.ce must not be negative"),
        ({"warmup": -1}, "dkd.warmup must not be negative"),
    ],
)
def test_wrong_options_are_refused(values: Any, said: str) -> None:
    assert said in refusal(lambda: DKDOptions(**values))
