"""Trains diffusion models and distils them.

    python diffusion/tools/train.py progressive --config diffusion/recipes/cifar10_progressive.yaml --out runs/pd+adm
    python diffusion/tools/train.py dit --config diffusion/recipes/dit_imagenet.yaml --teacher runs/b2 --out runs/dit

`progressive` halves the sampling steps of one (Table 6), `dit` distils a diffusion transformer into a smaller one
(Table 7). The same command again resumes where the run stopped. Several processes: `accelerate launch` or `torchrun`
for `python`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from core.errors import unknown
from core.training.command import run_command
from diffusion.files import need_packages
from diffusion.training import parse_config

COMMANDS = {"progressive": ("ProgressiveConfig", "chain"), "dit": ("DiTTrainingConfig", "training")}
"""The config of each, and where its training stands: loaded once the command line is read, so that --help is quick."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nCommands: {', '.join(COMMANDS)}; each has a --help of its own.")
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    kind, module = COMMANDS[name]
    configs = import_module(f"diffusion.{name}.config")
    config, dry_run = parse_config(getattr(configs, kind), rest, f"train.py {name}")
    need_packages("diffusers")
    training = import_module(f"diffusion.{name}.{module}")
    return training.look(config, dry_run) if dry_run else training.train(config)


if __name__ == "__main__":
    run_command(main)
