"""Kept results have numbers and no weights: the tools that need weights say so, in one line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from written import write_run

from core.errors import InputError
from core.training.kept import refuse_kept
from tools import compare
from tools.runs import keep, read_run


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Of table01/proxy/dml-0 and of mine-0 the numbers alone."""
    runs = [write_run(tmp_path / "runs" / name, 0, [60.0]) for name in ("table01/proxy/dml-0", "mine-0")]
    keep(map(read_run, runs), tmp_path / "kept")
    return tmp_path / "kept"


@pytest.mark.parametrize(
    ("tool", "more"),
    [
        ("classification.tools.evaluate", []),
        ("classification.tools.visualize", []),
        ("classification.tools.predict", ["docs"]),
        ("offline_kd.tools.evaluate", []),
        ("diffusion.tools.evaluate", []),
        ("diffusion.tools.sample", []),
        ("diffusion.tools.visualize", []),
        ("segmentation.tools.evaluate", []),
        ("segmentation.tools.visualize", []),
    ],
)
def test_what_needs_weights_says_that_none_are_kept(shell: Any, kept: Path, tool: str, more: list[str]) -> None:
    if tool.startswith("segmentation"):
        pytest.importorskip("mmseg")
    main = importlib.import_module(tool).main
    for name in ("table01/proxy/dml-0", "mine-0"):
        code, out, err = shell(main, [str(kept / name), *more])
        assert (code, out) == (2, "") and f"{kept / name} is a kept result, and weights are not kept: " in err
        assert f"{kept}/runs.jsonl has its numbers" in err and err.count("\n") == 1
    assert compare.main([str(kept / "mine-0")]) == 0  # which needs numbers alone


def test_what_is_not_kept_there_is_no_kept_result(kept: Path) -> None:
    for path in (kept, kept / "table01", kept / "mine-0"):
        with pytest.raises(InputError, match="is a kept result"):
            refuse_kept(path)
    refuse_kept(kept / "mine-00")
    refuse_kept(kept.parent / "runs/mine-0")
    lines = (kept / "runs.jsonl").read_text().splitlines()
    (kept / "runs.jsonl").write_text(f"{lines[0][:50]}\n[]\nnull\n{json.dumps({'run': 'other-0'})}\n")  # damaged
    refuse_kept(kept / "mine-0")
