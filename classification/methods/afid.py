"""AFID, attention-based feature interaction (Su et al., ICDM 2021): two networks reweight each other's maps inside.

Structure and values as in deeplearning-distillation/AFID (network.py, utils.py, train_AFID_*.py), which knows pairs of
identical networks alone. Departures: its CIFAR networks share their stem and their last BatchNorm, and interact before
that BatchNorm; here no weight of a network is shared, and the second interaction reweights the map that the network's
own head takes. What else unequal networks need is said where it is done.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.base import Method, MethodOptions, Output, Outputs
from classification.networks.base import CifarNetwork, ConvBN, init_conv
from classification.options import TrainConfig
from core.adapter import Adapter
from core.adm import Head
from core.distillation import full_precision, kd_loss
from core.errors import InputError
from core.maps import smaller_size
from core.ranges import Index, NonNegative, Positive
from core.training.distiller import Batch, Losses, Progress

FUSION = "fusion"
FUSION_WEIGHT_DECAY = 1e-5


@dataclass(frozen=True)
class AFIDOptions(MethodOptions):
    """Options of AFID.

    Args:
        tau: temperature (original: 3).
        weight: weight of all three imitation losses.
        ramp: epochs over which that weight rises from exp(-5) = 0.007 of itself to the whole; 0 for no rise. A number
            of epochs and no share of the run: one of fewer than 80 never gets there, and one of 20 never passes 0.06.
    """

    tau: Positive = 1.0
    weight: NonNegative = 1.0
    ramp: Index = 80


def ramp_weight(epoch: float, ramp: int, like: Tensor) -> Tensor:
    """``w(e) = exp(-5 (1 - min(e, ramp) / ramp)^2)`` with e the whole epochs done; 1 where ``ramp`` is 0.

    Returns: a scalar on the device of ``like``. From numbers alone, torch.compile would take each epoch's w for a
    constant, compile anew in every epoch, and give up after eight.
    """
    one = full_precision(like.new_ones(()))
    if not ramp:
        return one
    e = (one * epoch).floor().clamp(max=ramp)
    return torch.exp(-5.0 * (1.0 - e / ramp).square())


class ChannelAttention(nn.Module):
    """``CA(x) = sigmoid(f(average of x) + f(maximum of x))``: ``[B, C, H, W] -> [B, C, 1, 1]``.

    ``f``: 1x1 convolution C -> C // 16 (at least 1), ReLU, 1x1 convolution back; no biases.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.f = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.f(x.mean(dim=(2, 3), keepdim=True)) + self.f(x.amax(dim=(2, 3), keepdim=True)))


class SpatialAttention(nn.Module):
    """``m = sigmoid(conv7x7([mean_C u; max_C u])), u = CA(x) x``: ``[B, C, H, W] -> [B, 1, H, W]``, without a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.apply(init_conv)

    def forward(self, x: Tensor) -> Tensor:
        u = self.channel(x) * x
        return torch.sigmoid(self.conv(torch.cat([u.mean(dim=1, keepdim=True), u.amax(dim=1, keepdim=True)], dim=1)))


class Interaction(nn.Module):
    """Crosswise ``x_1 <- m_2 x_1, x_2 <- m_1 x_2``: what each network's map is multiplied by; nothing is detached.

    One attention serves both networks where their maps have the same channels; otherwise each has its own. Where sizes
    differ, m is resized bilinearly to the map that it reweights.
    """

    def __init__(self, channels_1: int, channels_2: int) -> None:
        super().__init__()
        widths = [channels_1] if channels_1 == channels_2 else [channels_1, channels_2]
        self.attentions = nn.ModuleList(SpatialAttention(width) for width in widths)

    def forward(self, x_1: Tensor, x_2: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``[B, C1, H1, W1]`` and ``[B, C2, H2, W2]`` -> m_2 ``[B, 1, H1, W1]`` and m_1 ``[B, 1, H2, W2]``."""
        m_1, m_2 = self.attentions[0](x_1), self.attentions[-1](x_2)
        return _resized(m_2, x_1), _resized(m_1, x_2)


def _resized(m: Tensor, x: Tensor) -> Tensor:
    if m.shape[-2:] == x.shape[-2:]:
        return m
    return F.interpolate(m, size=x.shape[-2:], mode="bilinear", align_corners=False)


class FusionHead(nn.Module):
    """Both last maps -> z_f: concatenation, depthwise 3x3, BatchNorm, ReLU, 1x1 2C -> C, BatchNorm, ReLU; mean, linear.

    Unequal maps are pooled to the smaller size and brought to the smaller width by a 1x1 convolution first.
    """

    def __init__(self, channels_1: int, channels_2: int, num_classes: int) -> None:
        super().__init__()
        width = min(channels_1, channels_2)
        self.adapters = nn.ModuleList(Adapter(channels, width) for channels in (channels_1, channels_2))
        self.depthwise = ConvBN(2 * width, 2 * width, 3, groups=2 * width)
        self.pointwise = ConvBN(2 * width, width, 1)
        self.fc = nn.Linear(width, num_classes)
        self.apply(init_conv)

    def forward_features(self, x_1: Tensor, x_2: Tensor) -> Tensor:
        """Maps ``[B, C1, H1, W1]`` and ``[B, C2, H2, W2]`` -> the fused map ``[B, min(C1, C2), h, w]``."""
        size = smaller_size(x_1, x_2)
        x = torch.cat([phi(x, size) for phi, x in zip(self.adapters, (x_1, x_2), strict=True)], dim=1)
        return F.relu(self.pointwise(F.relu(self.depthwise(x))))

    def forward_head(self, x: Tensor) -> Tensor:
        """The fused map -> logits ``[B, K]``."""
        return self.fc(x.mean(dim=(2, 3)))


Stem = Callable[[Tensor], Tensor]
Stages = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def split_at_stem(network: nn.Module) -> tuple[Stem, Stages]:
    """A network in two parts: images -> the stem's map (behind a max-pooling), and that -> (last map, stage maps).

    Together they give what ``core.network.stage_maps`` gives, but for the last stage's own map, which it replaces by
    the last map. Raises: InputError for a network whose stem is not known.
    """
    if isinstance(network, CifarNetwork):
        return network.forward_stem, network.forward_stages

    from timm.models.efficientnet import EfficientNet
    from timm.models.resnet import ResNet

    model: Any = network
    if isinstance(model, ResNet):
        layers: list[Any] = [model.layer1, model.layer2, model.layer3, model.layer4]
        stem = partial(_through, [model.conv1, model.bn1, model.act1, model.maxpool])
        return stem, partial(_maps, layers, range(1, 5), [])
    if isinstance(model, EfficientNet):  # its activations are inside bn1 and bn2
        ends = [info["stage"] for info in model.feature_info if info["reduction"] > 2]
        stem = partial(_through, [model.conv_stem, model.bn1])
        return stem, partial(_maps, model.blocks, ends, [model.conv_head, model.bn2])
    name = type(network).__name__
    raise InputError(
        f"AFID does not know where the stem of {name} ends: it knows the CIFAR networks, and timm's ResNet and "
        "EfficientNet classes (resnet*, mobilenetv1_*, mobilenetv2_*, ...)"
    )


def _through(parts: Iterable[nn.Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


def _maps(
    blocks: Iterable[nn.Module], ends: Collection[int], tail: Iterable[nn.Module], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The last map behind ``tail``, and the map behind each block whose number (from 1) is in ``ends``."""
    maps = []
    for number, block in enumerate(blocks, start=1):
        x = block(x)
        if number in ends:
            maps.append(x)
    return _through(tail, x), maps


class AFID(Method):
    """Two networks and a fusion head: ``sum CE + w(e) [KL(1 <- f) + KL(2 <- f) + KL(f <- e)]``, z_e = (z_1 + z_2) / 2.

    The networks interact behind their stems and at their last maps; the fusion head reads the last maps before that.
    At test time each network needs the other: both run, and z_1 and z_2 are what counts.

    The second interaction is the first thing that a head does here, so ADM, too, takes the last maps in front of it:
    ``docs/design.md`` says why.
    """

    Options = AFIDOptions
    takes_average = False

    export_note = (
        "trained by AFID, it needs its peer's attention at test time; alone it is not the network that was trained, "
        "and its figures are not AFID's: evaluate the run folder, which runs both"
    )

    after_stem: Interaction
    after_stages: Interaction
    fusion: FusionHead

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        if len(roles) != 2:
            raise InputError(f"AFID trains exactly two networks, and there are {len(roles)}: {', '.join(roles)}")

    @torch.no_grad()
    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        if len({sample.shape for sample in samples.values()}) > 1:
            raise InputError(
                "AFID's networks weigh each other's maps place by place: give both one networks.<role>.size, or none"
            )
        stems, lasts = [], []
        for role, network in networks.items():
            probe = copy.deepcopy(network).eval()  # a copy: neither mode nor statistics of the network may change
            stem, stages = split_at_stem(probe)
            stems.append(stem(samples[role]))
            lasts.append(stages(stems[-1])[0])
        classes = probe.forward_head(lasts[-1]).shape[1]  # type: ignore[operator]
        self.after_stem = Interaction(stems[0].shape[1], stems[1].shape[1])
        self.after_stages = Interaction(lasts[0].shape[1], lasts[1].shape[1])
        self.fusion = FusionHead(lasts[0].shape[1], lasts[1].shape[1], classes)
        return networks

    def output_roles(self, roles: Sequence[str]) -> list[str]:
        return [*roles, FUSION]

    def forward(
        self, networks: Mapping[str, nn.Module], views: Mapping[str, Tensor], learning: Collection[str] | None = None
    ) -> Outputs:
        (role_1, network_1), (role_2, network_2) = networks.items()
        (stem_1, stages_1), (stem_2, stages_2) = split_at_stem(network_1), split_at_stem(network_2)
        x_1, x_2 = stem_1(views[role_1]), stem_2(views[role_2])
        m_2, m_1 = self.after_stem(x_1, x_2)
        (last_1, maps_1), (last_2, maps_2) = stages_1(m_2 * x_1), stages_2(m_1 * x_2)
        m_2, m_1 = self.after_stages(last_1, last_2)
        return {
            role_1: Output.of([*maps_1[:-1], last_1], _interacting(self.head_of(network_1), m_2)),
            role_2: Output.of([*maps_2[:-1], last_2], _interacting(self.head_of(network_2), m_1)),
            FUSION: Output.of([self.fusion.forward_features(last_1, last_2)], self.fusion.forward_head),
        }

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        options: AFIDOptions = self.options
        losses = {role: {"ce": self.criterion(output.logits, batch["target"])} for role, output in outputs.items()}
        if options.weight:
            z_1, z_2 = (output.logits for role, output in outputs.items() if role != FUSION)
            weight = options.weight * ramp_weight(progress.epoch, options.ramp, z_1)
            for role, output in outputs.items():
                imitated = (z_1 + z_2) / 2 if role == FUSION else outputs[FUSION].logits
                losses[role]["kd"] = weight * kd_loss(output.logits, imitated, options.tau)
        return losses

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The attention as the networks; the fusion head by Nesterov's momentum (none where momentum is 0)."""
        attention = [*self.after_stem.parameters(), *self.after_stages.parameters()]
        fusion = list(self.fusion.parameters())
        return [{"params": attention}, {"params": fusion, "nesterov": True, "weight_decay": FUSION_WEIGHT_DECAY}]

    def export(self, role: str, network: nn.Module) -> nn.Module:
        warnings.warn(f"{role}: {self.export_note}", stacklevel=3)
        return network


def _interacting(head: Head, m: Tensor) -> Head:
    """The head of a network whose map is multiplied by its peer's ``m`` ``[B, 1, H, W]`` first."""
    return lambda x: head(m * x)
