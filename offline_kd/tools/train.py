"""Trains a student with a fixed, pre-trained teacher on one data set, with one offline method.

    python offline_kd/tools/train.py --config offline_kd/recipes/cifar100.yaml --networks.teacher.weights runs/teacher \
        --method kd+adm --out runs/kd+adm

The same command again resumes where the run stopped. Several processes: `accelerate launch` or `torchrun` for `python`.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.training.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    from classification.config import parse_command
    from offline_kd.config import OFFLINE

    command = parse_command(argv, task=OFFLINE)

    from classification.training import train  # after the command line is read: --help is quick

    return train(command)


if __name__ == "__main__":
    run_command(main)
