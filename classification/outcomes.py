"""What two networks make of the same images: intervals by the bootstrap, who is right where, and who confuses what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
Interval = tuple[float, float]


def bootstrap(counts: Sequence[int], values: Sequence[float]) -> Interval:
    """The 95 % percentile bootstrap interval of a mean over images, in percent.

    Each image has one of few values. Drawing the images anew, with replacement, then is drawing how many of them have
    each value: a multinomial, whatever the number of images. 10,000 draws of one seed.

    Args: how many images have each value; the values (0 and 1 of an accuracy, -1, 0 and 1 of a paired difference).
    """
    total = sum(counts)
    draws = np.random.default_rng(0).multinomial(total, np.array(counts) / total, size=RESAMPLES)  # [draws, values]
    low, high = np.quantile(100.0 * draws @ np.array(values) / total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def accuracy_interval(right: Tensor) -> Interval:
    """Of the share of right answers, bool ``[N]``, in percent."""
    hits = int(right.sum())
    return bootstrap([hits, len(right) - hits], [1.0, 0.0])


@dataclass(frozen=True)
class Change:
    """One confusion, images of class ``true`` that are taken for ``said``: by both networks of a pair."""

    true: int
    said: int
    before: int
    """Images that theirs confuses so."""
    after: int
    """Images that ours confuses so."""
    mended: int
    """Of those before, the ones that ours gets right."""
    new: int
    """Of those after, the ones that theirs gets right."""


class Pairing(NamedTuple):
    """Ours against theirs on the same images; ``difference``, ``interval``: ours less theirs, in points of accuracy."""

    both: int
    only_ours: int
    only_theirs: int
    neither: int
    difference: float
    interval: Interval
    """The paired bootstrap's, over images."""
    mcnemar: float
    """The exact p-value for that each is as often right where the other is wrong."""


def pair(ours: Tensor, theirs: Tensor, target: Tensor) -> Pairing:
    """Two networks' predicted classes and the true ones, each ``[N]``."""
    from scipy.stats import binomtest

    a, b = ours == target, theirs == target
    both, mine, yours = int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum())
    same = len(target) - mine - yours
    difference = 100.0 * (mine - yours) / len(target)
    interval = bootstrap([mine, yours, same], [1.0, -1.0, 0.0])
    p = float(binomtest(mine, mine + yours).pvalue) if mine + yours else 1.0
    return Pairing(both, mine, yours, same - both, difference, interval, p)


def changes(ours: Tensor, theirs: Tensor, target: Tensor, classes: int) -> list[Change]:
    """Every confusion of either network (predicted and true classes ``[N]``) whose images are not the same for both.

    The greatest net changes first, mended before new, then in the order of the classes.
    """

    def counts(predicted: Tensor, where: Tensor) -> Tensor:  # [K, K], true and said
        return confusion(predicted[where], target[where], classes).fill_diagonal_(0)

    every = torch.ones_like(target, dtype=torch.bool)
    before, after = counts(theirs, every), counts(ours, every)
    mended, new = counts(theirs, ours == target), counts(ours, theirs == target)
    moved = (before != after) | (mended > 0) | (new > 0)
    found = [
        Change(true, said, *(int(table[true, said]) for table in (before, after, mended, new)))
        for true, said in moved.nonzero().tolist()
    ]
    return sorted(found, key=lambda c: (-abs(c.after - c.before), c.after - c.before, c.true, c.said))


def confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """How many images of each class (row) are taken for each (column), int64 ``[K, K]``."""
    return torch.bincount(target * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class(right: Tensor, target: Tensor, classes: int) -> Tensor:
    """How many images of each class are right, int64 ``[K]``, of bool ``[N]`` and the true classes ``[N]``."""
    return torch.bincount(target[right], minlength=classes)
