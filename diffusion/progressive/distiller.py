"""The two modules that ``core.training.fit`` trains: the base network from noise, and one halving of the steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from core.adm import consensus_attention, control
from core.errors import InputError
from core.ranges import Count
from core.split import Split
from core.training.distiller import Batch, Losses, Progress
from diffusion.consensus import ConsensusConfig, classifier_loss, gate, map_loss, observations, output_loss, similarity
from diffusion.progressive.network import InputHook
from diffusion.schedule import CosineSchedule, Prediction, Weighting, interpolate
from diffusion.training import DiffusionDistiller


@dataclass(frozen=True)
class ADMConfig(ConsensusConfig):
    """ADM's consensus loss in progressive distillation, on the inputs of both networks' last convolutions.

    Args:
        teacher_map: of which of the teacher's two evaluations F_t is. "target" is the mix that makes y* (default): from
            it the teacher's own last convolution yields y* exactly where x is predicted. "second" is the later one.
            "first" sees the student's own input and time, but the student starts as a copy: S = 1 everywhere then.
        gate_time: which time the gate looks at: "end", where the step lands (default: of the three the only one that
            acts at 4, 2 and 1 steps, all rows of Table 6; for many steps they agree); "mid", the teacher's second
            input; "start", the student's input (never below 0.4 T at 2 and 1 steps); "none": it always acts.
        adm_rounds: the student step counts in whose rounds ADM acts; the rounds above are plain progressive
            distillation, which its rivals share; or "all". Default: the rows of Table 6.
    """

    teacher_map: Literal["target", "second", "first"] = "target"
    gate_time: Literal["end", "mid", "start", "none"] = "end"
    adm_rounds: Literal["all"] | tuple[Count, ...] = (4, 2, 1)

    def acts(self, steps: int) -> bool:
        """Whether ADM acts in the round of the student with so many steps."""
        return self.alpha > 0 and (self.adm_rounds == "all" or steps in self.adm_rounds)


class Denoiser(DiffusionDistiller):
    """What both modules share: the schedule, what a network predicts, the weight of an error.

    Args: the schedule; prediction: what all networks put out; weighting: of a squared error in x; learning rate and
        weight decay of the one network that is trained, in ``options``.
    """

    def __init__(
        self, schedule: CosineSchedule, prediction: Prediction, weighting: Weighting, **options: float
    ) -> None:
        super().__init__(**options)
        self.schedule, self.prediction, self.weighting = schedule, prediction, weighting

    def see(self, role: str, z: Tensor, t: Tensor) -> Tensor:
        """What a network makes of z ``[B, C, H, W]`` at times t ``[B]`` (int64): x, float32 at least."""
        return self.schedule.predict_x(self.networks[role](z, t, return_dict=False)[0], z, t, self.prediction)

    def metadata(self, role: str) -> dict[str, str]:
        return {"role": role, "prediction": self.prediction, "schedule": "cosine"}


class BaseDistiller(Denoiser):
    """The base network learns from noise: ``1/B sum w_t mean (x_theta(z_t, t) - x)^2``, t uniform in 0..T.

    Args: the network ("teacher"); ``ema``: decay of the moving average of its weights, constant from the first step,
        which is what the chain starts from. It lives in ``average``, outside the networks.
    """

    def __init__(self, network: nn.Module, schedule: CosineSchedule, ema: float, **options: Any) -> None:
        super().__init__(schedule, ema=ema, **options)
        self.networks = nn.ModuleDict({"teacher": network})
        self.average = copy.deepcopy(network).requires_grad_(False).eval()

    def before_step(self, batch: Batch, progress: Progress) -> Batch:
        image = batch["image"]
        t = torch.randint(self.schedule.timesteps + 1, (len(image),), device=image.device)
        return {**batch, "t": t, "noise": torch.randn_like(image)}

    def forward(self, batch: Batch, progress: Progress, phase: Any = None) -> tuple[Losses, dict[str, Tensor]]:
        x, t = batch["image"], batch["t"]
        o = self.see("teacher", self.schedule.noisy(x, batch["noise"], t), t)
        one = x.new_ones((len(x), 1, 1, 1))
        return {"teacher": {"mse": output_loss(o, x, one, self.schedule.weight(t, self.weighting))}}, {}

    def export(self, role: str) -> nn.Module:
        """The moving average: what samples, and what the chain starts from."""
        return self.average

    def after_step(self, batch: Batch, progress: Progress) -> None:
        self.follow(self.average, self.networks["teacher"])


class ProgressiveDistiller(Denoiser):
    """One round: the student learns to do in one step of stride d = T / N what its teacher does in two of d / 2.

    Salimans & Ho 2022, Algorithm 2, with ADM's consensus loss or without. The teacher is fixed and runs under no_grad;
    nothing is clipped in training.

    Args: teacher and student (not the same module) of one architecture; N; ADM's options or None; the frozen classifier
        of the form that needs one, which takes images in [-1, 1].
    Raises: InputError where T cannot be cut into 2N steps.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        schedule: CosineSchedule,
        steps: int,
        adm: ADMConfig | None = None,
        classifier: Split | None = None,
        **options: Any,
    ) -> None:
        super().__init__(schedule, **options)
        if steps < 1 or schedule.timesteps % (2 * steps):
            raise InputError(f"{schedule.timesteps} times cannot be cut into two teacher steps for each of {steps}")
        self.networks = nn.ModuleDict({"teacher": teacher.requires_grad_(False), "student": student})
        self.steps, self.stride = steps, schedule.timesteps // steps
        self.adm = adm
        self.classifier = classifier.requires_grad_(False) if classifier is not None else None
        self._hooks = {role: InputHook(network) for role, network in self.networks.items()}
        self.train()

    def before_step(self, batch: Batch, progress: Progress) -> Batch:
        image = batch["image"]
        k = torch.randint(1, self.steps + 1, (len(image),), device=image.device)
        return {**batch, "t": k * self.stride, "noise": torch.randn_like(image)}

    def _see(self, role: str, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As ``see``, and the network's map ``[B, C', H, W]``."""
        return self.see(role, z, t), self._hooks[role].take()

    @torch.no_grad()
    def target(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """y* ``[B, C, H, W]``, with which one DDIM step from z at t lands where two of the teacher's do; and F_t."""
        m, s = t - self.stride // 2, t - self.stride
        x1, first = self._see("teacher", z, t)
        x2, second = self._see("teacher", self.schedule.ddim(x1, z, t, m), m)
        c = self.schedule.mix(t, m, s)
        if self.adm is not None and self.adm.teacher_map == "target":
            return interpolate(c, x1, x2), interpolate(c, first, second)
        return interpolate(c, x1, x2), second if self.adm is None or self.adm.teacher_map == "second" else first

    def forward(self, batch: Batch, progress: Progress, phase: Any = None) -> tuple[Losses, dict[str, Tensor]]:
        t = batch["t"]
        z = self.schedule.noisy(batch["image"], batch["noise"], t)
        y, map_teacher = self.target(z, t)
        o, map_student = self._see("student", z, t)
        w = self.schedule.weight(t, self.weighting)
        losses = {"mse": output_loss(o, y, o.new_ones((len(o), 1, 1, 1)), w)}
        if self.adm is None:
            return {"student": losses}, {}
        opened = self._gate(t)
        if self.classifier is not None:
            loss, s = classifier_loss(o, y, self.classifier, opened, self.adm.control)
        else:
            s = similarity(map_student, map_teacher, self.adm.centre)
            a = consensus_attention(control(s, self.adm.control))
            if self.adm.form == "output":
                loss = output_loss(o, y, a, opened * w)
            else:
                if self.adm.form == "head" and self.prediction == "v":
                    w = w * self.schedule.sigma[t].square()  # an error in v, in units of x
                # forward, not the module: its hook would keep the reweighted map for the next step
                heads = [cast(Any, self.networks[role]).conv_out.forward for role in ("student", "teacher")]
                loss = map_loss(self.adm.form, (map_student, map_teacher), heads, a, opened * w)
        losses["consensus"] = self.adm.alpha * loss
        return {"student": losses}, observations(s, opened)

    def _gate(self, t: Tensor) -> Tensor:
        assert self.adm is not None
        if self.adm.gate_time == "none":
            return torch.ones_like(t, dtype=torch.float32)
        back = {"start": 0, "mid": self.stride // 2, "end": self.stride}[self.adm.gate_time]
        return gate(t - back, self.adm.gate * self.schedule.timesteps)
