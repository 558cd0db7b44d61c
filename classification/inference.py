"""What a trained network says about images that belong to no data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from classification.config import ONLINE, Command, Task
from classification.data import DataConfig, DataSets, Streamed, StreamLoader, load_datasets
from classification.data.datasets import worth_workers
from classification.data.sources import Images
from classification.data.unseen import evaluation_transform, nameless_datasets
from classification.experiment import EVALUATION_BATCH, Experiment, build, command_of, restore
from core.errors import InputError, notice, unknown
from core.training.checkpoint import find_checkpoint
from core.weights import read_metadata

MOST = 5
"""Classes that are told of an image."""


class Prediction(NamedTuple):
    """Of one image, the most probable ``classes`` and their ``probabilities``, falling."""

    file: str
    classes: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Classifier:
    """Class names, what is done to an RGB image (a function for worker processes), and images so made -> logits.

    ``logits``: a batch of what ``transform`` gives, ``[B, 3, H, W]`` -> ``[B, K]``.
    """

    class_names: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    logits: Callable[[Tensor], Tensor]


def open_run(run: Path, checkpoint: str, data: Mapping[str, Any], task: Task = ONLINE) -> Experiment:
    """The networks of a run at a checkpoint, with as little of its data set as they need.

    ``data``: fields of ``DataConfig`` that have changed since.
    Raises: InputError for what cannot be opened, and where the image size stays unknown.
    """
    command, folder = command_of(run, task), find_checkpoint(run, checkpoint)
    config = replace(command.config.data, noise=0.0, **data)
    command = replace(command, config=replace(command.config, data=config))
    said: Mapping[str, Any] = next((read_metadata(file) for file in sorted(folder.glob("*.safetensors"))), {})
    return restore(command, folder, _datasets(config, said))


def open_weights(command: Command, file: str, named: bool) -> Experiment:
    """The network of one weight file. ``named``: whether the command's data set is its own, or was not given.

    Raises: InputError for what cannot be opened, and where the class count or the image size stays unknown.
    """
    said, config = read_metadata(file), command.config.data
    if named:
        return build(command, check=False, datasets=_datasets(config, said))
    if "num_classes" not in said:
        raise InputError(f"{file} does not say how many classes it has: give --data.name (and --data.root)")
    if config.image_size is None and "size" in said:
        config = replace(config, image_size=int(said["size"]))
        command = replace(command, config=replace(command.config, data=config))
    return build(command, check=False, datasets=nameless_datasets(config, int(said["num_classes"])))


def _datasets(config: DataConfig, said: Mapping[str, Any]) -> DataSets:
    """A few images of the data set and its class names; numbers where it is missing.

    ``said``: by a weight file, which may know how many classes there are.
    """
    try:
        return load_datasets(config, first=2)
    except InputError as error:
        if "num_classes" not in said:
            raise
        try:
            found = nameless_datasets(config, int(said["num_classes"]))
        except InputError as unsized:
            raise InputError(f"{error}; or else: {unsized}") from error
        notice(f"{error}; without it, classes have numbers and no names")
        return found


def of_experiment(experiment: Experiment, role: str, device: str) -> Classifier:
    """A network of a run or of a weight file, on images as evaluation of the same networks prepares and sees them.

    Raises: InputError for an unknown role.
    """
    distiller, datasets = experiment.distiller.to(device), experiment.datasets
    if role not in distiller.scored_roles:
        raise unknown("role", role, distiller.scored_roles)
    alone = distiller.takes_one or role in distiller.moving_averages  # which then runs what it needs
    optional = [*(distiller.networks if alone else ()), *distiller.moving_averages]
    without = [other for other in optional if other != role]
    transform = evaluation_transform(experiment.command.config.data, datasets.image_size)
    return Classifier(datasets.class_names, transform, lambda images: distiller.outputs(images, without)[role].logits)


@torch.no_grad()
def predict(
    classifier: Classifier, images: Images, workers: int, device: str, skipped: list[InputError]
) -> Iterator[Prediction]:
    """A prediction of each image (float32, batches of 256). What is wrong with broken images goes to ``skipped``."""
    transform, names = classifier.transform, classifier.class_names
    split = Streamed(images, images.targets, torch.arange(len(images.files)), transform, transform)
    workers = worth_workers(len(split), workers)
    loader = StreamLoader(split, EVALUATION_BATCH, train=False, workers=workers, device=device, skipped=skipped)
    for batch in loader:
        logits = classifier.logits(batch["image"]).float()
        best = logits.topk(min(MOST, logits.shape[1]), dim=1).indices
        probabilities = logits.softmax(dim=1).gather(1, best)
        indices = batch["index"].tolist()
        for index, classes, values in zip(indices, best.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(images.names[index], [names[c] for c in classes], values)
