"""Schedule, loss terms, guidance and samplers of DiT, each against plain float64 numbers and against diffusers."""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import InputError
from diffusion.dit.gaussian import LinearSchedule, guided, spaced_times, trajectory

BETAS = [1e-4 + i * (0.02 - 1e-4) / 999 for i in range(1000)]
LEFT = list(itertools.accumulate((1 - beta for beta in BETAS), operator.mul))  # a_t^2


@pytest.fixture(scope="module")
def schedule() -> LinearSchedule:
    return LinearSchedule()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Toy(nn.Module):
    """A smooth "network" of noise and variance; v leaves [-1, 1] in places, as real ones do."""

    def __init__(self, learn_sigma: bool = True) -> None:
        super().__init__()
        self.learn_sigma = learn_sigma

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        time = t.to(z.dtype).view(-1, 1, 1, 1) / 1000.0
        eps = 0.9 * z * (0.3 + 0.7 * time) + 0.2 * torch.sin(3.0 * z + 5.0 * time)
        v = 1.2 * torch.cos(2.0 * z.flip(3) - 4.0 * time)
        return torch.cat([eps, v], dim=1) if self.learn_sigma else eps


def test_schedule_is_linear_in_the_betas(schedule: LinearSchedule) -> None:
    expected = torch.tensor(LEFT, dtype=torch.float64)
    assert schedule.alpha.dtype == torch.float64
    torch.testing.assert_close(schedule.alpha.square(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma.square(), 1 - expected, rtol=1e-10, atol=0)
    assert LEFT[0] == pytest.approx(0.9999) and LEFT[999] == pytest.approx(4.0358e-5, rel=1e-4)
    assert schedule.log_posterior[0] == schedule.log_posterior[1]
    for t in (1, 2, 500, 999):
        posterior = BETAS[t] * (1 - LEFT[t - 1]) / (1 - LEFT[t])
        assert schedule.log_posterior[t].item() == pytest.approx(math.log(posterior), rel=1e-9)
        assert schedule.log_beta[t].item() == pytest.approx(math.log(BETAS[t]), rel=1e-12)
    assert not schedule.state_dict()


def test_noisy_images_are_the_mix_in_full_precision(schedule: LinearSchedule) -> None:
    x, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([0, 399, 999])
    z = schedule.noisy(x.bfloat16(), noise, t)
    assert z.dtype == torch.float32
    for i, time in enumerate(t.tolist()):
        expected = math.sqrt(LEFT[time]) * x[i].bfloat16().float() + math.sqrt(1 - LEFT[time]) * noise[i]
        torch.testing.assert_close(z[i], expected, rtol=0, atol=1e-6)


def reference_bound(eps: float, v: float, x: float, z: float, t: int) -> float:
    """The term of one pixel in bits, by the definitions: both means written out, the normal CDF by erfc."""
    beta, left = BETAS[t], LEFT[t]
    before = LEFT[t - 1] if t > 0 else 1.0
    first, second = max(t, 1), max(t, 1) - 1
    posterior = BETAS[first] * (1 - LEFT[second]) / (1 - LEFT[first])
    f = (v + 1) / 2
    log_variance = f * math.log(beta) + (1 - f) * math.log(posterior)
    seen = (z - math.sqrt(1 - left) * eps) / math.sqrt(left)

    def mean(image: float) -> float:
        return (math.sqrt(before) * beta * image + math.sqrt(1 - beta) * (1 - before) * z) / (1 - left)

    if t > 0:
        squares = math.exp(math.log(posterior) - log_variance) + (mean(x) - mean(seen)) ** 2 / math.exp(log_variance)
        return 0.5 * (log_variance - math.log(posterior) - 1 + squares) / math.log(2)
    sd = math.exp(0.5 * log_variance)

    def under(value: float) -> float:  # P(N(mean, sd) < value)
        return 0.5 * math.erfc((mean(seen) - value) / sd / math.sqrt(2))

    def over(value: float) -> float:
        return 0.5 * math.erfc((value - mean(seen)) / sd / math.sqrt(2))

    if x < -0.999:
        mass = under(x + 1 / 255)
    elif x > 0.999:
        mass = over(x - 1 / 255)
    elif x > mean(seen):
        mass = over(x - 1 / 255) - over(x + 1 / 255)
    else:
        mass = under(x + 1 / 255) - under(x - 1 / 255)
    return -math.log(max(mass, 1e-12)) / math.log(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_variational_bound_is_its_definition(schedule: LinearSchedule, dtype: torch.dtype) -> None:
    t = torch.tensor([0, 0, 1, 2, 399, 400, 998, 999])
    x = (normal(8, 2, 3, 3).clamp(-1, 1) * 255).round() / 255  # some at the ends, where the grey levels are open
    assert (x.abs() == 1).any()
    noise = normal(8, 2, 3, 3, seed=1)
    eps = noise + 0.5 * normal(8, 2, 3, 3, seed=2)
    v = 1.5 * normal(8, 2, 3, 3, seed=3)
    x, noise, eps, v = (values.to(dtype) for values in (x, noise, eps, v))
    z = schedule.noisy(x, noise, t)
    found = schedule.variational_bound(eps, v, x, z, t)
    assert found.shape == (8,) and found.dtype == dtype
    for i, time in enumerate(t.tolist()):
        pixels = [values[i].flatten().tolist() for values in (eps, v, x, z)]
        terms = [reference_bound(e, v_, x_, z_, time) for e, v_, x_, z_ in zip(*pixels, strict=True)]
        expected = sum(terms) / 18
        assert found[i].item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 2e-3)


def test_float32_bound_keeps_its_digits_where_the_mean_is_right(schedule: LinearSchedule) -> None:
    """A good network, at every time: the bound is a small difference of larger numbers."""
    t = torch.arange(1000)
    x, noise = normal(1000, 1, 2, 2).clamp(-1, 1), normal(1000, 1, 2, 2, seed=1)
    eps, v = noise + 0.05 * normal(1000, 1, 2, 2, seed=2), normal(1000, 1, 2, 2, seed=3).clamp(-1, 1)
    z = schedule.noisy(x, noise, t)
    found = schedule.variational_bound(eps, v, x, z, t)
    exact = schedule.variational_bound(eps.double(), v.double(), x.double(), z.double(), t)
    assert ((found - exact).abs() / exact).max() < 5e-4


def test_bound_is_least_at_the_right_variance(schedule: LinearSchedule) -> None:
    """With the true noise the posterior's variance is right, v = -1, and there the bound is 0."""
    t = torch.tensor([1, 50, 700])
    x, noise = normal(3, 1, 8, 8).double(), normal(3, 1, 8, 8, seed=1).double()
    z = schedule.noisy(x, noise, t)
    bounds = [schedule.variational_bound(noise, torch.full_like(x, v), x, z, t) for v in (-1.2, -1.0, -0.8, 1.0)]
    assert bounds[1].abs().max() < 1e-12
    assert (bounds[0] > 0).all() and (bounds[2] > 0).all() and (bounds[3] > bounds[2]).all()


def test_bound_trains_the_variance_alone_and_is_finite(schedule: LinearSchedule) -> None:
    t = torch.tensor([0, 0, 1, 999])
    x = normal(4, 3, 4, 4).clamp(-1, 1)
    x[1] *= 40.0  # a latent far outside [-1, 1]
    eps, v = normal(4, 3, 4, 4, seed=1).requires_grad_(), (3 * normal(4, 3, 4, 4, seed=2)).requires_grad_()
    z = schedule.noisy(x, normal(4, 3, 4, 4, seed=3), t)
    with torch.autocast("cpu", torch.bfloat16):
        bound = schedule.variational_bound(eps.bfloat16(), v.bfloat16(), x, z, t)
    assert bound.dtype == torch.float32 and bound.isfinite().all()
    assert bound.max() < math.log2(1e12) + 1000
    bound.sum().backward()
    assert eps.grad is None
    assert v.grad is not None and v.grad.isfinite().all() and all(v.grad[i].any() for i in (2, 3))


def test_gradient_of_the_variance_is_right_at_time_0(schedule: LinearSchedule) -> None:
    t = torch.zeros(2, dtype=torch.int64)
    x = (normal(2, 1, 2, 2).double().clamp(-1, 1) * 255).round() / 255
    noise = normal(2, 1, 2, 2, seed=1).double()
    z, v = schedule.noisy(x, noise, t), normal(2, 1, 2, 2, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: schedule.variational_bound(0.9 * noise, v, x, z, t), (v,))


def test_times_are_dits() -> None:
    times = spaced_times(250)
    assert times[:3] == [999, 995, 991] and times[-3:] == [8, 4, 0] and len(set(times)) == 250
    # DiT's code adds 999 / 249 again and again, and rounds.
    position, expected = 0.0, []
    for _ in range(250):
        expected.append(round(position))
        position += 999 / 249
    assert times == expected[::-1]
    assert spaced_times(1000) == spaced_times(1000, sampler="ddim") == list(range(999, -1, -1))
    assert spaced_times(4) == [999, 666, 333, 0] and spaced_times(4, sampler="ddim") == [750, 500, 250, 0]
    for steps in (0, 1, 1001):
        with pytest.raises(InputError, match=f"{steps} sampling steps: there are 2 to 1000"):
            spaced_times(steps)


def test_times_are_dits_for_every_number_of_steps() -> None:
    """Against the rule of its code: sums of one stride, rounded; and the multiples of a stride that fit, if any do."""
    multiples = {len(range(0, 1000, stride)): stride for stride in range(999, 0, -1)}  # the smallest stride stays
    refused = 0
    for steps in range(2, 1001):
        position, expected = 0.0, []
        for _ in range(steps):
            expected.append(round(position))
            position += 999 / (steps - 1)
        assert spaced_times(steps) == expected[::-1]
        if stride := multiples.get(steps):
            assert spaced_times(steps, sampler="ddim") == list(range(0, 1000, stride))[::-1]
            continue
        refused += 1
        with pytest.raises(InputError, match=f"^{steps} sampling steps: ddim has ") as error:
            spaced_times(steps, sampler="ddim")
        near = [int(word) for word in str(error.value).split() if word.isdigit()][1:3]
        assert near[0] < steps < near[1] and all(number in multiples for number in near)
    assert refused == 1000 - len(multiples) - 1


class Labelled(nn.Module):
    """Depends on image, time and label, and counts its forwards."""

    classes = 5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(self.classes + 1, 2 * channels)
        self.sizes: list[int] = []

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.sizes.append(len(z))
        label = self.table(y)[:, :, None, None]
        return torch.cat([z, z.flip(2)], dim=1) * (1.0 + label) + t.view(-1, 1, 1, 1) / 1000.0


@pytest.mark.parametrize(("channels", "guided_channels"), [(4, 3), (4, 4), (3, 3), (3, 4), (1, 3), (1, 4)])
def test_guidance_is_dits_formula(channels: int, guided_channels: int) -> None:
    """Per image and channel: u + s (c - u) where it is guided, c elsewhere; fewer channels are all guided."""
    model = Labelled(channels)
    z, t, y = normal(3, channels, 4, 4), torch.tensor([0, 500, 999]), torch.tensor([1, 0, 4])
    with torch.no_grad():
        found = guided(model, z, t, y, 4.0, guided_channels)
        assert model.sizes == [6]
        c, u = model(z, t, y), model(z, t, torch.full((3,), 5))
    assert found.shape == (3, 2 * channels, 4, 4)
    for channel in range(2 * channels):
        touched = channel < min(guided_channels, channels)
        expected = u[:, channel] + 4.0 * (c[:, channel] - u[:, channel]) if touched else c[:, channel]
        torch.testing.assert_close(found[:, channel], expected)
        assert torch.equal(found[:, channel], c[:, channel]) != touched


def test_no_guidance_is_one_forward_and_zero_is_unconditional() -> None:
    model = Labelled(4)
    z, t, y = normal(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(guided(model, z, t, y, 1.0), model(z, t, y)) and model.sizes == [2, 2]
        nothing = guided(model, z, t, y, 0.0, 4)
        torch.testing.assert_close(nothing[:, :4], model(z, t, torch.tensor([5, 5]))[:, :4])


def draws(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, seed=100 + i) for i in range(count)]


@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_ddpm_is_its_definition(schedule: LinearSchedule, steps: int) -> None:
    """Float64, with the spaced process written as Nichol & Dhariwal do: betas of its own, x, then the posterior."""
    shape = (2, 2, 4, 4)
    times, noise, z = spaced_times(steps), draws(steps, shape), normal(*shape)
    found = list(trajectory(Toy(), schedule, times, z.double(), iter(noise).__next__))
    assert len(found) == steps
    expected = z.double()
    for i, t in enumerate(times):
        left, before = LEFT[t], LEFT[times[i + 1]] if i + 1 < steps else 1.0
        beta = 1 - left / before
        eps, v = Toy()(expected, torch.full((2,), t)).chunk(2, dim=1)
        x = (expected - math.sqrt(1 - left) * eps) / math.sqrt(left)
        mean = math.sqrt(before) * beta / (1 - left) * x + math.sqrt(1 - beta) * (1 - before) / (1 - left) * expected
        expected = mean
        if i + 1 < steps:
            f = (v + 1) / 2
            variance = beta**f * (beta * (1 - before) / (1 - left)) ** (1 - f)
            expected = mean + variance.sqrt() * noise[i].double()
        torch.testing.assert_close(found[i], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [10, 250])
def test_ddpm_trajectory_is_diffusers(schedule: LinearSchedule, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    import diffusers.schedulers.scheduling_ddpm as module

    scheduler: Any = diffusers.DDPMScheduler(
        1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == spaced_times(steps)
    shape = (2, 3, 4, 4)
    noise, z, model = draws(steps, shape), normal(*shape), Toy()
    ours = list(trajectory(model, schedule, spaced_times(steps), z, iter(noise).__next__))
    given = iter(noise)
    monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **options: next(given))
    scale = 0.0
    for found, t in zip(ours, scheduler.timesteps, strict=True):
        z = scheduler.step(model(z, t.expand(2)), t, z).prev_sample
        scale = max(scale, z.abs().max().item())
        assert (found - z).abs().max() < 5e-5 * scale


@pytest.mark.parametrize("steps", [1000, 250, 50, 8])
def test_ddim_trajectory_is_diffusers(schedule: LinearSchedule, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler: Any = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    times = spaced_times(steps, sampler="ddim")
    assert scheduler.timesteps.tolist() == times
    z, model = normal(2, 3, 4, 4), Toy()
    ours = list(trajectory(model, schedule, times, z))
    scale = 0.0
    for found, t in zip(ours, scheduler.timesteps, strict=True):
        z = scheduler.step(model(z, t.expand(2))[:, :3], t, z, eta=0.0).prev_sample
        scale = max(scale, z.abs().max().item())
        assert (found - z).abs().max() < 5e-5 * scale


def test_a_network_without_variance_samples_with_beta(schedule: LinearSchedule) -> None:
    class Upper(Toy):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            eps = super().forward(z, t)
            return torch.cat([eps, torch.ones_like(eps)], dim=1)  # f = 1

    shape = (2, 1, 4, 4)
    runs = [
        list(trajectory(model, schedule, spaced_times(20), normal(*shape), iter(draws(20, shape)).__next__))
        for model in (Toy(learn_sigma=False), Upper(learn_sigma=False))
    ]
    assert torch.equal(runs[0][-1], runs[1][-1])
    z = list(trajectory(Toy(learn_sigma=False), schedule, spaced_times(20, sampler="ddim"), normal(*shape)))[-1]
    assert torch.equal(z, list(trajectory(Toy(), schedule, spaced_times(20, sampler="ddim"), normal(*shape)))[-1])


def test_samplers_find_what_a_perfect_network_knows(schedule: LinearSchedule) -> None:
    """All data are one image: the true noise is known, and both samplers land on the image."""
    image = normal(1, 3, 4, 4).clamp(-1, 1).double()

    def perfect(z: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
        eps = (z - a * image) / s
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    z = normal(5, 3, 4, 4, seed=1).double()
    ends = [
        list(trajectory(perfect, schedule, spaced_times(50), z, lambda: torch.randn(5, 3, 4, 4).double()))[-1],
        list(trajectory(perfect, schedule, spaced_times(50, sampler="ddim"), z))[-1],
    ]
    for end in ends:
        assert (end - image).abs().max() < 1e-9
