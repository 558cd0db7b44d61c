"""Learning-rate schedules: a factor on each group's base rate, from the number of epochs done (fractional)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..ranges import Factor, NonNegative, check_ranges

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate falls.

    Args:
        name: "multistep" multiplies by ``factor`` after each milestone, "cosine" and "linear" fall to 0 over the run.
        milestones: completed epochs after which the rate drops.
        factor: what a drop multiplies the rate by.
        warmup: epochs over which the rate first rises linearly from 0.
    """

    name: Literal["multistep", "cosine", "linear", "constant"] = "multistep"
    milestones: tuple[NonNegative, ...] = (140, 200, 250)
    factor: Factor = 0.1
    warmup: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_ranges("schedule.", self)
        if list(self.milestones) != sorted(self.milestones):
            raise InputError(f"schedule.milestones must rise: {list(self.milestones)}")

    def remarks(self, epochs: float) -> list[str]:
        """What is legal in a run of so many epochs, and probably meant otherwise: a line each."""
        lines = []
        if self.name == "multistep" and (late := [m for m in self.milestones if m >= epochs]):
            lines.append(f"note: schedule.milestones {late} are not before the end of the run, epoch {epochs:g}")
        if self.warmup >= epochs:
            lines.append(f"note: schedule.warmup {self.warmup:g} lasts the whole run of {epochs:g} epochs")
        return lines


def make_schedule(config: ScheduleConfig, epochs: float) -> Schedule:
    """``schedule(epochs_done) -> factor`` for a run of so many epochs."""

    def schedule(done: float) -> float:
        if done < config.warmup:
            return done / config.warmup
        if config.name == "multistep":
            return config.factor ** bisect_right(config.milestones, done + 1e-9)
        share = min((done - config.warmup) / max(epochs - config.warmup, 1e-9), 1.0)
        if config.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        return 1.0 - share if config.name == "linear" else 1.0

    return schedule
