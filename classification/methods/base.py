"""The contract of a method: from the networks' outputs to named losses. Most methods fill ``losses`` alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from core.adm import Head
from core.network import stage_maps
from core.training.distiller import Batch, Losses, Progress, backward


@dataclass
class Output:
    """What one network says about a batch."""

    logits: Tensor
    """``[B, K]``."""
    maps: list[Tensor]
    """Stage maps ``[B, C, H, W]`` without the stem's; the last one is the map that ADM compares."""
    head: Head
    """The last map -> logits, in this method's own way."""


Outputs = dict[str, Output]


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


class Method(nn.Module):
    """One method: a file, an entry in ``METHODS``, a test. Roles are names, teachers first; never positions."""

    Options: ClassVar[type] = NoOptions
    """A frozen dataclass: the method's options on the command line (``--dml.tau 2``)."""

    views: Literal["shared", "separate"] = "shared"
    """Whether all networks see one augmented view of an image, or each its own."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options = options if options is not None else self.Options()

    def prepare(self, networks: dict[str, nn.Module], sample: Tensor) -> dict[str, nn.Module]:
        """The networks that take part: may wrap them, freeze one or add a role. ``sample``: images ``[B, 3, H, W]``."""
        return networks

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Who learns together: one forward, backward and optimiser step for each group of roles."""
        return (tuple(roles),)

    def forward(
        self, networks: Mapping[str, nn.Module], views: Mapping[str, Tensor], learning: Collection[str] | None = None
    ) -> Outputs:
        """Each network once on its normalised view ``[B, 3, H, W]``; those that do not learn now, without gradient."""
        outputs = {}
        for role, network in networks.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and (learning is None or role in learning)):
                final, maps = stage_maps(network, views[role])
                head: Head = network.forward_head  # type: ignore[assignment]
                outputs[role] = Output(head(final), maps, head)
        return outputs

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        """``{role: {term: weighted scalar}}``: the sum is minimised, each term is logged."""
        raise NotImplementedError

    def paused(self, outputs: Outputs, batch: Batch) -> Collection[str]:
        """Roles that this batch must not move at all: no gradient, momentum or weight decay. Alike on all processes."""
        return ()

    def backward(self, losses: Losses, total: Tensor, accelerator: Any) -> None:
        """Fills the gradients."""
        backward(total, accelerator)

    def after_step(self, batch: Batch, outputs: Outputs) -> None:
        """Called after each optimiser step, with detached outputs."""

    def export(self, role: str, network: nn.Module) -> nn.Module:
        """The network as it leaves training, without what only training needs."""
        return network
