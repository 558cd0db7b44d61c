"""mIoU, pixel accuracy and IoU of each class, for both networks of a run or for one network.

    python segmentation/tools/evaluate.py runs/x --checkpoint best
    python segmentation/tools/evaluate.py --config runs/x/student_config.py --checkpoint runs/x/student.pth

Prints a table and writes JSON. `--export FOLDER` writes the network as plain mmsegmentation takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import save_json
from core.training.command import DONE, LineParser, run_command
from core.training.run import environment


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", nargs="?", help="run folder")
    add("--config", help="instead of a run, a config: of a pair, or mmseg's own of one network")
    add("--checkpoint", help="of the run: last (unless given), best or iter_400; with --config a file")
    add("--role", choices=("teacher", "student"), help="this network alone")
    add("--data-root", help="folder of the data set, if not where the config says")
    add("--out", help="JSON file; for a run evaluation-<checkpoint>.json in its folder")
    add("--export", metavar="FOLDER", help="write --role's network (the student unless given) there, with its config")
    options = parser.parse_args(argv)
    if (options.run is None) == (options.config is None):
        raise InputError("give a run folder, or --config and --checkpoint")
    if options.config is not None and options.checkpoint is None:
        raise InputError("--config needs --checkpoint FILE")

    from segmentation.evaluation import evaluate, table  # after the command line is read: --help is quick
    from segmentation.experiment import export_network, restore

    found = restore(options.run, options.config, options.checkpoint, options.role, options.data_root)
    roles = list(found.networks)
    values = evaluate(found.model, found.loader, [{"type": "NetworkIoU", "role": role} for role in roles])
    report: dict[str, Any] = {
        "run": options.run,
        "config": options.config,
        "checkpoint": str(found.checkpoint),
        "images": len(found.loader.dataset),
        "networks": {r: {"parameters": sum(p.numel() for p in n.parameters())} for r, n in found.networks.items()},
        "values": values,
        "environment": environment(found.device),
    }
    print(f"{found.checkpoint}: {report['images']:,} images")
    print(table(values))
    out = options.out
    if out is None and options.run is not None:
        alone = f"-{options.role}" if options.role else ""
        out = Path(options.run) / f"evaluation-{found.checkpoint.stem}{alone}.json"
    if out is not None:
        save_json(report, out)
        print(f"written to {out}")
    if options.export is not None:
        role = options.role or "student"
        if role not in found.networks:
            raise InputError(f"there is no {role} to export: name one of {', '.join(roles)} by --role")
        export_network(found.cfg, found.networks[role], role, found.loader.dataset.metainfo, Path(options.export))
        print(f"exported to {options.export}: {role}.pth, {role}.safetensors, {role}_config.py")
    return DONE


if __name__ == "__main__":
    run_command(main)
