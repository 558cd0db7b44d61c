"""Noisy labels (Table 21): a fixed share of the training images gets random labels; those of all others stay true."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from classification.data.sources import Split
from core.errors import InputError
from core.files import write_atomically
from core.training.seed import mix
from core.weights import read_state_dict

SALT = 0x6E6F6973
"""Keeps these draws apart from an epoch's order of the images, which comes of the same seed."""


@dataclass(frozen=True)
class LabelNoise:
    """Whose labels were drawn anew: `index` int64 [n], sorted positions in the training split (a batch's `index`),
    `true` and `given` int64 [n], their classes; `given` may be `true` by chance."""

    index: Tensor
    true: Tensor
    given: Tensor


def draw_noise(targets: Tensor, num_classes: int, share: float, seed: int, *, exclude_true: bool = False) -> LabelNoise:
    """round(share * N) random images of `targets` int64 [N], each with a label uniform over all `num_classes` classes.

    It depends on the arguments alone. With one seed, a smaller share draws a subset of a larger share's images, with
    the same labels. `exclude_true`: uniform over the other classes instead.

    Raises: InputError for a share that comes to no image, or no other class to choose.
    """
    count = round(share * len(targets))
    if count == 0:
        raise InputError(f"data.noise {share} of {len(targets)} training images changes no label")
    if exclude_true and num_classes < 2:
        raise InputError("data.noise_exclude_true needs at least 2 classes")
    generator = torch.Generator().manual_seed(mix(seed, SALT))
    chosen = torch.randperm(len(targets), generator=generator)[:count]
    true = targets[chosen]
    drawn = torch.randint(int(exclude_true), num_classes, (len(targets),), generator=generator)[:count]
    given = (true + drawn) % num_classes if exclude_true else drawn
    order = chosen.argsort()
    return LabelNoise(chosen[order], true[order], given[order])


def with_noise(split: Split, noise: LabelNoise) -> Split:
    """The split with the given labels; its images and `split.targets` stay as they are."""
    return replace(split, targets=split.targets.index_copy(0, noise.index, noise.given))


def save_noise(noise: LabelNoise, file: Path) -> None:
    """Writes `index`, `true` and `given` as safetensors, atomically.

    Raises: InputError where the file already tells of other labels, or is damaged.
    """
    from safetensors.torch import save_file

    if not file.exists():
        write_atomically(file, lambda path: save_file(asdict(noise), path))
        return
    held = read_state_dict(file)
    if any(not torch.equal(tensor, held.get(name, tensor[:0])) for name, tensor in asdict(noise).items()):
        raise InputError(
            f"{file} tells of other noisy labels: the data set has changed since this run began, or it is damaged"
        )
