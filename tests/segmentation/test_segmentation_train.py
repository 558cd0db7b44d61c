"""The commands from end to end: what a run leaves, exact resuming, errors in one line, evaluation, figure, export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from runs import ROOT, assert_same, assert_same_runs, check_log, in_two_processes, lines, read, train_whole
from street import CONFIGS, DEEPLAB, SHORT, SIZE, TINY, arguments, make_street, stop_at

from core.analysis.attention import AttentionStatistics
from segmentation.experiment import restore
from segmentation.hooks import RunHook
from segmentation.tools.evaluate import main as evaluate
from segmentation.tools.visualize import main as visualize

Train = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(street: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run of DML+ADM, 6 iterations, evaluated after the 3rd and the 6th."""
    from segmentation.tools.train import main

    out = tmp_path_factory.mktemp("run") / "run"
    train_whole(main, arguments(street, out))
    return out


def test_what_a_run_leaves_is_whole(street: Path, tmp_path: Path, train: Train) -> None:
    out = tmp_path / "run"
    command = arguments(street, out, "run.trackers=['tensorboard']")
    code, said, log = train(command)
    assert code == 0, log
    assert said == ""  # stdout is for results
    check_log(out, "teacher ResNet", "student ResNet", "evaluated images", stderr=log)
    files = {path.name for path in out.iterdir()}
    assert files == {
        "config.py", "config.yaml", "run.lock", "environment.json", "metrics.jsonl", "log.txt", "curves.png",
        "summary.json", "checkpoints", "tensorboard", "mmengine", "student.pth", "student.safetensors",
        "student_config.py", "figures",
    }  # fmt: skip
    assert {path.name for path in (out / "checkpoints").iterdir()} == {
        "iter_3.pth", "iter_6.pth", "last.pth", "best.pth",
    }  # fmt: skip
    assert os.readlink(out / "checkpoints/last.pth") == "iter_6.pth"

    logged = lines(out)
    assert [(line["kind"], line["step"]) for line in logged] == [
        ("train", 2), ("evaluation", 3), ("train", 4), ("train", 6), ("evaluation", 6),
    ]  # fmt: skip
    for role, own in (("teacher", {"divergence"}), ("student", {"consensus", "feature", "phi"})):
        assert {key.split("/")[1] for key in logged[0] if key.startswith(f"{role}/")} == {"ce", "aux", "kd"} | own
    assert logged[0]["images_per_second"] > 0
    assert logged[0]["lr"] == pytest.approx(0.03 * (1 - 1 / 5) ** 0.9)

    summary = read(out / "summary.json")
    assert (summary["status"], summary["step"], summary["method"], summary["seed"]) == ("finished", 6, "dml+adm", 0)
    assert summary["last"] == logged[-1]
    for role in ("teacher", "student"):
        classes = [key for key in summary["last"] if key.startswith(f"{role}/IoU.")]
        assert f"{role}/IoU.road" in classes
        mean = sum(summary["last"][key] for key in classes) / len(classes)
        assert summary["last"][f"{role}/mIoU"] == pytest.approx(mean)
        assert 0 < summary["last"][f"{role}/aAcc"] < 100
        assert summary["networks"][role]["parameters"] > 1000
    assert summary["peak_memory_bytes"] > 0
    start = read(out / "environment.json")["starts"][0]
    assert start["versions"]["onedl-mmsegmentation"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for kind in ("train", "evaluation"):
        for name in (key for key in logged[-1 if kind == "evaluation" else 0] if key not in ("kind", "step", "split")):
            shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name.replace('/kd', '/dml')}")]
            assert shown == [(line["step"], pytest.approx(line[name])) for line in logged if line["kind"] == kind]

    assert {file.name for file in (out / "figures").iterdir()} == {"maps-iter_3.png", "maps-iter_6.png"}
    assert [event.step for event in board.Images("evaluation/maps")] == [3, 6]
    found = restore(str(out), None, "iter_6", None, None)
    statistics = AttentionStatistics()
    for batch in found.loader:
        statistics.update(found.model.similarity(found.model.data_preprocessor(batch, False)["inputs"]))
    for name, value in statistics.compute().items():
        assert [event.step for event in board.Scalars(f"evaluation/{name}")] == [3, 6]
        assert board.Scalars(f"evaluation/{name}")[-1].value == pytest.approx(value, rel=1e-5)

    before = (out / "metrics.jsonl").read_bytes()
    code, _, log = train(command)
    assert code == 0
    assert "is finished" in log
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    street: Path, tmp_path: Path, run: Path, train: Train, workers: int
) -> None:
    # 1: between two log points; 3: where it is evaluated. The whole run had no workers.
    command = arguments(street, tmp_path / "run", f"train_dataloader.num_workers={workers}")
    for step in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            code, _, log = train(command)
        assert code == 130
        assert f"interrupted at iteration {step} of 6" in log
        assert read(tmp_path / "run/summary.json")["status"] == "interrupted"
    code, _, log = train(command)
    assert code == 0
    assert "resuming from iteration 3" in log
    assert_same_runs(run, tmp_path / "run")
    assert len(read(tmp_path / "run/environment.json")["starts"]) == 3
    assert_same(*(torch.load(r / "student.pth", weights_only=True) for r in (run, tmp_path / "run")))


@pytest.mark.slow
def test_kdcl_with_two_views_resumes_exactly_too(
    street: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(arguments(street, tmp_path / "whole", method="kdcl+adm"))[0] == 0
    stop_at(monkeypatch, 4)
    assert train(arguments(street, tmp_path / "cut", method="kdcl+adm"))[0] == 130
    monkeypatch.undo()
    assert train(arguments(street, tmp_path / "cut", method="kdcl+adm"))[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_crash_costs_no_more_than_the_iterations_since_the_last_checkpoint(
    street: Path, tmp_path: Path, run: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    real = RunHook.before_train_iter

    def fail(self: Any, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 4:
            raise ZeroDivisionError
        real(self, runner, batch_idx, data_batch)

    command = arguments(street, out, "run.save_every=2", "run.keep=3")
    monkeypatch.setattr(RunHook, "before_train_iter", fail)
    with pytest.raises(ZeroDivisionError):
        train(command)
    monkeypatch.undo()
    assert [p.name for p in sorted((out / "checkpoints").glob("iter_*"))] == ["iter_2.pth", "iter_3.pth", "iter_4.pth"]
    newest = out / "checkpoints/iter_4.pth"
    newest.write_bytes(newest.read_bytes()[:2000])  # and the newest is cut off
    (out / "checkpoints/iter_5.pth.writing").write_bytes(b"half")
    code, _, log = train(command)
    assert code == 0
    assert f"cannot read {newest}" in log
    assert "resuming from iteration 3" in log
    assert not (out / "checkpoints/iter_5.pth.writing").exists()
    assert_same_runs(run, out)


def test_how_often_it_is_evaluated_changes_nothing_in_the_training(
    street: Path, tmp_path: Path, run: Path, train: Train
) -> None:
    assert train(arguments(street, tmp_path / "run", "train_cfg.val_interval=6"))[0] == 0
    once, twice = (torch.load(r / "checkpoints/last.pth", weights_only=True) for r in (tmp_path / "run", run))
    assert_same(once["state_dict"], twice["state_dict"])
    assert_same(once["optimizer"], twice["optimizer"])


@pytest.mark.parametrize("method", ["switokd"])
def test_methods_train_and_start_from_the_same_weights(street: Path, tmp_path: Path, train: Train, method: str) -> None:
    more = ("train_cfg.max_iters=2", "train_cfg.val_interval=2", "run.log_every=1", "optim_wrapper.optimizer.lr=0.0")
    states = []
    for label in ("dml+adm", method):
        code, _, log = train(arguments(street, tmp_path / label, *more, method=label))
        assert code == 0, log
        states.append(torch.load(tmp_path / label / "checkpoints/last.pth", weights_only=True)["state_dict"])
    weights = [k for k in states[1] if k.endswith((".weight", ".bias"))]  # BatchNorm's statistics move
    assert len(weights) > 100
    for name in weights:
        assert torch.equal(states[0][name], states[1][name]), name


def test_offline_distillation_from_a_runs_teacher(street: Path, tmp_path: Path, run: Path, train: Train) -> None:
    weights = run / "checkpoints/last.pth"
    out = tmp_path / "run"
    assert train(arguments(street, out, f"model.teacher_weights={weights}", method="kd+adm"))[0] == 0
    before, after = (torch.load(r / "checkpoints/last.pth", weights_only=True)["state_dict"] for r in (run, out))
    teachers = {key for key in before if key.startswith("teacher.")}
    assert teachers
    for key in teachers:
        assert torch.equal(before[key], after[key]), key
    scores = [read(r / "summary.json")["last"]["teacher/mIoU"] for r in (run, out)]
    assert scores[0] == scores[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(street: Path, tmp_path: Path, train: Train) -> None:
    out = tmp_path / "run"
    code, _, log = train(arguments(street, out, "optim_wrapper.optimizer.lr=1e9"))
    assert code == 1
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "the loss is not finite: " in line
    assert "student's " in line or "teacher's " in line
    assert "at step 2" in line or "at step 3" in line
    assert not list((out / "checkpoints").glob("iter_*")) if (out / "checkpoints").exists() else True
    assert not (out / "student.pth").exists()


def wrong_labels(root: Path) -> Path:
    import cv2

    file = next((root / "gtFine/train").rglob("*.png"))
    label = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    label[:] = 33
    for file in (root / "gtFine/train").rglob("*.png"):
        cv2.imwrite(str(file), label)
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_outside_the_classes_end_in_one_line(tmp_path: Path, train: Train, workers: int) -> None:
    street = wrong_labels(make_street(tmp_path / "street"))
    code, _, log = train(arguments(street, tmp_path / "run", f"train_dataloader.num_workers={workers}"))
    assert code == 2
    (line,) = [line for line in log.splitlines() if line]
    assert line.startswith("error: ")
    assert "gtFine_labelTrainIds.png holds label 33, but there are 19 classes" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["batch_size=1"], "gives BatchNorm one image at a time"),
        (["crop_size=(8,8)"], "ASPPHead a map of 1 x 1 cells"),
        (
            ["model.student.decode_head.num_classes=7", "model.student.auxiliary_head.num_classes=7"],
            "classes and ignores label",
        ),
        (["model.method=dmll"], "unknown method 'dmll': did you mean 'dml'?"),
        (["model.method=kd"], "the method kd needs a trained teacher: give model.teacher_weights=FILE"),
        (["model.teacher_weights=nowhere.pth"], "nowhere.pth"),
        (["model.student.pretrained=nowhere.pth"], "nowhere.pth, and there is no such file"),
        (["data_root=nowhere"], "no folder nowhere/leftImg8bit/train: --data-root nowhere must hold"),
        (["model.student.backbone.dept=18"], "did you mean model.student.backbone.depth?"),
        (["optim_wrapper.type=AmpOptimWrapper"], "mixed precision needs a GPU"),
        (["run.trackers=['tensorbord']"], "unknown tracker 'tensorbord': did you mean 'tensorboard'"),
        (["run.log_every=0"], "run.log_every must be at least 1"),
    ],
)
def test_wrong_input_ends_in_one_line_and_leaves_no_folder(
    street: Path, tmp_path: Path, train: Train, options: list[str], message: str
) -> None:
    if torch.cuda.is_available() and "AmpOptimWrapper" in options[0]:
        pytest.skip("needs a machine without a GPU")
    command = [str(DEEPLAB), "--data-root", str(street), "--out", str(tmp_path / "run")]
    if options[0].startswith("data_root"):
        command[1:3] = []
    code, said, log = train([*command, "--cfg-options", *TINY, *SHORT, *options])
    assert (code, said) == (2, "")
    (line,) = [line for line in log.splitlines() if line]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", ""], "--out is empty: give a value, or leave it out"),
        (["--data-root", ""], "--data-root is empty"),
        (["--seed", "1", "--cfg-options", "seed=2"], "seed is given twice, as 2 and as 1: leave one"),
        (["--out", "x" * 300], "name too long"),
        (["--launcher", "foo"], "invalid choice: 'foo'"),
        (["--launcher", "slurm"], "--launcher slurm did not start this process"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(
    street: Path, tmp_path: Path, train: Train, words: list[str], message: str
) -> None:
    code, said, log = train([*arguments(street, tmp_path / "run"), *words])
    assert (code, said) == (2, "")
    (line,) = [line for line in log.splitlines() if line]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("images", "no image *_leftImg8bit.png in "),
        ("labels", "no label map "),
        ("folder", "no folder "),
    ],
)
def test_data_that_are_not_there_end_in_one_line(tmp_path: Path, train: Train, damage: str, message: str) -> None:
    street = make_street(tmp_path / "street", train=2, val=1)
    if damage == "images":
        for file in (street / "leftImg8bit/val").rglob("*.png"):
            file.unlink()
    elif damage == "labels":
        next((street / "gtFine/train").rglob("*.png")).unlink()
    else:
        (street / "gtFine/val").rename(street / "gtFine/elsewhere")
    code, _, log = train(arguments(street, tmp_path / "run"))
    assert code == 2
    (line,) = [line for line in log.splitlines() if line]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_same_folder_is_an_error(street: Path, run: Path, train: Train) -> None:
    code, _, log = train(arguments(street, run, "model.adm.alpha=0.5"))
    assert code == 2
    assert "holds a run with model.adm.alpha = 0.2, this command says 0.5" in log


def test_a_run_of_before_the_controls_is_recognised(street: Path, run: Path, train: Train, tmp_path: Path) -> None:
    """Its config.yaml and config.py know neither ``adm.control`` and ``adm.delta`` nor ``run.trackers``."""
    old = shutil.copytree(run, tmp_path / "old", symlinks=True)
    config = yaml.safe_load((old / "config.yaml").read_text())
    config["run"].pop("trackers")
    assert not {"control", "delta"} & config["model"]["adm"].keys()
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("environment.json", "summary.json"):
        (old / name).write_text(json.dumps({k: v for k, v in read(old / name).items() if k not in ("run", "sha256")}))
    python = Config.fromfile(str(old / "config.py"))
    for key in ("control", "delta"):
        python.model.adm.pop(key)
    python.run.pop("trackers")
    python.dump(str(old / "config.py"))
    code, _, log = train(arguments(street, old))
    assert code == 0
    assert "is finished" in log
    code, _, log = train([str(old / "config.py"), "--out", str(old)])
    assert (code, "is finished" in log) == (0, True), log
    code, _, log = train(arguments(street, old, "model.adm.control=uniform"))
    assert code == 2
    assert "without model.adm.control, this command says 'uniform'" in log


def in_a_process_of_its_own(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_help_loads_nothing_heavy_and_without_the_extra_a_line_names_it() -> None:
    done = in_a_process_of_its_own(
        "import runpy, sys\n"
        "def run(tool, *arguments):\n"
        "    sys.argv = [tool, *arguments]\n"
        "    try: runpy.run_path(f'segmentation/tools/{tool}.py', run_name='__main__')\n"
        "    except SystemExit as end: return end.code\n"
        "tools = ('train', 'evaluate', 'visualize')\n"
        "assert [run(tool, '--help') for tool in tools] == [0, 0, 0]\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'mmseg', 'mmengine', 'mmcv', 'matplotlib'})\n"
        "sys.modules['mmseg'] = None\n"
        "assert [run(tool, 'x') for tool in tools] == [2, 2, 2]\n"
    )
    assert done.returncode == 0, done.stderr
    assert "--cfg-options" in done.stdout
    assert done.stdout.splitlines()[-1] == ""
    assert done.stderr.splitlines() == ["error: mmseg is not installed: pip install -e '.[segmentation]'"] * 3


@pytest.mark.parametrize("method", ["dml+adm", "switokd", "kdcl"])
def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(
    street: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    command = [*arguments(street, tmp_path / "run", method=method), "--dry-run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("a dry run without --time takes no step"))
        code, said, log = train(command)
    assert code == 0, log
    assert "max_iters: 6" in said
    assert "teacher: ResNetV1c-18 ASPPHead, " in said
    assert "decode head's map C x H x W: 4x6x8" in said  # of the student, at 1/8 of 48 x 64
    assert ("adapter (phi): 32 parameters" in said) == (method == "dml+adm")
    assert "GiB a process" in said
    assert "iterations of" not in said

    code, said, log = train([*command, "--time"])
    assert code == 0, log
    assert "6 iterations of 2 images a process" in said
    assert "estimate: " in said
    assert not (tmp_path / "run").exists()


def test_the_memory_of_a_dry_run_grows_with_the_batch_and_counts_what_backward_needs(street: Path) -> None:
    from mmengine.optim import build_optim_wrapper

    from segmentation.config import build, complete, load_config, parse_options
    from segmentation.training import memory

    def estimated(*options: str) -> int:
        ready = complete(load_config(DEEPLAB, parse_options([*TINY, *options])), 1, "cpu")
        model = build(ready.model)
        return memory(model, build_optim_wrapper(model, ready.optim_wrapper), ready)

    two, four = estimated("batch_size=2"), estimated("batch_size=4")
    both = estimated("batch_size=2", "crop_size=(96,64)")
    assert 2 * 3 * 48 * 64 * 4 < four - two < both - two + (four - two) / 2  # more than the images themselves
    assert both - two == pytest.approx(four - two, rel=0.2)  # twice the area, twice the images


# Evaluation, export, figure


def test_evaluation_says_what_the_training_said(street: Path, run: Path, shell: Any, tmp_path: Path) -> None:
    last = read(run / "summary.json")["last"]
    code, said, _ = shell(evaluate, [str(run), "--out", str(tmp_path / "pair.json")])
    assert code == 0
    values = read(tmp_path / "pair.json")["values"]
    assert values == {key: last[key] for key in values}
    assert {"teacher/mIoU", "student/mIoU", "student/aAcc", "student/IoU.road"} <= values.keys()
    assert said.splitlines()[1].split() == ["%", "teacher", "student"]
    assert f"{last['student/mIoU']:.2f}" in said.splitlines()[2]

    # One network of it, and the exported files, which know nothing of the pair.
    shell(evaluate, [str(run), "--role", "teacher", "--out", str(tmp_path / "teacher.json")])
    assert read(tmp_path / "teacher.json")["values"] == {k: v for k, v in values.items() if k.startswith("teacher/")}
    for file in ("student.pth", "student.safetensors"):
        config = ["--config", str(run / "student_config.py"), "--checkpoint", str(run / file)]
        code, _, log = shell(evaluate, [*config, "--out", str(tmp_path / "student.json")])
        assert code == 0, log
        report = read(tmp_path / "student.json")
        assert report["values"] == {k: v for k, v in values.items() if k.startswith("student/")}
        assert report["images"] == 4


def test_the_best_checkpoint_can_be_evaluated_and_exported(run: Path, shell: Any, tmp_path: Path) -> None:
    code, said, _ = shell(evaluate, [str(run), "--checkpoint", "best", "--export", str(tmp_path / "best")])
    assert code == 0
    best = read(run / "summary.json")["best"]
    report = read(run / f"evaluation-iter_{best['step']}.json")
    assert report["values"] == {key: best[key] for key in report["values"]}
    weights = torch.load(tmp_path / "best/student.pth", weights_only=True)["state_dict"]
    whole = torch.load(run / "checkpoints/best.pth", weights_only=True)["state_dict"]
    assert_same(weights, {k.removeprefix("student."): v for k, v in whole.items() if k.startswith("student.")})
    assert "exported to" in said


def test_the_export_loads_in_mmseg(street: Path, run: Path) -> None:
    model = init_model(str(run / "student_config.py"), str(run / "student.pth"), device="cpu")
    exported = torch.load(run / "student.pth", weights_only=True)
    assert_same(dict(model.state_dict()), exported["state_dict"])
    assert model.dataset_meta["classes"][13] == "car"
    assert list(model.dataset_meta["palette"][13]) == [0, 0, 142]
    image = next((street / "leftImg8bit/val").rglob("*.png"))
    assert inference_model(model, str(image)).pred_sem_seg.data.shape == (1, *SIZE)


def test_the_export_of_a_full_size_student_loads_with_the_stock_config(tmp_path: Path) -> None:
    from segmentation.config import STOCK_CONFIGS, build, load_config
    from segmentation.experiment import export_network, network_model

    cfg = load_config(CONFIGS / "deeplabv3_cityscapes_40k_b16.py")
    student = build(network_model(cfg, "student"))
    metainfo = {"classes": [str(k) for k in range(19)], "palette": [[k, k, k] for k in range(19)]}
    export_network(cfg, student, "student", metainfo, tmp_path)
    stock = STOCK_CONFIGS / "deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"
    model = init_model(str(stock), str(tmp_path / "student.pth"), device="cpu")
    assert_same(dict(model.state_dict()), dict(student.state_dict()))
    assert model.dataset_meta["classes"] == tuple(str(k) for k in range(19))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "give a run folder, or --config and --checkpoint"),
        (["nowhere"], "nowhere is no run folder of segmentation: it has no config.py"),
        (["--config", "x.py"], "--config needs --checkpoint FILE"),
        (["RUN", "--checkpoint", "iter_5"], "has no checkpoint 'iter_5': it has last, best, iter_3, iter_6"),
        (["RUN", "--data-root", "nowhere"], "no folder nowhere/leftImg8bit/val"),
        (["--config", "RUN/config.py", "--checkpoint", "RUN/student.pth"], "of one network alone? name it by --role"),
        (["--config", "RUN/config.py", "--checkpoint", "RUN/config.yaml"], "cannot read "),
        (["--config", "RUN/student_config.py", "--checkpoint", "gone.pth"], "no weight file gone.pth"),
        (["RUN", "--role", "teacher", "--export", "x", "--rolle"], "unknown option --rolle: did you mean --role?"),
    ],
)
def test_wrong_input_to_evaluation_ends_in_one_line(run: Path, shell: Any, command: list[str], message: str) -> None:
    code, _, log = shell(evaluate, [part.replace("RUN", str(run)) for part in command])
    assert code == 2
    (line,) = [line for line in log.splitlines() if line]
    assert message in line


def test_the_figure_has_a_row_for_each_image(run: Path, shell: Any) -> None:
    from PIL import Image

    code, said, _ = shell(visualize, [str(run), "--images", "2"])
    assert code == 0
    assert said == f"written to {run / 'figures/maps.png'}\n"
    two = Image.open(run / "figures/maps.png").size
    shell(visualize, [str(run), "--images", "4", "--checkpoint", "iter_3"])
    four = Image.open(run / "figures/maps-iter_3.png").size
    assert four[0] == pytest.approx(two[0], abs=2)
    assert four[1] > 1.5 * two[1] - 300
    assert shell(visualize, [str(run), "--images", "0"])[0] == 2


def test_a_run_without_adm_has_a_figure_without_similarity(
    street: Path, tmp_path: Path, train: Train, shell: Any
) -> None:
    more = ("train_cfg.max_iters=1", "train_cfg.val_interval=1")
    assert train(arguments(street, tmp_path / "run", *more, method="dml"))[0] == 0
    code, said, _ = shell(visualize, [str(tmp_path / "run"), "--images", "1"])
    assert code == 0
    assert "there is no S to draw" in said
    assert (tmp_path / "run/figures/maps.png").stat().st_size > 5000


# Minutes


@pytest.mark.slow
def test_two_processes_leave_one_run_and_resume_exactly(
    street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(out: Path, *, stop: int | None = None) -> None:
        script = ROOT / "segmentation/tools/train.py"
        if stop is not None:  # each process sends itself the signal
            script = tmp_path / "stopping.py"
            script.write_text(
                "import pytest, street\nfrom core.training.command import run_command\n"
                "from segmentation.tools.train import main\n"
                f"with pytest.MonkeyPatch.context() as patch:\n    street.stop_at(patch, {stop})\n"
                "    run_command(main)\n"
            )
        # torchrun turns the code of its stopped processes, 130, into 1
        in_two_processes(script, *arguments(street, out, "batch_size=4", "model.adm.gamma=0.5"), good=stop is None)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(tmp_path / "whole")
    assert read(tmp_path / "whole/environment.json")["starts"][0]["processes"] == 2
    launch(tmp_path / "cut", stop=3)
    assert read(tmp_path / "cut/summary.json")["status"] == "interrupted"
    assert read(tmp_path / "cut/summary.json")["step"] == 4  # at the next log point, where they agree
    launch(tmp_path / "cut")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["deeplabv3", "pspnet"])
def test_both_networks_learn_camvid(head: str, shared_data: Path, tmp_path: Path, train: Train) -> None:
    config = str(CONFIGS / f"{head}_camvid.py")
    out = tmp_path / "run"
    assert train([config, "--data-root", str(shared_data / "camvid"), "--out", str(out)])[0] == 0
    last = read(out / "summary.json")["last"]
    # Calling everything road or building gives 2.8 %.
    assert last["teacher/mIoU"] > 20
    assert last["student/mIoU"] > 20
