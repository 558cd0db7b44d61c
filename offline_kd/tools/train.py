"""Trains a student with a fixed, pre-trained teacher on one data set, with one offline method.

    python offline_kd/tools/train.py --config offline_kd/recipes/cifar100.yaml --networks.teacher.weights runs/teacher \
        --method kd+adm --out runs/kd+adm

The same command again resumes where the run stopped. Several processes: `accelerate launch` or `torchrun` for `python`.
"""

from __future__ import annotations

from functools import partial

from classification.tools import train
from core.training.command import run_command
from offline_kd.config import OFFLINE

main = partial(train.main, task=OFFLINE)

if __name__ == "__main__":
    run_command(main)
