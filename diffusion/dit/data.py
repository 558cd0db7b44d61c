"""Images with labels for DiT: a VAE's latents read from disk as they are needed, or pixels in memory.

A folder of latents is what ``diffusion/tools/encode_latents.py`` writes: ``index.json`` (``LatentIndex``) and shards
``latents-00000.safetensors``, ... of consecutive images. In a shard lie ``moments`` float16 ``[n, 2, 2, C, h, w]``
(image and mirror image; mean and standard deviation, not yet scaled; one piece an image, so that a sample is one read),
``labels`` int64 ``[n]`` and ``checks`` int64 ``[n, 2]``, by which each sample is checked as it is read. A sample is
``(mean + std * noise) * scale``, as in Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from core.errors import InputError
from core.files import how_to_make
from core.images import EXTENSIONS, class_folders
from core.ranges import Count, Positive
from diffusion.data import DataConfig, ImageLoader, Shuffled, in_order, read_files, read_named
from diffusion.files import read_json

INDEX = "index.json"


@dataclass(frozen=True)
class LabelledConfig(DataConfig):
    """Which images, with labels.

    Args:
        name: latents (a folder that encode_latents.py wrote), or pixels: folder (a sub-folder a class, in ``root`` or
            in ``root``/train), cifar10 (torchvision's, training part) or digits (scikit-learn's, 8 x 8, one channel).
        image_size: height and width in pixels. A folder's images of another size are cropped to a square and resized;
            of latents, the size of the images that were encoded, which must be this one if it is given.
        limit: only so many images, spread evenly over the set, as files lie class by class.
        classes: how many classes the set must have; whatever it has unless given.
        latent_scale: the factor on latents that their folder must have; whatever it has unless given.
    """

    name: Literal["latents", "digits", "cifar10", "folder"] = "latents"  # type: ignore[assignment]
    classes: Count | None = None
    latent_scale: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_scale is not None and self.name != "latents":
            raise InputError(f"data.latent_scale {self.latent_scale}: {self.name} has no latents, leave it out")


@dataclass(frozen=True)
class _Labelled:
    """N square images or latents ``[C, H, H]`` of labelled classes."""

    labels: Tensor
    """int64 ``[N]``."""
    class_names: tuple[str, ...]
    channels: int
    size: int
    """Height and width."""
    latent_scale: float | None = None
    """Factor on the latents; None for pixels."""

    @property
    def classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class Pixels(_Labelled):
    """Images in memory, uint8 ``[N, C, H, H]``."""

    pixels: Tensor


@dataclass(frozen=True)
class LatentIndex:
    """What ``index.json`` says of a folder of latents."""

    vae: str
    """Folder or hub name of the VAE."""
    vae_sha256: str
    scale: float
    """Factor on the latents, 0.18215 for Stable Diffusion's VAEs."""
    image_size: int
    """Height and width of the encoded images in pixels."""
    shape: tuple[int, int, int]
    """Of a latent: ``(C, h, w)``."""
    classes: int
    class_names: tuple[str, ...]
    count: int
    """Images in all shards."""
    shard_size: int
    """Images in each shard; the last one has the rest."""
    files_sha256: str
    """Of the images' paths below their folder, in the order of the latents."""

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def read_index(folder: Path) -> LatentIndex:
    """Raises: InputError where there is none, or a broken one."""
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"no {INDEX} in {folder}: give a folder that diffusion/tools/encode_latents.py wrote")
    try:
        said = read_json(file)
        index = LatentIndex(**{**said, "shape": tuple(said["shape"]), "class_names": tuple(said["class_names"])})
        numbers = (*index.shape, index.image_size, index.classes, index.count, index.shard_size)
        whole = len(index.shape) == 3 and all(isinstance(n, int) and n > 0 for n in numbers)
        if not whole or index.classes != len(index.class_names) or not float(index.scale) > 0:
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is broken: bring it back, or encode the images into another folder") from error
    return index


MEND = "delete it and run encode_latents.py again as before, which makes what is missing"


def check_of(index: LatentIndex, row: int, label: int, mirrored: int, moments: Tensor) -> int:
    """The check sum of one sample, float16 ``[2, C, h, w]``: of its values, its label, and what it was made of."""
    made = f"{index.vae_sha256} {index.files_sha256} {index.scale} {row} {label} {mirrored}"
    return zlib.crc32(moments.contiguous().numpy().tobytes(), zlib.crc32(made.encode()))


@dataclass(frozen=True)
class Shard:
    """Consecutive images on disk. ``moments`` are mapped: only what is read of them comes into memory."""

    file: Path
    index: LatentIndex
    first: int
    """The first image's place in the order of all."""
    moments: Tensor
    labels: Tensor
    checks: Tensor | None
    """None in a file of an earlier version."""

    def check(self, within: int, mirrored: int, moments: Tensor) -> None:
        """Raises: InputError where a sample that was read is not the one that was encoded."""
        label = int(self.labels[within])
        if self.checks is not None:
            found = check_of(self.index, self.first + within, label, mirrored, moments)
            if found != self.checks[within, mirrored]:
                raise InputError(f"{self.file} is damaged, or of other latents than {INDEX} says: {MEND}")

    def check_all(self) -> None:
        """``check`` of every sample: reads the whole file."""
        for within in range(len(self.labels)):
            for mirrored in (0, 1):
                self.check(within, mirrored, self.moments[within, mirrored])


def open_shard(folder: Path, index: LatentIndex, shard: int) -> Shard:
    """A shard, of which the first sample was checked.

    Raises: InputError naming a shard that is missing, broken, or not what the index says.
    """
    from safetensors import SafetensorError, safe_open

    file = shard_file(folder, shard)
    try:
        with safe_open(file, framework="pt") as opened:
            moments, labels = opened.get_tensor("moments"), opened.get_tensor("labels").clone()
            names = set(opened.keys())
            checks = opened.get_tensor("checks").clone() if "checks" in names else None
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: run encode_latents.py again as before") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is broken: {MEND}") from error
    count = len(index.rows(shard))
    if len(moments) != count or labels.shape != (count,):
        raise InputError(f"{file} holds {len(moments)} images, {INDEX} says {count}: {MEND}")
    if moments.shape[1:] != (2, 2, *index.shape) or moments.dtype != torch.float16:
        found = f"{moments.dtype} {list(moments.shape[3:])}".removeprefix("torch.")
        raise InputError(f"{file} holds latents {found}, {INDEX} says float16 {list(index.shape)}: {MEND}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < index.classes:
        raise InputError(f"{file} has labels {labels.min()} to {labels.max()} of {index.classes} classes: {MEND}")
    if checks is not None and (checks.shape != (count, 2) or checks.dtype != torch.int64):
        raise InputError(f"{file} is broken: {MEND}")
    opened_shard = Shard(file, index, index.rows(shard).start, moments, labels, checks)
    opened_shard.check(0, 0, moments[0, 0])
    return opened_shard


@dataclass(frozen=True, kw_only=True)
class Latents(_Labelled):
    """Latents on disk; ``rows`` int64 ``[N]``: where in the folder the N images are that are to be used."""

    index: LatentIndex
    shards: tuple[Shard, ...]
    rows: Tensor

    def read(self, positions: Tensor, mirrored: Tensor) -> Tensor:
        """Mean and standard deviation, float16 ``[B, 2, C, h, w]``, of images int64 ``[B]`` or their mirror images.

        Raises: InputError naming a shard that is damaged.
        """
        moments = torch.empty(len(positions), 2, *self.index.shape, dtype=torch.float16)
        for place, row, flipped in zip(moments, self.rows[positions].tolist(), mirrored.tolist(), strict=True):
            shard, within = divmod(row, self.index.shard_size)
            place.copy_(self.shards[shard].moments[within, int(flipped)])
            self.shards[shard].check(within, int(flipped), place)
        return moments


LabelledData = Pixels | Latents


def load_labelled(config: LabelledConfig) -> LabelledData:
    """Reads pixels into memory, or opens latents.

    Raises: InputError for missing or broken files, images that are not square, and latents or classes that are not
        what the config says.
    """
    data: LabelledData = _latents(config) if config.name == "latents" else _pixels(config)
    if config.classes not in (None, data.classes):
        where = config.name if config.name == "digits" else config.root
        raise InputError(f"{where} has {data.classes} classes, --data.classes says {config.classes}")
    return data


def _latents(config: LabelledConfig) -> Latents:
    folder = Path(config.root)
    index = read_index(folder)
    if config.latent_scale is not None and not math.isclose(config.latent_scale, index.scale):
        raise InputError(
            f"the latents in {folder} have scale {index.scale}, --data.latent_scale says {config.latent_scale}"
        )
    if config.image_size not in (None, index.image_size):
        raise InputError(
            f"the latents in {folder} are of images of {index.image_size} x {index.image_size} pixels, "
            f"--data.image_size says {config.image_size}"
        )
    if index.shape[1] != index.shape[2]:
        raise InputError(f"the latents in {folder} are {index.shape[1]} x {index.shape[2]}: DiT takes square ones")
    missing = [n for n in range(index.shards) if not shard_file(folder, n).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {index.shards} shards are missing in {folder}, the first is "
            f"{shard_file(folder, missing[0]).name}: run encode_latents.py again as before, which makes them"
        )
    shards = tuple(open_shard(folder, index, n) for n in range(index.shards))
    rows = spread(index.count, config.limit)
    kept = torch.cat([shard.labels for shard in shards])[rows]
    return Latents(kept, index.class_names, *index.shape[:2], index.scale, index=index, shards=shards, rows=rows)


def _pixels(config: LabelledConfig) -> Pixels:
    if config.name == "folder":
        folder, files, labels, names = class_files(config.root)
        rows = spread(len(files), config.limit)
        pixels = read_files([Path(folder, files[row]) for row in rows.tolist()], config.image_size)
    else:
        pixels, labels, names = read_named(config.name, config.root, config.download)
        rows = spread(len(pixels), config.limit)
        pixels = pixels[rows]
    if pixels.shape[2] != pixels.shape[3]:
        raise InputError(
            f"the images in {config.root} are {pixels.shape[3]} x {pixels.shape[2]} pixels, DiT takes square ones: "
            "give --data.image_size"
        )
    return Pixels(labels[rows], names, *pixels.shape[1:3], pixels=pixels.contiguous())


def spread(count: int, limit: int | None) -> Tensor:
    """At most ``limit`` of ``count`` positions, int64, evenly spaced, ascending."""
    kept = count if limit is None else min(limit, count)
    return torch.arange(kept) * count // kept


class ClassFiles(NamedTuple):
    """Labelled image files, sorted by class and, within one, by path."""

    folder: str
    files: list[str]
    """Paths below ``folder``. Strings: a million of them take seconds and little memory."""
    labels: Tensor
    """int64 ``[N]``."""
    names: tuple[str, ...]
    """Of the classes."""


def class_files(root: str | Path) -> ClassFiles:
    """The images of a folder with a sub-folder a class, or of its sub-folder ``train``, as ImageNet lies.

    Raises: InputError where there is no such folder, or no image in a class.
    """
    folder = str(Path(root))
    if not os.path.isdir(folder):
        mend = f"give one with a sub-folder for each class{how_to_make(folder)}"
        raise InputError(f"image folder {folder} does not exist: {mend}")
    train = os.path.join(folder, "train")
    classes = class_folders(train) if os.path.isdir(train) else {}
    folder, classes = (train, classes) if classes else (folder, class_folders(folder))
    names = tuple(classes)
    if not names:
        raise InputError(f"no class folders in {folder}: expected {folder}/<class>/<image>{EXTENSIONS[0]}")
    files = [[os.path.join(name, file) for file in found] for name, found in classes.items()]
    if [] in files:
        raise InputError(f"no image ({', '.join(EXTENSIONS)}) in the class folder {folder}/{names[files.index([])]}")
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(found) for found in files]))
    return ClassFiles(folder, [file for found in files for file in found], labels, names)


def labelled_loader(data: LabelledData, batch_size: int, **options: Any) -> ImageLoader | LatentLoader:
    """Batches ``{"image": float32 [B, C, H, W], "label": int64 [B]}`` as ``ImageLoader`` or ``LatentLoader`` has them.

    Args: ``options``: of these two. Raises: InputError as ``Shuffled``.
    """
    if isinstance(data, Latents):
        return LatentLoader(data, batch_size, **options)
    return ImageLoader(data.pixels, batch_size, data.labels, **options)


class LatentLoader(Shuffled):
    """Shuffled batches of latents, each drawn anew each time.

    It is ``(mean + std * noise) * scale`` with noise that (seed, epoch, step) alone determine; the next batch is read
    while the device computes. Iterating yields the rest of the current epoch.

    Args: ``device``: where batches end up; the rest as ``Shuffled``. Raises: InputError as ``Shuffled``.
    """

    def __init__(self, data: Latents, batch_size: int, *, device: torch.device | str = "cpu", **order: Any) -> None:
        super().__init__(len(data.labels), batch_size, **order)
        self.data, self.device = data, torch.device(device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order, mirrored = self.drawn()
        labels = self.data.labels[order].to(self.device)

        def read(step: int) -> Tensor:
            return self.data.read(order[self.share(step)], mirrored[self.share(step)])

        steps = range(self.position, len(self))
        with ThreadPoolExecutor(1) as reader:
            for step, moments in zip(steps, in_order(reader, read, steps, 1), strict=True):
                self.position = step + 1
                yield {"image": self._draw(moments, step), "label": labels[self.share(step)]}

    def _draw(self, moments: Tensor, step: int) -> Tensor:
        """float16 ``[B, 2, C, h, w]`` -> float32 ``[B, C, h, w]`` on the device."""
        if self.device.type == "cuda":
            moments = moments.pin_memory()
        mean, std = moments.to(self.device, non_blocking=True).float().unbind(1)
        number = ((self.seed * 1_000_003 + self.epoch) * 1_000_003 + step + 1) % 2**63
        generator = torch.Generator(self.device).manual_seed(number)
        # That of the whole batch, so that it does not depend on the number of processes.
        noise = torch.randn(self.batch_size, *mean.shape[1:], generator=generator, device=self.device)
        return (mean + std * noise[self.rank :: self.world]) * self.data.index.scale
