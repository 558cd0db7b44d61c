"""ADM on top of any method: it reads each network's last map and head, never the network (Eq. 5 to 12)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from classification.methods.base import Outputs
from classification.predictions import PreviousPredictions
from core.adapter import Adapter
from core.adm import ADMLoss, spatial_similarity
from core.distillation import feature_loss
from core.errors import InputError, require_not_negative, require_positive
from core.network import check_pair
from core.training.distiller import Batch, Losses, Progress


@dataclass(frozen=True)
class ADMConfig:
    """Weights and forms of ADM.

    Args:
        alpha: weight of the consensus loss (trains the student).
        beta: weight of the divergence loss (trains the teacher).
        gamma: weight of the feature loss (Eq. 5, trains the student).
        consensus: ce (Eq. 7) or kd (Eq. 11, ImageNet's headline figures).
        divergence: ce (Eq. 8) or kd (Eq. 12, towards what the teacher itself said in the epoch before, which is kept
            on disk in the run folder: 4 bytes an image and class).
        tau: temperature of the kd form of consensus.
        delta: weight of that earlier prediction in divergence's kd form: it grows linearly over the epochs, from the
            first value in the second epoch to the second value in the last (0 in the first epoch).
        feature_filter: Table 18's noise filters of the feature loss.
        phi_loss: own trains the last adapter by its own relative residual; feature by the feature loss (the paper's
            letter).
    """

    alpha: float = 0.01
    beta: float = 0.01
    gamma: float = 1.0
    consensus: Literal["ce", "kd"] = "ce"
    divergence: Literal["ce", "kd"] = "ce"
    tau: float = 1.0
    delta: tuple[float, float] = (0.2, 0.6)
    feature_filter: Literal["none", "norm", "relu", "drop"] = "none"
    phi_loss: Literal["own", "feature"] = "own"

    def __post_init__(self) -> None:
        require_not_negative("adm", alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        require_positive("adm", tau=self.tau)
        if not all(0 <= value <= 1 for value in self.delta):
            raise InputError(f"adm.delta must lie in [0, 1]: {list(self.delta)}")


class ADM(nn.Module):
    """ADM between every student and every teacher: a network's loss is the mean over its pairs.

    Args: the config; the outputs of one small batch, from which channels and sizes are read; the (student, teacher)
        pairs to compare.
    Raises: InputError without a teacher and a student, or where their maps cannot be compared.
    """

    def __init__(self, config: ADMConfig, outputs: Outputs, pairs: Sequence[tuple[str, str]]) -> None:
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
            check_pair(maps_s[-1], maps_t[-1], student, teacher)
            last = Adapter(maps_s[-1].shape[1], maps_t[-1].shape[1])
            last.requires_grad_(config.phi_loss == "own" or config.gamma > 0)  # else no loss reaches it
            self.adm[_key(student, teacher)] = ADMLoss(
                config.alpha,
                config.beta,
                last if last.conv is not None else None,
                consensus=config.consensus,
                divergence=config.divergence,
                tau=config.tau,
                train_adapter=config.phi_loss == "own",
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
                frozen = config.phi_loss == "own"
                loss = feature_loss(s.maps, t.maps, adapters, config.feature_filter, frozen_last=frozen)
                add(student, "feature", config.gamma / teachers * loss)
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
        modules = [m for table in (self.adm, self.stage_adapters) for key, m in table.items() if _owner(key) == student]
        return [p for module in modules for p in module.parameters() if p.requires_grad]


def _key(student: str, teacher: str) -> str:
    return f"{student}:{teacher}"


def _owner(key: str) -> str:
    return key.partition(":")[0]
