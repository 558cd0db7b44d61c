"""Evaluating and drawing real runs: the numbers of training again, figures that show something, one-line errors."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import CPU, RECIPE, lines, train_whole

from classification.evaluation import similarities
from classification.experiment import command_of, restore
from classification.tools import evaluate, train, visualize
from core.adm import consensus_attention
from core.analysis.attention import KEYS
from core.analysis.maps import cam
from core.training.checkpoint import find_checkpoint
from core.weights import read_metadata, read_state_dict

FIT = ["--fit.log_every", "4", *CPU, "--fit.keep", "5", "--batch_size", "32"]


def make_run(out: Path, *more: str) -> Path:
    train_whole(train.main, ["--config", str(RECIPE), "--out", str(out), *FIT, *more])
    return out


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DML+ADM, two epochs of four digits, maps of 128 and 64 channels, a held-out validation split."""
    small = ["--data.classes", "4", "--data.per_class", "16", "--data.validation", "0.1", "--fit.epochs", "2"]
    return make_run(tmp_path_factory.mktemp("runs") / "digits", "--method", "dml+adm", *small)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files: `{train,val}/<class>/<number>.png` of 16 pixels, three classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    root = tmp_path_factory.mktemp("data")
    for name, first in (("train", 0), ("val", 200)):
        for label in range(3):
            (root / name / f"n{label}").mkdir(parents=True)
            for number in (digits.target[first:] == label).nonzero()[0][:12]:
                pixels = Image.fromarray((digits.images[first + number] * 15.9).astype("uint8"))
                pixels.convert("RGB").resize((16, 16)).save(root / name / f"n{label}" / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """DML without ADM, two networks of 64 channels, on files."""
    networks = ["--networks.teacher.name", "cifar_resnet14", "--networks.student.name", "cifar_resnet8"]
    data = ["--data.name", "folder", "--data.root", str(folder), "--fit.epochs", "2"]
    return make_run(tmp_path_factory.mktemp("runs") / "plain", "--method", "dml", *networks, *data)


@pytest.fixture
def command(shell: Any, quick: None) -> Callable[..., tuple[int, str, str]]:
    """Runs a tool in this process as a shell would see it: (exit code, stdout, stderr)."""
    return lambda main, *argv: shell(main, [str(a) for a in argv])


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "copied", symlinks=True))


def evaluations(run: Path) -> list[dict[str, Any]]:
    return lines(run, "evaluation")


def is_drawn(file: Path) -> bool:
    """Whether a figure shows something: many colours, not one in nearly every pixel."""
    with Image.open(file) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    pixels = sum(count for count, _ in colors)
    return len(colors) > 50 and max(count for count, _ in colors) < 0.97 * pixels


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_a_run_scores_exactly_as_its_training_said(run: Path, command: Any) -> None:
    last = json.loads((run / "summary.json").read_text())["last"]
    for split, prefix in (("test", "test/"), ("validation", "")):
        code, out, _ = command(evaluate.main, run, "--split", split, "--device", "cpu")
        assert code == 0
        report = json.loads((run / f"evaluation-last-{split}.json").read_text())
        # The attention statistics need phi too, which no network file holds.
        assert len(report["values"]) == 8 + len(KEYS)
        assert report["values"] == {key: last[prefix + key] for key in report["values"]}
        assert report["checkpoint"] == f"step-{last['step']:08d}"
        assert report["environment"]["command"] and "commit" in report["environment"]
        row = next(line for line in out.splitlines() if line.startswith("student"))
        assert f"{last[prefix + 'student/top1']:.2f}" in row and "cifar_resnet8" in row


def test_an_earlier_checkpoint_scores_as_then(run: Path, tmp_path: Path, command: Any) -> None:
    first = evaluations(run)[0]
    out = tmp_path / "first.json"
    name = f"step-{first['step']:08d}"
    assert command(evaluate.main, run, "--checkpoint", name, "--split", "validation", "--out", out)[0] == 0
    assert json.loads(out.read_text())["values"] == {k: v for k, v in first.items() if "/" in k and "test/" not in k}
    assert not (run / f"evaluation-{name}-validation.json").exists()


def test_a_weight_file_says_what_it_is(run: Path, tmp_path: Path, command: Any) -> None:
    last = json.loads((run / "summary.json").read_text())["last"]
    file, out = run / "checkpoints/last/teacher.safetensors", tmp_path / "teacher.json"
    data = ["--data.name", "digits", "--data.image_size", 16, "--data.classes", 4]
    assert command(evaluate.main, "--weights", file, *data, "--out", out)[0] == 0
    values = json.loads(out.read_text())["values"]
    assert values == {f"teacher/{k}": last[f"test/teacher/{k}"] for k in ("top1", "top5", "nll", "ece")}

    # The same weights as a file that says nothing need the network and its normalisation.
    said = read_metadata(file)
    torch.save(read_state_dict(file), tmp_path / "bare.pth")
    bare = ["--weights", tmp_path / "bare.pth", "--network", said["architecture"], *data, "--out", out]
    assert command(evaluate.main, *bare, "--mean", *said["mean"], "--std", *said["std"])[0] == 0
    assert json.loads(out.read_text())["values"]["student/nll"] == values["teacher/nll"]
    assert command(evaluate.main, *bare, "--mean", 0, 0, 0, "--std", *said["std"])[0] == 0
    assert json.loads(out.read_text())["values"]["student/nll"] != values["teacher/nll"]


def test_timm_weights_bring_their_normalisation() -> None:
    inception = evaluate.normalisation_of("inception_v3.tf_in1k")
    assert inception == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert evaluate.normalisation_of("cifar_resnet8") == {}


def test_wrong_evaluations_end_in_one_line(run: Path, plain: Path, tmp_path: Path, command: Any) -> None:
    teacher = run / "checkpoints/last/teacher.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(teacher.read_bytes()[:5000])
    torch.save(read_state_dict(teacher), tmp_path / "bare.pth")
    digits = ["--data.name", "digits", "--data.image_size", 16, "--data.classes", 4]
    for argv, words in (
        ([], "give one of"),
        ([run, "--weights", teacher], "give one of"),
        ([tmp_path / "none"], "no run folder"),
        ([tmp_path], "no config.yaml"),
        ([run, "--checkpoint", "bst"], "it has last, best, step-"),
        ([run, "--mean", 0.5], "belong to --weights"),
        ([run, "--data.classes", 5], "4 classes, but the network has 5"),
        ([run, "--split", "train"], "split"),
        ([plain, "--split", "validation"], "no validation images are held out"),
        ([run, "--chekpoint", "best"], "did you mean checkpoint?"),
        (["--weights", cut, *digits], "incomplete"),
        (["--weights", tmp_path / "none.safetensors", *digits], "no weight file"),
        (["--weights", tmp_path / "bare.pth", *digits], "--network"),
        (["--weights", teacher, "--network", "cifar_resnet8", *digits], "another architecture"),
        (["--weights", teacher, *digits, "--data.classes", 3], "4 classes, but the network has 3"),
    ):
        code, _, err = command(evaluate.main, *argv)
        assert code == 2 and words in err and err.count("\n") == 1, (argv, code, err)


def test_a_damaged_checkpoint_ends_in_one_line(copied: Path, command: Any) -> None:
    checkpoint = find_checkpoint(copied, "last")
    whole = (checkpoint / "state.pt").read_bytes()
    (checkpoint / "state.pt").write_bytes(whole[: len(whole) // 2])
    code, _, err = command(evaluate.main, copied)
    assert code == 2 and "state.pt" in err and err.count("\n") == 1
    (checkpoint / "state.pt").write_bytes(whole)
    (checkpoint / "student.safetensors").unlink()
    code, _, err = command(evaluate.main, copied)
    assert code == 2 and "student.safetensors" in err and err.count("\n") == 1
    assert checkpoint.is_dir()  # evaluation removes nothing


def test_a_state_without_the_adapters_is_refused(copied: Path, command: Any) -> None:
    file = find_checkpoint(copied, "last") / "state.pt"
    state = torch.load(file, weights_only=True)
    state["extra"] = {key: value for key, value in state["extra"].items() if not key.startswith("adm.")}
    torch.save(state, file)
    code, _, err = command(evaluate.main, copied)
    assert code == 2 and "lacks adm." in err and err.count("\n") == 1


# --- visualize --------------------------------------------------------------------------------------------------------


def test_figures_of_a_run(run: Path, command: Any) -> None:
    code, out, _ = command(visualize.main, run, "--images", 2)
    assert code == 0
    for name in ("maps.png", "reliability.png", "attention.png"):
        assert is_drawn(run / "figures" / name), name
    rows = json.loads((run / "figures/attention.json").read_text())["rows"]
    logged = evaluations(run)
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    for row, line in zip(rows, logged, strict=True):
        assert {f"attention/{key}": row[key] for key in row if f"attention/{key}" in KEYS} == {k: line[k] for k in KEYS}
    assert f"{logged[1]['attention/divergence_variance']:.4f}" in out


def test_without_adm_attention_is_logged_where_channels_agree(plain: Path, command: Any) -> None:
    experiment = restore(command_of(plain), find_checkpoint(plain, "last"))
    maps = {role: output.maps[-1] for role, output in experiment.distiller.outputs(images_of(experiment)).items()}
    mean = torch.nn.functional.cosine_similarity(maps["student"], maps["teacher"], dim=1).mean().item()
    assert evaluations(plain)[-1]["attention/similarity"] == pytest.approx(mean, abs=1e-5)
    assert command(visualize.main, plain, "--images", 1)[0] == 0
    assert is_drawn(plain / "figures/maps.png")


def test_without_adm_and_with_different_channels_there_is_no_similarity(tmp_path: Path, command: Any) -> None:
    small = ["--data.classes", "3", "--data.per_class", "11", "--data.image_size", "8", "--fit.epochs", "1"]
    run = make_run(tmp_path / "vanilla", "--method", "vanilla", *small)
    assert not any(key.startswith("attention/") for key in evaluations(run)[0])
    code, out, _ = command(visualize.main, run, "--images", 1)
    assert code == 0 and "different channels" in out and "no attention over training" in out
    assert is_drawn(run / "figures/maps.png") and not (run / "figures/attention.png").exists()


def images_of(experiment: Any) -> torch.Tensor:
    return experiment.datasets.test.images


def write_boxes(file: Path, rows: list[list[Any]], header: str = "split wnid image x0 y0 x1 y1") -> Path:
    with open(file, "w", newline="") as opened:
        csv.writer(opened, delimiter="\t").writerows([header.split(), *rows])
    return file


def test_box_shares_are_those_of_their_own_images(plain: Path, folder: Path, tmp_path: Path, command: Any) -> None:
    """Boxes of whole cells (maps of 4 x 4 cells, 64 x 64 pixels), so that a slice of the map is the truth."""
    files = sorted((folder / "val").rglob("*.png"), reverse=True)  # not the order of the data set
    boxes = {}
    for number, file in enumerate(files[:-5]):  # five images have none
        x0, x1 = sorted((number % 4, (3 * number + 1) % 4))
        boxes[file] = (x0, number % 3, x1 + 1, 4)  # cells: x0, y0, x1, y1, exclusive
    rows = [["val", f.parent.name, f.stem, 16 * a, 16 * b, 16 * c - 1, 16 * d - 1] for f, (a, b, c, d) in boxes.items()]
    unknown = [["train", "n0", "no such image", 0, 0, 63, 63]]
    tsv = write_boxes(tmp_path / "boxes.tsv", rows + unknown)
    code, out, _ = command(visualize.main, plain, "--checkpoint", "all", "--boxes", tsv, "--images", 1)
    assert code == 0 and "consensus" in out
    report = json.loads((plain / "figures/boxes-all.json").read_text())
    assert report["images"] == len(boxes) == len(files) - 5
    assert [row["epoch"] for row in report["rows"]] == [1.0, 2.0]
    assert is_drawn(plain / "figures/boxes-all.png")
    for row in report["rows"]:
        assert is_drawn(plain / "figures" / f"maps-{row['checkpoint']}.png")
        experiment = restore(command_of(plain), find_checkpoint(plain, row["checkpoint"]))
        expected: dict[str, list[float]] = {"area": [], "consensus": [], "discrepancy": [], "CAM teacher": []}
        for index, file in enumerate(experiment.image_files("test")):
            if file not in boxes:
                continue
            a, b, c, d = boxes[file]
            outputs = experiment.distiller.eval().outputs(images_of(experiment)[index : index + 1])
            (similarity,) = similarities(experiment.distiller, outputs).values()
            assert similarity.shape == (1, 4, 4)
            teacher, target = outputs["teacher"], experiment.datasets.test.targets[index : index + 1]
            activation = cam(teacher.maps[-1], teacher.head, target)[0].clamp_min(0)
            expected["area"].append((c - a) * (d - b) / 16)
            for name, weight in (
                ("consensus", consensus_attention(similarity)[0, 0]),
                ("discrepancy", 1 - similarity[0]),
                ("CAM teacher", activation),
            ):
                expected[name].append((weight[b:d, a:c].sum() / weight.sum()).item())
        for name, shares in expected.items():
            mean = torch.tensor(shares).nanmean().item()
            assert row["shares"][name]["mean"] == pytest.approx(mean, abs=1e-5), name
        over = torch.tensor(expected["consensus"]) - torch.tensor(expected["area"])
        assert row["shares"]["consensus"]["over_area"] == pytest.approx(over.mean().item(), abs=1e-5)
        error = (over.std() / len(over) ** 0.5).item()
        assert row["shares"]["consensus"]["standard_error"] == pytest.approx(error, abs=1e-5)


def test_wrong_figures_end_in_one_line(run: Path, plain: Path, folder: Path, tmp_path: Path, command: Any) -> None:
    name = min((folder / "val/n0").iterdir()).stem
    one = ["val", "n0", name]
    good = write_boxes(tmp_path / "good.tsv", [[*one, 0, 0, 63, 63]])
    for argv, words in (
        ([], "run"),
        ([tmp_path], "no config.yaml"),
        ([run, "--checkpoint", "best2"], "no checkpoint"),
        ([run, "--images", 0], '"images": Not of type PositiveInt: 0'),
        ([run, "--boxes", good], "no files of their own"),
        ([plain, "--boxes", tmp_path / "none.tsv"], "no box file"),
        ([plain, "--boxes", write_boxes(tmp_path / "a.tsv", [], "image x0 y0 x1")], "first line"),
        ([plain, "--boxes", write_boxes(tmp_path / "b.tsv", [])], "holds no box"),
        ([plain, "--boxes", write_boxes(tmp_path / "c.tsv", [[*one, 0, 0, "x", 1]])], "line 2"),
        ([plain, "--boxes", write_boxes(tmp_path / "d.tsv", [[*one, 9, 0, 8, 1]])], "line 2"),
        ([plain, "--boxes", good, "--box_size", 16], "check --box_size"),
        ([plain, "--boxes", write_boxes(tmp_path / "e.tsv", [[*one, 0, 0, 1, 1]] * 2)], "line 3: a second box"),
        ([plain, "--boxes", write_boxes(tmp_path / "f.tsv", [["test", "n0", name, 0, 0, 1, 1]])], "no box for this"),
    ):
        code, _, err = command(visualize.main, *argv)
        assert code == 2 and words in err and err.count("\n") == 1, (argv, code, err)
