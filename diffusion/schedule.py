"""The cosine noise schedule, the DDIM step, and the target of progressive distillation: small, exact, on the device.

``z_t = a_t x + s_t eps`` with ``a_t^2 + s_t^2 = 1``; ``rho_t = a_t / s_t``, ``SNR_t = rho_t^2`` (Nichol & Dhariwal
2021; Song et al. 2021; Salimans & Ho 2022). Images are in [-1, 1], times are integers 0..T.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from core.distillation import full_precision

Prediction = Literal["x", "v"]
Weighting = Literal["snr_trunc", "snr_plus_1", "none"]
TIMESTEPS = 65536
"""The most that a schedule has here."""


def cosine_betas(timesteps: int = 1024) -> Tensor:
    """The T + 1 betas, float64: ``1 - f((i + 1) / (T + 1)) / f(i / (T + 1))``, at most 0.999.

    One beta for each of the indices 0..T, so that a time of T exists and index 0 keeps a little noise (sigma 0.0063),
    as in Sun et al.'s code; diffusers' own cosine schedule has T betas and begins with no noise at all.
    """

    def f(u: Tensor) -> Tensor:
        return ((u + 0.008) / 1.008 * (math.pi / 2)).cos().square()

    i = torch.arange(timesteps + 1, dtype=torch.float64)
    return (1 - f((i + 1) / (timesteps + 1)) / f(i / (timesteps + 1))).clamp(max=0.999)


class Schedule(nn.Module):
    """``alpha``, ``sigma`` and a schedule's own tables, float64 by time; they move with the module, are never saved.

    All methods take times ``[B]`` (int64) and images ``[B, C, H, W]``; coefficients are looked up in float64 and then
    cast to the images' precision, float32 at least, also under autocast. Nothing is clipped: that is the sampler's.

    Args: ``timesteps``: T; ``cumulative``: a_t^2 of each time.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, timesteps: int, cumulative: Tensor, **tables: Tensor) -> None:
        super().__init__()
        self.timesteps = timesteps
        for name, values in {"alpha": cumulative.sqrt(), "sigma": (1 - cumulative).sqrt(), **tables}.items():
            self.register_buffer(name, values, persistent=False)

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``z_t = a_t x + s_t eps``."""
        return weigh(self.alpha[t], full_precision(x)) + weigh(self.sigma[t], full_precision(noise))


class CosineSchedule(Schedule):
    """Times 0..T, with ``snr``."""

    snr: Tensor

    def __init__(self, timesteps: int = 1024) -> None:
        cumulative = (1 - cosine_betas(timesteps)).cumprod(0)
        super().__init__(timesteps, cumulative, snr=cumulative / (1 - cumulative))

    def predict_x(self, output: Tensor, z: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What a network's output says about x: itself, or ``a_t z - s_t v``."""
        output, z = full_precision(output), full_precision(z)
        return output if prediction == "x" else weigh(self.alpha[t], z) - weigh(self.sigma[t], output)

    def ddim(self, x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One DDIM step from z at t to s, where x is what the network sees in z: ``a_s x + s_s (z - a_t x) / s_t``."""
        ratio = self.sigma[s] / self.sigma[t]
        return weigh(self.alpha[s] - ratio * self.alpha[t], full_precision(x)) + weigh(ratio, full_precision(z))

    def mix(self, t: Tensor, m: Tensor, s: Tensor) -> Tensor:
        """c ``[B]`` float64 of the two-step target: ONE DDIM step t -> s with ``c x2 + (1 - c) x1`` lands where two do.

        x1 is what the teacher sees at t, x2 at m, after its own step t -> m. Equal to Salimans & Ho's difference
        ``(z_s - (s_s / s_t) z_t) / (a_s - (s_s / s_t) a_t)``, which loses three digits to cancellation in float32 at
        512 steps. 1/2 < c <= 1, and 1 where there is no noise left at s.
        """

        def gain(start: Tensor) -> Tensor:  # how far a step from there to s moves with x
            return self.alpha[s] - self.sigma[s] / self.sigma[start] * self.alpha[start]

        return gain(m) / gain(t)

    def weight(self, t: Tensor, kind: Weighting) -> Tensor:
        """w ``[B]`` float64 of a squared error in x: ``max(1, SNR)``, ``SNR + 1``, or 1 (Salimans & Ho, section 4).

        ``max(1, SNR) e_x^2 = max(e_x^2, e_eps^2)``, and ``(SNR + 1) e_x^2 = e_v^2``.
        """
        snr = self.snr[t]
        if kind == "none":
            return torch.ones_like(snr)
        return snr.clamp(min=1.0) if kind == "snr_trunc" else snr + 1.0


def interpolate(c: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``c second + (1 - c) first``, c ``[B]``: of images, for the target, and of feature maps ``[B, C, H, W]``."""
    first, second = full_precision(first), full_precision(second)
    return first + weigh(c, second - first)


def per_image(factor: Tensor, images: Tensor) -> Tensor:
    """``[B]`` -> ``[B, 1, 1, 1]`` in the images' precision."""
    return factor.to(images.dtype).view(-1, 1, 1, 1)


def weigh(factor: Tensor, images: Tensor) -> Tensor:
    """Images ``[B, C, H, W]``, each times its factor ``[B]``."""
    return per_image(factor, images) * images
