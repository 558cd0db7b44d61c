"""Which of a data set's images make its training, validation and test split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import InputError

if TYPE_CHECKING:
    from classification.data.datasets import DataConfig


def choose(
    train_targets: Tensor, test_targets: Tensor | None, names: tuple[str, ...], config: DataConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted positions int64 of the (train, validation, test) images that `classes`, `validation`, `per_class` leave.

    The held-out images are drawn before `per_class`, so that they stay the same for every training subset. Without
    `test_targets` test images are a share of the others (`test`), drawn first.

    Raises: InputError for more classes or images asked for than there are, or a split that stays empty.
    """
    classes = config.classes or len(names)
    if classes > len(names):
        raise InputError(f"data.classes is {classes}, but {config.name} has {len(names)} classes")
    train = (train_targets < classes).nonzero().squeeze(1)
    if test_targets is None:
        test = train[stratified(train_targets[train], lambda count: round(config.test * count), config.split_seed)]
        train = train[~torch.isin(train, test)]
        if not len(test) or not len(train):
            raise InputError(
                f"data.test {config.test} of {len(train) + len(test)} images leaves no "
                f"{'training' if len(test) else 'test'} image: change it, or make folders train and val of the classes"
            )
    else:
        test = (test_targets < classes).nonzero().squeeze(1)
    if not len(test):
        raise InputError(f"no test images of the first {classes} classes of {config.name}")
    held_out = stratified(train_targets[train], lambda count: round(config.validation * count), config.split_seed)
    validation = train[held_out]
    if config.validation and len(validation) in (0, len(train)):
        raise InputError(
            f"data.validation {config.validation} of {len(train)} training images leaves "
            f"{'no validation' if not len(validation) else 'no training'} image"
        )
    train = train[~torch.isin(train, validation)]
    if config.per_class is not None:
        counts = torch.bincount(train_targets[train], minlength=classes)
        if config.per_class > counts.min():
            fewest = int(counts.argmin())
            raise InputError(
                f"data.per_class is {config.per_class}, but class {names[fewest]} has {counts[fewest]} training images"
                f": give at most {counts[fewest]}"
            )
        number = config.per_class
        train = train[stratified(train_targets[train], lambda count: number, config.split_seed)]
    return train, validation, test


def stratified(targets: Tensor, number: Callable[[int], int], seed: int) -> Tensor:
    """Sorted positions int64 of `number(count)` random images of each class, where `count` is that class's size."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    grouped = order[targets[order].argsort(stable=True)]
    groups = grouped.split(torch.bincount(targets).tolist())
    return torch.cat([group[: number(len(group))] for group in groups]).sort().values
