"""Mixup and cutmix of a whole batch by timm's ``Mixup``: one draw a step, before any network sees an image."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.training.distiller import Batch, Progress
from core.training.seed import mix, seeded

SALT = 0x6D6978
"""Keeps these draws apart from others that come of the same seed."""


class Mixing:
    """Turns a batch of a step into one of mixed images, uint8 as before, and targets ``[B, K]``, float32 of sum 1.

    All networks see the same mixed images, and all parts of an accumulated batch are of one draw, which is a function
    of (seed, step). Image i of a global batch of B is mixed with image B - 1 - i, as in timm; in a batch of odd length
    the middle one keeps to itself. Those are all in the share of one process, which hands them over where it is
    another: the number of processes changes nothing. Mixed pixels are rounded, as by timm's ``FastCollateMixup``.

    Args: alpha of mixup and of cutmix, one of them above 0; how often a batch is mixed at all, and, where both are on,
        by cutmix; the number of classes; the run's seed.
    """

    def __init__(
        self, mixup: float, cutmix: float, prob: float, switch_prob: float, *, num_classes: int, seed: int
    ) -> None:
        from timm.data import Mixup

        self.seed = seed
        # Smoothing is the criterion's: it is linear, so that mixing smoothed labels comes to the same.
        self.mixup = Mixup(mixup, cutmix, None, prob, switch_prob, label_smoothing=0.0, num_classes=num_classes)

    def __call__(self, batch: Batch, progress: Progress) -> Batch:
        """``image`` uint8 ``[B, C, H, W]`` or ``[B, V, C, H, W]``, ``target`` int64 ``[B]``, on whichever device."""
        images, target, own = batch["image"], batch["target"], len(batch["target"])
        partner = _partner(own, float(batch.get("weight", 1.0)))
        x, y = images, target
        if partner is not None or own % 2:
            # Both shares together are of even length, which timm wants, and reversed the second one faces the first.
            x, y = (torch.cat([share, _exchanged(share, partner)]) for share in (x, y))
        with seeded(mix(self.seed, SALT, progress.step)):
            x, y = self.mixup(x.flatten(1, -3).float(), y)
        return {**batch, "image": x[:own].round_().byte().view_as(images), "target": y[:own]}


def _partner(own: int, weight: float) -> int | None:
    """The process that holds the images B - 1 - i of this one's images i; None where it is this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = round(own * world / weight)  # B: see the loaders on ``weight``
    partner = (whole - 1 - rank) % world
    return None if partner == rank else partner


def _exchanged(share: Tensor, partner: int | None) -> Tensor:
    """The other process's share, of the same length, in return for this one's."""
    if partner is None:
        return share
    received: Any = torch.empty_like(share)
    for request in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, share.contiguous(), partner), dist.P2POp(dist.irecv, received, partner)]
    ):
        request.wait()
    return received
