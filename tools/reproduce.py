"""Runs a table of the paper: each of its runs as a process of the task's own train.py, nothing is trained in here.

    python tools/reproduce.py list
    python tools/reproduce.py show table01
    python tools/reproduce.py run table01 --scale proxy --seeds 0 1 2 --jobs 2
    python tools/reproduce.py status
    python tools/reproduce.py report

The same command again skips what is finished and resumes what was cut off. `--dry-run` prints the commands alone.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from tools.compare import LineParser, WrongInput
from tools.document import numbered
from tools.processes import (
    BLOCKED,
    ELSEWHERE,
    FAILED,
    FINISHED,
    INTERRUPTED,
    Job,
    Outcome,
    gpus,
    places,
    run_jobs,
    state,
)
from tools.tables import PAPER, SCALES, Cell, Scale, Table, TableError, load_tables

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/reproduce")
RESULTS = Path(os.path.relpath(ROOT / "results"))
HANDED_ON = {"report": "the paper's numbers beside ours as Markdown, CSV and a page; its own --help says more"}


@dataclass(frozen=True)
class Place:
    """Where runs go and data sets come from, as the commands say it, which are called in the repository's root."""

    out: Path
    data: Path
    sets: Mapping[str, Path]
    """What lies elsewhere: data sets by the name that they have below ``data``, other folders by theirs (weights)."""

    def read(self, word: str) -> tuple[str, str, Path | None]:
        """A word as what stands before its path, and the path of what it reads; None where it is none of these."""
        key, equals, value = word.rpartition("=")  # mmengine's KEY=VALUE, or the value alone
        path = Path(value)
        known = path.parts[:1] in (("data",), ("weights",)) and not path.is_relative_to(self.out)
        return key, equals, path if known else None

    def located(self, word: str) -> str:
        """A word of a command, with a path as the tables have it moved to where it is here."""
        key, equals, path = self.read(word)
        if path is None:
            return word
        for name, folder in self.sets.items():
            for begin in (Path("data", name), Path(name)):
                if path.is_relative_to(begin):
                    return f"{key}{equals}{folder / path.relative_to(begin)}"
        return f"{key}{equals}{self.data / path.relative_to('data')}" if path.parts[0] == "data" else word


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: WrongInput, TableError."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["report"]:
        from tools import report

        return report.main(words[1:])
    options = make_parser().parse_args(words)
    tables = load_tables(Path(options.tables))
    return options.call(options, tables)


def make_parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="reproduce.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, call: Any, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.set_defaults(call=call)
        one.add_argument("--tables", default=str(PAPER), metavar="FOLDER", help="the tables as data; tools/paper")
        return one

    def shared(one: argparse.ArgumentParser) -> None:
        one.add_argument("--out", default=str(OUT), metavar="FOLDER", help=f"where the runs go; {OUT}")

    add("list", list_tables, "the tables and figures of the paper, one a line")
    show = add("show", show_table, "a table's numbers in the paper, and the runs that yield ours")
    show.add_argument("table", metavar="TABLE")
    show.add_argument("--scale", choices=SCALES, default="proxy", help="whose commands to print; proxy")
    shared(show)
    run = add("run", run_tables, "run tables: what is finished is skipped, what was cut off is resumed")
    run.add_argument("table", nargs="+", metavar="TABLE", help="as list names them, or 1 for table01")
    run.add_argument("--rows", nargs="+", metavar="ROW", help="only these, by name or pattern ('ResNet-32x4*')")
    run.add_argument("--columns", nargs="+", metavar="COLUMN", help="only these, by name or pattern")
    run.add_argument("--runs", nargs="+", metavar="RUN", help="only these, as show names them, or by pattern")
    run.add_argument("--seeds", nargs="+", type=_seed, default=[0], metavar="SEED", help="0 unless given")
    run.add_argument(
        "--scale", choices=SCALES, default="proxy", help="the paper's own setting, or the small one; proxy"
    )
    run.add_argument(
        "--data", nargs="+", default=[], metavar="[NAME=]FOLDER", help="where the data sets lie; data. One: NAME=FOLDER"
    )
    run.add_argument("--jobs", type=_jobs, metavar="N", help="runs at a time; one a GPU, or one on the CPU")
    run.add_argument("--cluster", choices=["slurm"], help="queue every run as a job of this cluster, through submitit")
    run.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="what a job asks for: partition=gpu time=1440 ..."
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print every command and how long it takes, if that is known"
    )
    shared(run)
    status = add("status", tell_status, "how far the runs of each table are")
    status.add_argument("table", nargs="*", metavar="TABLE", help="with every run; all in short unless given")
    shared(status)
    for name, text in HANDED_ON.items():  # listed here, parsed there
        commands.add_parser(name, help=text)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs at a time")
    return int(text)


# --- what to do -------------------------------------------------------------------------------------------------------


def list_tables(options: argparse.Namespace, tables: Mapping[str, Table]) -> int:
    """Returns the exit code, as all commands."""
    for name, table in tables.items():
        print(f"{name:9} {table.task:14} {counted(table.runs, 'run'):>8}  {table.title}")
    return 0


def show_table(options: argparse.Namespace, tables: Mapping[str, Table]) -> int:
    table = find_table(options.table, tables)
    unit = f", {table.metric.unit}" if table.metric.unit else ""
    print(f"{table.label}: {table.title} ({table.task}; {table.metric.name}{unit})")
    if table.notes:
        print(f"\n{table.notes}")
    lines = [["paper", *table.columns]]
    for row in table.rows:
        by_column = {cell.column: cell for cell in row.cells}
        lines.append([row.name, *(printed(by_column.get(column)) for column in table.columns)])
    print(f"\n{aligned(lines)}")
    scale = cast(Scale, options.scale)
    place = make_place(options.out, [])
    print(f"\nRuns, {scale} scale:" if table.runs else "\nNothing is run for it.")
    for run_id, run in table.runs.items():
        if scale not in run.settings:
            print(f"  {run_id}: none at this scale")
            continue
        stems = ((stem, ",".join(map(str, numbered(stem)))) for stem in run.settings[scale].kept_stems(scale, RESULTS))
        kept = [f"{stem}-{{{seeds}}}" for stem, seeds in stems if seeds]
        told_kept = f"; kept in {', '.join(kept)}" if kept else ""
        print(f"  {run_id}: {state(make_job(table, run_id, scale, 0, place))}{told_kept}")
        for command in table.commands(run_id, scale, 0, place.out):
            print(f"    {told(command)}")
    for row, cell in table.cells():
        if cell.why is not None:
            print(f"Not run: {row.name}, {cell.column}: {cell.why}")
    if scale in table.needs:
        print(f"Needs: {table.needs[scale]}")
    return 0


def run_tables(options: argparse.Namespace, tables: Mapping[str, Table]) -> int:
    chosen = list(dict.fromkeys(find_table(name, tables).name for name in options.table))
    place = make_place(options.out, options.data)
    scale = cast(Scale, options.scale)
    if options.slurm and options.cluster is None:
        raise WrongInput("--slurm counts only with --cluster slurm")
    if options.jobs is not None and options.cluster is not None:
        raise WrongInput("--jobs counts only without --cluster: the cluster decides how many run at a time")
    plan = Plan(tables, scale, place)
    for name in chosen:
        runs = select(tables[name], scale, options.rows, options.columns, options.runs, several=len(chosen) > 1)
        for seed in dict.fromkeys(options.seeds):
            for run_id in runs:
                plan.add(tables[name], run_id, seed)
    jobs = plan.jobs
    if not jobs:
        raise WrongInput(f"nothing to run for {', '.join(chosen)} at the scale {scale}: show says why")
    check_sets(jobs.values(), place)
    if options.dry_run:
        return dry_run(plan)
    todo = {name: job for name, job in jobs.items() if not job.finished()}
    for name in todo:
        check_data(plan, name)
    print(f"{counted(jobs, 'run')}: {len(jobs) - len(todo)} finished, {len(todo)} to do", flush=True)
    if not todo:
        return 0
    if options.cluster is not None:
        return queue(options, todo, plan)
    where = places(options.jobs, gpus())
    print(f"{len(where)} at a time, threads of each: {where[0]['OMP_NUM_THREADS']}", flush=True)
    try:
        outcomes = run_jobs(list(todo.values()), where, ROOT, partial(print, flush=True))
    except OSError as error:
        raise WrongInput(f"cannot write {error.filename or place.out}: {error.strerror}") from error
    return conclude(outcomes, len(todo))


def tell_status(options: argparse.Namespace, tables: Mapping[str, Table]) -> int:
    place = make_place(options.out, [])
    chosen = [find_table(name, tables) for name in options.table]
    begun = False
    for table in chosen or tables.values():
        for scale in cast("tuple[Scale, ...]", SCALES):
            found = {job.name: state(job) for job in known_jobs(table, scale, place)}
            seen = Counter(word for word in found.values() if word != "not started")
            if not seen and not chosen:
                continue
            begun = True
            runs = sum(scale in run.settings for run in table.runs.values())
            in_words = ", ".join(f"{count} {word}" for word, count in sorted(seen.items())) or "nothing run yet"
            print(f"{table.name} {scale}: {counted(range(runs), 'run')} a seed; {in_words}")
            if chosen:
                for name, word in found.items():
                    print(f"  {word:12} {name}")
    if not begun:
        print(f"nothing run yet in {options.out}")
    return 0


# --- tables, rows, runs -----------------------------------------------------------------------------------------------


def find_table(name: str, tables: Mapping[str, Table]) -> Table:
    """By its name, or a table by its number alone. Raises: WrongInput."""
    asked = f"table{int(name):02d}" if name.isdecimal() else name
    if asked not in tables:
        near = [] if name.isdecimal() else difflib.get_close_matches(asked, tables, n=1)
        raise WrongInput(f"no table {name}: " + (f"did you mean {near[0]}?" if near else "list names them"))
    return tables[asked]


def select(
    table: Table,
    scale: Scale,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    runs: Sequence[str] | None,
    *,
    several: bool = False,
) -> list[str]:
    """The runs, at this scale, of the cells in these rows and columns, in the table's order.

    Raises: WrongInput for what is in none of them (of several tables, one may lack it).
    """
    wanted: dict[str, list[str]] = {}
    for kind, asked, there in (
        ("row", rows, [row.name for row in table.rows]),
        ("column", columns, list(table.columns)),
        ("run", runs, list(table.runs)),
    ):
        wanted[kind] = there if asked is None else []
        for pattern in asked or ():
            found = [name for name in there if name == pattern] or fnmatch.filter(there, pattern)
            if not found and not several:
                near = difflib.get_close_matches(pattern, there, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, there)) or 'none'}"
                raise WrongInput(f"{table.name} has no {kind} {pattern!r}: {hint}")
            wanted[kind] += found
    in_cells = {
        cell.run
        for row, cell in table.cells()
        if cell.run is not None and row.name in wanted["row"] and cell.column in wanted["column"]
    }
    # A run that no cell reads is there for others, and may be named all the same.
    named = set(wanted["run"]) if runs is not None and rows is None and columns is None else in_cells
    return [
        run_id
        for run_id, run in table.runs.items()
        if run_id in named and run_id in wanted["run"] and scale in run.settings
    ]


def make_place(out: str, data: Sequence[str]) -> Place:
    """Raises: WrongInput for data that is neither FOLDER nor NAME=FOLDER."""
    here = Path.cwd() == ROOT

    def seen_from_root(path: str) -> Path:
        return Path(path) if here else Path(path).absolute()

    folder, sets = Path("data"), {}
    for word in data:
        name, equals, path = word.partition("=")
        if equals and not (name and path):
            raise WrongInput(f"--data {word}: write FOLDER, or NAME=FOLDER for one data set")
        if equals:
            sets[name] = seen_from_root(path)
        else:
            folder = seen_from_root(word)
    return Place(seen_from_root(out), folder, sets)


def check_sets(jobs: Iterable[Job], place: Place) -> None:
    """Raises: WrongInput for ``--data NAME=FOLDER`` of which no run reads anything."""
    words = [Path(word.rpartition("=")[2]) for job in jobs for command in job.commands for word in command]
    for name, folder in place.sets.items():
        if not any(word.is_relative_to(folder) for word in words):
            raise WrongInput(f"--data {name}={folder}: no run here reads data/{name} (nor {name}/)")


def check_data(plan: Plan, name: str) -> None:
    """Raises: WrongInput where a folder or file that a run reads is not there."""
    table, run_id, seed = plan.origins[name][0]
    download = table.setting(run_id, plan.scale).overrides.get("data.download") is True
    for command in table.commands(run_id, plan.scale, seed, plan.place.out):
        for word in command:
            *_, path = plan.place.read(word)
            if path is None or (path == Path("data") and download):
                continue
            here = plan.place.located(str(path))
            if not (ROOT / here).exists():
                needs = f"; {table.label} needs {table.needs[plan.scale]}" if plan.scale in table.needs else ""
                raise WrongInput(
                    f"{name} reads {here}, which is not there: --data says where, --rows leaves runs out{needs}"
                )


def make_job(table: Table, run_id: str, scale: Scale, seed: int, place: Place) -> Job:
    setting = table.setting(run_id, scale)
    folder = table.folder(run_id, scale, seed, place.out)
    commands = [[place.located(word) for word in c] for c in table.commands(run_id, scale, seed, place.out)]
    return Job(
        name=f"{setting.table}/{scale}/{folder.name}",
        folder=ROOT / folder,
        commands=commands,
        finished=partial(is_finished, table, run_id, ROOT / folder),
        needs=tuple(f"{needed}/{scale}/{other}-{seed}" for needed, other in setting.needs),
    )


def is_finished(table: Table, run_id: str, folder: Path) -> bool:
    """Whether the run has ended, and all that the table reads or shows of it is there."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    ended = isinstance(summary, dict) and summary.get("status") == FINISHED
    return ended and table.complete(run_id, folder)


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
        for name, needed in table.setting(run_id, self.scale).needs:
            self.add(self.tables[name], needed, seed)
        same = self.jobs.get(job.name)
        if same is not None:  # another table's too, which may draw or score it in another way
            more = [command for command in job.commands if command not in same.commands]
            both = (same.finished, job.finished)
            job = replace(same, commands=[*same.commands, *more], finished=lambda: all(done() for done in both))
        self.jobs[job.name] = job


def known_jobs(table: Table, scale: Scale, place: Place) -> list[Job]:
    """A table's runs of seed 0, and of any other seed that has been begun."""
    found = []
    for run_id, run in table.runs.items():
        if scale not in run.settings:
            continue
        setting = run.settings[scale]
        beside = (ROOT / setting.folder(scale, 0, place.out)).parent
        names = [path.name for path in beside.iterdir()] if beside.is_dir() else []
        begun = (re.fullmatch(rf"{re.escape(setting.run)}-(\d+)(\.log)?", name) for name in names)
        seeds = {0} | {int(match[1]) for match in begun if match}
        found += [make_job(table, run_id, scale, seed, place) for seed in sorted(seeds)]
    return found


# --- doing it ---------------------------------------------------------------------------------------------------------


def dry_run(plan: Plan) -> int:
    """Prints every command, and how long it takes where a kept step time tells."""
    from tools.step_times import duration, estimate, kept_benchmarks, kept_runs, of_same_runs

    here = "cuda" if plan.scale == "paper" or gpus() else "cpu"
    kept = [*kept_runs([ROOT / plan.place.out, RESULTS]), *kept_benchmarks(RESULTS / "benchmark")]
    hours: dict[str, float] = {}
    unknown = 0
    for name, job in plan.jobs.items():
        if job.finished():
            print(f"# {name}: finished")
        else:
            table, run_id, _ = plan.origins[name][0]
            setting = table.setting(run_id, plan.scale)
            same = [setting.stem(plan.scale, ROOT / plan.place.out), *setting.kept_stems(plan.scale, RESULTS)]
            looks = (
                look
                for device in (here, *({"cuda", "cpu"} - {here}))
                for look in (of_same_runs(same, device), estimate(job.commands[0], kept, device, ROOT))
            )
            found = next((look for look in looks if look is not None), None)
            print(f"# {name}: {found or 'time unknown'}")
            if found is not None:
                hours[found.device] = hours.get(found.device, 0) + found.hours
            unknown += found is None
        for command in job.commands:
            print(told(command))
    parts = [duration(total, device) for device, total in hours.items()]
    parts += [f"{counted(range(unknown), 'run')} of unknown time"] if unknown else []
    print(f"# together: {' and '.join(parts) or 'nothing to do'}; evaluation is not counted")
    return 0


def queue(options: argparse.Namespace, todo: Mapping[str, Job], plan: Plan) -> int:
    """Queues every run as a job that calls this tool for that run alone, and so locks, skips and resumes as ever."""
    from tools.slurm import make_executor, submit

    place = plan.place
    executor = make_executor(ROOT / place.out / "slurm", options.slurm)
    rest = ["--scale", plan.scale, "--out", str(place.out), "--jobs", "1"]
    rest += ["--tables", str(Path(options.tables).absolute())]
    rest += ["--data", str(place.data), *(f"{name}={path}" for name, path in place.sets.items())]
    ids: dict[str, str] = {}
    for name, job in todo.items():
        for table, run_id, seed in plan.origins[name]:
            command = [str(ROOT / "tools/reproduce.py"), "run", table.name, "--runs", run_id, "--seeds", str(seed)]
            after = [ids[needed] for needed in (*job.needs, name) if needed in ids]
            ids[name] = submit(executor, name.replace("/", "-"), [sys.executable, *command, *rest], ROOT, after)
            print(f"job {ids[name]}: {name}", flush=True)
    print("queued: status says how far they are")
    return 0


def conclude(outcomes: Mapping[str, Outcome], asked: int) -> int:
    """Says what failed and how to go on; returns the exit code."""
    by_state: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        by_state.setdefault(outcome.state, []).append(name)
    left = asked - len(outcomes)
    parts = [f"{len(names)} {word}" for word, names in by_state.items()] + ([f"{left} not started"] if left else [])
    print(", ".join(parts))
    for name in [*by_state.get(FAILED, ()), *by_state.get(BLOCKED, ())]:
        print(f"{outcomes[name].state}: {name}: {outcomes[name].reason}", file=sys.stderr)
    if by_state.get(ELSEWHERE):
        print("another process runs the others: status says how far they are")
    if by_state.get(INTERRUPTED) or left:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 1 if by_state.get(FAILED) or by_state.get(BLOCKED) else 0


# --- in words ---------------------------------------------------------------------------------------------------------


def counted(things: Iterable[Any], name: str) -> str:
    """ "3 runs", "1 run"."""
    number = len(list(things))
    return f"{number} {name}{'' if number == 1 else 's'}"


def told(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python", *command])


def printed(cell: Cell | None) -> str:
    """What the paper prints in a cell."""
    if cell is None:
        return ""
    number = "-" if cell.paper is None else f"{cell.paper:g}"
    spread = f" ± {cell.paper_std:g}" if cell.paper_std is not None else ""
    return f"{number}{spread}" + (f" {cell.label}" if cell.label else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def command_line(argv: Sequence[str] | None = None) -> int:
    """``main`` with what is wrong said in one line; returns the exit code."""
    try:
        return main(argv)
    except (WrongInput, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # show table01 | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command_line())
