"""What only a GPU can show: no step waits for the device, half precision and compilation learn, a resume is exact."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ENOUGH, RECIPE, assert_same_runs, learning_arguments, metrics, stop_at

from classification.config import parse_command
from classification.experiment import build
from classification.methods import METHODS
from classification.tools.train import main
from core.training.distiller import Progress

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick")]

LABELS = [f"{method}{adm}" for method in METHODS for adm in ("", "+adm")]
WAITS = {"switokd": 1, "switokd+adm": 1}  # whether a network pauses is for the host to know
DATA = ["--config", str(RECIPE), *ENOUGH]


@pytest.fixture
def sync_warnings() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("label", LABELS)
def test_a_step_never_waits_for_the_device(label: str, request: pytest.FixtureRequest) -> None:
    flags = ["--shake.online_teacher", "true"] if label.startswith("shake") else []
    experiment = build(parse_command([*DATA, "--method", label, *flags]))
    distiller = experiment.distiller.to("cuda").train()
    loader = experiment.train_loader(SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda")))
    optimizer = experiment.command.config.optimizer.make(distiller.parameter_groups())
    unscaled = SimpleNamespace(scaler=None)

    def step(number: int) -> None:
        nonlocal batches
        progress = Progress(number, 0.5, 9, 9.0)
        batch = distiller.before_step(next(batches), progress)
        for phase in distiller.phases:
            losses, _ = distiller(batch, progress, phase)
            total = sum(value for terms in losses.values() for value in terms.values())
            distiller.backward(losses, total, unscaled)
            distiller.before_update()
            optimizer.step()
            optimizer.zero_grad()
        distiller.after_step(batch, progress)

    batches = iter(loader)
    for number in range(2):  # the first ones choose algorithms and make the optimiser's state
        step(number)
    request.getfixturevalue("sync_warnings")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(2)
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == WAITS.get(label, 0), waits


def arguments(out: Path, *more: str) -> list[str]:
    return learning_arguments(out, "--fit.device", "auto", *more)


@pytest.mark.parametrize(
    "flags",
    [
        ["--fit.precision", "bf16"],
        ["--fit.precision", "fp16"],
        ["--fit.precision", "bf16", "--channels_last", "true", "--fit.accumulate", "2"],
        ["--fit.compile", "true"],
    ],
    ids=" ".join,
)
def test_learns(flags: list[str], tmp_path: Path) -> None:
    assert main(arguments(tmp_path, *flags)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for role in ("teacher", "student"):
        assert summary["last"][f"{role}/top1"] > 60, summary["last"]  # of 5 classes
    assert summary["peak_memory_bytes"] < 2**30
    assert json.loads((tmp_path / "environment.json").read_text())["starts"][-1]["device"].startswith("cuda")


def test_a_resume_in_fp16_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags = ["--fit.precision", "fp16", "--fit.deterministic", "true"]
    try:
        assert main(arguments(tmp_path / "whole", *flags)) == 0
        stop_at(monkeypatch, 31)
        assert main(arguments(tmp_path / "halves", *flags)) == 130
        assert metrics(tmp_path / "halves")[-1]["step"] < 40
        assert main(arguments(tmp_path / "halves", *flags)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_runs(tmp_path / "whole", tmp_path / "halves")
