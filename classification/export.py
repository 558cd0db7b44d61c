"""A trained network as files that others open: timm's or transformers' folder, ONNX, ``torch.export``'s ``.pt2``.

Each file is opened again by a process of its own (``classification/reopen.py``) before the folder is put in place.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classification.data import Split, Streamed
from classification.experiment import Experiment, images_at
from classification.networks import CIFAR_NETWORKS, create_network
from classification.networks.libraries import TRANSFORMERS
from core.errors import InputError, TrainingError, first_line, unknown
from core.files import write_atomically
from core.split import model_of
from core.training.command import missing_extra

FORMATS = {
    "timm": "config.json",
    "onnx": "model.onnx",
    "torch": "model.pt2",
    "transformers": "preprocessor_config.json",
}
"""The formats, and the file by which each is known."""
TOLERANCE = 1e-4  # of the largest logit
BILINEAR = 2  # PIL's number of it
PROCESSOR = "BitImageProcessor"  # transformers' plain one: shorter side, central crop, mean and std
IMAGES = 64  # on which the reopened files are compared
_REOPEN = "import sys; from classification.reopen import answer; answer(*sys.argv[1:])"
_PACKAGES = {
    "timm": ("classification", ("timm", "huggingface_hub", "safetensors")),
    "onnx": ("export", ("onnx", "onnxscript", "onnxruntime")),
    "transformers": ("export", ("transformers", "safetensors")),
}
_PLACES = ("hf-hub:", "hf_hub:", "local-dir:")  # of timm's models that are no names
_FOLDERS = ("timm", "transformers")  # that say mean and std themselves, each of its own library's networks


class Normalised(nn.Module):
    """Images in [0, 1] ``[B, C, H, W]`` -> the logits ``[B, K]`` of a network that expects them normalised."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = (nn.Buffer(torch.tensor(values).view(-1, 1, 1)) for values in (mean, std))

    def normalise(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.normalise(image))


@dataclass(frozen=True)
class Export:
    """What is exported, and how: asked for by the command line, checked by ``check``.

    ``inside``: whether ONNX and .pt2 normalise by themselves, and so take images in [0, 1].
    """

    folder: Path
    formats: tuple[str, ...]
    role: str
    inside: bool = False

    @property
    def input_name(self) -> str:
        """Of ONNX and .pt2: what takes images in [0, 1] is not called as what takes normalised ones."""
        return "image" if self.inside else "pixel_values"


def parse_formats(text: str) -> tuple[str, ...]:
    """``"timm,onnx" -> ("timm", "onnx")``, each once. Raises: InputError for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise unknown("--format", name, FORMATS)
    return names


def check_folder(folder: Path) -> None:
    """Raises: InputError for a folder that is not empty, or a file in its place."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--export {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--export {folder} is not empty: name a new folder, or delete it first")


def check(export: Export, experiment: Experiment) -> None:
    """Raises: InputError for what cannot be written: an unknown role, a network that the format does not know, a
    package that is missing."""
    roles = experiment.distiller.normalisation
    if export.role not in roles:
        raise unknown("role", export.role, roles)
    name = experiment.distiller.configs[export.role].name
    for library in _FOLDERS:
        if library in export.formats and not _knows(library, name):
            others = ",".join(known for known in FORMATS if known not in _FOLDERS or _knows(known, name))
            what = f"--format {library}: {export.role} is {name}, which {library} does not know"
            raise InputError(f"{what}: give --format {others}")
    if export.inside and not set(export.formats) - set(_FOLDERS):
        raise InputError(
            f"--with-preprocessing counts for onnx and torch: {export.formats[0]}'s folder says mean and std itself"
        )
    for extra, packages in (_PACKAGES[format] for format in export.formats if format in _PACKAGES):
        for package in packages:
            try:
                import_module(package)
            except ImportError as error:
                raise missing_extra(error, extra) from error


def _knows(library: str, name: str) -> bool:
    """Whether timm, or else transformers, has a network."""
    if library == "transformers":
        return name.startswith(TRANSFORMERS)
    import timm

    return name.startswith(_PLACES) or (name not in CIFAR_NETWORKS and timm.is_model(name))


def write(export: Export, experiment: Experiment, split: str, card: str) -> dict[str, float]:
    """Writes the folder, with ``card`` as its README.md, if every file says again what the network says.

    Returns the largest difference of the logits of each format, as a share of the largest logit.
    Raises: TrainingError where one differs by more than ``TOLERANCE`` or cannot be made; no folder is then written.
    """
    distiller = experiment.distiller
    normalisation = distiller.normalisation[export.role]
    whole = Normalised(distiller.export(export.role), *normalisation).cpu().eval()
    images = distiller.resized(images_at(experiment.split(split), IMAGES).float(), export.role) / 255.0
    with torch.no_grad():
        normalised, expected = whole.normalise(images), whole(images)
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny).item()
    plain = {"transformers": images} | ({"onnx": images, "torch": images} if export.inside else {})
    inputs = {format: plain.get(format, normalised) for format in export.formats}
    about = description(export, experiment)
    differences = {}

    def write_folder(folder: Path) -> None:
        folder.mkdir()
        if "timm" in export.formats:
            write_timm(whole.network, distiller.configs[export.role].name, about, folder)
        if "transformers" in export.formats:
            write_transformers(whole.network, about, folder)
        if {"onnx", "torch"} & set(export.formats):
            model = whole if export.inside else whole.network
            write_graphs(model, export, images.shape[1:], about, folder)
        (folder / "README.md").write_text(card)
        for file in folder.iterdir():  # safetensors lets nobody else read what it writes
            file.chmod((folder / "README.md").stat().st_mode)
        for format, logits in reopened(folder, inputs).items():
            difference = (logits - expected).abs().max().item() / largest
            if not difference <= TOLERANCE:
                raise TrainingError(f"{format}: the reopened file's logits differ from torch's by {difference:.2g}")
            differences[format] = difference

    write_atomically(export.folder, write_folder)
    return differences


def description(export: Export, experiment: Experiment) -> dict[str, Any]:
    """What an image must go through before the network, and what comes out; ONNX and .pt2 hold it as JSON."""
    datasets = experiment.datasets
    mean, std = experiment.distiller.normalisation[export.role]
    size = experiment.distiller.configs[export.role].size or datasets.image_size
    return {
        "architecture": experiment.distiller.configs[export.role].name,
        "class_names": list(datasets.class_names),
        "input_size": [len(mean), size, size],
        "crop_pct": crop_share(datasets.test),
        "interpolation": "bilinear",
        "mean": list(mean),
        "std": list(std),
        "normalisation_inside": export.inside,
    }


def crop_share(split: Split) -> float:
    """The side of the central crop by the shorter side of the resized image, in evaluation: 0.875 as for ImageNet."""
    from torchvision import transforms as T

    if not isinstance(split, Streamed):
        return 1.0
    steps, sizes = [split.transform], {}
    while steps:
        step = steps.pop()
        steps += step.transforms if isinstance(step, T.Compose) else []
        if isinstance(step, (T.Resize, T.CenterCrop)):
            sizes[type(step)] = step.size if isinstance(step.size, int) else step.size[0]
    return floored(sizes[T.CenterCrop] / sizes[T.Resize])


def floored(share: float) -> float:
    """To four digits, downwards: timm divides by it, and rounds down what it resizes to."""
    return math.floor(share * 1e4) / 1e4


def write_timm(network: nn.Module, name: str, about: dict[str, Any], folder: Path) -> None:
    """``config.json`` and ``model.safetensors``, by timm itself, from a fresh model with these weights."""
    from timm.models import save_for_hf

    model: Any = create_network(name, len(about["class_names"]), in_chans=about["input_size"][0])
    model.load_state_dict(network.state_dict())
    # Of what timm knows of its own weights only the form of the network holds: not their licence, origin or test size.
    form = {key: model.pretrained_cfg.get(key) for key in ("architecture", "first_conv", "classifier")}
    form["fixed_input_size"] = model.pretrained_cfg.get("fixed_input_size", False)
    shown = {key: about[key] for key in ("input_size", "crop_pct", "interpolation", "mean", "std")}
    model.pretrained_cfg = {**form, **shown, "crop_mode": "center", "num_classes": model.num_classes}
    save_for_hf(model, str(folder), model_config={"label_names": about["class_names"]}, safe_serialization=True)


def write_transformers(network: nn.Module, about: dict[str, Any], folder: Path) -> None:
    """``config.json`` and ``model.safetensors`` by transformers itself, and ``preprocessor_config.json`` for images."""
    import transformers

    model: Any = deepcopy(model_of(network))
    names, side = about["class_names"], about["input_size"][1]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(folder)
    resized = {"shortest_edge": round(side / about["crop_pct"])}
    normalisation = {"image_mean": about["mean"], "image_std": about["std"]}
    form: dict[str, Any] = {"size": resized, "crop_size": {"height": side, "width": side}, "resample": BILINEAR}
    processor = getattr(transformers, PROCESSOR)(**form, **normalisation, do_convert_rgb=True)
    processor.save_pretrained(folder)


def write_graphs(model: nn.Module, export: Export, shape: Sequence[int], about: dict[str, Any], folder: Path) -> None:
    """``model.pt2`` and ``model.onnx``, whichever is asked for, of images ``shape`` ``[C, H, W]``, any number at once.

    Raises: TrainingError where torch cannot trace the network or ONNX has no word for it.
    """
    said = json.dumps(about)
    try:
        example = (torch.zeros(2, *shape),)
        program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
        if "torch" in export.formats:
            torch.export.save(program, folder / FORMATS["torch"], extra_files={"description.json": said})
        if "onnx" in export.formats:
            names = {"input_names": [export.input_name], "output_names": ["logits"]}
            graph: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
            graph.model.metadata_props["description"] = said
            graph.save(folder / FORMATS["onnx"], external_data=False)
    except Exception as error:  # what torch's tracing raises has no common class
        raise TrainingError(f"{export.role} cannot be exported: {first_line(error)}") from error


def reopened(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits of each format's file, by a fresh process. Raises: TrainingError where it cannot open one."""
    with tempfile.TemporaryDirectory() as place:
        given, said = Path(place) / "inputs.npz", Path(place) / "logits.npz"
        np.savez(given, **{format: images.numpy() for format, images in inputs.items()})  # type: ignore[arg-type]
        command = [sys.executable, "-c", _REOPEN, str(folder), str(given), str(said)]
        path = os.pathsep.join(filter(None, sys.path))  # where this process finds its packages
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise TrainingError(f"{', '.join(inputs)}: a fresh process cannot open what was written: {reason}")
        return {format: torch.from_numpy(logits) for format, logits in np.load(said).items()}
