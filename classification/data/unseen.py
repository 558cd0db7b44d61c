"""For images of no data set: what evaluation does to them, and a stand-in for a data set that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from classification.data.datasets import (
    IN_MEMORY_NAMES,
    OWN_SIZE,
    DataConfig,
    DataSets,
    augmentation_of,
    pixels,
    resize,
    statistics_of,
    to_size,
    transforms,
)
from classification.data.sources import Arrays
from core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def nameless_datasets(config: DataConfig, num_classes: int) -> DataSets:
    """Stands for a data set that is not there, for networks that only predict: classes are numbers, images black.

    Raises: InputError where the size of its images is not known.
    """
    size = config.image_size or OWN_SIZE.get(config.name)
    if size is None:
        raise InputError("how large the network wants its images is not known: give --data.image_size")
    black = Arrays(torch.zeros(2, 3, size, size, dtype=torch.uint8), *torch.zeros(2, 2, dtype=torch.int64))
    names = tuple(map(str, range(num_classes)))
    return DataSets(black, None, black, num_classes, names, *statistics_of(config.name), size)


def evaluation_transform(config: DataConfig, size: int) -> Callable[[Any], Tensor]:
    """What evaluation does to an RGB image that does not belong to the data set: to uint8 [3, size, size].

    It is what it does to the data set's own: those of CIFAR and digits are resized as tensors, files as PIL images.
    """
    augmentation = augmentation_of(config, size)
    if augmentation == "random_resized_crop":
        return transforms(augmentation, size, config.padding)[1]
    return _ToSize(size, as_tensors=config.name in IN_MEMORY_NAMES)


class _ToSize:
    """A class, so that it can be handed to worker processes. What has the right size already costs little."""

    def __init__(self, size: int, as_tensors: bool) -> None:
        self.size, self.as_tensors, self.to_size = size, as_tensors, to_size(size)

    def __call__(self, image: Image) -> Tensor:
        if self.as_tensors and image.width == image.height:
            return resize(pixels(image)[None], self.size)[0]
        return pixels(image if image.size == (self.size, self.size) else self.to_size(image))
