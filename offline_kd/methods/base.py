"""What all offline methods share: one fixed teacher, one student that learns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from classification.methods.base import Method
from core.errors import InputError

if TYPE_CHECKING:
    from classification.config import TrainConfig


class OfflineMethod(Method):
    """A frozen teacher and a student. The teacher is never in training mode, has no gradient and no optimiser.

    Its forward runs without gradient, since it is in no phase: see ``Method.forward``. A method's own ``forward`` must
    take either network alone too: between epochs the student is evaluated without its teacher.
    """

    separable = True

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        if self.with_adm and run.adm.beta > 0:
            raise InputError(
                "the teacher is fixed, and adm.beta is the weight of a loss that trains it: "
                f"{run.adm.beta}; set it to 0"
            )
        if "teacher" not in pretrained:
            raise InputError(
                "offline distillation needs a pre-trained teacher: give --networks.teacher.weights FILE (or the folder "
                "of a run), or --networks.teacher.pretrained true where timm has weights for these very classes"
            )
        if set(roles) != {"teacher", "student"}:
            raise InputError(
                f"offline distillation needs the two networks teacher and student, and there is {', '.join(roles)}"
            )

    def prepare(self, networks: dict[str, nn.Module], sample: Tensor) -> dict[str, nn.Module]:
        networks["teacher"].eval().requires_grad_(False)
        return networks

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (("student",),)
