"""The module that ``core.training.fit`` trains: a DiT alone, or a student beside a teacher, with ADM or without."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.adapter import Adapter
from core.adm import consensus_attention, control, divergence_attention
from core.distillation import feature_loss, full_precision
from core.errors import InputError
from core.ranges import NonNegative, check_ranges
from core.training.distiller import Batch, Losses, Progress
from diffusion.consensus import ConsensusConfig, gate, map_loss, observations, output_loss, similarity
from diffusion.dit.gaussian import LinearSchedule
from diffusion.dit.model import DiT
from diffusion.training import DiffusionDistiller


@dataclass(frozen=True)
class DistillConfig:
    """What the student learns besides ADM; the defaults are what this project decided, for the paper is silent.

    Args:
        task_weight: of its own task, the noise's error and the variational bound; 0 is pure imitation, which leaves the
            variance where it starts, halfway between its bounds, unless ``sigma`` is on.
        weight: lambda, of the squared difference from the teacher's output.
        sigma: that difference, and ADM's, over all channels; else over those of the noise alone.
    """

    task_weight: NonNegative = 1.0
    weight: NonNegative = 1.0
    sigma: bool = False

    def __post_init__(self) -> None:
        check_ranges("distill.", self)
        if self.task_weight == self.weight == 0:
            raise InputError(
                "distill.task_weight and distill.weight are both 0: the student would have nothing to learn"
            )


@dataclass(frozen=True)
class ADMConfig(ConsensusConfig):
    """ADM of a DiT student: consensus on the maps of both networks' last tokens, a token's weight for all its pixels.

    Args:
        map: "tokens" are those after the last block (default), "final_norm" the same after the last norm with its
            modulation, which is what the last linear map reads.
        beta: weight of the divergence loss, which trains the teacher where that learns too (``--teacher online``).
        gamma: weight of the feature loss between the maps (Eq. 5); the paper uses none here.
    """

    map: Literal["tokens", "final_norm"] = "tokens"
    beta: NonNegative = 1.0
    gamma: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "classifier":
            raise InputError("adm.form classifier compares images, of which a DiT sees none: output, head or feature")
        if self.form == "head" and self.map == "tokens":
            raise InputError(
                "adm.form head needs --adm.map final_norm: the norm behind the last block takes off every weight that "
                "a token gets there"
            )


class DiTDistiller(DiffusionDistiller):
    """One run: with a teacher the student imitates it, with ADM it does so by Eq. 7; without, a network learns alone.

    The student minimises, with o and y* the noise that it and the teacher predict, and the gate ``g_i = [t_i < 400]``,

        task_weight (mean (o - eps)^2 + L_vlb) + weight mean (o - y*)^2 + alpha/B sum_i g_i mean (A_i (o_i - y*_i)^2)

    A teacher that learns too minimises ``mean (y* - eps)^2 + L_vlb + beta/B sum_i g_i mean (A'_i (y*_i - eps_i)^2)``
    with Eq. 8's attention A'. Otherwise it is fixed and runs under no_grad. phi, where the widths differ, learns by the
    mean squared difference of the two maps, both detached, at every step. None of them sends another a gradient.

    Args: the networks, whose inputs and classes are alike; whether the teacher learns; ADM's options or None;
        label_dropout: share of labels that are replaced by the null label, for both networks alike; as options ema,
        the decay of the moving average of each learning network, which lives in ``averages``, lr and weight_decay.
    """

    def __init__(
        self,
        student: DiT,
        teacher: DiT | None = None,
        *,
        online: bool = False,
        distill: DistillConfig | None = None,
        adm: ADMConfig | None = None,
        label_dropout: float = 0.1,
        **options: float,
    ) -> None:
        super().__init__(**options)
        self.schedule = LinearSchedule()
        self.distill, self.adm, self.online = distill or DistillConfig(), adm, online
        self.label_dropout = label_dropout
        networks = {"student": student}
        if teacher is not None:
            networks = {"teacher": teacher if online else teacher.requires_grad_(False), **networks}
        self.networks = nn.ModuleDict(networks)
        self.adapter = Adapter(student.width, teacher.width) if adm is not None and teacher is not None else None
        averages = {role: copy.deepcopy(network).requires_grad_(False) for role, network in self.trained().items()}
        self.averages = nn.ModuleDict(averages)
        self.step = 0  # optimiser steps done, for the name of what is exported
        self.train()

    def before_step(self, batch: Batch, progress: Progress) -> Batch:
        image, label = batch["image"], batch["label"]
        dropped = torch.rand(len(label), device=label.device) < self.label_dropout
        label = label.masked_fill(dropped, self._network("student").classes)
        t = torch.randint(self.schedule.timesteps, (len(image),), device=image.device)
        return {**batch, "label": label, "t": t, "noise": torch.randn_like(image)}

    def forward(self, batch: Batch, progress: Progress, phase: Any = None) -> tuple[Losses, dict[str, Tensor]]:
        x, noise, t, label = batch["image"], batch["noise"], batch["t"], batch["label"]
        z = self.schedule.noisy(x, noise, t)

        def task(output: Tensor) -> dict[str, Tensor]:
            eps, v = output.chunk(2, dim=1)
            bound = self.schedule.variational_bound(eps, v, x, z, t)
            return {"mse": F.mse_loss(eps, full_precision(noise)), "vlb": bound.mean()}

        if "teacher" not in self.networks:
            return {"student": task(self._see("student", z, t, label)[0])}, {}
        losses: Losses = {}
        with torch.set_grad_enabled(self.online and torch.is_grad_enabled()):
            y, map_teacher = self._see("teacher", z, t, label)
            if self.online:
                losses["teacher"] = task(y)
        o, map_student = self._see("student", z, t, label)
        own: dict[str, Tensor] = {}
        if self.distill.task_weight > 0:
            own = {name: self.distill.task_weight * value for name, value in task(o).items()}
        o, epsilon, y = self._imitated(o), y.chunk(2, dim=1)[0], self._imitated(y)
        if self.distill.weight > 0:
            own["distill"] = self.distill.weight * F.mse_loss(o, y.detach())
        losses["student"] = own
        if self.adm is None or self.adapter is None:
            return losses, {}
        opened = gate(t, self.adm.gate * self.schedule.timesteps)
        projected = self.adapter(map_student.detach())
        s = similarity(projected, map_teacher, self.adm.centre)
        weighed = control(s, self.adm.control)
        if self.adm.alpha > 0:
            a = consensus_attention(weighed)
            if self.adm.form == "output":
                loss = output_loss(o, y, a, opened)
            else:
                ours = self.adapter(map_student, frozen=True) if self.adm.form == "feature" else map_student
                heads = self._head("student"), self._head("teacher")
                loss = map_loss(self.adm.form, (ours, map_teacher), heads, a, opened)
            own["consensus"] = self.adm.alpha * loss
        if self.adm.gamma > 0:
            own["feature"] = self.adm.gamma * feature_loss(map_student, map_teacher, self.adapter)
        if self.adapter.conv is not None:
            own["phi"] = F.mse_loss(full_precision(projected), full_precision(map_teacher.detach()))
        if self.online and self.adm.beta > 0:
            divergence = output_loss(epsilon, noise, divergence_attention(weighed), opened)
            losses["teacher"]["divergence"] = self.adm.beta * divergence
        return losses, observations(s, opened)

    def _see(self, role: str, z: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """A network's output ``[B, 2C, H, W]``, float32 at least, and the map ``[B, D, h, w]`` that ADM compares."""
        network = self._network(role)
        tokens, c = network.forward_map(z, t, label)
        normed = network.final_norm(tokens, c)
        compared = normed if self.adm is not None and self.adm.map == "final_norm" else tokens
        return full_precision(network.forward_linear(normed)), compared

    def _imitated(self, output: Tensor) -> Tensor:
        return output if self.distill.sigma else output.chunk(2, dim=1)[0]

    def _head(self, role: str) -> Any:
        return lambda normed: self._imitated(self._network(role).forward_linear(normed))

    def _network(self, role: str) -> DiT:
        return cast(DiT, self.networks[role])

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.adapter is not None:
            groups[-1]["params"] += self.adapter.parameters()  # the student's is the last
        return groups

    def after_step(self, batch: Batch, progress: Progress) -> None:
        for role, average in self.averages.items():
            self.follow(average, self.networks[role])
        self.step = progress.step + 1

    def export(self, role: str) -> DiT:
        """The moving average: what is evaluated, and what serves as a teacher."""
        return cast(DiT, self.averages[role])

    def metadata(self, role: str) -> dict[str, str]:
        # the heads are what ``load_dit`` cannot read off the tensors
        network = self._network(role)
        label = {} if network.null_label else {"null_label": "untrained"}
        return {"role": role, "kind": "dit", "heads": str(network.heads), **label}
