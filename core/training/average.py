"""The moving average of what a run trains, kept beside it: a network of its own role, evaluated and saved as such."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .command import missing_extra
from .distiller import Distiller

if TYPE_CHECKING:
    from .fit import FitConfig

SUFFIX = "_ema"


def averaged_role(role: str) -> str:
    """What the average of a role is called: ``"student" -> "student_ema"``."""
    return f"{role}{SUFFIX}"


class Averages:
    """timm's ``ModelEmaV3`` of each student that is trained (of all that is trained, where there is no student).

    Floating-point buffers, as BatchNorm's statistics, are averaged like weights, others copied (timm's rule). The
    averages are in ``distiller.moving_averages``, on the networks' device; without ``fit.ema_decay`` there is none.
    """

    def __init__(self, distiller: Distiller, config: FitConfig) -> None:
        self.distiller, self.all = distiller, dict[str, Any]()
        if config.ema_decay is None:
            return
        try:
            from timm.utils import ModelEmaV3
        except ImportError as error:
            raise missing_extra(error, "classification") from error
        trained = list(distiller.trained())
        roles = [role for role in trained if role.startswith("student")] or trained
        decay, warmup = config.ema_decay, config.ema_warmup
        self.all = {role: ModelEmaV3(distiller.networks[role], decay, use_warmup=warmup) for role in roles}
        for role, average in self.all.items():
            distiller.moving_averages[averaged_role(role)] = average.module.requires_grad_(False)

    def update(self, step: int) -> None:
        """Moves them towards the networks as they are after so many steps; after the first they are its. No host sync.

        With warm-up the decay is ``1 - step^(-2/3)`` until it reaches ``ema_decay``.
        """
        for role, average in self.all.items():
            average.update(self.distiller.networks[role], step)
