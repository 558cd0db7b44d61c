"""The paper as data: every file follows the schema, each run is one its task would take, each number is the paper's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from written import write_run

from core.errors import InputError
from core.training.run import flatten
from tools.paper import ROOT, SCALES, Cell, Setting, Table, find_table, load_tables
from tools.runs import read_run, seeds_of

TABLES = load_tables()


# --- the files --------------------------------------------------------------------------------------------------------


def test_every_table_and_figure_of_the_paper_is_there() -> None:
    of_paper = [name for name in TABLES if not name.startswith("evidence")]
    assert of_paper == [f"table{n:02d}" for n in range(1, 22)] + [f"figure{n:02d}" for n in range(1, 12)]
    assert list(TABLES)[: len(of_paper)] == of_paper
    assert TABLES["table01"].label == "Table 1" and TABLES["figure10"].label == "Figure 10"


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_is_whole(table: Table) -> None:
    assert table.notes, "what is open or wrong in the paper"
    assert bool(table.runs) == (table.task != "none")
    for row in table.rows:
        columns = [cell.column for cell in table.cells if cell.row == row]
        assert columns == list(table.columns), f"{row}: a cell for each column, in their order"
    scales = {"proxy"} if table.name.startswith("evidence") else set(SCALES)
    used = {cell.run for cell in table.cells} - {None}
    for run_id, run in table.runs.items():
        needed = {other for one in table.runs.values() for s in one.values() for _, other in s.needs.values()}
        assert run_id in used | needed, f"no cell reads {run_id}"
        assert run_id not in used or set(run) == scales, f"{run_id} is of {', '.join(run)} alone"
    assert set(table.needs) == (scales if table.runs else set())
    for cell in table.cells:
        adds = cell.run in table.baselines and cell.show is None
        assert (table.baseline(cell) is not None) == adds, f"{cell.row}, {cell.column}: nothing to compare with"


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_what_a_run_names_is_there(table: Table) -> None:
    for run in table.runs.values():
        for scale, setting in run.items():
            assert (ROOT / setting.recipe).is_file()
            for command in setting.commands(0, "out"):
                assert (ROOT / command[0]).is_file()
            for name, other in setting.needs.values():
                assert scale in TABLES[name].runs[other]
            if setting.results is not None:
                assert seeds_of(ROOT / "results" / setting.results), f"no kept runs {setting.results}"


def test_no_number_is_printed_twice_for_one_run() -> None:
    """Of one run's one value, tables that share the run print the same, but where the paper contradicts itself."""
    seen: dict[tuple[Any, ...], dict[float, set[str]]] = {}
    for table in TABLES.values():
        for cell in table.cells:
            if cell.run is None or cell.paper is None:
                continue
            setting = table.runs[cell.run]["paper"]
            key = (setting.table, setting.run, cell.read, cell.at, str(cell.where))
            seen.setdefault(key, {}).setdefault(cell.paper, set()).add(table.name)
    differing = {key[:3]: values for key, values in seen.items() if len(values) > 1}
    # ResNet-18 alone, beside the half-width MobileNetV2
    contradiction = {("table04", "mobilenetv2-vanilla", "last.teacher/top1"): {70.43: {"table04"}, 70.16: {"table14"}}}
    assert differing == contradiction


def test_loading_needs_no_torch() -> None:
    code = "import sys, tools.paper; tools.paper.load_tables(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_command_of_a_cell() -> None:
    run = "runs/reproduce/table01/paper/resnet-dml-3"
    assert TABLES["table01"].runs["resnet-dml"]["paper"].commands(3, "runs/reproduce") == [
        [
            "classification/tools/train.py", "--config", "classification/recipes/cifar100.yaml", "--method", "dml",
            "--data.root", "data", "--data.download", "true", "--networks.teacher.name", "cifar_resnet32x4",
            "--networks.student.name", "cifar_resnet8x4", "--seed", "3", "--out", run,
        ]
    ]  # fmt: skip


def test_segmentation_is_called_mmengines_way() -> None:
    (command,) = TABLES["table05"].runs["pspnet-dml+adm"]["proxy"].commands(1, "out")
    assert command == [
        "segmentation/tools/train.py", "segmentation/configs/pspnet_camvid.py", "--method", "dml+adm",
        "--data-root", "data/camvid", "--seed", "1", "--out", "out/table05/proxy/pspnet-dml+adm-1",
    ]  # fmt: skip


def test_a_run_is_scored_after_it_and_starts_from_what_it_needs() -> None:
    table = TABLES["table06"]
    train, score = table.runs["pd+adm"]["proxy"].commands(2, "out")
    assert train[:2] == ["diffusion/tools/train.py", "progressive"]
    assert train[train.index("--teacher") + 1] == "out/table06/proxy/shared-2/round-0008/student"
    assert score[:2] == ["diffusion/tools/evaluate.py", "out/table06/proxy/pd+adm-2"]
    assert score[-1] == "out/table06/proxy/pd+adm-2/evaluation.json"
    assert table.runs["pd+adm"]["proxy"].needs == {"shared": ("table06", "shared")}


def test_a_shared_run_has_one_folder() -> None:
    """Table 16's vanilla teacher is Table 3's run, whose small stand-in is Table 1's."""
    table = TABLES["table16"]
    assert table.runs["vanilla"]["paper"].folder(0, "out") == Path("out/table03/paper/r34-r18-vanilla-0")
    assert table.runs["vanilla"]["proxy"].folder(0, "out") == Path("out/table01/proxy/resnet-vanilla-0")
    (command,) = table.runs["shake"]["proxy"].commands(0, "out")
    assert command[command.index("--networks.teacher.weights") + 1] == "out/table01/proxy/resnet-vanilla-0"
    assert table.runs["shake"]["proxy"].needs == {"vanilla": ("table01", "resnet-vanilla")}


# --- the schema -------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "table": 1,
    "title": "t",
    "task": "segmentation",
    "metric": {"name": "mIoU"},
    "bases": {"b": {"recipe": "r.py", "overrides": {"a": 1, "c": None}, "proxy": {"recipe": "p.py"}}},
    "runs": {
        "x": {
            "base": "b",
            "method": "m",
            "overrides": {"d": [1, 2]},
            "all_scales": {"e.f": True},
            "proxy": {"overrides": {"a": "{run:y}/{seed}"}, "after": ["s.py {run} --flag"]},
        },
        "y": {"base": "b"},
    },
    "columns": [{"name": "k", "read": "last.k"}, "l"],
    "rows": [{"name": "n", "run": "x", "cells": [{"column": "k", "paper": 1}, {"column": "l", "read": "a.b/c"}]}],
}


def write(folder: Path, values: dict[str, Any] | None = None, name: str = "table01", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**(values or SMALL), **changes}, sort_keys=False))
    return folder


def test_a_run_is_its_base_with_its_own_on_top(tmp_path: Path) -> None:
    table = load_tables(write(tmp_path))["table01"]
    assert table.runs["x"]["paper"].overrides == {"method": "m", "a": 1, "c": None, "d": [1, 2], "e.f": True}
    assert table.runs["y"]["paper"].overrides == {"a": 1, "c": None}
    (paper,) = table.runs["x"]["paper"].commands(0, "o")
    assert paper == [
        "segmentation/tools/train.py", "r.py", "--method", "m", "--seed", "0", "--out", "o/table01/paper/x-0",
        "--cfg-options", "a=1", "c=None", "d=[1,2]", "e.f=True",
    ]  # fmt: skip
    proxy, after = table.runs["x"]["proxy"].commands(7, "o")
    assert proxy[-3:] == ["--cfg-options", "a=o/table01/proxy/y-7/7", "e.f=True"]
    assert after == ["s.py", "o/table01/proxy/x-7", "--flag"]


def test_same_as_takes_the_run_of_another_table(tmp_path: Path) -> None:
    runs = {"z": {"same_as": "table01/x", "after": ["w.py {run}"]}, "own": {"recipe": "q.py", "proxy": {}}}
    runs["own"]["proxy"] = {"same_as": "table01/y"}
    rows = [{"name": "n", "run": "z", "cells": [{"column": "k"}]}]
    write(tmp_path)
    table = load_tables(write(tmp_path, name="table02", table=2, bases={}, runs=runs, rows=rows))["table02"]
    assert table.runs["z"]["paper"].table == "table01"
    assert [command[0] for command in table.runs["z"]["proxy"].commands(0, "o")][1:] == ["s.py", "w.py"]
    assert table.runs["own"]["paper"].folder(0, "o") == Path("o/table02/paper/own-0")
    assert table.runs["own"]["proxy"].folder(0, "o") == Path("o/table01/proxy/y-0")


def test_cells_take_from_their_row_before_their_column(tmp_path: Path) -> None:
    columns = [{"name": "k", "read": "last.k", "at": 0.5, "metric": {"name": "of column"}}, "l"]
    rows = [
        {
            "name": "n",
            "run": "x",
            "read": "last.row",
            "cells": [{"column": "k"}, {"column": "l", "read": "own", "run": "y"}],
        }
    ]
    first, second = load_tables(write(tmp_path, columns=columns, rows=rows))["table01"].cells
    assert (first.run, first.read, first.at, first.metric.name) == ("x", "last.row", 0.5, "of column")
    assert (second.run, second.read, second.at, second.metric.name) == ("y", "own", None, "mIoU")


ROW = {"name": "n", "run": "x"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": "x"}, "unknown key tasks"),
        ({"table": 2}, "the file says it is table 2"),
        ({"task": "detection"}, "task 'detection'"),
        ({"metric": {"nam": "x"}}, "unknown key nam"),
        ({"needs": {"small": "x"}}, "unknown key small"),
        ({"runs": {**SMALL["runs"], "w": {"base": "q", "recipe": "r"}}}, "there is no such base"),
        ({"runs": {**SMALL["runs"], "w": {"recipes": "r"}}}, "unknown key recipes"),
        ({"runs": {**SMALL["runs"], "w": {"method": "m"}}}, "neither recipe nor same_as"),
        ({"runs": {**SMALL["runs"], "w": {"same_as": "table09/x"}}}, "no such run"),
        ({"runs": {**SMALL["runs"], "w": {"recipe": "r", "all_scales": {"a": "{run:nobody}"}}}}, "no such run"),
        ({"rows": [{**ROW, "cells": [{"column": "q"}]}]}, "no column q"),
        ({"rows": [{**ROW, "cells": [{"column": "l"}]}]}, "neither read nor show"),
        ({"rows": [{**ROW, "cells": [{"column": "k", "run": "q"}]}]}, "no run q"),
        ({"rows": [{**ROW, "cells": [{"column": "k", "run": None}]}]}, "no run and no why"),
        ({"rows": [{**ROW, "cells": [{"column": "k", "papr": 1}]}]}, "unknown key papr"),
    ],
)
def test_what_breaks_the_schema_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as error:
        load_tables(write(tmp_path, **changes))
    assert "\n" not in str(error.value) and "table01" in str(error.value)


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "table01.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is no YAML"):
        load_tables(tmp_path)
    (tmp_path / "table01.yaml").write_text("- a")
    with pytest.raises(InputError, match="is no table"):
        load_tables(tmp_path)
    with pytest.raises(InputError, match="no table table99"):
        find_table("table99", TABLES)


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_cell_reads_its_run(tmp_path: Path) -> None:
    def value(**cell: Any) -> float | None:
        return Cell("r", "c", TABLES["table01"].metric, run="x", **cell).value(read_run(run))

    run = write_run(tmp_path / "x-0", 0, [70.0, 71.5])
    assert value(read="last.student/top1") == 71.5
    assert value(read="metrics.student/top1", at=0.5) == 70.0
    assert value() is None


def test_complete_means_every_number_and_picture(tmp_path: Path) -> None:
    table = TABLES["figure10"]
    run = write_run(tmp_path / "dml-0", 0, [70.0])
    assert not table.complete("dml", run)
    scored = write_run(tmp_path / "dml-1", 0, [70.0], observed={"teacher/ece": 1.0, "student/ece": 2.0})
    assert not table.complete("dml", scored)
    (scored / "figures").mkdir()
    (scored / "figures/reliability.png").touch()
    assert table.complete("dml", scored)


# --- what the tasks say -----------------------------------------------------------------------------------------------


def distinct() -> Iterator[tuple[Table, str, Setting]]:
    """Each run once, at each scale."""
    seen = set()
    for table in TABLES.values():
        for run_id, run in table.runs.items():
            for scale, setting in run.items():
                if (key := (setting.table, setting.run, scale, setting.after)) not in seen:
                    seen.add(key)
                    yield table, run_id, setting


def check_command(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parses it as its own command does. Raises: InputError for one that the task would not take."""
    script, *rest = argv
    if script == "classification/tools/train.py":
        from classification.config import parse_command

        return parse_command(rest)
    if script == "offline_kd/tools/train.py":
        from classification.config import parse_command
        from offline_kd.config import OFFLINE

        return parse_command(rest, task=OFFLINE)
    if script == "segmentation/tools/train.py":
        pytest.importorskip("mmseg")
        from segmentation.config import load_config
        from segmentation.tools.train import main

        def train(config: str, changes: dict[str, Any], **_: Any) -> int:
            load_config(config, changes)
            return 0

        monkeypatch.setattr("segmentation.training.train", train)
        return main(rest)
    if script == "diffusion/tools/train.py":
        from diffusion.dit.config import DiTTrainingConfig
        from diffusion.progressive.config import ProgressiveConfig
        from diffusion.training import parse_config

        kind: Any = ProgressiveConfig if rest[0] == "progressive" else DiTTrainingConfig
        return parse_config(kind, rest[1:])
    if script == "diffusion/tools/evaluate.py":
        from diffusion.tools.evaluate import parse_options
    elif script == "diffusion/tools/visualize.py":
        from diffusion.tools.visualize import parse_options
    else:
        assert script == "classification/tools/visualize.py"
        from classification.tools.visualize import parse_options
    return parse_options(rest)


def check_all(
    runs: Sequence[tuple[Table, str, Setting]], monkeypatch: pytest.MonkeyPatch, then: Callable[[str], bool]
) -> None:
    refused = []
    for table, run_id, setting in runs:
        train, *after = setting.commands(0, "out")
        for command in [train, *(words for words, line in zip(after, setting.after, strict=True) if then(line))]:
            try:
                check_command(command, monkeypatch)
            except InputError as error:
                refused.append(f"{table.name}, {run_id}, {setting.scale}: {error}")
    assert not refused, "\n".join(refused)


def test_each_recipe_takes_what_is_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each recipe the run with most options; all runs, and segmentation's slow import, in the slow tests."""
    monkeypatch.chdir(ROOT)
    most: dict[str, tuple[Table, str, Setting]] = {}
    for one in (one for one in distinct() if one[2].task != "segmentation"):
        recipe = one[2].recipe
        if recipe not in most or len(one[2].overrides) > len(most[recipe][2].overrides):
            most[recipe] = one
    seen: set[str] = set()
    assert len(most) >= 11

    def then(line: str) -> bool:
        return not (line in seen or seen.add(line))  # type: ignore[func-returns-value]

    check_all(list(most.values()), monkeypatch, then)


@pytest.mark.slow
def test_every_run_is_one_that_its_task_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_all(list(distinct()), monkeypatch, lambda line: True)


@pytest.mark.slow
def test_kept_runs_are_what_the_tables_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for where the data and weights lie, and for options that came later, which then have their defaults."""
    from classification.config import Command

    monkeypatch.chdir(ROOT)
    compared = 0
    for table, run_id, setting in distinct():
        stems = setting.kept_stems(ROOT / "results")
        folders = [folder for stem in stems for folder in seeds_of(stem).values()]
        for folder in [one for one in folders if setting.task != "segmentation"][:1]:
            argv, *_ = setting.commands(int(folder.name[-1]), "out")
            command = check_command(argv, monkeypatch)
            if isinstance(command, Command):
                networks = {role: replace(n, weights=None) for role, n in command.config.networks.items()}
                resolved = replace(command, config=replace(command.config, networks=networks)).resolved()
            else:
                needs = setting.command == "dit" and command[0].teacher is not None  # a file, which is not there
                resolved = replace(command[0], teacher="online" if needs else None).resolved()
            ours = flatten(json.loads(json.dumps(resolved)))
            kept = read_run(folder).config
            if "adm.attention" in kept:  # what it was called: consensus, uniform, shuffled
                attention = kept.pop("adm.attention")
                kept["adm.control"] = "none" if attention == "consensus" else attention
            elsewhere = ("data.root", "data.download", "data.workers", "progress_bar", "fit.trackers", "fit.keep")
            keys = {key for key in ours.keys() & kept.keys() if not key.startswith(elsewhere)}
            keys = {key for key in keys if not key.endswith(("weights", "sha256", "teacher"))}
            assert len(keys) >= 25, f"{folder} has little in common with {run_id}"
            differing = {key: (ours[key], kept[key]) for key in keys if ours[key] != kept[key]}
            assert not differing, f"{table.name} {run_id} and {folder}: {differing}"
            assert kept.keys() - ours.keys() <= {"fit.log_every"}, f"{folder} has options that there are no more"
            compared += 1
    assert compared


# --- the paper's text -------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?<![\w.=+(-])\d+\.\d+(?![\w%.])")  # no 0.5MobileNetV2, no (+0.24), no CFG=4.0


@pytest.fixture(scope="module")
def paper() -> list[str]:
    """The lines of the paper; ADM_PAPER_TEXT names its text, `../shared/spec/paper.txt` is looked at otherwise."""
    file = Path(os.environ.get("ADM_PAPER_TEXT", ROOT.parent / "shared" / "spec" / "paper.txt"))
    if not file.is_file():
        pytest.skip(f"needs the paper as text: {file} is absent (name it by ADM_PAPER_TEXT)")
    return file.read_text(encoding="utf-8").splitlines()


def printed(lines: Sequence[str], number: int) -> str:
    """What stands above a table's caption, down from the last empty line or caption."""
    (end,) = [i for i, line in enumerate(lines) if line.startswith(f"Table {number}: ")]
    start = end
    while lines[start - 1].strip() and not re.match(r"Table \d+: ", lines[start - 1]):
        start -= 1
    return "\n".join(lines[start:end])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 22))
def test_numbers_are_the_papers(paper: list[str], number: int) -> None:
    table = TABLES[f"table{number:02d}"]
    text = printed(paper, number)
    heads: list[float] = []  # numbers that the paper has in its head
    if number in (10, 12):
        parts = [column.split(" / ") for column in table.columns]
        heads = [float(part[i]) for i in range(len(parts[0])) for part in parts]
    ours = [cell.paper for cell in table.cells if cell.paper is not None]
    assert [float(found) for found in NUMBER.findall(text)] == heads + ours
    for cell in table.cells:
        assert cell.label is None or cell.label in text
