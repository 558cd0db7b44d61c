"""Accuracy, likelihood, calibration and attention statistics of all networks in one pass over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.distiller import ClassificationDistiller
from classification.methods import Outputs
from core.adm import spatial_similarity
from core.analysis.attention import AttentionStatistics, RunningSums
from core.analysis.calibration import Calibration
from core.training.distiller import Batch


class Scores(RunningSums):
    """Samples, right at the first guess, right within five, and the sum of negative log-likelihoods."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(4, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch: logits ``[B, K]``, class indices ``[B]``. No host sync."""
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]  # [B, 5]
        nll = F.cross_entropy(logits.float(), target, reduction="none")
        self._add(torch.stack([torch.ones_like(nll), guesses[:, 0].float(), guesses.any(dim=1).float(), nll]))

    def compute(self) -> dict[str, float]:
        """``top1``, ``top5`` (percent) and ``nll`` (nats)."""
        count, top1, top5, nll = self.sums.tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "nll": nll / count}


class Evaluation(NamedTuple):
    """What one pass gathers: ``values`` to log, and the calibration of each role for a reliability diagram."""

    values: dict[str, float]
    calibrations: dict[str, Calibration]


def similarities(distiller: ClassificationDistiller, outputs: Outputs) -> dict[tuple[str, str], Tensor]:
    """S ``[B, H, W]`` of each (student, teacher): with ADM through its phi, else of the pairs whose channels agree.

    Without ADM there is no phi, and maps of unequal channels have no common space: such a pair is left out.
    """
    maps = {role: output.maps[-1] for role, output in outputs.items()}
    if distiller.adm is not None:
        return distiller.adm.similarities(maps)
    present = [(s, t) for s, t in distiller.pairs if s in maps and t in maps]
    pairs = [(s, t) for s, t in present if maps[s].shape[1] == maps[t].shape[1]]
    return {(s, t): spatial_similarity(maps[s], maps[t]) for s, t in pairs}


@torch.no_grad()
def evaluate(
    distiller: ClassificationDistiller,
    loader: Iterable[Batch],
    accelerator: Any = None,
    roles: Sequence[str] | None = None,
    watch: Callable[[Outputs, Batch], object] = lambda outputs, batch: None,
) -> Evaluation:
    """Evaluates whatever gives logits on every sample of ``loader``, once, over all processes together.

    ``roles``: only these of ``distiller.scored_roles``. The other networks are then not run, unless the method or ADM
    looks at them.
    ``watch``: is shown the outputs and the batch each time, for whoever needs more than sums.
    Returns: ``<role>/top1``, ``/top5``, ``/ece`` in percent, ``/nll`` in nats, and ``attention/...`` (Table 17) of the
    first pair that has an S (see ``similarities``), with ADM or without, so that both can be compared.
    """
    device = accelerator.device if accelerator is not None else next(distiller.parameters()).device
    roles = distiller.scored_roles if roles is None else roles
    can_leave_out = distiller.method.separable and distiller.adm is None
    optional = [*(distiller.networks if can_leave_out else ()), *distiller.moving_averages]
    without = [role for role in optional if role not in roles]
    scores = {role: Scores(device) for role in roles}
    calibrations = {role: Calibration(device=device) for role in roles}
    attention = AttentionStatistics(device)
    for batch in loader:
        images, target = batch["image"].to(device, non_blocking=True), batch["target"].to(device, non_blocking=True)
        with accelerator.autocast() if accelerator is not None else torch.no_grad():
            outputs = distiller.outputs(images, without)
            for role in roles:
                scores[role].update(outputs[role].logits, target)
                calibrations[role].update(outputs[role].logits, target)
            for similarity in list(similarities(distiller, outputs).values())[:1]:
                attention.update(similarity)
            watch(outputs, batch)
    gathered: list[RunningSums] = [*scores.values(), *calibrations.values(), attention]
    if accelerator is not None and accelerator.num_processes > 1:
        for sums in gathered:
            sums.sums = accelerator.reduce(sums.sums, reduction="sum")
    values: dict[str, float] = {}
    for role in roles:
        values |= {f"{role}/{name}": value for name, value in scores[role].compute().items()}
        values[f"{role}/ece"] = calibrations[role].ece()
    if attention.sums[0] > 0:  # images counted
        values |= attention.compute()
    return Evaluation(values, calibrations)
