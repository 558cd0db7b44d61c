"""SHAKE (Li and Jin, NeurIPS 2022): a shadow head on a pre-trained teacher's features learns together with the student.

The student imitates the shadow, a proxy of the teacher that adapts to the student, and not the teacher itself. Sources:
the paper, and lilujunai/SHAKE (shake/helper/loops.py, shake/models/util.py), which takes the feature maps 1 to 3; here
it is the last three, whatever the number of stages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.base import Method, MethodOptions, Output, Outputs, probe, standardised
from classification.networks.base import ConvBN, classifier_of, init_conv
from classification.options import TrainConfig
from core.adm import Head
from core.distillation import kd_loss
from core.errors import InputError
from core.maps import pool_to
from core.ranges import Positive
from core.training.distiller import Batch, Losses, Progress


@dataclass(frozen=True)
class SHAKEOptions(MethodOptions):
    """Options of SHAKE.

    Args:
        tau: temperature (original: 4).
        scale: c, the standard deviation that every logit vector is given.
        online_teacher: the teacher learns from scratch, by cross-entropy, beside the two; ADM then compares student and
            teacher instead of student and shadow.
    """

    tau: Positive = 1.0
    scale: Positive = 3.1415
    online_teacher: bool = False


def classify(feature_map: Tensor, classifier: nn.Linear) -> Tensor:
    """``W_t GAP(w) + b_t``: ``[B, C, H, W] -> [B, K]``; the gradient reaches the map and not W_t, b_t."""
    bias = classifier.bias.detach() if classifier.bias is not None else None
    return F.linear(feature_map.mean(dim=(2, 3)), classifier.weight.detach(), bias)


class ShadowHead(nn.Module):
    """``u = A1(f1) + B2(f2)``, ``v = A3(u) + B4(f3)``, ``w = A5(v)``: three stage maps to the shadow's map w.

    A1, A3, A5 are 3x3, B2, B4 1x1 convolutions without bias, each with BatchNorm and ReLU; kaiming fan out. A1 and A3
    have the stride by which the next map is smaller (2 in the paper), rounded; what rounding leaves is average-pooled.

    Args: the three maps of a small batch, for their channels and sizes.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        super().__init__()
        (c1, c2, c3), (h1, h2, h3) = ([m.shape[dim] for m in maps] for dim in (1, 2))
        self.a1 = ConvBN(c1, c2, 3, max(1, round(h1 / h2)))
        self.b2 = ConvBN(c2, c2, 1)
        self.a3 = ConvBN(c2, c3, 3, max(1, round(h2 / h3)))
        self.b4 = ConvBN(c3, c3, 1)
        self.a5 = ConvBN(c3, c3, 3)
        self.apply(init_conv)

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor) -> Tensor:
        """``[B, C1, H1, W1]``, ``[B, C2, H2, W2]``, ``[B, C3, H3, W3]`` -> w ``[B, C3, H3, W3]``, not negative."""
        u = pool_to(F.relu(self.a1(f1)), f2.shape[-2:]) + F.relu(self.b2(f2))
        v = pool_to(F.relu(self.a3(u)), f3.shape[-2:]) + F.relu(self.b4(f3))
        return F.relu(self.a5(v))


class SHAKE(Method):
    """A frozen teacher, its shadow head and a student; the last two learn, from each other and from the labels.

    Roles of the outputs: teacher, shadow, student. All logits, of the heads too, are standardised. The shadow counts as
    the student's teacher for ADM, and its only map is w.
    """

    Options = SHAKEOptions

    shadow: ShadowHead

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        if set(roles) != {"teacher", "student"}:
            raise InputError(f"shake needs the two networks teacher and student, and there is {', '.join(roles)}")
        if not self.options.online_teacher and "teacher" not in pretrained:
            raise InputError(
                "shake needs a pre-trained teacher: give --networks.teacher.weights FILE (or the folder of a run, or "
                "--networks.teacher.pretrained true where timm has weights for these very classes), or "
                "--shake.online_teacher true"
            )

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """Freezes the teacher and builds its shadow head. Raises: InputError for a teacher that can have none."""
        teacher = networks["teacher"]
        maps = probe(teacher, samples["teacher"])
        if len(maps) < 3:
            raise InputError(f"shake needs the last three stage maps of its teacher, which hands out {len(maps)}")
        classifier = classifier_of(teacher)
        if classifier.in_features != maps[-1].shape[1]:
            raise InputError(
                f"shake needs a teacher whose classifier follows the pooling: this one takes {classifier.in_features} "
                f"features, and the map has {maps[-1].shape[1]} channels"
            )
        if classifier.out_features < 3:
            raise InputError("shake needs 3 classes: standardised logits of two say nothing but which is the larger")
        self.shadow = ShadowHead(maps[-3:])
        teacher.requires_grad_(self.options.online_teacher)
        return networks

    def output_roles(self, roles: Sequence[str]) -> list[str]:
        return ["teacher", "shadow", "student"]

    def pairs(self, roles: Sequence[str]) -> list[tuple[str, str]]:
        return [("student", "teacher" if self.options.online_teacher else "shadow")]

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (("teacher", "shadow", "student") if self.options.online_teacher else ("shadow", "student"),)

    def forward(
        self, networks: Mapping[str, nn.Module], views: Mapping[str, Tensor], learning: Collection[str] | None = None
    ) -> Outputs:
        """Both networks once, and the shadow head on the teacher's maps, detached and behind their ReLU."""
        outputs = super().forward(networks, views, learning)
        w = self.shadow(*(F.relu(f.detach()) for f in outputs["teacher"].maps[-3:]))
        head = partial(classify, classifier=classifier_of(networks["teacher"]))
        outputs["shadow"] = Output.of([w], standardised(head, self.options.scale))
        return {role: outputs[role] for role in self.output_roles(list(networks))}

    def head_of(self, network: nn.Module) -> Head:
        return standardised(super().head_of(network), self.options.scale)

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        target, tau = batch["target"], self.options.tau
        z_t, z_h, z_s = (outputs[role].logits for role in ("teacher", "shadow", "student"))
        losses = {
            "student": {"ce": self.criterion(z_s, target), "kd": kd_loss(z_s, z_h, tau)},
            "shadow": {
                "ce": self.criterion(z_h, target),
                "kd": kd_loss(z_h, z_s, tau),
                "mse": F.mse_loss(z_h, z_t.detach()),
            },
        }
        if self.options.online_teacher:
            losses["teacher"] = {"ce": self.criterion(z_t, target)}
        return losses
