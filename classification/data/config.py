"""What to train on: one frozen dataclass, read by the command line and by `load_datasets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Augmentation = Literal["crop_flip", "crop", "random_resized_crop", "none"]


@dataclass(frozen=True)
class DataConfig:
    """Data set, image size, augmentation and subsets.

    Args:
        name: cifar10, cifar100, digits (scikit-learn's handwritten digits: no file, no download), imagenet or folder
            (`root/{train,val}/<class>/*.jpg`, or `root/{train,val}.tar`), or a name of timm's data set factory with
            random access: `torch/<name>` (torchvision) or `hfds/<name>` (Hugging Face).
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
        validation: Share of the training images held out for validation, in [0, 1); stratified, drawn by `split_seed`.
        classes: Only the first so many classes, in the data set's order. Empty: all.
        per_class: Only so many training images of each class, drawn by `split_seed`. Empty: all.
        workers: Processes that decode images, for data not held in memory; 0 decodes in the main process.
        split_seed: Seed of the validation split and of the `per_class` subset.
        noise: Share of the training images, in [0, 1), whose labels are drawn anew, uniformly over all classes (Table
            21); the run folder's `label_noise.safetensors` tells which. Validation and test labels stay true.
        noise_exclude_true: Draw each of them from the other classes alone.
        noise_seed: Seed of the draw. Empty: the run's.
    """

    name: str = "cifar100"
    root: str = "data"
    download: bool = False
    image_size: int | None = None
    in_memory: bool | None = None
    augmentation: Augmentation | None = None
    padding: int = 4
    validation: float = 0.0
    classes: int | None = None
    per_class: int | None = None
    workers: int = 4
    split_seed: int = 0
    noise: float = 0.0
    noise_exclude_true: bool = False
    noise_seed: int | None = None
