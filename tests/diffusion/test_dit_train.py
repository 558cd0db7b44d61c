"""`train.py dit` as a command: what a run leaves, how it resumes, two processes, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import (
    CPU,
    ROOT,
    Gradients,
    assert_same,
    assert_same_runs,
    check_log,
    gradients_of,
    in_two_processes,
    metrics,
    stop_at,
    train_whole,
)  # fmt: skip

pytest.importorskip("diffusers")

from small_dit import dit

from core.training.checkpoint import read_checkpoint
from core.training.distiller import Progress
from diffusion.dit.config import DiTTrainingConfig
from diffusion.dit.convert import load_dit, save_dit
from diffusion.dit.distiller import DiTDistiller
from diffusion.dit.model import DiT, DiTConfig
from diffusion.tools.train import main
from diffusion.training import parse_config

Command = Callable[[list[str]], tuple[int, str, str]]
RECIPES = ROOT / "diffusion/recipes"
TEACHER = DiTConfig(None, width=24, depth=2, heads=3, patch=2)
STEPS = (4, 8, 9)  # at which there is an export


@pytest.fixture
def command(shell: Any, quick: None) -> Command:
    return lambda argv: shell(main, argv)


def arguments(out: Path, *more: str, method: str = "mse+adm") -> list[str]:
    """Nine steps on 80 digits, five to the epoch; a student of 14,000 parameters."""
    network = ["--student.width", "16", "--student.depth", "2", "--student.heads", "2", "--batch_size", "16"]
    fit = ["--fit.steps", "9", "--fit.log_every", "2", "--fit.evaluate_every", "4", *CPU]
    rest = ["--data.limit", "80", "--progress_bar", "false", "--out", str(out)]
    recipe = ["dit", "--config", str(RECIPES / "dit_digits.yaml"), "--method", method]
    return [*recipe, *network, *fit, *rest, *more]


ONLINE = [
    "--teacher", "online", "--teacher_network.width", "24", "--teacher_network.depth", "2",
    "--teacher_network.heads", "3",
]  # fmt: skip


def export(run: Path, step: int, role: str = "student") -> Path:
    return run / f"export/step-{step:08d}" / role


def train_once(out: Path, *more: str, method: str = "mse+adm") -> Path:
    train_whole(main, arguments(out, *more, method=method))
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network alone, wider than the student."""
    more = ["--student.width", "24", "--student.heads", "3", "--fit.steps", "4"]
    return train_once(tmp_path_factory.mktemp("teacher") / "run", *more, method="vanilla")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """An uninterrupted distillation from the run's last export."""
    return train_once(tmp_path_factory.mktemp("whole") / "run", "--teacher", str(teacher))


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted one whose teacher trains along."""
    return train_once(tmp_path_factory.mktemp("online") / "run", *ONLINE)


def test_exports_are_the_averages_and_load(whole: Path, online: Path) -> None:
    from diffusion.dit.sampling import load_dit_student

    check_log(whole, "teacher (fixed, ", "80 training images, 10 classes")
    for run, roles in ((whole, {"student"}), (online, {"teacher", "student"})):
        for step, role in itertools.product(STEPS, roles):
            assert f"{role}'s average is in {export(run, step, role)}" in (run / "log.txt").read_text()
        assert [p.name for p in sorted((run / "export").iterdir())] == [f"step-{n:08d}" for n in STEPS]
        weights, state = read_checkpoint(run / "checkpoints/last")
        assert weights.keys() == roles  # a fixed teacher is not written again
        for role in roles:
            averages = {
                k.removeprefix(f"averages.{role}."): v
                for k, v in state["extra"].items()
                if k.startswith(f"averages.{role}.")
            }
            assert_same(dict(load_dit(export(run, 9, role)).state_dict()), averages)
            assert any(not torch.equal(averages[k], v) for k, v in weights[role].items())
            assert all(v.dtype == torch.float32 for v in averages.values())
        for step in STEPS:
            for role in roles:
                said = json.loads((export(run, step, role) / "adm.json").read_text())
                assert said["step"] == step and said["latent_scale"] is None and said["classes"] == 10
            student = load_dit_student(export(run, step), "cpu")
            images = student.sample(range(2), seed=0, steps=2, sampler="ddim")
            assert images.shape == (2, 1, 8, 8) and images.dtype == torch.uint8
        # phi is kept for resuming and exported nowhere
        assert "adapter.conv.weight" in state["extra"] and not any("adapter" in key for key in weights["student"])
        assert sum(p.numel() for p in load_dit(run).parameters()) == sum(v.numel() for v in weights["student"].values())
    first, last = (load_dit(export(whole, step)).state_dict() for step in (4, 9))
    assert any(not torch.equal(first[k], v) for k, v in last.items())


def test_what_a_run_logs(whole: Path, online: Path, teacher: Path) -> None:
    terms = {"mse", "vlb", "distill", "consensus", "phi"}
    for run, wanted in (
        (teacher, {"student/mse", "student/vlb"}),
        (whole, {f"student/{t}" for t in terms}),
        (online, {*(f"student/{t}" for t in terms), *(f"teacher/{t}" for t in ("mse", "vlb", "divergence"))}),
    ):
        rows = [row for row in metrics(run) if row["kind"] == "train"]
        assert [row["step"] for row in rows] == ([2, 4] if run == teacher else [2, 4, 6, 8, 9])
        for row in rows:
            assert {k for k in row if k.partition("/")[0] in ("student", "teacher")} == wanted
            assert row["lr"] == 2e-3  # constant
            assert ("adm/active" in row) == (run != teacher)
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "finished" and summary["step"] == rows[-1]["step"]
        assert set(summary["networks"]) == ({"student"} if run == teacher else {"teacher", "student"})


@pytest.mark.parametrize("kind", ["fixed", "online"])
def test_interrupted_and_resumed_equals_uninterrupted(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Path = request.getfixturevalue("whole" if kind == "fixed" else "online")
    given = ONLINE if kind == "online" else ["--teacher", str(request.getfixturevalue("teacher"))]
    out = tmp_path / "cut"
    for last in (3, 7):  # within an epoch and a log window, before and after an export
        with monkeypatch.context() as patch:
            stop_at(patch, last, of=DiTDistiller)
            assert command(arguments(out, *given))[0] == 130
    code, _, said = command(arguments(out, *given))
    assert code == 0 and "resuming from step 7" in said
    assert_same_runs(run, out)
    files = sorted(file.relative_to(run) for file in (run / "export").rglob("*") if file.is_file())
    assert len(files) >= 3 * 5
    for file in files:
        assert (run / file).read_bytes() == (out / file).read_bytes(), file
    code, _, said = command(arguments(out, *given))
    assert code == 0 and "is finished" in said


def test_accumulated_parts_give_the_whole_batchs_gradient(teacher: Path, tmp_path: Path, command: Command) -> None:
    found = []
    for parts in ("1", "4"):
        out = tmp_path / parts
        more = ["--teacher", str(teacher), "--fit.accumulate", parts, "--fit.steps", "1", "--fit.log_every", "1"]
        assert command(arguments(out, *more))[0] == 0
        found.append((metrics(out)[0], read_checkpoint(out / "checkpoints/last")[1]["optimizer"]["state"]))
    for name in ("student/mse", "student/vlb", "student/distill", "student/consensus", "student/phi", "adm/active"):
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=1e-4), name
    for one, other in zip(*(states.values() for _, states in found), strict=True):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-6)


def test_a_teacher_from_wherever_it_lies(teacher: Path, tmp_path: Path, command: Command) -> None:
    """The run, its export and diffusers' folder in it are the same; a checkpoint holds the weights, not the average."""
    found = {}
    places = [
        teacher,
        export(teacher, 4),
        export(teacher, 4) / "transformer",
        teacher / "checkpoints/last/student.safetensors",
    ]
    for n, place in enumerate(places):
        out = tmp_path / str(n)
        code, _, said = command(arguments(out, "--teacher", str(place), "--fit.steps", "1", "--fit.log_every", "1"))
        assert code == 0, said
        found[n] = metrics(out)[0]["student/distill"]
    assert found[0] == found[1] == found[2] != found[3]


def test_it_learns(tmp_path: Path, command: Command) -> None:
    """On 80 digits the noise's error falls, and a student of the trained network comes close to it."""
    longer = ["--fit.steps", "60", "--fit.log_every", "10", "--fit.evaluate_every", "60", "--ema", "0.9"]
    wide = ["--student.width", "32", "--student.heads", "4", "--lr", "3e-3"]
    assert command(arguments(tmp_path / "t", *longer, *wide, method="vanilla"))[0] == 0
    rows = [row["student/mse"] for row in metrics(tmp_path / "t") if row["kind"] == "train"]
    assert rows[-1] < 0.5 * rows[0] < 0.6
    more = ["--teacher", str(tmp_path / "t"), "--lr", "3e-3"]
    assert command(arguments(tmp_path / "s", *longer, *more))[0] == 0
    rows = [row for row in metrics(tmp_path / "s") if row["kind"] == "train"]
    for name, share in (("student/mse", 0.5), ("student/distill", 0.2), ("student/phi", 0.8)):
        assert rows[-1][name] < share * rows[0][name], name
    assert rows[-1]["adm/similarity"] > rows[0]["adm/similarity"]


def test_a_loss_that_is_not_finite_stops_the_run(teacher: Path, tmp_path: Path, command: Command) -> None:
    """Also where the step of an export comes before the next look at the losses."""
    more = ["--teacher", str(teacher), "--lr", "1e9", "--fit.log_every", "8", "--fit.evaluate_every", "3"]
    code, _, said = command(arguments(tmp_path / "run", *more))
    assert code == 1 and said.strip().splitlines()[-1].startswith("error: the loss is not finite: student's "), said
    assert not (tmp_path / "run/export").exists() and not (tmp_path / "run/checkpoints/last").exists()


def test_a_teacher_with_weights_that_are_not_finite(tmp_path: Path, command: Command) -> None:
    network = dit(TEACHER, channels=1)
    with torch.no_grad():
        network.blocks[0].attn.proj.weight[0, 0] = math.nan  # type: ignore[union-attr,index,operator]
    save_dit(tmp_path / "nan", network)
    code, _, said = command(arguments(tmp_path / "run", "--teacher", str(tmp_path / "nan")))
    assert code == 2 and said.count("\n") == 1 and "is not finite" in said, said


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"config": DiTConfig(None, 24, 2, 3, 4)}, ("patch size 4", "2")),
        ({"size": 16}, ("input size 16", "8")),
        ({"classes": 5}, ("classes 5", "10")),
        ({"channels": 3}, ("channels 3", "1")),
        ({"scale": 0.18215}, ("scale 0.18215", "None")),
    ],
)
def test_teachers_that_do_not_fit(
    network: dict[str, Any], said: tuple[str, str], tmp_path: Path, command: Command
) -> None:
    scale = network.pop("scale", None)
    save_dit(tmp_path / "other", dit(**{"config": TEACHER, "channels": 1, **network}), latent_scale=scale)
    code, _, error = command(arguments(tmp_path / "run", "--teacher", str(tmp_path / "other")))
    assert code == 2 and error.count("\n") == 1 and f"--teacher {tmp_path / 'other'}" in error, error
    assert all(value in error for value in said), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("mse", [], "needs --teacher"),
        ("vanilla", ["--teacher", "x"], "leave --teacher x out"),
        ("mse", ["--teacher", "/nowhere"], "--teacher /nowhere does not exist"),
        ("mse", ["--teacher", "."], "holds no DiT"),
        ("mse", ["--teacher", "online", "--adm.alpha", "2"], "--adm.alpha counts only with --method mse+adm"),
        ("vanilla", ["--distill.weight=2"], "--distill.weight counts only with a teacher"),
        ("mse+adm", ["--teacher", "x", "--adm.beta", "2"], "--adm.beta counts only with --teacher online"),
        ("vanilla", ["--teacher_network.width", "48"], "--teacher_network.width counts only with --teacher online"),
        ("mse", ["--teacher", "online", "--teacher_network.patch", "4"], "patches of 2 pixels, teacher_network of 4"),
        ("vanilla", ["--student.patch", "3"], "cannot be cut into patches of 3"),
        ("vanilla", ["--student.width", "15"], "multiple of 4"),
        ("vanilla", ["--label_dropout", "1"], "--label_dropout must be in [0, 1)"),
        ("vanilla", ["--ema", "1"], "--ema must be in [0, 1)"),
        ("vanilla", ["--lr", "0"], "--lr must be positive"),
        ("vanilla", ["--fit.epochs", "2"], "give --fit.steps"),
        ("vanilla", ["--batch_size", "81"], "81"),
        ("vanilla", ["--fit.accumulate", "32"], "cannot be cut into 32 parts"),
        ("vanilla", ["--data.classes", "7"], "7"),
        ("vanilla", ["--student.widht", "8"], "did you mean student.width?"),
        ("vanilla", ["--student.depth", "16384"], "depth must be in [1, 1024]: 16384"),
        ("mes", [], "mes"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    tmp_path: Path, command: Command, method: str, more: list[str], said: str
) -> None:
    code, _, error = command(arguments(tmp_path / "run", *more, method=method))
    assert code == 2 and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "run").exists()


def test_what_the_memory_cannot_hold_is_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * sum(p.nbytes for p in DiT(DiTConfig(None, 16, 2, 2, 2), 1, 8, 10).parameters())  # as Adam trains it
    for total, said in ((size - 1, "to train a DiT of this size needs"), (size, "--batch_size 16 (less with")):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))  # noqa: B023
        code, _, error = command(arguments(tmp_path / "run", method="vanilla"))
        assert code == 2 and error.count("\n") == 1 and said in error, error
        assert not (tmp_path / "run").exists()


def test_without_label_dropout_no_null_label_is_learned(teacher: Path, tmp_path: Path, command: Command) -> None:
    more = ["--fit.steps", "1", "--label_dropout", "0"]
    assert command(arguments(tmp_path / "run", *more, method="vanilla"))[0] == 0
    assert not load_dit(tmp_path / "run").null_label and load_dit(teacher).null_label
    assert not load_dit(tmp_path / "run/checkpoints/last/student.safetensors").null_label
    code, _, error = command(arguments(tmp_path / "next", "--teacher", str(tmp_path / "run"), method="mse"))
    assert code == 2 and "never learned a null label: give --label_dropout 0" in error and error.count("\n") == 1
    assert not (tmp_path / "next").exists()


def test_another_teacher_or_config_in_the_same_folder_is_refused(
    whole: Path, teacher: Path, tmp_path: Path, command: Command
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(export(teacher, 4), moved)
    code, _, said = command(arguments(whole, "--teacher", str(moved)))
    assert code == 0 and "is finished" in said  # the same weights in another place
    save_dit(tmp_path / "other", dit(TEACHER, channels=1))
    for more in (["--teacher", str(tmp_path / "other")], ["--teacher", str(teacher), "--adm.alpha", "0.5"]):
        code, _, error = command(arguments(whole, *more))
        assert code == 2 and ("not the weight file on record" if len(more) == 2 else "adm.alpha") in error, error
    code, _, error = command(["dit", "--config", str(whole / "config.yaml"), "--teacher", str(tmp_path / "other")])
    assert code == 2 and "is not the weight file on record" in error


def test_config_of_a_run_is_read_back(whole: Path, teacher: Path, online: Path) -> None:
    for run, method, more in (
        (whole, "mse+adm", ["--teacher", str(teacher)]),
        (online, "mse+adm", ONLINE),
        (teacher, "vanilla", ["--student.width", "24", "--student.heads", "3", "--fit.steps", "4"]),
    ):
        again, _ = parse_config(DiTTrainingConfig, ["--config", str(run / "config.yaml")])
        assert (
            again.resolved() == parse_config(DiTTrainingConfig, arguments(run, *more, method=method)[1:])[0].resolved()
        )


def test_dry_run_prints_networks_and_an_estimate(teacher: Path, tmp_path: Path, command: Command) -> None:
    code, printed, said = command(arguments(tmp_path / "run", "--teacher", str(teacher), "--dry-run", "--time"))
    assert code == 0 and not (tmp_path / "run").exists(), said
    for line in (
        "parameters, fixed; 2 blocks of width 24 with 3 heads",
        "parameters; 2 blocks of width 16 with 2 heads",
        "adapter (phi): 384 parameters",
        "5 steps an epoch, 9 in all",
        "  map C x H x W: 16x4x4",
        "memory: about",
        "s a step on cpu",
        "estimate:",
    ):
        assert line in printed


def test_recipes() -> None:
    config, dry = parse_config(
        DiTTrainingConfig, ["--config", str(RECIPES / "dit_imagenet.yaml"), "--teacher", "online", "--dry-run"]
    )
    default = DiTTrainingConfig(teacher="online")
    said, known = config.resolved(), default.resolved()
    for values in (said, known):
        values.pop("data")
    assert dry and said == known  # the defaults are DiT's
    assert config.student.resolved() == (384, 12, 6, 2) and config.teacher_network.resolved() == (768, 12, 12, 2)
    assert (config.fit.steps, config.batch_size, config.lr, config.ema) == (400_000, 256, 1e-4, 0.9999)
    assert config.fit.clip is None and config.weight_decay == 0 and config.label_dropout == 0.1
    assert config.adm.gate * 1000 == 400 and 100_000 % (config.fit.evaluate_every or 0) == 0
    for name in ("dit_digits", "dit_cifar10"):
        config, _ = parse_config(DiTTrainingConfig, ["--config", str(RECIPES / f"{name}.yaml"), "--teacher", "online"])
        assert config.student.resolved()[0] < config.teacher_network.resolved()[0]


def test_help(command: Command) -> None:
    code, printed, _ = command(["--help"])
    assert code == 0 and "progressive, dit" in printed
    code, printed, _ = command(["dit", "--help"])
    assert code == 0 and "--distill.task_weight" in printed and "--adm.map" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "steps", "tolerance"), [("fp32", 4, 1e-3), ("bf16", 1, 2e-2)])
def test_compiled_equals_eager(
    precision: str, steps: int, tolerance: float, teacher: Path, tmp_path: Path, command: Command
) -> None:
    """In bf16 at the first step alone: after it, Adam makes much of the gradients' last bits."""
    rows = []
    for compiled in ("false", "true"):
        out = tmp_path / compiled
        more = ["--fit.compile", compiled, "--fit.precision", precision, "--fit.steps", str(steps)]
        code, _, said = command(arguments(out, "--teacher", str(teacher), *more))
        assert code == 0, said
        rows.append([row for row in metrics(out) if row["kind"] == "train"])
    for eager, other in zip(*rows, strict=True):
        for name in ("student/mse", "student/vlb", "student/distill", "student/consensus", "student/phi"):
            assert other[name] == pytest.approx(eager[name], rel=tolerance), name


# --- two processes ----------------------------------------------------------------------------------------------------

KINDS: dict[str, list[str]] = {"fixed": [], "online": ONLINE, "gamma": ["--adm.gamma", "0.5", "--fit.accumulate", "2"]}


def train_reproducibly(out: Path, teacher: str, kind: str) -> Gradients:
    """Three steps with times and noise that follow from each image; the gradients of each step."""

    def before_step(self: DiTDistiller, batch: Any, progress: Progress) -> Any:
        image = batch["image"]
        t = (image.abs().sum((1, 2, 3)) * 7919).long() % 1000
        return {**batch, "t": t, "noise": torch.sin(50 * image + torch.arange(64.0).view(1, 1, 8, 8))}

    with gradients_of(torch.optim.AdamW) as (patch, gradients):
        patch.setattr(DiTDistiller, "before_step", before_step)
        given = [] if kind == "online" else ["--teacher", teacher]
        more = ["--fit.steps", "3", "--fit.log_every", "1", *given, *KINDS[kind]]
        assert main(arguments(out, *more)) == 0
    return gradients


def work(out: Path, teacher: str) -> None:
    """What each of the two processes does."""
    report = {kind: train_reproducibly(out / kind, teacher, kind) for kind in KINDS}
    torch.save(report, out.parent / f"report{os.environ['RANK']}.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_two_processes_train_as_one(tmp_path: Path, teacher: Path) -> None:
    in_two_processes(__file__, tmp_path / "two", teacher)
    reports = [torch.load(tmp_path / f"report{rank}.pt", weights_only=True) for rank in (0, 1)]
    for kind in KINDS:
        one = train_reproducibly(tmp_path / "one" / kind, str(teacher), kind)
        assert len(one) == 3
        for report in reports:
            for expected, found in zip(one, report[kind], strict=True):
                for a, b in zip(expected, found, strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()) + 1e-7)
        runs = [tmp_path / "one" / kind, tmp_path / "two" / kind]
        for expected_row, found_row in zip(*map(metrics, runs), strict=True):
            assert found_row.keys() == expected_row.keys()
            for name in expected_row.keys() - {"kind"}:
                # Extremes are each process's own, and logged is their mean.
                if not name.endswith(("_min", "_max")):
                    assert found_row[name] == pytest.approx(expected_row[name], rel=2e-3, abs=1e-6), name
        averages = [load_dit(run).state_dict() for run in runs]
        for name, value in averages[0].items():
            torch.testing.assert_close(averages[1][name], value, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])


def test_pictures_of_a_tracked_run_change_nothing_in_it(online: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_once(tmp_path / "run", *ONLINE, "--fit.trackers", "[tensorboard]")
    assert_same_runs(online, run)
    (folder,) = (run / "tensorboard").iterdir()
    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    for role in ("teacher", "student"):
        shown = board.Images(f"evaluation/{role}/samples")
        assert [event.step for event in shown] == list(STEPS)
        assert len({event.encoded_image_string for event in shown}) == len(STEPS)  # as the network stands then
        for step in STEPS:
            assert (run / f"figures/samples-{role}-{step:08d}.png").is_file()
        assert (run / f"figures/trajectory-{role}.gif").is_file() and board.Scalars(f"train/{role}/mse")
    assert board.Scalars("train/adm/similarity")
