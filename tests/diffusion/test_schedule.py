"""The schedule's values, and the target of progressive distillation against two explicit DDIM steps, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion.schedule import CosineSchedule, cosine_betas, interpolate

SCHEDULE = CosineSchedule()
A, S = SCHEDULE.alpha.tolist(), SCHEDULE.sigma.tolist()


def images(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(x: Tensor, z: Tensor, t: int, s: int) -> Tensor:
    """The definition: the noise that z and x imply, at another time."""
    return A[s] * x + S[s] * (z - A[t] * x) / S[t]


def test_1025_betas_and_their_products_by_the_definition() -> None:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for i, (beta, alpha, sigma) in enumerate(zip(cosine_betas().tolist(), A, S, strict=True)):
        expected = min(1 - f((i + 1) / 1025) / f(i / 1025), 0.999)
        product *= 1 - expected
        assert beta == pytest.approx(expected, abs=1e-15)
        assert alpha**2 == pytest.approx(product, rel=1e-12) and alpha**2 + sigma**2 == pytest.approx(1, abs=1e-14)
    assert len(A) == 1025 and SCHEDULE.alpha.dtype == torch.float64
    assert A[0] ** 2 == pytest.approx(0.99995978, abs=1e-8) and S[0] == pytest.approx(0.00634, abs=1e-5)
    assert A[512] ** 2 == pytest.approx(0.493083, abs=1e-6) and A[1024] ** 2 == pytest.approx(2.3117e-9, rel=1e-4)


@pytest.mark.parametrize("steps", [512, 64, 8, 4, 2, 1])
def test_one_step_with_the_target_equals_two_steps_of_the_teacher(steps: int) -> None:
    d = 1024 // steps
    ks = sorted({1, max(steps // 2, 1), steps})
    for k in ks:
        t, m, s = d * k, d * k - d // 2, d * (k - 1)
        z, x1, x2 = images(4, 1), images(4, 2), images(4, 3)
        z_m = step(x1, z, t, m)
        z_s = step(x2, z_m, m, s)
        difference = (z_s - S[s] / S[t] * z) / (A[s] - S[s] / S[t] * A[t])  # Salimans & Ho's form
        times = [torch.full((4,), i) for i in (t, m, s)]
        c = SCHEDULE.mix(*times)
        target = interpolate(c, x1, x2)
        torch.testing.assert_close(target, difference, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(step(target, z, t, s), z_s, rtol=0, atol=1e-13)
        torch.testing.assert_close(SCHEDULE.ddim(x1, z, times[0], times[1]), z_m, rtol=0, atol=1e-13)
        assert ((c > 0.5) & (c <= 1)).all()
        rho = [A[i] / S[i] for i in (t, m, s)]
        assert c[0].item() == pytest.approx((rho[2] - rho[1]) / (rho[2] - rho[0]), rel=1e-9)


def test_the_mix_keeps_float32s_precision_where_the_difference_loses_it() -> None:
    """At 512 steps; float64 is the reference."""
    t, m, s = (torch.full((64,), i) for i in (600, 599, 598))
    z, x1 = images(64, 1), images(64, 2)
    x2 = x1 + 0.01 * images(64, 3)
    exact = interpolate(SCHEDULE.mix(t, m, s), x1, x2)
    z32, x1_32, x2_32 = z.float(), x1.float(), x2.float()
    mixed = interpolate(SCHEDULE.mix(t, m, s), x1_32, x2_32)
    assert mixed.dtype == torch.float32 and (mixed - exact).abs().max() < 1e-6
    z_s = step(x2_32, step(x1_32, z32, 600, 599), 599, 598)
    difference = (z_s - S[598] / S[600] * z32) / (A[598] - S[598] / S[600] * A[600])
    assert (difference - exact).abs().max() > 2e-5


def test_each_image_has_a_time_of_its_own() -> None:
    t, s = torch.tensor([1024, 512, 4]), torch.tensor([512, 0, 2])
    x, z = images(3, 1), images(3, 2)
    landed = SCHEDULE.ddim(x, z, t, s)
    noisy = SCHEDULE.noisy(x, z, t)
    for i in range(3):
        torch.testing.assert_close(landed[i], step(x[i], z[i], int(t[i]), int(s[i])), rtol=0, atol=1e-13)
        torch.testing.assert_close(noisy[i], A[t[i]] * x[i] + S[t[i]] * z[i], rtol=0, atol=1e-14)


def test_predictions_agree_with_their_definitions() -> None:
    x, noise, t = images(4, 1), images(4, 2), torch.tensor([0, 1, 512, 1024])
    z = SCHEDULE.noisy(x, noise, t)
    v = torch.stack([A[i] * e - S[i] * y for i, e, y in zip(t.tolist(), noise, x, strict=True)])
    torch.testing.assert_close(SCHEDULE.predict_x(v, z, t, "v"), x, rtol=0, atol=1e-13)
    assert torch.equal(SCHEDULE.predict_x(x, z, t, "x"), x)


def test_weights_are_those_of_the_larger_error_and_of_v() -> None:
    x, noise, t = images(5, 1), images(5, 2), torch.tensor([1, 300, 512, 800, 1024])
    z = SCHEDULE.noisy(x, noise, t)
    guess = x + 0.1 * images(5, 3)
    for i, time in enumerate(t.tolist()):
        implied = (z[i] - A[time] * guess[i]) / S[time]
        x_error, eps_error = (guess[i] - x[i]).square().mean(), (implied - noise[i]).square().mean()
        v_error = ((A[time] * implied - S[time] * guess[i]) - (A[time] * noise[i] - S[time] * x[i])).square().mean()
        weights = {kind: SCHEDULE.weight(t, kind)[i] for kind in ("snr_trunc", "snr_plus_1", "none")}  # type: ignore
        torch.testing.assert_close(weights["snr_trunc"] * x_error, torch.maximum(x_error, eps_error), rtol=1e-9, atol=0)
        torch.testing.assert_close(weights["snr_plus_1"] * x_error, v_error, rtol=1e-9, atol=0)
        assert weights["none"] == 1


def test_half_precision_is_lifted_and_nothing_is_saved_with_a_network() -> None:
    z, t = images(2, 1, torch.bfloat16), torch.tensor([512, 1024])
    assert SCHEDULE.ddim(z, z, t, t - 512).dtype == torch.float32
    assert SCHEDULE.predict_x(z, z, t, "v").dtype == torch.float32
    assert not SCHEDULE.state_dict()
