"""Learning-rate schedules: a factor on each group's base rate, from the number of epochs done (fractional)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import InputError
from ..ranges import Factor, Index, NonNegative, Unit, check_ranges

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate falls.

    Args:
        name: "multistep" multiplies by ``factor`` after each milestone, "cosine" and "linear" fall to 0 over the run.
        milestones: completed epochs after which the rate drops.
        factor: what a drop multiplies the rate by.
        warmup: epochs over which the rate first rises linearly.
        warmup_steps: the same in optimiser steps.
        warmup_from: factor on the rate from which it rises.
    """

    name: Literal["multistep", "cosine", "linear", "constant"] = "multistep"
    milestones: tuple[NonNegative, ...] = (140, 200, 250)
    factor: Factor = 0.1
    warmup: NonNegative = 0.0
    warmup_steps: Index = 0
    warmup_from: Unit = 0.0

    def __post_init__(self) -> None:
        check_ranges("schedule.", self)
        if list(self.milestones) != sorted(self.milestones):
            raise InputError(f"schedule.milestones must rise: {list(self.milestones)}")
        if self.warmup and self.warmup_steps:
            raise InputError("schedule.warmup is in epochs, schedule.warmup_steps in steps: give one of them")
        if self.warmup_from and not (self.warmup or self.warmup_steps):
            raise InputError("schedule.warmup_from needs a warm-up: give schedule.warmup or schedule.warmup_steps")

    def in_epochs(self, steps_per_epoch: int) -> ScheduleConfig:
        """The same with its warm-up in epochs."""
        if not self.warmup_steps:
            return self
        return replace(self, warmup=self.warmup_steps / steps_per_epoch, warmup_steps=0)

    def remarks(self, epochs: float) -> list[str]:
        """What is legal in a run of so many epochs, and probably meant otherwise: a line each."""
        lines = []
        if self.name == "multistep" and (late := [m for m in self.milestones if m >= epochs]):
            lines.append(f"note: schedule.milestones {late} are not before the end of the run, epoch {epochs:g}")
        if self.warmup >= epochs:
            lines.append(f"note: schedule.warmup {self.warmup:g} lasts the whole run of {epochs:g} epochs")
        return lines


def make_schedule(config: ScheduleConfig, epochs: float) -> Schedule:
    """``schedule(epochs_done) -> factor`` for a run of so many epochs. Raises: ValueError for a warm-up in steps."""
    if config.warmup_steps:
        raise ValueError("a warm-up in steps needs to know their number in an epoch: config.in_epochs(...)")

    def schedule(done: float) -> float:
        if done < config.warmup:
            return config.warmup_from + (1.0 - config.warmup_from) * (done / config.warmup)
        if config.name == "multistep":
            return config.factor ** bisect_right(config.milestones, done + 1e-9)
        share = min((done - config.warmup) / max(epochs - config.warmup, 1e-9), 1.0)
        if config.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        return 1.0 - share if config.name == "linear" else 1.0

    return schedule
