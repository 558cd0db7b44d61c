"""Evaluating, sampling and drawing a run: the numbers and pictures of its own networks, one-line errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, in_two_processes

from core.training.run import signed

pytest.importorskip("diffusers")
pytest.importorskip("torch_fidelity")

from diffusion.data import DataConfig, load_images
from diffusion.metrics import Extractor, InMemory, features_of, scores, statistics
from diffusion.pictures import tile
from diffusion.progressive.network import UNetConfig, build_unet, save_student
from diffusion.sampling import load_student
from diffusion.tools import evaluate, sample, visualize

Shell = Callable[[Callable[[list[str]], int], list[str]], tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folders with three networks of random weights; the 1-step student is the 2-step one, a little changed."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    torch.manual_seed(0)
    network = build_unet(UNetConfig(width=16, multipliers=(1, 1), blocks=1, attention=(4,), groups=8), 1, 8)
    with torch.no_grad():
        network.conv_out.weight.normal_(std=0.2)
    for folder, steps in (("base/teacher", 1024), ("round-0002/student", 2), ("round-0001/student", 1)):
        if steps == 1:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        (run / folder).parent.mkdir(parents=True)
        save_student(run / folder, network, "x", steps, 1024)
    (run / "config.yaml").write_text(signed("data: {name: digits, limit: 300}\nteacher: null\nmethod: pd\n"))
    return run


SMALL = ["--features", "digits", "--samples", "50", "--device", "cpu"]


def test_scores_are_those_of_the_run_s_networks_and_data(run: Path, tmp_path: Path, shell: Shell) -> None:
    arguments = [str(run), *SMALL, "--cache", str(tmp_path / "cache"), "--seed", "3", "--batch_size", "20"]
    code, out, err = shell(evaluate.main, [*arguments, "--save", str(tmp_path / "png")])
    assert code == 0, err
    report = json.loads((run / "evaluation-digits.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [2, 1]
    assert report["real"] == {"source": {**report["real"]["source"], "name": "digits", "limit": 300}, "images": 300}
    extractor = Extractor(features_of("digits"))
    real = statistics(extractor(InMemory(load_images(DataConfig("digits", limit=300))))["features"], "real")
    for row in report["rows"]:
        images = load_student(row["network"]).sample(range(50), 3, batch_size=20)
        expected = scores(extractor(images), real, extractor)
        assert {key: row[key] for key in expected} == expected
        assert f"{expected['FD-digits']:.4f}" in out
        saved = tmp_path / "png" / f"round-{row['steps']:04d}-steps-{row['steps']:04d}"
        assert np.array_equal(np.asarray(Image.open(saved / "00049.png")), images[49, 0].numpy())
    assert "accuracy" in out and len(list((tmp_path / "cache").iterdir())) == 1

    # The samples saved, as a folder of images, against the real set's file: the same scores again.
    (npz,) = (tmp_path / "cache").iterdir()
    folder = tmp_path / "png/round-0001-steps-0001"
    again = [*("--features", "digits", "--images", str(folder), "--real", str(npz)), "--out", str(tmp_path / "a.json")]
    assert shell(evaluate.main, [*again, "--device", "cpu"])[0] == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["FD-digits"] == report["rows"][1]["FD-digits"] and row["images"] == 50


def test_another_number_of_steps_and_a_single_network(run: Path, tmp_path: Path, shell: Shell) -> None:
    arguments = [str(run / "base/teacher"), *SMALL, "--cache", str(tmp_path), "--sampling_steps", "4"]
    code, _, err = shell(evaluate.main, [*arguments, "--data.name", "digits"])
    assert code == 0, err
    (row,) = json.loads((run / "base/evaluation-digits.json").read_text())["rows"]
    assert (row["steps"], row["trained_steps"]) == (4, 1024)


def test_few_samples_warn_with_numbers(run: Path, tmp_path: Path, shell: Shell) -> None:
    with pytest.warns(UserWarning, match="FD-digits of 20 samples with 32 features"):
        arguments = [str(run), *SMALL, "--samples", "20", "--steps", "1", "--cache", str(tmp_path)]
        assert shell(evaluate.main, [*arguments, "--out", str(tmp_path / "few.json")])[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give run or network folders"),
        (["RUN", "--images", "x"], "give run or network folders"),
        (["/absent"], "/absent is neither a network's folder"),
        (["RUN", "--steps", "8"], r"has no student of 8 steps, only of [2, 1]"),
        (["RUN", "--samples", "0"], 'samples": Not of type PositiveInt: 0'),
        (["RUN", "--smples", "5"], "did you mean samples"),
        (["RUN", "--features", "digit"], "unknown features 'digit'"),
        (["RUN", "--inception", "/absent.pth"], "no Inception weights /absent.pth: get weights-inception-2015-12-05"),
        (["RUN", "--features", "digits", "--inception", "x"], "--inception counts only with --features inception"),
        (["RUN", *SMALL, "--out", "RUN"], "is a folder: name the JSON file in it"),
        (["RUN", *SMALL, "--out", "RUN/config.yaml/x.json"], "config.yaml (--out): File exists"),
        (["RUN", "--features", "digits", "--samples", "5"], "5 images cannot be cut into the 10 splits"),
        (["RUN", "--features", "digits", "--sampling_steps", "3", "--samples", "20"], "3 sampling steps do not divide"),
        (["RUN", "--features", "digits", "--real", "/absent"], "no folder of images /absent"),
        (["--images", "/absent", "--features", "digits", "--data.name", "digits"], "no folder of images /absent"),
    ],
)
def test_wrong_input_is_one_line(run: Path, tmp_path: Path, shell: Shell, arguments: list[str], message: str) -> None:
    given = [a.replace("RUN", str(run)) for a in arguments]
    cpu = ["--device", "cpu", "--cache", str(tmp_path)]
    code, _, err = shell(evaluate.main, [*given, *cpu])
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("wrong", [{"timesteps": None}, {"timesteps": 10**9}, {"steps": 0}, {"steps": "x"}])
def test_a_network_of_impossible_times_is_refused(run: Path, tmp_path: Path, shell: Shell, wrong: Any) -> None:
    said = {"prediction": "x", "schedule": "cosine", "timesteps": 1024, "steps": 1}
    shutil.copytree(run / "round-0001/student", tmp_path / "student")
    (tmp_path / "student/adm.json").write_text(json.dumps({**said, **wrong}))
    code, _, err = shell(sample.main, [str(tmp_path / "student"), "--rows", "1", "--device", "cpu"])
    assert code == 2 and "which cannot be" in err and err.count("\n") == 1, err


def test_pictures_of_samples(run: Path, tmp_path: Path, shell: Shell) -> None:
    arguments = [str(run), "--rows", "2", "--columns", "3", "--device", "cpu", "--gif", "true", "--out", str(tmp_path)]
    code, _, err = shell(sample.main, arguments)
    assert code == 0, err
    names = ["samples.png", *(f"trajectory-000{n}.{kind}" for n in (1, 2) for kind in ("gif", "png"))]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    with Image.open(tmp_path / "trajectory-0002.gif") as gif:
        assert gif.n_frames == 3  # noise and two steps
    code, _, err = shell(sample.main, [str(run), "--rows", "0"])
    assert code == 2 and 'rows": Not of type UpTo100: 0' in err
    assert shell(sample.main, [str(run / "round-0002/student"), "--device", "cpu", "--rows", "1"])[0] == 0
    assert (run / "round-0002/figures/samples.png").is_file()


def test_tiles_keep_every_pixel() -> None:
    images = torch.arange(6 * 4, dtype=torch.uint8).view(6, 1, 2, 2)
    grid = tile(images, 3)
    assert grid.shape == (2 * 2 + 1, 3 * 2 + 2, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        cell = grid[3 * row : 3 * row + 2, 3 * column : 3 * column + 2]
        assert torch.equal(cell, images[i].expand(3, -1, -1).permute(1, 2, 0))
    assert (grid[2] == 255).all() and (grid[:, 2] == 255).all()


def test_similarity_over_time_and_place(run: Path, tmp_path: Path, shell: Shell) -> None:
    arguments = ["--images", "5", "--rows", "2", "--times", "4", "--batch_size", "3", "--device", "cpu"]
    code, _, err = shell(visualize.main, [str(run), *arguments])
    assert code == 0, err
    report = json.loads((run / "figures/similarity-0001.json").read_text())
    assert report["teacher"] == str(run / "round-0002/student") and report["student"] == str(run / "round-0001/student")
    assert [row["t"] for row in report["rows"]] == [0, 256, 512, 768, 1024]
    assert all(-1 <= row["minimum"] < row["mean"] < row["maximum"] < 1 for row in report["rows"])
    assert (run / "figures/similarity-0001.png").is_file()

    # Reference: one time by hand, the maps by cutting the last convolution off.
    student, teacher = (load_student(run / folder) for folder in ("round-0001/student", "round-0002/student"))
    images = load_images(DataConfig("digits", limit=300))[[0, 60, 120, 180, 240]]
    s = visualize.similarities(student, teacher, images, [256], 0, 2)[0]
    from diffusion.sampling import ImageNoise

    z = images / 127.5 - 1.0
    z = (student.schedule.alpha[256] * z + student.schedule.sigma[256] * ImageNoise(0, range(5), (1, 8, 8))()).float()
    maps = []
    for network in (load_student(run / f"round-000{n}/student").model for n in (1, 2)):
        network.conv_out = torch.nn.Identity()
        maps.append(network(z, torch.full((5,), 256)).sample.double())
    expected = torch.nn.functional.cosine_similarity(*maps, dim=1)
    torch.testing.assert_close(s.double(), expected, rtol=0, atol=1e-5)
    assert report["rows"][1]["mean"] == pytest.approx(expected.mean().item(), abs=1e-5)

    # A network and itself, under the same noise: S is 1 everywhere.
    folders = ["--student", str(run / "round-0002/student"), "--teacher", str(run / "base/teacher")]
    code, _, err = shell(visualize.main, [*folders, *arguments, "--out", str(tmp_path)])
    assert code == 0, err
    same = json.loads((tmp_path / "similarity-0002.json").read_text())["rows"]
    assert all(row["minimum"] == pytest.approx(1.0, abs=1e-5) for row in same)


def test_wrong_input_of_visualize_is_one_line(run: Path, tmp_path: Path, shell: Shell) -> None:
    for arguments, message in (
        ([], "give one of a run folder"),
        (["--student", str(run)], "--student needs --teacher"),
        ([str(run), "--times", "1000000"], 'times": Not of type UpTo100: 1000000'),
        ([str(run), "--times", "0"], 'times": Not of type UpTo100: 0'),
        ([str(run), "--teacher", "/absent"], "/absent holds no network"),
        ([str(run), "--data.limit", "0"], "limit must be at least 1"),
    ):
        code, _, err = shell(visualize.main, [*arguments, "--device", "cpu", "--out", str(tmp_path)])
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(run: Path, tmp_path: Path) -> None:
    images = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        arguments = [*SMALL, "--steps", "2", "--samples", "33", "--save", str(out), "--out", str(out) + ".json"]
        if world == 1:
            assert evaluate.main([str(run), *arguments]) == 0
        else:
            in_two_processes(ROOT / "diffusion/tools/evaluate.py", run, *arguments)
        files = sorted((out / "round-0002-steps-0002").iterdir())
        images[world] = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).int()
        report: Any = json.loads(Path(f"{out}.json").read_text())
        assert report["environment"]["processes"] == world and report["rows"][0]["images"] == 33
    assert images[1].shape == (33, 8, 8) and (images[1] - images[2]).abs().max() <= 1
