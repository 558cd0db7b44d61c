"""Runs commands as processes side by side: each with a log that is its lock, and a GPU or a share of the cores."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from core.training.command import Stop

POLL = 0.1  # seconds
FINISHED, FAILED, INTERRUPTED, ELSEWHERE, BLOCKED = "finished", "failed", "interrupted", "running elsewhere", "blocked"
_MARK = "== "  # begins our own lines in a log
_END = f"{_MARK}ended: "


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
    """How a job went: one of the states above, and in a line why, where there is something to say."""

    state: str
    reason: str = ""


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
    if shutil.which("nvidia-smi") is None:
        return []
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
    shared = {"OMP_NUM_THREADS": threads}
    return [
        {**shared, "CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if devices else dict(shared) for k in range(count)
    ]


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


class _Running:
    """A job's process, one after the other of its commands. ``log``: open and locked."""

    def __init__(self, job: Job, slot: Mapping[str, str], log: IO[bytes], folder: Path) -> None:
        self.job, self.slot, self.log, self.folder = job, slot, log, folder
        self.rest = list(job.commands)
        self.started = time.monotonic()
        self.next()

    def next(self) -> None:
        """Starts the next command. In a session of its own: the terminal's Ctrl-C reaches us alone, who pass it on."""
        command = self.rest.pop(0)
        self.write(f"{_MARK}{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env={**os.environ, **self.slot},
            stdin=subprocess.DEVNULL,
            stdout=self.log,  # with its lock, which thus outlives us where we are killed
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def write(self, line: str) -> None:
        self.log.write(f"{line}\n".encode())
        self.log.flush()

    def stop(self, *, hard: bool) -> None:
        if self.process.poll() is None:
            if hard:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:  # the process alone: it ends its workers itself
                self.process.terminate()


def run_jobs(
    jobs: Sequence[Job], where: Sequence[Mapping[str, str]], folder: Path, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Runs the jobs, as many at once as there are slots, and returns how each went; a failure stops no other.

    Ctrl-C and SIGTERM are passed on to the processes, which save and leave; the rest is then not started.

    Args: the jobs, in order; the environment of each slot; the folder in which commands run; where lines go.
    Raises: OSError where a log cannot be written.
    """
    pool = _Pool(jobs, where, folder, say)
    told = False
    with _stopping() as stop:
        try:
            while pool.running or (pool.waiting and not stop.requested):
                if stop.requested and not told:
                    told = True
                    pool.stop(hard=False)
                    say("stopping: the runs save and leave (Ctrl-C again: at once, unsaved)")
                if not stop.requested:
                    pool.start()
                pool.collect(stopping=stop.requested)
                if pool.running:
                    time.sleep(POLL)
        except KeyboardInterrupt:
            pool.stop(hard=True, wait=True)
            say("killed")
            pool.collect(stopping=True)
        finally:  # where something went wrong: nothing stays behind
            pool.stop(hard=False, wait=True)
    return pool.outcomes


class _Pool:
    """Jobs that wait, run and have ended."""

    def __init__(
        self, jobs: Sequence[Job], where: Sequence[Mapping[str, str]], folder: Path, say: Callable[[str], None]
    ) -> None:
        self.waiting, self.free, self.folder, self.say = list(jobs), list(where)[::-1], folder, say
        self.count = len(jobs)
        self.running: list[_Running] = []
        self.outcomes: dict[str, Outcome] = {}

    def start(self) -> None:
        """Starts what can be started."""
        for job in list(self.waiting):
            if not self.free:
                return
            ended = [self.outcomes[name].state for name in job.needs if name in self.outcomes]
            if any(other.name in job.needs for other in self.waiting) or self._runs(job.needs):
                continue
            self.waiting.remove(job)
            if any(word != FINISHED for word in ended):
                missing = next(name for name in job.needs if self.outcomes[name].state != FINISHED)
                self._end(job, Outcome(BLOCKED, f"it starts from {missing}: {self.outcomes[missing].state}"))
                continue
            log = _open(job)
            if log is None:
                self._end(job, Outcome(ELSEWHERE))
            elif job.finished():  # elsewhere, meanwhile
                log.close()
                self._end(job, Outcome(FINISHED))
            else:
                slot = self.free.pop()
                on = f" on GPU {slot['CUDA_VISIBLE_DEVICES']}" if "CUDA_VISIBLE_DEVICES" in slot else ""
                self.say(f"started{on}: {job.name}, log {job.log}")
                self.running.append(_Running(job, slot, log, self.folder))

    def stop(self, *, hard: bool, wait: bool = False) -> None:
        """Asks what runs to save and leave; ``hard``: ends it at once."""
        for one in self.running:
            one.stop(hard=hard)
        for one in self.running if wait else ():
            one.process.wait()

    def collect(self, *, stopping: bool) -> None:
        """Takes in the processes that have ended, and starts the next commands of their jobs."""
        for one in list(self.running):
            code = one.process.poll()
            if code == 0 and one.rest and not stopping:
                one.next()
            elif code is not None:
                outcome = _outcome(one, code, stopping)
                one.write(f"{_END}{outcome.state}")
                one.log.close()
                self.running.remove(one)
                self.free.append(one.slot)
                self._end(one.job, outcome, time.monotonic() - one.started)

    def _runs(self, names: Sequence[str]) -> bool:
        return any(one.job.name in names for one in self.running)

    def _end(self, job: Job, outcome: Outcome, duration: float | None = None) -> None:
        self.outcomes[job.name] = outcome
        took = f" in {readable(duration)}" if duration is not None else ""
        reason = f": {outcome.reason}" if outcome.reason else ""
        self.say(f"[{len(self.outcomes)}/{self.count}] {outcome.state}{took}: {job.name}{reason}")


def _open(job: Job) -> IO[bytes] | None:
    """The job's log with its lock, None where another process has it."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = open(job.log, "ab")  # noqa: SIM115  (it stays open as long as the job runs)
    if _lock(log, tries=3):  # who only looks how a job stands has it for an instant
        return log
    log.close()
    return None


def _outcome(one: _Running, code: int, stopped: bool) -> Outcome:
    if code == 0 and not one.rest:
        if one.job.finished():
            return Outcome(FINISHED)
        return Outcome(FAILED, f"ended without a result (log {one.job.log})")
    if code in (0, 130) or (stopped and code < 0):
        return Outcome(INTERRUPTED)
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    lines = [line for line in last_lines(one.job.log) if line.strip()]
    said = lines[-1] if lines and not lines[-1].startswith(_MARK) else ""  # as the commands end: in one line
    return Outcome(FAILED, f"{how}{', ' + said if said else ''} (log {one.job.log})")


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
