"""Runs as training and evaluation leave them, written by hand: for tools that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from core.training.run import signed

TABLE = """
table: 1
title: Top-1 accuracy of two methods
task: classification
metric: {name: top-1, unit: "%"}
notes: The paper does not say which data.
runs:
  dml: {recipe: recipes/big.yaml, method: dml, proxy: {recipe: recipes/small.yaml, results: kept/dml}}
  dml+adm: {recipe: recipes/big.yaml, method: dml+adm, proxy: {recipe: recipes/small.yaml, results: kept/adm}}
  kdcl: {recipe: recipes/big.yaml, method: kdcl, proxy: {recipe: recipes/small.yaml}}
baselines: {dml+adm: dml}
columns: [DML, DML+ADM, KDCL]
rows:
  - name: Student
    read: last.student/top1
    cells:
      - {column: DML, paper: 73.95, run: dml}
      - {column: DML+ADM, paper: 74.235, run: dml+adm}
      - {column: KDCL, paper: 74.5, run: kdcl}
"""
"""Two methods that were run and one that was not, as YAML."""
DML, ADM = {0: 60.5, 1: 61.25, 2: 60.0}, {0: 62.5, 1: 63.0, 2: 61.0}
"""Top-1 of the student by seed, for those runs."""


def write_run(
    path: Path,
    seed: int,
    students: Sequence[float],
    *,
    method: str = "dml",
    status: str | None = "finished",
    held_out: bool = False,
    roles: Mapping[str, float] | None = None,
    observed: Mapping[str, float] | None = None,
    **config: Any,
) -> Path:
    """A run folder. ``students``: top-1 after each epoch; ``roles``: other networks, by their lead over the student;
    ``observed``: what else each evaluation holds; ``status``: None for a run that was killed."""
    path.mkdir(parents=True)
    options = {"method": method, "seed": seed, "adm": {"alpha": 0.01}, **config}
    if not method.endswith("+adm"):
        del options["adm"]
    (path / "config.yaml").write_text(signed(yaml.safe_dump(options)))
    lines: list[dict[str, Any]] = []
    for epoch, value in enumerate(students, start=1):
        others = {"teacher": 5.0} if roles is None else roles
        scores = {f"{role}/top1": value + lead for role, lead in {"student": 0.0, **others}.items()}
        if held_out:  # the validation accuracy runs the other way
            scores = {k: 100 - v for k, v in scores.items()} | {f"test/{k}": v for k, v in scores.items()}
        where = {"step": epoch, "epoch": float(epoch), "split": "validation" if held_out else "test"}
        lines.append({"kind": "train", "step": epoch, "epoch": epoch, "student/ce": 1.0})
        lines.append({"kind": "evaluation", **where, **scores, **(observed or {})})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    best = {"selected_by": "student/top1", **max(evaluations, key=lambda line: line["student/top1"])}
    if status is not None:
        ended = {"status": status, "epoch": float(len(students)), "last": evaluations[-1], "best": best}
        (path / "summary.json").write_text(json.dumps({**ended, "selected_on": evaluations[-1]["split"]}))
    return path


def write_chain(path: Path, seed: int, method: str, fids: Mapping[int, float]) -> Path:
    """A diffusion run as training and evaluate.py leave it. ``fids``: by sampling steps."""
    path.mkdir(parents=True)
    teacher = {"teacher": f"runs/base-{seed}", "teacher_sha256": f"{seed}" * 64}
    (path / "config.yaml").write_text(
        signed(yaml.safe_dump({"method": method, "seed": seed, "chain": [8, 4, 2], **teacher}))
    )
    (path / "summary.json").write_text(json.dumps({"status": "finished", "method": method, "seed": seed}))
    rows = [{"network": f"{path}/round-{n:04d}/student", "steps": n, "FID": v, "IS": 10 - v} for n, v in fids.items()]
    write_evaluation(path / "evaluation-inception.json", {"distance": "FID", "score": "IS"}, rows)
    return path


def write_evaluation(file: Path, features: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """What diffusion's evaluate.py writes."""
    file.write_text(json.dumps({"features": features, "rows": rows}))
