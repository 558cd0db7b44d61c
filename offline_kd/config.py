"""Offline distillation as a task of image classification: its methods, and the defaults of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from classification.config import Task
from classification.options import OptimizerConfig, TrainConfig
from core.adm import ADMConfig
from core.ranges import Count
from core.training.fit import FitConfig
from core.training.schedule import ScheduleConfig
from offline_kd.methods import METHODS

SLOWER = {"cifar_mobilenetv2*": 0.01, "cifar_mobilenetv1*": 0.01, "cifar_shufflenet*": 0.01}


@dataclass(frozen=True)
class OfflineConfig(TrainConfig):
    """Trains a student with a fixed, pre-trained teacher. The defaults are those for CIFAR-100."""

    method: str = "kd+adm"
    adm: ADMConfig = field(default_factory=lambda: ADMConfig(alpha=1.0, beta=0.0, gamma=0.0))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.05, learning_rates=SLOWER))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(milestones=(150, 180, 210)))
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=240))
    batch_size: Count = 64
    out: Path = Path("runs/offline_kd")


OFFLINE = Task(
    "offline_kd",
    METHODS,
    OfflineConfig,
    "Trains a student with a fixed, pre-trained teacher: KD and its relatives, with or without ADM's consensus.",
)
