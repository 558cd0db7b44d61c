"""The pictures of a report: curves of a table's runs, and the maps, diagrams and samples that runs left."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from core.files import make_folder, write_atomically
from tools.compare import figure_of
from tools.groups import Comparison, Group, common_roles, measure_of
from tools.ours import Members, setting_of
from tools.paper import Table
from tools.runs import Run

WIDTH = 900  # pixels of an embedded picture, at most
COLORS = 96  # of a drawn figure: its file is a third of that in all colours
KEPT_WIDTH = 640
LEFT = ("figures/*.png", "**/samples.png", "**/trajectory-*.png", "**/similarity-*.png")
"""What training, visualize.py and sample.py leave in a run's folder beside its curves."""
MOST = 6  # of one pattern: samples are drawn again and again, the last tell most


@dataclass(frozen=True)
class Picture:
    """PNG, and its size in pixels."""

    png: bytes
    size: tuple[int, int]


def curves(members: Members, drawn: set[Path]) -> dict[str, Picture]:
    """By caption compare.py's figure of each network, a figure for each pair of networks; nothing where all the runs of
    it are in ``drawn`` already, to which they are added then."""
    pairs: dict[str, dict[str, Mapping[int, Run]]] = {}
    for run_id, runs in members.items():
        run = next(iter(runs.values()))
        pairs.setdefault(setting_of(run), {})[run_id] = runs
    found: dict[str, Picture] = {}
    for pair, of in pairs.items():
        paths = {run.path for runs in of.values() for run in runs.values()}
        if not paths <= drawn:
            found |= {": ".join(filter(None, [what, pair])): picture for what, picture in _figures(of).items()}
        drawn |= paths
    return found


def _figures(members: Members) -> dict[str, Picture]:
    """None where the runs have no measure or role in common."""
    every = [run for runs in members.values() for run in runs.values()]
    try:
        (measure,) = {measure_of(run) for run in every}
        roles = common_roles(every, measure)
    except ValueError:  # several measures, or no role in common
        return {}
    groups = [Group(dict(runs), {}, run_id) for run_id, runs in members.items()]
    compared = Comparison(measure, groups, roles)
    by_role = {f"Curves, {role}": [role] for role in roles} if compared.has_best else {"Scores": roles}
    moving = {what: of for what, of in by_role.items() if not all(role == "teacher" and fixed(every) for role in of)}
    found = {}
    for what, of in moving.items():
        png = io.BytesIO()
        figure_of(replace(compared, roles=of)).savefig(png, dpi=100, format="png")
        found[what] = small(png, COLORS)
    return found


def fixed(runs: list[Run]) -> bool:
    """Whether the teacher is not trained in any of these."""
    return all(run.config.get("task") == "offline_kd" for run in runs)


def pictures_of(
    table: Table, members: Members, shown: Set[Path], drawn: set[Path]
) -> tuple[dict[str, Picture], list[str]]:
    """By caption, of the first run of each id what the table shows of it, and what no table shows.

    ``shown``: what some table shows; ``drawn``: what stands before this table, to which its own is added then.
    Returns: and what of it stands before.
    """
    found, before = {}, []
    for run_id, runs in members.items():
        run = next(iter(runs.values()))
        own = [file for file in shown_by(table, run_id, run) if file.is_file()]
        for file in dict.fromkeys([*own, *(file for file in left_by(run) if file not in shown)]):
            caption = f"{run_id}, seed {run.seed}: {file.relative_to(run.path)}"
            if file not in drawn:
                found[caption] = small(file)
            elif file in own:
                before.append(caption)
            drawn.add(file)
    return found, before


def shown_by(table: Table, run_id: str, run: Run) -> list[Path]:
    """The pictures that a table takes from a run."""
    return [run.path / cell.show for cell in table.cells if cell.run == run_id and cell.show]


def left_by(run: Run) -> list[Path]:
    """The pictures in a run's folder, but for its curves."""
    return [file for pattern in LEFT for file in sorted(run.path.glob(pattern))[-MOST:]]


def keep_pictures(runs: Iterable[Run], folder: Path, names: Iterable[str]) -> list[Path]:
    """Keeps small copies of what runs drew, of one seed of each, at ``folder/<name>``, where the kept run is found.

    Returns: the files. Raises: InputError, TrainingError where one cannot be written.
    """
    kept = []
    for run, name in zip(runs, names, strict=True):
        place = folder / name
        stem = place.name.rpartition("-")[0] or place.name
        others = (one for one in place.parent.glob(f"{stem}-*") if one.name[len(stem) + 1 :].isdecimal())
        if any(file for one in others for file in one.rglob("*.png")):
            continue
        for file in dict.fromkeys([*left_by(run), *run.path.glob("curves.png")]):
            target = place / file.relative_to(run.path)
            make_folder(target.parent)
            write_atomically(target, partial(Path.write_bytes, data=small(file, COLORS, KEPT_WIDTH).png))
            kept.append(target)
    return kept


def small(file: Path | io.BytesIO, colors: int = 256, width: int = WIDTH) -> Picture:
    """A picture no wider than that, in so many colours."""
    from PIL import Image

    with Image.open(file) as image:
        picture = image.convert("RGB")
        picture.thumbnail((width, picture.height), Image.Resampling.LANCZOS, reducing_gap=None)
        picture = picture.quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        out = io.BytesIO()
        picture.save(out, "PNG", optimize=True)
        return Picture(out.getvalue(), picture.size)
