"""The one reader of a run: what its queries find, in folders and in kept lines; and the statistics of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written import write_evaluation, write_run

from core.errors import InputError
from tools.runs import Run, keep, read_run, read_runs, seeds_of
from tools.stats import interval, markdown, paired, spread


@pytest.fixture(params=["a folder", "a kept line"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Reads a run folder, or keeps it and reads what was kept."""
    kept: list[Run] = []

    def reader(folder: Path) -> Run:
        if request.param == "a folder":
            return read_run(folder)
        where = tmp_path / "results" / str(len(kept))
        keep([read_run(folder)], where)
        kept.append(read_run(where / folder.name))
        return kept[-1]

    return reader


def test_a_query_is_a_path_in_the_summary(tmp_path: Path, read: Any) -> None:
    folder = write_run(tmp_path / "x-0", 0, [70.0, 71.5])
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"teacher": {"top1": 83, "of": {"IoU.road": 7.0}}, "finished": True}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = read(folder)
    assert run.number("last.student/top1") == 71.5
    assert run.number("teacher.top1") == 83.0 and run.number("teacher.of.IoU.road") == 7.0
    assert run.number("last.teacher/top9") is run.number("evaluation.distance") is None
    assert run.number("status") is run.number("finished") is None  # no number


def test_a_query_of_some_epoch(tmp_path: Path, read: Any) -> None:
    run = read(write_run(tmp_path / "x-0", 0, [1.0, 2.0, 3.0, 4.0]))
    assert run.number("metrics.student/top1", at=0.25) == 1.0
    assert run.number("metrics.student/top1", at=1) == 4.0
    assert run.number("metrics.student/top1", {"epoch": 3}) == 3.0
    assert run.number("metrics.student/top1", at=0.6) is None
    assert run.number("metrics.student/top1") is None  # which one?
    stopped = read(write_run(tmp_path / "y-0", 0, [1.0, 2.0], status="interrupted"))
    assert stopped.number("metrics.student/top1", at=1.0) is None  # of a run that is not at its end, half is no half
    assert stopped.number("metrics.student/top1", {"epoch": 2}) == 2.0


def test_a_query_of_an_evaluation(tmp_path: Path, read: Any) -> None:
    features = {"distance": "FD-x", "score": "CS-x"}
    folder = write_run(tmp_path / "x-0", 0, [1.0])
    write_evaluation(
        folder / "evaluation.json", features, [{"steps": n, "FD-x": float(n), "CS-x": 10.0 * n} for n in (4, 2, 1)]
    )
    run = read(folder)
    assert run.number("evaluation.distance", {"steps": 2}) == run.number("evaluation.FD-x", {"steps": 2}) == 2.0
    assert run.number("evaluation.score", {"steps": 4}) == 40.0
    assert run.number("evaluation.score") is run.number("evaluation.score", {"steps": 8}) is None
    rows = [{"iteration": n, "guidance": g, "FD-x": n / g} for n in (1000, 2000, 4000) for g in (4.0, 1.0)]
    write_evaluation(folder / "evaluation.json", features, rows)
    run = read(folder)
    assert run.number("evaluation.distance", {"guidance": 4.0}, at=0.25) == 250.0
    assert run.number("evaluation.distance", {"guidance": 1.0}, at=1) == 4000.0
    assert run.number("evaluation.distance", {"guidance": 1.0}, at=0.75) is None


def test_an_evaluation_of_weights_alone_is_read_and_kept(tmp_path: Path, read: Any) -> None:
    (tmp_path / "resnet20").mkdir()
    (tmp_path / "resnet20/evaluation.json").write_text(json.dumps({"values": {"student/top1": 81.0}}))
    assert read(tmp_path / "resnet20").number("evaluation.values.student/top1") == 81.0


def test_runs_are_found_by_folder_pattern_and_seed(tmp_path: Path) -> None:
    for seed in (0, 10, 2):
        write_run(tmp_path / f"runs/dml-{seed}", seed, [1.0])
    write_run(tmp_path / "runs/dml-x", 0, [1.0])
    assert list(seeds_of(tmp_path / "runs/dml")) == [0, 2, 10]
    assert [run.path.name for run in read_runs([tmp_path / "runs"])] == ["dml-0", "dml-10", "dml-2", "dml-x"]
    keep(read_runs([tmp_path / "runs"]), tmp_path / "results/mine")
    assert list(seeds_of(tmp_path / "results/mine/dml")) == [0, 2, 10]
    assert [run.path.name for run in read_runs([tmp_path / "results/mine/dml-?"])] == ["dml-0", "dml-2", "dml-x"]
    with pytest.raises(InputError, match="no run folder"):
        read_runs([tmp_path / "results/mine/afd*"])


@pytest.mark.parametrize("count", [2, 3, 5, 31])
def test_the_interval_is_students(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=count)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(list(values)) == pytest.approx((expected.low, expected.high), rel=1e-10)


def test_spreads_and_differences_in_words() -> None:
    assert [spread(values) for values in ([], [1.0], [1.0, 3.0])] == ["-", "1.00", "2.00 ± 1.41"]
    assert spread([1.0, 3.0], 1, "+") == "+2.0 ± 1.4"
    assert paired({0: 2.0}, {0: 1.5, 1: 9.0}).told() == "+0.50 (one seed)"
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 1.0}).told(1) == "+1.5 (-4.9 to +7.9)"
    assert paired({0: 2.0}, {1: 1.0}).told() == ""
    assert markdown([["a", "b"], ["long", "c"]], aligned=True).splitlines() == [
        "| a    | b |", "|------|---|", "| long | c |",
    ]  # fmt: skip
