"""Teacher and student: the module that ``core.training.fit`` trains for image classification."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods import ADM, Method, Outputs
from classification.networks import create_network
from classification.networks.libraries import folder_of, said_of
from classification.networks.pretrained import check_weights, load_weights
from classification.networks.state import OtherClasses
from classification.optimizer import network_groups
from classification.options import NetworkConfig, OptimizerConfig
from classification.predictions import PreviousPredictions
from core.adm import ADMConfig
from core.checks import check_network
from core.errors import InputError, notice
from core.parts import as_network
from core.training.average import SUFFIX, averaged_role
from core.training.distiller import Batch, Distiller, Losses, Progress
from core.training.seed import seed_everything


class ClassificationDistiller(Distiller):
    """Networks by role, a method, and ADM on top of it or not.

    Args: the networks (see ``build_networks``); their configs; mean and std of each role, in [0, 1]; the method; ADM's
        config or None; the optimiser's config; one small uint8 batch ``[B, C, H, W]``, for the start-up checks.
    Raises: InputError where a network or a pair cannot be trained so.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        configs: Mapping[str, NetworkConfig],
        normalisation: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        method: Method,
        adm: ADMConfig | None,
        optimizer: OptimizerConfig,
        sample: Tensor,
        *,
        num_classes: int,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.configs, self.normalisation, self.optimizer = dict(configs), dict(normalisation), optimizer
        self.num_classes, self.method, self.channels_last = num_classes, method, channels_last
        for role, (mean, std) in self.normalisation.items():
            if not len(mean) == len(std) == sample.shape[1] or min(std) <= 0:
                raise InputError(f"{role}: mean and std need {sample.shape[1]} values each, std positive ones")
            # (x / 255 - mean) / std as one multiplication and one addition on the raw 0 .. 255 values
            scale = 1.0 / (255.0 * torch.tensor(std))
            shift = -torch.tensor(mean) * 255.0 * scale
            self.register_buffer(f"scale_{role}", scale.view(-1, 1, 1), persistent=False)
            self.register_buffer(f"shift_{role}", shift.view(-1, 1, 1), persistent=False)
        normalised = self.views(sample, list(networks))
        adapted = {
            role: _adapted(role, configs[role].name, network, normalised[role]) for role, network in networks.items()
        }
        self.networks = nn.ModuleDict(method.prepare(adapted, normalised))
        if channels_last:
            self.networks.to(memory_format=torch.channels_last)
        self.phases = method.phases(list(self.networks))
        self.unused_parameters = len(self.phases) > 1
        self.manual_grad_sync = method.manual_grad_sync
        self.output_roles = method.output_roles(list(self.networks))
        self.pairs = method.pairs(self.output_roles)
        self.adm: ADM | None = None
        if adm is not None:
            for role, network in self.networks.items():
                check_network(network, normalised[role], role)
            self.adm = ADM(adm, self.outputs(sample), self.pairs, method.criterion)
        if any(self._in_parts(role) for role in self.networks):
            self.parameter_groups()  # refuses what it must before anything is written
        self.held_out: Iterable[Batch] | None = None
        self.mixing: Callable[[Batch, Progress], Batch] | None = None  # mixup and cutmix of the training batches
        self._keeps_logits = type(method).after_step is not Method.after_step or self.previous is not None
        self._logits: list[dict[str, Tensor]] = []  # of the parts of this step (of its last phase)
        self._gates: dict[str, Tensor] = {}  # of this step: 1 where any of its parts trains the role

    @property
    def previous(self) -> PreviousPredictions | None:
        """What the teachers said in the epoch before, where ADM's divergence imitates it (Eq. 12)."""
        return self.adm.previous if self.adm is not None else None

    @property
    def scored_roles(self) -> list[str]:
        """Whatever gives logits in evaluation: ``output_roles``, and the averages."""
        return [*self.output_roles, *self.moving_averages]

    @property
    def takes_one(self) -> bool:
        """Whether the method runs any of its networks alone."""
        return self.method.separable or type(self.method).forward is Method.forward

    def network(self, role: str) -> nn.Module:
        """The network or the average of this role."""
        return self.moving_averages[role] if role in self.moving_averages else self.networks[role]

    def add_average(self, role: str) -> nn.Module:
        """A new place for the average of a network's weights, for a run that has ended; returns it."""
        name = averaged_role(role)
        self.moving_averages[name] = copy.deepcopy(self.networks[role]).requires_grad_(False)
        self.configs[name], self.normalisation[name] = self.configs[role], self.normalisation[role]
        return self.moving_averages[name]

    def views(self, images: Tensor, roles: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Raw images ``[B, C, H, W]`` or, a view for each role, ``[B, V, C, H, W]``, uint8 -> normalised, by role.

        Each network has its own size; of equal size and normalisation they share a tensor.
        """
        made: dict[Any, Tensor] = {}
        result = {}
        for index, role in enumerate(roles or self.networks):
            key = (self.normalisation[role], self.configs[role].size, index if images.dim() == 5 else 0)
            if key not in made:
                raw = (images[:, index] if images.dim() == 5 else images).float()
                x = self.resized(raw, role).mul_(getattr(self, f"scale_{role}")).add_(getattr(self, f"shift_{role}"))
                made[key] = x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
            result[role] = made[key]
        return result

    def resized(self, images: Tensor, role: str) -> Tensor:
        """Images float ``[B, C, H, W]`` in this network's own size: themselves where it has none."""
        size = self.configs[role].size
        if size is None or images.shape[-2:] == (size, size):
            return images
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    def train(self, mode: bool = True) -> ClassificationDistiller:
        """A network that is not trained stays in evaluation mode: its BatchNorm statistics must not move."""
        super().train(mode)
        trained = self.trained()
        for role, network in self.networks.items():
            if role not in trained:
                network.eval()
        return self

    @torch.no_grad()
    def outputs(self, images: Tensor, without: Collection[str] = ()) -> Outputs:
        """Evaluation: what each network says about raw images ``[B, C, H, W]``; nothing moves.

        Averages of networks come behind them, by their own roles.
        ``without``: averages to leave out, and networks of a method that is ``separable``.
        """
        training = self.training
        self.eval()
        try:
            networks = {role: network for role, network in self.networks.items() if role not in without}
            outputs = self.method(networks, self.views(images, list(networks)))
            for name, average in self.moving_averages.items():
                if name not in without:
                    role = name.removesuffix(SUFFIX)
                    together = {role: average} if self.takes_one else {**self.networks, role: average}
                    outputs[name] = self.method(together, self.views(images, list(together)))[role]
            return outputs
        finally:
            self.train(training)

    def before_step(self, batch: Batch, progress: Progress) -> Batch:
        self._logits = []
        if self.mixing is not None:
            batch = self.mixing(batch, progress)
        if self.method.needs_held_out and progress.starts_epoch:
            if self.held_out is None:
                raise InputError(f"{type(self.method).__name__} needs held-out images: give --data.validation 0.1")
            self.method.before_epoch(int(progress.epoch), self._logits_of(self.held_out))
        return batch if self.previous is None else self.previous.before_step(batch, progress)

    def _logits_of(self, batches: Iterable[Batch]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        device = next(self.parameters()).device
        for batch in batches:
            outputs = self.outputs(batch["image"].to(device, non_blocking=True), self.moving_averages.keys())
            yield {role: o.logits for role, o in outputs.items()}, batch["target"].to(device, non_blocking=True)

    def forward(self, batch: Batch, progress: Progress, phase: Any = None) -> tuple[Losses, dict[str, Tensor]]:
        learning = phase or self.phases[0]
        outputs = self.method(self.networks, self.views(batch["image"]), learning)
        losses = {r: dict(terms) for r, terms in self.method.losses(outputs, batch, progress).items() if r in learning}
        gates = self.method.gates
        if self.adm is not None:
            for role, terms in self.adm.losses(outputs, batch, progress, learning).items():
                if role in gates:  # times 0 and not left out: every process must reduce the same gradients
                    terms = {term: value * gates[role] for term, value in terms.items()}
                losses.setdefault(role, {}).update(terms)
        for role, gate in gates.items():
            self._gates[role] = torch.maximum(self._gates[role], gate) if role in self._gates else gate
        if self._keeps_logits:
            self._logits.append({role: output.logits.detach() for role, output in outputs.items()})
        return losses, {f"{role}/paused": 1.0 - gate for role, gate in gates.items()}

    def backward(self, losses: Losses, total: Tensor, accelerator: Any) -> None:
        self.method.backward(losses, total, accelerator)

    def before_update(self) -> None:
        if self.method.manual_grad_sync:
            self.method.before_update([p for group in self.parameter_groups() for p in group["params"]])
        if self._gates:  # the one value that a step reads from the device, and only where a role may pause
            learns = torch.stack(list(self._gates.values())).tolist()
            roles, self._gates = list(self._gates), {}
            for role, learning in zip(roles, learns, strict=True):
                if not learning:  # without a gradient, the optimiser skips momentum and weight decay too
                    for parameter in self.parameters_of(role):
                        parameter.grad = None

    def after_step(self, batch: Batch, progress: Progress) -> None:
        if self._keeps_logits:
            parts = self._logits[-(len(self._logits) // len(self.phases)) :]  # those of the last phase
            logits = {role: torch.cat([part[role] for part in parts]) for role in parts[0]}
            self._logits = []
            self.method.after_step(batch, logits, progress)
            if self.previous is not None:
                self.previous.after_step(logits, progress)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """What is trained of a network, with a student's adapters."""
        adapters = self.adm.adapters_of(role) if self.adm is not None else []
        return [p for p in self.networks[role].parameters() if p.requires_grad] + adapters

    def _in_parts(self, role: str) -> bool:
        """Whether a network has parts of different rate or weight decay."""
        optimizer = self.optimizer
        return (
            optimizer.filter_bias_and_bn
            or optimizer.layer_decay is not None
            or self.configs[role].backbone_lr_factor is not None
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        usual: dict[str, Any] = {}  # rate and weight decay of the network before
        for role, network in self.networks.items():
            if parameters := self.parameters_of(role):
                usual = {"lr": self.optimizer.rate(self.configs[role]), "weight_decay": self.optimizer.weight_decay}
                if not self._in_parts(role):
                    groups.append({"params": parameters, **usual})
                    continue
                groups += network_groups(
                    network, f"networks.{role}", **usual, backbone_lr_factor=self.configs[role].backbone_lr_factor,
                    filter_bias_and_bn=self.optimizer.filter_bias_and_bn, layer_decay=self.optimizer.layer_decay,
                )  # fmt: skip
                if adapters := self.adm.adapters_of(role) if self.adm is not None else []:
                    groups.append({"params": adapters, **usual})
        return groups + [{**usual, **group} for group in self.method.parameter_groups()]

    def export(self, role: str) -> nn.Module:
        return self.method.export(role, self.network(role))

    def metadata(self, role: str) -> dict[str, str]:
        mean, std = (json.dumps(list(values)) for values in self.normalisation[role])
        said = {"role": role, "architecture": self.configs[role].name, "num_classes": str(self.num_classes)}
        note = {"export_note": self.method.export_note} if self.method.export_note else {}
        size = {"size": str(self.configs[role].size)} if self.configs[role].size is not None else {}
        return {**said, "mean": mean, "std": std, **size, **note}


def _adapted(role: str, name: str, network: nn.Module, images: Tensor) -> nn.Module:
    try:
        return as_network(network, images)
    except InputError as error:
        raise InputError(f"{role} ({name}): {error}") from error


def build_networks(
    configs: Mapping[str, NetworkConfig],
    num_classes: int,
    seed: int,
    files: Mapping[str, Path] | None = None,
    *,
    training: bool = True,
    learning: Collection[str] = (),
    new_heads: dict[str, int] | None = None,
) -> dict[str, nn.Module]:
    """The networks by role, each initialised from (seed, role) alone: a student starts alike whatever trains beside it.

    Args:
        files: the weight file of each network that starts from one.
        training: as in ``load_weights``.
        learning: the roles that learn: where their weights are of other classes, the classifier is made anew, and a
            line says so. Any other is refused then.
        new_heads: gets these roles, each with the number of classes of its weights.
    Raises: InputError for an unknown role or network, or weights that do not fit.
    """
    networks: dict[str, nn.Module] = {}
    for role, config in configs.items():
        if role.partition("_")[0] not in ("teacher", "student"):
            raise InputError(f"unknown role {role!r}: networks are teacher, teacher_2, ..., student, student_2, ...")
        seed_everything(seed, "network", role)
        fetched = config.pretrained and folder_of(config.name) is None  # a folder's weights are among the files
        network = networks[role] = create_network(config.name, num_classes, pretrained=fetched)
        try:
            classes = _start(network, role, config, num_classes, (files or {}).get(role), training, role in learning)
        except OtherClasses as error:
            if not training:
                raise
            mend = f"{role} is fixed and cannot learn a new head: train it on these classes first"
            raise InputError(f"{error}; {mend}") from error
        if classes is not None:
            lead = "warning: " if role.startswith("teacher") else "note: "
            random = ", and it knows nothing of these classes until it is trained" if role.startswith("teacher") else ""
            notice(
                f"{lead}{role} ({config.name}): its head is made anew for {num_classes} classes, since its weights "
                f"are for {classes}{random}"
            )
            if new_heads is not None:
                new_heads[role] = classes
    return networks


def _start(
    network: nn.Module,
    role: str,
    config: NetworkConfig,
    num_classes: int,
    file: Path | None,
    training: bool,
    new_head: bool,
) -> int | None:
    """Loads the weights that a network starts from; returns for how many classes they are where its head is new."""
    if file is not None:
        check_weights(file, role, config.name, None if new_head else num_classes, config.sha256)
        return load_weights(network, file, training=training, new_head=new_head)
    if not config.pretrained:
        return None
    own = getattr(network, "pretrained_cfg", None) or said_of(config.name)
    classes = own.get("num_classes")
    if classes in (None, 0, num_classes):
        return None
    if not new_head and training:
        raise OtherClasses(f"the weights of {config.name} are for {classes} classes, but {role} has {num_classes}")
    return classes
