"""Runs a table of the paper: each of its runs as a process of the task's own train.py, nothing is trained in here.

    python tools/reproduce.py list
    python tools/reproduce.py show table01
    python tools/reproduce.py run table01 --scale proxy --seeds 0 1 2 --jobs 2
    python tools/reproduce.py status
    python tools/reproduce.py report
    python tools/reproduce.py keep runs/quickstart/kd-0 runs/quickstart/kd-1 --to mine

The same command again skips what is finished and resumes what was cut off. `--dry-run` prints the commands alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.ranges import Seed, range_of
from core.training.command import LineParser, run_command
from core.training.kept import KEPT
from tools import report
from tools.ours import finished_runs
from tools.paper import PAPER, ROOT, SCALES, Setting, find_table, load_tables
from tools.pictures import keep_pictures
from tools.plan import Place, Plan, known_jobs, make_job, make_place, select
from tools.processes import (
    Job,
    conclude,
    gpus,
    make_executor,
    readable,
    run_jobs,
    sbatch,
    slots,
    slurm_parameters,
    state,
    submit,
)
from tools.runs import Run, keep, read_runs, seeds_of
from tools.stats import columns, counted

OUT = Path("runs/reproduce")
RESULTS = Path(os.path.relpath(ROOT / "results"))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError."""
    options = make_parser().parse_args(argv)
    try:
        return options.call(options)
    except BrokenPipeError:  # show table01 | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_parser() -> argparse.ArgumentParser:
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    parser = LineParser(prog="reproduce.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, call: Any, text: str, about: str = "") -> Any:
        one = commands.add_parser(name, help=text, description=about or text, allow_abbrev=False)
        one.set_defaults(call=call)
        return one.add_argument

    def places(option: Any, out: bool = True) -> None:
        option("--tables", type=Path, default=PAPER, metavar="FOLDER", help="the tables as data; tools/paper")
        if out:
            option("--out", type=Path, default=OUT, metavar="FOLDER", help=f"where the runs go; {OUT}")

    places(add("list", list_tables, "the tables and figures of the paper, one a line"), out=False)
    option = add("show", show_table, "a table's numbers in the paper, and the runs that yield ours")
    option("table", metavar="TABLE")
    option("--scale", choices=SCALES, default="proxy", help="whose commands to print; proxy")
    places(option)
    option = add("run", run_tables, "run tables: what is finished is skipped, what was cut off is resumed")
    option("table", nargs="+", metavar="TABLE", help="as list names them, or 1 for table01")
    option("--rows", nargs="+", metavar="ROW", help="only these, by name or pattern ('ResNet-32x4*')")
    option("--columns", nargs="+", metavar="COLUMN", help="only these, by name or pattern")
    option("--runs", nargs="+", metavar="RUN", help="only these, as show names them, or by pattern")
    option("--seeds", nargs="+", type=NonNegativeInt, default=[0], metavar="SEED", help="0 unless given")
    option("--scale", choices=SCALES, default="proxy", help="the paper's own setting, or the small one; proxy")
    data = "where the data sets lie; data. One: NAME=FOLDER"
    option("--data", nargs="+", default=[], metavar="[NAME=]FOLDER", help=data)
    option("--jobs", type=PositiveInt, metavar="N", help="runs at a time; one a GPU, or one on the CPU")
    option("--cluster", choices=["slurm"], help="queue every run as a job of this cluster, through submitit")
    slurm = "what a job asks for: partition=gpu time=1440 ..."
    option("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help=slurm)
    dry = "print every command, and how long it took where it has been run; of a cluster also what each job asks for"
    option("--dry-run", action="store_true", help=dry)
    places(option)
    option = add("status", tell_status, "how far the runs of each table are")
    option("table", nargs="*", metavar="TABLE", help="with every run; all in short unless given")
    places(option)
    option = add("keep", keep_runs, f"add runs to results/EXPERIMENT/{KEPT}, without weights and training losses")
    option("runs", nargs="+", metavar="RUN", help="run folders, or folders of them")
    option("--to", required=True, metavar="EXPERIMENT", help="the folder in results/")
    option("--partial", action="store_true", help="keep unfinished runs too, as far as they are")
    option("--results", type=Path, default=RESULTS, metavar="FOLDER", help="the results; those of the repository")
    text = "the paper's numbers beside ours as Markdown, CSV and a page; its own --help says more"
    option = add("report", report.main, text, (report.__doc__ or "").partition("\n")[0])
    runs = "where reproduce.py run has put its runs; %(default)s"
    option("--runs", type=Path, default=OUT, metavar="FOLDER", help=runs)
    kept = "kept results; those of the repository"
    option("--results", type=Path, default=ROOT / "results", metavar="FOLDER", help=kept)
    option("--out", type=Path, default=OUT / "report", metavar="FOLDER", help="where the report goes; %(default)s")
    places(option, out=False)
    document = "write docs/results.md, or FILE, from the kept results, and nothing else"
    option("--document", nargs="?", type=Path, const=ROOT / "docs/results.md", metavar="FILE", help=document)
    return parser


# --- the commands: each returns the exit code -------------------------------------------------------------------------


def list_tables(options: argparse.Namespace) -> int:
    for name, table in load_tables(options.tables).items():
        print(f"{name:9} {table.task:14} {counted(len(table.runs), 'run'):>8}  {table.title}")
    return 0


def show_table(options: argparse.Namespace) -> int:
    table, scale = find_table(options.table, load_tables(options.tables)), options.scale
    place = make_place(options.out)
    unit = f", {table.metric.unit}" if table.metric.unit else ""
    print(f"{table.label}: {table.title} ({table.task}; {table.metric.name}{unit})")
    if table.notes:
        print(f"\n{table.notes}")
    cells = {(c.row, c.column): f"{'-' if c.paper is None else f'{c.paper:g}'} {c.label or ''}" for c in table.cells}
    lines = [[row, *(cells.get((row, column), "").strip() for column in table.columns)] for row in table.rows]
    print(f"\n{columns([['paper', *table.columns], *lines])}")
    print(f"\nRuns, {scale} scale:" if table.runs else "\nNothing is run for it.")
    for run_id, settings in table.runs.items():
        if scale not in settings:
            print(f"  {run_id}: none at this scale")
            continue
        stems = ((stem, ",".join(map(str, seeds_of(stem)))) for stem in settings[scale].kept_stems(RESULTS))
        kept = [f"{stem}-{{{seeds}}}" for stem, seeds in stems if seeds]
        told_kept = f"; kept in {', '.join(kept)}" if kept else ""
        print(f"  {run_id}: {state(make_job(table, run_id, scale, 0, place))}{told_kept}")
        for command in settings[scale].commands(0, place.out):
            print(f"    {told(command)}")
    for cell in (cell for cell in table.cells if cell.why is not None):
        print(f"Not run: {cell.row}, {cell.column}: {cell.why}")
    if scale in table.needs:
        print(f"Needs: {table.needs[scale]}")
    return 0


def run_tables(options: argparse.Namespace) -> int:
    tables, place = load_tables(options.tables), make_place(options.out, options.data)
    range_of(Seed).check("--seeds: a seed", max(options.seeds))
    if options.slurm and options.cluster is None:
        raise InputError("--slurm counts only with --cluster slurm")
    if options.jobs is not None and options.cluster is not None:
        raise InputError("--jobs counts only without --cluster: the cluster decides how many run at a time")
    chosen = {table.name: table for table in (find_table(name, tables) for name in options.table)}
    plan = Plan(tables, options.scale, place)
    for table in chosen.values():
        asked = {"row": options.rows, "column": options.columns, "run": options.runs}
        runs = select(table, options.scale, asked, several=len(chosen) > 1)
        for seed, run_id in itertools.product(dict.fromkeys(options.seeds), runs):
            plan.add(table, run_id, seed)
    if not plan.jobs:
        raise InputError(f"nothing to run for {', '.join(chosen)} at the scale {options.scale}: show says why")
    plan.check_sets()
    parameters = slurm_parameters(options.slurm) if options.cluster is not None else None
    if options.dry_run:
        return dry_run(plan, parameters)
    todo = {name: job for name, job in plan.jobs.items() if not job.finished()}
    plan.check_data(todo)
    print(f"{counted(len(plan.jobs), 'run')}: {len(plan.jobs) - len(todo)} finished, {len(todo)} to do", flush=True)
    if not todo:
        return 0
    if parameters is not None:
        return queue(options, parameters, todo, plan)
    where = slots(options.jobs, gpus())
    print(f"{len(where)} at a time, threads of each: {where[0]['OMP_NUM_THREADS']}", flush=True)
    try:
        outcomes = run_jobs(list(todo.values()), where, ROOT, partial(print, flush=True))
    except OSError as error:
        raise InputError(f"cannot write {error.filename or place.out}: {error.strerror}") from error
    return conclude(outcomes, len(todo))


def tell_status(options: argparse.Namespace) -> int:
    tables, place = load_tables(options.tables), make_place(options.out)
    chosen = [find_table(name, tables) for name in options.table]
    lines = []
    for table in chosen or tables.values():
        for scale in SCALES:
            found = {job.name: state(job) for job in known_jobs(table, scale, place)}
            seen = Counter(word for word in found.values() if word != "not started")
            if not seen and not chosen:
                continue
            runs = [settings for settings in table.runs.values() if scale in settings]
            in_words = ", ".join(f"{count} {word}" for word, count in sorted(seen.items())) or "nothing run yet"
            lines.append(f"{table.name} {scale}: {counted(len(runs), 'run')} a seed; {in_words}")
            lines += [f"  {word:12} {name}" for name, word in found.items()] if chosen else []
    print("\n".join(lines) or f"nothing run yet in {options.out}")
    return 0


def keep_runs(options: argparse.Namespace) -> int:
    runs = read_runs(options.runs)
    unfinished = next((run for run in runs if not run.finished and "summary" in run.files), None)
    if unfinished is not None and not options.partial:
        raise InputError(f"{unfinished.path} is not finished: --partial keeps it as far as it is")
    if not options.to or Path(options.to).is_absolute() or ".." in Path(options.to).parts:
        raise InputError(f"--to {options.to!r} names no folder in {options.results}")
    folder = options.results / options.to
    names = keep(runs, folder)
    pictures = keep_pictures(runs, folder, names)
    drawn = f"; {counted(len(pictures), 'picture')} of them, small" if pictures else ""
    print(f"{folder / KEPT}: kept {', '.join(names)}{drawn}")
    return 0


# --- doing it ---------------------------------------------------------------------------------------------------------


def dry_run(plan: Plan, parameters: Mapping[str, Any] | None = None) -> int:
    """Prints every command, and how long it took where it has been run before.

    ``parameters``: of a cluster's jobs, each of which is then shown with what it asks for and waits for.
    """
    queued = [name for name, job in plan.jobs.items() if not job.finished()]
    here = "cuda" if plan.scale == "paper" or gpus() else "cpu"
    together: dict[str, float] = {}
    unknown: list[str] = []
    for name, job in plan.jobs.items():
        table, run_id, _ = plan.origins[name][0]
        if job.finished():
            said = "finished"
        elif run := run_before(table.runs[run_id][plan.scale], plan.place, here):
            device = device_of(run)
            together[device] = together.get(device, 0.0) + run.seconds
            said = f"{duration(run.seconds, device)} ({run.start['device_name']}, {os.path.relpath(run.path)})"
        else:
            said = "time unknown"
            unknown.append(name)
        print(f"# {name}: {said}")
        for number in range(len(plan.origins[name]) if parameters and name in queued else 0):
            after = [*(needed for needed in job.needs if needed in queued), *([name] if number else [])]
            print(f"# {sbatch(job_name(name), parameters or {}, list(map(job_name, after)))}")
        print(*map(told, job.commands), sep="\n")
    parts = [duration(seconds, device) for device, seconds in together.items()]
    parts += [f"{counted(len(unknown), 'run')} of unknown time"] if unknown else []
    print(f"# together: {' and '.join(parts) or 'nothing to do'}; evaluation is not counted")
    return 0


def run_before(setting: Setting, place: Place, device: str) -> Run | None:
    """The fastest finished run of another seed, here or kept: other work can only slow one down. One on such a device
    ("cuda", "cpu") before all others."""
    found, _ = finished_runs(setting, ROOT / place.out, RESULTS)
    known = [run for _, run in found if run.seconds and run.start.get("processes") == 1]
    return min(known, key=lambda run: (device_of(run) != device, run.seconds), default=None)


def device_of(run: Run) -> str:
    return str(run.start.get("device", "")).partition(":")[0]


def duration(seconds: float, device: str) -> str:
    return f"about {seconds / 3600:.2g} GPU-hours" if device == "cuda" else f"about {readable(seconds)} on the CPU"


def job_name(name: str) -> str:
    """A run's name on a cluster."""
    return name.replace("/", "-")


def queue(options: argparse.Namespace, parameters: Mapping[str, Any], todo: Mapping[str, Job], plan: Plan) -> int:
    """Queues every run as a job that calls this tool for that run alone, and so locks, skips and resumes as ever."""
    place = plan.place
    executor = make_executor(ROOT / place.out / "slurm", parameters)
    rest = ["--scale", plan.scale, "--out", str(place.out), "--jobs", "1"]
    rest += ["--tables", str(options.tables.absolute())]
    rest += ["--data", str(place.data), *(f"{name}={path}" for name, path in place.sets.items())]
    ids: dict[str, str] = {}
    for name, job in todo.items():
        for table, run_id, seed in plan.origins[name]:
            command = [str(ROOT / "tools/reproduce.py"), "run", table.name, "--runs", run_id, "--seeds", str(seed)]
            after = [ids[needed] for needed in (*job.needs, name) if needed in ids]
            ids[name] = submit(executor, job_name(name), [sys.executable, *command, *rest], ROOT, after)
            print(f"job {ids[name]}: {name}", flush=True)
    print("queued: status says how far they are")
    return 0


# --- in words ---------------------------------------------------------------------------------------------------------


def told(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["python", *command])


if __name__ == "__main__":
    run_command(main)
