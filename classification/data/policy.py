"""What training does to each image beside cropping and flipping it, by timm's own classes: policies, jitter, erasing.

All of it is drawn from the generators of Python, NumPy and torch, which the loader seeds for each image and view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import InputError, first_line
from core.training.seed import seeded

Erasing = Literal["pixel", "rand", "const"]
EXAMPLES = "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original-mstd0.5 (or v0, v0r, originalr, 3a)"


@dataclass(frozen=True)
class Policy:
    """In this order: what is done to the cropped and flipped RGB image, then to its uint8 pixels ``[3, H, W]``."""

    on_image: Sequence[Callable[[Any], Any]] = ()
    on_pixels: Sequence[Callable[[Tensor], Tensor]] = ()

    def __bool__(self) -> bool:
        return bool(self.on_image or self.on_pixels)


PLAIN = Policy()


def make_policy(
    auto_augment: str | None,
    color_jitter: float | None,
    re_prob: float,
    re_mode: Erasing,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Policy:
    """The policy of these options (see ``DataConfig``) for images of ``size`` pixels.

    ``mean``, ``std``: of the data set's pixels in [0, 1]. Raises: InputError for no policy of timm's.
    """
    on_image: list[Callable[[Any], Any]] = []
    on_pixels: list[Callable[[Tensor], Tensor]] = []
    if auto_augment is not None:
        on_image.append(auto_augmenter(auto_augment, size, mean))
    if color_jitter:
        from torchvision.transforms import ColorJitter

        on_image.append(ColorJitter(*[color_jitter] * 3))
    if re_prob:
        on_pixels.append(Erase(re_prob, re_mode, mean, std))
    return Policy(on_image, on_pixels)


def auto_augmenter(policy: str, size: int, mean: Sequence[float]) -> Callable[[Any], Any]:
    """timm's transform of RGB images by that name, with the settings of its ``transforms_imagenet_train``.

    Raises: InputError for a name that timm does not know, or a part of one that it would overlook.
    """
    from PIL import Image
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    kind, *parts = policy.split("-")
    settings: dict[str, Any] = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
    }
    make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
    if kind == "augmix":
        settings["translate_pct"] = 0.3
    try:
        for part in parts:
            named = kind == "rand" and part.startswith("t")  # a set of operations
            if not re.fullmatch(r"t(weights|3aw?)" if named else r"[a-z]+\d{1,3}(\.\d+)?", part):
                raise ValueError(f"what is {part!r}?")
        transform: Any = make(policy, settings)
        for op in getattr(transform, "ops", None) or chain(*transform.policy):
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
        with seeded(0):
            transform(Image.new("RGB", (8, 8)))  # some of what cannot be shows at the first image
    except (AssertionError, ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"data.auto_augment {policy!r} is no policy of timm's ({first_line(error)}): give one as {EXAMPLES}"
        ) from error
    return transform


def posterize(image: Any, bits_to_keep: int, **settings: Any) -> Any:
    """timm's, which asks for 0 bits at magnitude 10: a black image, and an error of Pillow from 13 on."""
    from PIL import Image
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **settings)


class Erase:
    """timm's ``RandomErasing`` of raw pixels: a rectangle of 2 to 33 % of the image, with that probability.

    timm's is for normalised images, where 0 is the mean colour and noise has deviation 1. So the pixels are normalised
    by the data set's mean and std for it, and brought back to 0 .. 255, at which noise is clipped: every network then
    sees the same image, whatever it is normalised by. Pixels outside of the rectangle stay exactly what they were.
    """

    def __init__(self, probability: float, mode: Erasing, mean: Sequence[float], std: Sequence[float]) -> None:
        from timm.data.random_erasing import RandomErasing

        self.erasing = RandomErasing(probability, mode=mode, device="cpu")
        self.mean, self.std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[3, H, W]`` -> the same."""
        erased = self.erasing((pixels - self.mean) / self.std)
        return (erased * self.std + self.mean).round_().clamp_(0, 255).byte()
