"""ADM on top of any method: it reads each network's last map and head, never the network (Eq. 5 to 12)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.base import Outputs
from classification.predictions import PreviousPredictions
from core.adapter import Adapter
from core.adm import ADMConfig, ADMLoss, spatial_similarity
from core.distillation import feature_loss
from core.errors import InputError
from core.maps import check_maps
from core.targets import Criterion
from core.training.distiller import Batch, Losses, Progress


class ADM(nn.Module):
    """ADM between every student and every teacher: a network's loss is the mean over its pairs.

    Args: the config; the outputs of one small batch, from which channels and sizes are read; the (student, teacher)
        pairs to compare; what compares logits with labels.
    Raises: InputError without a teacher and a student, or where their maps cannot be compared.
    """

    def __init__(
        self,
        config: ADMConfig,
        outputs: Outputs,
        pairs: Sequence[tuple[str, str]],
        criterion: Criterion = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.config = config
        self.pairs = list(pairs)
        if not self.pairs:
            raise InputError(f"ADM needs a teacher and a student; the networks are {list(outputs)}")
        teachers = list(dict.fromkeys(teacher for _, teacher in self.pairs))
        stored = config.divergence == "kd" and config.beta > 0
        self.previous = PreviousPredictions(teachers, config.delta) if stored else None
        self.adm = nn.ModuleDict()
        self.stage_adapters = nn.ModuleDict()
        for student, teacher in self.pairs:
            maps_s, maps_t = outputs[student].maps, outputs[teacher].maps
            check_maps(maps_s[-1], maps_t[-1], student, teacher)
            last = Adapter(maps_s[-1].shape[1], maps_t[-1].shape[1], always=config.phi == "always")
            last.requires_grad_(config.phi_loss == "own" or config.gamma > 0)  # else no loss reaches it
            self.adm[_key(student, teacher)] = ADMLoss(
                config.alpha,
                config.beta,
                last if last.conv is not None else None,
                consensus=config.consensus,
                divergence=config.divergence,
                tau=config.tau,
                train_adapter=config.phi_loss == "own",
                criterion=criterion,
                control=config.control,
            )
            if config.gamma > 0:
                n = min(len(maps_s), len(maps_t))
                stages = zip(maps_s[-n:-1], maps_t[-n:-1], strict=True) if n > 1 else []
                self.stage_adapters[_key(student, teacher)] = nn.ModuleList(
                    Adapter(s.shape[1], t.shape[1]) for s, t in stages
                )

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress, learning: Collection[str]) -> Losses:
        """``{role: {term: weighted scalar}}`` for the roles that learn in this phase."""
        config = self.config
        losses: Losses = {}

        def add(role: str, term: str, value: Tensor) -> None:
            if role in learning:
                terms = losses.setdefault(role, {})
                terms[term] = terms[term] + value if term in terms else value

        for student, teacher in self.pairs:
            s, t = outputs[student], outputs[teacher]
            teachers = sum(1 for a, _ in self.pairs if a == student)
            students = sum(1 for _, b in self.pairs if b == teacher)
            adm: ADMLoss = self.adm[_key(student, teacher)]  # type: ignore[assignment]
            previous, delta = batch.get(f"previous/{teacher}"), batch.get(f"delta/{teacher}", 0.0)
            terms = adm.terms(s.maps[-1], t.maps[-1], batch["target"], s.head, t.head, previous=previous, delta=delta)
            if "consensus" in terms:
                add(student, "consensus", terms["consensus"] / teachers)
            if "phi" in terms:
                add(student, "phi", terms["phi"])
            if "divergence" in terms:
                add(teacher, "divergence", terms["divergence"] / students)
            if config.gamma > 0:
                adapters = [*self.stage_adapters[_key(student, teacher)], adm.adapter]  # type: ignore[misc]
                compared, frozen = (s.maps, t.maps, adapters, config.feature_filter), config.phi_loss == "own"
                add(student, "feature", config.gamma / teachers * feature_loss(*compared, frozen_last=frozen))
                if config.feature_targets == "both":
                    add(teacher, "feature", config.gamma / students * feature_loss(*compared, learner="teacher"))
        return losses

    def similarities(self, maps: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """S ``[B, H, W]`` of each (student, teacher), from their last maps."""
        result = {}
        for student, teacher in self.pairs:
            adm: ADMLoss = self.adm[_key(student, teacher)]  # type: ignore[assignment]
            projected = adm.project(maps[student], maps[teacher])
            result[student, teacher] = spatial_similarity(projected, maps[teacher])
        return result

    def adapters_of(self, student: str) -> list[nn.Parameter]:
        """What is optimised together with this student."""
        tables = (self.adm, self.stage_adapters)
        modules = [m for table in tables for key, m in table.items() if key.startswith(f"{student}:")]
        return [p for module in modules for p in module.parameters() if p.requires_grad]


def _key(student: str, teacher: str) -> str:
    return f"{student}:{teacher}"
