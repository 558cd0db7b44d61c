"""Every file of a run damaged in every way: each command gives the undamaged run's result or one line with the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from damage import DAMAGES, Outcome, assert_refused_or_good, damaged, files_of
from runs import assert_same, assert_same_runs, read, train_whole, undrawn
from street import arguments, stop_at

from core.training.command import run_command
from segmentation.tools.evaluate import main as evaluate
from segmentation.tools.train import main as train
from segmentation.tools.visualize import main as visualize
from tools import reproduce
from tools.compare import main as compare

NAME = "table05/proxy/deeplabv3-dml+adm-0"  # where the report looks for it
SPOKEN = ("cannot read", "damaged", "another run")


class Runs:
    """A finished run, an interrupted one, one of another seed that has all their files, and what is made of them."""

    def __init__(self, street: Path, root: Path) -> None:
        self.street, self.root = street, root
        train_whole(train, self.command(self.folder("finished")))
        with pytest.MonkeyPatch.context() as patch, undrawn():
            stop_at(patch, 5)
            assert train(self.command(self.folder("interrupted"))) == 130
        train_whole(train, self.command(self.folder("other"), "seed=1", "run.save_every=1", "run.keep=9"))
        for kind, steps in (("finished", [6]), ("interrupted", [5]), ("other", [5, 6])):
            run = self.folder(kind)
            for step in steps:
                assert outcome(evaluate, [str(run), "--checkpoint", f"iter_{step}"]).code == 0
        self.good = cache(lambda kind, name: LOOKS[name](self.folder(kind)))

    def folder(self, kind: str) -> Path:
        return self.root / kind / NAME

    def command(self, out: Path, *options: str) -> list[str]:
        return arguments(self.street, out, "run.save_every=2", "run.keep=3", *options)


def outcome(main: Callable[[list[str]], int], argv: list[str]) -> Outcome:
    """As a shell would see it."""
    return damage.outcome(lambda words: run_command(lambda: main(words)), argv)  # type: ignore[arg-type,return-value]


def exported(run: Path, *options: str) -> tuple[Outcome, Any]:
    """The student of the last checkpoint, what it scores, and what its network is."""
    to = run.parents[2] / "exported"
    shutil.rmtree(to, ignore_errors=True)
    done = outcome(evaluate, [str(run), "--out", str(to.with_suffix(".json")), "--export", str(to), *options])
    if done.code:
        return done, None
    weights = torch.load(to / "student.pth", weights_only=True)
    return done, (weights, read(to.with_suffix(".json"))["values"], (to / "student_config.py").read_text())


def drawn(run: Path) -> tuple[Outcome, Any]:
    done = outcome(visualize, [str(run), "--images", "1"])
    return done, None if done.code else (run / "figures/maps.png").read_bytes()


def compared(run: Path) -> tuple[Outcome, Any]:
    done = outcome(compare, [str(run), "--partial", "--out", str(to := run.parents[2] / "compared")])
    if done.code:
        return done, None
    found = {key: value for key, value in read(to / "compare.json").items() if key != "command"}
    text = re.sub(r'"commit": [^,}]*', "", json.dumps(found).replace(str(run), "RUN"))
    return done, (text, (to / "compare.png").read_bytes())


def reported(run: Path) -> tuple[Outcome, Any]:
    root, to = run.parents[2], run.parents[2] / "report"
    where = ["--runs", str(root), "--results", str(root / "none"), "--out", str(to)]
    done = outcome(reproduce.main, ["report", *where])
    if not done.code:
        done.said += (to / "report.md").read_text()  # it names what it leaves out
    return done, None if done.code else (to / "report.csv").read_text()


LOOKS: dict[str, Callable[[Path], tuple[Outcome, Any]]] = {
    "evaluate": exported,
    "visualize": drawn,
    "compare": compared,
    "report": reported,
}


@pytest.fixture(scope="module")
def runs(street: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with undrawn():
        yield Runs(street, tmp_path_factory.mktemp("runs"))


def names(said: str, file: str) -> bool:
    """Whether a line speaks of the damaged file as damaged."""
    return any(Path(file).name in line and any(word in line for word in SPOKEN) for line in said.splitlines())


def check(runs: Runs, kind: str, file: str, run: Path, looks: Sequence[str], problem: Callable[[str], object]) -> None:
    """Looks at a damaged run by these commands, then resumes it; tells ``problem`` what went wrong."""
    for name in looks:
        done, found = LOOKS[name](run)
        usual, good = runs.good(kind, name)
        where = f"{kind} {file} {name}"

        def same(found: Any = found, good: Any = good, done: Outcome = done, usual: Outcome = usual) -> None:
            if names(done.said, file) or (file == "summary.json" and "Not finished" in done.said):
                return
            assert done.code == usual.code
            assert_same(found, good)

        try:
            assert_refused_or_good(done, where, same)
        except AssertionError as error:
            problem(f"{where}: {error or 'other results'}")
    done = outcome(train, runs.command(run))
    try:
        assert_refused_or_good(done, f"{kind} {file} train", lambda: _assert_as_undamaged(runs, run, file, done))
    except Exception as error:
        problem(f"{kind} {file} train: {error or 'other results'}")


def _assert_as_undamaged(runs: Runs, run: Path, file: str, done: Outcome) -> None:
    whole = runs.folder("finished")
    if "is finished" in done.said:  # then nothing is read but the summary
        assert (run / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    else:
        if not names(done.said, file):
            assert_same_runs(whole, run)
        assert_same(*(torch.load(r / "student.pth", weights_only=True) for r in (whole, run)))


def cases() -> list[tuple[str, str, str]]:
    """(which run, file, damage) of all; the files are known before there is a run."""
    checkpoints = {"finished": (3, 4, 6), "interrupted": (3, 4, 5)}
    own = ("config.py", "config.yaml", "environment.json", "metrics.jsonl", "log.txt", "summary.json", "run.lock")
    files = {kind: [*own, *(f"checkpoints/iter_{n}.pth" for n in steps)] for kind, steps in checkpoints.items()}
    files["finished"] += ["evaluation-iter_6.json", "student.pth", "student.safetensors", "student_config.py"]
    files["interrupted"] += ["evaluation-iter_5.json"]
    return [(kind, file, spoil) for kind, own in files.items() for file in own for spoil in DAMAGES]


@pytest.mark.slow
def test_these_are_all_files_of_a_run(runs: Runs) -> None:
    for kind in ("finished", "interrupted"):
        found = {file for file in files_of(runs.folder(kind)) if not file.startswith(("mmengine/", "figures/"))}
        assert found == {file for of, file, _ in cases() if of == kind}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file", "spoil"), cases())
def test_every_damage(runs: Runs, tmp_path: Path, kind: str, file: str, spoil: str) -> None:
    run = damaged(runs.folder(kind), runs.folder("other"), tmp_path / NAME, file, spoil)
    check(runs, kind, file, run, list(LOOKS), pytest.fail)


@pytest.mark.parametrize(
    ("kind", "file", "spoil", "look"),
    [
        ("finished", "checkpoints/iter_6.pth", "flipped", "visualize"),
        ("finished", "metrics.jsonl", "flipped", "compare"),
        ("finished", "summary.json", "half", "report"),
        ("finished", "config.yaml", "another's", "compare"),
        ("interrupted", "config.py", "another's", "evaluate"),
        ("interrupted", "config.yaml", "zeros", "compare"),
        ("interrupted", "checkpoints/iter_5.pth", "another's", "evaluate"),
        ("interrupted", "checkpoints/iter_4.pth", "missing", "evaluate"),
        ("interrupted", "metrics.jsonl", "flipped", "compare"),
        ("interrupted", "environment.json", "garbage", "compare"),
        ("interrupted", "summary.json", "another's", "compare"),
    ],
)
def test_a_damaged_file_is_named_or_harmless(
    runs: Runs, tmp_path: Path, kind: str, file: str, spoil: str, look: str
) -> None:
    run = damaged(runs.folder(kind), runs.folder("other"), tmp_path / NAME, file, spoil)
    check(runs, kind, file, run, [look], pytest.fail)


def test_a_report_never_takes_a_folders_place(runs: Runs) -> None:
    done = outcome(evaluate, [str(runs.folder("finished")), "--out", str(runs.street)])
    assert (done.code, len(done.error)) == (2, 1) and "it is a folder" in done.said
    assert (runs.street / "gtFine").is_dir()


def test_a_kill_in_the_last_drawing_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    run = shutil.copytree(runs.folder("finished"), tmp_path / NAME, symlinks=True)
    (run / "curves.png.writing").write_bytes(b"half")
    assert outcome(train, runs.command(run)).code == 0
    assert not (run / "curves.png.writing").exists()
    assert_same_runs(runs.folder("finished"), run)


LINKS: dict[str, Callable[[Path], object]] = {
    "missing": lambda link: None,
    "to nothing": lambda link: link.symlink_to("iter_99.pth"),
    "to itself": lambda link: link.symlink_to(link.name),
    "to an older one": lambda link: link.symlink_to("iter_3.pth"),
    "an empty file": lambda link: link.write_bytes(b""),
    "text": lambda link: link.write_text("iter_3.pth"),
    "a folder": lambda link: link.mkdir(),
    "a copy": lambda link: shutil.copyfile(link.with_name("iter_4.pth"), link),
}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", LINKS)
@pytest.mark.parametrize("name", ["last.pth", "best.pth"])
@pytest.mark.parametrize("kind", ["finished", "interrupted"])
def test_damaged_links(runs: Runs, tmp_path: Path, kind: str, name: str, spoil: str) -> None:
    check_link(runs, tmp_path, kind, name, spoil, pytest.fail)


def check_link(runs: Runs, to: Path, kind: str, name: str, spoil: str, problem: Callable[[str], object]) -> None:
    run = to / NAME
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(runs.folder(kind), run, symlinks=True)
    link = run / "checkpoints" / name
    link.unlink()
    LINKS[spoil](link)
    for looked in ("evaluate", "visualize"):
        argv = [str(run), "--checkpoint", link.stem]
        done = outcome({"evaluate": evaluate, "visualize": visualize}[looked], argv)
        try:
            assert_refused_or_good(done, f"{kind} {name} {spoil} {looked}", lambda: None)
        except AssertionError as error:
            problem(str(error))
    done = outcome(train, runs.command(run))

    def good() -> None:
        if kind == "interrupted":
            assert_same_runs(runs.folder("finished"), run)

    try:
        assert_refused_or_good(done, f"{kind} {name} {spoil} train", good)
    except AssertionError as error:
        problem(f"{kind} {name} {spoil} train: {error}")
