"""What a table or figure of the paper is: rows, columns, the paper's numbers, and for each cell the run behind it.

``tools/paper/tableNN.yaml`` and ``figureNN.yaml`` hold them, ``tools/paper_files.py`` reads them. A run is one call of
a task's own ``train.py``, at one of two scales: ``paper``, and ``proxy``, a small stand-in for a CPU. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from core.errors import InputError
from tools.runs import Run

ROOT = Path(__file__).resolve().parents[1]
SEGMENTATION_FLAGS = ("method", "amp")  # of its train.py; all else are options of the config

Scale = Literal["paper", "proxy"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Metric:
    """What a number is."""

    name: str
    unit: str = ""
    higher_is_better: bool = True
    proxy: str | None = None
    """What the proxy's number is, where that is another measure."""


@dataclass(frozen=True)
class Setting:
    """A run of a table at one scale, but for its seed."""

    table: str
    """The table and the id whose folder it has: another table's where that has the same run."""
    run: str
    scale: Scale
    task: str
    command: str | None
    recipe: str
    """From the repository's root, as all paths here."""
    overrides: Mapping[str, Any]
    after: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    """(table, id) of the runs that must be finished before, of the same scale and seed."""
    results: str | None = None
    """``FOLDER/NAME`` where ``results/FOLDER/NAME-<seed>`` may be this run."""

    def stem(self, out: Path | str) -> Path:
        """``<stem>-<seed>`` is the run folder below ``out``."""
        return Path(out) / self.table / self.scale / self.run

    def folder(self, seed: int, out: Path | str) -> Path:
        """The run folder, ``<out>/table01/<scale>/<run id>-<seed>``, of the table that first has it."""
        return self.stem(out).with_name(f"{self.run}-{seed}")

    def kept_stems(self, results: Path) -> list[Path]:
        """``<stem>-<seed>`` is where such runs may be kept: in ``reproduce``, as they were run, or in ``results``."""
        return [self.stem(results / "reproduce"), *([results / self.results] if self.results else [])]

    def commands(self, seed: int, out: Path | str) -> list[list[str]]:
        """What to call after ``python``, in the repository's root: the task's train.py, then what scores the run."""
        texts = {"run": str(self.folder(seed, out)), "seed": str(seed)}
        for table, needed in self.needs:
            texts[f"run:{table}/{needed}"] = str(Path(out) / table / self.scale / f"{needed}-{seed}")
        ends = ["--seed", str(seed), "--out", texts["run"]]
        train = [f"{self.task}/tools/train.py", *([self.command] if self.command else [])]
        if self.task == "segmentation":
            flags, options = _segmentation_words(self.overrides)
            words = [*train, self.recipe, *flags, *ends, *options]  # the options take all that follows
        else:
            words = [*train, "--config", self.recipe, *_flags(self.overrides), *ends]
        return [
            [_filled(word, texts) for word in words],
            *([_filled(word, texts) for word in line.split()] for line in self.after),
        ]


@dataclass(frozen=True)
class Cell:
    """A number (or picture) of the paper and where ours is."""

    row: str
    column: str
    metric: Metric
    paper: float | None = None
    label: str | None = None
    run: str | None = None
    why: str | None = None
    read: str | None = None
    where: Mapping[str, Any] | None = None
    at: float | None = None
    show: str | None = None

    def value(self, run: Run) -> float | None:
        """Ours; None where it is not there (yet)."""
        return None if self.read is None else run.number(self.read, self.where, self.at)


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper."""

    name: str
    """``table01`` or ``figure04``: the file's."""
    title: str
    task: str
    metric: Metric
    notes: str
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Row by row, as printed."""
    runs: Mapping[str, Mapping[Scale, Setting]]
    """By id, at the scales that it can be run at."""
    baselines: Mapping[str, str]
    """By run the one that it adds to."""
    needs: Mapping[str, str]

    @property
    def label(self) -> str:
        """``Table 1``."""
        return f"{self.name[:-2].capitalize()} {int(self.name[-2:])}"

    @property
    def rows(self) -> list[str]:
        """The names of the rows, as printed."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    def baseline(self, cell: Cell) -> Cell | None:
        """The cell of the same measure whose run this cell's adds to; of several the one in its row."""
        baseline = self.baselines.get(cell.run or "")
        if baseline is None or cell.show is not None:
            return None
        same = [
            other
            for other in self.cells
            if other.run == baseline
            and other.show is None
            and (other.metric, other.where, other.at) == (cell.metric, cell.where, cell.at)
            and (other.row == cell.row or other.read == cell.read)
        ]
        return max(same, key=lambda other: other.row == cell.row, default=None)

    def setting(self, run_id: str, scale: Scale) -> Setting:
        """Raises: InputError where there is no such run, or none at this scale."""
        if run_id not in self.runs:
            raise InputError(f"{self.name} has no run {run_id}: {', '.join(self.runs) or 'nothing is run for it'}")
        if scale not in self.runs[run_id]:
            raise InputError(f"{self.name} has no run {run_id} of the scale {scale}")
        return self.runs[run_id][scale]

    def complete(self, run_id: str, run: Run) -> bool:
        """Whether a run has ended, and has every number and picture that the table takes from it."""
        own = [cell for cell in self.cells if cell.run == run_id]
        return run.finished and all(
            cell.value(run) is not None if cell.show is None else (run.path / cell.show).is_file() for cell in own
        )


def _flags(overrides: Mapping[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", _text(value))]


def _segmentation_words(overrides: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Flags of its train.py, and mmengine's ``--cfg-options`` for all else."""
    own = {"data-root" if key == "data_root" else key: value for key, value in overrides.items()}
    flags = {key: own.pop(key) for key in (*SEGMENTATION_FLAGS, "data-root") if key in own}
    options = [f"{k}={v if v is None or isinstance(v, bool) else _text(v)}" for k, v in own.items()]
    return _flags(flags), ["--cfg-options", *options] if options else []


def _text(value: Any) -> str:
    """A value as a command line says it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _filled(text: str, texts: Mapping[str, str]) -> str:
    return re.sub(r"\{(run:[^}]+|run|seed)\}", lambda match: texts[match[1]], text)
