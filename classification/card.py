"""The model card of an exported network: README.md in the form of the Hugging Face hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from classification.config import Command
from classification.data import DataConfig
from classification.experiment import Experiment
from classification.export import Export, description
from core.files import plain
from core.training.run import read_json

LICENCE = "license:  # to fill in before it is published: an identifier, as apache-2.0 or cc-by-nc-4.0\n"
SEEN = ("augmentation", "auto_augment", "color_jitter", "re_prob", "re_mode", "mixup", "cutmix", "mixup_prob")
"""What of the data's options says how training saw an image."""
MOST_CLASSES = 50  # that are listed one by one


def model_card(
    export: Export, experiment: Experiment, report: Mapping[str, Any], run: Path | None, command: Command | None
) -> str:
    """README.md of an export: a header that the hub reads, use, classes, data, method, teacher, figures, origin.

    Args: the export; the evaluated experiment; what was written as its evaluation; the run folder and the command that
        trained it, None of a weight file alone.
    """
    about, images = description(export, experiment), report["images"]
    name = experiment.distiller.configs[export.role].name
    title = f"{name}, {export.role}" + (f" of {command.config.method}" if command else "")
    note = experiment.distiller.method.export_note
    size = " x ".join(map(str, about["input_size"]))
    parts = [
        f"# {title}",
        f"An image classifier of {len(about['class_names'])} classes, for images {size} "
        f"(mean {about['mean']}, std {about['std']} of RGB in [0, 1]).",
        *([f"Note: {note}."] if note else []),
        "## Use",
        *_use(export),
        "## Classes",
        _classes(about["class_names"]),
        "## Data",
        _data(experiment),
        *(["## Method", _method(command)] if command else []),
        *_teachers(export, report),
        "## Figures",
        f"On {images:,} images ({report['split']}):",
        _figures(report),
        "## Origin",
        _origin(report, run),
    ]
    return f"---\n{LICENCE}{_header(export, experiment, report, title)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _header(export: Export, experiment: Experiment, report: Mapping[str, Any], title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = Path(experiment.command.config.data.name).name
    kinds = {"accuracy": "top1", "top_5_accuracy": "top5"}
    results = [
        EvalResult(
            task_type="image-classification", dataset_type=data, dataset_name=data, dataset_split=report["split"],
            metric_type=kind, metric_value=round(report["values"][f"{export.role}/{score}"] / 100, 6),
        )
        for kind, score in kinds.items()
        if f"{export.role}/{score}" in report["values"]
    ]  # fmt: skip
    header = ModelCardData(
        library_name=next((name for name in ("timm", "transformers") if name in export.formats), "pytorch"),
        pipeline_tag="image-classification",
        tags=["image-classification", "knowledge-distillation", *sorted(export.formats)],
        model_name=title,
        eval_results=results or None,
    )
    return header.to_yaml().strip()


def _use(export: Export) -> list[str]:
    takes = "RGB in [0, 1]" if export.inside else "RGB in [0, 1], less the mean, by the std"
    lines = {
        "timm": 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # takes a PIL image",
        "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        f'(logits,) = session.run(["logits"], {{"{export.input_name}": images}})  # float32 [batch, C, H, W], {takes}',
        "torch": 'import torch\n\nmodel = torch.export.load("FOLDER/model.pt2").module()\n'
        f"logits = model(images)  # float32 [batch, C, H, W], {takes}",
        "transformers": "from transformers import pipeline\n\n"
        'classify = pipeline("image-classification", "FOLDER")  # takes a PIL image, or a path',
    }
    return [f"```python\n{lines[format]}\n```" for format in export.formats]


def _classes(names: list[str]) -> str:
    if len(names) > MOST_CLASSES:
        return f"{len(names)}, from {names[0]} to {names[-1]}; the files name them all."
    return ", ".join(f"{number}: {name}" for number, name in enumerate(names))


def _data(experiment: Experiment) -> str:
    config, sets = experiment.command.config.data, experiment.datasets
    root = f" ({Path(config.root).resolve().name})" if config.name in ("folder", "imagenet") else ""
    held_out = f", {len(sets.validation):,} held out for validation" if sets.validation is not None else ""
    noise = f" {config.noise:.0%} of the training labels were drawn at random." if config.noise else ""
    return f"{config.name}{root}: {len(sets.train):,} training images{held_out}, {len(sets.test):,} test images.{noise}"


def _method(command: Command) -> str:
    import yaml

    config, (name, with_adm) = command.config, command.method
    networks = {
        role: {"name": c.name, "pretrained": c.pretrained, "weights": c.weights and Path(c.weights).name}
        for role, c in config.networks.items()
    }
    said: dict[str, Any] = {"method": config.method, "networks": networks}
    if options := asdict(command.options):
        said[name] = options
    if with_adm:
        said["adm"] = asdict(config.adm)
    fit: dict[str, Any] = {key: getattr(config.fit, key) for key in ("epochs", "steps", "precision")}
    fit |= {key: value for key in ("clip", "ema_decay", "patience") if (value := getattr(config.fit, key)) is not None}
    usual = DataConfig()
    changed = {key: value for key in SEEN if (value := getattr(config.data, key)) != getattr(usual, key)}
    said |= {"augmentation": changed} if changed else {}
    said |= {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    said |= {"optimizer": asdict(config.optimizer), "schedule": asdict(config.schedule), "fit": fit}
    said |= {"batch_size": config.batch_size, "seed": config.seed}
    return f"```yaml\n{yaml.safe_dump(plain(said), sort_keys=False).strip()}\n```"


def _teachers(export: Export, report: Mapping[str, Any]) -> list[str]:
    networks = report["networks"]
    others = [role for role in networks if role.startswith("teacher") and role != export.role]
    lines = [f"- {role}: {networks[role]['name']}, {networks[role]['parameters']:,} parameters" for role in others]
    return ["## Teacher", "\n".join(lines)] if lines else []


def _figures(report: Mapping[str, Any]) -> str:
    """A table of all that was evaluated; Wilson's 95 % interval tells what so few test images leave open."""
    from scipy.stats import binomtest

    values, images = report["values"], report["images"]
    rows = ["| role | top-1 % | 95 % interval (Wilson) | top-5 % | NLL nats | ECE % |", "|---|---|---|---|---|---|"]
    for role in [key.removesuffix("/top1") for key in values if key.endswith("/top1")]:
        top1, top5, nll, ece = (values[f"{role}/{score}"] for score in ("top1", "top5", "nll", "ece"))
        low, high = binomtest(round(top1 / 100 * images), images).proportion_ci(method="wilson")
        rows.append(
            f"| {role} | {top1:.2f} | {100 * low:.2f} to {100 * high:.2f} | {top5:.2f} | {nll:.4f} | {ece:.2f} |"
        )
    return "\n".join(rows)


def _origin(report: Mapping[str, Any], run: Path | None) -> str:
    exported = report["environment"]
    rows = [("exported", exported)]
    if run is not None and (run / "environment.json").is_file():
        starts = read_json(run / "environment.json").get("starts") or [{}]
        rows.insert(0, ("trained", starts[-1]))
    lines = []
    for what, said in rows:
        changed = ", with uncommitted changes" if said.get("uncommitted_changes") else ""
        lines.append(f"- {what} at commit {said.get('commit') or 'unknown'}{changed}:")
        lines.append(f"  `{shlex.join(said.get('command', []))}`")
    return "\n".join([*lines, f"- of {report.get('checkpoint', report.get('weights'))}"])
