"""How long a training step takes: what ``--dry-run`` estimates a run from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from core.training.distiller import Batch, Distiller, Progress


def seconds_a_step(
    distiller: Distiller,
    loader: Iterable[Batch],
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    accelerator: Any,
) -> float:
    """The shorter of two real steps on the loader's first batch, after one that warms up; the networks move on."""
    module, progress = accelerator.prepare(distiller), Progress(1, 1.0, 2, 2.0)
    distiller.train()
    optim = optimizer(distiller.parameter_groups())
    batch: Batch = {k: v.to(accelerator.device) for k, v in next(iter(loader)).items()}
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        drawn = distiller.before_step(batch, progress)
        losses, _ = module(drawn, progress)
        total = sum(value for terms in losses.values() for value in terms.values())
        distiller.backward(losses, total, accelerator)
        optim.step()
        optim.zero_grad()
        distiller.after_step(drawn, progress)
        total.item()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
