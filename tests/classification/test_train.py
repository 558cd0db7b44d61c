"""The training command on real digits: exact resuming, exit codes, one line for everything that goes wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import (
    ROOT,
    arguments,
    assert_same,
    assert_same_runs,
    check_log,
    cut_at,
    environment,
    metrics,
    stop_at,
    undrawn,
)

from classification.config import parse_command
from classification.distiller import ClassificationDistiller
from classification.experiment import build
from classification.tools.train import main
from core.training.checkpoint import numbered, read_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


# --- exact resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "more"),
    [
        ((6, 8), []),
        ((4,), ["--fit.accumulate", "3", "--fit.clip", "1.0"]),
        ((5,), ["--dml.update", "alternate", "--channels_last", "true", "--optimizer.nesterov", "true"]),
    ],
    ids=["epoch_then_mid_epoch", "accumulated", "alternate"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path,
    command: Callable[[list[str]], tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[int, ...],
    more: list[str],
) -> None:
    assert command(arguments(tmp_path / "whole", *more))[0] == 0
    argv = arguments(tmp_path / "cut", *more)
    for stop in stops:
        cut_at(stop, argv, command, monkeypatch)
        assert json.loads((tmp_path / "cut/summary.json").read_text())["status"] == "interrupted"
    code, _, said = command(argv)
    assert code == 0 and f"resuming from step {stops[-1]}" in said
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    weights, state = read_checkpoint(tmp_path / "cut/checkpoints/last")
    assert weights.keys() == {"teacher", "student"}
    assert "adm.adm.student:teacher.adapter.conv.weight" in state["extra"]
    assert [line["step"] for line in metrics(tmp_path / "cut") if line["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in metrics(tmp_path / "cut") if line["kind"] == "evaluation"] == [3, 6, 9, 12]

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.name != "log.txt" and p.is_file()}
    code, _, said = command(argv)
    assert code == 0 and "is finished" in said and len(said.splitlines()) == 1
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*") if p.name != "log.txt" and p.is_file()}
    assert before == after  # it trained nothing


def start(argv: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "classification/tools/train.py"), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_lines(process: subprocess.Popen[str], run: Path, count: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no {count} lines of metrics: {process.communicate()}")


@pytest.mark.slow
def test_killed_then_terminated_then_resumed_equals_uninterrupted(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    more = ["--fit.log_every", "1", "--fit.epochs", "8"]
    argv = arguments(tmp_path / "cut", *more)
    process = start(argv)
    wait_for_lines(process, tmp_path / "cut", 6)  # 3 steps, an evaluation, 2 steps more
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut/summary.json").exists()
    first = json.loads(json.dumps(read_checkpoint(tmp_path / "cut/checkpoints/last")[1]["step"]))
    process = start(argv)
    wait_for_lines(process, tmp_path / "cut", 4 * (first // 3) + 5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and f"resuming from step {first}" in said and "Traceback" not in said
    second = read_checkpoint(tmp_path / "cut/checkpoints/last")[1]["step"]
    assert first < second < 24 and said.splitlines()[-1].startswith(f"interrupted at step {second} of 24")
    assert command(argv)[0] == 0
    assert command(arguments(tmp_path / "whole", *more))[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Killed(Exception):
        pass

    def kill(self: ClassificationDistiller, batch: Any, progress: Any) -> None:
        if progress.step == 5:
            raise Killed

    argv = arguments(tmp_path / "run", "--fit.trackers", "[tensorboard]", "--fit.log_every", "1", "--fit.epochs", "3")
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationDistiller, "after_step", kill)
        with pytest.raises(Killed):
            main(argv)
    assert metrics(tmp_path / "run")[-1]["step"] == 5  # two steps after the checkpoint
    time.sleep(1.1)  # the names of TensorBoard's files, and with them their order, count seconds
    assert main(argv) == 0
    (folder,) = (tmp_path / "run/tensorboard").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = events.Scalars("train/student/ce")
    logged = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [point.step for point in shown] == list(range(1, 10)) == [line["step"] for line in logged]
    assert [point.value for point in shown] == pytest.approx([line["student/ce"] for line in logged])


def test_seeds_and_methods(tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]) -> None:
    quick = ["--fit.epochs", "1"]
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert command(arguments(tmp_path / name, *quick, *more))[0] == 0
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    weights = [read_checkpoint(tmp_path / name / "checkpoints/last")[0]["student"] for name in "ac"]
    assert not torch.equal(weights[0]["fc.weight"], weights[1]["fc.weight"])


def test_a_students_start_and_data_do_not_depend_on_method_or_teacher(tmp_path: Path) -> None:
    starts, batches = [], []
    for method, more in (
        ("vanilla", []),
        ("dml+adm", []),
        ("dml", ["--networks.teacher.name", "cifar_resnet14"]),
        ("dml+adm", ["--seed", "1"]),
    ):
        experiment = build(parse_command(arguments(tmp_path / "x", *more, method=method)))
        starts.append({k: v.clone() for k, v in experiment.distiller.networks["student"].state_dict().items()})
        batches.append(next(iter(experiment.train_loader(None))))
    for k in (1, 2):
        assert_same(starts[0], starts[k])
        assert_same(batches[0], batches[k])
    assert not torch.equal(starts[0]["fc.weight"], starts[3]["fc.weight"])
    assert not torch.equal(batches[0]["index"], batches[3]["index"])


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_run_folder_is_whole_and_its_config_makes_the_same_run(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    out = tmp_path / "run"
    more = ["--data.validation", "0.2", "--dml.weights", "{teacher: 0.3}", "--fit.trackers", "[tensorboard]"]
    code, printed, said = command(arguments(out, *more, "--fit.epochs", "2"))
    assert code == 0 and printed == "" and "Traceback" not in said
    names = {p.name for p in out.iterdir()}
    assert names == {
        "config.yaml", "run.lock", "environment.json", "metrics.jsonl", "log.txt", "curves.png", "summary.json",
        "checkpoints", "tensorboard",
    }  # fmt: skip
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").rglob("events.out.tfevents.*"))
    check_log(out, "student cifar_resnet8 (", "validation images", "test images", stderr=said)
    (files,) = (line for line in said.splitlines() if "metrics.jsonl" in line)
    assert files.endswith("tensorboard/")
    log = (out / "log.txt").read_text()
    assert log.count("epoch 1/2") == log.count("epoch 2/2") == 1  # the evaluations
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["selected_on"] == "validation" and summary["note"] is None
    assert (
        summary["networks"]["student"]["name"] == "cifar_resnet8" and summary["networks"]["teacher"]["parameters"] > 0
    )
    looks = [line for line in metrics(out) if line["kind"] == "evaluation"]
    for role in ("teacher", "student"):
        for value in ("top1", "top5", "nll", "ece"):
            assert f"{role}/{value}" in looks[0] and f"test/{role}/{value}" in looks[0]
    assert looks[0]["split"] == "validation" and "attention/similarity" in looks[0]
    line = metrics(out)[0]
    wanted = {"teacher/ce", "teacher/kd", "teacher/divergence", "student/ce", "student/kd", "student/consensus"}
    assert {*wanted, "student/phi", "student/feature"} == line.keys() - {"kind", "step", "epoch", "lr"}

    again = ["--config", str(out / "config.yaml"), "--out", str(tmp_path / "again"), "--fit.trackers", "[]"]
    with undrawn():
        assert command(again)[0] == 0
    assert_same_runs(out, tmp_path / "again")
    assert yaml.safe_load((out / "config.yaml").read_text())["dml"]["weights"] == {"teacher": 0.3}


def test_without_validation_best_says_that_it_was_chosen_by_test(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    assert command(arguments(tmp_path / "run", "--fit.epochs", "1", method="vanilla"))[0] == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["selected_on"] == "test" and "read last" in summary["note"]
    assert "adm" not in yaml.safe_load((tmp_path / "run/config.yaml").read_text())


def test_dry_run_prints_and_writes_nothing(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    code, printed, _ = command(arguments(tmp_path / "run", "--dry-run"))
    assert code == 0 and not (tmp_path / "run").exists()
    resolved = yaml.safe_load(printed.partition("\nteacher:")[0])
    assert resolved["adm"]["alpha"] == 0.01 and resolved["networks"]["student"]["name"] == "cifar_resnet8"
    assert "student: cifar_resnet8, 77" in printed and "stage maps C x H x W: 16x8x8, 32x4x4, 64x2x2" in printed
    assert "3 steps an epoch, 12 in all" in printed and "GiB" in printed
    assert "hours" not in printed and "--dry-run --time" in printed


def test_timed_dry_run_takes_the_parts_that_training_takes(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = ClassificationDistiller.forward

    def forward(self: ClassificationDistiller, batch: Any, *rest: Any) -> Any:
        seen.append(len(batch["target"]))
        return real(self, batch, *rest)

    monkeypatch.setattr(ClassificationDistiller, "forward", forward)
    code, printed, said = command(arguments(tmp_path / "run", "--dry-run", "--time", "--fit.accumulate", "3"))
    assert code == 0 and not (tmp_path / "run").exists(), said
    assert seen[-12:] == [4] * 12  # four steps of a batch of 12 in three parts
    assert "3 steps an epoch, 12 in all" in printed and "hours" in printed
    code, _, said = command(arguments(tmp_path / "run", "--time"))
    assert code == 2 and "--dry-run --time" in said


def test_bf16_runs_on_the_cpu(tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]) -> None:
    code, _, said = command(arguments(tmp_path / "run", "--fit.precision", "bf16", "--fit.epochs", "2"))
    assert code == 0, said
    values = [v for line in metrics(tmp_path / "run") for v in line.values() if not isinstance(v, str)]
    assert values and all(v is not None and math.isfinite(v) for v in values)
    weights, _ = read_checkpoint(tmp_path / "run/checkpoints/last")
    assert weights["student"]["fc.weight"].dtype == torch.float32


@pytest.mark.slow
def test_compiled_run_learns_what_the_plain_one_does(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    torch.compiler.reset()  # a run is a process of its own: no sizes of another test's make these dynamic
    short = ["--fit.steps", "2"]
    assert command(arguments(tmp_path / "plain", *short))[0] == 0
    code, _, said = command(arguments(tmp_path / "compiled", *short, "--fit.compile", "true"))
    assert code == 0, said
    plain, compiled = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    weights = [read_checkpoint(tmp_path / name / "checkpoints/last")[0]["student"] for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(weights[0]["fc.weight"], weights[1]["fc.weight"], rtol=1e-3, atol=1e-4)
    for name in ("teacher/ce", "student/ce", "student/consensus", "teacher/divergence", "student/phi"):
        assert compiled[0][name] == pytest.approx(plain[0][name], rel=1e-3)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "dmll+adm"], "unknown method 'dmll+adm': did you mean 'dml+adm'?"),
        (
            ["--networks.student.name", "cifar_resnet9"],
            "unknown network 'cifar_resnet9': did you mean 'cifar_resnet8'?",
        ),
        (["--networks.studnet.name", "cifar_resnet8"], "unknown role 'studnet'"),
        (["--networks.student.nme", "cifar_resnet8"], "did you mean networks.<role>.name?"),
        (["--fit.epoch", "3"], "unknown option fit.epoch: did you mean fit.epochs?"),
        (["--adm.alfa", "3"], "unknown option adm.alfa: did you mean adm.alpha?"),
        (["--adm.alpha", "-1"], "adm.alpha must not be negative: -1.0"),
        (["--dml.weight", "-1"], "dml.weight must not be negative: -1.0"),
        (["--optimizer.lr", "-1"], "must not be negative"),
        (["--networks.student.lr", "-1"], "must not be negative"),
        (["--networks.student.mean", "[0.5, 0.5]"], "student: mean and std need 3 values each"),
        (["--networks.student.weights", "/nonexistent.safetensors"], "/nonexistent.safetensors"),
        (["--adm.consensus", "cd"], "adm.consensus"),
        (["--fit.epochs", "many"], "fit.epochs"),
        (["--batch_size", "1"], "leaves BatchNorm one image at a time"),
        (["--batch_size", "0"], "batch_size must be at least 1: 0"),
        (["--fit.accumulate", "12"], "leaves BatchNorm one image at a time"),
        (["--fit.accumulate", "4"], "leaves BatchNorm one image at a time in the last batch of an epoch (6 images"),
        (["--fit.accumulate", "0"], "fit.accumulate must be at least 1"),
        (["--fit.precision", "fp16"], "fp16 needs a GPU"),
        (["--fit.epochs", "null"], "how long? give --fit.epochs or --fit.steps"),
        (["--fit.steps", "-3"], "fit.steps must be at least 1: -3"),
        (["--fit.epochs", "0.001"], "nothing to train"),
        (["--fit.clip", "-1"], "fit.clip must be positive"),
        (["--fit.trackers", "[tensorbord]"], "unknown tracker 'tensorbord': did you mean 'tensorboard'?"),
        (["--fit.trackers", "[aim]"], "fit.trackers: aim is not installed here"),
        (["--schedule.milestones", "[5, 2]"], "schedule.milestones must rise"),
        (["--data.name", "digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["--data.image_size", "4"], "its last map is 1 x 1"),
        (["--optimizer.lr", ".nan"], "optimizer.lr must be a number: nan"),
        (["--fit.clip", "1e400"], "fit.clip must be at most 1000000000: inf"),
        (["--optimizer.learning_rates", "{a: .inf}"], "optimizer.learning_rates must be at most 1000000000: inf"),
        (["--networks.student.std", "[1, .nan, 1]"], "network cifar_resnet8: std must be a number: nan"),
        (["--schedule.milestones", "[-1, 2]"], "schedule.milestones must not be negative: -1"),
        (["--schedule.factor", "-1"], "schedule.factor must be in (0, 1]: -1.0"),
        (["--optimizer.momentum", "2"], "optimizer.momentum must be in [0, 1): 2.0"),
        (["--seed", str(2**70)], "seed must be in ["),
        (["--data.image_size", "100000"], "data.image_size must be in [4, 4096]: 100000"),
        (["--data.image_size", "1024"], "data.image_size 1024: digits is held in memory, at 256 pixels at most"),
        (["--adm.delta", "[0.2, .nan]"], "adm.delta must be a number: nan"),
        (["--adm", '{"alpha": 0, "beta": 0, "gamma": 0}'], "are all 0: give one of them, or --method dml"),
        (
            ["--networks.student_0.name", "cifar_resnet8"],
            "networks.student_0: a student's roles are student, ",
        ),
        (
            ["--networks.teacher_3.name", "cifar_resnet8"],
            "networks.teacher_3: a teacher's roles are teacher, ",
        ),
        (["--networks.student.sha256", "00"], "sha256 is that of a weight file, and there is none: give weights"),
        (["--networks.teacher_.name", "cifar_resnet8"], "networks.teacher_: a teacher's roles are teacher, "),
        (["--networks.student_1.name", "cifar_resnet8"], "networks.student_1: a student's roles are student, "),
        (["--networks.student.nosuch", "3"], "unknown option networks.student.nosuch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("dry", [False, True], ids=["", "dry"])
def test_wrong_input_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]], more: list[str], message: str, dry: bool
) -> None:
    code, _, said = command(arguments(tmp_path / "run", *more, *(["--dry-run"] if dry else [])))
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_a_key_of_a_recipe_that_is_unknown_is_named(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("networks: {student: {name: cifar_resnet8}}\nfit: {epoch: 3}\n")
    code, _, said = command(["--config", str(recipe), "--out", str(tmp_path / "run")])
    assert code == 2 and len(said.splitlines()) == 1 and "did you mean fit.epochs?" in said
    recipe.write_text("fit: [")
    code, _, said = command(["--config", str(recipe), "--out", str(tmp_path / "run")])
    assert code == 2 and len(said.splitlines()) == 1
    code, _, said = command(["--out", str(tmp_path / "run")])
    assert code == 2 and len(said.splitlines()) == 1 and "no networks" in said
    assert not (tmp_path / "run").exists()


def test_run_folders_of_other_runs_are_refused(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    out = tmp_path / "run"
    assert command(arguments(out, "--fit.epochs", "1"))[0] == 0
    files = sorted(out.rglob("*"))
    for more, key in (
        (["--fit.epochs", "2"], "fit.epochs = 1"),
        (["--fit.epochs", "1", "--adm.alpha", "0.5"], "adm.alpha = 0.01"),
        (["--fit.epochs", "1", "--method", "dml"], "method = 'dml+adm'"),
        (["--fit.epochs", "1", "--networks.student.name", "cifar_resnet14"], "networks.student.name = 'cifar_resnet8'"),
    ):
        code, _, said = command(arguments(out, *more))
        assert code == 2 and f"holds a run with {key}" in said and len(said.splitlines()) == 1, said
    assert sorted(out.rglob("*")) == files
    free = ["--fit.keep", "5", "--data.root", "/elsewhere", "--data.workers", "0", "--progress_bar", "false"]
    code, _, said = command(arguments(out, "--fit.epochs", "1", *free))
    assert code == 0 and "is finished" in said

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    code, _, said = command(arguments(other))
    assert code == 2 and "is not empty and holds no run" in said and len(said.splitlines()) == 1
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    code, _, said = command(arguments(other / "thesis.tex"))
    assert code == 2 and "is a file" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("log_every", ["1", "1000"])
def test_a_loss_that_overflows_ends_the_run(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]], log_every: str
) -> None:
    out = tmp_path / "run"
    code, _, said = command(arguments(out, "--optimizer.lr", "1e9", "--fit.log_every", log_every))
    last = said.splitlines()[-1]
    assert code == 1 and last.startswith("error: the loss is not finite: ") and "at step 3" in last, said
    assert "Traceback" not in said and numbered(out / "checkpoints") == [] and not (out / "summary.json").exists()


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real = torch.save

    def save(value: Any, path: Path) -> None:
        if value["step"] > 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        code, _, said = command(arguments(out))
    assert code == 1 and [line for line in said.splitlines() if line.startswith("error:")] == [said.splitlines()[-1]]
    assert "step-00000006: No space left on device" in said and "Traceback" not in said
    assert [p.name for p in (out / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink()] == ["step-00000003"]
    assert not list(out.rglob("*writing*"))
    assert command(arguments(out))[0] == 0
    assert command(arguments(tmp_path / "whole"))[0] == 0
    assert_same_runs(tmp_path / "whole", out)


def test_damaged_checkpoints(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(arguments(tmp_path / "whole"))[0] == 0
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert command(arguments(out))[0] == 130
    folders = numbered(out / "checkpoints")
    assert [p.name for p in folders] == ["step-00000003", "step-00000006", "step-00000008"][-len(folders) :]
    shutil.copytree(out, tmp_path / "hopeless", symlinks=True)
    weights = folders[-1] / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    code, _, said = command(arguments(out))
    assert code == 0 and "step-00000008 is damaged" in said and "resuming from step 6" in said
    assert_same_runs(tmp_path / "whole", out)

    for folder in numbered(tmp_path / "hopeless/checkpoints"):
        (folder / "state.pt").write_bytes(b"")
    code, _, said = command(arguments(tmp_path / "hopeless"))
    assert code == 2 and "none of the checkpoints in" in said.splitlines()[-1] and "Traceback" not in said
    assert len(numbered(tmp_path / "hopeless/checkpoints")) == len(folders)


@pytest.mark.parametrize(
    ("more", "code"),
    [(["--adm.alhpa", "1"], 2), pytest.param(["--optimizer.lr", "1e9"], 1, marks=pytest.mark.slow)],
)
def test_a_shell_sees_one_line_and_the_exit_code(tmp_path: Path, more: list[str], code: int) -> None:
    process = start(arguments(tmp_path / "run", *more))
    printed, said = process.communicate(timeout=300)
    assert process.returncode == code and printed == "" and len(said.splitlines()) == 1, said


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs the right to mount a tmpfs")
def test_a_really_full_disk_ends_the_run_in_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        argv = arguments(disk / "run", "--fit.keep", "9", "--fit.trackers", "[tensorboard]")
        process = start(argv)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 1, said
        assert said.splitlines()[-1].startswith("error: cannot write") and "Traceback" not in said, said
        kept = [p.name for p in numbered(disk / "run/checkpoints")]
        assert kept and not list((disk / "run").rglob("*writing*"))
        read_checkpoint(disk / "run/checkpoints/last")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_commands_with_one_folder_end_as_one_run_and_a_refusal(tmp_path: Path) -> None:
    """Started at once: one exits 2 in one line that says who trains there, the other's run is whole."""
    command = [sys.executable, "classification/tools/train.py", *arguments(tmp_path / "run")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) for _ in range(2)]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    (refusal,) = [said for said, code in ended if code == 2]
    assert f"{tmp_path / 'run'} is being trained by process " in refusal and "Traceback" not in refusal
    assert main(arguments(tmp_path / "alone")) == 0
    assert_same_runs(tmp_path / "run", tmp_path / "alone")
