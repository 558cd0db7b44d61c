"""How long networks take for a batch on this machine, measured in turn so that what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = (1, 32)
ROUNDS = (7, 101)
"""Fewest and most repeats of each network."""
SECONDS = 4.0
"""After so many for one batch size, and the fewest repeats, it is enough."""


@torch.inference_mode()
def measure(networks: Mapping[str, nn.Module], images: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Any]]]:
    """Milliseconds of a forward, by batch size ("1", "32") and role, float32, images on the device already.

    In each round every network takes one batch, in an order that turns; before each timed forward two that are not
    counted. A GPU is waited for.

    Args: the networks in evaluation mode; of each role as many normalised images ``[B, C, H, W]`` as the largest batch.
    Returns: ``median_ms``, ``quartiles_ms`` (two), ``images_per_second`` (of the median) and ``repeats``.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for batch in BATCHES:
        inputs = {role: images[role][:batch] for role in networks}
        times: dict[str, list[float]] = {role: [] for role in networks}
        order, started = list(networks), time.perf_counter()
        for done in range(ROUNDS[1]):
            if done >= ROUNDS[0] and time.perf_counter() - started > SECONDS:
                break
            for role in order:
                times[role].append(_milliseconds(networks[role], inputs[role]))
            order = order[1:] + order[:1]
        found[str(batch)] = {role: _told(values, batch) for role, values in times.items()}
    return found


def _milliseconds(network: nn.Module, x: Tensor) -> float:
    """Of one forward, the third in a row."""
    for _ in range(2):
        network(x)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    network(x)
    wait()
    return 1e3 * (time.perf_counter() - start)


def _told(milliseconds: list[float], batch: int) -> dict[str, Any]:
    low, median, high = torch.tensor(milliseconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {
        "median_ms": median.item(),
        "quartiles_ms": [low.item(), high.item()],
        "images_per_second": 1e3 * batch / median.item(),
        "repeats": len(milliseconds),
    }
