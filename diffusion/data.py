"""Images for diffusion models: a whole set as uint8 on the device, in batches of [-1, 1], flipped there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from core.errors import InputError
from core.files import how_to_make
from core.images import EXTENSIONS, image_files, open_image
from core.ranges import Count, Pixels, check_ranges
from core.training.order import EpochOrder


@dataclass(frozen=True)
class DataConfig:
    """Which images, without labels.

    Args:
        name: cifar10 (the 50,000 training images), folder (every image below ``root``) or digits (scikit-learn's 1,797
            handwritten digits, 8 x 8, one channel: no file, no download).
        root: folder that holds the data set.
        download: fetch CIFAR-10 into ``root`` if it is missing.
        image_size: height and width in pixels, for a folder; images of another size are cropped to a square and
            resized. Unless given, that of the first image, which all must then have.
        flip: mirror half of the images; yes unless given, no for digits (a mirrored digit is another shape).
        limit: only the first so many images.
    """

    name: Literal["cifar10", "folder", "digits"] = "cifar10"
    root: str = "data"
    download: bool = False
    image_size: Pixels | None = None
    flip: bool | None = None
    limit: Count | None = None

    def __post_init__(self) -> None:
        check_ranges("data.", self)
        if self.image_size is not None and self.name in ("cifar10", "digits"):
            raise InputError(f"data.image_size {self.image_size}: {self.name} has a size of its own, leave it out")

    @property
    def flips(self) -> bool:
        return self.name != "digits" if self.flip is None else self.flip


def load_images(config: DataConfig) -> Tensor:
    """All images of a set, uint8 ``[N, C, H, W]``. Raises: InputError where there are none, naming file or folder."""
    if config.name != "folder":
        return read_named(config.name, config.root, config.download)[0][: config.limit].contiguous()
    root = Path(config.root)
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist: set --data.root{how_to_make(root)}")
    files = [root / file for file in sorted(map(Path, image_files(root)))[: config.limit]]
    if not files:
        raise InputError(f"no image ({', '.join(EXTENSIONS)}) in {root} or below it")
    return read_files(files, config.image_size).contiguous()


def read_named(name: str, root: str, download: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """cifar10 (training part, uint8 ``[50000, 3, 32, 32]``) or digits (all, ``[1797, 1, 8, 8]``), labels int64, names.

    Raises: InputError where CIFAR-10 is not in ``root``.
    """
    from classification.data import Arrays, load_datasets
    from classification.data import DataConfig as NamedConfig

    digits = name == "digits"
    found = load_datasets(NamedConfig(name, root, download, image_size=8 if digits else None))
    parts = [part for part in (found.train, found.test if digits else None) if isinstance(part, Arrays)]
    order = torch.cat([part.indices for part in parts]).argsort()
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts])
    return images[order, : 1 if digits else 3], labels[order], found.class_names


def read_files(files: Sequence[Path], size: int | None) -> Tensor:
    """Image files as uint8 ``[N, 3, H, W]``, cropped to squares of ``size`` where that is given.

    Raises: InputError naming the first that is broken or, without ``size``, has not the first one's shape.
    """
    images = np.empty(0)
    for position, file in enumerate(files):
        image = open_image(file)
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        if position == 0:
            width, height = image.size
            images = np.empty((len(files), height, width, 3), np.uint8)
        if image.size != (width, height):
            raise InputError(
                f"{file} is {image.width} x {image.height} pixels, {files[0]} is {width} x {height}: give "
                "--data.image_size to resize them"
            )
        images[position] = np.asarray(image)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class Shuffled(EpochOrder):
    """The order of a loader's batches and flips, both from (seed, epoch). The short last batch is left out.

    Args: how many images there are; the rest as ``EpochOrder``; whether half of the images are mirrored.
    Raises: InputError where the batch is larger than the set, or cannot be shared out.
    """

    def __init__(self, count: int, batch_size: int, *, flip: bool, world: int = 1, **order: int) -> None:
        if batch_size < 1 or batch_size % world:
            raise InputError(f"batch_size {batch_size} cannot be shared by {world} process(es)")
        if count < batch_size:
            raise InputError(f"{count} images are fewer than one batch of {batch_size}: lower --batch_size")
        super().__init__(count, batch_size, world=world, **order)
        self.flip = flip

    def drawn(self) -> tuple[Tensor, Tensor]:
        """The current epoch's order int64 ``[N]`` and, for each place in it, whether it is mirrored, bool ``[N]``.

        Where the current epoch is over, that of the next one, which is then the current one.
        """
        self.begin()
        generator = self.generator(self.epoch)
        return self.shuffled(generator), torch.rand(self.size, generator=generator) < (0.5 if self.flip else 0.0)


class ImageLoader(Shuffled):
    """Shuffled batches ``{"image": float32 [B, C, H, W] in [-1, 1]}``; iterating yields the rest of the current epoch.

    Args: images uint8 ``[N, C, H, W]``; labels int64 ``[N]``, which batches then have too, as "label" ``[B]``; where
        the set lies and the batches end up; the rest as ``Shuffled``.
    Raises: InputError as ``Shuffled``.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        labels: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        **order: Any,
    ) -> None:
        super().__init__(len(images), batch_size, **order)
        self.images, self.labels = images.to(device), None if labels is None else labels.to(device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order, mirrored = (values.to(self.images.device) for values in self.drawn())
        for step in range(self.position, len(self)):
            own = order[self.share(step)]
            image = self.images[own]
            if self.flip:
                image = torch.where(mirrored[self.share(step)].view(-1, 1, 1, 1), image.flip(3), image)
            self.position = step + 1
            batch = {"image": scaled(image)}
            yield batch if self.labels is None else {**batch, "label": self.labels[own]}


def in_order(pool: Executor, read: Callable[[Any], Tensor], items: Iterable[Any], ahead: int) -> Iterator[Tensor]:
    """``read(item)`` of each item in turn, begun while so many before it are not yet asked for."""
    begun: deque[Future[Tensor]] = deque()
    for item in items:
        begun.append(pool.submit(read, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def scaled(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0
