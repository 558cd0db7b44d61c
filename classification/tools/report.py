"""The page of a run: what the student won and lost against its teacher and other runs, and what networks cost here.

    python classification/tools/report.py runs/dml+adm --out page

Writes `report.html`, one file that needs nothing else, and `summary.json`. Further runs are baselines, such as the same
student trained alone: the page says which confusions were mended since, and which are new. All are evaluated here, on
the same images, as `evaluate.py` does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from classification.config import ONLINE, Task, task_of
from classification.data import DataConfig, DataSets
from classification.distiller import ClassificationDistiller
from classification.evaluation import evaluate
from classification.experiment import Experiment, command_of, images_at, restore
from classification.figures import draw_changes, draw_classes
from classification.findings import MOST_CLASSES, Findings, Measured, as_json
from classification.flops import count
from classification.latency import BATCHES, measure
from classification.methods import Outputs
from classification.outcomes import confusion
from classification.page import as_html
from classification.tools.evaluate import as_report
from classification.tools.visualize import MOST_ROWS, draw_pairs
from core.analysis.calibration import draw_reliability
from core.analysis.curves import draw_curves
from core.errors import InputError
from core.files import make_folder, save_json, write_atomically
from core.training.average import SUFFIX
from core.training.checkpoint import find_checkpoint
from core.training.command import DONE, add_device, device_of, parse, run_command, tool_parser
from core.training.distiller import Batch
from core.training.run import flatten, read_config

COMPARED = 8
"""Images by whose pixels two runs' data sets are compared."""


def main(argv: Sequence[str] | None = None, task: Task = ONLINE, also: Sequence[Task] = ()) -> int:
    """``also``: tasks that baselines may be of. Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    out, device = Path(options.out), device_of(options)
    paths = [Path(run) for run in options.runs]
    tasks = [task, *(_task_of(path, (task, *also)) for path in paths[1:])]
    commands = [command_of(path, of) for path, of in zip(paths, tasks, strict=True)]
    folders = [find_checkpoint(path, options.checkpoint) for path in paths]
    runs: list[Measured] = []
    for path, command, folder, label in zip(paths, commands, folders, labels(paths), strict=True):
        data = parse_options(argv, command.config.data).data
        command = replace(command, config=replace(command.config, data=data))
        first = runs[0].experiment if runs else None
        same = first is not None and first.command.config.data == data
        experiment = restore(command, folder, first.datasets if first is not None and same else None)
        if first is not None:
            check_same(first, experiment, options.split, path)
        runs.append(measured(path, label, experiment, folder, options.split, device))
    if not options.no_latency:
        time_networks(runs[0])
    found = Findings(runs)
    page = as_html(found, draw(found, options))
    make_folder(out, "--out")
    write_atomically(out / "report.html", lambda file: file.write_bytes(page.encode(errors="replace")))
    save_json(as_json(found), out / "summary.json")
    print(f"written to {out}: report.html, summary.json")
    return DONE


def parse_options(argv: Sequence[str] | None, data: DataConfig | None = None) -> Any:
    """The command line; ``data``: the defaults of its data options. Raises: InputError for anything wrong with it."""
    from jsonargparse.typing import PositiveInt

    parser = tool_parser("Writes the page of a run: accuracy, confusions, calibration, cost, maps, curves.")
    add = parser.add_argument
    add("runs", nargs="+", type=str, metavar="RUN", help="the run, and then others to compare its student with")
    add("--out", type=str, default=None, help="folder for report.html and summary.json")
    add("--checkpoint", type=str, default="last", help="of each run: last, best or step-00000123")
    add("--images", type=PositiveInt, default=6, help="whose maps are shown, spread evenly over the split")
    add("--no-latency", "--no_latency", dest="no_latency", action="store_true", help="measure no times")
    add("--split", type=Literal["test", "validation"], default="test", help="which images")
    add_device(parser)
    add("--data", type=DataConfig, default=data or DataConfig())
    options = parse(parser, argv)
    if options.out is None:
        raise InputError("--out is missing: name the folder that the page goes to")
    if (Path(options.out) / "config.yaml").is_file():
        raise InputError(f"--out {options.out} is a run, whose summary.json would be lost: name another folder")
    if options.images > MOST_ROWS:
        raise InputError(f"--images {options.images}: a page shows {MOST_ROWS} at most")
    if twice := [run for run in options.runs if options.runs.count(run) > 1]:
        raise InputError(f"{twice[0]} is named twice: a run is no baseline of itself")
    return options


def labels(paths: Sequence[Path]) -> list[str]:
    """What the page calls each run: its folder's name, or its whole path where names are the same."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _task_of(run: Path, tasks: Sequence[Task]) -> Task:
    """The one of several tasks that a run says it is of, else the first, which says what is wrong."""
    said = task_of(run / "config.yaml") or ONLINE.name
    return next((task for task in tasks if task.name == said), tasks[0])


def check_same(first: Experiment, other: Experiment, split: str, path: Path) -> None:
    """Raises: InputError where two runs were not evaluated on the same images of the same classes."""
    name, theirs = first.command.config.data.name, other.command.config.data.name
    a, b = first.split(split), other.split(split)
    if name != theirs:
        why = f"is of {theirs}, the first run of {name}"
    elif first.datasets.class_names != other.datasets.class_names:
        why = f"has other classes ({len(other.datasets.class_names)}) than the first run ({first.datasets.num_classes})"
    elif len(a) != len(b) or not (a.targets.equal(b.targets) and a.indices.equal(b.indices)):
        why = f"has other images in its {split} split ({len(b):,}) than the first run ({len(a):,})"
    elif a is not b and not _same_pixels(first.datasets, other.datasets, a, b):
        why = f"has other images in its {split} split than the first run"
    else:
        return
    raise InputError(f"{path} {why}: a page compares runs on the same images")


def _same_pixels(first: DataSets, other: DataSets, a: Any, b: Any) -> bool:
    """Whether some images are the same; True where they are seen at different sizes and cannot be compared."""
    chosen = [i * len(a) // COMPARED for i in range(min(COMPARED, len(a)))]
    return first.image_size != other.image_size or torch.equal(images_at(a, chosen), images_at(b, chosen))


def measured(path: Path, label: str, experiment: Experiment, folder: Path, split: str, device: str) -> Measured:
    """Evaluates a run in one pass, and counts what its networks cost."""
    distiller, images = experiment.distiller.to(device).eval(), experiment.split(split)
    said: dict[str, list[Tensor]] = {}

    def watch(outputs: Outputs, batch: Batch) -> None:
        said.setdefault("index", []).append(batch["index"].cpu())
        for role in distiller.scored_roles:  # as Scores takes the first guess
            logits = outputs[role].logits
            said.setdefault(role, []).append(logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0].cpu())

    found = evaluate(distiller, experiment.evaluation_loader(images), watch=watch)
    source = {"run": str(path), "checkpoint": folder.name}
    order = torch.cat(said.pop("index")).argsort()
    predicted = {role: torch.cat(parts)[order] for role, parts in said.items()}
    views = distiller.views(images_at(images, 1).to(device))
    macs = {role: count(lambda role=role: distiller.networks[role](views[role])).macs for role in costed(distiller)}  # type: ignore[misc]
    sizes = {
        role: sum(t.numel() * t.element_size() for t in distiller.networks[role].state_dict().values()) for role in macs
    }
    for name in distiller.moving_averages:  # the same network by other weights
        macs[name], sizes[name] = (of[name.removesuffix(SUFFIX)] for of in (macs, sizes))
    config = flatten(read_config(path / "config.yaml"))
    report = as_report(experiment, split, source, device, found)
    return Measured(path, label, experiment, report, found, predicted, images.targets, config, macs, sizes)


def time_networks(run: Measured) -> None:
    """Fills in ``latency``: of all networks of the run, in turn, on its device."""
    distiller, split = run.experiment.distiller, run.experiment.split(run.report["split"])
    positions = [i % len(split) for i in range(max(BATCHES))]
    images = images_at(split, positions).to(next(distiller.parameters()).device)
    views = distiller.views(images)
    run.latency = measure({role: distiller.networks[role] for role in costed(distiller)}, views)


def costed(distiller: ClassificationDistiller) -> list[str]:
    """The roles whose networks cost something of their own: not the averages'."""
    return [role for role in distiller.configs if role in distiller.networks]


def draw(found: Findings, options: Any) -> dict[str, dict[str, bytes]]:
    """The page's pictures as PNG, by section and caption."""
    drawn: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.png"
        counts = [found.counts[found.split][c] for c in found.shown]
        colors = {name: network.color for name, network in found.networks.items()}
        accuracies = {name: found.accuracies(name) for name in found.networks}
        draw_classes([found.names[c] for c in found.shown], counts, accuracies, colors, file)
        drawn["classes"] = {"Right answers by class; n: images of the class that were evaluated": file.read_bytes()}
        drawn["confusions"] = {}
        for one in found.compared if found.classes <= MOST_CLASSES else ():
            tables = [
                confusion(network.run.predicted[network.role], found.target, found.classes)
                for network in (found.networks[found.role], found.networks[one.theirs])
            ]
            draw_changes(tables[0] - tables[1], found.names, file)
            caption = f"Images of each class taken for another: the {found.role} less the {one.theirs}"
            drawn["confusions"][caption] = file.read_bytes()
        drawn["calibration"] = {}
        for start in range(0, len(found.networks), 2):
            two = list(found.networks.items())[start : start + 2]
            draw_reliability({name: of.run.evaluation.calibrations[of.role] for name, of in two}, file)
            caption = f"Accuracy (above) and share of the images (below) by confidence: {', '.join(n for n, _ in two)}"
            drawn["calibration"][caption] = file.read_bytes()
        drawn["curves"] = {}
        for run in found.runs:
            if run.metrics:
                draw_curves(run.metrics, file)
                drawn["curves"][f"Curves of {run.label}"] = file.read_bytes()
        file.unlink(missing_ok=True)
        draw_pairs(found.main.experiment, options, None, Path(folder), "")
        about = (
            f"{min(options.images, len(found.target))} images of the {found.split} split; below, each column's scale"
        )
        drawn["maps"] = {
            f"{picture.stem.replace('-', ' ').capitalize()}: {about}": picture.read_bytes()
            for picture in sorted(Path(folder).glob("maps*.png"))
        }
    return drawn


if __name__ == "__main__":
    run_command(main)
