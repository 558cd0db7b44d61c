"""A street of scikit-learn's handwritten digits, laid out like Cityscapes, and tiny runs on it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import ROOT

CONFIGS = ROOT / "segmentation" / "configs"
DEEPLAB = CONFIGS / "deeplabv3_camvid.py"
SIZE = (48, 64)  # height, width

# Networks of a few thousand weights.
TINY = [
    "batch_size=2",
    "crop_size=(48,64)",
    *(
        f"model.{role}.{key}"
        for role in ("teacher", "student")
        for key in (
            "backbone.base_channels=4",
            "backbone.stem_channels=4",
            "decode_head.in_channels=32",
            "auxiliary_head.in_channels=16",
        )
    ),
    "model.teacher.backbone.depth=18",
    "model.teacher.decode_head.channels=8",
    "model.teacher.auxiliary_head.channels=4",
    "model.student.decode_head.channels=4",
    "model.student.auxiliary_head.channels=4",
]
SHORT = ["train_cfg.max_iters=6", "train_cfg.val_interval=3", "run.log_every=2", "run.trackers=[]"]


def make_street(root: Path, train: int = 8, val: int = 4) -> Path:
    """Images of four digits each; a pixel of a digit d has class d, below them is road (0), above all is ignored."""
    import cv2
    from sklearn.datasets import load_digits

    digits = load_digits()
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        images, labels = root / "leftImg8bit" / split / "ulm", root / "gtFine" / split / "ulm"
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(count):
            picture = np.full((*SIZE, 3), 60, dtype=np.uint8)
            label = np.zeros(SIZE, dtype=np.uint8)
            label[:4] = 255
            for place, which in enumerate(random.integers(len(digits.target), size=4)):
                ink = cv2.resize(digits.images[which] * 15, (16, 32), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
                x = 16 * place
                picture[8:40, x : x + 16] = np.maximum(picture[8:40, x : x + 16], ink[..., None])
                label[8:40, x : x + 16][ink > 100] = digits.target[which]
            cv2.imwrite(str(images / f"ulm_{number:06d}_leftImg8bit.png"), picture)
            cv2.imwrite(str(labels / f"ulm_{number:06d}_gtFine_labelTrainIds.png"), label)
    return root


def arguments(street: Path, out: Path, *options: str, method: str = "dml+adm", config: Path = DEEPLAB) -> list[str]:
    """The command of a tiny run; ``options`` are --cfg-options."""
    where = ["--data-root", str(street), "--out", str(out), "--method", method]
    return [str(config), *where, "--cfg-options", *TINY, *SHORT, *options]


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Sends SIGTERM to this process during the given iterations."""
    from segmentation.hooks import RunHook

    real = RunHook.before_train_iter

    def before_train_iter(self: Any, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        real(self, runner, batch_idx, data_batch)
        if runner.iter + 1 in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunHook, "before_train_iter", before_train_iter)
