"""The benchmark's rows of segmentation: mmsegmentation's stock ResNet-101 and ResNet-18, on small crops on the CPU."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.benchmark.ratios import Settings, Step, Values, bare_step, ratios, sgd

CONFIGS = Path(__file__).resolve().parents[2] / "segmentation" / "configs"
CLASSES = 19
ITERATIONS, WARM = 14, 2  # of a measured run of the training command; so many of them before it counts
NARROW = {
    "backbone.base_channels": 4, "backbone.stem_channels": 4, "decode_head.in_channels": 32, "decode_head.channels": 8,
    "auxiliary_head.in_channels": 16, "auxiliary_head.channels": 4,
}  # fmt: skip
TINY = {f"model.{role}.{key}": value for role in ("teacher", "student") for key, value in NARROW.items()}
TINY["model.teacher.backbone.depth"] = 18


def shape(settings: Settings) -> tuple[int, tuple[int, int]]:
    """(batch, crop): the paper's crop on a GPU, not on a CPU, where one of its steps takes a minute."""
    return settings.pick((2, (64, 128)), (2, (64, 128)), (4, (512, 1024)))


def sizes(settings: Settings) -> str:
    batch, (height, width) = shape(settings)
    return f"batch {batch}, {height} x {width} px"


def options_of(method: str, settings: Settings) -> dict[str, Any]:
    """What is changed of a stock config: random weights, ``shape``; in a quick run narrow networks too."""
    batch, crop = shape(settings)
    return {
        "model.method": method,
        "model.teacher.pretrained": None,
        "model.student.pretrained": None,
        "crop_size": crop,
        "batch_size": batch,
        **(TINY if settings.quick else {}),
    }


def make_batch(settings: Settings) -> tuple[torch.Tensor, list[Any]]:
    """Normalised images and their labels, a quarter of them ignored."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    batch, crop = shape(settings)
    labels = torch.randint(0, CLASSES, (batch, 1, *crop), device=settings.device)
    labels[:, :, : crop[0] // 4] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in labels]
    return torch.randn(batch, 3, *crop, device=settings.device), samples


def make_step(architecture: str, settings: Settings, method: str) -> Step:
    """Forward, all losses of mmseg's and backward of both networks, and SGD."""
    from segmentation.config import build, complete, load_config

    cfg = load_config(CONFIGS / f"{architecture}_cityscapes_mmseg.py", options_of(method, settings))
    torch.manual_seed(0)
    model = build(complete(cfg, 1, settings.device.type).model).to(settings.device).train()
    images, samples = make_batch(settings)
    forward = lambda: {"both": {"loss": model.parse_losses(model.loss(images, samples))[0]}}  # noqa: E731
    return bare_step({"both": model}, forward, partial(sgd, lr=1e-4))


def step_ratio(architecture: str, settings: Settings) -> Values:
    """A step of DML + ADM over one of DML."""
    a, b = (settings.timer(make_step(architecture, settings, method)) for method in ("dml+adm", "dml"))
    return settings.ratio(a, b, f"{sizes(settings)},", "s a step")


def memory_ratio(architecture: str, settings: Settings) -> Values:
    """Peak bytes of DML + ADM over DML."""
    ours, other = (partial(make_step, architecture, settings, method) for method in ("dml+adm", "dml"))
    return settings.memory_ratio(ours, other, sizes(settings))


def make_street(root: Path, height: int, width: int) -> None:
    """Random images and labels laid out like Cityscapes."""
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    images, labels = ("leftImg8bit", "", 256, (3,)), ("gtFine", "_labelTrainIds", CLASSES, ())
    for (split, count), (kind, suffix, high, depth) in itertools.product((("train", 8), ("val", 2)), (images, labels)):
        folder = root / kind / split / "ulm"
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, high, (height, width, *depth), dtype=np.uint8)
            cv2.imwrite(str(folder / f"ulm_{number:06}_000019_{kind}{suffix}.png"), pixels)


def loop_ratio(architecture: str, settings: Settings) -> Values:
    """Images per second of the training command, mmseg's pipeline included, over those of the two networks bare.

    Bare is forward, cross-entropies (auxiliary heads' too), backward and step, on one batch that is in memory. The
    command's iterations are timed between its log points, without evaluation and checkpoints. Always wall time, which
    the command measures.
    """
    settings, (batch, crop) = replace(settings, now=time.perf_counter), shape(settings)
    bare = settings.timer(make_step(architecture, settings, "vanilla"), ITERATIONS - WARM)
    from segmentation.training import train

    options = {
        **options_of("vanilla", settings),
        "train_dataloader.num_workers": 0,
        "val_dataloader.num_workers": 0,
        "train_cfg.max_iters": ITERATIONS,
        "train_cfg.val_interval": 10 * ITERATIONS,
        "run.log_every": WARM,
        # a run ends with an evaluation, which is not timed: not at 2,048 x 1,024, which takes minutes on a CPU
        "val_dataloader.dataset.dataset.pipeline.1.scale": crop[::-1],
    }
    times = []
    with tempfile.TemporaryDirectory() as folder:
        make_street(Path(folder, "street"), 2 * crop[0], 2 * crop[1])
        for number in range(settings.pairs):
            out = Path(folder, f"run-{number}")
            train(CONFIGS / f"{architecture}_cityscapes_mmseg.py",
                  {**options, "data_root": str(Path(folder, "street"))}, out=str(out))  # fmt: skip
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            rates = [line["images_per_second"] for line in lines if line["kind"] == "train"][1:]
            times.append((bare() / (ITERATIONS - WARM), batch / statistics.mean(rates)))
    values, on = ratios(times, "s a step", 1.0)
    return values, f"{sizes(settings)}, bare : whole {on}"
