"""Top-1, top-5, negative log-likelihood and calibration error of the teacher and the student of a run.

    python offline_kd/tools/evaluate.py runs/kd+adm --checkpoint best

Options and export as in `classification/tools/evaluate.py`.
"""

from __future__ import annotations

from functools import partial

from classification.tools import evaluate
from core.training.command import run_command
from offline_kd.config import OFFLINE

main = partial(evaluate.main, task=OFFLINE)

if __name__ == "__main__":
    run_command(main)
