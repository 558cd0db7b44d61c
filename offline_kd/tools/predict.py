"""The class of each image of a folder, by the student (or teacher) of a run; as CSV or JSON.

    python offline_kd/tools/predict.py runs/kd+adm images/ --out predictions.csv

Options as in `classification/tools/predict.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from classification.tools import predict
from core.training.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = predict.parse_options(argv)
    from offline_kd.config import OFFLINE

    return predict.run(options, OFFLINE)


if __name__ == "__main__":
    run_command(main)
