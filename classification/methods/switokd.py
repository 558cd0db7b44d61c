"""SwitOKD, switchable online distillation (Qian et al., ECCV 2022): the teacher pauses where the gap is too wide.

The decision, the three forms and their sums are those of the authors' code (hfutqian/SwitOKD, SwitOKD_code/*/main.py,
"multi-net results (table 7)" for three networks), with the paper's ``tau^2``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from classification.methods.base import Method, MethodOptions, Outputs, mean_over_all, pairs_of
from classification.options import TrainConfig
from core.distillation import distances, epsilon, kd_loss, learning
from core.errors import InputError
from core.ranges import NonNegative, Positive
from core.training.distiller import Batch, Losses, Progress

FORMS = (
    ("teacher", "student"),
    ("teacher", "student", "student_2"),  # 1T2S
    ("teacher", "teacher_2", "student"),  # 2T1S
)


@dataclass(frozen=True)
class SwitOKDOptions(MethodOptions):
    """Options of SwitOKD.

    Args:
        tau: temperature of the imitation losses (the authors' code: 1; their ablation is best at 2: --switokd.tau 2).
            The distances that decide between the modes are those of the plain predictions.
        weight: weight of the imitation losses of every network.
        official_quirks: as the authors' code runs three networks: the epsilon of one pair (of student_2 or teacher_2)
            serves the other too, and in 1T2S the teacher's momentum and weight decay act also while it is paused.
            Without ADM.
    """

    tau: Positive = 1.0
    weight: NonNegative = 1.0
    official_quirks: bool = False


class SwitOKD(Method):
    """Each network learns from the labels and from every other one; a teacher that is too far ahead waits.

    A student always minimises CE + the sum of KL(student <- other). A pair of student and teacher is in expert or in
    learning mode, anew for each batch. The teacher minimises the same, its imitation of a student only if that pair is
    in learning mode, and the rest only if any of its pairs is. Otherwise it is paused: the optimiser skips it, momentum
    and weight decay included, and it gets nothing from ADM; it is still forwarded in training mode, so that its
    BatchNorm statistics move on, and its learning rate falls as if it were trained. Its logged losses are 0 then;
    ``teacher/paused`` is the share of such batches.

    With gradient accumulation each part of a batch decides for itself: a part in expert mode adds nothing to the
    teacher's gradient, and the optimiser skips the teacher only where every part is.
    """

    Options = SwitOKDOptions
    takes_smooth_labels = False
    class_index = "SwitOKD"

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        if sorted(roles) not in [sorted(form) for form in FORMS]:
            forms = ", or ".join(" + ".join(form) for form in FORMS)
            raise InputError(f"SwitOKD trains {forms}; the networks are {', '.join(roles) or 'none'}")
        if self.options.official_quirks and self.with_adm:
            raise InputError("switokd.official_quirks is the authors' code, which has no ADM: leave out one of them")

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        options: SwitOKDOptions = self.options
        logits, target = {role: output.logits for role, output in outputs.items()}, batch["target"]
        pairs = sorted(pairs_of(list(logits)))
        sums = torch.stack([distances(logits[s], logits[t], target) for s, t in pairs])  # [pairs, 3]
        r_s, r_t, gap = mean_over_all(sums, len(target)).unbind(dim=1)
        eps = epsilon(r_s, r_t)
        if options.official_quirks:
            eps = eps[-1].expand_as(eps)
        learns = dict(zip(pairs, learning(r_s, r_t, gap, eps).unbind(), strict=True))
        gates = {
            role: torch.stack([gate for (_, teacher), gate in learns.items() if teacher == role]).amax()
            for role in logits
            if role.startswith("teacher")
        }
        steps_while_paused = options.official_quirks and len(pairs) > len(gates)  # 1T2S
        self.gates = {} if steps_while_paused else gates

        losses: Losses = {}
        for role, own in logits.items():
            ce = F.cross_entropy(own, target)
            kd = {other: kd_loss(own, logits[other], options.tau) for other in logits if other != role}
            if role in gates:
                ce = ce * gates[role]
                kd = {other: value * learns.get((other, role), gates[role]) for other, value in kd.items()}
            losses[role] = {"ce": ce, "kd": options.weight * torch.stack(list(kd.values())).sum()}
        return losses
