"""The benchmark's arithmetic, and that every row measures something on tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from core.errors import InputError
from tools.benchmark import rows, run
from tools.benchmark.ratios import Measure, Settings, changes, interval, line, paired, peak_bytes, ratios, summary

KEYS = {
    "row", "what", "unit", "target", "at_least", "median", "quartiles", "interval", "reached", "certain", "pairs", "on",
    "values",
}  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_paired_takes_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def side(name: str, value: float) -> float:
        calls.append(name)
        return value

    results = paired(lambda: side("a", 2.0), lambda: side("b", 1.0), 3)
    assert results == [(2.0, 1.0)] * 3
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


def test_ratios_are_those_of_each_pair_not_of_the_medians() -> None:
    values, on = ratios([(2.0, 1.0), (9.0, 3.0), (4.0, 4.0)], "ms", scale=10.0)
    assert values == [2.0, 3.0, 1.0]
    assert on == "40 : 30 ms"


def test_interval_holds_the_median_and_narrows_with_the_spread() -> None:
    wide = interval([1.0 + 0.1 * k for k in range(20)])
    narrow = interval([1.0 + 0.01 * k for k in range(20)])
    assert wide[0] < 1.95 < wide[1]
    assert narrow[1] - narrow[0] == pytest.approx((wide[1] - wide[0]) / 10)
    assert interval([3.0]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("values", "at_least", "reached", "certain"),
    [([1.0] * 5, False, True, True), ([2.0] * 5, False, False, True), ([2.0] * 5, True, True, True)],
)
def test_summary_judges_against_the_target(values: list[float], at_least: bool, reached: bool, certain: bool) -> None:
    row = Measure("what", lambda settings: (values, ""), target=1.5, at_least=at_least)
    result = summary("name", row, values, "on")
    assert (result["reached"], result["certain"]) == (reached, certain)


def test_summary_says_where_the_interval_holds_the_target() -> None:
    row = Measure("what", lambda settings: ([], ""), target=1.5)
    result = summary("name", row, [1.0, 1.2, 1.4, 1.6, 1.8], "on")
    assert result["median"] == 1.4 and result["quartiles"] == [1.2, 1.6]
    assert result["reached"] and not result["certain"]
    assert "yes, unsure" in line(result) and "<= 1.5" in line(result)


def test_peak_memory_of_known_tensors() -> None:
    def run() -> torch.Tensor:
        kept = torch.ones(2**20)  # 4 MiB
        assert (kept * 2).mean() == 2  # 4 MiB more for a moment
        return kept

    peak, end = peak_bytes(run, torch.device("cpu"))
    assert 2**23 <= peak < 2**23 + 2**12
    assert 2**22 <= end < 2**22 + 2**12


def test_peak_memory_counts_what_a_step_allocates() -> None:
    settings = Settings(torch.device("cpu"), pairs=1, quick=True)

    def two_steps() -> Callable[[], None]:
        step = rows.make_step(rows.CIFAR, settings)
        step()
        step()
        return step

    peak, kept = peak_bytes(two_steps, settings.device)
    networks = rows.make_distiller(rows.CIFAR, settings).networks
    weights = sum(p.numel() * p.element_size() for p in networks.parameters())
    buffers = sum(b.numel() * b.element_size() for b in networks.buffers())
    # Held after a step: weights, their momentum, BatchNorm's statistics, the batch (24 KiB) and a few scalars.
    assert 2 * weights + buffers <= kept <= 2 * weights + buffers + 2**16
    # At the peak also the activations: those of the first stages alone, 8 convolutions of [2, 16, 32, 32] floats.
    assert peak - kept > 8 * 2 * 16 * 32 * 32 * 4


ONE_OF_A_KIND = (
    "step_resnet32x4_8x4", "memory_resnet32x4_8x4_feature", "fit_cifar", "loader", "method_kdcl", "bare_afd",
    "offline_kd+adm", "step_pd+adm", "step_dit_adm", "sampling",
)  # fmt: skip


def check_rows(folder: Path, names: Sequence[str], printed: str) -> None:
    written = json.loads((folder / "benchmark.json").read_text())
    assert written["quick"] and written["clock"] == "wall"
    assert {"commit", "versions", "device", "threads", "command"} <= written["environment"].keys()
    assert written["environment"]["threads"] == 1
    assert [result["row"] for result in written["rows"]] == list(names)
    for result in written["rows"]:
        assert result.keys() == KEYS
        assert result["pairs"] == len(result["values"]) == (1 if result["row"].startswith("memory") else 2)
        assert result["interval"][0] <= result["median"] <= result["interval"][1]
        if result["unit"] == "":
            assert min(result["values"]) > 0
    assert [text.split()[0] for text in printed.splitlines()] == ["row", *names]
    assert imread(folder / "benchmark.png").std() > 0.01


def test_a_row_of_each_kind_measures(tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in ONE_OF_A_KIND if name in rows.ROWS]
    words = ["--quick", "--pairs", "2", "--threads", "1", "--out", str(tmp_path), "--device", "cpu", "--rows", *names]
    assert run.main(words) == 0
    check_rows(tmp_path, names, capsys.readouterr().out)


@pytest.mark.slow
def test_every_row_measures(tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--quick", "--pairs", "2", "--threads", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    check_rows(tmp_path, list(rows.ROWS), capsys.readouterr().out)


def test_variants_of_a_gpu_run_on_the_cpu_too(tmp_path: Path, threads: None) -> None:
    names = ["step_resnet32x4_8x4_bf16", "speed_resnet32x4_8x4_channels_last"]
    arguments = [
        "--quick",
        "--pairs",
        "1",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
        "--clock",
        "cpu",
        "--device",
        "cpu",
    ]
    assert run.main([*arguments, "--rows", *names]) == 0
    measured = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["row"] for row in measured] == names
    assert all(row["target"] is None and row["reached"] is None and row["median"] > 0 for row in measured)


def test_changes_say_what_got_slower() -> None:
    def row(name: str, low: float, high: float, at_least: bool = False, size: str = "batch 2") -> dict:
        made = Measure("peak memory" if name == "memory" else "time", lambda _: ([], ""), at_least=at_least)
        return summary(name, made, [low, (low + high) / 2, high], f"{size}, 1 : 2 ms a step")

    before = [
        row("slower", 1.0, 1.1), row("faster", 1.0, 1.1), row("same", 1.0, 1.1), row("rate", 0.9, 1.0, True),
        row("memory", 1.0, 1.1), row("other", 1.0, 1.1), row("gone", 1.0, 1.1),
    ]  # fmt: skip
    now = [
        row("slower", 1.2, 1.3), row("faster", 0.8, 0.9), row("same", 1.05, 1.2), row("rate", 0.6, 0.7, True),
        row("memory", 1.2, 1.3), row("other", 1.2, 1.3, size="batch 4"), row("new", 1.0, 1.1),
    ]  # fmt: skip
    head, *lines = changes(now, before)
    said = {text.split()[0]: text for text in lines}
    assert head.split() == ["row", "before", "now", "change"] and set(said) == {r["row"] for r in before} - {"gone"}
    assert said["slower"].split()[1:] == ["1.05", "1.25", "+19.0", "%", "slower"]
    for name, verdict in (
        ("faster", "faster"),
        ("same", "no difference that shows"),
        ("rate", "slower"),
        ("memory", "more memory"),
        ("other", "measured on other sizes before: batch 2"),
    ):
        assert said[name].endswith(verdict), name
    assert changes(now, []) == ["no row of these was measured before"]


def test_a_run_compares_itself_with_an_earlier_one(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--pairs", "2", "--threads", "1", "--device", "cpu", "--rows", "fit_overhead_ms", "--out"]
    assert run.main([*words, str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert run.main([*words, str(tmp_path / "b"), "--compare", str(tmp_path / "a/benchmark.json")]) == 0
    assert "against " in capsys.readouterr().out.splitlines()[-3]


def test_wrong_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": [{"row": "loader"}]}')
    for file in ("other.json", "absent.json"):
        with pytest.raises(InputError, match=rf"--compare .*{file} is no benchmark.json"):
            run.main(["--compare", str(tmp_path / file), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="did you mean 'loader'"):
        run.main(["--rows", "loadr", "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"--pairs.*0"):
        run.main(["--pairs", "0", "--out", str(tmp_path)])


def test_help_is_fast_to_load() -> None:
    heavy = ("timm", "torchvision", "accelerate", "matplotlib", "torch._dynamo")
    code = f"import sys, tools.benchmark.run; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
