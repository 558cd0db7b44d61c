"""The folder that transformers opens: the model, its class names, and what its processor does to an image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import CPU, RECIPE, train_whole

from classification.experiment import command_of, images_at, restore
from classification.tools import evaluate, train
from core.training.checkpoint import find_checkpoint

transformers = pytest.importorskip("transformers")
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DML of a student of transformers and a CIFAR teacher, an epoch of three digits at 32 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "resnet"
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**TINY)).save_pretrained(folder)
    out = tmp_path_factory.mktemp("runs") / "mixed"
    data = ["--data.classes", "3", "--data.per_class", "16", "--data.image_size", "32", "--batch_size", "24"]
    networks = ["--networks.teacher.name", "cifar_resnet8", "--networks.student.name", f"transformers/{folder}"]
    words = ["--config", str(RECIPE), "--method", "dml", "--out", str(out), *data, *networks, "--fit.epochs", "1", *CPU]
    train_whole(train.main, words)
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "student"
    argv = ["--export", str(folder), "--format", "transformers,torch", "--device", "cpu"]
    assert evaluate.main([str(run), *argv]) == 0
    return folder


def test_model_and_processor_say_of_an_image_file_what_the_run_says(run: Path, exported: Path) -> None:
    experiment = restore(command_of(run), find_checkpoint(run, "last"))
    images = images_at(experiment.split("test"), 5)
    expected = experiment.distiller.eval().outputs(images)["student"].logits
    model = transformers.AutoModelForImageClassification.from_pretrained(exported).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"} and model.config.label2id == {"0": 0, "1": 1, "2": 2}
    wide = Image.fromarray(np.zeros((64, 96, 3), dtype=np.uint8))  # to the shorter side, and the centre of it
    assert processor(wide, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert str(run.parent) not in "".join(file.read_text() for file in exported.glob("*.json"))
    best = transformers.pipeline("image-classification", str(exported))(pictures[0])[0]
    assert best["label"] == str(int(expected[0].argmax()))


def test_the_card_names_the_library(exported: Path) -> None:
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "model.pt2", "README.md"}
    assert {file.name for file in exported.iterdir()} == names
    _, header, text = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers" and "from transformers import pipeline" in text


def test_what_it_cannot_be_ends_in_one_line(
    run: Path, shell: Any, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*more: str) -> str:
        argv = [str(run), "--export", str(tmp_path / "new"), "--out", str(tmp_path / "x.json"), *more]
        code, _, err = shell(evaluate.main, argv)
        assert code == 2 and err.count("\n") == 1, err
        return err

    said = refused("--format", "transformers", "--export_role", "teacher")
    assert "cifar_resnet8, which transformers does not know: give --format onnx,torch\n" in said
    assert "which timm does not know: give --format onnx,torch,transformers\n" in refused("--format", "timm,torch")
    assert "counts for onnx and torch" in refused("--format", "transformers", "--with-preprocessing")
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = find_checkpoint(run, "last") / "teacher.safetensors"
    data = ["--data.name", "digits", "--data.image_size", "32", "--data.classes", "3"]
    argv = ["--weights", str(file), *data, "--export", str(tmp_path / "new"), "--format", "transformers"]
    assert "give --format onnx,torch" in shell(evaluate.main, argv)[2]
    assert not list(tmp_path.iterdir())
