"""docs/results.md from results/: its blocks, and that it is what the repository keeps."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from written import ADM, DML, TABLE, write_evaluation, write_run

from core.errors import InputError
from tools import document
from tools.compare import difference_rows, score_rows
from tools.groups import compare_runs
from tools.paper import load_tables
from tools.runs import keep, read_run

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, seed: int, top1: float, method: str = "dml", status: str = "finished") -> Path:
    observed = {"attention/consensus_variance": 0.0625}
    return write_run(path, seed, [top1 - 20, top1], method=method, status=status, roles={}, observed=observed)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A section with two methods, kept as lines but for DML's last seed; and a table for which they stand."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/table01.yaml").write_text(TABLE)
    other = TABLE.replace("table: 1", "table: 2").replace("kept/", "elsewhere/").replace("small", "smaller")
    (tmp_path / "tables/table02.yaml").write_text(other)
    results = tmp_path / "results"
    runs = [write(tmp_path / f"runs/dml-{seed}", seed, 99.0 if seed == 0 else DML[seed]) for seed in (0, 1)]
    runs += [write(tmp_path / f"runs/adm-{seed}", seed, ADM[seed], "dml+adm") for seed in ADM]
    keep([read_run(run) for run in runs], results / "kept")
    write(results / "kept/dml-2", 2, DML[2])
    return results


def test_the_document_is_what_results_yields() -> None:
    rendered = document.render(ROOT / "results")
    told = "python tools/reproduce.py report --document makes docs/results.md anew"
    assert (ROOT / "docs/results.md").read_text() == rendered, told


def notes(results: Path, text: str) -> Path:
    (results / "notes.md").write_text("# Ours\n\n```sections\n- kept\n```\n")
    (results / "kept/notes.md").write_text(f"## Kept\n\n{text}\nThe end.\n")
    return results


def test_tables_of_the_document(results: Path) -> None:
    text = """```table
rows: [{row: dml, label: plain}, {row: adm, label: with ADM}, {row: none, label: none}]
runs: "{row}"
read: last.student/top1
missing: not run
columns:
  method: "{label}"
  n: {count: only}
  top-1: {digits: 1, count: true}
  less plain: {less: dml}
  both: {read: [last.student/top1, last.attention/consensus_variance], scale: 2}
  epoch 1: {where: {epoch: 1}, read: metrics.student/top1, sign: true}
```"""
    rows = [line.split(" | ") for line in document.render(notes(results, text)).splitlines() if line.startswith("| ")]
    plain, adm = np.array([99.0, DML[1], DML[2]]), np.array(list(ADM.values()))
    std = [values.std(ddof=1) for values in (plain, adm)]
    reach = 4.302653 * (adm - plain).std(ddof=1) / math.sqrt(3)
    mean = (adm - plain).mean()
    assert rows[1][:4] == ["| plain", "3", f"{plain.mean():.1f} ± {std[0]:.1f} (3)", ""]
    assert rows[2][:3] == ["| with ADM", "3", f"{adm.mean():.1f} ± {std[1]:.1f} (3)"]
    assert rows[2][3] == f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})"
    assert rows[2][4] == f"{2 * adm.mean():.2f} ± {2 * std[1]:.2f} / 0.12 ± 0.00"
    assert rows[2][5] == f"+{adm.mean() - 20:.2f} ± {std[1]:.2f} |"
    assert rows[3] == ["| none", *["not run"] * 4, "not run |"]


def test_rows_of_evaluation_files(results: Path) -> None:
    for seed in (5, 6):
        folder = write(results / f"kept/scored-{seed}", seed, 50.0)
        rows = [{"steps": n, "FID-digits": v + seed - 5} for n, v in ((4, 2.0), (1, 5.0))]
        write_evaluation(folder / "evaluation-digits.json", {"distance": "FID-digits"}, rows)
    text = """```table
each: {row: [scored], steps: [1, 4, 2]}
runs: "{row}"
where: {steps: "{steps}"}
missing: "-"
columns: {method: "{row}", steps: "{steps}", FID: {read: evaluation-digits.FID-digits, digits: 3}}
```"""
    lines = [line for line in document.render(notes(results, text)).splitlines() if line.startswith("| scored")]
    assert lines == ["| scored | 1 | 5.500 ± 0.707 |", "| scored | 4 | 2.500 ± 0.707 |", "| scored | 2 | - |"]


def test_the_papers_tables_in_the_document(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "load_tables", partial(load_tables, folder=results.parent / "tables"))
    write(results / "kept/table01/proxy/dml-0", 0, DML[0])  # before the 99 that is kept beside it
    text = document.render(notes(results, "```paper\ntable: table01\n```"))
    assert "| paper / ours | DML | DML+ADM | KDCL |" in text and "What it adds" in text
    assert "| Student | 73.950 / 60.583 ± 0.629 (3) | 74.235 / 62.167 ± 1.041 (3) | 74.500 / not run |" in text
    text = document.render(notes(results, "```paper\ntable: table01\nfinished: true\n```"))
    assert "| 74.235 / 62.167 ± 1.041 (3) |" in text and "KDCL" not in text
    with pytest.raises(InputError, match="no run of table02 is kept"):
        document.render(notes(results, "```paper\ntable: table02\n```"))


def test_the_document_compares_as_compare_does(results: Path) -> None:
    block = "```compare\nruns: [dml, adm]\nshow: {}\nbaseline: dml\n```\n"
    text = document.render(notes(results, block.format("scores") + block.format("differences")))
    runs = [read_run(results / f"kept/{name}-{seed}") for name in ("dml", "adm") for seed in (0, 1, 2)]
    compared = compare_runs(runs, baseline="dml")
    expected = [*score_rows(compared)[1:], *difference_rows(compared)[1:]]
    assert len(expected) == 3 and all("| " + " | ".join(row) + " |" in text for row in expected)


def test_a_wrong_note_is_named_in_one_line(results: Path) -> None:
    table = "```table\nrows: [dml]\nruns: '{row}'\ncolumns: {a: {read: last.student/top1}}\n```"
    assert "| 73.42 ±" in document.render(notes(results, table))
    for text, words in (
        (table.replace("[dml]", "[nobody]"), "no run nobody-<seed> holds last.student/top1"),
        (table.replace("top1", "top9"), "no run dml-<seed> holds last.student/top9"),
        (table.replace("{row}", "{what}"), "lacks 'what'"),
        (table.replace("rows:", "rwos:"), "lacks 'rows'"),
        (table.replace("[dml]", "[dml"), "kept/notes.md, block table"),
        ("```benchmark\nnone.json: [a]\n```", "No such file"),
    ):
        with pytest.raises(InputError) as error:
            document.render(notes(results, text))
        assert words in str(error.value) and "\n" not in str(error.value)
    write(results / "kept/dml-7", 7, 1.0, status="interrupted")
    with pytest.raises(InputError, match="dml-7 is not finished"):
        document.render(notes(results, table))
    assert "| 55.31 ±" in document.render(notes(results, table.replace("columns", "partial: true\ncolumns")))
    (results / "other").mkdir()
    (results / "other/notes.md").write_text("## Other\n")
    with pytest.raises(InputError, match="does not name the section other"):
        document.render(notes(results, "nothing"))
