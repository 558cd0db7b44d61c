"""Exported files: opened without our networks they say what the run says, and a card tells what they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import CPU, RECIPE, train_whole

from classification.experiment import command_of, images_at, restore
from classification.export import crop_share, reopened
from classification.tools import evaluate, train
from core.errors import TrainingError
from core.training.checkpoint import find_checkpoint

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CIFAR, TIMM = "cifar_wrn_10_2", "test_resnet"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DML of a timm student and a CIFAR teacher, an epoch of four digits at 32 pixels."""
    out = tmp_path_factory.mktemp("runs") / "mixed"
    data = ["--data.classes", "4", "--data.per_class", "16", "--data.image_size", "32", "--batch_size", "32"]
    networks = ["--networks.teacher.name", CIFAR, "--networks.student.name", TIMM, "--fit.epochs", "1"]
    data += ["--label_smoothing", "0.1", "--data.mixup", "0.2"]
    train_whole(train.main, ["--config", str(RECIPE), "--method", "dml", "--out", str(out), *data, *networks, *CPU])
    return out


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student in every format, and `x.json`, its evaluation, beside the folder."""
    place = tmp_path_factory.mktemp("exports")
    argv = ["--export", str(place / "new/student"), "--format", "timm,onnx,torch", "--out", str(place / "new/x.json")]
    assert evaluate.main([str(run), *argv]) == 0
    return place / "new/student"


@pytest.fixture
def command(shell: Any, quick: None, run: Path, tmp_path: Path) -> Command:
    """Evaluates the run with more options, as a shell would see it: (exit code, stdout, stderr)."""
    out = ["--out", str(tmp_path / "x.json")]
    return lambda *argv: shell(evaluate.main, [str(run), *out, *(str(word) for word in argv)])


def said_by(run: Path, role: str, count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Test images in [0, 1], the same normalised, and the logits of a network of the run."""
    experiment = restore(command_of(run), find_checkpoint(run, "last"))
    images = images_at(experiment.split("test"), count)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in experiment.distiller.normalisation[role])
    plain = images.float() / 255
    with torch.no_grad():
        return plain, (plain - mean) / std, experiment.distiller.eval().outputs(images)[role].logits


def close(logits: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(np.asarray(logits)), expected, rtol=1e-4, atol=1e-4)


def test_a_timm_student_in_every_format(run: Path, exported: Path) -> None:
    folder = exported
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "model.onnx", "model.pt2", "README.md")
    }
    _, normalised, expected = said_by(run, "student")

    import onnxruntime
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        close(model(normalised), expected)
    assert list(model.pretrained_cfg["label_names"]) == ["0", "1", "2", "3"]
    shown = timm.data.resolve_model_data_config(model, use_test_size=True)
    assert shown["input_size"] == (3, 32, 32) and shown["crop_pct"] == 1.0
    assert list(shown["mean"]) == pytest.approx([0.3058] * 3) and list(shown["std"]) == pytest.approx([0.3187] * 3)
    assert "license" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    files: dict[str, Any] = {"description.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=files).module()
    for count in (1, 5):  # any number of images
        close(session.run(["logits"], {"pixel_values": normalised[:count].numpy()})[0], expected[:count])
        with torch.no_grad():
            close(program(normalised[:count]), expected[:count])
    about = json.loads(files["description.json"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["description"]) == about
    assert about["class_names"] == ["0", "1", "2", "3"] and about["normalisation_inside"] is False


def test_a_cifar_network_normalises_inside(run: Path, command: Command, tmp_path: Path) -> None:
    import onnxruntime

    folder = tmp_path / "teacher"
    options = ["--export_role", "teacher", "--with-preprocessing"]
    assert command("--export", folder, "--format", "onnx,torch", *options)[0] == 0
    images, _, expected = said_by(run, "teacher")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"image": images.numpy()})[0], expected)
    with torch.no_grad():
        close(torch.export.load(folder / "model.pt2").module()(images), expected)
    assert "RGB in [0, 1]\n" in (folder / "README.md").read_text()


def test_the_card_says_what_was_evaluated_and_how_it_came_about(run: Path, exported: Path) -> None:
    _, header, text = (exported / "README.md").read_text().split("---\n", 2)
    said, values = yaml.safe_load(header), json.loads((exported.parent / "x.json").read_text())["values"]
    assert said["library_name"] == "timm"
    assert said["license"] is None and said["pipeline_tag"] == "image-classification"
    metrics = said["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["type"] == "accuracy" and metrics[0]["value"] == pytest.approx(
        values["student/top1"] / 100, abs=1e-6
    )
    for role in ("student", "teacher"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {role} |"))
        cells = [cell.strip() for cell in row.split("|")]
        low, high = (float(bound) for bound in cells[3].split(" to "))
        assert cells[2] == f"{values[f'{role}/top1']:.2f}" and low < values[f"{role}/top1"] < high
    environment = json.loads((run / "environment.json").read_text())["starts"][-1]
    for part in (
        "method: dml",
        f"teacher: {CIFAR}",
        "digits: 64 training images",
        "  mixup: 0.2",
        "label_smoothing: 0.1",
        str(environment["commit"]),
    ):
        assert part in text, part


def test_a_weight_file_is_exported_too(run: Path, shell: Any, tmp_path: Path) -> None:
    file = find_checkpoint(run, "last") / "student.safetensors"
    data = ["--data.name", "digits", "--data.image_size", "32", "--data.classes", "4"]
    argv = ["--weights", str(file), *data, "--export", str(tmp_path / "out"), "--format", "timm"]
    code, out, err = shell(evaluate.main, argv)
    assert code == 0, err
    assert "timm: config.json, reopened: logits differ by" in out
    assert "## Method" not in (tmp_path / "out/README.md").read_text()


def test_a_file_that_says_something_else_is_not_kept(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.export.save

    def save_another(program: Any, file: Path, **more: Any) -> None:
        program.state_dict["fc.bias"].data += 1
        save(program, file, **more)

    monkeypatch.setattr(torch.export, "save", save_another)
    code, _, err = command("--export", tmp_path / "out", "--format", "torch")
    assert code == 1 and "differ from torch's" in err and err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_file_that_a_fresh_process_cannot_open_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    with pytest.raises(TrainingError, match=r"^onnx: a fresh process cannot open what was written: .*\.onnx"):
        reopened(tmp_path, {"onnx": torch.zeros(2, 3, 8, 8)})


def test_wrong_exports_end_in_one_line(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    new = tmp_path / "new"
    for argv, words in (
        (["--export", "onnx"], "--export FOLDER --format onnx"),
        (["--export", new], f"--export {new} --format timm,onnx,torch"),
        (["--export", new, "--format", "onx"], "did you mean 'onnx'"),
        (["--export", new, "--format", "onnx,"], "unknown --format ''"),
        (["--format", "onnx"], "only with --export FOLDER"),
        (["--with-preprocessing"], "only with --export FOLDER"),
        (["--export", new, "--format", "onnx", "--export_file", "x.onnx"], "FOLDER/model.onnx"),
        (["--export", new, "--format", "onnx", "--export_role", "techer"], "did you mean 'teacher'"),
        (["--export", new, "--format", "timm", "--export_role", "teacher"], "give --format onnx,torch"),
        (["--export", new, "--format", "timm", "--with-preprocessing"], "counts for onnx and torch"),
        (["--export", full, "--format", "torch"], "is not empty"),
        (["--export", full / "mine.txt", "--format", "torch"], "is a file"),
    ):
        code, _, err = command(*argv)
        assert code == 2 and words in err and err.count("\n") == 1, (argv, code, err)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = command("--export", new, "--format", "torch,onnx")
    assert code == 2 and "onnxruntime is not installed" in err and "[export]" in err and err.count("\n") == 1
    assert not new.exists() and not (tmp_path / "x.json").exists() and (full / "mine.txt").read_text() == "mine"


def test_the_crop_of_evaluation_is_read_off() -> None:
    from classification.data.datasets import transforms
    from classification.data.sources import Streamed

    for augmentation, share in (("random_resized_crop", 0.875), ("crop_flip", 1.0)):
        pair = transforms(augmentation, 224, 4)  # type: ignore[arg-type]
        assert crop_share(Streamed(None, torch.zeros(1), torch.zeros(1), *pair)) == share  # type: ignore[arg-type]
