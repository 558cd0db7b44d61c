"""A network that was written for others, opened to predict: a folder of timm or transformers, ONNX, ``.pt2``.

Each says itself which images it takes and how its classes are called; nothing of ours is needed to run it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from classification.data.datasets import pixels
from classification.export import BILINEAR, PROCESSOR, floored
from classification.inference import Classifier
from core.errors import InputError, first_line
from core.training.command import missing_extra

if TYPE_CHECKING:
    from PIL.Image import Image


def open_exported(place: Path, device: str) -> Classifier:
    """The network of a folder (its own library's, else ONNX, else ``.pt2``) or of one ``.onnx`` or ``.pt2`` file.

    Raises: InputError where it cannot be opened, does not say which images it takes, or needs a package that is not
        installed.
    """
    try:
        if place.is_file():
            return _of_file(place, device)
        if (place / "config.json").is_file():
            timms = "architecture" in json.loads((place / "config.json").read_text())
            return (_of_timm if timms else _of_transformers)(place, device)
        return _of_file(next(file for file in (place / "model.onnx", place / "model.pt2") if file.is_file()), device)
    except ImportError as error:
        raise missing_extra(error, "export") from error
    except InputError:
        raise
    except Exception as error:  # what the libraries raise has no common class
        raise InputError(f"cannot open {place} as an exported network: {first_line(error)[:200]}") from error


@dataclass(frozen=True)
class Seen:
    """What timm's evaluation does to an RGB image -> uint8 ``[3, H, W]``. It can be handed to worker processes.

    Args: timm's ``input_size`` ``[C, H, W]``, ``crop_pct``, ``interpolation`` and ``crop_mode``, as exports say them.
    """

    input_size: Sequence[int]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def __call__(self, image: Image) -> Tensor:
        if self.crop_pct == 1 and [image.height, image.width] == list(self.input_size[1:]):
            return pixels(image)
        steps = _steps(tuple(self.input_size[1:]), self.crop_pct, self.interpolation, self.crop_mode)
        return torch.from_numpy(np.asarray(steps(image)))


@cache
def _steps(size: tuple[int, int], crop_pct: float, interpolation: str, crop_mode: str) -> Callable[[Any], Any]:
    from timm.data.transforms_factory import transforms_imagenet_eval

    how: dict[str, Any] = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    return transforms_imagenet_eval(size, use_prefetcher=True, **how)


def _classifier(run: Callable[[Tensor], Tensor], about: Mapping[str, Any], names: Sequence[str]) -> Classifier:
    """Of a network that takes images in [0, 1] as ``about`` says: its size, and its mean and std where it has them."""
    if about["input_size"][0] != 3:
        raise InputError(f"it takes images of {about['input_size'][0]} channels, and these have 3")
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    seen = Seen(**{key: about[key] for key in ("input_size", "crop_pct", "interpolation", "crop_mode") if key in about})

    def logits(images: Tensor) -> Tensor:
        plain = images.float() / 255.0
        return run(plain if about.get("normalisation_inside") else (plain - mean.to(plain)) / std.to(plain))

    return Classifier(tuple(names), seen, logits)


def _of_timm(folder: Path, device: str) -> Classifier:
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device).eval()
    if device == "cpu":
        model.to(memory_format=torch.channels_last)  # a third faster there
    config = timm.data.resolve_model_data_config(model)
    names = model.pretrained_cfg.get("label_names") or map(str, range(model.num_classes))
    return _classifier(model, config, list(names))


def _of_transformers(folder: Path, device: str) -> Classifier:
    """As exported here it sees what evaluation saw (transformers' own crop can lie a pixel beside); else as it says."""
    import transformers

    model: Any = transformers.AutoModelForImageClassification.from_pretrained(folder).to(device).eval()
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    said = json.loads((folder / "preprocessor_config.json").read_text())
    if _as_exported(said):
        side = said["crop_size"]["height"]
        about = {"input_size": (3, side, side), "crop_pct": floored(side / said["size"]["shortest_edge"])}
        about |= {"mean": said["image_mean"], "std": said["image_std"], "interpolation": "bilinear"}
        return _classifier(lambda images: model(images).logits, about, names)
    # By PIL it sees what evaluation would; by torchvision a resized pixel can be one of 255 off.
    by_pil: dict[str, Any] = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **by_pil)
    return Classifier(tuple(names), _Processed(processor), lambda pixel_values: model(pixel_values).logits)


def _as_exported(said: Mapping[str, Any]) -> bool:
    steps = all(said.get(f"do_{step}") for step in ("resize", "center_crop", "rescale", "normalize"))
    plain = said.get("image_processor_type") == PROCESSOR and said.get("resample") == BILINEAR
    return steps and plain and "shortest_edge" in said["size"]


@dataclass(frozen=True)
class _Processed:
    processor: Any

    def __call__(self, image: Image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def _of_file(file: Path, device: str) -> Classifier:
    run, said = (_onnx if file.suffix.lower() == ".onnx" else _program)(file, device)
    if not said:
        raise InputError(f"{file} does not say which images it takes: it was not written by evaluate.py --export")
    about = json.loads(said)
    return _classifier(run, about, about["class_names"])


def _onnx(file: Path, device: str) -> tuple[Callable[[Tensor], Tensor], str]:
    import onnxruntime

    wanted = ["CUDAExecutionProvider"] * (device == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=providers)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])

    return run, session.get_modelmeta().custom_metadata_map.get("description", "")


def _program(file: Path, device: str) -> tuple[Callable[[Tensor], Tensor], str]:
    files: dict[str, Any] = {"description.json": ""}
    if not zipfile.is_zipfile(file):  # torch would write its traceback
        raise InputError(f"cannot open {file} (incomplete, or not of torch.export)")
    program = torch.export.load(file, extra_files=files)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module(), str(files["description.json"])
