"""The one reader of a run, be it a run folder or a line that was kept of one. Needs no torch.

``results/<experiment>/runs.jsonl`` keeps a run a line: its ``config.yaml``, ``environment.json``, ``summary.json``, the
evaluations of its ``metrics.jsonl`` and what evaluations wrote beside them, each under the name of its file. A kept run
goes by the path that its folder would have there: the line ``kd-0`` of ``results/quickstart/runs.jsonl`` is
``results/quickstart/kd-0`` for every tool, and ``results/quickstart`` stands for all of them.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from core.errors import InputError
from core.files import make_folder, write_atomically
from core.training.kept import KEPT
from core.training.run import (
    digest_of,
    flatten,
    identity_in,
    load_yaml,
    read_json,
    read_metrics,
    read_signed,
    said_identity,
)


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was trained (or only begun)."""

    path: Path
    """Its folder, or the one that a kept run would have."""
    files: Mapping[str, Any]
    """What its files say, by their names without suffix: ``metrics`` has the evaluations alone, ``rounds`` the summary
    and the last log point of each round of a chain of diffusion models."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config, flat: ``{"adm.alpha": 0.01}``."""
        return flatten(self.files.get("config", {}))

    @property
    def summary(self) -> Mapping[str, Any]:
        return self.files.get("summary", {})

    @property
    def evaluations(self) -> Sequence[Mapping[str, Any]]:
        """The evaluations while it was trained, as ``metrics.jsonl`` has them."""
        return self.files.get("metrics", ())

    @property
    def start(self) -> Mapping[str, Any]:
        """Where it ran when it was started last: command, commit, versions, device; empty where that is not known."""
        return (self.files.get("environment", {}).get("starts") or [{}])[-1]

    @property
    def seed(self) -> Any:
        return self.config.get("seed", self.summary.get("seed"))

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def last(self) -> Mapping[str, Any]:
        """The evaluation at its end, of an unfinished run the last that there was; empty where there is none."""
        ended = self.summary.get("last") if self.finished else None
        return ended or (self.evaluations[-1] if self.evaluations and not self.finished else {})

    @property
    def seconds(self) -> float:
        """How long its training took, all its rounds together; 0 where that is not known."""
        rounds = (one.get("summary", {}) for one in self.files.get("rounds", {}).values())
        return sum(summary.get("seconds") or 0.0 for summary in (self.summary, *rounds))

    def number(self, query: str, where: Mapping[str, Any] | None = None, at: float | None = None) -> float | None:
        """The number that a query names; None where there is no such thing, or not one alone.

        ``last.student/top1`` is a path in ``summary.json``. A query that begins with the name of another file is a path
        in that: ``evaluation.FD-digits``, ``metrics.student/top1``. Of a file with rows the one counts that agrees with
        ``where`` and, given ``at`` (0 to 1), that stands after this share of a finished run's training. ``distance``
        and ``score`` are the names that an evaluation of images gives its two scores.
        """
        head, _, key = query.partition(".")
        document = self.files.get(head) if head != "config" else None
        if document is None:
            document, key = self.summary, query
        rows = document if isinstance(document, Sequence) else document.get("rows")
        names = document.get("features", {}) if isinstance(document, Mapping) else {}
        if rows is not None:
            document = _only_row(rows, where or {}, at) if at is None or self.finished else {}
            key = names.get(key, key)
        value = _look_up(document, key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _only_row(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], at: float | None) -> Mapping[str, Any]:
    fits = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
    if at is not None and fits:
        reached = [row.get("iteration", row.get("epoch", row.get("step", 0))) for row in fits]
        asked = at * max(reached)
        asked = round(asked) if isinstance(max(reached), int) else asked
        fits = [row for row, place in zip(fits, reached, strict=True) if abs(place - asked) <= 1e-6 * max(reached)]
    return fits[0] if len(fits) == 1 else {}


def _look_up(document: Any, key: str) -> Any:
    """The value under a dotted key, whose parts may hold dots themselves; None where there is none."""
    if not key:
        return document
    parts = key.split(".") if isinstance(document, Mapping) else []
    for n in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:n]), ".".join(parts[n:])
        if name in document and (found := _look_up(document[name], rest)) is not None:
            return found
    return None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_run(path: Path | str) -> Run:
    """Raises: InputError where there is no such run, or it is damaged."""
    path = Path(path)
    if is_folder_of_run(path):
        return Run(path, _read_folder(path))
    beside, kept = _kept_beside(path)
    if path in kept:
        return Run(path, kept[path])
    if path.is_dir():
        raise InputError(f"{path} is no run folder: it has no config.yaml")
    lacks = f", and {KEPT} there keeps no {path.relative_to(beside).as_posix()}" if kept else ""
    raise InputError(f"no run folder {path}{lacks}")


def is_folder_of_run(path: Path) -> bool:
    """Whether a run left this folder, or an evaluation of weights did."""
    return (path / "config.yaml").is_file() or (path / "evaluation.json").is_file()


def _read_folder(folder: Path) -> dict[str, Any]:
    try:
        files: dict[str, Any] = {}
        identity = ""
        if (folder / "config.yaml").is_file():
            text = read_signed(folder / "config.yaml")
            files["config"], identity = load_yaml(text) or {}, said_identity(text)
        documents = sorted(folder.glob("*.json"), key=lambda f: (f.stem not in ("environment", "summary"), f.stem))
        files |= {f.stem: read_json(f) for f in documents}
        for name, values in files.items() if identity else ():
            if (identity_in(values) or identity) != identity:
                raise InputError(
                    f"{folder / name}.json is another run's: delete it, and what wrote it there writes its own"
                )
        lines = read_metrics(folder / "metrics.jsonl", files.get("summary"))
        if evaluations := [line for line in lines if line.get("kind") == "evaluation"]:
            files["metrics"] = evaluations
        pages = {page.parent for page in folder.glob("*/report.html")}  # which are no rounds
        if rounds := {f.name: found for f in sorted(set(folder.glob("*/")) - pages) if (found := _read_round(f))}:
            files["rounds"] = rounds
        _check_kinds(files)
        return files
    except InputError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from error


def _check_kinds(files: Mapping[str, Any]) -> None:
    rows = {"metrics": list}
    for name, values in files.items():
        kind = rows.get(name, Mapping if name in ("config", "environment", "summary") else (Mapping, list))
        if not isinstance(values, kind):
            raise ValueError(f"its {name} is a {type(values).__name__}")


def _read_round(folder: Path) -> dict[str, Any]:
    summary = folder / "summary.json"
    found = {"summary": read_json(summary)} if summary.is_file() else {}
    return found | (
        {"last": lines[-1]} if (lines := read_metrics(folder / "metrics.jsonl", found.get("summary"))) else {}
    )


def _kept_beside(path: Path) -> tuple[Path, Mapping[Path, Any]]:
    """The folder of the nearest ``runs.jsonl`` above a path, and by their paths the runs that this one keeps."""
    for folder in (path, *path.parents):
        if (folder / KEPT).is_file():
            return folder, _read_kept(folder / KEPT, (folder / KEPT).stat().st_mtime_ns)
    return path, {}


@lru_cache(maxsize=64)
def _read_kept(file: Path, changed: int) -> dict[Path, dict[str, Any]]:
    found = {}
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            if line.pop("sha256", None) not in (None, digest_of(line)):
                raise ValueError
            path = file.parent / line.pop("run")
            _check_kinds(line)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{file}, line {number}, is no kept run (damaged, or changed by hand)") from error
        if path in found:
            raise InputError(
                f"{file}, line {number}, keeps {path.relative_to(file.parent)} again: remove one of the two"
            )
        found[path] = line
    return found


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs that paths name: one run, those in a folder, kept ones below it, or by a pattern (``.../dml*``).

    Raises: InputError where there are none.
    """
    return [read_run(one) for one in dict.fromkeys(one for path in paths for one in _paths_in(Path(path)))]


def _paths_in(path: Path) -> list[Path]:
    path = path.parent if path.name == KEPT else path
    _, kept = _kept_beside(path)
    if is_folder_of_run(path) or path in kept:
        return [path]
    found = {one for one in kept if path in one.parents or fnmatch.fnmatchcase(str(one), str(path))}
    found |= {folder for folder in path.glob("*") if is_folder_of_run(folder)}
    if not found:
        read_run(path)  # says what is wrong
    return sorted(found)


def seeds_of(stem: Path | str) -> dict[int, Path]:
    """By seed the runs ``<stem>-<seed>``, in folders or kept."""
    stem = Path(stem)
    there = stem.parent.iterdir() if stem.parent.is_dir() else ()
    names = [path.name for path in (*_kept_beside(stem)[1], *there) if path.parent == stem.parent]
    begin = f"{stem.name}-"
    seeds = {int(name[len(begin) :]) for name in names if name.startswith(begin) and name[len(begin) :].isdecimal()}
    return {seed: stem.with_name(f"{begin}{seed}") for seed in sorted(seeds)}


# --- keeping ----------------------------------------------------------------------------------------------------------


def kept_name(path: Path) -> str:
    """How a run is kept: by its folder's name, or as ``table01/proxy/dml-0`` where ``reproduce.py`` has laid it out."""
    parts = path.absolute().parts
    laid_out = len(parts) > 2 and re.fullmatch(r"(table|figure)\d\d", parts[-3])
    return "/".join(parts[-3:] if laid_out else parts[-1:])


def keep(runs: Iterable[Run], folder: Path) -> list[str]:
    """Adds runs to ``runs.jsonl`` in a folder, sorted by name; returns their names.

    Raises: InputError for a name that is kept there already, and changes nothing then.
    """
    file = folder / KEPT
    kept = dict(_read_kept(file, file.stat().st_mtime_ns)) if file.is_file() else {}
    new: list[str] = []
    for run in runs:
        name = kept_name(run.path)
        if folder / name in kept:
            raise InputError(f"{file} keeps a run {name} already: remove that line, or rename the folder {run.path}")
        kept[folder / name] = dict(run.files)
        new.append(name)
    lines = {path.relative_to(folder).as_posix(): files for path, files in kept.items()}
    signed = [{**line, "sha256": digest_of(line)} for line in ({"run": name, **lines[name]} for name in sorted(lines))]
    text = "".join(json.dumps(line) + "\n" for line in signed)
    make_folder(folder)
    write_atomically(file, lambda temporary: temporary.write_text(text))
    return new
