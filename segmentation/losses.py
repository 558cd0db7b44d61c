"""Dense losses: what the pixels of a batch count, what each network imitates there, and ADM between two heads' maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine import dist
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from core.adapter import Adapter, smaller_size
from core.adm import consensus_kd_loss, consensus_loss, divergence_loss, phi_loss, spatial_similarity
from core.baselines import distances, epsilon, learning, min_logit_target
from core.distillation import feature_loss, full_precision, kd_loss
from core.errors import InputError, parse_label, require_not_negative, require_positive, unknown

Terms = dict[str, Tensor]

METHODS = ("vanilla", "dml", "kdcl", "switokd", "kd")
"""Both alone; mutual learning; a common target; a teacher that pauses; a fixed, trained teacher."""


def parse_method(label: str) -> tuple[str, bool]:
    """``"dml+adm" -> ("dml", True)``. Raises: InputError offering the nearest label."""
    return parse_label(label, METHODS)


@dataclass(frozen=True)
class ADMOptions:
    """Weights and forms of ADM on the two decode heads' maps.

    Args:
        alpha: weight of the consensus loss (trains the student).
        beta: weight of the divergence loss (trains the teacher); 0 with a fixed teacher.
        gamma: weight of the feature loss (Eq. 5, trains the student).
        consensus: ce (Eq. 7) or kd (Eq. 11).
        divergence: ce (Eq. 8); the kd form (Eq. 12) would keep a prediction for every pixel and is refused.
        tau: temperature of the kd form of consensus.
        feature_filter: Table 18's noise filters of the feature loss: none, norm, relu or drop.
        phi_loss: own trains the adapter by its own relative residual; feature by the feature loss (the paper's letter).
    """

    alpha: float = 0.2
    beta: float = 0.6
    gamma: float = 0.01
    consensus: Literal["ce", "kd"] = "ce"
    divergence: Literal["ce"] = "ce"
    tau: float = 1.0
    feature_filter: Literal["none", "norm", "relu", "drop"] = "none"
    phi_loss: Literal["own", "feature"] = "own"

    def __post_init__(self) -> None:
        require_not_negative("adm", alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        require_positive("adm", tau=self.tau)
        if self.divergence == "kd":
            raise InputError(
                "adm.divergence 'kd' imitates what the teacher said in the epoch before, and there would be one "
                "prediction to keep for every pixel of every image: use 'ce'"
            )
        for name, known in (
            ("consensus", ("ce", "kd")),
            ("divergence", ("ce",)),
            ("feature_filter", ("none", "norm", "relu", "drop")),
            ("phi_loss", ("own", "feature")),
        ):
            if getattr(self, name) not in known:
                raise unknown(f"value of adm.{name}", str(getattr(self, name)), known)

    @classmethod
    def of(cls, values: Mapping[str, Any], method: str, *, used: bool) -> ADMOptions:
        """The options of a config's dict; with a fixed teacher the defaults are the paper's offline ones, 0.1 / 0 / 0.

        Raises: InputError for an unknown option, and, where ADM is ``used``, for a beta that trains a fixed teacher.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("option of adm", name, names)
        offline = {"alpha": 0.1, "beta": 0.0, "gamma": 0.0} if method == "kd" else {}
        options = cls(**{**offline, **values})
        if used and method == "kd" and options.beta > 0:
            raise InputError(
                f"the teacher is fixed, and adm.beta is the weight of a loss that trains it: {options.beta}; give 0"
            )
        return options


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
    return head.loss_decode(
        logits,
        pixels.labels,
        weight=pixels.weight,
        avg_factor=pixels.labels.numel(),
        ignore_index=pixels.ignore,
    )


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


def imitation_loss(own: Tensor, other: Tensor, pixels: Pixels, tau: float) -> Tensor:
    """``tau^2 KL(other || own)`` of each pixel's distribution, a scalar."""
    return kd_loss(own, other, tau, pixels.weight)


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

    def __init__(self, options: ADMOptions, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.options = options
        self.adapter = Adapter(student_channels, teacher_channels)
        if options.phi_loss == "feature" and options.gamma == 0:
            self.adapter.requires_grad_(False)  # no loss reaches it

    def project(self, student: Tensor, teacher: Tensor) -> Tensor:
        """phi(F_s) at the size at which the maps are compared, F_s detached."""
        return self.adapter(student.detach(), smaller_size(student, teacher))

    def forward(self, student: Output, teacher: Output, pixels: Pixels) -> dict[str, Terms]:
        """``{role: {term: weighted scalar}}``; phi's own loss stands with the student's."""
        options = self.options
        losses: dict[str, Terms] = {"student": {}, "teacher": {}}
        projected = self.project(student.feature, teacher.feature)
        similarity = spatial_similarity(projected, teacher.feature)  # [B, h, w]

        if options.alpha > 0 and options.consensus == "ce":
            value = consensus_loss(
                similarity,
                student.reweighable(),
                pixels.labels,
                student.finish,
                lambda logits, _: cross_entropy(logits, pixels, student.head),
            )
            losses["student"]["consensus"] = options.alpha * value
        elif options.alpha > 0:
            value = consensus_kd_loss(
                similarity,
                student.reweighable(),
                teacher.reweighable(),
                student.finish,
                teacher.finish,
                options.tau,
                pixels.weight,
            )
            losses["student"]["consensus"] = options.alpha * value
        if options.beta > 0:
            value = divergence_loss(
                similarity,
                teacher.reweighable(),
                pixels.labels,
                teacher.finish,
                lambda logits, _: cross_entropy(logits, pixels, teacher.head),
            )
            losses["teacher"]["divergence"] = options.beta * value
        if options.gamma > 0:
            frozen = options.phi_loss == "own"
            value = feature_loss(
                student.feature, teacher.feature, self.adapter, options.feature_filter, frozen_last=frozen
            )
            losses["student"]["feature"] = options.gamma * value
        if options.phi_loss == "own" and self.adapter.conv is not None:
            losses["student"]["phi"] = phi_loss(projected, teacher.feature, student.feature)
        return losses
