"""Where images come from: folders and tar files of images, the random-access sets of timm's factory, or memory.

A source only knows its images, targets and class names; which of them make a split is for `datasets.py`.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from core.errors import InputError, notice
from core.files import how_to_make
from core.images import EXTENSIONS, broken_image, check_file, class_folders, image_files, is_image_name, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

Augmentation = Literal["crop_flip", "crop", "random_resized_crop", "none"]
TRAIN, TEST = ("train",), ("val", "validation", "test")  # what the splits of a folder are called
ITERABLE_PREFIXES = ("hfids", "tfds", "wds")
File = tuple[str, int, int | None]
"""Path, offset and size in bytes of an image; size None means the whole file."""


class Source(Protocol):
    """A split as it is stored: `targets` int64 [N] into `class_names`, and the images by position."""

    targets: Tensor
    class_names: tuple[str, ...]

    def image(self, position: int) -> Image:
        """The image in RGB. Raises InputError, naming the file, if it cannot be read or decoded."""
        ...

    def describe(self, position: int) -> str:
        """What to call the image in a message: its path where there is one."""
        ...


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


class Held:
    """The images of a split in memory, one by one: where more is done to each than a batch of them can have at once."""

    def __init__(self, arrays: Arrays, targets: Tensor, class_names: tuple[str, ...]) -> None:
        self.targets, self.class_names = targets, class_names
        self.images = arrays.images.permute(0, 2, 3, 1).contiguous().numpy()  # [N, H, W, C]
        self.rows = {position: row for row, position in enumerate(arrays.indices.tolist())}

    def image(self, position: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.images[self.rows[position]])

    def describe(self, position: int) -> str:
        return f"image {position} in memory"


class FileSource:
    """Images in files, or in parts of uncompressed tar files.

    Safe in threads and in worker processes: every read opens its file anew.

    Args:
        files: The images of each class.
        class_names: In the order of the targets; a class that `files` lacks stays without images.
    """

    def __init__(self, files: dict[str, list[File]], class_names: tuple[str, ...]) -> None:
        self.files = [file for name in class_names for file in files.get(name, [])]
        counts = torch.tensor([len(files.get(name, [])) for name in class_names])
        self.targets, self.class_names = torch.arange(len(class_names)).repeat_interleave(counts), class_names

    def image(self, position: int) -> Image:
        path, offset, size = self.files[position]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                encoded = file.read(-1 if size is None else size)
        except OSError as error:
            raise InputError(f"cannot read {self.describe(position)}: {error.strerror}") from error
        return open_image(io.BytesIO(encoded), self.describe(position))

    def describe(self, position: int) -> str:
        path, offset, size = self.files[position]
        return path if size is None else f"{path} (image at byte {offset})"


class Images(FileSource):
    """Images without classes.

    Args: the files by name, as ``list_images`` finds them.
    """

    def __init__(self, files: dict[str, File]) -> None:
        super().__init__({"": list(files.values())}, ("",))
        self.names = list(files)

    def describe(self, position: int) -> str:
        path, _, size = self.files[position]
        return path if size is None else os.path.join(path, self.names[position])


class TimmSource:
    """A torchvision set, or one that timm reads from Hugging Face, behind the same members.

    timm's own `ImageDataset` skips a broken image and hands out its neighbour; here it is an error.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.reader = getattr(dataset, "reader", None)
        if self.reader is None:
            targets, classes = dataset.targets, dataset.classes
        else:
            targets = self.reader.dataset[self.reader.label_key]
            classes = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.__getitem__)
        self.targets = torch.as_tensor(list(targets), dtype=torch.int64)
        self.class_names = tuple(label if isinstance(label, str) else ", ".join(label) for label in classes)

    def image(self, position: int) -> Image:
        if self.reader is not None:
            with self.reader[position][0] as file:
                return open_image(file, self.describe(position))
        try:
            return self.dataset[position][0].convert("RGB")
        except Exception as error:  # a damaged image can raise anything
            raise broken_image(self.describe(position), error) from error

    def describe(self, position: int) -> str:
        samples = getattr(self.dataset, "samples", None)
        return str(samples[position][0]) if samples else f"image {position} of {self.name}"


def find_split(root: str, names: Sequence[str], content: str) -> Path:
    """`root/<name>` or `root/<name>.tar` for the first of `names` that exists.

    Raises: InputError where `root` or all of the names are missing.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(
            f"data folder {folder} does not exist: set --data.root to a folder of classes, or with train and val in it"
            f"{how_to_make(folder)}"
        )
    for name in names:
        for path in (folder / name, folder / f"{name}.tar"):
            if path.exists():
                return path
    raise InputError(
        f"no {content} images in {folder}: expected {' or '.join(str(folder / name) for name in names)} "
        f"with a folder for each class{how_to_make(folder)}"
    )


def list_classes(split: Path) -> dict[str, list[File]]:
    """The files of each class of a split, classes and files in sorted order (torchvision's `ImageFolder` order).

    Raises: InputError for no class, a class without images, or a file that is no uncompressed tar.
    """
    files: dict[str, list[File]]
    if split.is_dir():
        files = {
            name: [(os.path.join(split, name, file), 0, None) for file in images]
            for name, images in class_folders(split).items()
        }
    else:
        files = _list_tar(split)
    if not files:
        raise InputError(f"no class folders in {split}: expected {split}/<class>/<image>{EXTENSIONS[0]}")
    for name, images in files.items():
        if not images:
            raise InputError(f"class folder {split / name} holds no image ({', '.join(EXTENSIONS)}): fill or delete it")
    return files


def list_images(place: Path) -> dict[str, File]:
    """All images of a folder and below it, or of an uncompressed tar, by their path in it and sorted; or of one file.

    Raises: InputError where there is no image, or what cannot be read.
    """
    if not place.exists():
        raise InputError(f"there is no {place}: give a folder of images, a .tar of one, or one image")
    if place.is_dir():
        files: dict[str, File] = {name: (os.path.join(place, name), 0, None) for name in image_files(place)}
    elif is_image_name(place.name):
        check_file(place)
        files = {place.name: (str(place), 0, None)}
    else:
        members = sorted(_tar_images(place), key=lambda m: m.name)
        files = {m.name.removeprefix("./"): (str(place), m.offset_data, m.size) for m in members}
    if not files:
        raise InputError(f"no image in {place}: expected files that end in {', '.join(EXTENSIONS)}")
    return files


def _list_tar(split: Path) -> dict[str, list[File]]:
    """The class is the folder directly above the image; images of one class keep the order of their names."""
    files: dict[str, list[File]] = {}
    for member in sorted(_tar_images(split), key=lambda m: (PurePosixPath(m.name).parent.name, m.name)):
        name = PurePosixPath(member.name).parent.name
        files.setdefault(name, []).append((str(split), member.offset_data, member.size))
    return files


def _tar_images(split: Path) -> list[tarfile.TarInfo]:
    """Where the images are in a tar, in its order."""
    check_file(split)
    try:
        with tarfile.open(split, "r:") as tar:
            images = [m for m in tar if m.isfile() and is_image_name(m.name)]
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read {split} as an uncompressed tar file: {error}") from error
    members = [m for m in images if not any(part.startswith(".") for part in PurePosixPath(m.name).parts)]
    if hidden := len(images) - len(members):
        notice(f"{split}: {hidden} hidden image(s), whose names or folders begin with a dot, are left out")
    return members


def sources(name: str, root: str, download: bool = False) -> tuple[Source, Source]:
    """(train, test) of a timm data set name with a prefix, or else of the folder ``root``.

    Test is ``validation`` where a timm set has that, else ``test``; the same source as train where ``folder_sources``
    finds no splits.
    Raises: InputError for an iterable set (see below), or one that timm, torchvision or Hugging Face cannot load.
    """
    if "/" not in name:
        return folder_sources(root)
    prefix = name.partition("/")[0].lower()
    if prefix in ITERABLE_PREFIXES:
        raise InputError(
            f"data set {name}: {prefix}/ sets can only be read in sequence, without sample numbers or exact resuming; "
            "use hfds/<name>, torch/<name> or --data.name folder (folders or train.tar and val.tar)"
        )
    if prefix not in ("torch", "hfds"):
        raise InputError(f"unknown data set {name!r}: a name with a slash begins with torch/ or hfds/")
    train = TimmSource(_create(name, root, ("train",), download), name)
    test = TimmSource(_create(name, root, ("validation", "test"), download), name)
    _check_known(test.class_names, train.class_names, f"the test images of {name} have class", "the training images")
    return train, test


def folder_sources(root: str) -> tuple[FileSource, FileSource]:
    """(train, test) of `root/train` and the first of `root/val`, `root/validation`, `root/test`.

    Where `root` has none of these and holds the classes itself, one and the same source of all images stands for both.
    Raises: InputError for a missing folder, an empty class, or a test class that the training images lack.
    """
    splits = [Path(root, f"{name}{suffix}") for name in (*TRAIN, *TEST) for suffix in ("", ".tar")]
    if Path(root).is_dir() and not any(path.exists() for path in splits) and any(class_folders(root).values()):
        classes = list_classes(Path(root))
        whole = FileSource(classes, tuple(classes))
        return whole, whole
    train_path = find_split(root, TRAIN, "training")
    test_path = find_split(root, TEST, "test")
    train, test = list_classes(train_path), list_classes(test_path)
    _check_known(test, train, f"{test_path} has class", str(train_path))
    if absent := [name for name in train if name not in test]:
        notice(f"{test_path} has no image of {len(absent)} class(es), as {absent[0]}: no score counts them")
    return FileSource(train, tuple(train)), FileSource(test, tuple(train))


def _create(name: str, root: str, splits: Sequence[str], download: bool) -> Any:
    from timm.data import create_dataset

    failure: Exception | None = None
    for split in splits:
        try:
            return create_dataset(name, root=root, split=split, download=download)
        except ImportError as error:
            raise InputError(f"{name} needs a package that is not installed: pip install {error.name}") from error
        # timm asserts, torchvision raises RuntimeError or OSError, Hugging Face ValueError or OSError.
        except (AssertionError, RuntimeError, ValueError, OSError) as error:
            failure = failure or error
    reason = str(failure).strip().split("\n")[0]
    hint = "; --data.download true fetches it" if name.startswith("torch/") and not download else ""
    raise InputError(f"cannot load the {splits[0]} images of {name} from {root}: {reason}{hint}") from failure


def _check_known(test: Collection[str], train: Collection[str], what: str, where: str) -> None:
    foreign = sorted(set(test) - set(train))
    if foreign:
        raise InputError(f"{what} {', '.join(foreign[:3])}{' ...' if foreign[3:] else ''}, which {where} lacks")
