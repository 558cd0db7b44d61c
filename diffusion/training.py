"""What both kinds of training share: this process's batches, and what a dry run says of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from core.errors import InputError
from core.training.distiller import Distiller
from core.training.step import memory_estimate, seconds_a_step
from core.training.task import gigabytes

Loader = TypeVar("Loader")


def make_loader(kind: Callable[..., Loader], data: Any, config: Any, accelerator: Any, seed: int) -> Loader:
    """This process's batches. Raises: InputError for an unfitting batch size.

    Args: ``ImageLoader`` or ``LabelledLoader``, and what it loads; the training's config; the seed of the order.
    """
    if config.batch_size // accelerator.num_processes < config.fit.accumulate:
        raise InputError(f"batch_size {config.batch_size} cannot be cut into {config.fit.accumulate} parts a process")
    return kind(
        data,
        config.batch_size,
        flip=config.data.flips,
        seed=seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )


def describe_memory(distiller: Distiller, loader: Any, config: Any, accelerator: Any) -> str:
    """A dry run's line on memory, from a forward of two images."""
    batch = {name: values[:2] for name, values in next(iter(loader)).items()}
    part = config.batch_size // accelerator.num_processes // config.fit.accumulate
    with accelerator.autocast():
        return gigabytes(memory_estimate(distiller.to(accelerator.device), batch, part, moments=2))


def time_step(
    distiller: Distiller, loader: Any, optimizer: type[torch.optim.Optimizer], config: Any, accelerator: Any
) -> float:
    """Seconds of a step as ``fit`` takes it; the networks move on."""
    fit = config.fit
    return seconds_a_step(distiller, loader, optimizer, accelerator, accumulate=fit.accumulate, clip=fit.clip)


def count(network: nn.Module) -> int:
    """Its parameters, fixed ones too."""
    return sum(p.numel() for p in network.parameters())
