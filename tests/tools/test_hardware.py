"""Runs from different hardware: told where they stand beside each other, and no alarm where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from written import TABLE, write_chain, write_run

from core.errors import InputError
from core.training.run import environment
from tools import compare, reproduce
from tools.hardware import differing_hardware, differing_in_pairs, unknown_processors
from tools.runs import read_run

OLD = {"device": "cpu", "device_name": "x86_64", "threads": 1}
AVX2, AVX512 = ({**OLD, "cpu": f"A CPU, {name}"} for name in ("AVX2", "AVX512"))
GPU, OTHER_GPU = ({**AVX2, "device": "cuda:0", "device_name": name} for name in ("GPU A", "GPU B"))


def trained(path: Path, seed: int, *starts: dict[str, Any], method: str = "dml", top1: float = 60.0) -> Path:
    run = write_run(path, seed, [top1], method=method)
    (run / "environment.json").write_text(json.dumps({"starts": starts}))
    return run


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        ([[AVX2], [AVX2]], []),
        ([[GPU], [{**GPU, "device": "cuda:3", "cpu": "Another"}]], []),  # the GPU computes
        ([[OLD], [AVX2]], ["1 of these 2"]),  # it may be the same
        ([[OLD], [OLD]], ["On which processor these runs"]),
        ([[], [AVX2]], ["1 of these 2"]),
        (
            [[AVX2], [AVX512]],
            ["AVX2, 1 thread (1 run), A CPU, AVX512, 1 thread (1 run). Averaged over several: a"],
        ),
        ([[AVX2], [{**AVX2, "threads": 2}]], ["AVX2, 2 threads (1 run)"]),
        ([[AVX2, AVX512], [AVX2]], ["AVX2, 1 thread (2 runs), A CPU, AVX512, 1 thread (1 run)"]),  # resumed elsewhere
        ([[GPU], [OTHER_GPU]], ["GPU A (1 run), GPU B (1 run)"]),
        ([[GPU], [OLD]], ["a CPU that was not recorded (1 run), GPU A (1 run)", "1 of these 2"]),
    ],
)
def test_what_differs_and_what_is_not_known(tmp_path: Path, starts: list[list[Any]], told: list[str]) -> None:
    runs = {seed: read_run(trained(tmp_path / f"a-{seed}", seed, *own)) for seed, own in enumerate(starts)}
    found = [*differing_hardware({"a": runs}), *unknown_processors({"a": runs})]
    assert len(found) == len(told) and all(part in line for part, line in zip(told, found, strict=True))


def test_only_what_is_set_beside_each_other_is_told(tmp_path: Path) -> None:
    starts = {"dml": [AVX2, AVX2], "adm": [AVX512, AVX512], "kdcl": [GPU, GPU], "kdcl+adm": [GPU, OTHER_GPU]}
    runs = {
        label: {seed: read_run(trained(tmp_path / f"{label}-{seed}", seed, start)) for seed, start in enumerate(own)}
        for label, own in starts.items()
    }
    (line,) = differing_in_pairs(runs, {"adm": "dml", "kdcl+adm": "kdcl"})
    assert "AVX2, 1 thread (2 runs), A CPU, AVX512, 1 thread (2 runs), GPU A (3 runs), GPU B (1 run)." in line
    assert line.endswith("Averaged over several: kdcl+adm.")
    (line,) = differing_in_pairs(runs, {"kdcl+adm": "kdcl"})
    assert "AVX" not in line and "GPU A (3 runs), GPU B (1 run)" in line
    chain = {"dml": "kdcl", "adm": "dml"}  # of which no two are alike
    (line,) = differing_in_pairs({label: runs[label] for label in ("dml", "adm")}, chain)
    assert "AVX2, 1 thread (2 runs), A CPU, AVX512, 1 thread (2 runs)." in line
    assert differing_in_pairs({label: runs[label] for label in ("dml", "adm", "kdcl")}, {}) == []


def test_compare_and_report_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "results/kept"
    runs = [trained(kept / f"{name}-{seed}", seed, AVX512 if seed == 1 and name == "adm" else AVX2, method=method)
            for name, method in (("dml", "dml"), ("adm", "dml+adm")) for seed in (0, 1)]  # fmt: skip
    assert compare.main([*map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "A CPU, AVX2, 1 thread (3 runs), A CPU, AVX512, 1 thread (1 run). Averaged over several: dml+adm." in out
    assert compare.main([*map(str, runs[:2])]) == 0 and "hardware" not in capsys.readouterr().out
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/table01.yaml").write_text(TABLE)
    where = [f"--{name}={tmp_path / name}" for name in ("tables", "results", "runs", "out")]
    assert reproduce.main(["report", *where]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "Different hardware" in text and "Averaged over several: dml+adm." in text
    assert "A CPU, AVX512, 1 threads: 1 run\n" in text


def test_a_start_names_the_processor() -> None:
    import torch

    start = environment("cpu")
    assert start["cpu"].endswith(f", {torch.backends.cpu.get_cpu_capability()}") and start["threads"] >= 1


def test_a_diffusion_run_that_is_not_evaluated_says_what_to_run(tmp_path: Path) -> None:
    scored, bare = (write_chain(tmp_path / name, 0, "pd", {4: 1.0}) for name in ("scored", "bare"))
    (bare / "evaluation-inception.json").unlink()
    ended = {"kind": "evaluation", "step": 9, "epoch": 1.5}  # as of a DiT's run, which is evaluated afterwards
    (bare / "summary.json").write_text(json.dumps({"status": "finished", "last": ended}))
    with pytest.raises(InputError, match=rf"^{bare} is not evaluated.* python diffusion/tools/evaluate\.py {bare}$"):
        compare.main([str(scored), str(bare)])
