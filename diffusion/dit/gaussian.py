"""Gaussian diffusion as DiT uses it: 1000 linear betas, a network that predicts the noise and the variance.

``z_t = a_t x + s_t eps`` with ``a_t^2 + s_t^2 = 1`` at times 0..T-1 (Ho et al. 2020); the variance lies between the
posterior's and beta and is learned by the variational bound (Nichol & Dhariwal 2021); guidance is Ho & Salimans 2022's
on the channels of Peebles & Xie 2023. The samplers are DDPM with respaced times, and DDIM (Song et al. 2021).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from core.distillation import full_precision
from core.errors import InputError
from diffusion.schedule import Schedule, per_image, weigh

Sampler = Literal["ddpm", "ddim"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""``(z [B, C, H, W], t int64 [B]) -> output [B, 2C, H, W]``, or ``[B, C, H, W]``: the noise alone."""

GREY = 1.0 / 255.0
"""Half a grey level where -1..1 are 255 of them."""


class LinearSchedule(Schedule):
    """Times 0..T - 1, with ``log_beta``, ``log_posterior``, ``gain``.

    The betas rise from 1e-4 to 0.02, times 1000 / T. ``log_posterior`` is ``log btilde``, the variance of
    ``q(z_{t-1} | z_t, x)``, which is 0 at time 0 and therefore takes the value of time 1 there.
    At least 21 times, for 20 would need a beta of 1.
    """

    log_beta: Tensor
    log_posterior: Tensor
    gain: Tensor

    def __init__(self, timesteps: int = 1000) -> None:
        beta = torch.linspace(0.1 / timesteps, 20.0 / timesteps, timesteps, dtype=torch.float64)
        cumulative = (1 - beta).cumprod(0)
        before = torch.cat([cumulative.new_ones(1), cumulative[:-1]])
        posterior = beta * (1 - before) / (1 - cumulative)
        posterior[0] = posterior[1]
        gain = beta / ((1 - cumulative) * (1 - beta).sqrt())
        super().__init__(timesteps, cumulative, log_beta=beta.log(), log_posterior=posterior.log(), gain=gain)

    def variational_bound(self, eps: Tensor, v: Tensor, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``L_vlb`` of each image ``[B]``, in bits, the mean over C, H, W (Nichol & Dhariwal 2021, section 3.1).

        ``KL(q(z_{t-1} | z_t, x) || N(mu, Sigma))`` with ``log Sigma = f log beta_t + (1 - f) log btilde_t``,
        ``f = (v + 1) / 2``; at time 0 the code length of x, of 256 grey levels in [-1, 1], under ``N(mu, Sigma)``.

        Args: the predicted noise (detached here: the bound trains the variance alone); the network's other half; the
            clean image; ``z = noisy(x, noise, t)``.
        """
        eps, v, x, z = full_precision(eps.detach()), full_precision(v), full_precision(x), full_precision(z)
        low, high = per_image(self.log_posterior[t], x), per_image(self.log_beta[t], x)
        above = (v + 1.0) / 2.0 * (high - low)  # log Sigma - log btilde
        # mu_q - mu, by the noise instead of two images that are nearly the same
        gap = weigh(self.gain[t], self.noisy(x, eps, t) - z)
        precision = (-low - above).exp()
        divergence = 0.5 * (above + (-above).expm1() + gap.square() * precision)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), _code_length(x, gap, precision.sqrt()), divergence)
        return nats.mean(dim=(1, 2, 3)) / math.log(2.0)


def _code_length(x: Tensor, gap: Tensor, inverse_sd: Tensor) -> Tensor:
    """``-log`` of what ``N(x - gap, 1 / inverse_sd^2)`` gives to the grey level of x, ``[B, C, H, W]``, in nats.

    The darkest level holds all below it, the brightest all above (Ho et al. 2020, Eq. 13). At most -log 1e-12.
    """
    # By symmetry both are lower tails, in which float32 has small differences.
    near = torch.special.ndtr((GREY - gap.abs()) * inverse_sd)
    far = torch.special.ndtr((-GREY - gap.abs()) * inverse_sd)
    below = torch.special.ndtr((gap + GREY) * inverse_sd)
    above = torch.special.ndtr((GREY - gap) * inverse_sd)
    mass = torch.where(x < -0.999, below, torch.where(x > 0.999, above, near - far))
    return -mass.clamp(min=1e-12).log()


def guided(model: Any, z: Tensor, t: Tensor, y: Tensor, scale: float, channels: int = 3) -> Tensor:
    """A DiT's output under classifier-free guidance: ``u + scale (c - u)`` in the noise's first ``channels``.

    c is the output for the labels, u that for the null label at the same z. The noise's other channels and the
    variance stay c's: with DiT's ``channels=3`` the fourth of a latent is not guided. Images of one or three channels
    are guided in all of them. ``scale=1`` is no guidance, and one forward of half the size.

    Args: ``model(z, t, y) -> [B, 2C or C, H, W]`` with ``model.classes`` its null label; ``z [B, C, H, W]``; ``t [B]``;
        labels y int64 ``[B]``.
    """
    if scale == 1.0:
        return model(z, t, y)
    outputs = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, model.classes)]))
    c, u = outputs.chunk(2)
    n = min(channels, z.shape[1])
    return torch.cat([u[:, :n] + scale * (c[:, :n] - u[:, :n]), c[:, n:]], dim=1)


def spaced_times(steps: int, timesteps: int = 1000, sampler: Sampler = "ddpm") -> list[int]:
    """The times of ``steps`` sampling steps, noisiest first, exactly as DiT's ``space_timesteps`` has them.

    ddpm: from T - 1 to 0 in steps as equal as rounding allows (250 of 1000: 999, 995, ..., 4, 0); a position is a sum
    of strides, whose own rounding decides halves. ddim: the multiples of the smallest stride of which there are
    ``steps`` below T (50 of 1000: 980, 960, ..., 20, 0).
    Raises: InputError where there are not so many times, where no stride has them, and for a single step, which DiT's
    code puts at time 0, where there is no noise.
    """
    if not 2 <= steps <= timesteps:
        raise InputError(f"{steps} sampling steps: there are 2 to {timesteps} on this schedule")
    if sampler == "ddim":
        stride = -(-timesteps // steps)
        times = range(0, timesteps, stride)
        if len(times) != steps:
            more = len(range(0, timesteps, stride - 1))
            raise InputError(f"{steps} sampling steps: ddim has {len(times)} or {more} of {timesteps} by equal strides")
        return list(reversed(times))
    strides = itertools.repeat((timesteps - 1) / (steps - 1), steps - 1)
    return [round(position) for position in itertools.accumulate(strides, initial=0.0)][::-1]


@torch.no_grad()
def trajectory(
    predict: Predict,
    schedule: LinearSchedule,
    times: Sequence[int],
    z: Tensor,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Sampling from ``z [B, C, H, W]`` at ``times[0]``: z after each step, never clipped; the last one is the sample.

    With ``noise`` it is DDPM. The betas are those of the spaced times, the variance is learned between them and their
    posterior's (Nichol & Dhariwal 2021, section 4); of a network without one it is beta. Without, it is DDIM (eta = 0),
    whose last step lands on the clean image as the network sees it.

    Args: ``noise() -> [B, C, H, W]``, on any device, once for each step but the last; it is drawn while the device
        computes.
    """
    levels = schedule.alpha.square().cpu()[list(times)].tolist()  # a_t^2, read once: no wait for the device in a step
    for t, now, then in zip(times, levels, [*levels[1:], 1.0], strict=True):
        output = full_precision(predict(z, torch.full((len(z),), t, device=z.device)))
        eps, v = output[:, : z.shape[1]], output[:, z.shape[1] :]
        if noise is None:
            x = (z - math.sqrt(1.0 - now) * eps) / math.sqrt(now)
            z = math.sqrt(then) * x + math.sqrt(1.0 - then) * eps
        else:
            beta = 1.0 - now / then
            z = (z - beta / math.sqrt(1.0 - now) * eps) / math.sqrt(now / then)
            if then < 1.0:
                high, low = math.log(beta), math.log(beta * (1.0 - then) / (1.0 - now))
                f = (v + 1.0) / 2.0 if v.shape[1] else torch.ones_like(eps)
                z = z + (0.5 * (f * high + (1.0 - f) * low)).exp() * noise().to(z.device, non_blocking=True)
        yield z
