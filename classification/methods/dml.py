"""DML, deep mutual learning (Zhang et al., CVPR 2018): each network imitates the mean of the others (Eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from classification.methods.base import Method, MethodOptions, Outputs
from core.distillation import mutual_loss
from core.errors import InputError
from core.ranges import NonNegative, Positive
from core.training.distiller import Batch, Losses, Progress


@dataclass(frozen=True)
class DMLOptions(MethodOptions):
    """Options of DML.

    Args:
        tau: temperature.
        weight: lambda, the weight of the imitation loss of every network.
        weights: lambda of single roles instead, as {teacher: 0.3} (Table 19).
        update: all networks step together on one forward, or in turn, each after the others have moved, as in the
            original paper (costs one forward more per network; BatchNorm statistics then move more than once a step).
        peers: the mean over the other networks (Eq. 4), or their sum.
    """

    tau: Positive = 1.0
    weight: NonNegative = 1.0
    weights: Mapping[str, NonNegative] = field(default_factory=dict)
    update: Literal["simultaneous", "alternate"] = "simultaneous"
    peers: Literal["mean", "sum"] = "mean"


class DML(Method):
    """Mutual learning among any number of networks."""

    Options = DMLOptions
    min_networks = 2

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        unknown = set(self.options.weights) - set(roles)
        if unknown:
            raise InputError(f"dml.weights names {sorted(unknown)}, the networks are {list(roles)}")
        return tuple((role,) for role in roles) if self.options.update == "alternate" else (tuple(roles),)

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        options: DMLOptions = self.options
        weights = {role: options.weights.get(role, options.weight) for role in outputs}
        logits = {role: output.logits for role, output in outputs.items()}
        return mutual_loss(logits, batch["target"], weights, options.tau, options.peers, self.criterion)
