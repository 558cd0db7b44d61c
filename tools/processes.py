"""Runs commands as processes side by side: each with a log that is its lock, and a GPU or a share of the cores.

Or queues them on a SLURM cluster, through submitit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.errors import InputError, unknown
from core.training.command import Stop, missing_extra

POLL = 0.1  # seconds
FINISHED, FAILED, INTERRUPTED, ELSEWHERE, BLOCKED = "finished", "failed", "interrupted", "running elsewhere", "blocked"
_MARK = "== "  # begins our own lines in a log
_END = f"{_MARK}ended: "
Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other and leave one folder.

    Args: its name; the folder; the commands (without the interpreter); whether its results are there; the names of the
    jobs that must be finished before. The log lies beside the folder, and is the lock: its processes hold it open.
    """

    name: str
    folder: Path
    commands: Sequence[Sequence[str]]
    finished: Callable[[], bool]
    needs: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Outcome:
    """How a job went: one of the states above, in a line why, where there is something to say, and how long it took."""

    state: str
    reason: str = ""
    seconds: float | None = field(default=None, compare=False)


def state(job: Job) -> str:
    """What the files say of a job: finished, running, interrupted, failed, or not started."""
    if job.finished():
        return FINISHED
    if not job.log.exists():
        return INTERRUPTED if job.folder.exists() else "not started"
    with open(job.log, "rb") as log:
        if not _lock(log):
            return "running"
    ours = [line for line in last_lines(job.log) if line.startswith(_MARK)]
    return FAILED if ours and ours[-1] == f"{_END}{FAILED}" else INTERRUPTED


def last_lines(file: Path, size: int = 8192) -> list[str]:
    """The lines at the end of a file."""
    with open(file, "rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - size))
        return opened.read().decode(errors="replace").splitlines()


def _lock(log: IO[bytes], tries: int = 1) -> bool:
    for left in reversed(range(tries)):
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05 if left else 0)
    return False


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use; none where there is no driver."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [word for word in done.stdout.split() if word.isdecimal()] if done.returncode == 0 else []


def slots(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """The environment of each process that runs at the same time: its GPU, and its share of the cores.

    One process a GPU, or one on the CPU, unless ``jobs`` says how many: then the GPUs are dealt out in turn.
    """
    count = jobs or len(devices) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    dealt = [{"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if devices else {} for k in range(count)]
    return [{"OMP_NUM_THREADS": threads, **device} for device in dealt]


@contextlib.contextmanager
def _stopping() -> Iterator[Stop]:
    """Ctrl-C, SIGTERM or, but under nohup, a lost terminal asks to stop; a second Ctrl-C interrupts."""
    with Stop().listening() as stop:
        before = signal.getsignal(signal.SIGHUP)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            yield stop
        finally:
            signal.signal(signal.SIGHUP, before)


def run_jobs(
    jobs: Sequence[Job], where: Sequence[Mapping[str, str]], folder: Path, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Runs the jobs, as many at once as there are slots, and returns how each went; a failure stops no other.

    Ctrl-C and SIGTERM are passed on to the processes, which save and leave; the rest is then not started.

    Args: the jobs, in order; the environment of each slot; the folder in which commands run; where lines go.
    Raises: OSError where a log cannot be written.
    """
    with _stopping() as stop:
        pool = _Pool(list(jobs), list(where)[::-1], folder, say, stop)
        told = False
        try:
            while pool.running or (pool.waiting and not stop.requested):
                if stop.requested and not told:
                    told = True
                    pool.end_processes(Process.terminate)
                    say("stopping: the runs save and leave (Ctrl-C again: at once, unsaved)")
                if not stop.requested:
                    pool.start()
                pool.collect()
                if pool.running:
                    time.sleep(POLL)
        except KeyboardInterrupt:
            pool.end_processes(lambda process: os.killpg(process.pid, signal.SIGKILL), wait=True)
            say("killed")
            pool.collect()
        finally:  # where something went wrong: nothing stays behind
            pool.end_processes(Process.terminate, wait=True)
    return pool.outcomes


@dataclass
class _Pool:
    """Jobs that wait, run and have ended."""

    waiting: list[Job]
    free: list[Mapping[str, str]]
    folder: Path
    say: Callable[[str], None]
    stop: Stop
    running: dict[str, tuple[Process, Iterator[Process]]] = field(default_factory=dict)
    """By name of the job: the process of its current command, and the rest of its work."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def start(self) -> None:
        """Starts what can be started."""
        for job in list(self.waiting):
            pending = {*self.running, *(other.name for other in self.waiting)}
            if self.free and pending.isdisjoint(job.needs):
                self.waiting.remove(job)
                self._go_on(job.name, self._follow(job, self.free.pop()))

    def collect(self) -> None:
        """Goes on with the jobs whose processes have ended."""
        for name, (process, work) in list(self.running.items()):
            if process.poll() is not None:
                self._go_on(name, work)

    def end_processes(self, end: Callable[[Process], None], *, wait: bool = False) -> None:
        """Ends what runs. To terminate is to ask to save and leave; a process ends its workers itself."""
        for process, _ in self.running.values():
            if process.poll() is None:
                end(process)
        for process, _ in self.running.values() if wait else ():
            process.wait()

    def _go_on(self, name: str, work: Iterator[Process]) -> None:
        self.running.pop(name, None)
        if (process := next(work, None)) is not None:
            self.running[name] = (process, work)

    def _follow(self, job: Job, slot: Mapping[str, str]) -> Iterator[Process]:
        """A job's work, its outcome noted and told."""
        self.outcomes[job.name] = outcome = yield from self._work(job, slot)
        self.free.append(slot)
        count = len(self.outcomes) + len(self.running) + len(self.waiting)
        took = f" in {readable(outcome.seconds)}" if outcome.seconds is not None else ""
        reason = f": {outcome.reason}" if outcome.reason else ""
        self.say(f"[{len(self.outcomes)}/{count}] {outcome.state}{took}: {job.name}{reason}")

    def _work(self, job: Job, slot: Mapping[str, str]) -> Generator[Process, None, Outcome]:
        """Starts one command after the other: yields the process of each, and goes on when that has ended."""
        for missing in (name for name in job.needs if name in self.outcomes):
            if self.outcomes[missing].state != FINISHED:
                return Outcome(BLOCKED, f"it starts from {missing}: {self.outcomes[missing].state}")
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab", buffering=0) as log:
            if not _lock(log, tries=3):  # who only looks how a job stands has it for an instant
                return Outcome(ELSEWHERE)
            if job.finished():  # elsewhere, meanwhile
                return Outcome(FINISHED)
            on = f" on GPU {slot['CUDA_VISIBLE_DEVICES']}" if "CUDA_VISIBLE_DEVICES" in slot else ""
            self.say(f"started{on}: {job.name}, log {job.log}")
            started, code, rest = time.monotonic(), 0, list(job.commands)
            while rest and code == 0 and not self.stop.requested:
                command = rest.pop(0)
                log.write(f"{_MARK}{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
                process = Process(
                    [sys.executable, *command],
                    cwd=self.folder,
                    env={**os.environ, **slot},
                    stdin=subprocess.DEVNULL,
                    stdout=log,  # with its lock, which thus outlives us where we are killed
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # the terminal's Ctrl-C reaches us alone, who pass it on
                )
                yield process
                code = process.wait()
            state, reason = FINISHED, ""
            if rest or code:
                state, reason = _failure(job, code, self.stop.requested)
            elif not job.finished():
                state, reason = FAILED, f"ended without a result (log {job.log})"
            log.write(f"{_END}{state}\n".encode())
        return Outcome(state, reason, time.monotonic() - started)


def _failure(job: Job, code: int, stopped: bool) -> tuple[str, str]:
    """State and reason of a job whose command left with this exit code, or behind which others were not started."""
    if code in (0, 130) or (stopped and code < 0):
        return INTERRUPTED, ""
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    lines = [line for line in last_lines(job.log) if line.strip()]
    said = lines[-1] if lines and not lines[-1].startswith(_MARK) else ""  # as the commands end: in one line
    return FAILED, f"{how}{', ' + said if said else ''} (log {job.log})"


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


def readable(seconds: float) -> str:
    """``75`` as "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# --- on a cluster -----------------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {"gpus_per_node": 1, "cpus_per_task": 8, "time": 24 * 60, "stderr_to_stdout": True}
"""What each job asks for unless the command line says otherwise: submitit's names of sbatch's options; minutes."""
SETTABLE = (
    "account", "comment", "constraint", "cpus_per_gpu", "cpus_per_task", "exclude", "exclusive", "gpus_per_node",
    "gpus_per_task", "gres", "mail_type", "mail_user", "mem", "mem_per_cpu", "mem_per_gpu", "nodelist", "nodes",
    "ntasks_per_node", "partition", "qos", "signal_delay_s", "stderr_to_stdout", "time", "wckey",
)  # fmt: skip
"""The options that the command line may set; a job's name and what it waits for are the plan's."""


@dataclass
class Resumable:
    """What a job runs: a command that can be stopped with SIGTERM and goes on when it is run again.

    submitit calls ``checkpoint`` ahead of the time limit or when the job is pre-empted, and then queues it anew.
    """

    command: Sequence[str]
    folder: str
    process: Process | None = field(default=None, compare=False)

    def __call__(self) -> None:
        """Raises: RuntimeError where the command fails, so that SLURM sees a failed job."""
        self.process = Process(self.command, cwd=self.folder)
        while self.process.poll() is None:
            time.sleep(0.5)
        if self.process.returncode:
            raise RuntimeError(f"exit code {self.process.returncode}: {' '.join(self.command)}")

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGTERM)
                # Not wait(): this is called from a signal's handler, which may hold that function's lock already.
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Resumable(self.command, self.folder))


def slurm_parameters(options: Sequence[str]) -> dict[str, Any]:
    """What each job asks for: ``KEY=VALUE`` over the defaults. Raises: InputError, offering the nearest key."""
    parameters = dict(DEFAULTS)
    for option in options:
        key, equals, value = option.partition("=")
        if not (equals and key and value):
            raise InputError(f"--slurm {option}: write KEY=VALUE, as partition=gpu or time=1440 (minutes)")
        if key not in SETTABLE:
            raise unknown("key of --slurm", key, SETTABLE)
        parameters[key] = int(value) if value.isdecimal() else value
    return parameters


def sbatch(name: str, parameters: Mapping[str, Any], after: Sequence[str]) -> str:
    """sbatch's command for a job, as one would type it; ``after``: the names of the jobs that must succeed before."""
    flags = {"job_name": name, **dict(sorted(parameters.items()))}
    if after:
        flags["dependency"] = f"afterok:{':'.join(after)}"
    ours = ("stderr_to_stdout", "signal_delay_s")  # submitit's own words
    told = (f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if key not in ours)
    return shlex.join(["sbatch", *told])


def make_executor(folder: Path, parameters: Mapping[str, Any]) -> Any:
    """submitit's executor. Raises: InputError where there is no SLURM or no submitit, or for a wrong value."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise InputError("no SLURM on this machine (no sbatch): leave out --cluster slurm to run here")
    try:
        import submitit
    except ImportError as error:
        raise missing_extra(error, "cluster") from error
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=20)
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, NameError) as error:
        raise InputError(f"--slurm: {str(error).splitlines()[0]}") from error
    return executor


def submit(executor: Any, name: str, command: Sequence[str], root: Path, after: Sequence[str]) -> str:
    """Queues the command, to begin when the jobs ``after`` have succeeded; returns its id. Raises: InputError."""
    executor.update_parameters(job_name=name, dependency=f"afterok:{':'.join(after)}" if after else None)
    try:
        return str(executor.submit(Resumable(list(command), str(root))).job_id)
    except Exception as error:  # submitit has errors of its own, and passes on those of sbatch
        raise InputError(f"SLURM refuses {name}: {str(error).splitlines()[-1]}") from error
