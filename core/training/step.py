"""One optimiser step, as training, ``--dry-run --time``, the benchmark and the tests take it; its time and memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .distiller import Batch, Distiller, Losses, Progress
from .meters import LossBuffer

MIDWAY = Progress(step=1, epoch=0.5, steps=2, epochs=1.0)
"""Where a step is that is taken for its cost alone: not at an epoch's start, which some methods prepare for."""


def train_step(
    module: Any,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    progress: Progress,
    accelerator: Any,
    losses: LossBuffer,
    *,
    accumulate: int = 1,
    clip: float | None = None,
) -> None:
    """Moves the networks once: each phase goes forward and back over all parts of the batch, then updates.

    Args:
        module: the distiller as ``accelerator.prepare`` returns it.
        batch: tensors ``[B, ...]``, on whichever device; they are moved to the accelerator's.
        losses: takes the step's losses and observations; the caller closes the step there.
        accumulate, clip: as in ``FitConfig``.
    """
    device = accelerator.device
    batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    batch = distiller.before_step(batch, progress)
    for phase in distiller.phases:
        for part, share, final in _parts(batch, accumulate):
            synchronise = final and not distiller.manual_grad_sync
            with contextlib.nullcontext() if synchronise else accelerator.no_sync(module):
                terms, observed = _shared(share, *module(part, progress, phase))
                distiller.backward(terms, losses.add(terms, observed), accelerator)
        distiller.before_update()
        _update(optimizer, distiller, clip, accelerator.scaler)
    distiller.after_step(batch, progress)


def batch_length(batch: Batch) -> int:
    """B, read off the first tensor ``[B, ...]``."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _parts(batch: Batch, parts: int) -> Iterator[tuple[Batch, float, bool]]:
    """The batch in ``parts`` pieces: (piece, its share of the gradient, whether it is the last)."""
    weight = float(batch.get("weight", 1.0))
    if parts == 1:
        yield batch, weight, True
        return
    length = batch_length(batch)
    parts = min(parts, length)
    for k in range(parts):
        start, end = length * k // parts, length * (k + 1) // parts
        piece = {name: v[start:end] if isinstance(v, Tensor) else v for name, v in batch.items()}
        yield piece, weight * (end - start) / length, k == parts - 1


def _shared(share: float, losses: Losses, observed: Mapping[str, Tensor]) -> tuple[Losses, Mapping[str, Tensor]]:
    """One forward's losses and observations, times its share of the batch."""
    if share == 1.0:
        return losses, observed
    weighted = {role: {term: value * share for term, value in terms.items()} for role, terms in losses.items()}
    return weighted, {name: value * share for name, value in observed.items()}


def _update(optimizer: torch.optim.Optimizer, distiller: Distiller, clip: float | None, scaler: Any) -> None:
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), clip)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every process the first one's buffers: between two forwards each has BatchNorm statistics of its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def shortest(step: Callable[[], object]) -> float:
    """Seconds of the shortest of three steps, after one that warms up."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def seconds_a_step(
    distiller: Distiller,
    loader: Iterable[Batch],
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    accelerator: Any,
    *,
    accumulate: int = 1,
    clip: float | None = None,
) -> float:
    """The shortest of three real steps on the loader's first batch (see ``fit``), which move the networks."""
    module = accelerator.prepare(distiller)
    distiller.train()
    optim = optimizer(distiller.parameter_groups())
    losses = LossBuffer(accelerator.device, lambda values: values, "")
    batch = next(iter(loader))

    def step() -> None:
        train_step(
            module, distiller, optim, batch, MIDWAY, accelerator, losses,
            accumulate=accumulate, clip=clip,
        )  # fmt: skip
        losses.close_step(MIDWAY.step)
        losses.flush()  # reads the device: the step is over

    return shortest(step)


def memory_estimate(distiller: Distiller, batch: Batch, images: int, *, moments: int) -> int:
    """Bytes that a step of so many ``images`` needs (see ``bytes_needed``), from one forward of a small ``batch``."""

    def forward() -> object:
        return distiller(distiller.before_step(batch, MIDWAY), MIDWAY, distiller.phases[0])

    return bytes_needed(distiller, forward, images / batch_length(batch), moments=moments)


def bytes_needed(module: torch.nn.Module, forward: Callable[[], object], times: float, *, moments: int) -> int:
    """Bytes of weights, gradients, the optimiser's moments and what a batch needs for the backward pass.

    A lower bound: workspaces and fragments come on top. ``forward`` is taken once, in this precision, on a batch of
    which the whole one is ``times`` as large.
    ``moments``: values that the optimiser keeps for each weight (1 for SGD with momentum, 2 for Adam).
    """
    tensors = [*module.parameters(), *module.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, Any] = {}  # the storages themselves, so that no address is used again meanwhile

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return value

    module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = forward()  # held until the storages are counted
    activations = sum(storage.nbytes() for storage in kept.values())
    del result
    trained = sum(t.nbytes for t in tensors if t.requires_grad)
    return round(sum(t.nbytes for t in tensors) + trained * (1 + moments) + activations * times)
