"""Every file of a run spoiled in every way, and what the commands make of it: one line, or the right result."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
