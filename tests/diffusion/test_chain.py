"""Whole chains by command: what they leave, how they resume, from what they start, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import CPU, ROOT, assert_same, assert_same_runs, check_log, metrics, train_whole
from runs import stop_at as stop_at_step

pytest.importorskip("diffusers")

from small_unet import diffusers_folder, unet

from core.errors import InputError, notices
from core.training.checkpoint import read_checkpoint
from diffusion.progressive.config import ProgressiveConfig, check_chain
from diffusion.progressive.distiller import ADMConfig, BaseDistiller, ProgressiveDistiller
from diffusion.progressive.network import build_unet, save_student
from diffusion.tools.train import main
from diffusion.training import parse_config

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
RECIPES = ROOT / "diffusion/recipes"


@pytest.fixture
def command(shell: Any) -> Command:
    return lambda argv: shell(main, argv)


def arguments(out: Path, *more: str) -> list[str]:
    """A chain of 42,000 parameters on 48 digits, a few steps a round; 3 steps an epoch."""
    network = ["--network.width", "8", "--network.groups", "4", "--batch_size", "16", "--data.limit", "48"]
    lengths = ["--base.steps", "5", "--base.warmup", "2", "--rounds.steps", "4", "--rounds.last_steps", "5"]
    fit = ["--fit.log_every", "2", "--fit.evaluate_every", "4", *CPU]
    recipe = ["progressive", "--config", str(RECIPES / "digits_progressive.yaml"), "--out", str(out)]
    return [*recipe, "--chain", "[8,4,2,1]", *network, *lengths, *fit, "--progress_bar", "false", *more]


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: int, last: int) -> None:
    """Sends SIGTERM to this process in the round of the student with so many steps (0: the base network)."""
    for kind in (BaseDistiller, ProgressiveDistiller):
        stop_at_step(monkeypatch, last, of=kind, where=lambda distiller: getattr(distiller, "steps", 0) == steps)


ROUNDS = ("base", "round-0004", "round-0002", "round-0001")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted chain."""
    out = tmp_path_factory.mktemp("chain") / "whole"
    train_whole(main, arguments(out))
    return out


def test_a_chain_from_noise_to_one_step(whole: Path, command: Command) -> None:
    from diffusers import UNet2DModel

    for name, steps in zip(ROUNDS, (1024, 4, 2, 1), strict=True):
        network, role = whole / name / ("teacher" if steps == 1024 else "student"), "student"
        said = json.loads((network / "adm.json").read_text())
        assert said.items() >= {"prediction": "x", "timesteps": 1024, "steps": steps, "schedule": "cosine"}.items()
        loaded = dict(UNet2DModel.from_pretrained(network).state_dict())
        weights, state = read_checkpoint(whole / name / "checkpoints/last")
        if steps == 1024:
            role = "teacher"
            averages = {k.removeprefix("average."): v for k, v in state["extra"].items()}
            assert_same(loaded, averages)
            assert any(not torch.equal(loaded[k], v) for k, v in weights[role].items())
        else:
            assert_same(loaded, weights[role])
        assert weights.keys() == {role}
        summary = json.loads((whole / name / "summary.json").read_text())
        assert summary["status"] == "finished" and summary["step"] == (4 if steps == 4 else 5)
    rows = {name: metrics(whole / name) for name in ROUNDS}
    assert [row["lr"] for row in rows["base"]] == pytest.approx([5e-4, 1e-3, 1e-3])  # at steps 2, 4, 5
    share = [(1 + math.cos(math.pi * done / 4)) / 2 for done in (1, 3)]
    assert [row["lr"] for row in rows["round-0004"]] == pytest.approx([3e-4 * s for s in share])
    assert all("student/consensus" in row and "adm/active" in row for row in rows["round-0001"])
    assert all(row["adm/active"] == 1 for row in rows["round-0001"])
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["students"]["1"] == str(whole / "round-0001/student") and summary["method"] == "pd+adm"
    for name in ROUNDS:
        check_log(whole / name, f"{'teacher' if name == 'base' else 'student'} (", "48 training images")
    assert "round 2 of 4: 4-step student" in (whole / "log.txt").read_text()
    code, _, said = command(arguments(whole))
    assert code == 0 and "is finished" in said


def test_a_resumed_chain_does_not_ask_for_what_its_finished_base_network_started_from(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, out = diffusers_folder(tmp_path / "start"), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, 2)
        assert command(arguments(out, "--init", str(start)))[0] == 130
    shutil.rmtree(start)
    code, _, said = command(arguments(out, "--init", str(start)))
    assert code == 0, said


def test_interrupted_in_the_middle_of_rounds_and_resumed_equals_uninterrupted(
    whole: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"
    for steps, last in ((0, 3), (2, 2)):  # in the base network's training, then in the 2-step student's
        with monkeypatch.context() as patch:
            stop_at(patch, steps, last)
            assert command(arguments(out))[0] == 130
    assert not (out / "round-0001").exists() and not (out / "summary.json").exists()
    code, _, said = command(arguments(out))
    assert code == 0 and f"resuming from step {last}" in said
    for name in ROUNDS:
        assert_same_runs(whole / name, out / name)
        for file in (whole / name).glob("*/*.safetensors"):
            assert file.read_bytes() == (out / file.relative_to(whole)).read_bytes()


def test_killed_before_a_students_folder_was_written(whole: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "killed"
    shutil.copytree(whole, out, symlinks=True)
    for path in (out / "round-0002/student", out / "round-0001"):
        shutil.rmtree(path)
    (out / "summary.json").unlink()
    before = (out / "base/metrics.jsonl").stat().st_mtime_ns
    assert command(arguments(out))[0] == 0
    assert (out / "base/metrics.jsonl").stat().st_mtime_ns == before
    for name in ROUNDS[2:]:
        for file in (whole / name).glob("student/*.safetensors"):
            assert file.read_bytes() == (out / file.relative_to(whole)).read_bytes()


def test_a_teachers_folder_starts_a_chain_and_adm_acts_in_its_rounds_alone(
    whole: Path, tmp_path: Path, command: Command
) -> None:
    teacher = ["--teacher", str(whole / "base/teacher"), "--adm.adm_rounds", "[1]", "--chain", "[4,2,1]"]
    code, _, said = command(arguments(tmp_path / "run", *teacher))
    assert code == 0, said
    assert not (tmp_path / "run/base").exists()
    assert all("student/consensus" not in row for row in metrics(tmp_path / "run/round-0002"))
    assert all("student/consensus" in row for row in metrics(tmp_path / "run/round-0001"))


def test_it_learns_the_target(tmp_path: Path, command: Command) -> None:
    """A chain of one student on 400 digits: each network's error falls to a fraction."""
    more = ["--data.limit", "400", "--base.steps", "60", "--base.ema", "0.8", "--base.lr", "3e-3", "--chain", "[2,1]"]
    more += ["--rounds.last_steps", "20", "--rounds.lr", "1e-3", "--fit.log_every", "10", "--fit.evaluate_every", "999"]
    code, _, said = command(arguments(tmp_path / "run", *more))
    assert code == 0, said
    base = [row["teacher/mse"] for row in metrics(tmp_path / "run/base")]
    student = [row["student/mse"] for row in metrics(tmp_path / "run/round-0001")]
    assert base[-1] < 0.5 * base[0] and student[-1] < 0.7 * student[0], (base, student)


def test_a_diverging_run_names_network_term_and_step(tmp_path: Path, command: Command) -> None:
    code, _, said = command(arguments(tmp_path / "run", "--rounds.lr", "1e9", "--fit.clip", "1e9"))
    assert code == 1 and said.strip().splitlines()[-1].startswith("error: the loss is not finite: student's mse is")


def test_dry_run_prints_networks_and_an_estimate(tmp_path: Path, command: Command) -> None:
    code, printed, _ = command(arguments(tmp_path / "run", "--dry-run"))
    assert code == 0 and not (tmp_path / "run").exists()
    for line in ("base network:", "map C x H x W: 8x8x8", "4-step student, ADM: 4 steps\n", "base: memory: about"):
        assert line in printed
    assert "estimate:" not in printed
    code, printed, _ = command(arguments(tmp_path / "run", "--dry-run", "--time"))
    for line in ("4-step student, ADM: 4 steps of", "1-step student, ADM: 5 steps of", "estimate:"):
        assert line in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--chain", "[8,4,1]"], "1 is not half of 4"),
        (["--chain", "[8,3]"], "3 is not half of 8"),
        (["--chain", "[8]"], "at least one student's"),
        (["--chain", "[12,6]", "--method", "pd"], "12 steps do not divide the schedule's 1024"),
        (["--method", "pd", "--adm.alpha", "2"], "--adm.alpha counts only with --method pd+adm"),
        (["--adm.adm_rounds", "[16]"], "ADM would never act"),
        (["--fit.steps", "3"], "give --base.steps"),
        (["--batch_size", "64"], "48 images are fewer than one batch of 64"),
        (["--fit.accumulate", "32"], "cannot be cut into 32 parts"),
        (["--network.multipliers", "[1,2,2,2,2]"], "cannot be halved 4 times"),
        (["--adm.form", "classifier", "--adm.classifier", "resnet56:/nowhere"], "no weight file /nowhere"),
        (["--adm.attention", "uniform"], "adm.attention is adm.control now"),
        (["--base.stepss", "3"], "did you mean base.steps?"),
        (["--data.name", "folder", "--data.root", "/nowhere"], "data folder /nowhere does not exist"),
        (["--teacher", "/nowhere"], "--teacher /nowhere holds no network"),
        (["--teacher", "x", "--init", "y"], "give one of them"),
        (["--rounds.lr", "0"], "rounds.lr must be positive"),
        (["--base.ema", "1"], "base.ema must be in"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path: Path, command: Command, more: list[str], said: str) -> None:
    code, _, error = command(arguments(tmp_path / "run", *more))
    assert code == 2 and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["null", "3"])
def test_a_group_of_options_that_is_none_is_refused(tmp_path: Path, command: Command, value: str) -> None:
    (tmp_path / "config.yaml").write_text(f"base: {value}\n")
    code, _, error = command(arguments(tmp_path / "run", "--config", str(tmp_path / "config.yaml")))
    assert code == 2 and error.count("\n") == 1 and "base" in error, error
    assert not (tmp_path / "run").exists()


def test_what_the_memory_cannot_hold_is_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse_config(ProgressiveConfig, arguments(tmp_path / "run")[1:])[0]
    size = 4 * sum(p.nbytes for p in build_unet(options.network, 1, 8).parameters())  # as Adam trains it
    for total, said in ((size - 1, "to train a U-Net of this size needs"), (size, "--batch_size 16 (less with")):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))  # noqa: B023
        code, _, error = command(arguments(tmp_path / "run"))
        assert code == 2 and error.count("\n") == 1 and said in error, error
        assert not (tmp_path / "run").exists()


def test_lengths_that_were_probably_meant_otherwise_are_noted(tmp_path: Path) -> None:
    more = ["--base.warmup", "5", "--adm.adm_rounds", "[2,64]"]
    parse_config(ProgressiveConfig, arguments(tmp_path, *more)[1:])
    assert notices() == [
        "base.warmup 5 is as long as base.steps: the rate never gets there",
        "adm.adm_rounds: the chain has no student of [64] steps",
    ]


def test_teachers_that_do_not_fit_are_refused(whole: Path, tmp_path: Path, command: Command) -> None:
    student = str(whole / "round-0004/student")
    broken = tmp_path / "nan"
    network = unet()
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] = math.nan
    save_student(broken, network, "x", 1024, 1024)
    eps = diffusers_folder(tmp_path / "eps")
    for more, said in (
        (["--teacher", student, "--predict", "v", "--chain", "[4,2]"], "predicts x, --predict says v"),
        (["--teacher", student, "--chain", "[8,4]"], "samples in 4 steps, the chain begins at 8"),
        (["--teacher", student, "--chain", "[4,2]", "--network.width", "16"], "block_out_channels (8, 16), --network"),
        (["--teacher", student, "--chain", "[4,2]", "--timesteps", "512"], "has times 0..1024, --timesteps says 512"),
        (["--teacher", student, "--chain", "[4,2]", "--data.name", "cifar10"], "cifar10 is missing"),
        (["--teacher", str(broken)], "conv_in.weight is not finite"),
        (["--teacher", str(eps)], "'epsilon' on the schedule 'linear' of 1000 times"),
    ):
        code, _, error = command(arguments(tmp_path / "run", *more))
        assert code == 2 and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "run").exists()


def test_config_of_a_run_is_read_back(whole: Path) -> None:
    for run in (whole, whole / "round-0002"):
        again, _ = parse_config(ProgressiveConfig, ["--config", str(run / "config.yaml")])
        assert again.resolved() == parse_config(ProgressiveConfig, arguments(whole)[1:])[0].resolved()


def test_another_config_in_the_same_folder_is_refused(whole: Path, command: Command) -> None:
    code, _, error = command(arguments(whole, "--rounds.lr", "1e-4"))
    assert code == 2 and "rounds.lr" in error


def test_recipes_parse_and_write_down_what_decides_the_results() -> None:
    config, dry = parse_config(ProgressiveConfig, ["--config", str(RECIPES / "cifar10_progressive.yaml"), "--dry-run"])
    default = ProgressiveConfig()
    assert dry and config.resolved() == default.resolved()  # the defaults are Sun et al.'s
    assert sum(config.rounds.length(steps) for steps in config.students) == 120_000
    assert [steps for steps in config.students if config.adm_of(steps)] == [4, 2, 1]
    assert ProgressiveConfig(adm=ADMConfig(adm_rounds="all")).adm_of(512) is not None
    assert ProgressiveConfig(method="pd").adm_of(1) is None and "adm" not in ProgressiveConfig(method="pd").resolved()
    assert "out" not in default.resolved()
    check_chain([8192, 4096], 8192)
    with pytest.raises(InputError):
        check_chain([2, 1, 0], 1024)


def test_help_and_unknown_commands(command: Command) -> None:
    code, printed, _ = command(["--help"])
    assert code == 0 and "progressive" in printed
    code, _, error = command(["progresive"])
    assert code == 2 and "did you mean 'progressive'?" in error


def test_pictures_of_a_tracked_chain_change_nothing_in_it(whole: Path, tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train_whole(main, arguments(out, "--fit.trackers", "[tensorboard]"))
    for name, steps, frames in (("base", (4, 5), 17), ("round-0004", (4,), 5), ("round-0001", (4, 5), 2)):
        assert_same_runs(whole / name, out / name)
        assert not (whole / name / "figures").exists()  # without a tracker nobody asked for pictures
        role = "teacher" if name == "base" else "student"
        wanted = {f"samples-{role}-{step:08d}.png" for step in steps} | {f"trajectory-{role}.gif"}
        assert {file.name for file in (out / name / "figures").iterdir()} == wanted
        (folder,) = (out / name / "tensorboard").iterdir()
        board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
        shown = board.Images(f"evaluation/{role}/samples")
        assert [event.step for event in shown] == list(steps)
        picture = Image.open(out / name / f"figures/samples-{role}-{steps[-1]:08d}.png")
        assert picture.size == (shown[-1].width, shown[-1].height) == (3 * (8 * 9 - 1), 3 * (2 * 9 - 1))
        assert Image.open(out / name / f"figures/trajectory-{role}.gif").n_frames == frames
        assert board.Scalars(f"train/{role}/mse")
    assert board.Scalars("train/adm/similarity")
