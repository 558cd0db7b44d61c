"""Images for dense prediction: an order and an augmentation that neither workers nor an interruption change."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info
from mmseg.datasets.transforms import PhotoMetricDistortion
from mmseg.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from torch.utils.data import Dataset, Sampler

from core.errors import InputError, first_line, notice
from core.images import EXTENSIONS, read_header
from core.training.seed import seeded

LOOKED_AT = 16
"""Label maps of a data set that are read before a training; all are looked at when they are trained with."""
Draw = tuple[int, int]  # index of the image, number of the draw over all processes


@DATA_SAMPLERS.register_module()
class NumberedSampler(Sampler[Draw]):
    """Endless, shuffled anew for each pass; every process takes its share of one common order.

    It yields each image's index with the number of the draw, from which ``NumberedDataset`` takes the augmentation.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.size, self.seed = len(dataset), seed
        self.rank, self.processes = get_dist_info()
        self.skipped = 0

    def skip(self, num_samples: int) -> None:
        """Goes to an absolute position of this process (mmengine calls it before a resumed run's first batch)."""
        self.skipped = num_samples

    def __iter__(self) -> Iterator[Draw]:
        shuffled: int | None = None
        for number in itertools.count(self.rank + self.skipped * self.processes, self.processes):
            epoch, position = divmod(number, self.size)
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size)
            yield int(order[position]), number

    def __len__(self) -> int:
        return self.size


@DATASETS.register_module()
class NumberedDataset(Dataset):
    """Another data set, its augmentation drawn from (seed, number of the draw) and its labels checked.

    With plain indices (validation) nothing is seeded.

    Args: the data set or its config; the seed.
    """

    def __init__(self, dataset: Mapping[str, Any] | BaseDataset, seed: int = 0) -> None:
        self.dataset: Any = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        self.seed = seed

    @property
    def metainfo(self) -> dict[str, Any]:
        return self.dataset.metainfo

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """``inputs`` uint8 ``[3 or 6, H, W]`` and ``data_samples``.

        Raises: InputError naming a file that cannot be decoded, or its wrong label.
        """
        index, number = draw if isinstance(draw, tuple) else (draw, None)
        try:
            with nullcontext() if number is None else seeded(zlib.crc32(repr((self.seed, number)).encode())):
                sample = self.dataset[index]
        except Exception as error:  # what OpenCV, Pillow and the transforms raise for a damaged file
            files = self.dataset.get_data_info(index)
            raise InputError(
                f"cannot read {files['img_path']} with its labels {files.get('seg_map_path')}: {first_line(error)}"
            ) from error
        check_labels(sample["data_samples"], len(self.metainfo["classes"]), self.dataset.ignore_index)
        return sample


def check_listing(dataset: Any, images: Path, files: Sequence[Path], there: Sequence[Path]) -> None:
    """Says which label maps have no image. Raises: InputError for images in a hidden folder.

    ``files``: the label map of each image of the data set; ``there``: all that are there.
    """
    for i in range(len(dataset)):
        file = Path(dataset.get_data_info(i)["img_path"])
        if any(part.startswith(".") for part in file.relative_to(images).parts):
            raise InputError(f"{file} would be taken for an image, though it is in a hidden folder: delete that")
    alone = sorted({file for file in there if file.name.endswith(dataset.seg_map_suffix)} - set(files))
    if alone and not dataset.ann_file and dataset._indices is None:
        notice(f"{len(alone)} label map(s) have no image and are left out, as {alone[0]}")


def check_truth(truth: NumberedDataset, folder: Path) -> None:
    """Reads 16 of the label maps, evenly, and the others where none of these has a labelled pixel.

    Raises: InputError for one that cannot be read or holds a wrong label, and where nothing is labelled at all.
    """
    some = sorted({i * len(truth) // LOOKED_AT for i in range(LOOKED_AT)})
    labelled = [_has_labels(truth, i) for i in some]
    if not any(labelled) and not any(_has_labels(truth, i) for i in range(len(truth)) if i not in some):
        raise InputError(f"no pixel of the label maps in {folder} has a label: is everything marked as ignored?")


def _has_labels(truth: NumberedDataset, index: int) -> bool:
    return bool((truth[index]["data_samples"].gt_sem_seg.data != truth.dataset.ignore_index).any())


def check_label_map(image: Path, labels: Path) -> None:
    """A cheap look at the headers. Raises: InputError where a file is no image, or the labels are no map of it."""
    if labels.suffix.lower() not in EXTENSIONS or image.suffix.lower() not in EXTENSIONS:
        return
    (_, size), (mode, own) = read_header(image), read_header(labels)
    if mode not in ("L", "P", "1"):
        raise InputError(
            f"the label map {labels} is {mode}: it must have one channel of 8 bits, the class of each pixel"
        )
    if own != size:
        raise InputError(
            f"the label map {labels} is {own[0]} x {own[1]} pixels, its image {image} {size[0]} x {size[1]}: both must "
            "be of one size"
        )


def check_labels(sample: Any, classes: int, ignore: int) -> None:
    """Raises: InputError for a label that is neither a class nor the ignored one; it would be learnt as anything."""
    if "gt_sem_seg" not in sample:
        return
    labels = sample.gt_sem_seg.data
    wrong = labels[(labels >= classes) & (labels != ignore)]
    if len(wrong):
        raise InputError(
            f"{sample.seg_map_path} holds label {int(wrong[0])}, but there are {classes} classes (0 to {classes - 1}, "
            f"{ignore} is ignored): Cityscapes needs its labelTrainIds, other data their own number of classes"
        )


@TRANSFORMS.register_module()
class PhotoMetricDistortionPerNetwork(PhotoMetricDistortion):
    """Two distortions of one crop, ``[H, W, 3] -> [H, W, 6]``: the teacher's view first (KDCL)."""

    def transform(self, results: dict) -> dict:
        image = results["img"]
        views = [super(PhotoMetricDistortionPerNetwork, self).transform({"img": image})["img"] for _ in range(2)]
        results["img"] = np.concatenate(views, axis=2)
        return results
