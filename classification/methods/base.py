"""The contract of a method: from the networks' outputs to named losses. Most methods fill ``losses`` alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.options import TrainConfig
from core.adm import Head
from core.distillation import standardise
from core.errors import InputError
from core.network import preserved, stage_maps
from core.ranges import check_ranges
from core.targets import Criterion
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

    @classmethod
    def of(cls, maps: list[Tensor], head: Head) -> Output:
        """The output whose logits are what the head says of the last map."""
        return cls(head(maps[-1]), maps, head)


Outputs = dict[str, Output]


@dataclass(frozen=True)
class MethodOptions:
    """Base of every method's options, and those of a method without any. Raises: InputError as ``check_ranges``."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Options").lower()
        check_ranges(f"{section}.", self)


def pairs_of(roles: Sequence[str]) -> list[tuple[str, str]]:
    """(student, teacher) for each student with each teacher (Table 11); no ADM between two students."""
    return [(s, t) for s in roles if s.startswith("student") for t in roles if t.startswith("teacher")]


def standardised(head: Head, scale: float) -> Head:
    """A head whose logits have mean 0 and the standard deviation ``scale``."""
    return lambda feature_map: standardise(head(feature_map), scale)


@torch.no_grad()
def probe(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The stage maps of a small batch, in evaluation mode; the network stays as it is."""
    with preserved(network, images):
        return stage_maps(network.eval(), images)[1]


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of all processes' ``values``, in place; the values themselves where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def mean_over_all(sums: Tensor, count: int) -> Tensor:
    """Sums over this process's ``count`` images -> means over those of all processes, which then decide alike.

    Shares of different size need no weights here, for the images themselves are counted.
    """
    total = sum_over_processes(torch.cat([sums.flatten(), sums.new_full((1,), count)]))
    return (total[:-1] / total[-1]).view_as(sums)


class Method(nn.Module):
    """One method: a file, an entry in ``METHODS``, a test. Roles are names, teachers first; never positions.

    Args: the method's options; whether ADM is composed with it.
    """

    Options: ClassVar[type] = MethodOptions
    """A frozen dataclass: the method's options on the command line (``--dml.tau 2``)."""

    min_networks: ClassVar[int] = 1
    """Networks that it needs."""

    views: Literal["shared", "separate"] = "shared"
    """Whether all networks see one augmented view of an image, or each its own."""

    needs_held_out: bool = False
    """Whether ``before_epoch`` wants to see images that are held out of training (``data.validation``)."""

    manual_grad_sync: bool = False
    """Whether ``before_update`` averages the gradients over the processes, and DDP must not."""

    separable: ClassVar[bool] = False
    """Whether ``forward`` also takes some of the networks alone, so that evaluation may leave out a fixed one."""

    takes_smooth_labels: ClassVar[bool] = True
    """Whether its losses against labels are ``criterion``'s alone, so that ``label_smoothing`` means one thing."""

    class_index: str = ""
    """What of it goes by the class index of an image, which a mixed one has not; empty where nothing does."""

    takes_average: ClassVar[bool] = True
    """Whether a network with averaged weights (``fit.ema_decay``) predicts by itself what it does here."""

    export_note: str = ""
    """Where a network alone is not what was trained: what its weight files, and tools that load it alone, say."""

    gates: Mapping[str, Tensor] = {}
    """Set anew by ``losses``: for roles that may pause, a detached scalar, 1 where this batch trains the role and 0
    where it must not move at all (no gradient, momentum or weight decay). Alike on all processes."""

    def __init__(self, options: Any = None, *, with_adm: bool = False) -> None:
        super().__init__()
        self.options: Any = options if options is not None else self.Options()
        self.with_adm = with_adm
        self.criterion: Criterion = F.cross_entropy
        """What compares logits ``[B, K]`` with class indices ``[B]``, or with the probabilities of mixed images."""

    def smooth_labels(self, share: float) -> None:
        """Lets ``criterion`` spread that share of each label over all classes; 0 leaves everything as it is.

        Raises: InputError where the method cannot.
        """
        if not share:
            return
        if not self.takes_smooth_labels:
            raise InputError(
                f"{type(self).__name__} goes by the label itself, which label_smoothing would blur: leave that out"
            )
        self.criterion = partial(F.cross_entropy, label_smoothing=share)

    def mix_labels(self, options: str) -> None:
        """Raises: InputError where it cannot learn of the mixed images that these options make; empty for none."""
        if options and self.class_index:
            raise InputError(
                f"{self.class_index} goes by the class index of each image, and {options} leaves it none: leave it out"
            )

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        """Refuses what it cannot train, before any network is built, by an InputError.

        Args: the run's config; the networks' roles; those of them that start from trained weights.
        """
        if len(roles) < self.min_networks:
            name, there = type(self).__name__, ", ".join(roles) or "none"
            raise InputError(f"{name} needs at least {self.min_networks} networks, and there is {there}")

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """The networks that take part: may wrap or freeze one, or build modules of the method's own.

        ``samples``: by role, normalised images ``[B, 3, H, W]`` of the network's own size.
        """
        return networks

    def output_roles(self, roles: Sequence[str]) -> list[str]:
        """The roles of ``forward``'s outputs, in order: the networks', and any that the method adds."""
        return list(roles)

    def pairs(self, roles: Sequence[str]) -> list[tuple[str, str]]:
        """Which (student, teacher) ADM compares, out of ``output_roles``."""
        return pairs_of(roles)

    def phases(self, roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Who learns together: one forward, backward and optimiser step for each group of ``output_roles``."""
        return (tuple(self.output_roles(roles)),)

    def forward(
        self, networks: Mapping[str, nn.Module], views: Mapping[str, Tensor], learning: Collection[str] | None = None
    ) -> Outputs:
        """Each network once on its normalised view ``[B, 3, H, W]``; those that do not learn now, without gradient."""
        outputs = {}
        for role, network in networks.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and (learning is None or role in learning)):
                outputs[role] = Output.of(stage_maps(network, views[role])[1], self.head_of(network))
        return outputs

    def head_of(self, network: nn.Module) -> Head:
        """What turns a network's last map into its logits."""
        return network.forward_head  # type: ignore[return-value]

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        """``{role: {term: weighted scalar}}``: the sum is minimised, each term is logged."""
        raise NotImplementedError

    def backward(self, losses: Losses, total: Tensor, accelerator: Any) -> None:
        """Adds to the gradients."""
        backward(total, accelerator)

    def before_update(self, parameters: Sequence[nn.Parameter]) -> None:
        """With ``manual_grad_sync``: called when all gradients of a step are there, to average them over the processes.

        ``parameters``: what the run's optimiser moves.
        """

    def before_epoch(self, epoch: int, held_out: Iterable[tuple[dict[str, Tensor], Tensor]]) -> None:
        """With ``needs_held_out``: called before each epoch's first step.

        ``held_out``: ({role: logits ``[B, K]``}, class indices ``[B]``) of this process's share of the held-out images.
        """

    def after_step(self, batch: Batch, logits: Mapping[str, Tensor], progress: Progress) -> None:
        """Called after each optimiser step, with the step's detached logits ``[B, K]`` by role."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """SGD groups of the method's own modules; learning rate (a student's) and weight decay are filled in."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters}] if parameters else []

    def export(self, role: str, network: nn.Module) -> nn.Module:
        """The network as it leaves training, without what only training needs."""
        return network
