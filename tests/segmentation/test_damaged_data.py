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
from PIL import Image
from street import arguments

from core.errors import InputError
from segmentation.config import _read_local
from segmentation.data import check_label_map
from segmentation.distiller import load_weights

LABELS = "gtFine/{}/ulm/ulm_000001_gtFine_labelTrainIds.png"
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
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", SPOILT)
def test_damaged_data_are_named_before_training(
    kind: str, split: str, street: Path, tmp_path: Path, train: Any
) -> None:
    name, spoil, said = SPOILT[kind]
    data = shutil.copytree(street, tmp_path / "data")
    spoil(data / name.format(split))
    code, _, err = train(arguments(data, tmp_path / "out"))
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert said in err and Path(name).name in err
    assert not (tmp_path / "out").exists()


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
