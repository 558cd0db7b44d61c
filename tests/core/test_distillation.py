"""Eq. 2, 4, 5, standardised logits, Table 18's noise filters: against plain Python loops, and who gets a gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core import Adapter, InputError, feature_loss, kd_loss, mutual_loss
from core.distillation import standardise

B, K = 4, 5
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


# The formulas in plain Python.


def loop_log_softmax(logits: list[float], tau: float = 1.0) -> list[float]:
    top = max(logits) / tau
    log_sum = top + math.log(sum(math.exp(z / tau - top) for z in logits))
    return [z / tau - log_sum for z in logits]


def loop_kd(logits: Tensor, target_logits: Tensor, tau: float) -> float:
    """Eq. 2: tau^2 sum_c p_n log(p_n / p_m), the mean over the batch."""
    total = 0.0
    for m, n in zip(logits.tolist(), target_logits.tolist(), strict=True):
        log_m, log_n = loop_log_softmax(m, tau), loop_log_softmax(n, tau)
        total += tau**2 * sum(math.exp(b) * (b - a) for a, b in zip(log_m, log_n, strict=True))
    return total / len(logits)


def loop_cross_entropy(logits: Tensor, target: Tensor) -> float:
    return sum(-loop_log_softmax(z)[y] for z, y in zip(logits.tolist(), target.tolist(), strict=True)) / len(logits)


def loop_feature_loss(student: Tensor, teacher: Tensor, noise_filter: str = "none") -> float:
    """Eq. 5 for two maps of one shape, with Table 18's filters."""
    b, c, h, w = student.shape
    s, t = student.flatten(2).tolist(), teacher.flatten(2).tolist()  # [B][C][HW]
    if noise_filter == "norm":
        for maps in (s, t):
            for image in maps:
                for channel in image:
                    norm = math.sqrt(sum(x * x for x in channel))
                    channel[:] = [x / norm for x in channel]
    if noise_filter == "relu":
        s, t = ([[[max(x, 0.0) for x in channel] for channel in image] for image in maps] for maps in (s, t))
    per_image = []
    for image_s, image_t in zip(s, t, strict=True):
        errors = [sum((image_t[k][i] - image_s[k][i]) ** 2 for k in range(c)) / c for i in range(h * w)]
        if noise_filter == "drop":
            errors = sorted(errors)[: h * w - h * w // 3]
        per_image.append(sum(errors) / len(errors))
    return sum(per_image) / b


def random_map(channels: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(B, channels, height, width or height, dtype=torch.float64, requires_grad=True)


def reached(loss: Tensor, **tensors: Tensor) -> set[str]:
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name for name, g in zip(tensors, gradients, strict=True) if g is not None and g.abs().max() > 0}


# Eq. 2


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_loss(tau: float) -> None:
    own, other = torch.randn(2, B, K, dtype=torch.float64) * 3
    assert kd_loss(own, other, tau).item() == pytest.approx(loop_kd(own, other, tau), rel=1e-10)
    assert kd_loss(own, own, tau).item() == pytest.approx(0, abs=1e-12)
    assert kd_loss(own, other, tau).item() != pytest.approx(kd_loss(other, own, tau).item(), rel=1e-3)


def test_kd_loss_of_pixels_is_the_mean_over_locations() -> None:
    own, other = torch.randn(2, B, K, 3, 2, dtype=torch.float64)
    flat = [x.movedim(1, -1).reshape(-1, K) for x in (own, other)]
    assert kd_loss(own, other, 2.0).item() == pytest.approx(loop_kd(flat[0], flat[1], 2.0), rel=1e-10)


def test_kd_loss_gradients() -> None:
    own, other = (torch.randn(B, K, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, other, 3.0), (own,))
    assert reached(kd_loss(own, other), own=own, other=other) == {"own"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kd_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    own, other = torch.randn(2, B, K).to(dtype)
    with torch.autocast("cpu", dtype):
        loss = kd_loss(own, other, 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kd_loss(own.float(), other.float(), 4.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kd_loss_is_stable_at_large_logits(dtype: torch.dtype) -> None:
    own = torch.tensor([[16384.0, 0.0, -16384.0]], dtype=dtype, requires_grad=True)
    loss = kd_loss(own, torch.tensor([[0.0, 16384.0, -16384.0]], dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(16384, rel=1e-6)  # log p_own of the other's certain class
    torch.testing.assert_close(own.grad, torch.tensor([[1.0, -1.0, 0.0]], dtype=dtype))


def test_kd_loss_needs_equal_shapes() -> None:
    with pytest.raises(ValueError, match="shape"):
        kd_loss(torch.zeros(B, K), torch.zeros(B, K + 1))


# SHAKE, NORM


def test_standardise_is_what_the_paper_writes() -> None:
    z = torch.randn(7, 6, dtype=torch.float64) * 3 + 2
    wanted = torch.empty_like(z)
    for i, row in enumerate(z.tolist()):
        mean = sum(row) / 6
        variance = sum((x - mean) ** 2 for x in row) / 6
        for k, x in enumerate(row):
            wanted[i, k] = 2.5 * (x - mean) / math.sqrt(variance + 1e-7)
    torch.testing.assert_close(standardise(z, 2.5), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(standardise(4 * z - 1, 2.5), wanted, rtol=1e-6, atol=1e-6)  # neither scale nor mean
    assert torch.autograd.gradcheck(lambda x: standardise(x, 2.5), z.requires_grad_())
    assert standardise(torch.ones(2, 5), 2.5).abs().max() == 0  # no spread, no NaN
    assert standardise(torch.randn(2, 5).bfloat16(), 2.5).dtype == torch.float32


# Eq. 4


@pytest.mark.parametrize("roles", [("teacher", "student"), ("teacher", "student", "student_2")])
@pytest.mark.parametrize("peers", ["mean", "sum"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_mutual_loss(roles: tuple[str, ...], peers: Any, tau: float) -> None:
    logits = {role: torch.randn(B, K, dtype=torch.float64) for role in roles}
    target = torch.randint(K, (B,))
    weights = {role: {"teacher": 0.3, "student": 1.0, "student_2": 0.7}[role] for role in roles}
    losses = mutual_loss(logits, target, weights, tau, peers)
    assert list(losses) == list(roles)
    for role in roles:
        others = [loop_kd(logits[role], logits[other], tau) for other in roles if other != role]
        expected = weights[role] * sum(others) / (len(others) if peers == "mean" else 1)
        assert losses[role]["ce"].item() == pytest.approx(loop_cross_entropy(logits[role], target), rel=1e-10)
        assert losses[role]["kd"].item() == pytest.approx(expected, rel=1e-10)


def test_mutual_loss_with_one_weight_for_all() -> None:
    logits = {role: torch.randn(B, K, dtype=torch.float64) for role in ("teacher", "student", "student_2")}
    target = torch.randint(K, (B,))
    same = mutual_loss(logits, target, dict.fromkeys(logits, 0.4))
    for role, terms in mutual_loss(logits, target, 0.4).items():
        torch.testing.assert_close(terms["kd"], same[role]["kd"], **EXACT)
    default = mutual_loss(logits, target)
    torch.testing.assert_close(default["student"]["kd"] * 0.4, same["student"]["kd"], **EXACT)


def test_a_lone_network_learns_by_cross_entropy_alone() -> None:
    assert set(mutual_loss({"student": torch.zeros(B, K)}, torch.zeros(B, dtype=torch.long))["student"]) == {"ce"}
    two = mutual_loss(
        {"teacher": torch.zeros(B, K), "student": torch.ones(B, K)}, torch.zeros(B, dtype=torch.long), 0.0
    )
    assert set(two["teacher"]) == {"ce"}


def test_a_weight_for_a_network_that_is_not_there_is_refused() -> None:
    logits = {"teacher": torch.zeros(B, K), "student": torch.ones(B, K)}
    y = torch.zeros(B, dtype=torch.long)
    with pytest.raises(InputError, match="'studnet': did you mean 'student'"):
        mutual_loss(logits, y, {"studnet": 0.3})
    torch.testing.assert_close(mutual_loss(logits, y, {"teacher": 0.3})["student"], mutual_loss(logits, y)["student"])


def test_mutual_losses_reach_their_own_network_alone() -> None:
    logits = {
        r: torch.randn(B, K, dtype=torch.float64, requires_grad=True) for r in ("teacher", "student", "student_2")
    }
    losses = mutual_loss(logits, torch.randint(K, (B,)))
    for role, terms in losses.items():
        for loss in terms.values():
            assert reached(loss, **logits) == {role}


# Eq. 5 and Table 18


@pytest.mark.parametrize("noise_filter", ["none", "norm", "relu", "drop"])
@pytest.mark.parametrize("size", [(3, 5), (2, 2), (1, 2)])
def test_feature_loss(noise_filter: Any, size: tuple[int, int]) -> None:
    s, t = random_map(4, *size), random_map(4, *size)
    expected = loop_feature_loss(s, t, noise_filter)
    assert feature_loss(s, t, noise_filter=noise_filter).item() == pytest.approx(expected, rel=1e-10)
    assert feature_loss(t, t, noise_filter=noise_filter).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("noise_filter", ["none", "norm", "relu", "drop"])
def test_feature_loss_with_an_adapter_and_unequal_sizes(noise_filter: Any) -> None:
    """The filters act on phi(F_s), at the smaller of both sizes."""
    phi = Adapter(4, 6).double()
    assert phi.conv is not None
    for s, t in ((random_map(4, 6), random_map(6, 3)), (random_map(4, 3), random_map(6, 6))):
        projected = torch.einsum("dc,bchw->bdhw", phi.conv.weight[:, :, 0, 0], s)
        small = [x if x.shape[-1] == 3 else x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for x in (projected, t)]
        expected = loop_feature_loss(small[0], small[1], noise_filter)
        assert feature_loss(s, t, phi, noise_filter).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("noise_filter", ["none", "norm", "relu", "drop"])
def test_feature_loss_gradients(noise_filter: Any) -> None:
    s, t = random_map(3, 3, 2), random_map(4, 3, 2)
    phi = Adapter(3, 4).double()
    assert phi.conv is not None
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, t, phi, noise_filter), (s,))
    everything = {"student": s, "teacher": t, "phi": phi.conv.weight}
    assert reached(feature_loss(s, t, phi, noise_filter), **everything) == {"student"}
    trained = feature_loss(s, t, phi, noise_filter, frozen_last=False)
    assert reached(trained, **everything) == {"student", "phi"}


@pytest.mark.parametrize("noise_filter", ["none", "norm", "relu", "drop"])
def test_both_learners_together_are_the_feature_loss_without_detach(noise_filter: Any) -> None:
    s, t = random_map(3, 6, 4), random_map(4, 3, 2)
    phi = Adapter(3, 4).double()
    assert phi.conv is not None

    def loss(learner: Any, teacher: Tensor = t) -> Tensor:
        return feature_loss(s, teacher, phi, noise_filter, learner=learner)

    assert loss("student").item() == loss("teacher").item()
    assert reached(loss("teacher"), student=s, teacher=t, phi=phi.conv.weight) == {"teacher"}
    assert torch.autograd.gradcheck(lambda x: loss("teacher", x), (t,))
    if noise_filter == "none":
        pooled = s.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        projected = torch.einsum("dc,bchw->bdhw", phi.conv.weight[:, :, 0, 0], pooled)
        whole = torch.autograd.grad((projected - t).square().mean(), (s, t))
        torch.testing.assert_close(torch.autograd.grad(loss("student"), s)[0], whole[0])
        torch.testing.assert_close(torch.autograd.grad(loss("teacher"), t)[0], whole[1])
    with pytest.raises(InputError, match="learner"):
        loss("nobody")


def test_norm_filter_ignores_the_scale_of_a_channel() -> None:
    s, t = random_map(3, 4), random_map(3, 4)
    scale = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(feature_loss(s * scale, t, noise_filter="norm"), feature_loss(s, t, noise_filter="norm"))
    dead = torch.zeros_like(s, requires_grad=True)
    feature_loss(dead, t, noise_filter="norm").backward()
    assert dead.grad is not None and dead.grad.isfinite().all()


def test_drop_filter_leaves_out_the_worst_third_of_each_image() -> None:
    s, t = random_map(3, 4), random_map(3, 4)
    with torch.no_grad():
        s[0, :, 0, 0] += 1e6
        s[1, :, 3, 2:] -= 1e6
    assert feature_loss(s, t).item() > 1e9
    assert feature_loss(s, t, noise_filter="drop").item() < 10


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_stage_maps_weigh_a_half_a_quarter_an_eighth_from_the_end(n: int) -> None:
    """Algorithm 1 for N = n + 1 maps with the stem's: 1 / 2^(N - idx), idx = 1 .. n."""
    sizes = [16 >> k for k in range(4)][-n:]
    students, teachers = ([random_map(3, size) for size in sizes] for _ in range(2))
    big_n = n + 1
    expected = sum(
        loop_feature_loss(students[idx - 1], teachers[idx - 1]) / 2 ** (big_n - idx) for idx in range(1, big_n)
    )
    assert feature_loss(students, teachers).item() == pytest.approx(expected, rel=1e-10)


def test_stage_maps_of_unequal_numbers_are_paired_from_the_end() -> None:
    students = [random_map(c, s) for c, s in ((3, 16), (4, 8), (5, 4), (6, 2))]
    teachers = [random_map(c, s) for c, s in ((4, 8), (7, 4), (6, 4))]
    phi = Adapter(5, 7).double()
    adapters = [None, phi, None]
    pooled = teachers[2].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    expected = (
        loop_feature_loss(students[1], teachers[0], "drop") / 8
        + loop_feature_loss(phi(students[2]), teachers[1], "drop") / 4
        + loop_feature_loss(students[3], pooled, "drop") / 2
    )
    assert feature_loss(students, teachers, adapters, "drop").item() == pytest.approx(expected, rel=1e-10)
    flipped = feature_loss(
        teachers, students, [None, Adapter(7, 5).double(), None], "drop"
    )  # the longer list is the teacher's
    assert reached(flipped, **{f"t{i}": x for i, x in enumerate(teachers)}) == {"t0", "t1", "t2"}


def test_stage_maps_who_gets_a_gradient() -> None:
    """The student's maps and the earlier stages' phi; the last phi has its own loss, unless told otherwise."""
    students = [random_map(3, 8), random_map(4, 4), random_map(5, 2)]
    teachers = [random_map(4, 8), random_map(6, 4), random_map(7, 2)]
    adapters = [Adapter(3, 4).double(), Adapter(4, 6).double(), Adapter(5, 7).double()]
    everything = {f"s{i}": x for i, x in enumerate(students)} | {f"t{i}": x for i, x in enumerate(teachers)}
    everything |= {f"phi{i}": a.conv.weight for i, a in enumerate(adapters) if a.conv is not None}
    expected = {"s0", "s1", "s2", "phi0", "phi1"}
    assert reached(feature_loss(students, teachers, adapters), **everything) == expected
    trained = feature_loss(students, teachers, adapters, frozen_last=False)
    assert reached(trained, **everything) == expected | {"phi2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_feature_loss_under_autocast(dtype: torch.dtype) -> None:
    s, t, phi = torch.randn(B, 8, 4, 4), torch.randn(B, 6, 4, 4), Adapter(8, 6)
    expected = feature_loss(s, t, phi)
    with torch.autocast("cpu", dtype):
        loss = feature_loss(s, t, phi)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    large = torch.full((B, 8, 4, 4), 300.0, dtype=dtype)  # 300^2 is beyond float16
    assert feature_loss(large, -large).item() == pytest.approx(360000, rel=1e-2)


def test_feature_loss_errors() -> None:
    s, t = random_map(3, 4), random_map(5, 4)
    with pytest.raises(ValueError, match=r"Adapter\(3, 5\)"):
        feature_loss(s, t)
    with pytest.raises(ValueError, match="unknown noise filter 'mean'"):
        feature_loss(s, s, noise_filter="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one map"):
        feature_loss([], [s])
    with pytest.raises(ValueError, match="1 adapters for 2 pairs"):
        feature_loss([s, s], [s, s], [None])
    with pytest.raises(InputError, match="not a map and a list"):
        feature_loss(s, [t])
    with pytest.raises(InputError, match="not a map and a list"):
        feature_loss([s], t)
    with pytest.raises(InputError, match="takes one Adapter, not a list"):
        feature_loss(s, t, [Adapter(3, 5)])
    with pytest.raises(InputError, match="takes a list of adapters"):
        feature_loss([s], [t], Adapter(3, 5))
    with pytest.raises(InputError, match=r"Adapter\(5, 3\) got a map .* 3 channels"):
        feature_loss(s, t, Adapter(5, 3))
    with pytest.raises(InputError, match="4 and 2 samples"):
        feature_loss(s, s[:2])
    with pytest.raises(InputError, match="maps of one kind"):
        feature_loss(s, s.flatten(2))


def test_mean_squared_error_is_pytorchs() -> None:
    s, t = random_map(3, 4), random_map(3, 4)
    torch.testing.assert_close(feature_loss(s, t), F.mse_loss(s, t), **EXACT)
