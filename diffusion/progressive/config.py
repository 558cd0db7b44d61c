"""Progressive distillation as a typed config."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from core.errors import InputError, notice
from core.ranges import Count, Index, NonNegative, Positive, Range, Seed, Share, check_ranges
from core.training.fit import FitConfig
from diffusion.data import DataConfig
from diffusion.progressive.distiller import ADMConfig
from diffusion.progressive.network import UNetConfig
from diffusion.schedule import TIMESTEPS, Prediction, Weighting
from diffusion.training import TrainingConfig


@dataclass(frozen=True)
class BaseConfig:
    """How the base network learns from noise. The defaults are Sun et al.'s.

    Args:
        steps: optimiser steps.
        lr: Adam's learning rate, constant after the warm-up.
        warmup: steps over which it rises from 0.
        weight_decay: of Adam.
        ema: decay of the moving average of the weights, from which the chain starts.
    """

    steps: Count = 800_000
    lr: Positive = 2e-4
    warmup: Index = 5_000
    weight_decay: NonNegative = 0.0
    ema: Share = 0.9999

    def __post_init__(self) -> None:
        check_ranges("base.", self)


@dataclass(frozen=True)
class RoundsConfig:
    """How each student learns: a new Adam, no warm-up, no moving average. The defaults are Sun et al.'s.

    Args:
        steps: optimiser steps of a round.
        last_steps: those of the 2- and of the 1-step student.
        lr: Adam's learning rate at the start of a round.
        schedule: how it falls to 0 within a round: "cosine" (Sun et al.) or "linear" (Salimans & Ho).
        weight_decay: of Adam.
    """

    steps: Count = 10_000
    last_steps: Count = 20_000
    lr: Positive = 5e-5
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_ranges("rounds.", self)

    def length(self, steps: int) -> int:
        """Optimiser steps of the round of the student that samples in ``steps``."""
        return self.last_steps if steps <= 2 else self.steps


@dataclass(frozen=True)
class ProgressiveConfig(TrainingConfig):
    """Trains a diffusion model, then halves its sampling steps again and again: Table 6.

    Args:
        data: the images.
        network: the base network; the students are its copies.
        predict: what networks predict: the image x (Sun et al.), or v = a eps - s x (Salimans & Ho). Not the noise: at
            the noisiest time its errors count 20,000-fold in x.
        weight: of a squared error in x: snr_trunc is max(1, SNR), snr_plus_1 is SNR + 1, or none.
        timesteps: T, the schedule's times are 0..T.
        chain: sampling steps, halved from one to the next; the first is what the teacher is used at, each of the others
            is a student.
        teacher: a diffusers folder on our schedule to start the chain from, as a round's ``student``; no base network
            is trained then.
        init: a diffusers folder of a U-Net from which the base network starts, whatever it predicts.
        base: how the base network learns.
        rounds: how each student learns.
        method: pd, or pd+adm with the consensus loss.
        adm: the consensus loss; it counts only with pd+adm.
        fit: precision, logging, checkpoints (every ``evaluate_every`` steps), clipping; the lengths are base.steps and
            rounds.steps.
        batch_size: images per optimiser step, over all processes and accumulated parts together.
        seed: of the base network's start, the order of the data, times and noise.
        teacher_sha256: of the teacher's weights, or of their files; filled in when a run is written down, checked when
            it is read back.
        out: the run folder, with one for each round in it; the same command again resumes.
        progress_bar: show one (only on a terminal).
    """

    data: DataConfig = field(default_factory=DataConfig)
    network: UNetConfig = field(default_factory=UNetConfig)
    predict: Prediction = "x"
    weight: Weighting = "snr_trunc"
    timesteps: Annotated[int, Range(1, TIMESTEPS)] = 1024
    chain: tuple[int, ...] = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    teacher: str | None = None
    init: str | None = None
    base: BaseConfig = field(default_factory=BaseConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    method: Literal["pd", "pd+adm"] = "pd+adm"
    adm: ADMConfig = field(default_factory=ADMConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(clip=1.0, log_every=100, evaluate_every=5_000))
    batch_size: Count = 128
    seed: Seed = 0
    teacher_sha256: str | None = None
    out: Path = Path("runs/progressive")
    progress_bar: bool = True

    def __post_init__(self) -> None:
        check_ranges("--", self)
        check_chain(self.chain, self.timesteps)
        if self.teacher is not None and self.init is not None:
            raise InputError("--teacher replaces the base network, --init starts it: give one of them")
        if self.fit.steps is not None or self.fit.epochs is not None:
            raise InputError("fit.steps and fit.epochs do not count here: give --base.steps and --rounds.steps")
        if self.method == "pd+adm" and not self.adm.alpha:
            raise InputError("adm.alpha is 0, and ADM has no other weight here: give one, or --method pd")
        rounds = self.adm.adm_rounds
        if self.method == "pd+adm" and rounds != "all" and not set(rounds) & set(self.students):
            raise InputError(
                f"adm.adm_rounds {list(rounds)}: ADM would never act, the chain's students have {list(self.students)} "
                "steps; choose some of them, or --method pd"
            )

        if self.teacher is None and self.base.warmup >= self.base.steps:
            notice(f"base.warmup {self.base.warmup} is as long as base.steps: the rate never gets there")
        if rounds != "all" and rounds != ADMConfig.adm_rounds and (idle := set(rounds) - set(self.students)):
            notice(f"adm.adm_rounds: the chain has no student of {sorted(idle)} steps")

    @property
    def students(self) -> tuple[int, ...]:
        """The step counts of the students, in the order of training."""
        return self.chain[1:]

    def adm_of(self, steps: int) -> ADMConfig | None:
        """ADM's options in the round of the student with so many steps, None where it is plain distillation."""
        return self.adm if self.method == "pd+adm" and self.adm.acts(steps) else None

    def idle(self) -> dict[str, str]:
        return {"--adm.": "--method pd+adm"} if self.method == "pd" else {}

    def teacher_files(self) -> Iterable[Path]:
        files = () if self.teacher is None else Path(self.teacher).glob("diffusion_pytorch_model*")
        return sorted(file for file in files if file.suffix != ".json")


def check_chain(chain: Sequence[int], timesteps: int) -> None:
    """Raises: InputError for step counts that are not halved from one to the next, or do not divide T."""
    if len(chain) < 2:
        raise InputError(f"chain {list(chain)}: it needs a teacher's steps and at least one student's, as [8, 4, 2, 1]")
    for before, after in itertools.pairwise(chain):
        if after < 1 or before != 2 * after:
            raise InputError(
                f"chain {list(chain)}: {after} is not half of {before}; each student halves its teacher's steps, as "
                "[8, 4, 2, 1]"
            )
    if timesteps < 1 or timesteps % chain[0]:
        raise InputError(f"chain {list(chain)}: {chain[0]} steps do not divide the schedule's {timesteps} times")
