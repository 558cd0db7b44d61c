"""Top-1, top-5, negative log-likelihood and calibration error of each network of a run, or of one weight file.

    python classification/tools/evaluate.py runs/dml+adm --checkpoint best
    python classification/tools/evaluate.py --weights resnet20.pth --network cifar_resnet20 --data.name cifar10

`--export FOLDER --format timm,onnx,torch` writes a network as others open it, with a model card: timm's config.json and
model.safetensors, model.onnx, model.pt2; of networks of transformers also that library's folder. ONNX and .pt2 take
`pixel_values`, float [batch, 3, H, W], normalised, at the evaluated size, any number of them; by `--with-preprocessing`
it is `image`, RGB in [0, 1]. Out: `logits`, [batch, K].
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from classification.card import model_card
from classification.config import ONLINE, Command, Task, TrainConfig
from classification.data import DataConfig
from classification.distiller import NetworkConfig
from classification.evaluation import Evaluation, evaluate
from classification.experiment import Experiment, build, command_of, restore
from classification.export import FORMATS, Export, check, check_folder, parse_formats, write
from classification.methods.base import MethodOptions
from classification.networks.pretrained import normalisation_of
from core.analysis.attention import KEYS
from core.errors import InputError
from core.training.checkpoint import find_checkpoint
from core.training.command import DONE, add_device, align, device_of, parse, run_command, tool_parser
from core.training.run import environment, save_signed_json
from core.weights import read_metadata


def main(argv: Sequence[str] | None = None, task: Task = ONLINE) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    run = Path(options.run) if options.run is not None else None
    source: dict[str, Any]
    trained_by: Command | None = None
    if run is not None:
        trained_by, folder = command_of(run, task), find_checkpoint(run, options.checkpoint)
        options = parse_options(argv, trained_by.config.data)
        command = replace(trained_by, config=replace(trained_by.config, data=options.data))
        experiment = restore(command, folder)
        source = {"run": str(run), "checkpoint": folder.name}
    else:
        experiment = build(weights_command(options), check=False)
        source = {"weights": options.weights or f"timm's {options.network}"}
    export = export_of(options, list(experiment.distiller.normalisation))
    if export is not None:
        check(export, experiment)
    device = device_of(options)
    experiment.distiller.to(device)
    report = evaluate_split(experiment, options.split, source, device)
    print(table(report))
    out = options.out or (run / f"evaluation-{options.checkpoint}-{options.split}.json" if run is not None else None)
    if out is not None:
        save_signed_json(report, Path(out))
        print(f"written to {out}")
    if export is not None:
        card = model_card(export, experiment, report, run, trained_by)
        for format, difference in write(export, experiment, options.split, card).items():
            print(f"{format}: {FORMATS[format]}, reopened: logits differ by {difference:.1g} of the largest")
        print(f"{export.role} exported to {export.folder}; fill in the licence in its README.md")
    return DONE


def export_of(options: Any, roles: Sequence[str]) -> Export | None:
    """What the command line asks for, of the student unless a role is named; None where nothing is exported."""
    if options.export is None:
        return None
    role = options.export_role or next((r for r in roles if r.startswith("student")), roles[0])
    return Export(Path(options.export).resolve(), parse_formats(options.format), role, options.with_preprocessing)


def parse_options(argv: Sequence[str] | None, data: DataConfig | None = None) -> Any:
    """The command line; ``data``: the defaults of its data options. Raises: InputError for anything wrong with it."""
    about = "Evaluates each network of a run, or one weight file, on a split: accuracy, likelihood, calibration."
    parser = tool_parser(about)
    add = parser.add_argument
    add("run", nargs="?", type=str, help="run folder; data set, networks and method come from its config.yaml")
    add("--checkpoint", type=str, default="last", help="of the run: last, best or step-00000123")
    add(
        "--weights",
        type=str,
        default=None,
        help="instead of a run, one weight file (.safetensors, published .pth), or FILE#KEY",
    )
    add(
        "--network",
        type=str,
        default=None,
        help="its network, as cifar_resnet20, a timm name, torchvision/NAME; our files say it",
    )
    add("--pretrained", type=bool, default=False, help="instead of a file, the own weights of --network")
    add("--mean", type=float, nargs="+", default=None, help="per channel, of images in [0, 1] (see --std)")
    add("--std", type=float, nargs="+", default=None, help="likewise; the file's, timm's, the data set's unless given")
    add("--split", type=Literal["test", "validation"], default="test", help="which images")
    add_device(parser)
    add("--out", type=str, default=None, help="JSON file; for a run evaluation-<checkpoint>-<split>.json in its folder")
    add(
        "--export", type=str, default=None, help="write a network, with a model card, to this new folder (see --format)"
    )
    add("--format", type=str, default=None, help="of the export: some of timm,onnx,torch,transformers, as timm,onnx")
    add(
        "--export_role",
        type=str,
        default=None,
        help="which network, or its average as student_ema; the student unless given",
    )
    about = "ONNX and .pt2 normalise by themselves: they take RGB in [0, 1]"
    add("--with-preprocessing", "--with_preprocessing", dest="with_preprocessing", action="store_true", help=about)
    add("--data", type=DataConfig, default=data or DataConfig())
    if any(word.partition("=")[0] == "--export_file" for word in (sys.argv[1:] if argv is None else argv)):
        raise InputError("--export_file is no more: --export FOLDER --format onnx writes FOLDER/model.onnx")
    options = parse(parser, argv)
    if sum((options.run is not None, options.weights is not None, options.pretrained)) != 1:
        raise InputError("give one of a run folder, --weights FILE, and --network NAME --pretrained true")
    if options.run is not None and any((options.network, options.mean, options.std)):
        raise InputError("--network, --mean and --std belong to --weights: a run's networks are known")
    if options.run is None and options.checkpoint != "last":
        raise InputError("--checkpoint belongs to a run folder: --weights names a file")
    if options.export is None and (options.export_role or options.format or options.with_preprocessing):
        raise InputError("--format, --export_role and --with-preprocessing count only with --export FOLDER")
    if options.export is not None:
        if not options.format:
            folder = "FOLDER" if options.export in FORMATS else options.export  # as --export onnx once was
            kinds = options.export if options.export in FORMATS else ",".join(FORMATS)
            raise InputError(f"--export names a folder, --format what goes there: --export {folder} --format {kinds}")
        check_folder(Path(options.export).resolve())
        parse_formats(options.format)
    return options


def weights_command(options: Any) -> Command:
    """A weight file as a command of one network. What is not given comes from the file's metadata, then from timm."""
    file = options.weights
    said = read_metadata(file) if file is not None and not Path(file).is_dir() else {}
    if note := said.get("export_note", said.get("caveat")):  # the latter in files of earlier versions
        warnings.warn(f"{file}: {note}", stacklevel=2)
    name = options.network or said.get("architecture")
    if name is None:
        raise InputError(f"{file or '--pretrained'} does not say of which network: name it by --network")
    if "mean" not in said:
        said |= normalisation_of(name)
    mean = tuple(options.mean) if options.mean else said.get("mean")
    std = tuple(options.std) if options.std else said.get("std")
    network = NetworkConfig(name, file, options.pretrained, mean=mean, std=std)
    networks = {said.get("role", "student"): network}
    return Command(TrainConfig(options.data, networks, "vanilla"), MethodOptions())


def evaluate_split(experiment: Experiment, split: str, source: dict[str, Any], device: str) -> dict[str, Any]:
    """One pass in float32; returns what is written as JSON."""
    found = evaluate(experiment.distiller, experiment.evaluation_loader(experiment.split(split)))
    return as_report(experiment, split, source, device, found)


def as_report(
    experiment: Experiment, split: str, source: dict[str, Any], device: str, found: Evaluation
) -> dict[str, Any]:
    """What is written as JSON of an evaluation of a split."""
    distiller = experiment.distiller
    networks = {}
    for role, (mean, std) in distiller.normalisation.items():
        parameters = sum(p.numel() for p in distiller.network(role).parameters())
        name = distiller.configs[role].name
        networks[role] = {"name": name, "parameters": parameters, "mean": list(mean), "std": list(std)}
        if (size := distiller.configs[role].size) is not None:
            networks[role]["size"] = size
    return {
        **source,
        "data": asdict(experiment.command.config.data),
        "split": split,
        "images": len(experiment.split(split)),
        "networks": networks,
        "values": found.values,
        "environment": environment(device),
    }


def table(report: dict[str, Any]) -> str:
    """A report as text."""
    values = report["values"]
    what = f"{report['run']} at {report['checkpoint']}" if "run" in report else report["weights"]
    rows = [["role", "network", "parameters", "top-1 %", "top-5 %", "NLL nats", "ECE %"]]
    for role in [key.removesuffix("/top1") for key in values if key.endswith("/top1")]:
        network = report["networks"].get(role)  # none of a role that a method adds
        top1, top5, nll, ece = (values[f"{role}/{score}"] for score in ("top1", "top5", "nll", "ece"))
        scores = [f"{top1:.2f}", f"{top5:.2f}", f"{nll:.4f}", f"{ece:.2f}"]
        parameters = f"{network['parameters']:,}" if network else "-"
        rows.append([role, network["name"] if network else "-", parameters, *scores])
    lines = [f"{what}: {report['data']['name']}, {report['split']}, {report['images']:,} images", *align(rows)]
    if KEYS[0] in values:
        numbers = [f"{values[key]:.4f}" for key in KEYS]
        heads = ["attention", "minimum", "maximum", "variance"]
        lines += align([heads, ["consensus", *numbers[:3]], ["divergence", *numbers[3:6]]])
        lines.append(f"mean similarity S: {numbers[6]}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
