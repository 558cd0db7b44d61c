"""Whether the images of a data set are enough of each class to learn from, and to choose by."""

from __future__ import annotations

import math

import torch

from classification.data.datasets import DataConfig, DataSets
from core.errors import InputError


def check_classes(datasets: DataSets, config: DataConfig) -> None:
    """Before training. Raises: InputError for fewer than two classes, a class of one image, or a split that lacks one.

    One image of a class is no mistake where ``data.per_class 1`` asks for it; nor is a class without any, for data sets
    may name more classes than they have.
    """
    classes, names = datasets.num_classes, datasets.class_names
    if classes < 2:
        which = names[0] if names else "none"
        raise InputError(
            f"{config.name} has one class here ({which}), and there is nothing to tell apart: give two folders of "
            "classes or more, or a larger data.classes"
        )
    train, held_out = (
        torch.zeros(classes, dtype=torch.int64) if split is None else torch.bincount(split.targets, minlength=classes)
        for split in (datasets.train, datasets.validation)
    )
    counts = train + held_out
    for name, left, held, count in zip(names, train.tolist(), held_out.tolist(), counts.tolist(), strict=True):
        if count == 1 and config.per_class is None:
            raise InputError(
                f"class {name} has one training image, from which nothing can be learnt of it: add images, or delete it"
            )
        if config.validation and count and not held:
            raise InputError(
                f"data.validation {config.validation} holds out none of the {count} training images of class {name}: "
                f"give at least {math.ceil(100 / count) / 100}, or add images"
            )
        if count and not left:
            raise InputError(
                f"data.validation {config.validation} leaves none of the {count} training images of class {name} to "
                "learn from: give less, or add images"
            )
