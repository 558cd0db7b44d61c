"""Jobs of `reproduce.py` on a SLURM cluster, through submitit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.training.command import missing_extra

DEFAULTS: dict[str, Any] = {"gpus_per_node": 1, "cpus_per_task": 8, "time": 24 * 60, "stderr_to_stdout": True}
"""What each job asks for unless the command line says otherwise: submitit's names of sbatch's options; minutes."""


@dataclass
class Resumable:
    """What a job runs: a command that can be stopped with SIGTERM and goes on when it is run again.

    submitit calls ``checkpoint`` ahead of the time limit or when the job is pre-empted, and then queues it anew.
    """

    command: Sequence[str]
    folder: str
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False)

    def __call__(self) -> None:
        """Raises: RuntimeError where the command fails, so that SLURM sees a failed job."""
        self.process = subprocess.Popen(self.command, cwd=self.folder)
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


def make_executor(folder: Path, options: Sequence[str]) -> Any:
    """submitit's executor. Raises: InputError where there is no SLURM or no submitit, or for an unknown option."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise InputError("no SLURM on this machine (no sbatch): leave out --cluster slurm to run here")
    try:
        import submitit
    except ImportError as error:
        raise missing_extra(error, "cluster") from error
    parameters = dict(DEFAULTS)
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--slurm {option}: write KEY=VALUE, as partition=gpu or time=1440 (minutes)")
        parameters[key] = int(value) if value.isdecimal() else value
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=20)
        executor.update_parameters(**parameters)
    except (ValueError, TypeError, NameError) as error:
        raise InputError(f"--slurm: {str(error).splitlines()[0]}") from error
    return executor


def submit(executor: Any, name: str, command: Sequence[str], root: Path, after: Sequence[str]) -> str:
    """Queues the command, to begin when the jobs ``after`` have succeeded; returns its id. Raises: InputError."""
    extra: Mapping[str, Any] = {"dependency": f"afterok:{':'.join(after)}"} if after else {"dependency": None}
    executor.update_parameters(job_name=name, **extra)
    try:
        return str(executor.submit(Resumable(list(command), str(root))).job_id)
    except Exception as error:  # submitit has errors of its own, and passes on those of sbatch
        raise InputError(f"SLURM refuses {name}: {str(error).splitlines()[-1]}") from error
