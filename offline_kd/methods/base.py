"""What all offline methods share: one fixed teacher, one student that learns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from classification.methods.base import Method
from core.errors import InputError

if TYPE_CHECKING:
    from classification.methods.adm import ADMConfig


class OfflineMethod(Method):
    """A frozen teacher and a student. The teacher is never in training mode, has no gradient and no optimiser.

    Its forward runs without gradient, since it is in no phase: see ``Method.forward``. A method's own ``forward`` must
    take either network alone too: between epochs the student is evaluated without its teacher.
    """

    separable = True

    def check(self, roles: Sequence[str]) -> None:
        if set(roles) != {"teacher", "student"}:
            raise InputError(
                f"offline distillation needs the two networks teacher and student, and there is {', '.join(roles)}"
            )

    def check_start(self, pretrained: Collection[str]) -> None:
        if "teacher" not in pretrained:
            raise InputError(
                "offline distillation needs a pre-trained teacher: give --networks.teacher.weights FILE (or the folder "
                "of a run), or --networks.teacher.pretrained true where timm has weights for these very classes"
            )

    def check_adm(self, config: ADMConfig) -> None:
        if config.beta > 0:
            raise InputError(
                f"the teacher is fixed, and adm.beta is the weight of a loss that trains it: {config.beta}; set it to 0"
            )

    def prepare(self, networks: dict[str, nn.Module], sample: Tensor) -> dict[str, nn.Module]:
        networks["teacher"].eval().requires_grad_(False)
        return networks

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (("student",),)
