"""AFD, feature-map-level online adversarial distillation (Chung et al., ICML 2020).

The logits learn as in DML. Each network's last map also learns to pass for its peer's before the network's own
discriminator; the peer is the other network, or among more the one before it in a cycle.

There is no code of the authors. The losses follow the paper. Where it leaves the layers open: discriminators see one
width and size, the transfer layers' output; learning rates fall at the networks' own milestones.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from classification.methods.base import Method, MethodOptions, Outputs, sum_over_processes
from classification.options import TrainConfig
from core.distillation import full_precision, mutual_loss
from core.errors import InputError
from core.maps import pool_to
from core.network import preserved, stage_maps
from core.ranges import NonNegative, Positive
from core.training.distiller import Batch, Losses, Progress, backward


def generator_loss(fake: Tensor) -> Tensor:
    """L_G: ``mean (1 - D(T(G x)))^2``, a scalar, of D's probability ``[B, 1, H, W]`` that the own map is the peer's."""
    return (1 - fake).square().mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D: ``mean (1 - D(real))^2 + mean D(fake)^2``, of D's ``[B, 1, H, W]`` of the peer's map and of the own."""
    return (1 - real).square().mean() + fake.square().mean()


def discriminator(channels: int) -> nn.Sequential:
    """D: a map ``[B, C, H, W]`` -> the probability of being the peer's at each location ``[B, 1, H, W]``."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 1, 1),
        nn.Sigmoid(),
    )


class Transfer(nn.Module):
    """T: a map ``[B, C, H, W]`` -> ``[B, channels, *size]``, pooled first."""

    def __init__(self, in_channels: int, channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.layers(pool_to(feature_map, self.size))


@dataclass(frozen=True)
class AFDOptions(MethodOptions):
    """Options of AFD.

    Args:
        tau: temperature of the logits' imitation (original: --afd.tau 3).
        weight: lambda, the weight of the logits' imitation loss.
        adversarial: weight of both adversarial losses. Adam's steps hardly depend on it: `lr` sets how much they count.
        lr: learning rate of the Adam that follows the adversarial losses; the schedule's factor applies to it too.
        weight_decay: of the discriminators and transfer layers under that Adam; the networks have none there.
    """

    tau: Positive = 1.0
    weight: NonNegative = 1.0
    adversarial: NonNegative = 1.0
    lr: NonNegative = 2e-5
    weight_decay: NonNegative = 0.1

    def __post_init__(self) -> None:
        if self.adversarial <= 0:
            raise InputError(f"afd.adversarial must be positive: {self.adversarial} (AFD without it is --method dml)")
        super().__post_init__()


class AFD(Method):
    """Mutual learning of logits by the run's SGD, and of last maps by an adversarial game with an Adam of its own.

    Each network has a discriminator D_k. Where the networks' last maps differ in shape, each also has a transfer layer
    T_k to the largest width and the smallest size, so that real and fake maps are of one kind. None of them runs in
    evaluation. Among three and more networks each learns from the one before it, the first from the last.
    """

    Options = AFDOptions
    min_networks = 2
    manual_grad_sync = True

    extractors: list[nn.Parameter]
    """What is trained of the networks' G_k: all but their classifiers."""

    adam: torch.optim.Adam
    """Of G, T and D; its state is this module's extra state in a checkpoint."""

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        super().check(run, roles, pretrained)
        if run.fit.precision == "fp16":
            raise InputError("AFD cannot train in fp16, whose loss scaling is for one gradient: --fit.precision bf16")
        if run.fit.compile:
            raise InputError(
                "AFD goes back twice through one graph, and a compiled one is used up: leave fit.compile off"
            )

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        shapes, self.extractors = {}, []
        for role, network in networks.items():
            shapes[role], parameters = last_map(network, samples[role])
            self.extractors += parameters
        channels = max(c for c, _, _ in shapes.values())
        size = (min(h for _, h, _ in shapes.values()), min(w for _, _, w in shapes.values()))
        alike = len(set(shapes.values())) == 1
        with torch.random.fork_rng(devices=[]):  # whatever is made after them starts as it would without them
            self.transfers = nn.ModuleDict(
                {role: nn.Identity() if alike else Transfer(c, channels, size) for role, (c, _, _) in shapes.items()}
            )
            self.discriminators = nn.ModuleDict({role: discriminator(channels) for role in networks})
        # Coupled weight decay of Adam would pull the networks hard, and the SGD decays them already.
        groups: list[dict[str, Any]] = [
            {"params": self.extractors, "weight_decay": 0.0},
            {"params": list(self.parameters()), "weight_decay": self.options.weight_decay},
        ]
        self.adam = torch.optim.Adam(groups, lr=self.options.lr)
        self._gradients: list[Tensor] = []  # of the adversarial losses in this step, in the order of Adam's parameters
        return networks

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        options: AFDOptions = self.options
        logits = {role: output.logits for role, output in outputs.items()}
        losses = mutual_loss(logits, batch["target"], options.weight, options.tau, criterion=self.criterion)
        with torch.autocast(batch["target"].device.type, enabled=False):
            maps = {r: self.transfers[r](full_precision(o.maps[-1])) for r, o in outputs.items()}  # [B, C, H, W]
            roles = list(maps)
            for role, peer in zip(roles, [roles[-1], *roles[:-1]], strict=True):
                own, other, d = maps[role], maps[peer].detach(), self.discriminators[role]
                # Real and fake apart: BatchNorm over both would tell D what share of a batch is real.
                losses[role]["generator"] = options.adversarial * generator_loss(d(own))
                losses[role]["discriminator"] = options.adversarial * discriminator_loss(d(other), d(own.detach()))
        return losses

    def backward(self, losses: Losses, total: Tensor, accelerator: Any) -> None:
        """Three gradients of one forward, all before any weight moves: L_G's by G and T, L_D's by D, and the rest's.

        L_G depends on D as well: that it does not train D is decided here, by what it is derived by.
        """
        terms = [item for named in losses.values() for item in named.items()]
        generator: Any = sum(value for term, value in terms if term == "generator")
        own: Any = sum(value for term, value in terms if term == "discriminator")
        rest: Any = sum(value for term, value in terms if term not in ("generator", "discriminator"))
        fooling = [*self.extractors, *self.transfers.parameters()]
        gradients = [
            # The networks' graph is needed once more. A layer that random depth left out counts as zero.
            *torch.autograd.grad(generator, fooling, retain_graph=True, materialize_grads=True),
            *torch.autograd.grad(own, list(self.discriminators.parameters())),
        ]
        if self._gradients:  # an earlier part of this batch
            gradients = [a + b for a, b in zip(self._gradients, gradients, strict=True)]
        self._gradients = gradients
        backward(rest, accelerator)

    def before_update(self, parameters: Sequence[nn.Parameter]) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        tensors = [*gradients.values(), *self._gradients]
        flat = sum_over_processes(torch.cat([t.reshape(-1) for t in tensors])).div_(dist.get_world_size())
        parts = flat.split([t.numel() for t in tensors])
        means = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        for parameter, mean in zip(gradients, means[: len(gradients)], strict=True):
            parameter.grad = mean
        self._gradients = means[len(gradients) :]

    def after_step(self, batch: Batch, logits: Mapping[str, Tensor], progress: Progress) -> None:
        """Adam's step, after the SGD's."""
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = self.options.lr * progress.rate
        self.adam.step()
        self.adam.zero_grad()
        self._gradients = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []  # Adam has them

    def get_extra_state(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(copy.deepcopy(state))  # Adam would keep the given tensors, and move them


def last_map(network: nn.Module, images: Tensor) -> tuple[tuple[int, int, int], list[nn.Parameter]]:
    """(C, H, W) of a network's last map for images ``[B, 3, H, W]``, and the trained parameters it depends on.

    Leaves buffers, modes and random state as they were.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    with preserved(network, images), torch.enable_grad():
        final, _ = stage_maps(network.eval(), images)
        gradients = torch.autograd.grad(final.sum(), trained, allow_unused=True)
    c, h, w = final.shape[1:]
    return (c, h, w), [p for p, g in zip(trained, gradients, strict=True) if g is not None]
