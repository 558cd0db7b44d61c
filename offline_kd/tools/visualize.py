"""Figures of a run: what both networks look at (Figure 1), attention over training (Table 17), calibration (Figure 10).

    python offline_kd/tools/visualize.py runs/kd+adm

Options and files as in `classification/tools/visualize.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from classification.tools import visualize
from core.training.command import run_command
from offline_kd.config import OFFLINE


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    return visualize.main(argv, OFFLINE)


if __name__ == "__main__":
    run_command(main)
