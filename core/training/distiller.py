"""What ``fit`` knows of a task: one module with all networks, whose forward returns named losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]
Losses = dict[str, dict[str, Tensor]]
"""``{role: {term: scalar}}``: weighted terms; their sum is what is minimised."""


@dataclass(frozen=True)
class Progress:
    """Where the run is before this step: optimiser steps and epochs (fractional) done, and the run's whole lengths."""

    step: int
    epoch: float
    steps: int
    epochs: float
    rate: float = 1.0
    """The schedule's factor on every learning rate at this step."""

    @property
    def starts_epoch(self) -> bool:
        """Whether this is the first step of an epoch."""
        return float(self.epoch).is_integer()


def backward(total: Tensor, accelerator: Any) -> None:
    """What ``accelerator.backward`` does here, without its division by accumulation steps, which are always 1."""
    (total if accelerator.scaler is None else accelerator.scaler.scale(total)).backward()


class Distiller(nn.Module):
    """All networks of one run, their adapters and extra modules in one module (one DDP wrapper, one optimiser).

    A task implements ``forward`` and ``parameter_groups``; the rest has defaults.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moving_averages = nn.ModuleDict()
        """The moving averages of networks by their own roles (``student_ema``); see ``average.Averages``."""

    networks: nn.ModuleDict
    """The networks by role; what is trained of them is saved as ``<role>.safetensors``."""

    phases: tuple[Any, ...] = (None,)
    """Each step runs forward, backward and optimiser once per phase; one phase unless networks learn in turn."""

    unused_parameters: bool = False
    """True where a step leaves trainable parameters without a gradient (DDP must then look for them)."""

    manual_grad_sync: bool = False
    """True where ``before_update`` averages the gradients over the processes, and DDP must not."""

    def train(self, mode: bool = True) -> Distiller:
        """As any module's, but that the averages stay in evaluation mode: they are never trained."""
        super().train(mode)
        self.moving_averages.eval()
        return self

    def before_step(self, batch: Batch, progress: Progress) -> Batch:
        """Called before a step's first forward, outside what is compiled; may add tensors ``[B, ...]`` to the batch."""
        return batch

    def forward(self, batch: Batch, progress: Progress, phase: Any = None) -> tuple[Losses, dict[str, Tensor]]:
        """One forward on a batch: (named losses, detached scalars to log)."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups, one per network with its own learning rate; extra modules belong to one of them."""
        raise NotImplementedError

    def backward(self, losses: Losses, total: Tensor, accelerator: Any) -> None:
        """Adds to the gradients; ``total`` is the sum of all losses, each weighted by its part's share of the batch."""
        backward(total, accelerator)

    def before_update(self) -> None:
        """Called when the gradients of a whole step (or phase of it) are there, before the optimiser."""

    def after_step(self, batch: Batch, progress: Progress) -> None:
        """Called after each optimiser step (moving averages, per-sample stores)."""

    def trained(self) -> dict[str, nn.Module]:
        """The networks that are trained: ``{role: network}``."""
        return {r: n for r, n in self.networks.items() if any(p.requires_grad for p in n.parameters())}

    def export(self, role: str) -> nn.Module:
        """The network as it leaves training."""
        return self.networks[role]

    def metadata(self, role: str) -> dict[str, str]:
        """What a checkpoint file of this network says about it (architecture, class count, normalisation)."""
        return {"role": role}
