"""The page of a run: what the student won and lost against its teacher and other runs, and what networks cost here.

    python offline_kd/tools/report.py runs/kd+adm --out page

Options and files as in `classification/tools/report.py`; further runs may be of classification, as a student alone is.
"""

from __future__ import annotations

from functools import partial

from classification.config import ONLINE
from classification.tools import report
from core.training.command import run_command
from offline_kd.config import OFFLINE

main = partial(report.main, task=OFFLINE, also=(ONLINE,))

if __name__ == "__main__":
    run_command(main)
