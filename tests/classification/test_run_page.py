"""The page of a run: its numbers against evaluate's and against other computations, what it shows, one-line errors."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, RECIPE, read, train_whole
from safetensors.torch import load_file
from torch import nn

from classification import findings, latency, outcomes
from classification import page as page_words
from classification.data.datasets import DataConfig, load_datasets
from classification.networks import create_network
from classification.tools import evaluate, report, train
from core.training.run import DIGEST, signed
from tools.runs import read_run

SMALL = ["--data.classes", "4", "--data.per_class", "16", "--data.validation", "0.1", "--fit.epochs", "2"]
HOSTILE = ("<script>alert(1)<", "a & 'b'", "$x_{$ \\q")
"""Names that HTML, and matplotlib's formulas, would take for something else."""


def make_run(out: Path, method: str, *more: str) -> Path:
    fit = ["--fit.log_every", "4", *CPU, "--batch_size", "32"]
    train_whole(train.main, ["--config", str(RECIPE), "--out", str(out), "--method", method, *fit, *more])
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: ``adm`` and ``alone``."""
    place = tmp_path_factory.mktemp("runs")
    make_run(place / "adm", "dml+adm", *SMALL)
    make_run(place / "alone", "vanilla", *SMALL, "--optimizer.lr", "0.05")
    return place


@pytest.fixture
def command(shell: Any, quick: None) -> Callable[..., tuple[int, str, str]]:
    return lambda main, *argv: shell(main, [str(a) for a in argv])


@pytest.fixture
def undrawn_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, which take seconds."""
    sections = ("classes", "confusions", "calibration", "maps", "curves")
    monkeypatch.setattr(report, "draw", lambda found, options: {section: {} for section in sections})


@pytest.fixture(scope="module")
def page(place: Path) -> Path:
    """What the tool writes of both runs, quickly measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "ROUNDS", (3, 5))
        patch.setattr(latency, "SECONDS", 0.0)
        words = [str(place / "adm"), str(place / "alone"), "--out", str(place / "page"), "--images", "2"]
        assert report.main([*words, "--device", "cpu"]) == 0
    return place / "page"


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, np.ndarray]:
    """The test images' classes, and those that each network says: from the weight files alone, without our tools."""
    test = load_datasets(DataConfig("digits", classes=4)).test
    found = {"target": test.targets.numpy()}
    for name, run, role, network in (
        ("teacher", "adm", "teacher", "cifar_wrn_10_2"),
        ("student", "adm", "student", "cifar_resnet8"),
        ("student of alone", "alone", "student", "cifar_resnet8"),
    ):
        model = create_network(network, num_classes=4).eval()
        model.load_state_dict(load_file(place / run / f"checkpoints/last/{role}.safetensors"))
        with torch.no_grad():
            found[name] = model((test.images / 255.0 - 0.3058) / 0.3187).argmax(1).numpy()
    return found


class Page(HTMLParser):
    """A page's tags, addresses, texts and tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[str] = []
        self.text = ""
        self._caption: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.addresses += [str(given[a]) for a in ("src", "href", "srcset", "data", "action", "poster") if a in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        if tag == "img":
            self.pictures.append(str(given["alt"]))
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    @property
    def rows(self) -> list[list[str]]:
        return self.tables[list(self.tables)[-1]]

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.tables[str(self._caption)] = []
            self._caption = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._caption is not None:
            self._caption += data
        elif self.tables and self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_evaluate(place: Path, page: Path, tmp_path: Path, command: Any) -> None:
    said = read(page / "summary.json")
    for run, roles in (
        ("adm", {"teacher": "teacher", "student": "student"}),
        ("alone", {"student": "student of alone"}),
    ):
        out = tmp_path / f"{run}.json"
        assert command(evaluate.main, place / run, "--out", out, "--device", "cpu")[0] == 0
        report = read(out)
        written = next(one for one in said["runs"] if one["path"] == str(place / run))
        assert written["values"] == report["values"] and written["checkpoint"] == report["checkpoint"]
        for role, name in roles.items():
            network = said["networks"][name]
            for score in ("top1", "top5", "nll", "ece"):
                assert network[score] == report["values"][f"{role}/{score}"]
            assert network["parameters"] == report["networks"][role]["parameters"]
    assert said["split"] == "test" and said["images"] == report["images"]
    shown = next(rows for caption, rows in page_of(page).tables.items() if "each network at its checkpoint" in caption)
    top1 = next(row for row in shown if row[0] == "top-1 (%)")
    assert top1[1:] == [f"{said['networks'][name]['top1']:.2f}" for name in shown[0][1:]]


def test_classes_and_confusions_agree_with_a_computation_of_their_own(
    page: Path, answers: dict[str, np.ndarray]
) -> None:
    from sklearn.metrics import confusion_matrix

    said, target = read(page / "summary.json"), answers["target"]
    trained = load_datasets(DataConfig("digits", classes=4, per_class=16, validation=0.1)).train.targets.numpy()
    for c, row in enumerate(said["classes"]):
        assert row["name"] == str(c)
        assert row["images"]["test"] == (target == c).sum() and row["images"]["train"] == (trained == c).sum()
        for name in ("teacher", "student", "student of alone"):
            assert row["right"][name] == ((answers[name] == c) & (target == c)).sum()
    (_, *rows) = page_of(page).tables["Right answers by class"]
    assert [row[2] for row in rows] == [str((target == c).sum()) for c in range(4)]
    column = [f"{100 * ((answers['student'] == c) & (target == c)).sum() / (target == c).sum():.1f}" for c in range(4)]
    assert [row[4] for row in rows] == column

    assert [one["theirs"] for one in said["compared"]] == ["teacher", "student of alone"]
    for one in said["compared"]:
        ours, theirs = answers["student"], answers[one["theirs"]]
        a, b = ours == target, theirs == target
        assert (one["both"], one["neither"]) == ((a & b).sum(), (~a & ~b).sum())
        assert (one["only_ours"], one["only_theirs"]) == ((a & ~b).sum(), (b & ~a).sum())
        after, before = (confusion_matrix(target, p, labels=range(4)) for p in (ours, theirs))
        told = {(int(row["true"]), int(row["said"])): row for row in one["confusions"]}
        for true in range(4):
            for seen in set(range(4)) - {true}:
                row = told.get((true, seen), {})
                of = target == true
                expected = {
                    "before": before[true, seen], "after": after[true, seen],
                    "mended": (of & (theirs == seen) & a).sum(), "new": (of & (ours == seen) & b).sum(),
                }  # fmt: skip
                if row:
                    assert {key: row[key] for key in expected} == expected
                else:
                    assert expected["before"] == expected["after"] and not expected["mended"] + expected["new"]
        assert sum(row["mended"] for row in one["confusions"]) == one["only_ours"]
        assert sum(row["new"] for row in one["confusions"]) == one["only_theirs"]


def test_intervals_are_those_of_drawing_the_images_anew(page: Path, answers: dict[str, np.ndarray]) -> None:
    said, target = read(page / "summary.json"), answers["target"]
    draws = np.random.default_rng(7).integers(len(target), size=(20_000, len(target)))

    def drawn(values: np.ndarray) -> Any:
        return pytest.approx(100 * np.quantile(values[draws].mean(1), [0.025, 0.975]), abs=200 / len(target))

    for name in ("teacher", "student", "student of alone"):
        assert said["networks"][name]["top1_interval"] == drawn((answers[name] == target).astype(float))
    for one in said["compared"]:
        paired = (answers["student"] == target).astype(float) - (answers[one["theirs"]] == target)
        assert one["interval"] == drawn(paired)
        assert one["difference"] == pytest.approx(100 * paired.mean())


def test_mcnemar_is_a_sign_test_of_the_images_that_differ() -> None:
    target = torch.zeros(20, dtype=torch.long)
    ours, theirs = torch.ones(20, dtype=torch.long), torch.ones(20, dtype=torch.long)
    ours[:8], theirs[7:10] = 0, 0  # 7 right for ours alone, 2 for theirs alone, 1 for both
    found = outcomes.pair(ours, theirs, target)
    assert (found.both, found.only_ours, found.only_theirs, found.neither) == (1, 7, 2, 10)
    assert found.mcnemar == pytest.approx(2 * (1 + 9 + 36) / 2**9)
    assert outcomes.pair(ours, ours, target).mcnemar == 1.0


def test_the_greatest_changes_come_first_and_equal_confusions_are_none() -> None:
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    ours, theirs = torch.tensor([1, 1, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 2, 1, 0])
    found = [(c.true, c.said, c.before, c.after, c.mended, c.new) for c in outcomes.changes(ours, theirs, target, 3)]
    # 1 -> 2: one image of each network, but another one; 2 -> 0: the same image for both.
    assert found == [(0, 1, 1, 3, 0, 2), (1, 2, 1, 1, 1, 1)]


def macs_by_hooks(network: nn.Module, size: int) -> int:
    """Of convolutions and linear layers: elements out, times the values that each of them weighs."""
    total = 0

    def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(hook)
    network.eval()(torch.zeros(1, 3, size, size))
    return total


def test_cost_is_that_of_the_networks(place: Path, page: Path) -> None:
    said = read(page / "summary.json")
    for role, name in (("teacher", "cifar_wrn_10_2"), ("student", "cifar_resnet8")):
        network, file = said["networks"][role], place / f"adm/checkpoints/last/{role}.safetensors"
        assert network["multiply_accumulates"] == macs_by_hooks(create_network(name, num_classes=4), 16)
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert network["weights_bytes"] == file.stat().st_size - header
        for batch, one in network["latency"].items():
            assert 0 < one["quartiles_ms"][0] <= one["median_ms"] <= one["quartiles_ms"][1]
            assert one["images_per_second"] == pytest.approx(1e3 * int(batch) / one["median_ms"])
            assert one["repeats"] == 3
        assert set(network["latency"]) == {"1", "32"}
    assert said["networks"]["student of alone"]["latency"] is None
    assert said["environment"]["threads"] == torch.get_num_threads() and "cpu" in said["environment"]


class Slow(nn.Module):
    def __init__(self, milliseconds: float, log: list[float]) -> None:
        super().__init__()
        self.milliseconds, self.log = milliseconds, log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        self.log.append(self.milliseconds)
        time.sleep(self.milliseconds / 1e3)
        return x


def test_latency_is_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", (4, 4))
    log: list[float] = []
    images = torch.zeros(32, 3, 4, 4)
    found = latency.measure({"a": Slow(2, log), "b": Slow(6, log)}, {"a": images, "b": images})
    assert log[:12] == [2, 2, 2, 6, 6, 6, 6, 6, 6, 2, 2, 2] and len(log) == 2 * 2 * 4 * 3
    for batch in ("1", "32"):
        assert (
            2 <= found[batch]["a"]["median_ms"] < found[batch]["b"]["median_ms"] and found[batch]["a"]["repeats"] == 4
        )


def test_without_latency_and_on_another_split(place: Path, tmp_path: Path, command: Any, undrawn_page: None) -> None:
    code, out, _ = command(
        report.main, place / "adm", "--out", tmp_path, "--no-latency", "--split", "validation", "--images", 1
    )
    assert code == 0 and out == f"written to {tmp_path}: report.html, summary.json\n"
    said, shown = read(tmp_path / "summary.json"), page_of(tmp_path)
    assert said["split"] == "validation" and said["networks"]["student"]["latency"] is None
    assert "validation images" in shown.text and not any("atency" in caption for caption in shown.tables)
    assert [one["theirs"] for one in said["compared"]] == ["teacher"]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_shows_everything(place: Path, page: Path) -> None:
    assert {file.name for file in page.iterdir()} == {"report.html", "summary.json"}
    html, shown = (page / "report.html").read_text(), page_of(page)
    assert shown.addresses and all(a.startswith(("data:", "#")) for a in shown.addresses)
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert not {"script", "iframe", "object", "embed"} & set(shown.tags)
    assert shown.policy.startswith("default-src 'none'")
    for word in ("n: images", "taken for another", "confidence", "Maps", "Curves of adm", "Curves of alone"):
        assert any(word in picture for picture in shown.pictures), word
    for word in ("dml+adm", "cifar_wrn_10_2", "4 classes", "seed", "commit", "thread", "float32"):
        assert word in shown.text, word
    differ = {row[0]: row[1:] for row in shown.tables["Options in which the runs differ"]}
    assert differ["method"] == ["dml+adm", "vanilla"] and differ["optimizer.lr"] == ["0.1", "0.05"]
    changed = {row[0]: row[1:] for row in shown.tables["Options of adm that are not the defaults"]}
    assert changed["data.classes"] == ["4", "None"] and "optimizer.lr" not in changed


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on classes whose names are none for HTML, and of which one has few images."""
    place = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (12, 12, 3)), ("val", (5, 4, 2))):
        for c, (name, count) in enumerate(zip(HOSTILE, counts, strict=True)):
            (place / "images" / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = generator.integers(80 * c, 80 * c + 90, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "images" / split / name / f"{n}.png")
    data = ["--data.name", "folder", "--data.root", str(place / "images"), "--fit.epochs", "1"]
    return make_run(place / "run", "dml", *data, "--networks.teacher.name", "cifar_resnet8")


def test_names_are_shown_as_they_are_and_uneven_classes_are_said(hostile: Path, tmp_path: Path, command: Any) -> None:
    assert command(report.main, hostile, "--out", tmp_path, "--no-latency", "--images", 3)[0] == 0
    html, shown = (tmp_path / "report.html").read_text(), page_of(tmp_path)
    assert "<script" not in html and "script" not in shown.tags and "&lt;script&gt;alert(1)&lt;" in html
    rows = {row[0]: row[1:3] for row in shown.tables["Right answers by class"]}
    order = sorted(HOSTILE)
    assert [*rows][1:] == order
    counts = dict(zip(HOSTILE, (["12", "5"], ["12", "4"], ["3", "2"]), strict=True))
    assert {name: rows[name] for name in HOSTILE} == counts
    assert "The classes are uneven" in shown.text and "3 to 12 to train on, 2 to 5 in the test split" in shown.text
    assert {row["name"] for row in read(tmp_path / "summary.json")["classes"]} == set(HOSTILE)


def test_of_many_classes_those_that_differ_most_are_shown(
    place: Path, page: Path, tmp_path: Path, command: Any, undrawn_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "MOST_CLASSES", 2)
    both = [place / "adm", place / "alone"]
    assert command(report.main, *both, "--out", tmp_path, "--no-latency", "--images", 1)[0] == 0
    said, shown = read(tmp_path / "summary.json"), page_of(tmp_path)
    assert "Shown are the 2 of 4 classes" in shown.text and said["classes"] == read(page / "summary.json")["classes"]
    right = [
        (row["right"]["student"] - row["right"]["student of alone"]) / row["images"]["test"] for row in said["classes"]
    ]
    most = sorted(range(4), key=lambda c: -abs(right[c]))[:2]
    assert [row[0] for row in shown.tables["Right answers by class"][1:]] == [str(c) for c in sorted(most)]


def test_a_verdict_needs_both_tests(place: Path) -> None:
    target = torch.zeros(200, dtype=torch.long)
    for mine, yours, word in ((30, 5, "above"), (5, 30, "below"), (6, 5, "not distinguishable from"),
                              (7, 1, "not distinguishable from")):  # fmt: skip
        ours, theirs = torch.ones(200, dtype=torch.long), torch.ones(200, dtype=torch.long)
        ours[:mine], theirs[mine : mine + yours] = 0, 0
        paired = outcomes.pair(ours, theirs, target)
        assert page_words.verdict(paired) == word
    assert outcomes.pair(ours, theirs, target).interval[0] > 0 > 0.05 - paired.mcnemar  # they disagree on the last


def test_times_are_told_in_hours_minutes_and_seconds() -> None:
    assert [page_words.duration(s) for s in (4.25, 59.99, 61.0, 3725.0)] == [
        "4.2 s",
        "60.0 s",
        "1 min 01 s",
        "1 h 02 min",
    ]


def test_a_student_alone_has_a_page(tmp_path: Path, command: Any) -> None:
    networks = ["--networks", "{student: {name: cifar_resnet8}}", "--data.classes", "3", "--data.per_class", "8"]
    run = make_run(tmp_path / "run", "vanilla", *networks, "--fit.epochs", "1")
    code, _, err = command(report.main, run, "--out", tmp_path / "page", "--no-latency", "--images", 1)
    assert code == 0, err
    said = read(tmp_path / "page/summary.json")
    assert list(said["networks"]) == ["student"] and said["compared"] == []
    assert "Confusions" not in page_of(tmp_path / "page").text


def test_an_unfinished_run_has_a_page_that_says_so(place: Path, tmp_path: Path, command: Any) -> None:
    run = Path(shutil.copytree(place / "alone", tmp_path / "run", symlinks=True))
    for name in ("summary.json", "environment.json", "metrics.jsonl"):
        (run / name).unlink()
    code, _, err = command(report.main, run, "--out", tmp_path / "page", "--no-latency", "--images", 1)
    assert code == 0, err
    shown = page_of(tmp_path / "page")
    checkpoint = (place / "alone/checkpoints/last").resolve().name
    assert f"The run is not finished: this is its checkpoint {checkpoint}." in shown.text
    assert not any("Curves" in picture for picture in shown.pictures)


def test_a_page_in_a_run_folder_is_no_part_of_the_run(place: Path, page: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place / "adm", tmp_path / "run", symlinks=True))
    before = read_run(run).files
    shutil.copytree(page, run / "page")
    assert read_run(run).files == before and "rounds" not in before


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_wrong_pages_end_in_one_line_and_write_nothing(
    place: Path, hostile: Path, tmp_path: Path, command: Any
) -> None:
    adm, alone, out = place / "adm", place / "alone", tmp_path / "out"
    empty = Path(shutil.copytree(adm, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints")))
    segmented = tmp_path / "segmented"
    segmented.mkdir()
    (segmented / "config.yaml").write_text(signed("task: segmentation\nmethod: dml\n"))
    less = ["--data.classes", "3", "--data.per_class", "8", "--fit.epochs", "1"]
    fewer = make_run(tmp_path / "fewer", "vanilla", *less, "--networks", "{student: {name: cifar_resnet8}}")
    to = ["--out", out, "--no-latency"]
    for argv, words in (
        ([adm], "--out is missing"),
        ([adm, "--out", alone], "whose summary.json would be lost"),
        ([adm, adm, *to], "is named twice"),
        ([tmp_path / "none", *to], "no run folder"),
        ([adm, tmp_path / "none", *to], "no run folder"),
        ([empty, *to], "nothing was saved yet"),
        ([adm, empty, *to], "nothing was saved yet"),
        ([segmented, *to], "is a run of segmentation: use the tools in segmentation/tools"),
        ([adm, segmented, *to], "is a run of segmentation: use the tools in segmentation/tools"),
        ([adm, hostile, *to], "is of folder, the first run of digits"),
        ([adm, fewer, *to], "has other classes (3) than the first run (4)"),
        ([fewer, "--split", "validation", *to], "no validation images are held out"),
        ([adm, "--checkpoint", "bst", *to], "no checkpoint 'bst'"),
        ([adm, "--images", 0, *to], "PositiveInt"),
        ([adm, "--images", 51, *to], "50 at most"),
        ([adm, "--imges", 5, *to], "did you mean images?"),
    ):
        code, _, err = command(report.main, *argv)
        assert code == 2 and words in err and err.count("\n") == 1, (argv, code, err)
        assert not out.exists()
    assert read(alone / "summary.json")["status"] == "finished"


def rewritten(run: Path, to: Path, old: str, new: str) -> Path:
    """A copy of a run that says something else in its config."""
    copy = Path(shutil.copytree(run, to, symlinks=True))
    text = (copy / "config.yaml").read_text().rpartition(DIGEST)[0]
    assert old in text
    (copy / "config.yaml").write_text(signed(text.replace(old, new)))
    return copy


def test_runs_of_other_images_are_refused(
    place: Path, tmp_path: Path, command: Any, hostile: Path, undrawn_page: None
) -> None:
    to = ["--out", tmp_path / "page", "--no-latency"]
    other = rewritten(place / "alone", tmp_path / "other", "split_seed: 0", "split_seed: 1")
    code, _, err = command(report.main, place / "adm", other, "--split", "validation", *to)
    assert code == 2 and "has other images in its validation split" in err and err.count("\n") == 1

    images = Path(shutil.copytree(hostile.parent / "images", tmp_path / "images"))
    for file in (images / "val").rglob("*.png"):
        Image.new("RGB", (8, 8), "white").save(file)
    moved = rewritten(hostile, tmp_path / "moved", str(hostile.parent / "images"), str(images))
    code, _, err = command(report.main, hostile, moved, *to)
    assert code == 2 and "has other images in its test split than the first run" in err and err.count("\n") == 1
    code, _, err = command(report.main, hostile, moved, "--data.root", images, "--images", 1, *to)
    assert code == 0, err  # both, as this command says, on the same
