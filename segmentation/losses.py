"""Dense losses: what the pixels of a batch count, what each network imitates there, and ADM between two heads' maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine import dist
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from core.adapter import Adapter
from core.adm import (
    ADMConfig,
    consensus_kd_loss,
    consensus_loss,
    control,
    divergence_loss,
    phi_loss,
    spatial_similarity,
)
from core.distillation import distances, epsilon, feature_loss, full_precision, learning, min_logit_target
from core.errors import InputError, parse_label, unknown
from core.maps import smaller_size

Terms = dict[str, Tensor]

METHODS = ("vanilla", "dml", "kdcl", "switokd", "kd")
"""Both alone; mutual learning; a common target; a teacher that pauses; a fixed, trained teacher."""


def parse_method(label: str) -> tuple[str, bool]:
    """``"dml+adm" -> ("dml", True)``. Raises: InputError offering the nearest label."""
    return parse_label(label, METHODS)


def adm_config(options: Mapping[str, Any], method: str, *, used: bool) -> ADMConfig:
    """The options of ADM on the two decode heads' maps, from a config's dict.

    What it leaves out is ImageNet's (alpha 0.2, beta 0.6, gamma 0.01) or, with a fixed teacher (method "kd"), the
    paper's offline 0.1 / 0 / 0; the paper gives none for segmentation.

    Raises: InputError for an unknown option or value and for the kd form of divergence; where ADM is ``used``, for a
        beta that would train a fixed teacher.
    """
    known = [field.name for field in fields(ADMConfig)]
    for name in options:
        if name not in known:
            raise unknown("option of adm", name, known)
    fixed = method == "kd"
    defaults = {"alpha": 0.1, "beta": 0.0, "gamma": 0.0} if fixed else {"alpha": 0.2, "beta": 0.6, "gamma": 0.01}
    config = ADMConfig(**{**defaults, **options})
    if config.divergence == "kd":
        raise InputError(
            "adm.divergence 'kd' imitates what the teacher said in the epoch before, and there would be one "
            "prediction to keep for every pixel of every image: use 'ce'"
        )
    if used and fixed and config.beta > 0:
        raise InputError(
            f"the teacher is fixed, and adm.beta is the weight of a loss that trains it: {config.beta}; give 0"
        )
    if used and fixed and config.feature_targets == "both":
        raise InputError("the teacher is fixed, and adm.feature_targets 'both' would train it: give 'student'")
    return config


@dataclass(frozen=True)
class Pixels:
    """The labels of a batch and how much each pixel counts."""

    labels: Tensor
    """``[B, H, W]``, class indices and the ignored label."""
    ignore: int
    """The ignored label, in mmseg 255."""
    weight: Tensor
    """``[B, H, W]``, float32, 0 at ignored pixels: each loss is the mean over all pixels of weight times its value."""

    @property
    def valid(self) -> Tensor:
        """``[B, H, W]``, where there is a label."""
        return self.labels != self.ignore

    @property
    def targets(self) -> Tensor:
        """``[B, H, W]``, the labels with a class in place of the ignored one."""
        return self.labels.masked_fill(~self.valid, 0)


def pixels_of(labels: Tensor, ignore: int = 255, normalise: Literal["all", "valid"] = "all") -> Pixels:
    """Losses are sums over the labelled pixels, divided by the number of all pixels or of the labelled ones.

    ``all`` is mmseg's default. ``valid`` divides by the mean number of labelled pixels of all processes, so that the
    mean of their gradients is that of one process which sees all images; where there is none, losses are 0.
    """
    weight = (labels != ignore).to(torch.float32)
    if normalise == "valid":
        count = weight.sum()
        dist.all_reduce(count, op="mean")
        weight = weight * (labels.numel() / count.clamp_min(1.0))
    return Pixels(labels, ignore, weight)


@dataclass(frozen=True)
class Output:
    """What one network says about a batch."""

    feature: Tensor
    """``[B, C, h, w]``, the decode head's map before its classifier: what ADM compares."""
    logits: Tensor
    """``[B, K, h, w]``, of that map, at least in float32."""
    full: Tensor
    """``[B, K, H, W]``, resized to the labels."""
    head: BaseDecodeHead
    """The decode head."""

    @property
    def bias(self) -> Tensor:
        """``[1, K, 1, 1]``, the classifier's."""
        return full_precision(self.head.conv_seg.bias)[:, None, None]

    def reweighable(self) -> Tensor:
        """``z - b``, to be multiplied by an attention A: the classifier is a 1x1 convolution W, so that
        ``A (z - b) + b = W (A F) + b``, without a second map, convolution or dropout mask."""
        return self.logits - self.bias

    def finish(self, reweighted: Tensor) -> Tensor:
        """``A (z - b)`` -> the logits of the reweighted map, resized to the labels."""
        return resize(reweighted + self.bias, self.full.shape[-2:], self.head)


def resize(logits: Tensor, size: tuple[int, ...], head: BaseDecodeHead) -> Tensor:
    """Logits ``[B, K, h, w]`` -> ``[B, K, *size]``, as the head's own loss does it."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=head.align_corners)


def cross_entropy(logits: Tensor, pixels: Pixels, head: BaseDecodeHead) -> Tensor:
    """The head's own cross-entropy (with its weight and class weights) of logits ``[B, K, H, W]``, a scalar."""
    count = pixels.labels.numel()
    return head.loss_decode(logits, pixels.labels, weight=pixels.weight, avg_factor=count, ignore_index=pixels.ignore)


@torch.no_grad()
def imitated(method: str, outputs: Mapping[str, Output], pixels: Pixels) -> Terms:
    """Which logits ``[B, K, H, W]`` each role imitates; a role without any learns from the labels alone."""
    teacher, student = outputs["teacher"].full, outputs["student"].full
    if method in ("dml", "switokd"):
        return {"teacher": student, "student": teacher}
    if method == "kdcl":
        target = min_logit_target(torch.stack([teacher, student]), pixels.targets)
        return {"teacher": target, "student": target}
    return {"student": teacher} if method == "kd" else {}


@torch.no_grad()
def teacher_learns(outputs: Mapping[str, Output], pixels: Pixels) -> Tensor:
    """SwitOKD: 1 where this batch trains the teacher, 0 where it pauses; alike on all processes, a scalar.

    The distances are means over the labelled pixels of all processes.
    """
    mask = pixels.valid
    sums = distances(outputs["student"].full, outputs["teacher"].full, pixels.targets, mask)
    total = torch.cat([sums, mask.sum().to(sums.dtype)[None]])
    dist.all_reduce(total)
    r_s, r_t, gap = (total[:3] / total[3].clamp_min(1.0)).unbind()
    return learning(r_s, r_t, gap, epsilon(r_s, r_t))


class DenseADM(nn.Module):
    """ADM between the maps of two decode heads.

    Consensus and divergence are pixel cross-entropies of the reweighted maps' logits and leave ignored pixels out. The
    similarity, the feature loss and phi's own compare maps and know no labels: every location counts there.

    Args: the options; the channels of both maps.
    """

    def __init__(self, config: ADMConfig, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.config = config
        self.adapter = Adapter(student_channels, teacher_channels, always=config.phi == "always")
        if config.phi_loss == "feature" and config.gamma == 0:
            self.adapter.requires_grad_(False)  # no loss reaches it

    def project(self, student: Tensor, teacher: Tensor) -> Tensor:
        """phi(F_s) at the size at which the maps are compared, F_s detached."""
        return self.adapter(student.detach(), smaller_size(student, teacher))

    def forward(self, student: Output, teacher: Output, pixels: Pixels) -> dict[str, Terms]:
        """``{role: {term: weighted scalar}}``; phi's own loss stands with the student's."""
        config = self.config
        losses: dict[str, Terms] = {"student": {}, "teacher": {}}
        projected = self.project(student.feature, teacher.feature)
        similarity = control(spatial_similarity(projected, teacher.feature), config.control)  # [B, h, w]

        def attended(loss: Callable[..., Tensor], output: Output) -> Tensor:
            criterion = partial(cross_entropy, head=output.head)  # the target that it is given is `pixels`
            return loss(similarity, output.reweighable(), pixels, output.finish, criterion)

        if config.alpha > 0 and config.consensus == "ce":
            losses["student"]["consensus"] = config.alpha * attended(consensus_loss, student)
        elif config.alpha > 0:
            maps, heads = (student.reweighable(), teacher.reweighable()), (student.finish, teacher.finish)
            value = consensus_kd_loss(similarity, *maps, *heads, config.tau, pixels.weight)
            losses["student"]["consensus"] = config.alpha * value
        if config.beta > 0:
            losses["teacher"]["divergence"] = config.beta * attended(divergence_loss, teacher)
        if config.gamma > 0:
            compared = student.feature, teacher.feature, self.adapter, config.feature_filter
            value = feature_loss(*compared, frozen_last=config.phi_loss == "own")
            losses["student"]["feature"] = config.gamma * value
            if config.feature_targets == "both":
                losses["teacher"]["feature"] = config.gamma * feature_loss(*compared, learner="teacher")
        if config.phi_loss == "own" and self.adapter.conv is not None:
            losses["student"]["phi"] = phi_loss(projected, teacher.feature, student.feature)
        return losses
