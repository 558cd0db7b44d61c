"""Figures of comparisons and of the report: one look for a method, points at their place; and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from written import write_evaluation, write_run

from core.analysis.looks import METHODS, method_look, method_looks
from tools import pictures, reproduce
from tools.compare import figure_of
from tools.groups import compare_runs
from tools.runs import read_run


def test_a_method_looks_the_same_in_every_figure() -> None:
    drawn = [("vanilla", None), ("dml", None), ("dml+adm", None), ("dml+adm", "uniform"), ("dml+adm", "shuffled")]
    alone = method_looks(drawn)
    assert len({look["color"] for look in alone}) == len({look["marker"] for look in alone}) == 5
    assert method_looks([("kdcl", None), *drawn])[1:] == alone
    online = ["vanilla", "dml", "kdcl", "switokd", "shake", "afd", "afid"]
    every = method_looks([(method + added, None) for method in online for added in ("", "+adm")])
    assert len({str(look) for look in every}) == len(every)
    assert method_look("kd+adm")["color"] == method_look("dml+adm")["color"]
    again = method_looks([("dml+adm", None)] * 4)
    assert len({str(look) for look in again}) == 4 and len({look["color"] for look in again}) == 1
    assert all(method_look(method) != method_look(f"{method}+adm") for method in METHODS)


def test_points_stand_at_their_iteration(tmp_path: Path) -> None:
    paths = []
    for method, seed in ((m, s) for m in ("mse", "mse+adm") for s in (0, 1)):
        path = write_run(tmp_path / f"{method}-{seed}", seed, [1.0], method=method, roles={})
        (path / "summary.json").write_text('{"status": "finished"}')
        rows = [{"network": "n", "steps": 50, "iteration": i, "guidance": 4.0, "FID": i / 2.0} for i in (600, 2400)]
        write_evaluation(path / "evaluation.json", {"distance": "FID"}, rows)
        paths.append(path)
    figure = figure_of(compare_runs([read_run(path) for path in paths]))
    (axis,) = figure.axes
    points = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() in "oD"]
    assert points == [[[600.0, 300.0], [2400.0, 1200.0]]] * 2
    assert axis.get_xlabel() == "iteration" and axis.get_title() == "guidance 4"


def test_the_legend_lies_in_the_figure_and_a_fixed_teacher_has_no_panel(tmp_path: Path) -> None:
    methods = [f"{base}{more}" for base in ("vanilla", "kd", "dkd", "norm", "diswot") for more in ("", "+adm")]
    runs = []
    for number, method in enumerate(methods * 2):
        path = write_run(tmp_path / str(number), 0, [10.0, 20.0 + number], method=method, roles={}, batch_size=number)
        text = (path / "metrics.jsonl").read_text().replace('"student/top1"', '"teacher/top1": 80.0, "student/top1"')
        (path / "metrics.jsonl").write_text(text)
        runs.append(read_run(path))
    figure = figure_of(compare_runs(runs))
    assert [axis.get_title() for axis in figure.axes] == ["student"]
    figure.draw_without_rendering()
    (part,) = figure.subfigs
    (legend,) = part.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 20 and box.y0 >= 0 and box.y1 <= figure.axes[0].get_window_extent().y0


def test_kept_runs_keep_small_copies_of_what_one_seed_drew(tmp_path: Path) -> None:
    for seed in (0, 1):
        path = write_run(tmp_path / f"runs/dml-{seed}", seed, [50.0])
        (path / "figures").mkdir()
        noise = np.random.default_rng(seed).integers(0, 255, (300, 1500, 3), np.uint8)
        Image.fromarray(noise).save(path / "figures/maps.png")
        Image.fromarray(noise).save(path / "curves.png")
        (path / "samples").mkdir()
        Image.fromarray(noise[:20, :20]).save(path / "samples/samples.png")
    results = tmp_path / "results"
    assert reproduce.main(["keep", str(tmp_path / "runs"), "--to", "mine", f"--results={results}"]) == 0
    assert sorted(p.relative_to(results / "mine").as_posix() for p in results.rglob("*.png")) == [
        "dml-0/curves.png", "dml-0/figures/maps.png", "dml-0/samples/samples.png",
    ]  # fmt: skip
    with Image.open(results / "mine/dml-0/figures/maps.png") as image:
        assert image.size == (pictures.KEPT_WIDTH, 128)
    kept = read_run(results / "mine/dml-0")
    assert kept.finished and [file.name for file in pictures.left_by(kept)] == ["maps.png", "samples.png"]
    assert [run.seed for run in map(read_run, (results / "mine/dml-0", results / "mine/dml-1"))] == [0, 1]
