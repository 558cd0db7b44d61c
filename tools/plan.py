"""Which runs a table of the paper needs, where they go, and what they read."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from core.errors import InputError
from core.files import how_to_make
from tools.paper import ROOT, Scale, Table
from tools.processes import Job


@dataclass(frozen=True)
class Place:
    """Where runs go and data sets come from, as the commands say it, which are called in the repository's root."""

    out: Path
    data: Path
    sets: Mapping[str, Path]
    """What lies elsewhere: data sets by the name that they have below ``data``, other folders by theirs (weights)."""

    def located(self, word: str) -> str:
        """A word of a command, with a path as the tables have it moved to where it is here."""
        key, equals, value = word.rpartition("=")  # mmengine's KEY=VALUE, or the value alone
        path = Path(value)
        if path.parts[:1] not in (("data",), ("weights",)) or path.is_relative_to(self.out):
            return word
        moved = [(Path(above, name), folder) for name, folder in self.sets.items() for above in ("data", "")]
        for begin, folder in [*moved, (Path("data"), self.data)]:
            if path.is_relative_to(begin):
                return f"{key}{equals}{folder / path.relative_to(begin)}"
        return word

    def inputs(self, job: Job) -> Iterator[Path]:
        """The data and weights that a job's commands name."""
        for path in (Path(word.rpartition("=")[2]) for command in job.commands for word in command):
            folders = (self.data, Path("weights"), *self.sets.values())
            if any(map(path.is_relative_to, folders)) and not path.is_relative_to(self.out):
                yield path


def make_place(out: str, data: Sequence[str] = ()) -> Place:
    """Raises: InputError for data that is neither FOLDER nor NAME=FOLDER."""
    here = Path.cwd() == ROOT

    def seen_from_root(path: str) -> Path:
        return Path(path) if here else Path(path).absolute()

    folders = {"": Path("data")}
    for word in data:
        name, _, path = word.partition("=") if "=" in word else ("", "", word)
        if "=" in word and not (name and path):
            raise InputError(f"--data {word}: write FOLDER, or NAME=FOLDER for one data set")
        folders[name] = seen_from_root(path)
    return Place(seen_from_root(out), folders.pop(""), folders)


def select(
    table: Table, scale: Scale, asked: Mapping[str, Sequence[str] | None], *, several: bool = False
) -> list[str]:
    """The runs, at this scale, of the cells in these rows and columns, in the table's order.

    ``asked``: names or patterns of "row", "column" and "run"; None for all. Raises: InputError for what is in none of
    them (of several tables, one may lack it).
    """
    wanted: dict[str, list[str]] = {"row": table.rows, "column": list(table.columns), "run": list(table.runs)}
    for kind, there in list(wanted.items()):
        patterns = asked[kind]
        if patterns is not None:
            wanted[kind] = []
        for pattern in patterns or ():
            found = [pattern] if pattern in there else fnmatch.filter(there, pattern)
            if not found and not several:
                near = difflib.get_close_matches(pattern, there, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, there)) or 'none'}"
                raise InputError(f"{table.name} has no {kind} {pattern!r}: {hint}")
            wanted[kind] += found
    named = {c.run for c in table.cells if c.row in wanted["row"] and c.column in wanted["column"]}
    if asked["row"] is asked["column"] is None and asked["run"] is not None:
        named = set(wanted["run"])  # one that no cell reads is there for others
    return [r for r, settings in table.runs.items() if r in named and r in wanted["run"] and scale in settings]


def make_job(table: Table, run_id: str, scale: Scale, seed: int, place: Place) -> Job:
    """A run of a table at one scale."""
    setting = table.runs[run_id][scale]
    folder = setting.folder(seed, place.out)
    return Job(
        name=f"{setting.table}/{scale}/{folder.name}",
        folder=ROOT / folder,
        commands=[[place.located(word) for word in command] for command in setting.commands(seed, place.out)],
        finished=partial(table.complete, run_id, ROOT / folder),
        needs=tuple(f"{needed}/{scale}/{other}-{seed}" for needed, other in setting.needs.values()),
    )


def known_jobs(table: Table, scale: Scale, place: Place) -> list[Job]:
    """A table's runs of seed 0, and of any other seed that has been begun."""
    found = []
    for run_id, settings in table.runs.items():
        if scale in settings:
            stem = ROOT / settings[scale].stem(place.out)
            begun = (path.name.removesuffix(".log").rpartition("-") for path in stem.parent.glob("*"))
            seeds = {0} | {int(seed) for name, _, seed in begun if name == stem.name and seed.isdecimal()}
            found += [make_job(table, run_id, scale, seed, place) for seed in sorted(seeds)]
    return found


class Plan:
    """What to run, in order: each run once, behind the runs that it starts from."""

    def __init__(self, tables: Mapping[str, Table], scale: Scale, place: Place) -> None:
        self.tables, self.scale, self.place = tables, scale, place
        self.jobs: dict[str, Job] = {}
        self.origins: dict[str, list[tuple[Table, str, int]]] = {}
        """By the job's name: the tables whose run it is, with its id there and its seed."""

    def add(self, table: Table, run_id: str, seed: int) -> None:
        job = make_job(table, run_id, self.scale, seed, self.place)
        origins = self.origins.setdefault(job.name, [])
        if (table, run_id, seed) in origins:
            return
        origins.append((table, run_id, seed))
        for name, needed in table.runs[run_id][self.scale].needs.values():
            self.add(self.tables[name], needed, seed)
        same = self.jobs.get(job.name)
        if same is not None:  # another table's too, which may draw or score it in another way
            more = [command for command in job.commands if command not in same.commands]
            both = (same.finished, job.finished)
            job = replace(same, commands=[*same.commands, *more], finished=lambda: all(done() for done in both))
        self.jobs[job.name] = job

    def check_sets(self) -> None:
        """Raises: InputError for ``--data NAME=FOLDER`` of which no run reads anything."""
        paths = {path for job in self.jobs.values() for path in self.place.inputs(job)}
        for name, folder in self.place.sets.items():
            if not any(path.is_relative_to(folder) for path in paths):
                raise InputError(f"--data {name}={folder}: no run here reads data/{name} (nor {name}/)")

    def check_data(self, names: Iterable[str]) -> None:
        """Raises: InputError where a folder or file that one of these jobs reads is not there."""
        for name in names:
            table, run_id, _ = self.origins[name][0]
            download = table.runs[run_id][self.scale].overrides.get("data.download") is True
            for path in self.place.inputs(self.jobs[name]):
                if not (ROOT / path).exists() and not (path == self.place.data and download):
                    needs = f"; {table.label} needs {table.needs[self.scale]}" if self.scale in table.needs else ""
                    hint = f"--data says where, --rows leaves runs out{needs}{how_to_make(path)}"
                    raise InputError(f"{name} reads {path}, which is not there: {hint}")
