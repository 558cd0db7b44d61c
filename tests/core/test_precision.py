"""``fit.precision auto``: what it is on which machine, and that a run keeps what it began with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, assert_same_runs, offline_arguments, stop_at

from classification.config import parse_command
from classification.tools.train import main as train
from core.training import precision
from core.training.fit import FitConfig, make_accelerator
from core.training.precision import cpu_flags, native_precision
from core.training.run import read_config
from diffusion.dit.config import DiTTrainingConfig
from diffusion.progressive.config import ProgressiveConfig
from diffusion.training import parse_config
from offline_kd.config import OFFLINE

pytestmark = pytest.mark.usefixtures("quick")

AUTO = ["--fit.precision", "auto"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets this machine seem to have bf16, or not to."""
    return lambda has: monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx2", "avx512_bf16"} if has else {"avx2"})


def test_a_cpu_says_it_by_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t: x\nflags\t\t: fpu\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "amx_bf16"}
    assert cpu_flags(tmp_path / "none") == set()
    for flags, wanted in (({"amx_bf16"}, "bf16"), ({"avx512_bf16"}, "bf16"), ({"avx512f", "amx_tile"}, "fp32")):
        monkeypatch.setattr(precision, "cpu_flags", lambda flags=flags: flags)
        assert native_precision(on_cpu=True)[0] == wanted


def test_a_gpu_says_it_without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, wanted in ((True, "bf16"), (False, "fp32")):

        def supported(including_emulation: bool = True, native: bool = native) -> bool:
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
        found, why = native_precision(on_cpu=False)
        assert found == wanted and "GPU X" in why


@pytest.mark.parametrize(("has", "wanted"), [(True, "bf16"), (False, "fp32")])
def test_every_task_settles_it_before_anything_is_written(
    machine: Callable[[bool], None], tmp_path: Path, has: bool, wanted: str
) -> None:
    machine(has)
    online = parse_command([*arguments(tmp_path / "a"), *AUTO])
    offline = parse_command([*offline_arguments(tmp_path / "b", "none.pth"), *AUTO], task=OFFLINE)
    assert [c.config.fit.precision for c in (online, offline)] == [wanted] * 2
    assert online.resolved()["fit"]["precision"] == wanted
    recipes = Path(__file__).parents[2] / "diffusion/recipes"
    cpu = [*AUTO, "--fit.device", "cpu"]
    dit, _ = parse_config(
        DiTTrainingConfig, ["--config", str(recipes / "dit_digits.yaml"), *cpu, "--method", "vanilla"]
    )
    progressive, _ = parse_config(ProgressiveConfig, ["--config", str(recipes / "digits_progressive.yaml"), *cpu])
    assert [config.fit.precision for config in (dit, progressive)] == [wanted] * 2


@pytest.mark.parametrize("has", [True, False])
def test_a_run_that_goes_on_elsewhere_keeps_what_it_began_with(
    machine: Callable[[bool], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Any, has: bool
) -> None:
    machine(has)
    began = "bf16" if has else "fp32"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    short = ["--fit.epochs", "2"]
    assert shell(train, [*arguments(whole, *short), "--fit.precision", began])[0] == 0
    stop_at(monkeypatch, 4)
    code, _, error = shell(train, [*arguments(cut, *short), *AUTO])
    assert code == 130 and f"fit.precision auto: {began}, " in error
    assert f"fit.precision auto: {began}" in (cut / "log.txt").read_text()
    assert read_config(cut / "config.yaml")["fit"]["precision"] == began
    machine(not has)
    code, _, error = shell(train, [*arguments(cut, *short), *AUTO])
    assert code == 0 and f"fit.precision auto: {began}, with which the run in {cut} began" in error
    assert_same_runs(whole, cut)


def test_who_calls_the_loop_directly_may_say_auto_too(machine: Callable[[bool], None], tmp_path: Path) -> None:
    machine(True)
    config = FitConfig(steps=1, precision="auto", device="cpu", trackers=())
    assert make_accelerator(config, str(tmp_path)).mixed_precision == "bf16"


def test_nothing_is_said_where_a_precision_is_given(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parse_command([*arguments(tmp_path / "run"), "--fit.precision", "bf16"])
    assert "auto" not in capfd.readouterr().err
