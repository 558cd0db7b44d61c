"""ImageNet's path from the recipe on: JPEG files of all sizes, timm's networks, crops by worker processes, bf16."""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, ROOT, assert_same_runs, metrics, stop_at, train_whole

from classification.config import parse_command
from classification.data import DataConfig, Streamed, StreamLoader, load_datasets, make_loader
from classification.experiment import build
from classification.tools.train import main
from core.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("quick")
Command = Callable[[list[str]], tuple[int, str, str]]
RECIPE = ROOT / "classification/recipes/imagenet.yaml"
CLASSES = ("china_left", "china_right", "flower_left", "flower_right")
TRAIN, TEST = 8, 4  # images of a class


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root/{train,val}/<class>/NN.JPEG`: crops of 96 to 160 pixels a side from both halves of two photographs."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    halves = [half for photograph in load_sample_images().images for half in np.array_split(photograph, 2, axis=1)]
    for name, pixels in zip(CLASSES, halves, strict=True):
        for split, number in (("train", TRAIN), ("val", TEST)):
            place = root / split / name
            place.mkdir(parents=True)
            for k in range(number):
                height, width = random.integers(96, 161, size=2)
                top, left = random.integers(pixels.shape[0] - height), random.integers(pixels.shape[1] - width)
                crop = Image.fromarray(pixels[top : top + height, left : left + width])
                crop.save(place / f"{k:02d}.JPEG", quality=90)
    return root


@pytest.fixture(scope="module")
def archive(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as `root/{train,val}.tar`."""
    root = tmp_path_factory.mktemp("archive")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=split)
    return root


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    """Two epochs of 4 steps of 2 x 4 images at 64 pixels; 512 and 1280 channels at 2 x 2 locations."""
    data = ["--data.root", str(root), "--data.image_size", "64", "--data.augmentation", "random_resized_crop"]
    networks = ["--networks.teacher.name", "resnet10t", "--networks.student.name", "mobilenetv2_050"]
    batch = ["--batch_size", "8", "--fit.accumulate", "2", "--optimizer.lr", "0.02"]
    fit = ["--fit.epochs", "2", "--fit.log_every", "3", *CPU]
    return [
        "--config", str(RECIPE), "--method", "dml+adm", "--out", str(out), *data, "--data.workers", "0", *networks,
        *batch, *fit, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in float32 on the folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_whole(main, arguments(folder, out, "--fit.precision", "fp32"))
    return out


def assert_finite(run: Path) -> None:
    values = [value for line in metrics(run) for value in line.values() if not isinstance(value, str)]
    assert values and all(value is not None and math.isfinite(value) for value in values)


def test_the_recipe_names_networks_of_these_sizes() -> None:
    import timm

    named = re.findall(r"(\w+) \(([\d.]+) M\)", RECIPE.read_text())
    assert {name for name, _ in named} == {
        "resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv1_100", "mobilenetv2_050"
    }  # fmt: skip
    for name, millions in named:
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=1000)
        assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}" == millions, name


def test_images_are_read_as_imagenets(folder: Path) -> None:
    experiment = build(parse_command(arguments(folder, folder / "run", "--data.workers", "2")))
    data = experiment.datasets
    assert isinstance(data.train, Streamed) and data.class_names == CLASSES
    assert (len(data.train), len(data.test), data.image_size) == (4 * TRAIN, 4 * TEST, 64)
    assert {data.train.source.image(k).size for k in range(3)} != {(64, 64)}
    loader = experiment.train_loader(None)
    batches = list(loader)
    assert isinstance(loader, StreamLoader) and [b["image"].shape for b in batches] == [(8, 3, 64, 64)] * 4
    again = list(experiment.train_loader(None))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, again, strict=True))
    first, second = (dict(zip(b["index"].tolist(), b["image"], strict=True)) for b in (batches[0], next(iter(loader))))
    assert not any(torch.equal(first[k], second[k]) for k in first.keys() & second.keys())  # another crop each epoch
    assert experiment.distiller.normalisation["student"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    views = experiment.distiller.views(batches[0]["image"])
    for role, network in experiment.distiller.networks.items():
        kernels = [p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        for tensor in (views[role], *kernels):
            assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_a_run_from_tar_files_stopped_and_resumed_equals_one_from_folders(
    whole: Path, archive: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(archive, tmp_path / "run", "--fit.precision", "fp32")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # within an epoch, with images decoded ahead
        code, _, said = command([*argv, "--data.workers", "2"])
    assert code == 130 and "interrupted at step 3 of 8" in said
    code, _, said = command(argv)
    assert code == 0 and "resuming from step 3" in said
    assert_same_runs(whole, tmp_path / "run")
    assert [line["step"] for line in metrics(whole) if line["kind"] == "evaluation"] == [4, 8]  # every epoch
    assert_finite(whole)


def test_what_the_run_on_folders_leaves(whole: Path) -> None:
    weights, state = read_checkpoint(whole / "checkpoints/last")
    assert weights["student"]["classifier.weight"].shape == (4, 1280)
    assert weights["teacher"]["fc.weight"].shape == (4, 512)
    assert state["extra"]["adm.adm.student:teacher.adapter.conv.weight"].shape == (512, 1280, 1, 1)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["networks"]["student"]["name"] == "mobilenetv2_050" and summary["selected_on"] == "test"
    line = metrics(whole)[0]
    assert {"student/consensus", "student/phi", "student/feature", "teacher/divergence"} <= line.keys()


def test_the_recipes_bf16_trains_equal_channels(folder: Path, tmp_path: Path, command: Command) -> None:
    networks = ["--networks.teacher.name", "resnet18", "--networks.student.name", "resnet10t"]
    argv = arguments(folder, tmp_path / "run", *networks, "--fit.steps", "2", "--fit.evaluate_every", "1")
    assert parse_command(argv).config.fit.precision == "bf16"
    code, _, said = command(argv)
    assert code == 0, said
    assert_finite(tmp_path / "run")
    weights, state = read_checkpoint(tmp_path / "run/checkpoints/last")
    assert {tensor.dtype for network in weights.values() for tensor in network.values()} == {
        torch.float32, torch.int64
    }  # fmt: skip
    assert "student/phi" not in metrics(tmp_path / "run")[0] and not any("adapter" in key for key in state["extra"])
    before = build(parse_command(argv)).distiller.networks["student"].state_dict()
    assert not torch.equal(before["fc.weight"], weights["student"]["fc.weight"])


def test_hugging_face_sets_equal_folders(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs Hugging Face's datasets, which is not among the extras")
    root = tmp_path / "cache"
    streams = []
    for name, where in (("imagenet", folder), (f"hfds/{folder}", root)):
        config = DataConfig(
            name=name, root=str(where), image_size=64, in_memory=False, augmentation="random_resized_crop"
        )
        data = load_datasets(config)
        assert data.class_names == CLASSES and (len(data.train), len(data.test)) == (4 * TRAIN, 4 * TEST)
        streams.append([*make_loader(data.train, 8, train=True), *make_loader(data.test, 8, train=False)])
    for a, b in zip(*streams, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])


@pytest.mark.slow
def test_a_compiled_run_learns_what_the_plain_one_does(folder: Path, tmp_path: Path, command: Command) -> None:
    networks = ["--networks.student.name", "resnet10t"]  # with few layers, or it compiles for minutes
    more = [*networks, "--fit.precision", "fp32", "--fit.steps", "2", "--fit.log_every", "1"]
    logged: dict[str, list[dict[str, Any]]] = {}
    for compiled in ("false", "true"):
        out = tmp_path / compiled
        code, _, said = command(arguments(folder, out, *more, "--fit.compile", compiled))
        assert code == 0, said
        logged[compiled] = [line for line in metrics(out) if line["kind"] == "train"]
    assert [line["step"] for line in logged["true"]] == [1, 2]
    for plain, compiled_line in zip(logged["false"], logged["true"], strict=True):
        assert plain.keys() == compiled_line.keys() >= {"teacher/divergence", "student/consensus", "student/feature"}
        for name, value in plain.items():
            if "/" in name:
                assert compiled_line[name] == pytest.approx(value, rel=5e-3), name


@pytest.mark.slow
def test_networks_learn_to_tell_photographs_apart(folder: Path, tmp_path: Path, command: Command) -> None:
    """At a rate for 32 images: over epochs 7 to 12 both networks stay well below a guess's cross-entropy."""
    more = ["--networks.student.name", "resnet10t", "--fit.precision", "fp32", "--fit.accumulate", "1"]
    duration = ["--fit.epochs", "12", "--fit.log_every", "24", "--fit.evaluate_every", "48"]
    argv = arguments(folder, tmp_path / "run", *more, *duration, "--optimizer.lr", "0.003")
    assert command(argv)[0] == 0
    last = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"][-1]
    assert last["step"] == 48 and max(last["teacher/ce"], last["student/ce"]) < 0.8 * math.log(4)
