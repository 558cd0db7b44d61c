"""The page of a run of offline distillation: its fixed teacher, and a student of the other task beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import CPU, digits, offline_arguments, read, train_whole

from classification.tools import report as online_report
from classification.tools import train
from offline_kd.tools import report


def test_a_fixed_teacher_and_a_student_alone(
    tmp_path: Path, teacher: Path, command: Callable[[list[str]], tuple[int, str, str]], shell: Any, quick: None
) -> None:
    run, alone, page = tmp_path / "run", tmp_path / "alone", tmp_path / "page"
    assert command(offline_arguments(run, teacher))[0] == 0
    student = ["--networks.student.name", "cifar_resnet8", "--method", "vanilla", "--fit.epochs", "1"]
    train_whole(train.main, [*digits(5, 12, 24), *CPU, *student, "--out", str(alone)])
    words = [str(run), str(alone), "--out", str(page), "--no-latency", "--images", "1", "--device", "cpu"]
    code, _, err = shell(report.main, words)
    assert code == 0, err
    said = read(page / "summary.json")
    assert list(said["networks"]) == ["teacher", "student", "student of alone"]
    assert said["networks"]["teacher"]["top1"] == read(run / "summary.json")["teacher"]["top1"]
    assert [one["theirs"] for one in said["compared"]] == ["teacher", "student of alone"]
    assert shell(online_report.main, words) == (
        2, "", f"error: {run} is a run of offline_kd: use the tools in offline_kd/tools\n",
    )  # fmt: skip
