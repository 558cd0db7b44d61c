"""Exported files opened as whoever gets them opens them: by their libraries alone, without our networks.

``classification/export.py`` starts it as a process of its own, with the folder and two ``.npz`` files: the one has an
array of images float32 ``[N, C, H, W]`` for each format, the other gets its logits ``[N, K]``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Classifier = Callable[[np.ndarray], np.ndarray]
"""Images float32 ``[N, C, H, W]`` -> logits float32 ``[N, K]``."""


def open_timm(folder: Path) -> Classifier:
    import timm

    return _of_torch(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def open_onnx(folder: Path) -> Classifier:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda images: session.run(["logits"], {name: images})[0]


def open_torch(folder: Path) -> Classifier:
    import torch

    return _of_torch(torch.export.load(folder / "model.pt2").module())


def open_transformers(folder: Path) -> Classifier:
    """It takes images in [0, 1]: the folder's own image processor normalises them."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    classify = _of_torch(lambda pixels: model(pixels).logits)

    def see(images: np.ndarray) -> np.ndarray:
        pixels = list(images * np.float32(255.0))
        shown = processor(pixels, do_resize=False, do_center_crop=False, input_data_format="channels_first")
        return classify(np.stack([np.asarray(image, dtype=np.float32) for image in shown["pixel_values"]]))

    return see


def _of_torch(model: Any) -> Classifier:
    import torch

    def classify(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(images)).numpy()

    return classify


OPENERS: dict[str, Callable[[Path], Classifier]] = {
    "timm": open_timm,
    "onnx": open_onnx,
    "torch": open_torch,
    "transformers": open_transformers,
}


def answer(folder: str, inputs: str, outputs: str) -> None:
    """Asks each format for one image alone and for the others together, so that both sizes of a batch are tried."""
    logits = {}
    for name, images in np.load(inputs).items():
        classify = OPENERS[name](Path(folder))
        logits[name] = np.concatenate([classify(part) for part in (images[:1], images[1:]) if len(part)])
    np.savez(outputs, **logits)  # type: ignore[arg-type]
