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

from core.errors import unknown
from core.training.command import run_command
from diffusion.files import need_packages

COMMANDS = ("progressive", "dit")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nCommands: {', '.join(COMMANDS)}; each has a --help of its own.")
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    return (_dit if name == "dit" else _progressive)(rest, f"train.py {name}")


def _progressive(argv: Sequence[str], prog: str) -> int:
    from diffusion.progressive.config import parse_command

    config, dry_run = parse_command(argv, prog)
    need_packages("diffusers")
    from diffusion.progressive.chain import look, train

    return look(config, dry_run) if dry_run else train(config)


def _dit(argv: Sequence[str], prog: str) -> int:
    from diffusion.dit.config import parse_command

    config, dry_run = parse_command(argv, prog)
    need_packages("diffusers")
    from diffusion.dit.training import look, train

    return look(config, dry_run) if dry_run else train(config)


if __name__ == "__main__":
    run_command(main)
