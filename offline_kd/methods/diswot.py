"""DisWOT (Dong, Li and Wei, CVPR 2023) as a loss: KD and two similarity losses on the last maps.

The paper searches an architecture without training (``offline_kd/tools/score.py``), and offers its two metrics as
distillation losses besides. Which of the two stands behind "DisWOT" in Table 9, with a fixed ResNet-18 as student, is
said nowhere; the released code has no such loss. What is here is a reading of it: KD's own weights, the relation
loss with the weight that HobbitLong/RepDistiller gives the same loss under the name of similarity-preserving (3000 for
a batch of 64), the semantic loss with ICKD's 2.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.base import Output, probe
from classification.networks.base import ConvBN, init_conv
from core.distillation import full_precision
from core.ranges import NonNegative
from core.training.distiller import Progress
from offline_kd.methods.kd import KD, KDOptions


@dataclass(frozen=True)
class DisWOTOptions(KDOptions):
    """KD's options, and those of DisWOT.

    Args:
        relation: weight of the relation loss for a batch of 64. A batch of B takes B / 64 of it, since the loss itself
            goes as 1 / B; B is what one process sees at once (its share of batch_size, and of that a part of
            fit.accumulate).
        semantic: weight of the semantic loss.
    """

    relation: NonNegative = 3000.0
    semantic: NonNegative = 2.5


def similarities(rows: Tensor) -> Tensor:
    """``rn(A A^T)``: how rows ``A [..., N, D]`` resemble each other, each row of the result of length 1 (or 0).

    Returns: ``[..., N, N]`` in float32 at least, also under autocast.
    """
    with torch.autocast(rows.device.type, enabled=False):
        a = full_precision(rows)
        return F.normalize(a @ a.transpose(-1, -2), dim=-1)


def relation_loss(map_student: Tensor, map_teacher: Tensor) -> Tensor:
    """``L_rel = 1/B^2 || rn(A_t A_t^T) - rn(A_s A_s^T) ||_F^2``, A ``[B, CHW]``: how images resemble each other.

    Args: maps ``[B, C, H, W]``, the teacher's detached; channels and sizes may differ.
    Returns: a scalar. Raises: ValueError where the batches differ.
    """
    s, t = map_student.flatten(1), map_teacher.detach().flatten(1)
    if len(s) != len(t):
        raise ValueError(f"the maps are of {len(s)} and {len(t)} images")
    return (similarities(s) - similarities(t)).square().mean()


def semantic_loss(map_student: Tensor, map_teacher: Tensor) -> Tensor:
    """``L_sem = 1/(B C) sum_b || rn(F_t F_t^T) - rn(F_s F_s^T) ||_F^2``, F ``[C, HW]``: how channels resemble others.

    The matrices take 4 B C^2 bytes each: 67 MB for 64 images and 512 channels, 1 GB for 2048.

    Args: maps ``[B, C, H, W]``, the teacher's detached; sizes may differ.
    Returns: a scalar. Raises: ValueError where images or channels differ in number.
    """
    s, t = map_student.flatten(2), map_teacher.detach().flatten(2)
    if s.shape[:2] != t.shape[:2]:
        raise ValueError(f"the maps are of {tuple(s.shape[:2])} and {tuple(t.shape[:2])} images and channels")
    return (similarities(s) - similarities(t)).square().sum(dim=-1).mean()


class DisWOT(KD):
    """``L = ce CE + kd KL(s <- t) + relation B/64 L_rel + semantic L_sem``, on the last maps behind a ReLU.

    Both similarity losses compare matrices of B x B and C x C, so that the maps' sizes need not agree. Where their
    channels differ, L_sem has a 1x1 convolution and BatchNorm on the student's side, trained with the student.
    """

    Options = DisWOTOptions
    weights = ("ce", "kd", "relation", "semantic")

    adapter: nn.Module

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        networks = super().prepare(networks, samples)
        channels = {role: probe(network, samples[role])[-1].shape[1] for role, network in networks.items()}
        self.adapter = nn.Identity()
        if channels["student"] != channels["teacher"] and self.options.semantic:
            self.adapter = ConvBN(channels["student"], channels["teacher"], 1).apply(init_conv)
        return networks

    def terms(self, student: Output, teacher: Output, target: Tensor, progress: Progress) -> dict[str, Tensor]:
        options: DisWOTOptions = self.options
        map_s, map_t = F.relu(student.maps[-1]), F.relu(teacher.maps[-1])
        terms = super().terms(student, teacher, target, progress)
        terms["relation"] = options.relation * len(map_s) / 64 * relation_loss(map_s, map_t)
        if options.semantic:
            terms["semantic"] = options.semantic * semantic_loss(self.adapter(map_s), map_t)
        return terms
