"""What to train on: data sets as train, validation and test splits, decoded in memory or read image by image.

Means and standard deviations (of pixels in [0, 1]): CIFAR-100 as in HobbitLong/RepDistiller and
megvii-research/mdistiller, CIFAR-10 as in KellerJordan/cifar10-airbench, ImageNet's for everything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.data.loaders import StreamLoader
from classification.data.policy import PLAIN, Erasing, Policy, auto_augmenter, make_policy
from classification.data.sources import Arrays, Augmentation, Held, Source, Split, Streamed, sources
from classification.data.subsets import choose, stratified
from core.errors import InputError, notice, unknown
from core.progress import progress_bar
from core.ranges import Count, NonNegative, Pixels, Range, Seed, Share, Unit, check_ranges
from core.training.run import is_main_process

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
class DataConfig:
    """Data set, image size, augmentation and subsets.

    Args:
        name: cifar10, cifar100, digits (scikit-learn's handwritten digits: no file, no download), imagenet or folder
            (`root/{train,val}/<class>/*.jpg`, `root/{train,val}.tar`, or `root/<class>/*.jpg`), or a name of timm's
            data set factory with random access: `torch/<name>` (torchvision) or `hfds/<name>` (Hugging Face).
        root: Folder that holds the data set.
        download: Fetch the data set into `root` if it is missing (cifar10, cifar100, torch/...).
        image_size: Height and width in pixels. Empty: the set's own, that is 32 for CIFAR, 16 for digits, 224 for
            imagenet; for other sets the size of the first image if that is square and at most 64, else 224.
        in_memory: Hold the decoded images in memory, on the device that trains. Empty: yes for CIFAR and digits, and
            for other sets up to 64 pixels and 2 GiB of uint8.
        augmentation: crop_flip (random crop of the zero-padded image, flip with probability 0.5), crop,
            random_resized_crop (with flip) or none. Empty: crop for digits (a flipped digit is another shape),
            crop_flip up to 64 pixels, random_resized_crop above.
        padding: Zero pixels added on each side before a crop.
        auto_augment: timm's policy for each training image, as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, v0, 3a.
        color_jitter: Brightness, contrast and saturation of each training image times a factor in [1 - x, 1 + x]; also
            beside a policy.
        re_prob: How often a rectangle of a training image is erased (timm's random erasing).
        re_mode: What by: pixel noise, one rand(om) colour, or const, the data set's mean.
        mixup: Alpha of mixup, which blends pairs of training images and their labels; 0 for none. One draw a batch.
        cutmix: Alpha of cutmix, which pastes a rectangle of one into the other; 0 for none.
        mixup_prob: How often a batch is mixed, by either.
        mixup_switch_prob: How often it is cutmix, where both are on.
        test: Share of the images that are test images in a folder of classes without train and val; stratified, drawn
            by `split_seed`.
        validation: Share of the training images held out for validation, in [0, 1); stratified, drawn by `split_seed`.
        classes: Only the first so many classes, in the data set's order. Empty: all.
        per_class: Only so many training images of each class, drawn by `split_seed`. Empty: all.
        workers: Processes that decode images, for data not held in memory, as many as there are CPUs at most; 0 decodes
            in the main process.
        split_seed: Seed of the validation split and of the `per_class` subset.
        noise: Share of the training images, in [0, 1), whose labels are drawn anew, uniformly over all classes (Table
            21); the run folder's `label_noise.safetensors` tells which. Validation and test labels stay true.
        noise_exclude_true: Draw each of them from the other classes alone.
        noise_seed: Seed of the draw. Empty: the run's.
    """

    name: str = "cifar100"
    root: str = "data"
    download: bool = False
    image_size: Pixels | None = None
    in_memory: bool | None = None
    augmentation: Augmentation | None = None
    padding: Annotated[int, Range(0, 4096)] = 4
    auto_augment: str | None = None
    color_jitter: NonNegative | None = None
    re_prob: Unit = 0.0
    re_mode: Erasing = "pixel"
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    mixup_prob: Unit = 1.0
    mixup_switch_prob: Unit = 0.5
    test: Share = 0.2
    validation: Share = 0.0
    classes: Count | None = None
    per_class: Count | None = None
    workers: Annotated[int, Range(0, 1024)] = 4
    split_seed: Seed = 0
    noise: Share = 0.0
    noise_exclude_true: bool = False
    noise_seed: Seed | None = None

    def __post_init__(self) -> None:
        check_ranges("data.", self)

    @property
    def mixing(self) -> str:
        """The options that mix images, by name; empty where none does."""
        return " and ".join(f"data.{name}" for name in ("mixup", "cutmix") if getattr(self, name))


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


def load_datasets(config: DataConfig, first: int | None = None) -> DataSets:
    """Reads the data set: whole into memory, or only its list of files.

    ``first``: only so many images of each split, where its names, size and kind are wanted and not the images.
    Raises: InputError for an unknown name, missing or broken files, an impossible subset, image size or augmentation.
    """
    _check(config)
    train: Any  # Arrays or a Source
    test: Any
    if config.name in IN_MEMORY_NAMES:
        train, test, names = _digits() if config.name == "digits" else _cifar(config)
    else:
        train, test = sources(config.name, config.root, config.download)
        names = train.class_names
        if test is train:
            notice(
                f"note: {config.root} has no train and val: {config.test:.0%} of the images of each class are test "
                "images (data.test, data.split_seed)"
            )
    chosen = choose(train.targets, None if test is train else test.targets, names, config)
    size = config.image_size or OWN_SIZE.get(config.name) or _own_size(config, train, int(chosen[0][0]))
    in_memory = config.in_memory
    if in_memory is None:
        fits = size <= SMALL and sum(map(len, chosen)) * 3 * size**2 <= MEMORY_BUDGET
        in_memory = isinstance(train, Arrays) or (fits and config.augmentation != "random_resized_crop")
    augmentation = augmentation_of(config, size)
    mean, std = statistics_of(config.name)
    policy = make_policy(
        config.auto_augment, config.color_jitter, config.re_prob, config.re_mode, size=size, mean=mean, std=std
    )
    if in_memory and augmentation == "random_resized_crop":
        raise InputError(
            "augmentation random_resized_crop needs images that are not held in memory: set data.in_memory to false "
            "(folder, imagenet, torch/<name>), or choose crop_flip, crop or none"
        )

    def take(stored: Any, indices: Tensor) -> Split:
        indices = indices[:first]
        targets = stored.targets[indices]
        if isinstance(stored, Arrays):
            return Arrays(resize(stored.images[indices], size), targets, stored.indices[indices])
        if in_memory:
            resizing = config.image_size is not None or config.name in OWN_SIZE
            return _decode_all(_Sized(stored, size, resizing), indices, size, config.workers)
        return Streamed(stored, targets, indices, *transforms(augmentation, size, config.padding, policy))

    training = take(train, chosen[0])
    if isinstance(training, Arrays) and policy:
        augment, _ = transforms(augmentation, size, config.padding, policy)
        held = Held(training, train.targets, names)
        training = Streamed(held, training.targets, training.indices, augment, pixels)
    elif isinstance(training, Arrays):
        training = replace(training, augmentation=augmentation, padding=config.padding)
    validation = take(train, chosen[1]) if len(chosen[1]) else None
    names = names[: config.classes]
    if config.padding >= size and augmentation in ("crop", "crop_flip"):
        notice(f"note: data.padding {config.padding} at {size} pixels: crops can be black all over")
    return DataSets(training, validation, take(test, chosen[2]), len(names), names, mean, std, size)


def statistics_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a data set's pixels in [0, 1]; ImageNet's where its own are not known."""
    return STATISTICS.get(name.rsplit("/", 1)[-1].lower(), IMAGENET_STATISTICS)


def augmentation_of(config: DataConfig, size: int) -> Augmentation:
    """The augmentation at an image size: the one asked for, else the usual one."""
    small = config.in_memory or config.name in IN_MEMORY_NAMES or size <= SMALL
    usual: Augmentation = "crop_flip" if small else "random_resized_crop"
    return config.augmentation or ("crop" if config.name == "digits" else usual)


def _check(config: DataConfig) -> None:
    if config.name not in NAMES and "/" not in config.name:
        raise unknown("data set", config.name, NAMES)
    if config.augmentation is not None and config.augmentation not in get_args(Augmentation):
        raise unknown("augmentation", config.augmentation, get_args(Augmentation))
    if config.auto_augment is not None:
        auto_augmenter(config.auto_augment, SMALL, IMAGENET_STATISTICS[0])
    if config.name in IN_MEMORY_NAMES and (config.image_size or 0) > 256:
        raise InputError(f"data.image_size {config.image_size}: {config.name} is held in memory, at 256 pixels at most")
    if config.name in IN_MEMORY_NAMES and config.in_memory is False:
        hint = f"; torch/{config.name} streams it" if config.name != "digits" else ""
        raise InputError(f"data set {config.name} is always held in memory: leave data.in_memory out{hint}")


def _own_size(config: DataConfig, source: Source, position: int) -> int:
    """The size of the first image where that is small and square, or must be kept; else ImageNet's 224."""
    width, height = source.image(position).size
    if config.in_memory and width != height:
        raise InputError(
            f"{source.describe(position)} has {width}x{height} pixels: set data.image_size (square images)"
        )
    return width if width == height and (width <= SMALL or config.in_memory) else 224


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
    indices = torch.arange(len(targets))
    test = stratified(targets, lambda count: round(DIGITS_TEST_SHARE * count), seed=0)
    train = indices[~torch.isin(indices, test)]
    names = tuple(str(digit) for digit in digits.target_names)
    return Arrays(images[train], targets[train], train), Arrays(images[test], targets[test], test), names


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


class _Sized:
    """A source whose images all have `size` x `size` pixels: resized, or else refused where they have not."""

    def __init__(self, source: Source, size: int, resizing: bool) -> None:
        self.source, self.size, self.resizing = source, size, resizing
        self.targets, self.class_names, self.describe = source.targets, source.class_names, source.describe
        self.to_size = to_size(size)

    def image(self, position: int) -> Image:
        image = self.source.image(position)
        if image.size == (self.size, self.size):
            return image
        if not self.resizing:
            raise InputError(
                f"{self.describe(position)} has {image.width}x{image.height} pixels, others "
                f"{self.size}x{self.size}: set data.image_size to resize all images"
            )
        return self.to_size(image)


def pixels(image: Image) -> Tensor:
    """RGB -> uint8 [3, H, W] by way of bytes: a fraction of torchvision's time, which counts for small images."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1)


def _decode_all(source: _Sized, indices: Tensor, size: int, workers: int) -> Arrays:
    """Decodes the images at `indices` once."""
    split = Streamed(source, source.targets[indices], indices, pixels, pixels)
    images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
    workers = worth_workers(len(indices), workers)
    with progress_bar(len(indices), "decoding", shown=is_main_process()) as bar:
        loader = StreamLoader(split, CHUNK, train=False, workers=workers)
        for rows, batch in zip(images.split(CHUNK), loader, strict=True):
            rows.copy_(batch["image"])
            bar.update(len(rows))
    return Arrays(images, split.targets, indices)


def worth_workers(images: int, workers: int) -> int:
    """How many processes to decode so many images by, once: ``workers``, or 0 where starting them costs."""
    return workers if images > WORTH_WORKERS else 0


def to_size(size: int) -> Callable[[Any], Any]:
    """Resize the shorter side of an image bilinearly, and take the central square."""
    from torchvision import transforms as T

    return T.Compose([T.Resize(size), T.CenterCrop(size)])


def transforms(
    augmentation: Augmentation, size: int, padding: int, policy: Policy = PLAIN
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """(training, evaluation) transforms from an RGB image to uint8 [3, size, size].

    With random_resized_crop they are the usual ones of ImageNet: 8 to 100 % of the area at an aspect ratio of 3/4 to
    4/3, and flips; evaluation resizes the shorter side to size / 0.875 and takes the centre. Otherwise the shorter side
    is resized to `size` in both. `policy`: what training does besides, after cropping and flipping.
    """
    from torchvision import transforms as T

    resized_crop = augmentation == "random_resized_crop"
    evaluation = T.Compose([T.Resize(round(size / 0.875)), T.CenterCrop(size)]) if resized_crop else to_size(size)
    flip = [T.RandomHorizontalFlip()]
    cropping = {
        "random_resized_crop": [T.RandomResizedCrop(size), *flip],
        "crop_flip": [evaluation, T.RandomCrop(size, padding), *flip],
        "crop": [evaluation, T.RandomCrop(size, padding)],
        "none": [evaluation],
    }[augmentation]
    training = [*cropping, *policy.on_image, T.PILToTensor(), *policy.on_pixels]
    return T.Compose(training), T.Compose([evaluation, T.PILToTensor()])
