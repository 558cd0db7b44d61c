"""Wrong commands through the tools that span tasks: one line each, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tools import compare, reproduce

TABLE = """
table: 1
title: T
task: classification
metric: {name: top-1}
runs:
  a: {recipe: classification/recipes/digits.yaml, method: dml, overrides: {networks.teacher.weights: "{run:b}"}}
  b: {recipe: classification/recipes/digits.yaml, method: dml, overrides: {networks.teacher.weights: "{run:a}"}}
columns: [A]
rows: [{name: R, read: last.student/top1, cells: [{column: A, paper: 1, run: a}]}]
"""


def refused(result: tuple[int, str, str], said: str) -> None:
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize(
    ("content", "said"),
    [(TABLE.encode(), "a run starts from itself"), (bytes(range(256)), "is no YAML"), (b"", "is no table")],
)
def test_tables_that_are_none(content: bytes, said: str, tmp_path: Path, shell: Any) -> None:
    refused(shell(reproduce.main, ["list", "--tables", str(tmp_path)]), "no tables in")
    (tmp_path / "table01.yaml").write_bytes(content)
    refused(shell(reproduce.main, ["list", "--tables", str(tmp_path)]), said)


@pytest.mark.parametrize("content", [bytes(range(256)), b'{"run": "a-0", "summary": []}\n', b'{"run": 3}\n', b"{bad\n"])
def test_kept_lines_that_are_none(content: bytes, tmp_path: Path, shell: Any) -> None:
    (tmp_path / "runs.jsonl").write_bytes(content)
    refused(shell(compare.main, [str(tmp_path)]), "runs.jsonl")


def test_seeds_and_names_that_cannot_be(tmp_path: Path, shell: Any) -> None:
    for seed in (2**32, 2**70):
        refused(shell(reproduce.main, ["run", "1", "--seeds", str(seed), "--out", str(tmp_path)]), "--seeds: a seed")
    for to in ("", "../x", "/x"):
        refused(shell(reproduce.main, ["keep", "results/quickstart", "--to", to, "--results", str(tmp_path)]), "--to")
    assert not list(tmp_path.iterdir())


def test_the_benchmark_reads_no_pipe_and_counts_its_threads(tmp_path: Path, shell: Any) -> None:
    from tools.benchmark import run

    os.mkfifo(tmp_path / "pipe")
    refused(shell(run.main, ["--compare", str(tmp_path / "pipe")]), "is no benchmark.json")
    refused(shell(run.main, ["--threads", str(2**70)]), "--threads must be at most")
