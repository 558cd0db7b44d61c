"""The report beside the paper's numbers, and its page in a real browser."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from written import ADM, DML, TABLE, write_evaluation, write_run

from core.errors import InputError
from tools import reproduce
from tools.runs import keep, read_run

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    TABLE.replace("accuracy of two methods", "accuracy <of two methods>").replace("KDCL]", "KDCL, AFD]").rstrip()
    + "\n      - {column: AFD, paper: null, run: null, why: nothing is said of it}\n"
)


def write_shown(path: Path, seed: int, top1: float, method: str = "dml", status: str = "finished") -> Path:
    """A run of two epochs with its attention, its environment and a map."""
    observed = {f"attention/consensus_{what}": v for what, v in (("min", 0.5), ("max", 1.5), ("variance", 0.0625))}
    ours = {"networks": {"student": {"name": "cifar_resnet8"}}, "data": {"name": "digits", "per_class": 40}}
    write_run(path, seed, [top1 - 20, top1], method=method, status=status, roles={}, observed=observed, **ours)
    start = {"command": ["train.py", "--method", method, "--seed", str(seed)], "commit": "c0ffee" * 6, "threads": 3}
    (path / "environment.json").write_text(json.dumps({"starts": [{**start, "versions": {"torch": "9.8.7"}}]}))
    (path / "figures").mkdir()
    Image.fromarray(np.full((40, 2400, 3), (250, 10, 10), np.uint8)).save(path / "figures/maps.png")
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A table, its proxies (DML's first seed in runs/, all else kept), and one run that was cut off."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/table01.yaml").write_text(SHOWN)
    other = (
        SHOWN.replace("table: 1", "table: 2")
        .replace("results: ", "#")
        .replace("proxy: {", "proxy: {overrides: {a: 1}, ")
    )
    (tmp_path / "tables/table02.yaml").write_text(other.replace("#kept/dml", "").replace("#kept/adm", ""))
    for seed in DML:
        inside = "runs/table01/proxy/dml" if seed == 0 else "results/kept/dml"
        write_shown(tmp_path / f"{inside}-{seed}", seed, DML[seed])
        write_shown(tmp_path / f"results/kept/adm-{seed}", seed, ADM[seed], "dml+adm")
    write_shown(tmp_path / "results/kept/dml-0", 0, 99.0)  # there is a run of its own
    write_shown(tmp_path / "runs/table01/proxy/kdcl-0", 0, 50.0, "kdcl", status="interrupted")
    return tmp_path


def keep_all(place: Path) -> None:
    """The kept runs as a line each, without their folders."""
    folders = sorted((place / "results/kept").iterdir())
    keep([read_run(folder) for folder in folders], place / "results/kept")
    for folder in folders:
        shutil.rmtree(folder)


def made(place: Path, *more: str) -> Path:
    folders = [f"--{name}={place / name}" for name in ("tables", "runs", "results", "out")]
    assert reproduce.main(["report", *folders, *more]) == 0
    return place / "out"


def lines_of(text: str) -> dict[str, list[str]]:
    """The cells of each line of tables in Markdown, by the first one."""
    split = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line)
    return {first: cells for first, *cells in split}


@pytest.mark.parametrize("kept", ["as folders", "as lines"])
@pytest.mark.parametrize("own", ["runs", "results/reproduce"])
def test_the_numbers_beside_the_papers(place: Path, own: str, kept: str) -> None:
    if kept == "as lines":
        keep_all(place)
    (place / "results/reproduce").mkdir()
    os.rename(place / "runs/table01", place / own / "table01")
    with open(made(place) / "report.csv") as file:
        rows = {row["column"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["DML", "DML+ADM", "KDCL"]
    for column, paper, ours in (("DML", 73.95, DML), ("DML+ADM", 74.235, ADM)):
        row, values = rows[column], np.array(list(ours.values()))
        assert (row["part"], row["row"], row["scale"], row["unit"], row["n"]) == (
            "Table 1",
            "Student",
            "proxy",
            "%",
            "3",
        )
        assert float(row["paper"]) == paper and float(row["ours_mean"]) == pytest.approx(values.mean())
        assert float(row["ours_std"]) == pytest.approx(values.std(ddof=1))
        assert row["ours_less_paper"] == "", "of a proxy it means nothing"
    assert rows["KDCL"]["paper"] == "74.5" and rows["KDCL"]["ours_mean"] == ""
    lines = lines_of((place / "out/report.md").read_text())
    cells = ["73.950 / 60.583 ± 0.629 (3)", "74.235 / 62.167 ± 1.041 (3)", "74.500 / not run"]
    assert lines["paper / ours"] == ["DML", "DML+ADM", "KDCL"] and lines["Student"] == cells
    differences = np.array(list(ADM.values())) - np.array(list(DML.values()))
    reach = 4.302653 * differences.std(ddof=1) / math.sqrt(3)
    mean = differences.mean()
    adds = ["DML", "+0.28", f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})", "gain"]
    assert lines["Student, DML+ADM"] == adds


def test_a_proxy_is_called_so_and_what_was_not_run_is_named(place: Path) -> None:
    text = (made(place) / "report.md").read_text()
    assert "## Table 1, proxy: Top-1" in text and "**Proxy**: recipes/small.yaml" in text
    assert "proxy less paper" not in text and "the setting of the paper:" not in text
    assert "Not run: kdcl." in text and "Not run, AFD: nothing is said of it" in text
    assert f"Left out: {place}/runs/table01/proxy/kdcl-0 is not finished." in text
    assert "Nothing is finished for Table 2.\n" in text
    write_shown(place / "runs/table02/proxy/dml-0", 0, 1.0, status="interrupted")
    assert f"Left out: Table 2, {place}/runs/table02/proxy/dml-0 is not finished." in (
        made(place) / "report.md"
    ).read_text().replace("\\", "")
    write_shown(place / "runs/table01/paper/dml-0", 0, 70.0)
    text = (made(place) / "report.md").read_text()
    own = text[text.index("## Table 1, the setting of the paper") : text.index("## Table 1, proxy")]
    assert "**Proxy**" not in own and lines_of(own)["Student"][0] == "73.950 / 70.000 (1), -3.950"


def test_a_proxy_of_another_measure_is_not_subtracted(place: Path) -> None:
    text = SHOWN.replace("table: 1", "table: 6").replace(
        'top-1, unit: "%"', "FID, higher_is_better: false, proxy: FD-digits"
    )
    text = text.replace("last.student/top1", "evaluation-scores.distance").replace("kept/", "chains/")
    (place / "tables/table06.yaml").write_text(text)
    for seed in (0, 1):
        folder = write_shown(place / f"results/chains/dml-{seed}", seed, 1.0)
        rows = [{"network": "n", "steps": 1, "FD-digits": 2.5 + seed, "CS-digits": 9.0}]
        write_evaluation(folder / "evaluation-scores.json", {"distance": "FD-digits", "score": "CS-digits"}, rows)
    text = (made(place) / "report.md").read_text()
    assert "Table 6: FID, lower is better; the proxy: FD-digits for FID; ours: cifar_resnet8 on digits:" in text
    own = text[text.index("## Table 6") :]
    assert lines_of(own)["Student"][0] == "73.950 / 3.000 ± 0.707 (2)"
    with open(place / "out/report.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["part"] == "Table 6")
    assert (row["metric"], row["ours_is"], row["ours_less_paper"]) == ("FID", "FD-digits", "")


def test_what_stands_beside_the_numbers(place: Path) -> None:
    text = (made(place) / "report.md").read_text()
    assert "| dml     | 0.500 .. 1.500 (0.0625) | " in text
    assert "commit c0ffeec0ff, torch 9.8.7" in text and "3 threads: 6 runs" in text
    assert "python train.py --method dml+adm --seed 0  # seeds: 0, 1, 2" in text
    files = sorted((place / "out").glob("*.png"))
    assert len(files) == 3 and all(f"]({file.name})" in text for file in files)  # curves, a map of each run
    sizes = {file.name: Image.open(file).size for file in files}
    assert list(sizes.values()).count((900, 15)) == 2


def test_a_picture_stands_once_where_it_is_shown(place: Path) -> None:
    figure = """
figure: {}
title: maps
task: classification
metric: {{name: picture}}
runs: {{dml: {{same_as: table01/dml}}}}
columns: [maps]
rows: [{{name: DML, cells: [{{column: maps, paper: null, run: dml, show: figures/maps.png}}]}}]
"""
    for number in (1, 2):
        (place / f"tables/figure{number:02d}.yaml").write_text(figure.format(number))
    text = (made(place) / "report.md").read_text()
    parts = {part.partition(",")[0]: part for part in text.split("\n## ")}
    maps = {name: part.count("figures/maps.png](") for name, part in parts.items() if "maps.png" in part}
    assert maps == {"Table 1": 1, "Figure 1": 1, "Figure 2": 0}
    assert "dml+adm, seed 0: figures/maps.png](" in parts["Table 1"]
    assert "Its pictures stand before: dml, seed 0: figures/maps.png." in parts["Figure 2"]


def test_the_rounds_of_a_chain_tell_their_similarity(place: Path) -> None:
    for seed, value in ((0, 0.5), (1, 0.75)):
        folder = place / f"results/kept/adm-{seed}"
        for name in ("round-0004", "round-0001"):
            keys = ("similarity", "similarity_min", "similarity_max", "attention_std")
            last = {f"adm/{key}": value + n for n, key in enumerate(keys)}
            (folder / name).mkdir()
            (folder / name / "metrics.jsonl").write_text(f"{json.dumps({'step': 1})}\n{json.dumps(last)}\n")
    keep_all(place)
    text = (made(place) / "report.md").read_text()
    rounds = [line.split("|")[1:-1] for line in text.splitlines() if ", round-" in line]
    assert [[cell.strip() for cell in line] for line in rounds] == [
        [f"dml+adm, round-{n}", "0.625", "1.625 .. 2.625", "3.6250"] for n in ("0004", "0001")
    ]


def test_wrong_input_is_one_line(place: Path) -> None:
    (place / "empty").mkdir()
    for argv, words in (
        (["--bsaeline", "dml"], "--bsaeline"),
        ([f"--out={place}/tables/table01.yaml"], "cannot make the folder"),
        ([f"--runs={place}/empty", f"--results={place}/empty"], "no run of the paper's tables"),
    ):
        with pytest.raises(InputError) as error:
            made(place, *argv)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_is_quick_and_takes_in_no_torch() -> None:
    heavy = "print(sorted(set(sys.modules) & {'torch', 'numpy', 'matplotlib', 'PIL'}))"
    say = f"import sys; from tools import report; {heavy}"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
    started = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    asked = subprocess.run([sys.executable, "tools/reproduce.py", "report", "--help"], capture_output=True, cwd=ROOT)
    assert asked.returncode == 0 and b"--document" in asked.stdout
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - started < 1  # seconds of the processor


# --- the page in a browser --------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium over its debugging pipe: one page, and what it complains of."""

    def __init__(self, program: str, profile: Path) -> None:
        to_it, from_it = os.pipe(), os.pipe()
        flags = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        shell = f'exec "$0" {flags} about:blank 3<&{to_it[0]} 4>&{from_it[1]}'
        quiet: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        self.process = subprocess.Popen(["bash", "-c", shell, program], pass_fds=(to_it[0], from_it[1]), **quiet)
        os.close(to_it[0])
        os.close(from_it[1])
        self.write, self.read = os.fdopen(to_it[1], "wb"), os.fdopen(from_it[0], "rb")
        self.pending, self.events, self.number = b"", [], 0  # type: ignore[var-annotated]
        self.session: dict[str, str] = {}
        (target,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            got = os.read(self.read.fileno(), 1 << 16)
            assert got, "the browser is gone"
            self.pending += got
        line, _, self.pending = self.pending.partition(b"\0")
        return json.loads(line)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        said = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.write.write(json.dumps(said).encode() + b"\0")
        self.write.flush()
        while (got := self.message()).get("id") != self.number:
            self.events.append(got)
        assert "error" not in got, got
        return got["result"]

    def open(self, address: str) -> None:
        self.events.clear()
        self("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def value(self, script: str) -> Any:
        got = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    @property
    def complaints(self) -> list[Mapping[str, Any]]:
        """Console messages, exceptions and refusals of the content security policy."""
        named = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in named]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.write.close()
        self.read.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    opened = Browser(program, tmp_path / "profile")
    yield opened
    opened.close()


def test_the_page_on_a_phone(place: Path, browser: Browser) -> None:
    name = f"a_run_whose_name_is_too_long_for_any_phone_{'x' * 60}"
    table = place / "tables/table01.yaml"
    table.write_text(table.read_text().replace("  - name: Student", f"  - name: Student {name}"))
    page = made(place) / "report.html"
    browser("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.open(page.as_uri())
    assert browser.complaints == []
    assert browser.value("innerWidth") == browser.value("document.scrollingElement.scrollWidth") == 390
    assert (
        browser.value("Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))")
        <= 390
    )
    assert browser.value("document.images.length") >= 3
    assert browser.value("[...document.images].every(i => i.loading === 'lazy')")
    load = "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode()))).then(() => true)"
    assert browser("Runtime.evaluate", expression=load, awaitPromise=True)["result"]["value"]
    assert "<of two methods>" in browser.value("document.querySelector('h2.part').textContent")

    said = browser.value("document.body.innerText.slice(0, 1500)")
    assert "6 runs at proxy scale" in said and "no run in the setting of the paper" in said
    assert "1 of 1 intervals say that ADM adds" in said and "not shown that the attention is what adds" in said
    shown = browser.value("[...document.querySelectorAll('.paper tbody td')].map(e => e.innerText.split(/\\s+/))")
    assert [cell[:2] for cell in shown] == [["73.950", "60.583"], ["74.235", "62.167"], ["74.500", "not"]]
    bars = browser.value("[...document.querySelectorAll('.bar .told')].map(e => e.textContent)")
    assert len(bars) == 1 and bars[0].startswith("+1.58 (")
    mark = "document.querySelector('.mark').getBoundingClientRect().x"
    assert browser.value(f"{mark} > document.querySelector('.zero').getBoundingClientRect().x")

    browser.value("fetch('https://example.org').catch(() => 0)")  # the policy stands, and would be heard
    assert any("Content Security Policy" in str(complaint) for complaint in browser.complaints)


def test_the_page_of_what_the_repository_keeps(tmp_path: Path, browser: Browser) -> None:
    assert reproduce.main(["report", f"--runs={tmp_path / 'none'}", f"--out={tmp_path / 'out'}"]) == 0
    page = tmp_path / "out/report.html"
    assert page.stat().st_size <= 1.5e6
    text = page.read_text()
    assert text.count("<img ") == text.count('<img loading="lazy"') > 10 and "<script" not in text
    assert "https://" not in text.partition("<body>")[0]
    for width in (390, 1200):
        browser("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
        browser.open(page.as_uri())
        assert browser.complaints == []
        assert browser.value("document.scrollingElement.scrollWidth <= innerWidth")
        first = browser.value("document.body.innerText.slice(0, 2000)")
        said = ("at proxy scale", "By the rule", "ADM less its control", "What is missing", "Nothing is finished for")
        assert all(words in first for words in said)
        columns = browser.value("getComputedStyle(document.querySelector('.paper thead')).display")
        assert columns == ("none" if width == 390 else "table-header-group")


def test_what_a_cell_or_a_command_says_is_shown_as_it_is(place: Path) -> None:
    """Nothing of a name, a label or a command is taken for Markdown or HTML."""
    hostile = "a|b <b>c</b> *d* `e` [f](g) _h_\n# i &amp; \\j"
    table = yaml.safe_load(SHOWN)
    table["title"] = table["rows"][0]["name"] = f"of {hostile}"
    (place / "tables/table01.yaml").write_text(yaml.safe_dump(table))
    start = {"device_name": hostile, "command": ["train.py", "```\n<script>", hostile]}
    for run in (place / "results/kept").iterdir():
        (run / "environment.json").write_text(json.dumps({"starts": [start]}))
    text = (made(place) / "report.md").read_text()
    safe = r"a\|b \<b>c\</b> \*d\* \`e\` \[f\](g) \_h\_ # i \&amp; \\j"
    assert f"Table 1, proxy: of {safe}\n" in text and f"| of {safe} " in text
    assert f"Python ?, {safe}, ? threads" in text
    assert "````bash\n" in text and "\n````\n" in text
    inside = [part for n, part in enumerate(text.split("````")) if n % 2 == 0]
    assert not any("<script>" in part or hostile in part for part in inside)


def test_markdown_that_begins_a_line_is_shown_as_it_is() -> None:
    from tools.report import plain

    for text, wanted in (
        ("-0.5", "-0.5"), ("- a", r"\- a"), ("1. a", r"1\. a"), ("1.5 a", "1.5 a"), ("## a", r"\## a"),
        ("> a", r"\> a"),
        ("---", r"\---"), ("a - b > c", "a - b > c"), ("methods_32", "methods_32"), ("__a__", r"\_\_a\_\_"),
    ):  # fmt: skip
        assert plain(text) == wanted
    assert plain("**a *b*** and `c`", bold=True) == r"**a \*b**\* and \`c\`"
