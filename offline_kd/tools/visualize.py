"""Figures of a run: what both networks look at (Figure 1), attention over training (Table 17), calibration (Figure 10).

    python offline_kd/tools/visualize.py runs/kd+adm

Options and files as in `classification/tools/visualize.py`.
"""

from __future__ import annotations

from functools import partial

from classification.tools import visualize
from core.training.command import run_command
from offline_kd.config import OFFLINE

main = partial(visualize.main, task=OFFLINE)

if __name__ == "__main__":
    run_command(main)
