"""A folder of images: looked at before training, and the recipes that train on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, read

from classification.tools import look, train
from offline_kd.tools import train as offline

RECIPES = ROOT / "classification/recipes/own_data.yaml", ROOT / "offline_kd/recipes/own_data.yaml"


def photos(root: Path, size: int, counts: dict[str, int]) -> Path:
    """So many images of each class to train on, and 4 to evaluate on; each class has a grey of its own."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for place, (label, count) in enumerate(counts.items()):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count if split == "train" else 4):
                shape, grey = (size, size + 2 * (number % 2), 3), 60 + 120 * place
                pixels = generator.integers(grey - 40, grey + 40, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_a_folder_is_looked_at(tmp_path: Path, shell: Any) -> None:
    root, out = photos(tmp_path / "photos", 20, {"dark": 60, "light": 10}), tmp_path / "look.png"
    options = ["--data.image_size", "16", "--data.validation", "0.1", "--out", str(out)]
    code, said, err = shell(look.main, [str(root), *options])
    assert code == 0, err
    assert "78 images, none broken: 20 x 20 to 22 x 20 pixels (width x height), 39 of them square" in said
    counts = {line.split()[0]: [int(n) for n in re.findall(r"\d+", line)] for line in said.splitlines()[2:4]}
    assert counts == {"dark": [54, 6, 4], "light": [9, 1, 4]}
    assert "classes are uneven: light has 9 training images, dark 54" in said
    with Image.open(out) as drawn:
        grey = np.asarray(drawn.convert("L"))
    assert min(drawn.size) > 300 and (np.abs(grey - 60.0) < 40).mean() > 0.05  # images of the dark class are in it


def test_broken_images_are_all_named(tmp_path: Path, shell: Any) -> None:
    root = photos(tmp_path / "photos", 16, {"dark": 4, "light": 4})
    for name in ("train/dark/a.jpg", "val/light/b.png"):
        (root / name).write_text("no image")
    code, said, err = shell(look.main, [str(root), "--out", str(tmp_path / "look.png")])
    assert code == 2 and err == "error: 2 of 18 images cannot be read: replace or delete them, and look again\n"
    assert "train/dark/a.jpg" in said and "val/light/b.png" in said and not (tmp_path / "look.png").exists()


def test_data_in_memory_is_looked_at_too(tmp_path: Path, shell: Any) -> None:
    options = ["--data.name", "digits", "--data.classes", "3", "--out", str(tmp_path / "look.png")]
    code, said, err = shell(look.main, ["data", *options])
    assert code == 0, err
    assert "all 3" in said and (tmp_path / "look.png").is_file()


@pytest.mark.parametrize("size", [32, 64])
def test_the_recipes_train_on_a_folder(size: int, tmp_path: Path, shell: Any, quick: None) -> None:
    root = photos(tmp_path / "photos", size, {"dark": 20, "light": 20})
    data = ["--data.root", str(root), "--data.image_size", str(size), "--batch_size", "12"]
    fit = ["--fit.steps", "6", "--schedule.warmup", "0.5", "--fit.device", "cpu", "--fit.trackers", "[]"]
    name = "cifar_resnet8" if size == 32 else "test_resnet"  # timm's divide the size by 32
    networks = ["--networks.teacher.name", name, "--networks.student.name", name]

    def run(main: Any, recipe: Path, name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / name
        code, _, err = shell(main, ["--config", str(recipe), *data, *fit, "--out", str(out), *more])
        assert code == 0, err
        return read(out / "summary.json")

    alone = ["--method", "vanilla", "--networks", "{teacher: {name: test_resnet}}"]
    if size == 32:
        together = run(train.main, RECIPES[0], "together", "--method", "dml+adm", *networks)
        assert together["selected_on"] == "validation" and together["last"]["student/top1"] >= 0
        return
    teacher = run(train.main, RECIPES[0], "teacher", *alone)
    weights = ["--networks.teacher.weights", str(tmp_path / "teacher")]
    student = run(offline.main, RECIPES[1], "kd", "--method", "kd+adm", *networks, *weights)
    assert student["teacher"]["top1"] == teacher["last"]["teacher/top1"]
