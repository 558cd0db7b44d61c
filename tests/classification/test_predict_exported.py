"""Exported networks predict what their run predicts, image by image, with their own sizes, values and class names."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, RECIPE, train_whole

from classification.tools import evaluate, predict, train

transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise around a grey of their own, of several sizes, none of which is the networks'."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 20)):
        for label, grey in (("dark", 60), ("light", 180)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (40 + 3 * (number % 4), 44 + 5 * (number % 3), 3)
                pixels = generator.integers(grey - 60, grey + 60, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm student and a teacher of transformers, evaluated on the centre of resized images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "resnet"
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**TINY)).save_pretrained(folder)
    out = tmp_path_factory.mktemp("runs") / "mixed"
    data = ["--data.name", "folder", "--data.root", str(images), "--data.image_size", "32", "--batch_size", "8"]
    data += ["--data.augmentation", "random_resized_crop", "--data.in_memory", "false", "--data.workers", "0"]
    networks = ["--networks.teacher.name", f"transformers/{folder}", "--networks.student.name", "test_resnet"]
    words = ["--config", str(RECIPE), "--method", "dml", "--out", str(out), *data, *networks, "--fit.epochs", "1", *CPU]
    train_whole(train.main, words)
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders ``student`` (timm, ONNX, .pt2), ``inside`` (ONNX that normalises by itself) and ``teacher``."""
    place = tmp_path_factory.mktemp("exports")
    for name, more in (
        ("student", ["--format", "timm,onnx,torch"]),
        ("inside", ["--format", "onnx", "--with-preprocessing"]),
        ("teacher", ["--format", "transformers", "--export_role", "teacher"]),
    ):
        assert evaluate.main([str(run), "--export", str(place / name), "--device", "cpu", *more]) == 0
    return place


@pytest.fixture
def rows(shell: Any, quick: None, images: Path, tmp_path: Path) -> Callable[..., Rows]:
    """The predictions of the test images."""

    def made(*argv: object) -> Rows:
        out = tmp_path / "rows.json"
        words = [str(word) for word in (*argv, images / "val", "--device", "cpu", "--out", out)]
        code, _, err = shell(predict.main, words)
        assert code == 0, err
        return json.loads(out.read_text())

    return made


@pytest.mark.parametrize("what", ["student", "student/model.onnx", "student/model.pt2", "inside", "teacher"])
def test_an_exported_network_predicts_as_its_run_does(what: str, run: Path, exported: Path, rows: Any) -> None:
    role = "teacher" if what == "teacher" else "student"
    expected, found = rows(run, "--role", role), rows(exported / what)
    assert [row["file"] for row in found] == [row["file"] for row in expected]
    assert {row["class"] for row in found} <= {"dark", "light"}
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["class"] == theirs["class"]
        assert theirs["probability"] == pytest.approx(ours["probability"], abs=2e-5)
    values = json.loads((run / "evaluation-last-test.json").read_text())["values"]
    right = [row["class"] == Path(row["file"]).parts[0] for row in found]
    assert 100 * sum(right) / len(right) == pytest.approx(values[f"{role}/top1"], abs=1e-9)


def test_broken_images_are_listed_and_skipped(exported: Path, images: Path, tmp_path: Path, shell: Any) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images / "val", folder)
    (folder / "dark/broken.png").write_text("no image")
    for what in ("student/model.onnx", "teacher"):
        out = tmp_path / "rows.csv"
        words = [str(exported / what), str(folder), "--device", "cpu", "--out", str(out)]
        code, _, err = shell(predict.main, words)
        assert code == 0 and "broken.png" in err and "1 of 41 images cannot be read" in err
        assert len(out.read_text().splitlines()) == 41


def test_a_timm_folder_of_others_numbers_its_classes(tmp_path: Path, rows: Any) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    found = rows(tmp_path / "model")
    assert len(found) == 40 and {row["class"] for row in found} <= {"0", "1", "2"}


def test_what_cannot_be_used_ends_in_one_line(
    exported: Path, images: Path, tmp_path: Path, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = onnx.load(exported / "student/model.onnx")
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    (tmp_path / "broken.pt2").write_text("no program")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"model_type": "t5"}')
    student = exported / "student"
    for argv, words in (
        ([tmp_path / "bare.onnx"], "does not say which images it takes"),
        ([tmp_path / "broken.pt2"], "cannot open"),
        ([tmp_path / "text"], "cannot open"),
        ([tmp_path / "missing.onnx", "--network", "test_resnet"], "there is no"),
        ([student, "--role", "student"], "belong to a run folder"),
        ([student, "--mean", "0", "0", "0"], "says its own"),
        ([student / "model.onnx", "--data.image_size", "32"], "says itself which images it takes"),
    ):
        model, *options = map(str, argv)
        code, _, err = shell(predict.main, [model, str(images / "val"), *options, "--out", str(tmp_path / "out.csv")])
        assert code == 2 and words in err and err.splitlines()[-1].startswith("error: "), (argv, err)
        assert len(err.splitlines()) == 1, err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = shell(predict.main, [str(student / "model.onnx"), str(images / "val")])
    assert code == 2 and "onnxruntime is not installed: pip install -e '.[export]'" in err and err.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()
