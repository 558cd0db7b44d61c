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
Step = Callable[[], None]
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

    def pick(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """A size, by where it is measured."""
        return quick if self.quick else gpu if self.on_gpu else cpu

    def timer(self, work: Callable[[], object], times: int = 1) -> Callable[[], float]:
        """How long ``work`` takes so many times, by CUDA events on a GPU."""
        return partial(cuda_seconds, work, times) if self.on_gpu else partial(seconds, work, times, self.now)

    def ratio(self, a: Callable[[], float], b: Callable[[], float], on: str, unit: str, scale: float = 1.0) -> Values:
        """The first's seconds over the second's. ``on``: the sizes, in front of the medians of both in ``unit``."""
        values, medians = ratios(paired(a, b, self.pairs), unit, scale)
        return values, f"{on} {medians}"

    def step_ratio(self, step: Step, other: Step, sizes: str) -> Values:
        """How long one takes over the other; on a GPU several together are timed, so that the host is ahead of it."""
        repeat = 5 if self.on_gpu else 1
        return self.ratio(self.timer(step, repeat), self.timer(other, repeat), f"{sizes},", "ms a step", 1e3 / repeat)

    def memory_ratio(self, ours: Callable[[], Step], other: Callable[[], Step], sizes: str) -> Values:
        """Peak bytes of one over the other, from building the networks to the end of their second step.

        One measurement on the CPU, where it is the same each time. Args: what builds the networks and returns a step.
        """

        def two_steps(build: Callable[[], Step]) -> Step:
            step = build()
            step()
            step()
            return step

        peaks = []
        for _ in range(self.pairs if self.on_gpu else 1):
            (a, kept_a), (b, kept_b) = (peak_bytes(partial(two_steps, build), self.device) for build in (ours, other))
            peaks.append((a, b))
        values, on = ratios(peaks, "MiB", 2**-20)
        return values, f"{sizes}, {on}; {(a - kept_a) / (b - kept_b):.4f} without weights and momentum"


def own_step(distiller: Distiller, optimizer: torch.optim.Optimizer, batch: Batch, *, bf16: bool = False) -> Step:
    """Training's own step on one batch: with the method's own views, backward and optimiser."""
    device = next(distiller.parameters()).device
    accelerator = SimpleNamespace(device=device, scaler=None, no_sync=lambda module: contextlib.nullcontext())
    losses = LossBuffer(device, lambda values: values, "")

    def forward(*arguments: Any) -> tuple[Losses, Mapping[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return distiller(*arguments)

    def step() -> None:
        train_step(forward, distiller, optimizer, batch, PROGRESS, accelerator, losses)
        losses.close_step(0)
        losses.rows.clear()

    return step


def bare_step(
    networks: Mapping[str, nn.Module],
    forward: Callable[[], Losses],
    optimizer: Callable[..., Any] = sgd,
    teacher: Callable[[], object] | None = None,
) -> Step:
    """Forward, backward and step of the networks, and nothing else but what a fixed ``teacher`` forwards before."""
    optim = optimizer([{"params": list(network.parameters())} for network in networks.values()])

    def step() -> None:
        if teacher is not None:
            with torch.no_grad():
                teacher()
        first, *others = (value for terms in forward().values() for value in terms.values())
        sum(others, start=first).backward()
        optim.step()
        optim.zero_grad()

    return step
