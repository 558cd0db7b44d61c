"""What the report says of differences, how it names ours, and that runs shared by tables count once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from written import ADM, DML, TABLE, write_run

from tools import findings, overview
from tools.findings import Added, differences, holding, once, said
from tools.ours import first_uses, gather, named, numbers
from tools.paper import Metric, Table, load_tables
from tools.printed import printed
from tools.stats import p_value

CONTROLLED = TABLE.replace(
    "  kdcl:",
    "  uniform: {recipe: recipes/big.yaml, method: dml+adm, proxy: {recipe: r, results: kept/uniform}}\n  kdcl:",
).replace("{dml+adm: dml}", "{dml+adm: dml, uniform: dml}")
CONTROLLED = CONTROLLED.replace("KDCL]", "KDCL, uniform]").rstrip() + (
    "\n      - {column: uniform, paper: null, run: uniform}\n"
)


def write(path: Path, seed: int, top1: float, method: str, control: str = "none", **networks: str) -> None:
    ours = {"networks": {role: {"name": name} for role, name in (networks or {"student": "cifar_resnet8"}).items()}}
    adm = {"adm": {"alpha": 0.01, "control": control}} if "adm" in method else {}
    data = {"data": {"name": "digits", "per_class": 40}}
    write_run(path, seed, [top1], method=method, roles={}, **ours, **adm, **data)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Table]:
    """Two tables of the same runs: DML, DML+ADM and its uniform control, half a point below it."""
    (tmp_path / "tables").mkdir()
    for number in (1, 2):
        text = CONTROLLED.replace("table: 1", f"table: {number}")
        (tmp_path / f"tables/table{number:02d}.yaml").write_text(text)
    for seed in DML:
        write(tmp_path / f"results/kept/dml-{seed}", seed, DML[seed], "dml")
        write(tmp_path / f"results/kept/adm-{seed}", seed, ADM[seed], "dml+adm")
        write(tmp_path / f"results/kept/uniform-{seed}", seed, ADM[seed] - 0.5 - 0.01 * seed, "dml+adm", "uniform")
    return load_tables(tmp_path / "tables")


def found_in(table: Table, place: Path) -> list[Added]:
    members, _ = gather(table, "proxy", place / "runs", place / "results")
    return differences(table, "proxy", numbers(table, "proxy", members))


def test_adm_its_control_and_what_lies_between_them(tables: dict[str, Table], tmp_path: Path) -> None:
    added = {(one.kind, one.name, one.to): one for one in found_in(tables["table01"], tmp_path)}
    assert list(added) == [
        ("ADM", "Student, DML+ADM", "DML"),
        ("control", "Student, uniform", "DML"),
        ("attention", "Student, DML+ADM", "uniform"),
    ]
    attention = added["attention", "Student, DML+ADM", "uniform"]
    assert attention.difference.mean == pytest.approx(0.51) and attention.verdict == "gain"
    assert added["ADM", "Student, DML+ADM", "DML"].paper == pytest.approx(0.285)
    words = said(list(added.values()))
    assert "1 of 1 intervals say that the attention is what adds" in words[0]
    assert any(word.startswith("**A control") and "1 interval: 0 gains" in word for word in words)


def test_runs_that_tables_share_count_once_and_are_marked(tables: dict[str, Table], tmp_path: Path) -> None:
    every = [one for table in tables.values() for one in found_in(table, tmp_path)]
    assert len(every) == 6 and [one.table.name for one in once(every)] == ["table01"] * 3
    gathered = [(table, gather(table, "proxy", tmp_path, tmp_path / "results")[0]) for table in tables.values()]
    first = first_uses(gathered)
    shown = {}
    for table, members in gathered:
        made = printed(table, "proxy", numbers(table, "proxy", members), first)
        assert made is not None and made.caption == f"{table.label}: top-1 (%); ours: cifar_resnet8 on digits"
        shown[table.name] = made.grid[1]
    assert shown["table01"][1] == "73.950 / 60.583 ± 0.629 (3)"
    assert shown["table02"][1] == "73.950 / 60.583 ± 0.629 (3), of Table 1"
    assert shown["table02"][3] == "74.500 / not run" and shown["table02"][4].startswith("- / 61.657")
    lines = overview.what_was_run((table, "proxy", members) for table, members in gathered)
    assert [line[1:6] for line in lines[1:]] == [["cifar_resnet8", "digits", "40 images each, 1 epoch", "9", "0 to 2"]]
    assert lines[1][-1] == "Table 1, 2"


@pytest.mark.parametrize(
    ("students", "place"),
    [
        ({"dml": "resnet8", "adm": "resnet8"}, "all"),
        ({"dml": "resnet8", "adm": "vgg8"}, "columns"),
    ],
)
def test_ours_are_named_where_they_are_one(tmp_path: Path, students: dict[str, str], place: str) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/table01.yaml").write_text(TABLE)
    for name, method in (("dml", "dml"), ("adm", "dml+adm")):
        write(tmp_path / f"results/kept/{name}-0", 0, 50.0, method, student=students[name], teacher="resnet20")
    (table,) = load_tables(tmp_path / "tables").values()
    where = named(numbers(table, "proxy", gather(table, "proxy", tmp_path, tmp_path / "results")[0]))
    if place == "all":
        assert where.all == "resnet8 on digits" and not where.columns
    else:
        both = {"DML": "resnet20 with resnet8 on digits", "DML+ADM": "resnet20 with vgg8 on digits"}
        assert where.columns == both and not where.all


def test_runs_may_be_kept_in_the_tables_own_folder(tables: dict[str, Table], tmp_path: Path) -> None:
    write(tmp_path / "results/table01/dml-7", 7, 50.0, "dml")
    members, _ = gather(tables["table01"], "proxy", tmp_path / "runs", tmp_path / "results")
    assert list(members["dml"]) == [0, 1, 2, 7]


# --- the rule ---------------------------------------------------------------------------------------------------------


def an(table: Table, place: Path, values: list[float], **metric: object) -> Added:
    """A difference of these values, a seed each."""
    from dataclasses import replace

    from tools.stats import paired

    one = found_in(table, place)[0]
    number = replace(one.one, cell=replace(one.one.cell, metric=Metric("m", **metric)))  # type: ignore[arg-type]
    difference = paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    return Added(table, "proxy", "ADM", number, one.base, difference)


@pytest.mark.parametrize(
    ("values", "metric", "verdict", "better"),
    [
        ([1.0, 1.2, 1.1], {"unit": "%"}, "gain", True),
        ([-1.0, -1.2, -1.1], {"unit": "%"}, "loss", False),
        ([-1.0, -1.2, -1.1], {"higher_is_better": False}, "gain", True),
        ([0.1, -0.1, 0.05], {"unit": "%"}, "no difference larger than 1 point", True),
        ([0.1, -0.1, 0.05], {}, "cannot tell", True),
        ([3.0, -4.0, 2.0], {"unit": "%"}, "cannot tell", True),
        ([1.0, 1.0], {"unit": "%"}, "cannot tell", True),
        ([5.0], {"unit": "%"}, "one seed", True),
    ],
)
def test_the_rule(
    tables: dict[str, Table], tmp_path: Path, values: list[float], metric: dict, verdict: str, better: bool
) -> None:
    added = an(tables["table01"], tmp_path, values, **metric)
    assert added.verdict == verdict
    (axis,) = overview.forest([added])
    ((_, (bar,)),) = axis.tables
    assert (bar.at > 50) is better and bar.left <= bar.at <= bar.left + bar.width
    low, high = added.difference.interval or (added.difference.mean,) * 2
    beyond = bool(low < -axis.limit), bool(high > axis.limit)
    assert (bar.open_left, bar.open_right) == (beyond if added.sign > 0 else beyond[::-1])


def test_the_tests_are_students_and_holms(tables: dict[str, Table], tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = list(np.random.default_rng(0).normal(size=5))
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert p_value([1.0]) is None and p_value([1.0, 1.0]) is None
    wanted, given = [0.005, 0.01, 0.03, 0.04], []
    for p in wanted:  # two values around 1 whose t test has this p
        spread = 1 / float(stats.t.isf(p / 2, 1))
        given.append(an(tables["table01"], tmp_path, [1 + spread, 1 - spread]))
    assert [one.p for one in given] == pytest.approx(wanted)
    assert holding(given) == given[:2]  # 0.005 x 4 and 0.01 x 3 are below 5 %, 0.03 x 2 is not
    assert findings.holding([]) == []
