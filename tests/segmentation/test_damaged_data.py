"""Label maps, images and backbones' weights that are damaged: one line with the file's name, before the training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import untouched
from mmseg.registry import DATASETS
from PIL import Image
from runs import lines, read, train_whole
from street import DEEPLAB, TINY, arguments, make_street

from core.errors import InputError
from segmentation.config import _read_local
from segmentation.data import check_label_map
from segmentation.distiller import load_weights
from segmentation.tools.evaluate import main as evaluate
from segmentation.tools.visualize import main as visualize

LABELS = "gtFine/{}/ulm/ulm_000001_gtFine_labelTrainIds.png"
TWO = ("train_cfg.max_iters=2", "train_cfg.val_interval=2")
PICTURE = "leftImg8bit/{}/ulm/ulm_000001_leftImg8bit.png"


def cut(kept: float) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])


def written(array: np.ndarray) -> Callable[[Path], object]:
    return lambda file: Image.fromarray(array).save(file)


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(file: Path) -> None:
        file.unlink()
        make(file)

    return replace


SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty labels": (LABELS, cut(0), "cannot decode"),
    "labels cut in two": (LABELS, cut(0.5), "cannot decode"),
    "labels without their end": (LABELS, cut(0.9), "cannot decode"),
    "labels of zeros": (LABELS, lambda file: file.write_bytes(bytes(500)), "cannot decode"),
    "labels that are text": (LABELS, lambda file: file.write_text("labels"), "cannot decode"),
    "RGB labels": (LABELS, written(np.zeros((48, 64, 3), np.uint8)), "is RGB: it must have one channel"),
    "RGBA labels": (LABELS, written(np.zeros((48, 64, 4), np.uint8)), "is RGBA"),
    "16-bit labels": (LABELS, written(np.zeros((48, 64), np.uint16)), "is I;16"),
    "smaller labels": (LABELS, written(np.zeros((24, 32), np.uint8)), "is 32 x 24 pixels, its image"),
    "turned labels": (LABELS, written(np.zeros((64, 48), np.uint8)), "is 48 x 64 pixels, its image"),
    "a pipe for labels": (LABELS, instead(os.mkfifo), "no regular file"),
    "a folder for labels": (LABELS, instead(Path.mkdir), "no regular file"),
    "no labels": (LABELS, Path.unlink, "no label map"),
    "an empty image": (PICTURE, cut(0), "cannot decode"),
    "an image cut in two": (PICTURE, cut(0.5), "cannot decode"),
    "an image that is text": (PICTURE, lambda file: file.write_text("image"), "cannot decode"),
    "a pipe for an image": (PICTURE, instead(os.mkfifo), "no regular file"),
    "a link to nothing": (PICTURE, instead(lambda file: file.symlink_to("nowhere.png")), "leads nowhere"),
    "a link to itself": (PICTURE, instead(lambda file: file.symlink_to(file.name)), "leads nowhere"),
    "wrong labels": (LABELS, written(np.full((48, 64), 33, np.uint8)), "holds label 33, but there are 19 classes"),
}
WHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "all labels of a set ignored": (
        lambda data: [written(np.full((48, 64), 255, np.uint8))(file) for file in data.rglob("val/ulm/*TrainIds.png")],
        "gtFine/val has a label: is everything marked as ignored?",
    ),
    "a folder in a circle": (
        lambda data: (data / "leftImg8bit/val/ulm/again").symlink_to(data / "leftImg8bit/val"),
        "a circle; delete it",
    ),
    "labels in a circle": (
        lambda data: (data / "gtFine/val/ulm/again").symlink_to(data / "gtFine"),
        "a circle; delete it",
    ),
    "images in a hidden folder": (
        lambda data: shutil.copytree(data / "leftImg8bit/val/ulm", data / "leftImg8bit/val/.old"),
        "hidden folder",
    ),
}


@pytest.fixture(scope="module")
def run(street: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations."""
    from segmentation.tools.train import main

    out = tmp_path_factory.mktemp("run") / "run"
    train_whole(main, arguments(street, out, *TWO))
    return out


def refused(result: tuple[int, str, str], *said: str) -> None:
    code, _, err = result
    assert code == 2 and len(errors := [line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    assert "Traceback" not in err and err.strip().endswith(errors[0]), err
    assert all(part in errors[0] for part in said), err


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", SPOILT)
def test_damaged_data_are_named_before_training(
    kind: str, split: str, street: Path, tmp_path: Path, train: Any
) -> None:
    name, spoil, said = SPOILT[kind]
    data = shutil.copytree(street, tmp_path / "data")
    spoil(data / name.format(split))
    refused(train(arguments(data, tmp_path / "out")), said, Path(name).name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [*SPOILT, *WHOLE])
def test_damaged_data_are_named_by_evaluation_and_figure(
    kind: str, street: Path, run: Path, tmp_path: Path, shell: Any, train: Any
) -> None:
    data = shutil.copytree(street, tmp_path / "data")
    if kind in WHOLE:
        spoil, *said = WHOLE[kind]
        spoil(data)
        refused(train(arguments(data, tmp_path / "out")), *said)
        assert not (tmp_path / "out").exists()
    else:
        name, spoil, what = SPOILT[kind]
        spoil(data / name.format("val"))
        said = [what, Path(name).name]
    with untouched(run, "figures"):
        refused(shell(evaluate, [str(run), "--data-root", str(data)]), *said)
        refused(shell(visualize, [str(run), "--data-root", str(data), "--images", "4"]), *said)


def trained(data: Path, run: Path, train: Any, *options: str) -> str:
    """What a run of two iterations says, which must end well and without a NaN."""
    code, _, err = train(arguments(data, run, *TWO, *options))
    assert code == 0, err
    for file in ("summary.json", "metrics.jsonl"):
        assert not {"NaN", "null,"} & set((run / file).read_text().split()), file
    assert all(value is not None for line in lines(run) for value in line.values())
    return err


@pytest.mark.parametrize("normalise", ["all", "valid"])
def test_batches_without_a_label_teach_nothing_and_break_nothing(
    street: Path, tmp_path: Path, train: Any, normalise: str
) -> None:
    data = shutil.copytree(street, tmp_path / "data")
    for file in sorted((data / "gtFine/train/ulm").iterdir())[:-1]:
        written(np.full((48, 64), 255, np.uint8))(file)
    trained(data, tmp_path / "run", train, f"model.normalise={normalise}")


def test_one_image_in_all_is_enough(tmp_path: Path, train: Any, shell: Any) -> None:
    data = make_street(tmp_path / "data", train=1, val=1)
    trained(data, tmp_path / "run", train)
    assert shell(evaluate, [str(tmp_path / "run")])[0] == 0
    assert shell(visualize, [str(tmp_path / "run"), "--images", "3"])[0] == 0


def test_a_class_without_a_pixel_is_left_out_and_said(
    street: Path, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.errors._notices", [])
    said = trained(street, tmp_path / "run", train)
    (line,) = [line for line in said.splitlines() if "no evaluated pixel is labelled" in line]
    assert "bicycle" in line and "mIoU is the mean over the other" in line
    last = read(tmp_path / "run/summary.json")["last"]
    ious = [value for name, value in last.items() if name.startswith("student/IoU.")]
    assert "student/IoU.bicycle" not in last and f"the other {len(ious)} classes" in line
    assert last["student/mIoU"] == pytest.approx(sum(ious) / len(ious))


def test_what_is_no_image_is_left_out(
    street: Path, run: Path, tmp_path: Path, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden files, other files and folders with an image's name change nothing; a label map alone is said."""
    monkeypatch.setattr("core.errors._notices", [])
    data = shutil.copytree(street, tmp_path / "data")
    images, labels = data / "leftImg8bit/val/ulm", data / "gtFine/val/ulm"
    (images / "._ulm_000001_leftImg8bit.png").write_bytes(b"Mac OS X")
    (images / ".DS_Store").write_bytes(b"")
    (images / "notes.txt").write_text("a street")
    (images / "ulm_9_leftImg8bit.png").mkdir()
    shutil.copy(labels / "ulm_000001_gtFine_labelTrainIds.png", labels / "ulm_000009_gtFine_labelTrainIds.png")
    reports = []
    for root in (street, data):
        code, _, err = shell(evaluate, [str(run), "--data-root", str(root), "--out", str(tmp_path / "report.json")])
        assert code == 0, err
        reports.append(read(tmp_path / "report.json"))
    assert reports[0]["values"] == reports[1]["values"] and reports[1]["images"] == 4
    assert "1 label map(s) have no image and are left out, as " in err and "ulm_000009_gtFine_labelTrainIds" in err
    assert "1 hidden file(s)" in err


def test_an_exif_orientation_turns_neither_image_nor_labels(street: Path, tmp_path: Path) -> None:
    from segmentation.config import complete, load_config, parse_options

    data, pictures = shutil.copytree(street, tmp_path / "data"), []
    file = data / "leftImg8bit/val/ulm/ulm_000000_leftImg8bit.png"
    picture = Image.open(file)
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(file, "JPEG", exif=exif)
        cfg = load_config(DEEPLAB, parse_options([*TINY, f"data_root={data}"]))
        dataset = DATASETS.build(complete(cfg, 1, "cpu").val_dataloader.dataset)
        pictures.append(dataset[0]["inputs"])
    assert pictures[0].shape == (3, 48, 64) and torch.equal(*pictures)


def test_an_image_that_breaks_only_when_it_is_decoded_is_named(street: Path, tmp_path: Path, train: Any) -> None:
    data = shutil.copytree(street, tmp_path / "data")
    for file in (data / "leftImg8bit/train/ulm").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] + bytes(100) + b"IEND" + bytes(4))
    code, _, err = train(arguments(data, tmp_path / "out"))
    assert code == 2 and "cannot read" in err and "_leftImg8bit.png" in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_maps_of_one_channel_pass(mode: str, tmp_path: Path) -> None:
    for name, kind in (("image.png", "RGB"), ("labels.png", mode)):
        Image.new(kind, (8, 6)).save(tmp_path / name)
    check_label_map(tmp_path / "image.png", tmp_path / "labels.png")


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_backbones_file_is_read_as_data(tmp_path: Path) -> None:
    from mmengine.runner import CheckpointLoader

    mark, file = tmp_path / "ran", tmp_path / "backbone.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Runs(mark)}, file)
    with pytest.raises(InputError, match="could run code"):
        CheckpointLoader.load_checkpoint(str(file), map_location="cpu", logger="silent")
    assert not mark.exists()
    torch.save({"model": {"module.a": torch.ones(1)}}, file)
    assert _read_local(str(file))["state_dict"].keys() == {"a"}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_mmengines_training_checkpoint_is_a_teacher(prefix: str, tmp_path: Path) -> None:
    from mmengine.logging import HistoryBuffer

    network, other = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)
    state = {f"{prefix}teacher.{key}": tensor for key, tensor in other.state_dict().items()}
    hub = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}, "runtime_info": {"iter": np.int64(3)}}
    torch.save({"meta": {"iter": 3}, "message_hub": hub, "state_dict": state}, tmp_path / "iter_3.pth")
    load_weights(network, tmp_path / "iter_3.pth", "teacher")
    assert torch.equal(network.weight, other.weight)


def test_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    network = torch.nn.Conv2d(1, 1, 1)
    torch.save({"weight": torch.full((1, 1, 1, 1), torch.nan), "bias": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: the weight weight is not finite"):
        load_weights(network, tmp_path / "a.pth", "teacher")
    load_weights(network, tmp_path / "a.pth", "teacher", training=False)
    assert "not finite" in capsys.readouterr().err
