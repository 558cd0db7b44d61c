"""What all offline methods share: one fixed teacher, one student that learns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from classification.methods.base import Method, Output, Outputs
from classification.options import TrainConfig
from core.errors import InputError
from core.training.distiller import Batch, Losses, Progress


class OfflineMethod(Method):
    """A frozen teacher and a student. The teacher is never in training mode, has no gradient and no optimiser.

    Its forward runs without gradient, since it is in no phase: see ``Method.forward``. A method's own ``forward`` must
    take either network alone too: between epochs the student is evaluated without its teacher.
    """

    separable = True

    weights: ClassVar[tuple[str, ...]] = ()
    """Options of which one must be above 0, unless ADM trains the student."""

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        if self.with_adm and run.adm.beta > 0:
            raise InputError(
                "the teacher is fixed, and adm.beta is the weight of a loss that trains it: "
                f"{run.adm.beta}; set it to 0"
            )
        if self.with_adm and run.adm.feature_targets == "both":
            raise InputError("the teacher is fixed, and adm.feature_targets both would train it: leave it out")
        if self.weights and not self.with_adm and not any(getattr(self.options, name) for name in self.weights):
            raise InputError(f"{' and '.join(self.weights)} of {run.method} are all 0: nothing would train the student")
        if "teacher" not in pretrained:
            raise InputError(
                "offline distillation needs a pre-trained teacher: give --networks.teacher.weights FILE (or the folder "
                "of a run), or --networks.teacher.pretrained true where timm has weights for these very classes"
            )
        if set(roles) != {"teacher", "student"}:
            raise InputError(
                f"offline distillation needs the two networks teacher and student, and there is {', '.join(roles)}"
            )

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        networks["teacher"].eval().requires_grad_(False)
        return networks

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return (("student",),)

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        """The student's cross-entropy times the option ``ce``, and the method's own terms."""
        student, teacher, target = outputs["student"], outputs["teacher"], batch["target"]
        ce = self.options.ce * self.criterion(student.logits, target)
        return {"student": {"ce": ce, **self.terms(student, teacher, target, progress)}}

    def terms(self, student: Output, teacher: Output, target: Tensor, progress: Progress) -> dict[str, Tensor]:
        """What the student learns from the teacher, weighted: ``{term: scalar}``; class indices ``[B]``."""
        raise NotImplementedError
