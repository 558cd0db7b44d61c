"""Data sets as train, validation and test splits, either decoded in memory or read image by image.

Means and standard deviations (of pixels in [0, 1]): CIFAR-100 as in HobbitLong/RepDistiller and
megvii-research/mdistiller, CIFAR-10 as in KellerJordan/cifar10-airbench, ImageNet's for everything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classification.data.config import Augmentation, DataConfig
from classification.data.sources import Source, folder_sources, timm_sources
from core.errors import InputError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 64
"""Largest image (pixels) that is held in memory, and cropped after padding, by default."""
MEMORY_BUDGET = 2 * 1024**3
"""Largest set (bytes of uint8) held in memory by default; the training loader keeps 2 to 3 times as much again."""
WORTH_WORKERS = 2000
"""Number of images above which starting worker processes to decode them pays."""
CHUNK = 256
"""Images that a worker process decodes at a time."""
NAMES = ("cifar10", "cifar100", "digits", "imagenet", "folder")
IN_MEMORY_NAMES = ("cifar10", "cifar100", "digits")
OWN_SIZE = {"cifar10": 32, "cifar100": 32, "digits": 16, "imagenet": 224}
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # Of the training images below at 16 pixels.
    "digits": ((0.3058,) * 3, (0.3187,) * 3),
}
DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Arrays:
    """A split in memory.

    `images` uint8 [N, C, H, W], `targets` int64 [N], `indices` int64 [N]: the images' positions in the stored split,
    before any subset. `augmentation` (crop_flip, crop or none) and `padding` (pixels) are what training applies.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    augmentation: Augmentation = "none"
    padding: int = 0

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Streamed:
    """A split read image by image from `source`.

    `targets`, `indices` as in `Arrays`. `augment` (training) and `transform` (evaluation) take an RGB image to uint8
    [C, H, W]; `augment` may draw from the random generators of Python, NumPy and torch.
    """

    source: Source
    targets: Tensor
    indices: Tensor
    augment: Callable[[Any], Tensor]
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.targets)


Split = Arrays | Streamed


@dataclass(frozen=True)
class DataSets:
    """What `load_datasets` returns. `mean` and `std` are those of pixels in [0, 1], one value a channel."""

    train: Split
    validation: Split | None
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    channels: int = 3


def load_datasets(config: DataConfig) -> DataSets:
    """Read the data set: whole into memory, or only its list of files.

    Raises:
        InputError: unknown name, missing or broken files, an impossible subset, image size or augmentation. The message
            says which, and how to mend it.
    """
    _check(config)
    if config.name in IN_MEMORY_NAMES:
        return _load_arrays(config)
    if "/" in config.name:
        return _load_sources(config, *timm_sources(config.name, config.root, config.download))
    return _load_sources(config, *folder_sources(config.root))


def _check(config: DataConfig) -> None:
    if config.name not in NAMES and "/" not in config.name:
        raise unknown("data set", config.name, NAMES)
    if config.augmentation is not None and config.augmentation not in get_args(Augmentation):
        raise unknown("augmentation", config.augmentation, get_args(Augmentation))
    if not 0 <= config.validation < 1:
        raise InputError(f"data.validation is a share in [0, 1), not {config.validation}")
    if not 0 <= config.noise < 1:
        raise InputError(f"data.noise is a share in [0, 1), not {config.noise}")
    for field, least in (("image_size", 1), ("classes", 1), ("per_class", 1), ("padding", 0), ("workers", 0)):
        value = getattr(config, field)
        if value is not None and value < least:
            raise InputError(f"data.{field} must be at least {least}, not {value}")
    if config.name in IN_MEMORY_NAMES and config.in_memory is False:
        hint = f"; torch/{config.name} streams it" if config.name != "digits" else ""
        raise InputError(f"data set {config.name} is always held in memory: leave data.in_memory out{hint}")


def _load_arrays(config: DataConfig) -> DataSets:
    train, test, names = _digits() if config.name == "digits" else _cifar(config)
    size = config.image_size or OWN_SIZE[config.name]
    augmentation = config.augmentation or ("crop" if config.name == "digits" else "crop_flip")
    check_in_memory(augmentation)

    def take(split: Arrays, indices: Tensor) -> Arrays:
        return Arrays(resize(split.images[indices], size), split.targets[indices], split.indices[indices])

    chosen = choose(train.targets, test.targets, names, config)
    validation = take(train, chosen[1]) if len(chosen[1]) else None
    return _describe(config, take(train, chosen[0]), validation, take(test, chosen[2]), names, size, augmentation)


def _load_sources(config: DataConfig, train: Source, test: Source) -> DataSets:
    names = train.class_names
    chosen = choose(train.targets, test.targets, names, config)
    size = config.image_size or OWN_SIZE.get(config.name) or _own_size(config, train, int(chosen[0][0]))
    in_memory = config.in_memory
    if in_memory is None:
        fits = size <= SMALL and sum(map(len, chosen)) * 3 * size**2 <= MEMORY_BUDGET
        in_memory = fits and config.augmentation != "random_resized_crop"
    augmentation = config.augmentation or ("crop_flip" if in_memory or size <= SMALL else "random_resized_crop")
    if in_memory:
        check_in_memory(augmentation)
        resizing = config.image_size is not None or config.name in OWN_SIZE
    else:
        augment, transform = transforms(augmentation, size, config.padding)

    def take(source: Source, indices: Tensor) -> Split:
        if in_memory:
            return _decode_all(source, indices, size, resizing, config.workers)
        return Streamed(source, source.targets[indices], indices, augment, transform)

    validation = take(train, chosen[1]) if len(chosen[1]) else None
    return _describe(config, take(train, chosen[0]), validation, take(test, chosen[2]), names, size, augmentation)


def _describe(
    config: DataConfig,
    train: Split,
    validation: Split | None,
    test: Split,
    names: tuple[str, ...],
    size: int,
    augmentation: Augmentation,
) -> DataSets:
    if isinstance(train, Arrays):
        train = replace(train, augmentation=augmentation, padding=config.padding)
    names = names[: config.classes]
    mean, std = STATISTICS.get(config.name.rsplit("/", 1)[-1].lower(), IMAGENET_STATISTICS)
    return DataSets(train, validation, test, len(names), names, mean, std, size)


def check_in_memory(augmentation: Augmentation) -> None:
    """Raises InputError for an augmentation that decoded images of one size do not allow."""
    if augmentation == "random_resized_crop":
        raise InputError(
            "augmentation random_resized_crop needs images that are not held in memory: set data.in_memory to false "
            "(folder, imagenet, torch/<name>), or choose crop_flip, crop or none"
        )


def _own_size(config: DataConfig, source: Source, position: int) -> int:
    """The size of the first image where that is small and square, or must be kept; else ImageNet's 224."""
    width, height = source.image(position).size
    if config.in_memory and width != height:
        raise InputError(
            f"{source.describe(position)} has {width}x{height} pixels: set data.image_size (square images)"
        )
    return width if width == height and (width <= SMALL or config.in_memory) else 224


def choose(
    train_targets: Tensor, test_targets: Tensor, names: tuple[str, ...], config: DataConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted positions int64 of the (train, validation, test) images that `classes`, `validation`, `per_class` leave.

    The held-out images are drawn before `per_class`, so that they stay the same for every training subset.

    Raises:
        InputError: more classes or images asked for than there are, or a split that stays empty.
    """
    classes = config.classes or len(names)
    if classes > len(names):
        raise InputError(f"data.classes is {classes}, but {config.name} has {len(names)} classes")
    train, test = ((targets < classes).nonzero().squeeze(1) for targets in (train_targets, test_targets))
    if not len(test):
        raise InputError(f"no test images of the first {classes} classes of {config.name}")
    held_out = stratified(train_targets[train], lambda count: round(config.validation * count), config.split_seed)
    validation = train[held_out]
    if config.validation and len(validation) in (0, len(train)):
        raise InputError(
            f"data.validation {config.validation} of {len(train)} training images leaves "
            f"{'no validation' if not len(validation) else 'no training'} image"
        )
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[held_out] = False
    train = train[rest]
    if config.per_class is not None:
        counts = torch.bincount(train_targets[train], minlength=classes)
        if config.per_class > counts.min():
            fewest = int(counts.argmin())
            raise InputError(
                f"data.per_class is {config.per_class}, but class {names[fewest]} has {counts[fewest]} training images"
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


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear, uint8 [N, C, H, W] -> uint8 [N, C, size, size]."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _digits() -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 8x8, 0..16 scaled to uint8, three equal channels; a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1)
    targets = torch.from_numpy(digits.target).long()
    test = stratified(targets, lambda count: round(DIGITS_TEST_SHARE * count), seed=0)
    train = torch.ones(len(targets), dtype=torch.bool)
    train[test] = False
    indices = torch.arange(len(targets))
    names = tuple(str(digit) for digit in digits.target_names)
    return Arrays(images[train], targets[train], indices[train]), Arrays(images[test], targets[test], test), names


def _cifar(config: DataConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if config.name == "cifar10" else CIFAR100
    path = os.path.join(config.root, kind.base_folder)
    try:
        train, test = (kind(config.root, train=train, download=config.download) for train in (True, False))
    # RuntimeError: files missing or damaged; OSError: no network or no permission to write.
    except (RuntimeError, OSError) as error:
        if config.download:
            raise InputError(f"cannot download {config.name} to {config.root}: {error}") from error
        raise InputError(
            f"{config.name} is missing or damaged in {path}: add --data.download true to fetch it "
            "(170 MB), or set --data.root to the folder that holds it"
        ) from error

    def arrays(dataset: Any) -> Arrays:
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return Arrays(images, torch.tensor(dataset.targets), torch.arange(len(images)))

    return arrays(train), arrays(test), tuple(train.classes)


def _decode_all(source: Source, indices: Tensor, size: int, resizing: bool, workers: int) -> Arrays:
    """Decode the images at `indices` once. Without `resizing`, all must already be `size` x `size`."""
    from tqdm import tqdm

    images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(
        _Chunks(source, indices.split(CHUNK), size, resizing),
        batch_size=None,
        num_workers=min(workers, os.cpu_count() or 1) if len(indices) > WORTH_WORKERS else 0,
        generator=torch.Generator(),
    )
    with tqdm(total=len(indices), desc="decoding", unit="image", disable=None, leave=False) as bar:
        for rows, chunk in zip(images.split(CHUNK), loader, strict=True):
            if isinstance(chunk, InputError):
                raise chunk
            rows.copy_(chunk)
            bar.update(len(chunk))
    return Arrays(images, source.targets[indices], indices)


class _Chunks(torch.utils.data.Dataset):
    """Number of a chunk -> its images uint8 [n, 3, size, size]; or the InputError, which a worker must not raise."""

    def __init__(self, source: Source, chunks: Sequence[Tensor], size: int, resizing: bool) -> None:
        self.source, self.chunks, self.size, self.resizing = source, chunks, size, resizing
        self.to_size = to_size(size)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Tensor | InputError:
        positions = self.chunks[number].tolist()
        pixels = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        try:
            for row, position in enumerate(positions):
                # By way of bytes: a fraction of the time of the array interface, which counts for images this small.
                pixels[row] = np.frombuffer(self._image(position).tobytes(), np.uint8).reshape(pixels.shape[1:])
        except InputError as error:
            return error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _image(self, position: int) -> Image:
        image = self.source.image(position)
        if image.size == (self.size, self.size):
            return image
        if not self.resizing:
            raise InputError(
                f"{self.source.describe(position)} has {image.width}x{image.height} pixels, others "
                f"{self.size}x{self.size}: set data.image_size to resize all images"
            )
        return self.to_size(image)


def to_size(size: int) -> Callable[[Any], Any]:
    """Resize the shorter side of an image bilinearly, and take the central square."""
    from torchvision import transforms as T

    return T.Compose([T.Resize(size), T.CenterCrop(size)])


def transforms(
    augmentation: Augmentation, size: int, padding: int
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """(training, evaluation) transforms from an RGB image to uint8 [3, size, size].

    With random_resized_crop they are the usual ones of ImageNet: 8 to 100 % of the area at an aspect ratio of 3/4 to
    4/3, and flips; evaluation resizes the shorter side to size / 0.875 and takes the centre. Otherwise the shorter side
    is resized to `size` in both.
    """
    from torchvision import transforms as T

    resized_crop = augmentation == "random_resized_crop"
    evaluation = T.Compose([T.Resize(round(size / 0.875)), T.CenterCrop(size)]) if resized_crop else to_size(size)
    flip = [T.RandomHorizontalFlip()]
    training = {
        "random_resized_crop": [T.RandomResizedCrop(size), *flip],
        "crop_flip": [evaluation, T.RandomCrop(size, padding), *flip],
        "crop": [evaluation, T.RandomCrop(size, padding)],
        "none": [evaluation],
    }[augmentation]
    return T.Compose([*training, T.PILToTensor()]), T.Compose([evaluation, T.PILToTensor()])
