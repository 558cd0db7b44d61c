"""Images for diffusion models: a whole set as uint8 on the device, in batches of [-1, 1], flipped there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from core.errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
    image_size: int | None = None
    flip: bool | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"data.limit must be at least 1: {self.limit}")
        if self.image_size is not None and (self.name != "folder" or self.image_size < 1):
            raise InputError(f"data.image_size must be positive, and only a folder has a choice: {self.image_size}")

    @property
    def flips(self) -> bool:
        return self.name != "digits" if self.flip is None else self.flip


def load_images(config: DataConfig) -> Tensor:
    """All images of a set, uint8 ``[N, C, H, W]``. Raises: InputError where there are none, naming file or folder."""
    load = {"cifar10": _cifar10, "folder": _folder, "digits": _digits}[config.name]
    return load(config)[: config.limit].contiguous()


def _digits(config: DataConfig) -> Tensor:
    return read_digits()[0]


def _cifar10(config: DataConfig) -> Tensor:
    return read_cifar10(config.root, config.download)[0]


def _folder(config: DataConfig) -> Tensor:
    root = Path(config.root)
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist: set --data.root")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS)[: config.limit]
    if not files:
        raise InputError(f"no image ({', '.join(EXTENSIONS)}) in {root} or below it")
    return read_files(files, config.image_size)


def read_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: (images uint8 ``[1797, 1, 8, 8]``, labels int64 ``[1797]``)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()


def read_cifar10(root: str, download: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """torchvision's CIFAR-10, training part: (images uint8 ``[50000, 3, 32, 32]``, labels int64, class names).

    Raises: InputError where it is not in ``root``.
    """
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(root, train=True, download=download)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --data.download true fetches it"
        raise InputError(f"no CIFAR-10 in {root}: {first_line(error)}{hint}") from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2)  # of [N, H, W, C]
    return images, torch.tensor(found.targets), tuple(found.classes)


def read_files(files: Sequence[Path], size: int | None) -> Tensor:
    """Image files as uint8 ``[N, 3, H, W]``, cropped to squares of ``size`` where that is given.

    Raises: InputError naming the first that is broken or, without ``size``, has not the first one's shape.
    """
    import numpy as np

    first = _decode(files[0], size)
    images = np.empty((len(files), *first.shape), np.uint8)  # [N, H, W, 3]
    for position, file in enumerate(files):
        image = _decode(file, size)
        if image.shape != first.shape:
            raise InputError(
                f"{file} is {image.shape[1]} x {image.shape[0]} pixels, {files[0]} is {first.shape[1]} x "
                f"{first.shape[0]}: give --data.image_size to resize them"
            )
        images[position] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _decode(file: Path, size: int | None) -> Any:
    """uint8 ``[H, W, 3]``."""
    import numpy as np
    from PIL import Image, ImageOps

    decoded = open_image(file)
    if size is not None and decoded.size != (size, size):
        decoded = ImageOps.fit(decoded, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(decoded)


def open_image(file: Path) -> Image:
    """The decoded image, RGB. Raises: InputError naming a file that is broken or no image."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # unknown, truncated and damaged files
        raise InputError(f"cannot decode {file}: broken or no image; replace or delete it") from error


def check_parts(batch_size: int, processes: int, accumulate: int) -> None:
    """Raises: InputError where a process has fewer images of a step than parts to take one after the other."""
    if batch_size // processes < accumulate:
        raise InputError(f"batch_size {batch_size} cannot be cut into {accumulate} parts a process")


class Shuffled:
    """The order of a loader's batches, and where it stands in it. The short last batch of an epoch is left out.

    Order and flips come from (seed, epoch) alone: a batch does not depend on the number of processes, of which each
    takes every ``world``-th image, and stopping loses nothing.

    Args: how many images there are; images of a step over all processes; whether half of them are mirrored; the seed;
        this process and how many there are.
    Raises: InputError where the batch is larger than the set, or cannot be shared out.
    """

    def __init__(self, count: int, batch_size: int, *, flip: bool, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or batch_size % world:
            raise InputError(f"batch_size {batch_size} cannot be shared by {world} process(es)")
        if count < batch_size:
            raise InputError(f"{count} images are fewer than one batch of {batch_size}: lower --batch_size")
        self.count, self.batch_size, self.flip, self.seed = count, batch_size, flip, seed
        self.rank, self.world = rank, world
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return self.count // self.batch_size

    def begin(self) -> tuple[Tensor, Tensor]:
        """The current epoch's order int64 ``[N]`` and, for each place in it, whether it is mirrored, bool ``[N]``.

        Where the current epoch is over, that of the next one, which is then the current one.
        """
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        # Numbers far apart, so that no two (seed, epoch) share a stream.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator)
        return order, torch.rand(self.count, generator=generator) < (0.5 if self.flip else 0.0)

    def share(self, step: int) -> slice:
        """The places of this process's images of a step in the epoch's order."""
        return slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)

    def pixels(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the current epoch of images uint8 ``[N, C, H, W]``: indices int64 ``[B]``, batches in [-1, 1]."""
        order, mirrored = (values.to(images.device) for values in self.begin())
        for step in range(self.position, len(self)):
            own = self.share(step)
            batch = images[order[own]]
            if self.flip:
                batch = mirror(batch, mirrored[own])
            self.position = step + 1
            yield order[own], scaled(batch)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["position"] > len(self):
            raise InputError("the saved run stood at a batch that the data no longer have: resume with the same data")
        self.epoch, self.position = state["epoch"], state["position"]


class ImageLoader(Shuffled):
    """Shuffled batches ``{"image": float32 [B, C, H, W] in [-1, 1]}``; iterating yields the rest of the current epoch.

    Args: images uint8 ``[N, C, H, W]``; where the set lies and the batches end up; the rest as ``Shuffled``.
    Raises: InputError as ``Shuffled``.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        *,
        flip: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(len(images), batch_size, flip=flip, seed=seed, rank=rank, world=world)
        self.images = images.to(device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _, images in self.pixels(self.images):
            yield {"image": images}


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """``[B, C, H, W]`` with the images of ``which``, bool ``[B]``, mirrored."""
    return torch.where(which.view(-1, 1, 1, 1), images.flip(3), images)


def scaled(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0
