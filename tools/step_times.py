"""How long a run will take, from step times that are kept: of finished runs and of `benchmark.py`. Needs no torch."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.document import numbered
from tools.processes import readable

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built

TRAINING_IMAGES = {
    "digits": (1438, 10),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "imagenet": (1281167, 1000),
}
"""Training images and classes of each data set that a recipe names."""

SIZES = {"cifar10": 32, "cifar100": 32}
"""Their image size where no recipe says it; 224 otherwise."""

BENCHMARKS: dict[str, tuple[str, str, str, str, str, str]] = {
    "step_resnet32x4_8x4": ("classification", "cifar_resnet32x4", "cifar_resnet8x4", "dml+adm", "dml", "fp32"),
    "step_resnet32x4_8x4_bf16": ("classification", "cifar_resnet32x4", "cifar_resnet8x4", "dml+adm", "dml", "bf16"),
    "step_resnet34_18": ("classification", "resnet34", "resnet18", "dml+adm", "dml", "fp32"),
    "step_resnet34_18_bf16": ("classification", "resnet34", "resnet18", "dml+adm", "dml", "bf16"),
    "offline_kd+adm": ("offline_kd", "cifar_resnet32x4", "cifar_resnet8x4", "kd+adm", "", "fp32"),
}
"""The benchmark's rows whose two times belong to a run's step: task, teacher, student, both methods, precision."""


@dataclass(frozen=True)
class Kept:
    """One measurement. ``key``: what must be equal (see ``key_of``)."""

    key: tuple[Any, ...]
    batch_size: int
    seconds_per_image: float
    device: str  # "cuda" or "cpu"
    device_name: str
    source: str


@dataclass(frozen=True)
class Estimate:
    """Training alone, evaluation not counted."""

    hours: float
    device: str
    device_name: str
    source: str

    def __str__(self) -> str:
        return f"{duration(self.hours, self.device)} ({self.device_name}, {self.source})"


def duration(hours: float, device: str) -> str:
    """In words."""
    return f"about {hours:.2g} GPU-hours" if device == "cuda" else f"about {readable(3600 * hours)} on the CPU"


def read_config(argv: Sequence[str], root: Path) -> dict[str, Any] | None:
    """What a command line of image classification says, recipe and flags, flat: ``{"fit.epochs": 300}``.

    None where it has no recipe of that kind.
    """
    flags: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            flags[key] = value if equals else next(words, "")
    file = root / str(flags.pop("config", ""))
    if not file.is_file():
        return None
    return {**_recipe(file), **{key: yaml.load(value, Loader) for key, value in flags.items()}}


@functools.cache
def _recipe(file: Path) -> dict[str, Any]:
    return flatten(yaml.load(file.read_text(), Loader))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def key_of(task: str, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides the time of an image: task, method, networks, image size, precision."""
    networks = tuple(sorted((k, v) for k, v in config.items() if re.fullmatch(r"networks\.\w+\.name", k)))
    size = config.get("data.image_size") or SIZES.get(config.get("data.name", ""), 224)
    return task, config.get("method", "dml+adm"), networks, size, config.get("fit.precision", "fp32")


def images_of(config: Mapping[str, Any], root: Path) -> int | None:
    """Images that a run trains on over all its epochs, None where the data set's size is not known."""
    if config.get("fit.steps"):
        return int(config["fit.steps"]) * int(config.get("batch_size", 128))
    per_class, chosen = config.get("data.per_class"), config.get("data.classes")
    total, classes = TRAINING_IMAGES.get(config.get("data.name", ""), (None, None))
    folder = root / str(config.get("data.root", "data")) / "train"
    if config.get("data.name") == "folder" and chosen is None and folder.is_dir():
        classes = sum(path.is_dir() for path in folder.iterdir())
    classes = chosen or classes
    if classes is not None and per_class is not None:
        total = classes * per_class
    elif total is not None and chosen is not None:
        total = round(total * chosen / TRAINING_IMAGES[config["data.name"]][1])
    epochs = config.get("fit.epochs")
    return None if total is None or epochs is None else round(epochs * total)


def kept_runs(folders: Iterable[Path]) -> list[Kept]:
    """Measurements from the summaries of runs of image classification below these folders."""
    found = []
    for file in sorted(path for folder in folders for path in folder.rglob("summary.json")):
        try:
            summary = json.loads(file.read_text())
            start = json.loads((file.parent / "environment.json").read_text())["starts"][-1]
            config = flatten(yaml.load((file.parent / "config.yaml").read_text(), Loader))
            rate = summary["images_per_second"]
            task = str(config.get("task", "classification"))
            if rate > 0 and "batch_size" in config and start["processes"] == 1:
                about = (start["device"].partition(":")[0], start["device_name"], os.path.relpath(file.parent))
                found.append(Kept(key_of(task, config), config["batch_size"], 1 / rate, *about))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError):
            continue  # no run of that kind, or one that is being written
    return found


def kept_benchmarks(folder: Path) -> list[Kept]:
    """Measurements from the rows of `benchmark.py`, as kept in ``results/benchmark/*.json``."""
    found = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        where = report["environment"]
        for row in report["rows"]:
            told = re.match(r"batch (\d+), (\d+) px, ([\d.]+) : ([\d.]+) ms a step", row["on"])
            if row["row"] not in BENCHMARKS or told is None:
                continue
            task, teacher, student, *methods, precision = BENCHMARKS[row["row"]]
            batch, size = int(told[1]), int(told[2])
            networks = (("networks.student.name", student), ("networks.teacher.name", teacher))
            for method, milliseconds in zip(methods, (told[3], told[4]), strict=True):
                key = (task, method, networks, size, precision)
                seconds = float(milliseconds) / 1e3 / batch
                found.append(Kept(key, batch, seconds, where["device"], where["device_name"], str(file)))
    return found


def of_same_runs(stems: Iterable[Path], device: str) -> Estimate | None:
    """The duration of a finished run ``<stem>-<seed>`` on a "cuda" or "cpu" device, all its rounds together.

    Of several the shortest: other work on a machine can only slow a run down.
    """
    found = []
    for folder in (folder for stem in stems for folder in numbered(stem).values()):
        try:
            if json.loads((folder / "summary.json").read_text())["status"] != "finished":
                continue
            start = json.loads((folder / "environment.json").read_text())["starts"][-1]
            seconds = sum(json.loads(file.read_text()).get("seconds", 0) for file in folder.rglob("summary.json"))
        except (OSError, ValueError, KeyError, IndexError):
            continue
        if seconds and start["device"].partition(":")[0] == device and start["processes"] == 1:
            found.append(Estimate(seconds / 3600, device, start["device_name"], os.path.relpath(folder)))
    return min(found, key=lambda one: one.hours, default=None)


def estimate(argv: Sequence[str], kept: Sequence[Kept], device: str, root: Path) -> Estimate | None:
    """The duration of the run that this command line makes on a "cuda" or "cpu" device, None where nothing tells it."""
    config = read_config(argv, root)
    images = images_of(config, root) if config is not None else None
    if config is None or images is None:
        return None
    key, batch_size = key_of(Path(argv[0]).parts[0], config), config.get("batch_size", 128)
    fitting = [one for one in kept if one.key == key and one.device == device]
    if not fitting:
        return None
    # of equally near ones the fastest: other work on a machine can only slow a run down
    nearest = min(fitting, key=lambda one: (abs(math.log(one.batch_size / batch_size)), one.seconds_per_image))
    return Estimate(images * nearest.seconds_per_image / 3600, device, nearest.device_name, nearest.source)
