"""KD (Hinton, Vinyals and Dean, 2015), with the weights of HobbitLong/RepDistiller and megvii-research/mdistiller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from classification.methods.base import MethodOptions, Output
from core.distillation import kd_loss
from core.ranges import NonNegative, Positive
from core.training.distiller import Progress
from offline_kd.methods.base import OfflineMethod


@dataclass(frozen=True)
class KDOptions(MethodOptions):
    """Options of KD. The defaults are those for CIFAR-100; for ImageNet: 0.5, 0.5, tau 1.

    Args:
        ce: weight of the cross-entropy.
        kd: weight of the teacher's loss.
        tau: temperature.
    """

    ce: NonNegative = 0.1
    kd: NonNegative = 0.9
    tau: Positive = 4.0


class KD(OfflineMethod):
    """``L = ce CE(z_s, y) + kd tau^2 KL(p_t || p_s)``."""

    Options: ClassVar[type] = KDOptions
    weights: ClassVar[tuple[str, ...]] = ("ce", "kd")

    def terms(self, student: Output, teacher: Output, target: Tensor, progress: Progress) -> dict[str, Tensor]:
        return {"kd": self.options.kd * kd_loss(student.logits, teacher.logits, self.options.tau)}
