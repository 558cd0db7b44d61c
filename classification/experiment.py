"""From a config to what a run is made of: data, loaders, networks, method; for training, evaluation and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from classification.config import ONLINE, Command, Task, parse_command
from classification.data import DataSets, InMemoryLoader, Split, Streamed, StreamLoader, load_datasets, make_loader
from classification.data.classes import check_classes
from classification.data.datasets import IN_MEMORY_NAMES
from classification.data.mixing import Mixing
from classification.data.noise import LabelNoise, draw_noise, with_noise
from classification.data.sources import sources
from classification.distiller import ClassificationDistiller, build_networks
from classification.networks.pretrained import keeps_head, load_weights, normalisation_of
from classification.options import NetworkConfig
from core.errors import InputError, first_line, notice
from core.images import EXTENSIONS
from core.training.average import averaged_role
from core.training.checkpoint import read_state
from core.training.kept import refuse_kept
from core.training.run import read_config
from core.weights import read_metadata

EVALUATION_BATCH = 256


@dataclass
class Experiment:
    """The data sets and the distiller of one run, on the CPU.

    ``pretrained``: the roles that start from weights, their classifiers included. ``said``: of each role, mean and std
    that its weights were trained with, where their file or library says so.
    """

    command: Command
    datasets: DataSets
    distiller: ClassificationDistiller
    noise: LabelNoise | None
    pretrained: Sequence[str]
    said: Mapping[str, Mapping[str, Any]]

    def train_loader(self, accelerator: Any = None) -> InMemoryLoader | StreamLoader:
        """Augmented batches of the training split for this process."""
        views = len(self.distiller.networks) if self.distiller.method.views == "separate" else 1
        batch_size = self.command.config.batch_size
        return make_loader(self.datasets.train, batch_size, train=True, views=views, **self._reading(accelerator))

    def evaluation_loader(self, split: Split, accelerator: Any = None) -> InMemoryLoader | StreamLoader:
        """This process's part of a split, as stored."""
        reading = self._reading(accelerator)
        return make_loader(split, EVALUATION_BATCH * reading.get("world", 1), train=False, **reading)

    def _reading(self, accelerator: Any) -> dict[str, Any]:
        reading: dict[str, Any] = {"seed": self.command.config.seed, "workers": self.command.config.data.workers}
        if accelerator is not None:
            reading |= {"rank": accelerator.process_index, "world": accelerator.num_processes}
            reading["device"] = accelerator.device
        return reading

    def split(self, name: str) -> Split:
        """The split "test" or "validation". Raises: InputError where none is held out."""
        split = self.datasets.test if name == "test" else self.datasets.validation
        if split is None:
            raise InputError("no validation images are held out: choose --split test, or --data.validation 0.1")
        return split

    def image_files(self, name: str) -> list[Path]:
        """The file of each image of a split, at the position that a batch's ``index`` gives.

        Raises: InputError where its images are no files of their own (CIFAR, digits, a tar, Hugging Face).
        """
        config, split = self.command.config.data, self.split(name)
        if isinstance(split, Streamed):
            source: Any = split.source
        elif config.name in IN_MEMORY_NAMES:
            raise InputError(f"the images of {config.name} have no files of their own")
        else:  # a split in memory has left its source behind: list the files again
            source = sources(config.name, config.root)[name == "test"]
        files = [Path(source.describe(int(index))) for index in split.indices]
        if files[0].suffix.lower() not in EXTENSIONS:
            raise InputError(f"the images of {config.name} have no files of their own (the first is {files[0]})")
        return files


def build(
    command: Command, roles: Sequence[str] | None = None, *, check: bool = True, datasets: DataSets | None = None
) -> Experiment:
    """Loads the data and builds the networks, all or only ``roles``. Raises: InputError for what cannot be.

    ``datasets``: instead of loading them.
    ``check``: whether they are to be trained: ask the method too if it can, and refuse weights that are not finite.
    """
    config, data = command.config, command.config.data
    noise = None
    if datasets is None:
        datasets = load_datasets(data)
    if check:
        check_classes(datasets, data)
    if data.noise:
        seed = config.seed if data.noise_seed is None else data.noise_seed
        targets = datasets.train.targets
        noise = draw_noise(targets, datasets.num_classes, data.noise, seed, exclude_true=data.noise_exclude_true)
        datasets = replace(datasets, train=with_noise(datasets.train, noise))
    networks = {role: c for role, c in config.networks.items() if roles is None or role in roles}
    name, with_adm = command.method
    method = command.task.methods[name](command.options, with_adm=with_adm)
    method.smooth_labels(config.label_smoothing)
    method.mix_labels(data.mixing)
    if config.fit.ema_decay is not None and not method.takes_average:
        raise InputError(
            f"fit.ema_decay averages a network alone, and {name}'s student needs more than itself: leave it out"
        )
    classes = datasets.num_classes
    pretrained = [r for r, c in networks.items() if c.weights or (c.pretrained and keeps_head(c.name, classes))]
    if check:
        method.check(config, list(networks), pretrained)
    files = {role: file for role, file in command.weight_files.items() if role in networks}
    own = {r: normalisation_of(c.name) if c.pretrained else {} for r, c in networks.items()}
    said = own | {r: {**({} if networks[r].weights else own[r]), **read_metadata(file)} for r, file in files.items()}
    learning = {role for phase in method.phases(list(networks)) for role in phase} if check else set()
    networks = {role: _sized(role, c, said[role], datasets.image_size, check) for role, c in networks.items()}
    new_heads: dict[str, int] = {}
    distiller = ClassificationDistiller(
        build_networks(networks, classes, config.seed, files, training=check, learning=learning, new_heads=new_heads),
        networks,
        {
            role: (c.mean or said[role].get("mean", datasets.mean), c.std or said[role].get("std", datasets.std))
            for role, c in networks.items()
        },
        method,
        config.adm if with_adm else None,
        config.optimizer,
        images_at(datasets.train, 2),
        num_classes=classes,
        channels_last=config.channels_last,
    )
    if data.mixing:
        distiller.mixing = Mixing(
            data.mixup, data.cutmix, data.mixup_prob, data.mixup_switch_prob, num_classes=classes, seed=config.seed
        )
    return Experiment(command, datasets, distiller, noise, [r for r in pretrained if r not in new_heads], said)


def _sized(role: str, config: NetworkConfig, said: Mapping[str, Any], image_size: int, remark: bool) -> NetworkConfig:
    """A network's config with the size of its own images; unless given, the one with which its weights were trained.

    ``remark``: whether to say it where they are enlarged.
    """
    if config.size is None and "size" in said:
        config = replace(config, size=int(said["size"]))
    if remark and config.size is not None and config.size > image_size:
        notice(
            f"note: networks.{role}.size {config.size} is more than data.image_size {image_size}: its images are "
            f"enlarged; where the files have more pixels, give --data.image_size {config.size}"
        )
    return config


def main_role(roles: Iterable[str]) -> str:
    """The role that a tool means unless told: the first student, else the first."""
    roles = list(roles)
    return next((role for role in roles if role.startswith("student")), roles[0])


def images_at(split: Split, positions: Sequence[int] | int) -> Tensor:
    """The first so many images of a split, or those at these positions, ``[B, C, H, W]`` uint8, as in evaluation."""
    positions = range(min(positions, len(split))) if isinstance(positions, int) else positions
    if isinstance(split, Streamed):
        return torch.stack([split.transform(split.source.image(int(split.indices[p]))) for p in positions])
    return split.images[list(positions)]


def check_batch(experiment: Experiment, processes: int) -> None:
    """Raises: InputError for a batch beyond the data, of one image for BatchNorm, or that cannot be shared out."""
    batch_size, parts = experiment.command.config.batch_size, experiment.command.config.fit.accumulate
    images = len(experiment.datasets.train)
    if batch_size % processes or batch_size < processes * parts:
        raise InputError(f"batch_size {batch_size} cannot be shared by {processes} process(es) x {parts} part(s)")
    share, last = batch_size // processes, images % batch_size // processes
    smallest = min(share, last) if last >= 2 else share  # the loader drops a last batch of fewer than 2
    if smallest < 2 * parts and any(isinstance(m, _BatchNorm) for m in experiment.distiller.networks.modules()):
        where = "" if smallest == share else f" in the last batch of an epoch ({last} images a process)"
        raise InputError(
            f"batch_size {batch_size} over {processes} process(es) and {parts} part(s) leaves BatchNorm one image at a "
            f"time{where}: change --batch_size or lower --fit.accumulate"
        )
    if smallest < parts:  # the processes would split it into different numbers of parts, and wait for each other
        raise InputError(
            f"batch_size {batch_size}: the last batch of an epoch ({last} images a process) is fewer than "
            f"{parts} parts: change --batch_size or lower --fit.accumulate"
        )


def command_of(run: Path, task: Task = ONLINE) -> Command:
    """The command that made a run folder, from its ``config.yaml``.

    Raises: InputError where there is no such run, or one of another task.
    """
    file = run / "config.yaml"
    if not file.is_file():
        refuse_kept(run)
        raise InputError(f"{run} is no run folder: it has no config.yaml" if run.is_dir() else f"no run folder {run}")
    if (said := read_config(file).get("task", ONLINE.name)) != task.name:
        raise InputError(f"{run} is a run of {said}: use the tools in {said}/tools")
    try:
        return parse_command(["--config", str(file), "--out", str(run)], task=task)
    except InputError as error:
        raise InputError(f"{file} is not of a {task.name} run: {error}") from error


def restore(command: Command, checkpoint: Path, datasets: DataSets | None = None) -> Experiment:
    """The experiment of a run as it stood at a checkpoint: networks (each normalising as then), adapters, buffers.

    ``datasets``: instead of loading them.
    Raises: InputError where a file is missing, cut off, or of another architecture or number of classes.
    """
    networks = dict(command.config.networks)
    for role, config in networks.items():
        if (file := checkpoint / f"{role}.safetensors").is_file():  # what it started from is not needed any more
            said = read_metadata(file)
            mean, std = said.get("mean", config.mean), said.get("std", config.std)
            size = int(said["size"]) if "size" in said else config.size
            networks[role] = replace(config, weights=None, pretrained=False, mean=mean, std=std, size=size, sha256=None)
    command = replace(command, config=replace(command.config, networks=networks))
    experiment = build(command, check=False, datasets=datasets)
    load_checkpoint(experiment.distiller, checkpoint)
    return experiment


def load_checkpoint(distiller: ClassificationDistiller, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into the trained networks, the adapters and whatever else is no network."""
    file, state = checkpoint / "state.pt", read_state(checkpoint)
    for role in distiller.trained():
        load_weights(distiller.networks[role], checkpoint / f"{role}.safetensors", training=False)
        if (file := checkpoint / f"{averaged_role(role)}.safetensors").is_file():
            load_weights(distiller.add_average(role), file, training=False)
    try:
        extra = state["extra"]
        missing = distiller.load_state_dict(extra, strict=False).missing_keys
    except Exception as error:  # a damaged pickle can raise anything
        reason = first_line(error)
        raise InputError(f"cannot read {file} (missing, incomplete or of another run): {reason}") from error
    if missing := [key for key in missing if not key.startswith(("networks.", "moving_averages."))]:
        raise InputError(f"{file} lacks {missing[0]}: it is of another run")
