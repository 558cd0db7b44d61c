"""Every file of a run spoiled in every way, and what the commands make of it: one line, or the right result."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

Damage = Callable[[Path, Path], object]
"""Spoils the first file; the second is its namesake in another run's folder (it may not be there)."""


def _flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x04
    file.write_bytes(content)


def _exchange(file: Path, other: Path) -> None:
    if other.is_file():
        shutil.copyfile(other, file)
    else:
        file.unlink()


DAMAGES: dict[str, Damage] = {
    "empty": lambda file, other: file.write_bytes(b""),
    "half": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file, other: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": _flip,
    "garbage": lambda file, other: file.write_bytes(bytes(range(256)) * 4),
    "missing": lambda file, other: file.unlink(),
    "another's": _exchange,
}


def files_of(run: Path) -> list[str]:
    """Every file below a folder; links are not followed."""
    found = [p for p in run.rglob("*") if p.is_file() and not p.is_symlink()]
    return sorted(str(p.relative_to(run)) for p in found)


def damaged(run: Path, other: Path, to: Path, file: str, damage: str) -> Path:
    """A copy of ``run`` at ``to`` in which one file is spoiled in one way."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, symlinks=True)
    DAMAGES[damage](to / file, other / file)
    return to


@dataclass
class Outcome:
    """What a command did: its exit code, and what it said on both streams."""

    code: int
    said: str

    @property
    def error(self) -> list[str]:
        """The lines of the refusal: those from the one that begins with "error:" on."""
        lines = self.said.strip().splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        return lines[starts[0] :] if starts else []


def outcome(main: Callable[[list[str]], int], argv: list[str]) -> Outcome:
    """Runs a command in this process. Whatever it lets through counts as a traceback, with exit code 99."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc(file=said)
            code = 99
    return Outcome(int(code or 0), said.getvalue())


def assert_refused_or_good(result: Outcome, where: str, good: Callable[[], object]) -> None:
    """Either one line and exit code 1 or 2, or an exit code 0 and ``good()`` finds nothing wrong with the result."""
    assert result.code in (0, 1, 2), f"{where}: {result.said[-2000:]}"
    if result.code:
        assert len(result.error) == 1, f"{where}: {result.said[-2000:]}"
    else:
        good()


@contextlib.contextmanager
def untouched(folder: Path, *but: str) -> Iterator[None]:
    """Nothing below a folder changes meanwhile but files of these names."""

    def tree() -> dict[str, bytes | str]:
        found = [p for p in folder.rglob("*") if p.name not in but and (p.is_symlink() or p.is_file())]
        return {str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in found}

    before = tree()
    yield
    assert tree() == before


# --- a task of image classification -----------------------------------------------------------------------------------

Main = Callable[[list[str]], int]
HARMLESS = ("log.txt", "curves.png", "run.lock", "maps.png", "reliability.png", "attention.png", "attention.json")
"""What only people read, and what is drawn anew."""


def shelled(main: Main) -> Main:
    """As a shell would see it."""
    from core.training.command import run_command

    return lambda words: run_command(lambda: main(words))  # type: ignore[func-returns-value,return-value]


class Trials:
    """A finished run and an interrupted one, another of each, and what the commands make of them.

    Args: where they lie; ``name``, the paper's run that they are taken for, as ``table01/proxy/dml+adm-0``; the mains
        of training, evaluation and figures; ``argv(out, seed)``, of training; ``stopped``, a context in which it stops.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        mains: tuple[Main, Main, Main],
        argv: Callable[[Path, int], list[str]],
        stopped: Callable[[], contextlib.AbstractContextManager[object]],
    ) -> None:
        self.root, self.name, self.argv = root, name, argv
        self.train, self.evaluate, self.visualize = map(shelled, mains)
        self.counts: Counter[str] = Counter()
        for kind, context, code in (("finished", contextlib.nullcontext, 0), ("interrupted", stopped, 130)):
            for seed in (0, 1):
                with context():
                    assert outcome(self.train, argv(self.run(kind, seed), seed)).code == code
                assert outcome(self.evaluate, [str(self.run(kind, seed))]).code == 0

    @cache  # noqa: B019  (it lives as long as the tests)
    def good(self, kind: str, command: str) -> tuple[Outcome, object]:
        """What a command makes of the undamaged run. A report has nothing to say of an interrupted one."""
        done, found = self.looks[command](self.run(kind))
        assert done.code == 0 or (kind, command) == ("interrupted", "report"), done.said
        return done, found

    kinds = ("finished", "interrupted")

    def run(self, kind: str, seed: int = 0) -> Path:
        return self.root / kind / str(seed) / self.name

    @property
    def looks(self) -> dict[str, Callable[[Path], tuple[Outcome, object]]]:
        return {"evaluate": self._evaluated, "visualize": self._drawn, "compare": self._compared, "report": self._told}

    def _evaluated(self, run: Path) -> tuple[Outcome, object]:
        done = outcome(self.evaluate, [str(run), "--out", str(to := self.root / "evaluated.json")])
        return done, None if done.code else json.loads(to.read_text())["values"]

    def _drawn(self, run: Path) -> tuple[Outcome, object]:
        shutil.rmtree(run / "figures", ignore_errors=True)
        done = outcome(self.visualize, [str(run), "--images", "1"])
        drawn = sorted((run / "figures").glob("*")) if not done.code else []
        return done, [(file.name, file.read_bytes()) for file in drawn]

    def _compared(self, run: Path) -> tuple[Outcome, object]:
        from tools.compare import main

        done = outcome(shelled(main), [str(run), "--partial", "--out", str(to := self.root / "compared")])
        if done.code:
            return done, None
        found = {key: value for key, value in json.loads((to / "compare.json").read_text()).items() if key != "command"}
        return done, (json.dumps(found).replace(str(run), "RUN"), (to / "compare.png").read_bytes())

    def _told(self, run: Path) -> tuple[Outcome, object]:
        from tools.reproduce import main

        where = ["--runs", str(run.parents[2]), "--results", str(self.root / "none"), "--out", str(self.root / "told")]
        done = outcome(shelled(main), ["report", *where])
        if done.code:
            return done, None
        text = (self.root / "told/report.md").read_text()
        done.said += text  # it names what it leaves out
        return done, (self.root / "told/report.csv").read_text()

    def cases(self) -> list[tuple[str, str, str]]:
        """(kind, file, damage): all of them."""
        return [(kind, file, how) for kind in self.kinds for file in files_of(self.run(kind)) for how in DAMAGES]

    def some_problems(self) -> list[str]:
        """Each file once, by damages and commands in turn: what goes wrong."""
        kinds, hows = cycle(self.kinds), cycle(DAMAGES)
        looks, found = cycle(["compare", "evaluate", "report"]), []
        for file in sorted({file for kind in self.kinds for file in files_of(self.run(kind))}):
            kind = next(kind for kind in kinds if file in files_of(self.run(kind)))
            command = "resume" if kind == "interrupted" else "evaluate" if "checkpoints" in file else next(looks)
            found += self.problems(kind, file, next(hows), [command])
        return found

    def all_problems(self) -> list[str]:
        """Each case by each command: what goes wrong. Prints the counts."""
        found = [problem for case in self.cases() for problem in self.problems(*case, [*self.looks, "resume"])]
        print(dict(self.counts))
        return found

    def problems(self, kind: str, file: str, how: str, commands: Iterable[str]) -> list[str]:
        """Spoils a copy, looks at it by these commands ("resume" is the last) and returns what went wrong."""
        from runs import assert_same_runs

        found: list[str] = []
        commands = list(commands)
        run = damaged(self.run(kind), self.run(kind, 1), self.root / "damaged/0" / self.name, file, how)
        for name in (command for command in commands if command != "resume"):
            done, result = self.looks[name](run)
            usual, good = self.good(kind, name)
            if problem := self._judge(done, file, result == good, usual.code):
                found.append(f"{kind} {file} {how} {name}: {problem}")
        if "resume" in commands:
            run = damaged(self.run(kind), self.run(kind, 1), run, file, how)
            done = outcome(self.train, self.argv(run, 0))
            whole = self.run("finished")
            if "is finished" in done.said:  # then nothing is read but the summary
                same = (run / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
            else:
                try:
                    same = done.code == 0 and assert_same_runs(whole, run) is None
                except (AssertionError, OSError):
                    same = False
            if problem := self._judge(done, file, same, 0):
                found.append(f"{kind} {file} {how} resume: {problem}")
        return found

    def _judge(self, done: Outcome, file: str, same: bool, usual: int) -> str:
        """What is wrong with an outcome, "" for nothing; counts what it is."""
        lines = done.error if done.code else done.said.splitlines()
        names = (Path(file).name, self.name) if done.code else (Path(file).name,)  # a refusal may name the run
        named = any(name in line for line in lines for name in names)
        harmless = Path(file).name in HARMLESS
        if done.code not in (0, 1, 2):
            kind, wrong = "traceback", done.said[-1500:]
        elif done.code and done.code == usual:
            kind, wrong = "refused as ever", ""
        elif done.code:
            fine = len(done.error) == 1 and named and not harmless
            kind, wrong = ("refused in one line", "") if fine else ("badly refused", done.said[-1500:])
        elif same:
            kind, wrong = "unchanged", ""
        elif named and not harmless:
            kind, wrong = "said", ""
        else:
            kind, wrong = "silently wrong", done.said[-1500:]
        self.counts[kind] += 1
        return wrong and f"{kind}: {wrong}"
