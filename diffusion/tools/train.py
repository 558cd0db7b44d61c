"""Trains diffusion models and distils them: `progressive` halves the sampling steps of one (Table 6).

    python diffusion/tools/train.py progressive --config diffusion/recipes/cifar10_progressive.yaml --out runs/x

The same command again resumes where the run stopped. Several processes: `accelerate launch` or `torchrun` before it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.errors import unknown
from core.training.command import missing_extra, run_command

COMMANDS = ("progressive",)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nCommands: {', '.join(COMMANDS)}; each has a --help of its own.")
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)

    from diffusion.progressive.config import parse_command

    config, dry = parse_command(rest, prog=f"train.py {name}")

    try:  # after the command line is read: --help is quick
        import diffusers  # noqa: F401
    except ImportError as error:
        raise missing_extra(error, "diffusion") from error
    from diffusion.progressive.chain import dry_run, train

    return dry_run(config) if dry else train(config)


if __name__ == "__main__":
    run_command(main)
