"""What a training says while it runs: off a terminal in lines, on one by its bar, in log.txt always."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import torch
from runs import lines, said_while_training, without_times
from torch import Tensor, nn

from core.progress import progress_bar
from core.training import recorder as recorders
from core.training.lines import start_line, time_left, training_line
from core.training.recorder import Recorder
from core.training.run import RunFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(path: Path, steps: int = 5, log_every: int = 4, progress_bar: bool = True) -> Path:
    """A run whose loss at step k is k."""

    def alone(values: Tensor) -> Tensor:
        return values

    run = RunFolder(path, {"seed": 0})
    run.open()
    recorder = Recorder(
        run, torch.device("cpu"), 1, mean=alone, gather=lambda own: [own], advice="", total=steps,
        log_every=log_every, keep=1, progress_bar=progress_bar,
    )  # fmt: skip
    recorder.start(0, {"student": nn.Linear(1, 1)}, {}, {"training images": 7}, "bf16")
    with recorder.bar:
        for step in range(1, steps + 1):
            recorder.losses.observe({"student/ce": torch.tensor(float(step)), "adm/similarity": torch.tensor(0.5)})
            recorder.after_step(step, 8, 0.1, False)
    return path


@pytest.fixture(autouse=True)
def _quick(quick: None) -> None:
    """No curves."""


def test_off_a_terminal_there_is_a_line_at_the_first_step_and_each_log_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record(tmp_path / "run")
    shown = said_while_training(run)
    assert [(row["step"], row["student/ce"]) for row in shown] == [(1, 1.0), (4, 2.5), (5, 5.0)]
    assert all(row["adm/similarity"] == 0.5 and row["lr"] == 0.1 for row in shown)
    assert [(row["step"], row["student/ce"]) for row in lines(run)] == [(4, 2.5), (5, 5.0)]  # means as if none looked
    log = [line[20:] for line in (run / "log.txt").read_text().splitlines()]
    assert capsys.readouterr().err.splitlines() == log
    assert log[0].startswith("student (2 parameters); 7 training images; cpu, bf16; 1 process of ") and len(log) == 5


def test_on_a_terminal_the_bar_says_it_and_no_line_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    run = record(tmp_path / "run")
    said = terminal.getvalue()
    assert "5/5" in said and "student ce 5  adm similarity 0.5  lr 0.1" in said.rpartition("\r")[2]
    assert "step 4/5" not in said and said.count("7 training images") == 1
    assert [row["step"] for row in said_while_training(run)] == [1, 4, 5]
    terminal.truncate(0)
    record(tmp_path / "lines", progress_bar=False)
    assert "step 4/5  student ce 2.5" in terminal.getvalue()


def test_a_long_silence_is_broken_and_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = record(tmp_path / "calm", steps=9, log_every=8)
    assert [row["step"] for row in said_while_training(calm)] == [1, 8, 9]
    monkeypatch.setattr(recorders, "SILENT", -1.0)
    told = record(tmp_path / "told", steps=9, log_every=8)
    assert [row["step"] for row in said_while_training(told)] == [*range(1, 10)]
    assert [without_times(row) for row in lines(calm)] == [without_times(row) for row in lines(told)]


def test_lines_say_what_they_are_given() -> None:
    values = {"lr": 1e-4, "images_per_second": 12345.6, "teacher/ce": 1.23456, "teacher/kd": 2e-7, "student/ce": 3}
    assert training_line(values, 3 * 2**30) == (
        "teacher ce 1.235, kd 2e-07  student ce 3  lr 0.0001  12,346 images/s  3.0 GiB"
    )
    assert time_left(185.4) == "0:03:05 left" and time_left(90_000) == "1 day, 1:00:00 left"
    networks = {"teacher": nn.Linear(1, 1000).requires_grad_(False), "student": nn.Linear(1, 1)}
    sizes = {"training images": 50_000, "test images": 10}
    said = start_line(networks, {"student": {"name": "tiny"}}, sizes, torch.device("cpu"), "no", 2)
    wanted = "teacher (fixed, 2,000 parameters), student tiny (2 parameters); 50,000 training images, 10 test images; "
    assert said == f"{wanted}cpu, fp32; 2 processes of {torch.get_num_threads()} thread(s)"


def test_a_long_phase_is_one_line_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count, shown in ((1999, True), (5000, False), (5000, True)):
        with progress_bar(count, "decoding", shown=shown) as bar:
            bar.update(count)
    assert capsys.readouterr().err == "decoding: 5,000 images\n"
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(5000, "decoding") as bar:
        time.sleep(1.1)
        bar.update(5000)
    assert "5000/5000" in terminal.getvalue() and "5,000" not in terminal.getvalue()
