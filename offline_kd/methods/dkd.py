"""DKD, decoupled knowledge distillation (Zhao et al., CVPR 2022): KD's loss in two parts with a weight each.

Values as in megvii-research/mdistiller (distillers/DKD.py, configs). The published code masks the target's logit by
-1000 and takes the logarithm of summed probabilities, which is -inf for a saturated network; here both parts come from
differences of log-sum-exps in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.methods.base import MethodOptions, Output
from core.distillation import full_precision
from core.ranges import Index, NonNegative, Positive
from core.training.distiller import Progress
from offline_kd.methods.base import OfflineMethod


@dataclass(frozen=True)
class DKDOptions(MethodOptions):
    """Options of DKD. The defaults are those of ResNet-32x4 -> ResNet-8x4 on CIFAR-100; see ``DKD`` for other pairs.

    Args:
        alpha: weight of the target class's part (TCKD).
        beta: weight of the other classes' part (NCKD).
        tau: temperature.
        warmup: epochs over which alpha and beta rise to their whole, in equal steps from 1 / warmup in the first epoch;
            0 or 1 for no rise.
        ce: weight of the cross-entropy.
    """

    alpha: NonNegative = 1.0
    beta: NonNegative = 8.0
    tau: Positive = 4.0
    warmup: Index = 20
    ce: NonNegative = 1.0


def decoupled(logits: Tensor, target: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The target class against all others, and the others among themselves, of ``p = softmax(logits / tau)``.

    Args: logits ``[B, K]`` with K >= 2; class indices ``[B]``; tau > 0.
    Returns: ``z_y - logsumexp(z without y)``, the logit of ``p[y]``, ``[B]``; ``log q``, q the softmax over the other
        classes, ``[B, K - 1]``; in float32 at least.
    Raises: ValueError for fewer than two classes.
    """
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"DKD needs at least 2 classes, and the logits are {tuple(logits.shape)}")
    z = full_precision(logits) / tau
    index = torch.arange(classes - 1, device=z.device)
    others = z.gather(1, index + (index >= target[:, None]))  # the columns without y: [B, K - 1]
    normaliser = others.logsumexp(dim=1, keepdim=True)
    return (z.gather(1, target[:, None]) - normaliser).squeeze(1), others - normaliser


def dkd_terms(logits: Tensor, target_logits: Tensor, target: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The two parts of ``KL(p_t || p_s) = KL(b_t || b_s) + (1 - p_t[y]) KL(q_t || q_s)``, of each sample.

    ``b = (p[y], 1 - p[y])``, q the softmax over the classes other than y, all at temperature tau.

    Args: the student's and the teacher's logits ``[B, K]``, the latter detached; class indices ``[B]``; tau > 0.
    Returns: ``KL(b_t || b_s)`` and ``KL(q_t || q_s)``, ``[B]`` each; the second is 0 for two classes.
    Raises: ValueError where the shapes differ, or for fewer than two classes.
    """
    if logits.shape != target_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target logits {tuple(target_logits.shape)} differ in shape")
    d_s, log_q_s = decoupled(logits, target, tau)
    d_t, log_q_t = decoupled(target_logits.detach(), target, tau)
    yes, no = torch.sigmoid(d_t), torch.sigmoid(-d_t)
    binary = yes * (F.logsigmoid(d_t) - F.logsigmoid(d_s)) + no * (F.logsigmoid(-d_t) - F.logsigmoid(-d_s))
    return binary, F.kl_div(log_q_s, log_q_t, reduction="none", log_target=True).sum(dim=1)


def dkd_losses(logits: Tensor, target_logits: Tensor, target: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """``(TCKD, NCKD)``: tau^2 times the means of ``dkd_terms`` over the batch, two scalars."""
    binary, others = dkd_terms(logits, target_logits, target, tau)
    return tau**2 * binary.mean(), tau**2 * others.mean()


def warmup_weight(epoch: float, warmup: int, like: Tensor) -> Tensor:
    """``min(e / warmup, 1)`` with e the number of the current epoch, counted from 1; 1 where ``warmup`` is 0.

    Args: epochs done, fractional. Returns: a scalar on the device of ``like`` and no number, which torch.compile would
    take for a constant in every epoch anew.
    """
    one = full_precision(like.new_ones(()))
    return ((one * epoch).floor() + 1.0).div(warmup).clamp(max=1.0) if warmup else one


class DKD(OfflineMethod):
    """``L = ce CE(z_s, y) + min(e / warmup, 1) (alpha TCKD + beta NCKD)``, e counted from 1.

    ``docs/offline_kd.md`` has the authors' values by pair; those of any other follow from the nearest one. Theirs, too:
    beta 6 for WRN-40-2 -> WRN-16-2, WRN-40-1 and for VGG-13 -> MobileNetV2 (half width).
    """

    Options = DKDOptions
    takes_smooth_labels = False
    class_index = "DKD"
    weights = ("ce", "alpha", "beta")

    def terms(self, student: Output, teacher: Output, target: Tensor, progress: Progress) -> dict[str, Tensor]:
        options: DKDOptions = self.options
        tckd, nckd = dkd_losses(student.logits, teacher.logits, target, options.tau)
        weight = warmup_weight(progress.epoch, options.warmup, student.logits)
        return {"tckd": options.alpha * weight * tckd, "nckd": options.beta * weight * nckd}
