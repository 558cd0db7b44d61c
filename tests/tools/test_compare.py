"""Comparing runs: numbers against numpy, honest verdicts, one line for wrong input, no torch."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from written import write_chain, write_evaluation, write_run

from core.errors import InputError
from tools import compare, groups
from tools.runs import keep, read_run

ROOT = Path(__file__).resolve().parents[2]


DML = {0: [40.0, 60.5], 1: [41.0, 61.25], 2: [47.0, 60.0]}
ADM = {0: [40.0, 62.5], 1: [70.0, 63.0], 2: [45.0, 61.0]}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """DML and DML+ADM over three seeds."""
    dml = [write_run(tmp_path / f"dml-{seed}", seed, values) for seed, values in DML.items()]
    return dml + [write_run(tmp_path / f"adm-{s}", s, values, method="dml+adm") for s, values in ADM.items()]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*argv: object) -> str:
        capsys.readouterr()
        assert compare.main([str(a) for a in argv]) == 0
        return capsys.readouterr().out

    return call


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_means_and_spreads_are_numpys(runs: list[Path], tmp_path: Path, command: Any) -> None:
    out = command(*runs, "--out", tmp_path / "out")
    groups = {group["label"]: group for group in report(tmp_path / "out")["groups"]}
    assert list(groups) == ["dml", "dml+adm"]
    for label, values in (("dml", DML), ("dml+adm", ADM)):
        last = np.array([v[-1] for v in values.values()])
        best = np.array([max(v) for v in values.values()])
        for role, offset in (("student", 0.0), ("teacher", 5.0)):
            for which, numbers in (("last", last + offset), ("best", best + offset)):
                told = groups[label]["top1"][role][which]
                assert told["n"] == 3 and list(told["by_seed"]) == ["0", "1", "2"]
                assert told["mean"] == pytest.approx(numbers.mean()) and told["std"] == pytest.approx(
                    numbers.std(ddof=1)
                )
        row = next(line for line in out.splitlines() if line.startswith(f"| {label} "))
        assert f"{last.mean():.2f} ± {last.std(ddof=1):.2f}" in row and "student/top1 on test" in row
    assert "chosen by test accuracy" in out
    assert (tmp_path / "out/compare.md").read_text().strip().endswith(out.split("\n\nwritten to")[0].strip())


def test_paired_differences_are_a_t_test(runs: list[Path], tmp_path: Path, command: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    command(*runs, "--baseline", "dml", "--out", tmp_path / "out")
    (difference,) = [d for d in report(tmp_path / "out")["differences"] if d["role"] == "student"]
    ours, theirs = (np.array([v[-1] for v in values.values()]) for values in (ADM, DML))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert difference["n"] == 3 and difference["mean"] == pytest.approx((ours - theirs).mean())
    assert difference["interval"] == pytest.approx([interval.low, interval.high])


def test_brief_says_a_line_for_each_group(runs: list[Path], tmp_path: Path, command: Any) -> None:
    said = command(*runs, "--baseline", "dml", "--brief", "--out", tmp_path / "out").splitlines()
    assert said[:4] == [
        "Last top-1, mean of 3 seeds; difference from dml (95 % interval)",
        "student:",
        "  dml      60.58",
        "  dml+adm  62.17  +1.58 (+0.29 to +2.88)  higher than dml",
    ]
    assert len(said) <= 8 and "95 % interval" in (tmp_path / "out/compare.md").read_text()


def test_a_difference_is_claimed_only_where_its_interval_leaves_out_zero(tmp_path: Path, command: Any) -> None:
    def compared(name: str, differences: list[float]) -> str:
        paths = []
        for seed, difference in enumerate(differences):
            base = 60.0 + 3 * seed
            paths.append(write_run(tmp_path / name / f"dml-{seed}", seed, [base]))
            paths.append(write_run(tmp_path / name / f"adm-{seed}", seed, [base + difference], method="dml+adm"))
        lines = command(*paths, "--baseline", "dml").splitlines()
        return next(line for line in lines if line.startswith("| dml+adm | student"))

    assert "higher than dml" in compared("up", [1.0, 1.1, 0.9])
    assert "lower than dml" in compared("down", [-1.0, -1.1, -0.9])
    spans = compared("spans", [1.0, 1.5, 0.1])  # a mean of 0.87, an interval from -0.9
    assert "not distinguishable from dml" in spans and "+0.87" in spans and "| 3 |" in spans
    assert "not distinguishable from dml" in compared("same", [0.0, 0.0])
    alone = compared("alone", [2.0])
    assert "no interval" in alone and "+2.00" in alone and "higher" not in alone


def test_differences_pair_common_seeds_alone(tmp_path: Path, command: Any) -> None:
    paths = [write_run(tmp_path / f"dml-{s}", s, [50.0 + s]) for s in (0, 1, 2)]
    paths += [write_run(tmp_path / f"adm-{s}", s, [60.0 + 2 * s], method="dml+adm") for s in (1, 2, 7)]
    command(*paths, "--baseline", "dml", "--out", tmp_path / "out")
    assert report(tmp_path / "out")["differences"][-1]["by_seed"] == {"1": 11.0, "2": 12.0}


def test_the_test_set_is_reported_where_validation_chose(tmp_path: Path, command: Any) -> None:
    out = command(write_run(tmp_path / "a", 0, [70.0, 80.0], held_out=True), "--out", tmp_path / "out")
    student = report(tmp_path / "out")["groups"][0]["top1"]["student"]
    # Validation is best in epoch 1, where the test accuracy is 70.
    assert student["last"]["mean"] == 80.0 and student["best"]["mean"] == 70.0
    assert "student/top1 on validation" in out and "chosen by test accuracy" not in out


# --- groups -----------------------------------------------------------------------------------------------------------


def test_segmentation_is_compared_by_miou_over_iterations(runs: list[Path], tmp_path: Path, command: Any) -> None:
    command(*runs, "--baseline", "dml", "--out", tmp_path / "top1")
    for file in (path / name for path in runs for name in ("metrics.jsonl", "summary.json")):
        file.write_text(re.sub(r'"epoch": [\d.]+, ', "", file.read_text().replace("/top1", "/mIoU")))
    out = command(*runs, "--baseline", "dml", "--out", tmp_path / "miou")
    by_top1, by_miou = report(tmp_path / "top1"), report(tmp_path / "miou")
    assert by_miou["differences"] == by_top1["differences"]
    assert [group["mIoU"] for group in by_miou["groups"]] == [group["top1"] for group in by_top1["groups"]]
    assert "mIoU in percent" in out and "last mIoU from dml" in out and "op-1" not in out
    assert (tmp_path / "miou/compare.png").stat().st_size > 5000
    other = write_run(tmp_path / "classified", 0, [40.0])
    with pytest.raises(InputError, match="the runs measure different things"):
        compare.main([str(runs[0]), str(other)])


def test_diffusion_is_compared_by_fid_at_each_number_of_steps(tmp_path: Path, command: Any) -> None:
    paths = [write_chain(tmp_path / f"pd-{s}", s, "pd", {4: 3.0 + s, 1: 8.0 + s}) for s in (0, 1, 2)]
    paths += [
        write_chain(tmp_path / f"adm-{s}", s, "pd+adm", {4: 3.0 + s, 1: 7.0 + s + 0.1 * (s - 1)}) for s in (0, 1, 2)
    ]
    out = command(*paths, "--baseline", "pd", "--out", tmp_path / "out")
    said = report(tmp_path / "out")
    assert [group["FID"]["1 step"]["last"]["mean"] for group in said["groups"]] == pytest.approx([9.0, 8.0])
    assert [(d["role"], d["mean"]) for d in said["differences"]] == [("1 step", pytest.approx(-1.0)), ("4 steps", 0.0)]
    assert said["differences"][0]["verdict"] == "lower than pd"
    assert "FID, lower is better" in out and "percent" not in out and "points" not in out and "best" not in out
    with Image.open(tmp_path / "out/compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert all((pixels == color).all(axis=1).sum() > 60 for color in ((0, 114, 178), (213, 94, 0)))
    command(*paths, "--measure", "IS", "--out", tmp_path / "is")
    assert report(tmp_path / "is")["groups"][0]["IS"]["4 steps"]["last"]["by_seed"] == {"0": 7.0, "1": 6.0, "2": 5.0}
    guided = [
        {"network": "n", "steps": 50, "iteration": 9, "guidance": g, "FD-digits": 2 * g, "CS-digits": g}
        for g in (4.0, 1.0)
    ]
    features = {"distance": "FD-digits", "score": "CS-digits"}
    write_evaluation(paths[0] / "evaluation-inception.json", features, guided)
    assert "FD-digits, lower is better" in command(paths[0], "--out", tmp_path / "guided")
    roles = report(tmp_path / "guided")["groups"][0]["FD-digits"]
    assert {role: values["last"]["mean"] for role, values in roles.items()} == {
        "iteration 9, guidance 1": 2.0,
        "iteration 9, guidance 4": 8.0,
    }
    unevaluated = write_chain(tmp_path / "bare", 0, "pd", {4: 1.0})
    (unevaluated / "evaluation-inception.json").unlink()
    with pytest.raises(InputError, match=r"is not evaluated.*python diffusion/tools/evaluate\.py \S+bare"):
        compare.main([str(unevaluated)])


def test_another_measure_is_compared_where_it_is_asked_for(runs: list[Path], tmp_path: Path, command: Any) -> None:
    file = runs[0] / "summary.json"
    summary = json.loads(file.read_text())
    summary["last"]["student/nll"] = 1.25
    file.write_text(json.dumps(summary))
    out = command(runs[0], "--measure", "nll", "--out", tmp_path / "out")
    assert report(tmp_path / "out")["groups"][0]["nll"]["student"]["last"]["mean"] == 1.25
    assert "nll, lower is better" in out and "percent" not in out
    with pytest.raises(InputError, match="no role in common with a nll"):
        compare.main([*map(str, runs), "--measure", "nll"])


def test_groups_differ_in_more_than_the_seed(tmp_path: Path, command: Any) -> None:
    def one(name: str, seed: int, alpha: float, root: str = "data", width: int = 8) -> Path:
        networks = {"student": {"name": f"cifar_resnet{width}"}}
        more = {"adm": {"alpha": alpha}, "data": {"root": root}, "networks": networks, "fit": {"device": root}}
        return write_run(tmp_path / name, seed, [50.0], method="dml+adm", **more)

    paths = [one("a", 0, 0.01), one("b", 1, 0.01, root="elsewhere"), one("c", 0, 0.1)]
    command(*paths, "--out", tmp_path / "out")
    groups = report(tmp_path / "out")["groups"]
    assert [(g["label"], len(g["runs"])) for g in groups] == [
        ("dml+adm adm.alpha=0.01", 2),
        ("dml+adm adm.alpha=0.1", 1),
    ]
    command(one("d", 0, 0.01, width=20), *paths[:2], "--out", tmp_path / "out")
    labels = [group["label"] for group in report(tmp_path / "out")["groups"]]
    assert labels == ["dml+adm student=cifar_resnet20", "dml+adm student=cifar_resnet8"]


def test_each_group_meets_the_baseline_of_its_own_settings(tmp_path: Path, command: Any) -> None:
    paths = []
    for width, base in ((8, 50.0), (20, 70.0)):
        networks = {"student": {"name": f"cifar_resnet{width}"}}
        paths.append(write_run(tmp_path / f"dml-{width}", 0, [base], networks=networks))
        paths.append(write_run(tmp_path / f"adm-{width}", 0, [base + 1], method="dml+adm", networks=networks))
    odd = {"student": {"name": "cifar_resnet32"}}
    paths.append(write_run(tmp_path / "odd", 0, [99.0], method="dml+adm", networks=odd))
    command(*paths, "--baseline", "dml", "--out", tmp_path / "out")
    differences = [d for d in report(tmp_path / "out")["differences"] if d["role"] == "student"]
    assert [d["mean"] for d in differences] == [1.0, 1.0, None]
    assert "no seed in common" in differences[-1]["verdict"]


def test_unfinished_runs_are_left_out_unless_asked_for(runs: list[Path], tmp_path: Path, command: Any) -> None:
    stopped = write_run(tmp_path / "stopped", 3, [30.0, 31.0], status="interrupted")
    killed = write_run(tmp_path / "killed", 4, [32.0], status=None)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "evaluation", "step": 2, "student/to')  # cut off while being written
    out = command(*runs, stopped, killed, "--out", tmp_path / "out")
    assert f"not finished: {stopped}, {killed}" in out
    result = report(tmp_path / "out")
    assert result["left_out"] == [str(stopped), str(killed)] and len(result["groups"][0]["runs"]) == 3
    out = command(*runs, stopped, killed, "--partial", "--out", tmp_path / "out")
    student = report(tmp_path / "out")["groups"][0]["top1"]["student"]
    assert student["last"]["by_seed"]["3"] == 31.0 and student["last"]["by_seed"]["4"] == 32.0
    assert student["best"]["n"] == 4  # the killed run has no summary, so no best
    assert f"{killed} (epoch 1)" in out


def test_roles_are_those_of_all_runs(tmp_path: Path, command: Any) -> None:
    both = write_run(tmp_path / "a", 0, [50.0], roles={"teacher": 1.0, "student_2": 2.0})
    one = write_run(tmp_path / "b", 0, [51.0], method="vanilla", roles={"student_2": 2.0})
    command(both, one, "--out", tmp_path / "out")
    assert list(report(tmp_path / "out")["groups"][0]["top1"]) == ["student", "student_2"]


# --- the figure, the real thing, wrong input --------------------------------------------------------------------------


def test_the_figure_shows_every_group(runs: list[Path], tmp_path: Path, command: Any) -> None:
    command(*runs, "--out", tmp_path / "out")
    with Image.open(tmp_path / "out/compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in ((0, 114, 178), (213, 94, 0)):  # blue is DML, vermilion ADM
        assert (pixels == color).all(axis=1).sum() > 100


def test_curves_are_means_over_seeds_where_all_runs_have_them(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a", 0, [10.0, 20.0, 30.0]), write_run(tmp_path / "b", 1, [14.0, 20.0])]
    compared = groups.compare_runs([read_run(path) for path in paths])
    assert compare.curve(compared, compared.groups[0], "student") == [
        (1.0, 12.0, pytest.approx(math.sqrt(8))),
        (2.0, 20.0, 0.0),
    ]


def test_real_runs_compare(tmp_path: Path, command: Any) -> None:
    from accelerate.state import AcceleratorState

    from classification.tools import train
    from core.training.run import RunFolder

    recipe = ["--config", str(ROOT / "classification/recipes/digits.yaml"), "--batch_size", "12", "--fit.device", "cpu"]
    small = ["--data.classes", "3", "--data.per_class", "8", "--data.image_size", "8", "--fit.epochs", "1"]
    paths = [tmp_path / f"{method}-{seed}" for method in ("dml", "dml+adm") for seed in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda self: None)
        for path in paths:
            method, seed = path.name.rsplit("-", 1)
            assert train.main([*recipe, *small, "--method", method, "--seed", seed, "--out", str(path)]) == 0
            AcceleratorState._reset_state(reset_partial_state=True)
    out = command(*paths, "--baseline", "dml", "--out", tmp_path / "out")
    groups = report(tmp_path / "out")["groups"]
    assert [(group["label"], len(group["runs"])) for group in groups] == [("dml", 2), ("dml+adm", 2)]
    last = [json.loads((path / "summary.json").read_text())["last"]["student/top1"] for path in paths[:2]]
    assert groups[0]["top1"]["student"]["last"]["mean"] == pytest.approx(np.mean(last))
    assert "different commits" not in out


def test_folders_and_kept_runs_compare_as_the_runs_in_them(runs: list[Path], tmp_path: Path, command: Any) -> None:
    one_by_one = command(*sorted(runs), "--baseline", "dml")
    assert command(tmp_path, "--baseline", "dml") == one_by_one
    keep([read_run(run) for run in runs], tmp_path / "results/mine")
    kept = tmp_path / "results/mine"
    for words in ([kept], [kept / "runs.jsonl"], [kept / run.name for run in sorted(runs)], [kept / "*-?"]):
        assert command(*words, "--baseline", "dml") == one_by_one
    assert "| dml+adm " not in command(kept / "dml-*")
    with pytest.raises(InputError, match=r"runs\.jsonl there keeps no dml-9"):
        compare.main([str(kept / "dml-9")])


def test_wrong_input_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", 0, [1.0], roles={"critic": 1.0}, method="vanilla")
    lines = (other / "summary.json").read_text().replace("student", "pupil").replace("teacher", "tutor")
    (other / "summary.json").write_text(lines)
    damaged = write_run(tmp_path / "damaged", 5, [1.0])
    (damaged / "summary.json").write_text('{"status": "fin')
    again = write_run(tmp_path / "again", 0, [1.0])
    stopped = write_run(tmp_path / "stopped", 3, [1.0], status="interrupted")
    empty = tmp_path / "empty"
    empty.mkdir()
    for argv, words in (
        ([], "RUN"),
        ([tmp_path / "none"], "no run folder"),
        ([empty], "no config.yaml"),
        ([*runs, "--bsaeline", "dml"], "--bsaeline"),
        ([*runs, "--baseline", "dm"], "one of 'dml', 'dml+adm'"),
        ([*runs, other], "no role in common"),
        ([damaged], "damaged"),
        ([*runs, again], "one experiment with one seed"),
        ([stopped], "--partial"),
        ([*runs, "--out", damaged / "config.yaml"], "cannot make the folder"),
    ):
        with pytest.raises(InputError) as error:
            compare.main([str(a) for a in argv])
        assert words in str(error.value) and "\n" not in str(error.value), argv


def test_the_command_needs_no_torch_and_exits_with_2(runs: list[Path]) -> None:
    heavy = "print(sorted(set(sys.modules) & {'torch', 'numpy', 'matplotlib'}))"
    say = f"import sys; from tools.compare import main; main(sys.argv[1:]); {heavy}"
    done = subprocess.run([sys.executable, "-c", say, *map(str, runs)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    started = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    asked = subprocess.run([sys.executable, "tools/compare.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert asked.returncode == 0 and "--baseline" in asked.stdout
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - started < 1  # seconds of the processor
    wrong = subprocess.run([sys.executable, "tools/compare.py", "nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "error: no run folder nowhere\n")


def test_each_seed_of_a_group_may_start_from_weights_of_its_own(tmp_path: Path, command: Any) -> None:
    for seed in (0, 1):
        weights = {"teacher": {"name": "a", "weights": f"runs/vanilla_10-{seed}", "sha256": f"{seed}" * 64}}
        write_run(tmp_path / f"shake-{seed}", seed, [50.0], method="shake", networks=weights)
    other = {"teacher": {"name": "a", "weights": "runs/other-2", "sha256": None}}
    write_run(tmp_path / "other", 2, [50.0], method="shake", networks=other)
    write_run(tmp_path / "dml", 0, [40.0], method="dml", networks={"teacher": {"name": "a", "weights": None}})
    command(*sorted(tmp_path.iterdir()), "--baseline", "dml", "--out", tmp_path / "out")
    said = report(tmp_path / "out")
    assert {g["label"]: len(g["runs"]) for g in said["groups"]} == {
        "dml": 1,
        "shake teacher.weights=runs/vanilla_10-{seed}": 2,
        "shake teacher.weights=runs/other-{seed}": 1,
    }
