"""What the benchmark's rows have in common: the settings of a run, training's own step, and the bare one beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from core.training.distiller import Batch, Distiller, Losses, Progress
from core.training.meters import LossBuffer
from core.training.step import train_step
from tools.benchmark.ratios import Values, cuda_seconds, paired, peak_bytes, ratios, seconds

PROGRESS = Progress(1, 0.5, 4, 2.0)
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Settings:
    """How all rows are measured. ``now``: wall or processor time, the latter for a machine that others use too."""

    device: torch.device
    pairs: int
    quick: bool
    now: Callable[[], float] = time.perf_counter

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def repeat(self) -> int:
        """Steps that are timed together: several on a GPU, so that the host is ahead of it."""
        return 5 if self.on_gpu else 1

    def pick(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """A size, by where it is measured."""
        return quick if self.quick else gpu if self.on_gpu else cpu

    def timer(self, work: Callable[[], object]) -> Callable[[], float]:
        """How long ``work`` takes, by CUDA events on a GPU."""
        return partial(cuda_seconds, work) if self.on_gpu else partial(seconds, work, self.now)

    def step_ratio(self, step: Callable[[], None], other: Callable[[], None], sizes: str) -> Values:
        """How long one takes over the other, both made for ``repeat`` steps."""
        times = paired(self.timer(step), self.timer(other), self.pairs)
        values, on = ratios(times, "ms a step", 1e3 / self.repeat)
        return values, f"{sizes}, {on}"

    def memory_ratio(self, sides: tuple[Callable[[], object], Callable[[], object]], sizes: str) -> Values:
        """Peak bytes of one over the other; one measurement on the CPU, where it is the same each time."""
        peaks = []
        for _ in range(self.pairs if self.on_gpu else 1):
            (a, kept_a), (b, kept_b) = (peak_bytes(side, self.device) for side in sides)
            peaks.append((a, b))
        values, on = ratios(peaks, "MiB", 2**-20)
        return values, f"{sizes}, {on}; {(a - kept_a) / (b - kept_b):.4f} without weights and momentum"


def own_steps(
    distiller: Distiller, optimizer: torch.optim.Optimizer, batch: Batch, repeat: int, *, bf16: bool = False
) -> Callable[[], None]:
    """Training's own steps on one batch: with the method's own views, backward and optimiser."""
    device = next(distiller.parameters()).device
    accelerator = SimpleNamespace(device=device, scaler=None, no_sync=lambda module: contextlib.nullcontext())
    losses = LossBuffer(device, lambda values: values, "")

    def forward(*arguments: Any) -> tuple[Losses, Mapping[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return distiller(*arguments)

    def steps() -> None:
        for number in range(repeat):
            train_step(forward, distiller, optimizer, batch, PROGRESS, accelerator, losses)
            losses.close_step(number)
        losses.rows.clear()

    return steps


def bare_steps(
    networks: Mapping[str, nn.Module], forward: Callable[[], Losses], repeat: int, optimizer: Callable[..., Any] = sgd
) -> Callable[[], None]:
    """Forward, backward and step of the networks, and nothing else."""
    optim = optimizer([{"params": list(network.parameters())} for network in networks.values()])

    def steps() -> None:
        for _ in range(repeat):
            first, *others = (value for terms in forward().values() for value in terms.values())
            sum(others, start=first).backward()
            optim.step()
            optim.zero_grad()

    return steps
