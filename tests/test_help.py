"""``--help`` of every command: it works, and takes hardly longer than torch does to be imported."""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median

import pytest
from documented import ROOT, entry_points

SUBCOMMANDS = {
    "diffusion/tools/train.py": ("progressive", "dit"),
    "tools/reproduce.py": ("list", "show", "run", "status", "keep", "report"),
}
WITHOUT_TORCH = (
    "tools/reproduce.py",
    "tools/compare.py",
    "tools/prepare_data.py",
    "classification/tools/predict.py",
    "offline_kd/tools/predict.py",
)
COMMANDS = [
    [str(script), *more] for script in entry_points() for more in ([], *([s] for s in SUBCOMMANDS.get(str(script), ())))
]


def cpu_seconds(words: list[str]) -> float:
    """Of the processor, not of the wall's clock: others may compute here."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.strip(), f"{words}: {done.stderr}"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def torch_alone() -> float:
    words = ["-c", "import torch; print(torch.__version__)"]
    cpu_seconds(words)
    return median(cpu_seconds(words) for _ in range(5))


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_quick(words: list[str], torch_alone: float) -> None:
    limit = 1.0 if words[0] in WITHOUT_TORCH else 1.3 * torch_alone
    seconds: list[float] = []
    while sum(s < limit for s in seconds) < 3 and len(seconds) < 5:  # three of five below it: so is their median
        seconds.append(cpu_seconds([*words, "--help"]))
    assert sum(s < limit for s in seconds) >= 3, f"{seconds} s of CPU time; torch alone {torch_alone:.2f}"
