"""Loaders with exact resuming: whole sets in memory (batched crops and flips), and files decoded by worker processes.

Both yield the same batch: a dict of `image` uint8 [B, C, H, W] (raw 0..255; [B, V, C, H, W] for V > 1 views), `target`
int64 [B], `index` int64 [B] (position in the split, from 0) and `weight` (float, below).

Crops and flips, too, come from (seed, epoch) alone (see `EpochOrder`). Where the processes' shares of a batch differ in
size (short last batch), the mean of their mean losses is the mean over the global batch only after multiplying each by
`weight` = own share * world / global batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.data.sources import Arrays, Split, Streamed
from core.errors import InputError
from core.training.distiller import Batch
from core.training.order import EpochOrder
from core.training.seed import mix, seeded


class EpochLoader(EpochOrder):
    """Epochs, batches and positions, which both loaders share. Iterating yields the REST of the current epoch.

    Training: shuffled; the short last batch is kept unless some process would get fewer than 2 samples of it (batch
    norm needs 2). Evaluation: always from the start, in stored order; rank r sees samples r, r + world, ... once each.

    Args:
        batch_size, order: As in `EpochOrder`: images a step over all processes; `seed`, `rank`, `world`.
        train: Shuffle and augment.
        workers: Processes that decode images which are not held in memory; 0 decodes in this one.
        device: Where the batches end up.
        views: Independently augmented versions of each image.
    Raises: InputError for fewer images a step than processes, or too few training images for one step.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        train: bool,
        workers: int = 0,
        device: torch.device | str = "cpu",
        views: int = 1,
        **order: int,
    ) -> None:
        super().__init__(len(split), batch_size, **order)
        self.train, self.device, self.views = train, torch.device(device), views
        if batch_size < self.world:
            raise InputError(f"a batch of {batch_size} images cannot be shared by {self.world} processes")
        if train and not len(self):
            few = f"{self.size} training images are too few for {self.world} process(es)"
            raise InputError(f"{few}: each needs at least 2")
        self._read(split, workers)

    def __len__(self) -> int:
        if not self.train:
            return -(-len(range(self.rank, self.size, self.world)) // (self.batch_size // self.world))
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest // self.world >= 2)

    def __iter__(self) -> Iterator[Batch]:
        if not self.train:
            self.position = 0
        self.begin()
        for batch in self._batches(self.epoch, self.position):
            self.position += 1
            yield batch
        self.begin()

    def generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix(self.seed, epoch))

    def _order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The epoch's order of all samples, int64 [N], and the generator that further draws of the epoch come from."""
        generator = self.generator(epoch)
        return self.shuffled(generator) if self.train else torch.arange(self.size), generator

    def indices(self, epoch: int) -> list[Tensor]:
        """The `index` of each of this process's batches in that epoch, int64 [B] on the CPU, wherever batches go."""
        order, _ = self._order(epoch)
        return [self._share(order, step) for step in range(len(self))]

    def _share(self, rows: Tensor, step: int) -> Tensor:
        """This process's part of batch `step`; `rows` [N, ...] stand for all samples in the epoch's order."""
        if self.train:
            return rows[self.share(step)]
        own = self.batch_size // self.world
        return rows[self.rank :: self.world][step * own : (step + 1) * own]

    def _weight(self, step: int, own: int) -> float:
        if not self.train:
            return 1.0
        return own * self.world / min(self.batch_size, self.size - step * self.batch_size)

    def _read(self, split: Any, workers: int) -> None:
        """Takes what is to be loaded, once."""
        raise NotImplementedError

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        raise NotImplementedError


class InMemoryLoader(EpochLoader):
    """Batches of `Arrays`, which lie on `device` and are cropped and flipped there without a loop over images.

    Training images equal torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()` of the raw image: zero
    padding, offsets uniform over (2 * padding + 1)^2 for each image and view, flip with probability 0.5.

    The set is kept as one flat row of bytes: every image, then (with flips) every mirrored image. A crop is then the
    slice that starts at some byte, so a batch is one gather of slices. Neighbouring rows share their padding: the zeros
    left of a row are also those right of the row before, and likewise for the rows of zeros between planes.
    """

    def _read(self, arrays: Arrays, workers: int) -> None:
        self.flip = self.train and arrays.augmentation == "crop_flip"
        self.padding = arrays.padding if self.train and arrays.augmentation != "none" else 0
        self.targets = arrays.targets.to(self.device)
        images = arrays.images.to(self.device)
        self.channels, self.height, self.width = images.shape[1:]
        self.row = self.width + self.padding
        self.plane = (self.height + self.padding) * self.row
        if self.train:
            versions = [images, images.flip(3)] if self.flip else [images]
            flat = torch.cat([F.pad(version, (self.padding, 0, self.padding, 0)).flatten() for version in versions])
            # The last image's right and bottom padding, which no later row provides.
            images = F.pad(flat, (0, self.padding * self.row + self.padding))
        self.images = images

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order, generator = self._order(epoch)
        slices = self._slices(order, generator).to(self.device) if self.train else order
        order = order.to(self.device)
        for step in range(start, len(self)):
            index = self._share(order, step)
            yield {
                "image": self._gather(self._share(slices, step)) if self.train else self._share(self.images, step),
                "target": self.targets[index],
                "index": index,
                "weight": self._weight(step, len(index)),
            }

    def _slices(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """Where in the flat set the crop of each sample and view starts, int64 [N, V]."""
        starts = []
        for _ in range(self.views):
            down, right = torch.randint(2 * self.padding + 1, (2, self.size), generator=generator)
            image = order
            if self.flip:
                mirrored = torch.rand(self.size, generator=generator) < 0.5
                # Cropping and then flipping is cropping the mirrored image at the mirrored offset.
                image = torch.where(mirrored, order + self.size, order)
                right = torch.where(mirrored, 2 * self.padding - right, right)
            starts.append(image * (self.channels * self.plane) + down * self.row + right)
        return torch.stack(starts, dim=1)

    def _gather(self, starts: Tensor) -> Tensor:
        """int64 [B, V] -> uint8 [B, V, C, H, W], without V if that is 1."""
        length = (self.channels - 1) * self.plane + (self.height - 1) * self.row + self.width
        windows = self.images.as_strided((len(self.images) - length + 1, length), (1, 1))
        gathered = windows.index_select(0, starts.flatten())
        images = gathered.as_strided(
            (len(gathered), self.channels, self.height, self.width), (length, self.plane, self.row, 1)
        ).contiguous()
        return images.unflatten(0, starts.shape) if starts.shape[1] > 1 else images


class StreamLoader(EpochLoader):
    """Batches of `Streamed` images, which worker processes decode and augment (torch's `DataLoader`).

    Each sample's augmentation is drawn from (seed, epoch, index, view) by the generators of Python, NumPy and torch,
    which get their states back afterwards: neither the number of workers nor a resume changes an image. The position
    counts batches handed out, not prefetched ones. The workers live as long as the loader.

    Args: those of ``EpochLoader``; ``skipped``, for evaluation: broken images are left out of the batches, and what
        is wrong with each is appended here.
    Raises: InputError while iterating, for a broken image (names the file) unless they are skipped.
    """

    def __init__(self, *arguments: Any, skipped: list[InputError] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.skipped = skipped

    def _read(self, split: Streamed, workers: int) -> None:
        self.plan = _Plan()
        workers = min(workers, os.cpu_count() or 1)  # torch warns of more
        self.loader = torch.utils.data.DataLoader(
            _Samples(split, self.train, self.seed, self.views),
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            # Its own generator: the loader must not draw from the global one, or a resume would change what follows.
            generator=torch.Generator(),
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order, _ = self._order(epoch)
        steps = range(start, len(self))
        self.plan.batches = ([(epoch, index) for index in self._share(order, step).tolist()] for step in steps)
        for step, (batch, broken) in enumerate(self.loader, start):
            if broken and self.skipped is None:
                raise broken[0]
            if self.skipped is not None:
                self.skipped += broken
            if not batch:
                continue
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            yield {**batch, "weight": self._weight(step, len(batch["index"]))}


class _Plan:
    """A batch sampler whose batches, of (epoch, index), are set anew for each epoch: worker processes can stay."""

    batches: Iterable[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class _Samples(torch.utils.data.Dataset):
    """(epoch, index) -> the sample; or the InputError, for a worker that raises wraps it in its traceback."""

    def __init__(self, split: Streamed, train: bool, seed: int, views: int) -> None:
        self.split, self.train, self.seed, self.views = split, train, seed, views

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | InputError:
        epoch, index = key
        data = self.split
        try:
            image = data.source.image(int(data.indices[index]))
        except InputError as error:
            return error
        if not self.train:
            return data.transform(image), int(data.targets[index]), index
        augmented = []
        for view in range(self.views):
            with seeded(mix(self.seed, epoch, index, view)):
                augmented.append(data.augment(image))
        return augmented[0] if self.views == 1 else torch.stack(augmented), int(data.targets[index]), index


def _collate(samples: list[tuple[Tensor, int, int] | InputError]) -> tuple[dict[str, Tensor], list[InputError]]:
    """The batch of the whole images (empty where there is none), and what is wrong with the others."""
    whole = [sample for sample in samples if not isinstance(sample, InputError)]
    broken = [sample for sample in samples if isinstance(sample, InputError)]
    if not whole:
        return {}, broken
    images, targets, indices = zip(*whole, strict=True)
    batch = {"image": torch.stack(images), "target": torch.tensor(targets), "index": torch.tensor(indices)}
    return batch, broken


def make_loader(split: Split, batch_size: int, **options: Any) -> InMemoryLoader | StreamLoader:
    """The loader that fits `split`; `options` are those of `EpochLoader`."""
    return (InMemoryLoader if isinstance(split, Arrays) else StreamLoader)(split, batch_size, **options)
