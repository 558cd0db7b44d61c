"""A run that ends early: when, what it says of it, that it stays ended, and what cannot end so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import arguments, assert_same_runs, lines, metrics, read, stop_at

from classification.config import parse_command
from core.training.checkpoint import goal, step_of

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
PATIENT = ["--data.validation", "0.2", "--fit.epochs", "12", "--fit.patience", "2"]


def ends_at(evaluations: list[dict[str, Any]], patience: int) -> tuple[int, int]:
    """(step at which patience ends, step of the best so far), of the evaluations of a run that went on."""
    best = evaluations[0]
    for place, line in enumerate(evaluations):
        if line["student/top1"] > best["student/top1"]:
            best = line
        if place - evaluations.index(best) == patience:
            return line["step"], best["step"]
    raise AssertionError("this run got better to its end: it shows nothing")


def test_a_run_ends_where_nothing_better_came(command: Command, tmp_path: Path) -> None:
    whole, early = tmp_path / "whole", tmp_path / "early"
    assert command([*arguments(whole, method="vanilla"), *PATIENT[:-2]])[0] == 0
    step, best = ends_at(lines(whole, "evaluation"), 2)
    code, _, error = command([*arguments(early, method="vanilla"), *PATIENT])
    assert code == 0
    assert metrics(early, "evaluation") == [m for m in metrics(whole, "evaluation") if m["step"] <= step]
    summary = read(early / "summary.json")
    assert summary["status"] == "finished" and summary["step"] == step == summary["last"]["step"]
    assert summary["best"]["step"] == best and summary["selected_on"] == "validation"
    total = lines(whole, "evaluation")[-1]["step"]
    why = f"no evaluation since step {best} brought a better student/top1"
    assert summary["stopped_early"] == {"at": step, "of": total, "best": best, "why": why}
    assert f"stopped early at step {step} of {total} (fit.patience): {why}" in error
    assert "stopped early" in (early / "log.txt").read_text()
    assert [step_of(goal(early / "checkpoints" / name)) for name in ("best", "last")] == [best, step]
    assert "stopped_early" not in read(whole / "summary.json")

    before = (early / "summary.json").read_bytes()
    code, _, error = command([*arguments(early, method="vanilla"), *PATIENT])
    assert code == 0 and "is finished" in error
    assert (early / "summary.json").read_bytes() == before


def test_interrupted_and_resumed_it_ends_alike(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command([*arguments(whole, method="vanilla"), *PATIENT])[0] == 0
    step = read(whole / "summary.json")["step"]
    stop_at(monkeypatch, 2, step - 1)
    again = [*arguments(cut, method="vanilla"), *PATIENT]
    assert [command(again)[0] for _ in range(3)] == [130, 130, 0]
    assert_same_runs(whole, cut)


def test_killed_between_its_last_checkpoint_and_its_summary_it_trains_no_further(
    command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    again = [*arguments(run, method="vanilla"), *PATIENT]
    assert command(again)[0] == 0
    summary, left = read(run / "summary.json"), metrics(run)
    (run / "summary.json").unlink()
    assert command(again)[0] == 0
    assert metrics(run) == left
    same = ("status", "step", "best", "last", "stopped_early")
    assert {key: read(run / "summary.json")[key] for key in same} == {key: summary[key] for key in same}


def test_test_images_choose_no_end(command: Command, tmp_path: Path) -> None:
    code, _, error = command([*arguments(tmp_path / "run"), "--fit.patience", "2"])
    assert code == 2 and len(error.splitlines()) == 1 and "--data.validation 0.1" in error
    assert not (tmp_path / "run").exists()


def test_without_a_word_of_it_the_config_says_nothing(tmp_path: Path) -> None:
    assert "patience" not in parse_command(arguments(tmp_path / "run")).resolved()["fit"]
    assert parse_command([*arguments(tmp_path / "run"), *PATIENT]).resolved()["fit"]["patience"] == 2


def test_what_has_no_best_evaluation_refuses_patience(shell: Any, tmp_path: Path) -> None:
    from diffusion.tools.train import main

    recipe = Path(__file__).parents[2] / "diffusion/recipes"
    for kind, file, method in (("dit", "dit_digits", "vanilla"), ("progressive", "digits_progressive", "pd")):
        argv = [kind, "--config", str(recipe / f"{file}.yaml"), "--method", method, "--out", str(tmp_path / kind)]
        code, _, error = shell(main, [*argv, "--fit.patience", "2"])
        assert code == 2 and len(error.splitlines()) == 1 and "--fit.patience" in error
        code, said, _ = shell(main, [*argv, "--dry-run"])
        assert code == 0 and "patience" not in said
