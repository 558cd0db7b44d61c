"""Trains teacher and student together on one data set, with one method of the paper.

    python classification/tools/train.py --config classification/recipes/cifar100.yaml --method dml+adm \
        --out runs/dml+adm

The same command again resumes where the run stopped. Several processes: `accelerate launch` or `torchrun` for `python`.
"""

from __future__ import annotations

from collections.abc import Sequence

from classification.config import ONLINE, Task, parse_command
from core.training.command import run_command


def main(argv: Sequence[str] | None = None, task: Task = ONLINE) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    command = parse_command(argv, task=task)

    from classification.training import train  # after the command line is read: --help is quick

    return train(command)


if __name__ == "__main__":
    run_command(main)
