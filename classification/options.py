"""One run of image classification as typed options."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from classification.data import DataConfig
from classification.optimizer import create, moments, on_a_matrix
from core.adm import ADMConfig
from core.errors import InputError
from core.ranges import Count, Factor, NonNegative, Pixels, Positive, Seed, Share, check_ranges
from core.training.fit import FitConfig
from core.training.schedule import ScheduleConfig


@dataclass(frozen=True)
class NetworkConfig:
    """One network.

    Args:
        name: a CIFAR network of this package (cifar_resnet20, ...), any timm model (also hf-hub:NAME and
            local-dir:FOLDER), torchvision/NAME, or transformers/FOLDER, a folder that save_pretrained() wrote.
        weights: file to start from (.safetensors, published .pth), as FILE#KEY to take that of a checkpoint's state
            dicts and not the moving average; or a run folder, for the last weights of the same role; or a checkpoint
            folder.
        pretrained: the library's own pre-trained weights of that name, or those in its folder.
        lr: this network's learning rate; the recipe's unless given.
        backbone_lr_factor: of that rate for all but the classifier, of a network that starts from weights.
        mean: per channel, of images in [0, 1], subtracted before this network; unless given, what the weights were
            trained with where their file (or timm) says so, else the data set's.
        std: per channel, divided by.
        size: height and width in pixels to which its images are resized, behind the augmentation that all networks
            share; unless given, what its weight file says, else data.image_size.
        sha256: of the weights, however saved, or of their file; filled in when a run is written down, checked when it
            is read back.
    """

    name: str
    weights: str | None = None
    pretrained: bool = False
    lr: NonNegative | None = None
    backbone_lr_factor: Positive | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    size: Pixels | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_ranges(f"network {self.name}: ", self)
        if self.sha256 is not None and self.weights is None and not self.pretrained:
            raise InputError(f"network {self.name}: sha256 is that of a weight file, and there is none: give weights")


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser over all networks, a parameter group or more for each.

    Args:
        name: sgd, or timm's name of another one (adamw, lamb, lion, ...).
        lr: learning rate.
        learning_rates: other rates by network name, wildcards allowed, as {cifar_mobilenetv2*: 0.01}.
        momentum: of an optimiser that has one, its momentum.
        weight_decay: weight decay of all parameters.
        nesterov: Nesterov's momentum, of sgd.
        filter_bias_and_bn: no weight decay of the networks' biases and norms, and of what timm's networks name
            themselves (no_weight_decay).
        layer_decay: factor on the rate from each layer of a network to the one before it, by timm's grouping.
        options: further keywords of the optimiser, as {betas: [0.9, 0.98], eps: 1.0e-6}.
    """

    name: str = "sgd"
    lr: NonNegative = 0.1
    learning_rates: Mapping[str, NonNegative] = field(default_factory=dict)
    momentum: Share = 0.9
    weight_decay: NonNegative = 5e-4
    nesterov: bool = False
    filter_bias_and_bn: bool = False
    layer_decay: Factor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges("optimizer.", self)
        if self.nesterov and not self.momentum:
            raise InputError("optimizer.nesterov needs optimizer.momentum above 0")
        if self.nesterov and self.name != "sgd":
            raise InputError(f"optimizer.nesterov is sgd's: leave it out with optimizer.name {self.name}")
        if self.name != "sgd" or self.options:
            on_a_matrix(**self._settings())

    @property
    def moments(self) -> int:
        """Values that the optimiser keeps for each weight."""
        return moments(**self._settings())

    def rate(self, network: NetworkConfig) -> float:
        """The base learning rate of a network: its own, else the first pattern that fits, else ``lr``."""
        if network.lr is not None:
            return network.lr
        fitting = (rate for pattern, rate in self.learning_rates.items() if fnmatch.fnmatch(network.name, pattern))
        return next(fitting, self.lr)

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser of ``parameter_groups()``."""
        return create(groups=groups, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "lr", "momentum", "nesterov", "options")}


@dataclass(frozen=True)
class TrainConfig:
    """Trains teacher and student together.

    Args:
        data: the data set.
        networks: one network per role, as {teacher: {name: cifar_resnet32x4}, student: {name: cifar_resnet8x4}};
            roles are teacher, teacher_2, ..., student, student_2, ...
        method: one of the methods listed below by its label, alone or with +adm (dml, dml+adm).
        adm: ADM's weights and forms; they count only with +adm.
        optimizer: which one, its rates and weight decay.
        schedule: how the learning rate falls.
        fit: duration, precision, logging.
        label_smoothing: share of each label that is spread over all classes, in cross-entropy against labels.
        batch_size: images per optimiser step, over all processes and accumulated parts together.
        seed: of the networks' starts, the order of the data and the augmentation.
        channels_last: memory layout that suits tensor cores.
        out: the run folder; the same command again resumes it.
        progress_bar: show one (only on a terminal).
    """

    data: DataConfig = field(default_factory=DataConfig)
    networks: Mapping[str, NetworkConfig] = field(default_factory=dict)
    method: str = "dml+adm"
    adm: ADMConfig = field(default_factory=ADMConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    label_smoothing: Share = 0.0
    batch_size: Count = 128
    seed: Seed = 0
    channels_last: bool = False
    out: Path = Path("runs/classification")
    progress_bar: bool = True

    def __post_init__(self) -> None:
        check_ranges("", self)
