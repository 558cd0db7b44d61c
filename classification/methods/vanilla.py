"""Vanilla: each network alone, by cross-entropy (Eq. 1). With ADM: Table 14's ADM on its own."""

from __future__ import annotations

from classification.methods.base import Method, Outputs
from core.training.distiller import Batch, Losses, Progress


class Vanilla(Method):
    """No network learns from another."""

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        return {role: {"ce": self.criterion(output.logits, batch["target"])} for role, output in outputs.items()}
