"""Trains a teacher and a student for dense prediction together, with one method of the paper.

    python segmentation/tools/train.py segmentation/configs/deeplabv3_camvid.py --method dml+adm --out runs/x

The same command again resumes where the run stopped. Several processes: `torchrun --nproc_per_node 4` for `python`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.errors import InputError
from core.training.command import LineParser, add_dry_run, dry_run_wanted, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("config", help="mmengine config, as those in segmentation/configs")
    add("--method", help="vanilla, dml, kdcl, switokd or kd (with model.teacher_weights), each also as dml+adm")
    add("--seed", type=int, help="of initial weights, data order, augmentation and dropout")
    add("--data-root", help="folder of the data set, for Cityscapes with leftImg8bit/ and gtFine/ in it")
    add("--amp", choices=("bf16", "fp16"), help="mixed precision, on a GPU")
    add("--out", "--work-dir", dest="out", help="run folder; runs/<config>/<method>-<seed> unless given")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the config, mmengine's way")
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), help="torchrun is recognised unless given")
    add("--local-rank", "--local_rank", type=int, help="what older launchers pass; not needed")
    add_dry_run(add)
    options = parser.parse_args(argv)
    dry = dry_run_wanted(options.dry_run, options.time)

    from segmentation.config import parse_options  # after the command line is read: --help is quick
    from segmentation.training import train

    changes: dict[str, Any] = parse_options(options.cfg_options)
    for key, value in (("model.method", options.method), ("seed", options.seed), ("data_root", options.data_root)):
        if value is not None and changes.setdefault(key, value) != value:
            raise InputError(f"{key} is given twice, as {changes[key]!r} and as {value!r}: leave one")
    return train(options.config, changes, amp=options.amp, out=options.out, launcher=options.launcher, dry=dry)


if __name__ == "__main__":
    run_command(main)
