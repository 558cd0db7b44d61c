"""A table of the paper as processes: what is run, skipped, resumed and reported, on machines, GPUs and a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from written import write_chain, write_run

from core.errors import InputError
from core.training import command as shell
from core.training.run import signed
from tools import plan, processes, reproduce
from tools.paper import PAPER, load_tables
from tools.processes import SETTABLE, Job, Outcome, run_jobs, state
from tools.runs import kept_name, read_run, seeds_of

ROOT = Path(__file__).resolve().parents[2]
TABLE = """
table: 1
title: Handwritten digits
task: classification
metric: {name: top-1, unit: "%"}
notes: None of it is in the paper.
needs: {proxy: data/nowhere for the run photos}
bases:
  small:
    recipe: classification/recipes/cifar100.yaml
    overrides: {data.root: data, data.download: true}
    proxy:
      recipe: classification/recipes/digits.yaml
      overrides:
        data.classes: 3
        data.per_class: 8
        data.image_size: 8
        batch_size: 12
        fit.log_every: 1
        fit.trackers: []
        schedule.milestones: []
        networks.student.name: cifar_resnet8
runs:
  vanilla: {base: small, method: vanilla, proxy: {overrides: {fit.epochs: 1, networks.teacher.name: cifar_resnet8}}}
  shake:
    base: small
    method: shake
    all_scales: {networks.teacher.weights: "{run:vanilla}"}
    proxy: {overrides: {fit.epochs: 1}}
  long: {base: small, method: vanilla, proxy: {overrides: {fit.epochs: 50, fit.evaluate_every: 1000}}}
  wrong: {base: small, method: vanilla, proxy: {overrides: {fit.epochs: 1, fit.precision: fp8}}}
  photos: {base: small, method: dml, proxy: {overrides: {data.name: folder, data.root: data/nowhere, fit.epochs: 1}}}
columns: [Vanilla, SHAKE]
rows:
  - name: Student
    read: last.student/top1
    cells:
      - {column: Vanilla, paper: 71.5, run: vanilla}
      - {column: SHAKE, paper: 72, label: (+0.5), run: shake}
  - name: Teacher
    read: last.teacher/top1
    cells:
      - {column: Vanilla, paper: null, run: vanilla}
      - {column: SHAKE, paper: null, run: null, why: the teacher is not trained}
  - name: Long
    read: last.student/top1
    cells: [{column: Vanilla, paper: null, run: long}]
  - name: Wrong
    read: last.student/top1
    cells: [{column: Vanilla, paper: null, run: wrong}]
  - name: Photos
    read: last.student/top1
    cells: [{column: Vanilla, paper: null, run: photos}]
"""
FIGURE = """
figure: 5
title: Its maps
task: classification
metric: {name: picture}
runs:
  same: {same_as: table01/vanilla, after: ["classification/tools/visualize.py {run} --images 2"]}
columns: [Maps]
rows: [{name: Vanilla, cells: [{column: Maps, paper: null, run: same, show: figures/maps.png}]}]
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "table01.yaml").write_text(TABLE)
    (folder / "figure05.yaml").write_text(FIGURE)
    return folder


@pytest.fixture
def command(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the tool in this process; returns what it prints."""

    def run(name: str, *words: str, code: int = 0) -> str:
        out = [] if name == "list" or "--out" in words else ["--out", str(tmp_path / "runs")]
        assert reproduce.main([name, *words, "--tables", str(tables), *out]) == code
        return capsys.readouterr().out

    return run


def commands_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("python ")]


# --- processes: any jobs ----------------------------------------------------------------------------------------------

DONE = "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(exist_ok=True); (f / 'done').touch()"
SAVES_ON_SIGTERM = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
if (folder / "saved").exists():
    (folder / "done").touch()
    sys.exit()
def stop(*_):
    (folder / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: (folder / "interrupted twice").touch())
(folder / "began").touch()
time.sleep(60)
"""


def make_job(folder: Path, name: str, *codes: str, needs: Sequence[str] = ()) -> Job:
    """A job whose commands are these programs, each called with the job's folder; ``done`` in there is its result."""
    out = folder / name
    commands = []
    for number, code in enumerate(codes):
        script = folder / f"{name}.{number}.py"
        script.write_text(code)
        commands.append([str(script), str(out)])
    return Job(name, out, commands, (out / "done").exists, tuple(needs))


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def quiet(line: str) -> None:
    pass


def test_a_failure_stops_no_other_and_is_named_with_its_last_line_and_log(tmp_path: Path) -> None:
    jobs = [
        make_job(tmp_path, "bad", "import sys; print('error: no such network', file=sys.stderr); sys.exit(2)"),
        make_job(tmp_path, "empty", "print('nothing to see')"),
        make_job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
        make_job(tmp_path, "after bad", DONE, needs=["bad"]),
        make_job(tmp_path, "good", DONE),
    ]
    said: list[str] = []
    outcomes = run_jobs(jobs, [{}], tmp_path, said.append)
    assert {name: o.state for name, o in outcomes.items()} == {
        "bad": "failed", "empty": "failed", "killed": "failed", "after bad": "blocked", "good": "finished",
    }  # fmt: skip
    assert outcomes["bad"].reason == f"exit code 2, error: no such network (log {tmp_path}/bad.log)"
    assert "SIGKILL" in outcomes["killed"].reason and "without a result" in outcomes["empty"].reason
    assert outcomes["after bad"].reason == "it starts from bad: failed"
    assert [state(job) for job in jobs] == ["failed", "failed", "failed", "not started", "finished"]
    assert said[-1].startswith("[5/5] finished in 0 s: good")


def test_commands_of_a_job_run_in_turn_and_stop_where_one_fails(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, "both", DONE, "import sys; print('second of', sys.argv[1])")]
    jobs += [make_job(tmp_path, "first fails", "raise SystemExit(1)", DONE)]
    outcomes = run_jobs(jobs, [{}], tmp_path, quiet)
    assert [o.state for o in outcomes.values()] == ["finished", "failed"]
    assert f"second of {tmp_path}/both" in jobs[0].log.read_text()
    assert not jobs[1].folder.exists()


def test_jobs_wait_for_what_they_start_from_and_share_the_places(tmp_path: Path) -> None:
    log = "import os, sys, time; open(sys.argv[1] + '.txt', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n' + "
    log += "str(time.time())); time.sleep(0.3); open(sys.argv[1] + '.end', 'w').write(str(time.time()));" + DONE
    jobs = [
        make_job(tmp_path, "second", log, needs=["first"]),
        make_job(tmp_path, "first", log),
        make_job(tmp_path, "other", log),
    ]
    outcomes = run_jobs(jobs, [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "7"}], tmp_path, quiet)
    assert all(o.state == "finished" for o in outcomes.values())
    began = {job.name: (tmp_path / f"{job.name}.txt").read_text().split() for job in jobs}
    ended = {job.name: float((tmp_path / f"{job.name}.end").read_text()) for job in jobs}
    assert {began["first"][0], began["other"][0]} == {"3", "7"}
    assert float(began["second"][1]) > ended["first"] > float(began["other"][1])  # one waited, the other did not


def test_a_finished_job_is_not_run_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, "once", DONE, "import sys; open(sys.argv[1] + '.count', 'a').write('x')")
    for _ in range(2):
        assert run_jobs([job], [{}], tmp_path, quiet) == {"once": Outcome("finished")}
    assert (tmp_path / "once.count").read_text() == "x"


DRIVER = """
import pathlib, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, whose children ignore it
sys.path.insert(0, {root!r})
from tools.processes import Job, run_jobs
folder = pathlib.Path(sys.argv[1])
jobs = [
    Job(name, folder / name, [[str(folder / f"{{name}}.0.py"), str(folder / name)]], (folder / name / "done").exists)
    for name in sys.argv[2:]
]
for name, outcome in run_jobs(jobs, [{{}}], folder, print).items():
    print("outcome", name, outcome.state)
"""


def start_driver(folder: Path, *names: str) -> subprocess.Popen[str]:
    """Another process that runs these jobs, in a process group of its own like a shell's."""
    code = DRIVER.format(root=str(ROOT))
    words = [sys.executable, "-c", code, str(folder), *names]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_processes_save_once_and_the_next_call_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    jobs = [make_job(tmp_path, name, SAVES_ON_SIGTERM) for name in ("one", "two")]
    driver = start_driver(tmp_path, "one", "two")
    wait_for((tmp_path / "one/began").exists)
    os.killpg(driver.pid, number)  # as a terminal does: to all of the group
    out, _ = driver.communicate(timeout=60)
    assert out.splitlines()[-1] == "outcome one interrupted" and "stopping" in out
    assert (tmp_path / "one/saved").exists() and not (tmp_path / "one/interrupted twice").exists()
    assert [state(job) for job in jobs] == ["interrupted", "not started"]
    (tmp_path / "two").mkdir()
    (tmp_path / "two/saved").touch()
    assert [o.state for o in run_jobs(jobs, [{}], tmp_path, quiet).values()] == ["finished", "finished"]


def test_the_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    stubborn = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    job = make_job(tmp_path, "one", f"{stubborn}pathlib.Path(sys.argv[1]).mkdir()\ntime.sleep(60)")
    driver = start_driver(tmp_path, "one")
    wait_for(job.folder.exists)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=30)
    assert out.splitlines()[-1] == "outcome one interrupted" and state(job) == "interrupted"


def test_no_job_runs_twice_at_once_even_where_the_tool_was_killed(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, "one", SAVES_ON_SIGTERM + "(folder / 'done').touch()"), make_job(tmp_path, "two", DONE)]
    driver = start_driver(tmp_path, "one")
    wait_for((tmp_path / "one/began").exists)
    for _ in range(2):
        outcomes = run_jobs(jobs, [{}], tmp_path, quiet)
        assert {name: o.state for name, o in outcomes.items()} == {"one": "running elsewhere", "two": "finished"}
        assert state(jobs[0]) == "running"
        driver.kill()  # for the second turn: its child lives on, and holds the lock
        driver.communicate(timeout=30)
    child = next(
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and str(jobs[0].log.with_suffix("")) in line_of(p)
    )
    os.kill(child, signal.SIGTERM)
    wait_for((tmp_path / "one/saved").exists)
    wait_for(lambda: state(jobs[0]) == "interrupted")
    assert run_jobs(jobs[:1], [{}], tmp_path, quiet)["one"].state == "finished"


def line_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_places_are_gpus_or_shares_of_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert processes.slots(None, []) == [{"OMP_NUM_THREADS": "8"}]
    assert processes.slots(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    on_gpus = processes.slots(None, ["0", "5"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in on_gpus] == ["0", "5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in processes.slots(3, ["0", "5"])] == ["0", "5", "0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert processes.slots(2, []) == [{"OMP_NUM_THREADS": "1"}] * 2

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert processes.gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program(tmp_path / "nvidia-smi", "echo 0; echo 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert processes.gpus() == ["0", "1"]
    for nothing in ("echo no driver; exit 9", "echo No devices were found"):
        program(tmp_path / "nvidia-smi", nothing)
        assert processes.gpus() == []


def program(file: Path, text: str) -> None:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


# --- tables, rows, runs -----------------------------------------------------------------------------------------------


def test_list_and_show_say_what_there_is(command: Callable[..., str]) -> None:
    assert command("list").splitlines() == [
        "table01   classification   5 runs  Handwritten digits",
        "figure05  classification    1 run  Its maps",
    ]
    text = command("show", "1")
    for words in (
        "None of it is in the paper.",
        "Student  71.5     72 (+0.5)",
        "not run: Teacher, SHAKE: the teacher",
    ):
        assert words.lower() in text.lower()
    assert "vanilla: not started" in text and "Needs: data/nowhere" in text
    assert sum("--method shake" in line for line in text.splitlines()) == 1
    assert "cifar100.yaml" in command("show", "table01", "--scale", "paper")


def test_what_is_named_is_run_once_and_behind_what_it_starts_from(command: Callable[..., str], tmp_path: Path) -> None:
    def runs(*words: str) -> list[str]:
        text = command("run", *words, "--dry-run")
        return [line.partition(":")[0].removeprefix("# ") for line in text.splitlines() if line.startswith("# table")]

    assert runs("1", "--columns", "SHAKE") == ["table01/proxy/vanilla-0", "table01/proxy/shake-0"]
    assert runs("1", "--rows", "Teach*") == ["table01/proxy/vanilla-0"]
    assert runs("1", "--rows", "Teacher", "Long", "--seeds", "3", "4", "3") == [
        f"table01/proxy/{name}-{seed}" for seed in (3, 4) for name in ("vanilla", "long")
    ]
    assert runs("1", "--runs", "shake", "wrong", "--scale", "paper")[-2:] == [
        "table01/paper/shake-0",
        "table01/paper/wrong-0",
    ]
    shake = commands_in(command("run", "1", "--runs", "shake", "--seeds", "7", "--dry-run"))[1]
    assert f"--networks.teacher.weights {tmp_path}/runs/table01/proxy/vanilla-7" in shake and "--seed 7" in shake
    # a run of two tables is one, with what both ask for
    both = commands_in(command("run", "table01", "figure05", "--runs", "vanilla", "same", "--dry-run"))
    assert [line.split()[1] for line in both] == ["classification/tools/train.py", "classification/tools/visualize.py"]


def test_data_lie_where_the_command_line_says(command: Callable[..., str], tmp_path: Path) -> None:
    def root(*data: str, scale: str = "proxy") -> str:
        words = ["--data", *data] if data else []
        text = command("run", "1", "--runs", "photos", "--scale", scale, *words, "--dry-run")
        words = commands_in(text)[0].split()
        return words[words.index("--data.root") + 1]

    here = tmp_path / "here"
    assert root() == "data/nowhere"
    assert root(str(here)) == f"{here}/nowhere"
    assert root(str(here), scale="paper") == str(here)
    assert root(str(here), f"nowhere={tmp_path}") == str(tmp_path)
    text = command("run", "1", "--runs", "photos", "--out", "data/mine", "--data", str(here), "--dry-run")
    assert "--out data/mine/table01" in text  # what is written is no data set
    with pytest.raises(InputError, match="no run here reads data/elsewhere"):
        root(f"elsewhere={here}")
    with pytest.raises(InputError, match="reads data/nowhere, which is not there"):
        command("run", "1", "--runs", "photos")
    with pytest.raises(InputError, match=f"reads {here}/nowhere"):
        command("run", "1", "--data", str(here))  # before anything is started
    assert not (tmp_path / "runs").exists()


def test_commands_do_not_depend_on_the_folder_one_is_in(
    command: Callable[..., str], tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "1", "--runs", "photos", "--tables", str(tables), "--dry-run", "--out", "mine", "--data", "sets"]
    reproduce.main(words)
    (line,) = commands_in(capsys.readouterr().out)
    assert f"--out {tmp_path}/mine/table01/proxy/photos-0" in line and f"--data.root {tmp_path}/sets/nowhere" in line
    monkeypatch.chdir(ROOT)
    reproduce.main(words)
    assert "--out mine/table01" in capsys.readouterr().out


FINISHED = '{"status": "finished", "last": {"student/top1": 50.0, "teacher/top1": 60.0}}'


def test_a_run_counts_as_finished_only_with_its_scores_and_pictures(tables: Path, tmp_path: Path) -> None:
    known = load_tables(tables)
    place = plan.make_place(str(tmp_path))
    plain = plan.make_job(known["table01"], "vanilla", "proxy", 0, place)
    drawn = plan.make_job(known["figure05"], "same", "proxy", 0, place)
    assert plain.folder == drawn.folder == tmp_path / "table01/proxy/vanilla-0"
    plain.folder.mkdir(parents=True)
    (plain.folder / "config.yaml").write_text(signed("method: vanilla\n"))
    for text, ends in (
        ('{"status": "interrup', False),
        (FINISHED.replace("finished", "interrupted"), False),
        ('{"status": "finished", "last": null}', False),
        (FINISHED, True),
    ):
        (plain.folder / "summary.json").write_text(text)
        assert plain.finished() is ends and not drawn.finished()
    (plain.folder / "figures").mkdir()
    (plain.folder / "figures/maps.png").touch()
    assert drawn.finished()


def test_wrong_input_is_one_line(tables: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/table01.yaml").write_text("table: [")
    for words, said in (
        ([], "COMMAND"),
        (["run"], "TABLE"),
        (["run", "2"], "no table 2"),
        (["run", "tabel01"], "did you mean table01?"),
        (["run", "1", "--rows", "student"], "did you mean 'Student'?"),
        (["run", "1", "--runs", "dml"], "there are 'vanilla'"),
        (["run", "1", "--row", "Student"], "--row"),
        (["run", "1", "--seeds", "one"], "'one'"),
        (["run", "1", "--jobs", "0"], "'0'"),
        (["run", "1", "--data", "=x"], "NAME=FOLDER"),
        (["run", "1", "--scale", "small"], "small"),
        (["run", "1", "--slurm", "time=3"], "--cluster slurm"),
        (["run", "1", "--cluster", "slurm", "--jobs", "2"], "--jobs"),
        (["run", "1", "--rows", "Teacher", "--columns", "SHAKE"], "nothing to run"),
        (["show", "3"], "no table 3"),
        (["status", "3"], "no table 3"),
        (["list", "--tables", str(tmp_path / "broken")], "no YAML"),
        (["status", "--out", str(tmp_path), "--seeds", "1"], "--seeds"),
    ):
        tables_of = [] if not words or "--tables" in words else ["--tables", str(tables)]
        done = as_a_shell_sees_it([*words, *tables_of])
        assert (done[0], done[1]) == (2, ""), words
        assert said in done[2] and done[2].startswith("error: ") and done[2].count("\n") == 1, (words, done[2])


def test_a_place_that_cannot_be_written_is_one_line(command: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/file"):
        command("run", "1", "--runs", "vanilla", "--out", str(tmp_path / "file"))


def test_status_counts_what_is_there(command: Callable[..., str], tmp_path: Path) -> None:
    assert command("status") == f"nothing run yet in {tmp_path}/runs\n"
    for name, text in (("vanilla-0", FINISHED), ("vanilla-12", '{"status": "interrupted"}')):
        folder = tmp_path / "runs/table01/proxy" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(signed("method: vanilla\n"))
        (folder / "summary.json").write_text(text)
    (tmp_path / "runs/table01/proxy/wrong-1.log").write_text("== a command\nerror: no\n== ended: failed\n")
    assert command("status", "1").splitlines() == [
        "table01 paper: 5 runs a seed; nothing run yet",
        *(f"  not started  table01/paper/{name}-0" for name in ("vanilla", "shake", "long", "wrong", "photos")),
        "table01 proxy: 5 runs a seed; 1 failed, 1 finished, 1 interrupted",
        "  finished     table01/proxy/vanilla-0",
        "  interrupted  table01/proxy/vanilla-12",
        "  not started  table01/proxy/shake-0",
        "  not started  table01/proxy/long-0",
        "  not started  table01/proxy/wrong-0",
        "  failed       table01/proxy/wrong-1",
        "  not started  table01/proxy/photos-0",
    ]
    with (tmp_path / "runs/table01/proxy/wrong-1.log").open("a") as log:
        log.write("== the command again, killed\n")
    assert "interrupted  table01/proxy/wrong-1" in command("status", "table01")


def as_a_shell_sees_it(words: Sequence[str]) -> tuple[int, str, str]:
    """As a shell sees it, but in this process: exit code, stdout, stderr."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            shell.run_command(lambda: reproduce.main(list(words)))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_every_table_of_the_paper_can_be_planned_at_both_scales(capsys: pytest.CaptureFixture[str]) -> None:
    tables = load_tables(PAPER)
    for scale in ("paper", "proxy"):
        names = [n for n, table in tables.items() if any(scale in settings for settings in table.runs.values())]
        assert reproduce.main(["run", *names, "--scale", scale, "--dry-run"]) == 0
        lines = [line.split()[1] for line in commands_in(capsys.readouterr().out)]
        assert len(lines) > 100 and all((ROOT / script).is_file() for script in lines)


# --- keeping runs -----------------------------------------------------------------------------------------------------


def test_a_kept_run_is_read_as_its_folder_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"runs/dml-{seed}", seed, [40.0, 60.0 + seed]) for seed in (1, 0)]
    runs.append(write_run(tmp_path / "runs/table01/proxy/vgg-0", 0, [50.0]))
    chain = write_chain(tmp_path / "runs/chain-0", 0, "pd", {4: 3.0, 1: 8.0})
    results = ["--to", "mine", "--results", str(tmp_path / "results")]
    assert reproduce.main(["keep", str(runs[0]), *results]) == 0
    assert reproduce.main(["keep", *map(str, [*runs[1:], chain]), *results]) == 0
    assert capsys.readouterr().out.endswith("runs.jsonl: kept dml-0, table01/proxy/vgg-0, chain-0\n")
    lines = (tmp_path / "results/mine/runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines] == ["chain-0", "dml-0", "dml-1", "table01/proxy/vgg-0"]
    for folder in [*runs, chain]:
        before, after = read_run(folder), read_run(tmp_path / "results/mine" / kept_name(folder))
        assert (after.config, after.seed, after.last, after.evaluations) == (
            before.config, before.seed, before.last, before.evaluations,
        )  # fmt: skip
        assert after.finished and "student/ce" not in json.dumps(after.files)  # training losses are not kept
    assert seeds_of(tmp_path / "results/mine/dml") == {s: tmp_path / f"results/mine/dml-{s}" for s in (0, 1)}
    assert list(seeds_of(tmp_path / "results/mine/table01/proxy/vgg")) == [0]
    assert read_run(tmp_path / "results/mine/chain-0").number("evaluation-inception.distance", {"steps": 1}) == 8.0


def test_what_cannot_be_kept_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/dml-0", 0, [40.0])
    stopped = write_run(tmp_path / "runs/dml-1", 1, [40.0], status="interrupted")
    results = ["--to", "mine", "--results", str(tmp_path / "results")]
    assert reproduce.main(["keep", str(run), *results]) == 0
    file = tmp_path / "results/mine/runs.jsonl"
    before = file.read_text()
    for words, said in (
        ([str(run)], "keeps a run dml-0 already"),
        ([str(tmp_path / "runs"), "--partial"], "keeps a run dml-0 already"),
        ([str(stopped)], "--partial"),
        ([str(tmp_path / "nowhere")], "no run folder"),
    ):
        with pytest.raises(InputError, match=said):
            reproduce.main(["keep", *words, *results])
        assert file.read_text() == before
    assert reproduce.main(["keep", str(stopped), "--partial", *results]) == 0
    assert len(file.read_text().splitlines()) == 2
    file.write_text(before + "{half a li")
    with pytest.raises(InputError, match="line 2, is no kept run"):
        read_run(tmp_path / "results/mine/dml-0")


# --- how long ---------------------------------------------------------------------------------------------------------


def test_durations_are_those_of_the_same_run_with_another_seed(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(reproduce, "gpus", list)

    def write(seed: int, seconds: float, device: str) -> None:
        folder = tmp_path / f"runs/table01/proxy/vanilla-{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(signed("method: vanilla\n"))
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds": seconds}))
        start = {"device": device, "device_name": f"some {device}", "processes": 1}
        (folder / "environment.json").write_text(json.dumps({"starts": [start]}))

    def said() -> list[str]:
        lines = command("run", "1", "--runs", "vanilla", "--dry-run").splitlines()
        return [line for line in lines if line.startswith("#")]

    assert said()[0] == "# table01/proxy/vanilla-0: time unknown"
    write(7, 7200.0, "cuda:0")
    assert said()[0].startswith("# table01/proxy/vanilla-0: about 2 GPU-hours (some cuda:0, ")
    write(8, 95.0, "cpu")  # as here
    write(9, 75.0, "cpu")  # other work can only slow a run down
    first, last = said()
    assert "about 1 min 15 s on the CPU (some cpu, " in first and first.endswith("vanilla-9)")
    assert last == "# together: about 1 min 15 s on the CPU; evaluation is not counted"


def test_durations_are_readable() -> None:
    assert [processes.readable(s) for s in (7.4, 59.6, 75, 3599.7, 7300)] == [
        "7 s", "1 min 0 s", "1 min 15 s", "1 h 0 min", "2 h 1 min",
    ]  # fmt: skip


# --- a cluster --------------------------------------------------------------------------------------------------------


def test_no_slurm_and_no_submitit_are_one_line_each(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no SLURM on this machine"):
        command("run", "1", "--runs", "vanilla", "--cluster", "slurm")
    for name in ("sbatch", "srun"):
        program(tmp_path / name, "exit 1")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[cluster\]'"):
        command("run", "1", "--runs", "vanilla", "--cluster", "slurm")
    assert not (tmp_path / "runs/table01").exists()


def test_a_dry_run_shows_what_a_clusters_jobs_ask_and_wait_for(command: Callable[..., str], tmp_path: Path) -> None:
    slurm = ("run", "1", "--runs", "shake", "--dry-run", "--cluster", "slurm", "--slurm", "partition=x", "time=90")
    text = command(*slurm)  # without SLURM, without submitit
    asked = "--cpus-per-task=8 --gpus-per-node=1 --partition=x --time=90"
    assert [line.removeprefix("# ") for line in text.splitlines() if "sbatch" in line] == [
        f"sbatch --job-name=table01-proxy-vanilla-0 {asked}",
        f"sbatch --job-name=table01-proxy-shake-0 {asked} --dependency=afterok:table01-proxy-vanilla-0",
    ]
    assert "sbatch" not in command(*slurm[:5]) and not (tmp_path / "runs").exists()
    write_run(tmp_path / "runs/table01/proxy/vanilla-0", 0, [60.0])  # finished: nothing waits for it
    (line,) = (line for line in command(*slurm).splitlines() if "sbatch" in line)
    assert "shake-0" in line and "dependency" not in line
    for wrong, said in (
        ("partitionn=x", "unknown key of --slurm 'partitionn': did you mean 'partition'?"),
        ("dependency=1", "unknown key of --slurm 'dependency'"),
        ("partition", "write KEY=VALUE"),
        ("time=", "write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            command(*slurm[:-2], wrong)


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_every_key_of_slurm_is_one_of_submitits() -> None:
    from submitit.slurm.slurm import _get_default_parameters

    assert set(SETTABLE) <= _get_default_parameters().keys()


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_jobs_of_a_cluster_call_this_tool_for_one_run_each(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = f"n=$(($(cat {tmp_path}/n 2>/dev/null || echo 100)+1)); echo $n > {tmp_path}/n; cp $1 {tmp_path}/$n.sh"
    program(tmp_path / "sbatch", f"{counting}; echo Submitted batch job $n")
    program(tmp_path / "srun", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(InputError, match="--slurm"):
        command("run", "1", "--runs", "shake", "--cluster", "slurm", "--slurm", "partitionn=x")
    text = command("run", "1", "--runs", "shake", "--cluster", "slurm", "--slurm", "partition=x", "time=90")
    assert "job 101: table01/proxy/vanilla-0" in text and "job 102: table01/proxy/shake-0" in text
    first, second = ((tmp_path / f"{n}.sh").read_text() for n in (101, 102))
    assert "--partition=x" in first and "--time=90" in first and "--gpus-per-node=1" in first
    assert "--dependency=afterok:101" in second and "--dependency" not in first

    # what the node would do: submitit reads the job and calls it, and that is this tool for the run alone
    (pickled,) = (tmp_path / "runs/slurm").glob("101_submitted.pkl")
    from submitit.core.utils import DelayedSubmission

    job = DelayedSubmission.load(pickled).function
    words = list(job.command)
    assert words[1].endswith("tools/reproduce.py")
    planned = subprocess.run([*words, "--dry-run"], cwd=job.folder, capture_output=True, text=True)
    assert [line.split()[1] for line in commands_in(planned.stdout)] == ["classification/tools/train.py"], (
        planned.stderr
    )
    assert f"{tmp_path}/runs/table01/proxy/vanilla-0" in planned.stdout


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_a_pre_empted_job_saves_and_is_queued_again(tmp_path: Path) -> None:
    import threading

    from tools.processes import Resumable

    (tmp_path / "code.py").write_text(SAVES_ON_SIGTERM)
    job = Resumable([sys.executable, str(tmp_path / "code.py"), str(tmp_path / "run")], str(tmp_path))
    again: list[Any] = []

    def preempt(*_: Any) -> None:  # submitit calls checkpoint in a signal's handler
        again.append(job.checkpoint())

    before = signal.signal(signal.SIGUSR2, preempt)
    try:
        threading.Thread(
            target=lambda: (wait_for((tmp_path / "run/began").exists), os.kill(os.getpid(), signal.SIGUSR2))
        ).start()
        with pytest.raises(RuntimeError, match="exit code 130"):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "run/saved").exists() and again[0].function == job
    again[0].result()
    assert (tmp_path / "run/done").exists()


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_of_digits_is_interrupted_resumed_and_its_failure_named(tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = [sys.executable, "tools/reproduce.py", "run", "1", "--tables", str(tables), "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    both = [*words, "--runs", "wrong", "long", "--jobs", "2"]
    first = subprocess.Popen(both, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    run, lines = out / "table01/proxy/long-0", out / "table01/proxy/long-0/metrics.jsonl"
    wait_for(lambda: lines.exists() and lines.read_text().count("\n") > 2, 300)
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate(timeout=300)
    assert first.returncode == 130 and "the same command goes on from here" in errors, said + errors
    stopped = json.loads((run / "summary.json").read_text())
    assert stopped["status"] == "interrupted" and 2 < stopped["step"] < 100
    assert (run / "checkpoints/last/state.pt").exists()

    second = subprocess.run(both, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert second.returncode == 1 and "1 failed, 1 finished" in second.stdout, second.stdout + second.stderr
    assert f"log {out}/table01/proxy/wrong-0.log" in second.stderr and "fp8" in second.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["step"] == 100
    steps = [line["step"] for line in map(json.loads, lines.read_text().splitlines()) if line["kind"] == "train"]
    assert steps == list(range(1, 101))  # it went on, and did not start anew

    status = subprocess.run(
        [*words[:2], "status", "1", "--tables", str(tables), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        "finished     table01/proxy/long-0" in status.stdout and "failed       table01/proxy/wrong-0" in status.stdout
    )


@pytest.mark.parametrize("words", [["--help"], ["list"], ["run", "--help"], ["run", "1", "--dry-run"], ["status"]])
def test_the_tool_needs_no_torch_and_answers_at_once(words: list[str]) -> None:
    heavy = "print(sorted(set(sys.modules) & {'torch', 'numpy', 'matplotlib', 'submitit'}))"
    code = f"import sys\nfrom tools.reproduce import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n{heavy}"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    if "--dry-run" not in words:  # which reads all that is kept
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "tools/reproduce.py", *words], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not by the wall's clock: others may compute here
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_usage_in_the_docstring_is_real(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line.split()[2:] for line in textwrap.dedent(reproduce.__doc__ or "").splitlines() if "reproduce.py" in line
    ]
    assert len(lines) == 6
    for words in lines:
        if words[0] == "run":
            assert reproduce.main([*words, "--dry-run"]) == 0
        elif words[0] not in ("report", "keep"):
            assert reproduce.main(words) == 0
