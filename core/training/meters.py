"""What every training loop measures: its losses, read rarely and checked for NaN, and the time it takes."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .distiller import Losses


class LossBuffer:
    """The losses of the steps since the last log point, kept on the device: reading them there alone saves a sync.

    Args: the device; the mean of a tensor over all processes; what may help against losses that are not finite.
    """

    def __init__(self, device: torch.device, mean: Callable[[Tensor], Tensor], advice: str) -> None:
        self.device, self.mean, self.advice = device, mean, advice
        self.rows: list[dict[str, Any]] = []
        self._step: dict[str, Tensor] = {}

    def add(self, losses: Losses, observed: Mapping[str, Tensor]) -> Tensor:
        """Takes one forward's losses; returns their sum."""
        values = {f"{role}/{term}": value for role, terms in losses.items() for term, value in terms.items()}
        first, *others = values.values()
        total = sum(others, start=first)  # not stack and sum: their backward takes longer than all the rest here
        self.observe({**values, **observed})
        return total

    def observe(self, values: Mapping[str, Tensor]) -> None:
        """Takes one forward's scalars by name; the parts of a step add up."""
        for name, value in values.items():
            value = value.detach().float()
            self._step[name] = self._step[name] + value if name in self._step else value

    def close_step(self, step: int) -> None:
        self.rows.append({"step": step, "names": list(self._step), "values": torch.stack(list(self._step.values()))})
        self._step = {}

    def check(self) -> dict[str, float]:
        """Means over the steps and the processes. Raises: TrainingError naming the first value that is not finite."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row["names"]), []).append(row)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        bad: list[tuple[int, str, float]] = []
        for names, rows in groups.items():
            table = torch.stack([row["values"].to(self.device) for row in rows])  # [rows, terms]
            table = self.mean(table).double().cpu()
            for r, c in (~table.isfinite()).nonzero().tolist():
                bad.append((rows[r]["step"], names[c], float(table[r, c])))
            for name, value in zip(names, table.sum(dim=0).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + len(rows)
        if bad:
            step, name, value = min(bad, key=lambda found: found[0])  # of the first step the first: a loss, if any
            what = name.replace("/", "'s ", 1)
            raise TrainingError(
                f"the loss is not finite: {what} is {value} at step {step}: {self.advice}; "
                "nothing was saved since the last checkpoint"
            )
        return {name: value / counts[name] for name, value in sums.items()}

    def flush(self) -> dict[str, float]:
        means = self.check()
        self.rows = []
        return means


class Clock:
    """Seconds spent training (evaluation and saving left out), and images per second since the last look."""

    def __init__(self, device: torch.device, processes: int, seconds: float = 0.0, samples: int = 0) -> None:
        self.device, self.processes = device, processes
        self.seconds, self.samples = seconds, samples
        self._since = time.perf_counter()
        self._ticked = seconds, samples

    def _now(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def rate(self) -> float:
        """Images per second since the last tick."""
        self._now()
        seconds, samples = self._ticked
        return (self.samples - samples) * self.processes / max(self.seconds - seconds, 1e-9)

    def tick(self) -> float:
        rate = self.rate()
        self._ticked = (self.seconds, self.samples)
        return rate

    def pause(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._now()

    def resume(self) -> None:
        self._since = time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
