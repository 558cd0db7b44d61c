"""Predicting images that belong to no data set: as evaluation sees them, to the last image; broken ones are skipped."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import ROOT, STUDENT, arguments, environment, train_whole

from classification.experiment import EVALUATION_BATCH, command_of, images_at, restore
from classification.tools import evaluate, predict, train
from core.training.checkpoint import find_checkpoint

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DML+ADM on three digits, at 8 pixels as they are stored."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    train_whole(train.main, arguments(out))
    return out


@pytest.fixture(scope="session")
def images(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images of the run by class, in the order of the test split within each, not all at one depth."""
    folder = tmp_path_factory.mktemp("images")
    test = restore(command_of(run), find_checkpoint(run, "last")).datasets.test
    for n, (pixels, target) in enumerate(zip(test.images, test.targets.tolist(), strict=True)):
        place = folder / f"class {target}" / ("deep" if n % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{n:04d}.png")
    return folder


@pytest.fixture
def command(shell: Any, quick: None) -> Command:
    """Runs a tool in this process as a shell would see it: (exit code, stdout, stderr)."""
    return lambda main, *argv: shell(main, [str(a) for a in argv])


@pytest.fixture
def rows(command: Command, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The rows of a JSON file of predictions."""

    def made(*argv: object) -> list[dict[str, Any]]:
        code, _, err = command(predict.main, *argv, "--device", "cpu", "--out", tmp_path / "rows.json")
        assert code == 0, err
        return json.loads((tmp_path / "rows.json").read_text())

    return made


def tar_of(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        tar.add(folder, arcname=".")
    return file


# --- as evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_a_network_says_of_its_test_images_is_what_evaluation_saw(
    role: str, run: Path, images: Path, rows: Any
) -> None:
    experiment = restore(command_of(run), find_checkpoint(run, "last"))
    test = experiment.datasets.test
    logits = experiment.distiller.outputs(test.images)[role].logits
    found = rows(run, images, *(["--role", role] if role != "student" else []))
    assert len(found) == len(test)
    for row in found:
        number = int(Path(row["file"]).stem)
        expected = logits[number].softmax(0).sort(descending=True)
        assert [top["class"] for top in row["top"]] == [str(int(c)) for c in expected.indices]
        assert [top["probability"] for top in row["top"]] == pytest.approx(expected.values.tolist(), rel=1e-4)
        assert (row["class"], row["probability"]) == tuple(row["top"][0].values())


@pytest.mark.parametrize(
    "data",
    [
        [],  # in memory, at the images' own size
        ["--data.image_size", "12", "--data.in_memory", "false"],
        ["--data.image_size", "12", "--data.augmentation", "random_resized_crop", "--data.workers", "0"],
    ],
    ids=["own size", "streamed", "resized crop"],
)
def test_a_run_on_files_scores_as_evaluate_says(
    data: list[str], images: Path, tmp_path: Path, command: Command, rows: Any
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("train", "val"):
        (root / name).symlink_to(images)
    out = tmp_path / "run"
    more = ["--data.name", "folder", "--data.root", str(root), "--data.classes", "null", *data]
    size = [] if "--data.image_size" in data else ["--data.image_size", "null"]
    train_whole(train.main, arguments(out, *more, *size, "--fit.epochs", "1", method="dml"))
    assert command(evaluate.main, out, "--device", "cpu")[0] == 0
    values = json.loads((out / "evaluation-last-test.json").read_text())["values"]
    for role in ("student", "teacher"):
        found = rows(out, images, "--role", role)
        right = [row["class"] == Path(row["file"]).parts[0] for row in found]
        assert 100 * sum(right) / len(right) == pytest.approx(values[f"{role}/top1"], abs=1e-9)
    experiment = restore(command_of(out), find_checkpoint(out, "last"))
    batches = experiment.evaluation_loader(experiment.datasets.test)
    assert len(experiment.datasets.test) <= EVALUATION_BATCH  # one batch, and the order of files is the split's
    logits = experiment.distiller.outputs(next(iter(batches))["image"])["teacher"].logits
    best = logits.softmax(1).max(dim=1)
    assert [row["class"] for row in found] == [f"class {c}" for c in best.indices.tolist()]
    assert [row["probability"] for row in found] == [float(f"{p:.6g}") for p in best.values.tolist()]


def test_digits_of_their_stored_size_are_resized_as_the_set_is(run: Path, tmp_path: Path, rows: Any) -> None:
    out = tmp_path / "larger"
    train_whole(train.main, arguments(out, "--data.image_size", "16", "--fit.epochs", "1"))
    small, large = (restore(command_of(r), find_checkpoint(r, "last")) for r in (run, out))
    Image.fromarray(images_at(small.datasets.test, 1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    best = large.distiller.outputs(images_at(large.datasets.test, 1))["student"].logits.softmax(1).max()
    (row,) = rows(out, tmp_path / "one.png")
    assert row["file"] == "one.png" and row["probability"] == pytest.approx(float(best), rel=1e-5)


# --- what it takes and writes -----------------------------------------------------------------------------------------


def test_folder_tar_and_single_image_say_the_same(
    run: Path, images: Path, tmp_path: Path, command: Command, rows: Any
) -> None:
    found = rows(run, images)
    assert [row["file"] for row in found] == sorted(str(f.relative_to(images)) for f in images.rglob("*.png"))
    assert rows(run, tar_of(images, tmp_path / "images.tar")) == found
    flat = tmp_path / "flat"
    flat.mkdir()
    for row in found[:3]:
        (flat / Path(row["file"]).name).symlink_to(images / row["file"])
    assert [row["class"] for row in rows(run, flat)] == [row["class"] for row in found[:3]]
    (single,) = rows(run, images / found[0]["file"])
    assert single["class"] == found[0]["class"]
    assert single["probability"] == pytest.approx(found[0]["probability"], rel=1e-4)

    code, out, _ = command(predict.main, run, images, "--device", "cpu")
    assert code == 0
    table = list(csv.DictReader(io.StringIO(out)))
    assert list(table[0]) == ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    for line, row in zip(table, found, strict=True):
        assert (line["file"], line["class"], float(line["probability"])) == tuple(row.values())[:3]
        assert line["class_3"] == row["top"][2]["class"]


def test_broken_images_are_listed_and_skipped(run: Path, images: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, file in (("a.png", images / "class 0/0000.png"), ("d.png", next((images / "class 1").glob("*.png")))):
        (folder / name).write_bytes(file.read_bytes())
    (folder / "b.png").write_bytes(b"no image")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:60])
    for place in (folder, tar_of(folder, tmp_path / "mixed.tar")):
        out = tmp_path / "out.csv"
        code, _, err = command(predict.main, run, place, "--device", "cpu", "--out", out)
        assert code == 0 and "2 of 4 images" in err
        assert [line for line in err.splitlines() if line.startswith("skipped: ")] == [
            f"skipped: cannot decode {place}/{name}: broken or no image; replace or delete it"
            for name in ("b.png", "c.png")
        ]
        assert [line["file"] for line in csv.DictReader(out.open())] == ["a.png", "d.png"]

    for name in "ad":
        (folder / f"{name}.png").unlink()
    code, out_text, err = command(predict.main, run, folder, "--out", tmp_path / "new/none.csv")
    assert code == 2 and not out_text and err.splitlines()[-1].startswith("error: none of the 2 image(s)")
    assert not (tmp_path / "new").exists()


def test_workers_decode_and_skip_as_one_process_does(
    run: Path, images: Path, tmp_path: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from classification.data import datasets

    alone = rows(run, images)
    monkeypatch.setattr(datasets, "WORTH_WORKERS", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert rows(run, images) == alone


# --- weight files, and runs without their data ------------------------------------------------------------------------


def test_a_weight_file_numbers_the_classes_unless_the_data_set_is_named(run: Path, images: Path, rows: Any) -> None:
    file = run / "checkpoints/last/student.safetensors"
    expected = rows(run, images)
    assert rows(file, images, "--data.image_size", 8) == expected  # digits are called by their numbers
    named = ["--data.name", "digits", "--data.image_size", 8, "--data.classes", 3]
    assert rows(file, images, *named, "--network", STUDENT) == expected
    other = rows(file, images, "--data.image_size", 8, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    assert [row["probability"] for row in other] != [row["probability"] for row in expected]


def test_a_run_without_its_data_set_still_predicts(images: Path, tmp_path: Path, command: Command, rows: Any) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        (tmp_path / "data" / name).symlink_to(images)
    out = tmp_path / "run"
    data = ["--data.name", "folder", "--data.root", str(tmp_path / "data"), "--data.classes", "null"]
    train_whole(train.main, arguments(out, *data, "--data.image_size", "null", "--fit.epochs", "1", method="dml"))
    found = rows(out, images)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert rows(out, images, "--data.root", tmp_path / "moved") == found
    numbered = rows(out, images, "--data.image_size", 8)
    assert [f"class {row['class']}" for row in numbered] == [row["class"] for row in found]
    assert [row["probability"] for row in numbered] == [row["probability"] for row in found]
    code, _, err = command(predict.main, out, images)
    assert code == 2 and "--data.root" in err and "--data.image_size" in err and err.count("\n") == 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_wrong_commands_end_in_one_line(run: Path, images: Path, tmp_path: Path, command: Command) -> None:
    bare = tmp_path / "bare.pth"
    torch.save({"weight": torch.zeros(1)}, bare)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no tar")
    weights = run / "checkpoints/last/student.safetensors"
    out = tmp_path / "out.csv"
    for argv, words in (
        ([run], "images"),
        ([tmp_path / "none", images], "give a run folder, an exported folder or a weight file"),
        ([tmp_path, images], "no run folder"),
        ([run, tmp_path / "empty"], "no image in"),
        ([run, tmp_path / "nowhere"], "there is no"),
        ([run, tmp_path / "notes.txt"], "as an uncompressed tar"),
        ([run, images, "--role", "studant"], "did you mean 'student'"),
        ([run, images, "--checkpoint", "step-9"], "no checkpoint"),
        ([run, images, "--network", "cifar_resnet8"], "a run's networks are known"),
        ([run, images, "--out", tmp_path / "out.txt"], ".csv or .json"),
        ([run, images, "--data.image_size", "0"], "image_size"),
        ([run, images, "--device", "abacus"], "--device"),
        ([weights, images, "--checkpoint", "best"], "belong to a run folder"),
        ([weights, images], "--data.image_size"),
        ([bare, images, "--network", "cifar_resnet8"], "--data.name"),
        ([bare, images], "--network"),
    ):
        code, _, err = command(predict.main, *argv, *([] if "--out" in argv else ["--out", out]))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, (argv, err)
    assert not out.exists()


def test_help_needs_no_torch_and_a_closed_pipe_is_no_error(run: Path, images: Path) -> None:
    script = "import sys; from classification.tools import predict\ntry: predict.main(['--help'])\n"
    script += "except SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment(), stdout=subprocess.DEVNULL).returncode == 0
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "classification/tools/predict.py", str(run), str(images), "--device", "cpu"]
    options: dict[str, Any] = {"env": environment(), "cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(words, stdout=writing, **options)
    os.close(writing)
    assert done.returncode == 141 and not done.stderr
