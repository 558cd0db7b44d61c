"""The student alone, in the offline recipe: what the other methods start from. With ADM: consensus on its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from classification.methods.base import Outputs
from core.training.distiller import Batch, Losses, Progress
from offline_kd.methods.base import OfflineMethod


class Vanilla(OfflineMethod):
    """Cross-entropy; the teacher is not asked."""

    def forward(
        self, networks: Mapping[str, nn.Module], views: Mapping[str, Tensor], learning: Collection[str] | None = None
    ) -> Outputs:
        """In training the student alone, unless ADM compares the two maps."""
        if learning is not None and not self.with_adm:
            networks = {role: network for role, network in networks.items() if role in learning}
        return super().forward(networks, views, learning)

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        return {"student": {"ce": self.criterion(outputs["student"].logits, batch["target"])}}
