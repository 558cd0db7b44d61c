"""NORM, N-to-one representation matching (Liu et al., ICLR 2023): one student map, expanded, against N teacher maps.

Sources: the paper, and OSVAI/NORM (helper/loops.py, models/*/*_student.py). One departure: the feature transform always
stands right before the average pooling, behind the last ReLU. There the official code has it too, but for WRN, where a
BatchNorm and a ReLU follow and the transform could not be folded into the classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.base import MethodOptions, Output, Outputs, probe, standardised
from classification.networks.base import CifarNetwork, ConvBN, classifier_of, init_conv
from core.adm import Head
from core.distillation import full_precision
from core.errors import InputError
from core.maps import smaller_size
from core.network import preserved, stage_maps
from core.ranges import NonNegative, Positive, Size
from core.training.distiller import Progress
from offline_kd.methods.kd import KD

SCHEDULES: dict[str, tuple[float, tuple[float, ...], tuple[float, ...]]] = {
    "cifar": (240, (10, 20, 180, 210), (0.1, 0.5, 1.0, 0.5, 0.1)),
    "imagenet": (100, (5, 15, 60, 80), (0.1, 0.5, 0.9, 0.5, 0.1)),
    "constant": (1, (), (1.0,)),
}
"""s(e) of the feature loss: the epochs of the whole run, those from which on the next factor holds, the factors."""


@dataclass(frozen=True)
class NORMOptions(MethodOptions):
    """Options of NORM. The defaults are those for CIFAR-100; for ImageNet: ce 1, schedule imagenet.

    Args:
        ce: weight of the cross-entropy (original: per pair 0.0625 to 0.5; 0.1 for resnet32x4 -> resnet8x4).
        kd: weight of the imitation of the teacher's logits, which plain NORM does without.
        feature: weight of the feature loss.
        tau: temperature.
        scale: c, the standard deviation that every logit vector is given.
        n: N, how many times the student's map is expanded to the teacher's channels.
        schedule: the factor on the feature loss over the epochs: cifar rises from 0.1 over 0.5 to 1 and falls back
            (from epochs 10, 20, 180, 210 of 240 on), imagenet over 0.5 to 0.9 (5, 15, 60, 80 of 100), constant is 1.
            Runs of another length take the same shares of it.
    """

    ce: NonNegative = 0.1
    kd: NonNegative = 0.0
    feature: NonNegative = 1.0
    tau: Positive = 4.0
    scale: Positive = 2.5
    n: Size = 8
    schedule: Literal["cifar", "imagenet", "constant"] = "cifar"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ce and not self.kd:
            raise InputError("norm.ce and norm.kd are both 0: nothing would train the classifier")


def norm_loss(expanded: Tensor, map_teacher: Tensor) -> Tensor:
    """``N mean (e - repeat_N(F_t))^2``: the sum over e's N channel segments of their mean squared errors to F_t.

    Args: e ``[B, N Ct, h, w]``; the teacher's map ``[B, Ct, H, W]``, which is detached. Where sizes differ, the larger
        is max-pooled to the smaller.
    Returns: a scalar in float32 at least. Raises: ValueError where e's channels are no multiple of the teacher's.
    """
    channels = map_teacher.shape[1]
    if expanded.shape[1] % channels:
        raise ValueError(f"{expanded.shape[1]} channels are no multiple of the teacher's {channels}")
    size = smaller_size(expanded, map_teacher)
    e, t = full_precision(_max_pool_to(expanded, size)), full_precision(_max_pool_to(map_teacher.detach(), size))
    segments = e.unflatten(1, (-1, channels))  # [B, N, Ct, h, w]
    return segments.shape[1] * F.mse_loss(segments, t[:, None].expand_as(segments))


def _max_pool_to(feature_map: Tensor, size: tuple[int, ...]) -> Tensor:
    return feature_map if feature_map.shape[-2:] == size else F.adaptive_max_pool2d(feature_map, size)


class FeatureTransform(nn.Module):
    """FT: ``e = BN(conv1x1(x))`` with N Ct channels, ``x' = x + BN(conv1x1(e))``; linear, but for batch statistics."""

    def __init__(self, channels: int, teacher_channels: int, n: int) -> None:
        super().__init__()
        self.expand = ConvBN(channels, n * teacher_channels, 1)
        self.contract = ConvBN(n * teacher_channels, channels, 1)
        self.apply(init_conv)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The student's map x ``[B, C, H, W]`` -> e ``[B, N Ct, H, W]`` and x' ``[B, C, H, W]``."""
        e = self.expand(x)
        return e, x + self.contract(e)


def affine_of(part: ConvBN) -> tuple[Tensor, Tensor]:
    """A ``[out, in]`` and d ``[out]`` of a 1x1 convolution and its BatchNorm in evaluation mode, ``A x + d``; float64.

    ``A = diag(g / sqrt(v + eps)) W``, ``d = beta - g m / sqrt(v + eps)``.
    """
    bn = part.bn
    assert bn.running_mean is not None and bn.running_var is not None
    gain = bn.weight.double() * torch.rsqrt(bn.running_var.double() + bn.eps)
    return gain[:, None] * part.conv.weight.double().flatten(1), bn.bias.double() - gain * bn.running_mean.double()


@torch.no_grad()
def fold(transform: FeatureTransform, classifier: nn.Linear, into: nn.Linear) -> None:
    """Writes to ``into`` what says of the pooled x what ``classifier`` says of the pooled x', in evaluation mode.

    ``x' = A x + d`` with ``A = A2 A1 + I``, ``d = A2 d1 + d2``; so the weight is ``W A`` and the bias ``W d + b``.
    """
    (a_1, d_1), (a_2, d_2) = affine_of(transform.expand), affine_of(transform.contract)
    w = classifier.weight.double()
    into.weight.copy_((w @ a_2) @ a_1 + w)
    into.bias.copy_(w @ (a_2 @ d_1 + d_2) + classifier.bias.double())


@dataclass
class Expanded(Output):
    """The student's output, with e ``[B, N Ct, h, w]``."""

    e: Tensor


class NORM(KD):
    """``L = ce CE(z_s) + kd KL(p_s <- p_t) + s(e) feature L_norm``, all logits standardised with ``scale``.

    The student's last map, for ADM too, is x', which enters the pooling and may be negative. The transform and the
    classifier that learns behind it belong to the method: the student network's own classifier is their folded form,
    made anew whenever its weights are read (for a checkpoint, say). A weight file of the student thus is a plain
    network of its architecture that predicts what the student in training does.
    """

    Options = NORMOptions
    takes_average = False

    transform: FeatureTransform
    classifier: nn.Linear
    milestones: Tensor
    factors: Tensor

    def __init__(self, options: Any = None, *, with_adm: bool = False) -> None:
        super().__init__(options, with_adm=with_adm)
        self.epochs, milestones, factors = SCHEDULES[self.options.schedule]
        self.register_buffer("milestones", torch.tensor(milestones), persistent=False)
        self.register_buffer("factors", torch.tensor(factors), persistent=False)

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """Lets both networks hand out activated maps; builds the transform, and the classifier behind it.

        Raises: InputError for a teacher without a map, or a student whose head is not pooling and a linear layer.
        """
        networks = super().prepare(networks, samples)
        maps = {}
        for role, network in networks.items():
            if isinstance(network, CifarNetwork):
                network.preact = False  # a ReLU behind x' would be one too many, and could not be folded
            maps[role] = probe(network, samples[role])[-1]
        if maps["teacher"].dim() != 4:
            raise InputError(f"norm needs a teacher with a map [B, C, H, W], and its is {tuple(maps['teacher'].shape)}")
        student = networks["student"]
        folded = classifier_of(student)
        _check_head(student, folded, maps["student"])
        self.transform = FeatureTransform(folded.in_features, maps["teacher"].shape[1], self.options.n)
        self.classifier = copy.deepcopy(folded)
        folded.requires_grad_(False)
        folded.register_state_dict_pre_hook(self._fold)
        return networks

    def _fold(self, layer: nn.Linear, *_: Any) -> None:
        fold(self.transform, self.classifier, into=layer)

    def forward(
        self, networks: Mapping[str, nn.Module], views: Mapping[str, Tensor], learning: Collection[str] | None = None
    ) -> Outputs:
        """Either network may be left out."""
        outputs = super().forward({r: n for r, n in networks.items() if r == "teacher"}, views, learning)
        if "student" in networks:
            x, maps = stage_maps(networks["student"], views["student"])
            e, x = self.transform(x)
            head = standardised(lambda x: self.classifier(x.mean(dim=(2, 3))), self.options.scale)
            outputs["student"] = Expanded(head(x), [*maps[:-1], x], head, e)
        return outputs

    def head_of(self, network: nn.Module) -> Head:
        return standardised(super().head_of(network), self.options.scale)

    def terms(self, student: Output, teacher: Output, target: Tensor, progress: Progress) -> dict[str, Tensor]:
        options: NORMOptions = self.options
        assert isinstance(student, Expanded)
        terms = super().terms(student, teacher, target, progress) if options.kd else {}
        if options.feature:
            weight = options.feature * self.factor(progress)
            terms["norm"] = weight * norm_loss(student.e, teacher.maps[-1])
        return terms

    def factor(self, progress: Progress) -> Tensor:
        """s(e), a scalar. It is looked up on the device: numbers alone would make torch.compile compile each step."""
        epoch = progress.epoch * self.epochs / progress.epochs
        return self.factors.take((self.milestones - epoch <= 0).sum())

    def export(self, role: str, network: nn.Module) -> nn.Module:
        if role == "student":
            self._fold(classifier_of(network))
        return network


@torch.no_grad()
def _check_head(network: nn.Module, classifier: nn.Linear, feature_map: Tensor) -> None:
    """Raises: InputError where a head is more than ``classifier`` of the pooled map: folding could not be exact."""
    name = type(network).__name__
    if classifier.out_features < 3:
        raise InputError("norm needs 3 classes: standardised logits of two say nothing but which is the larger")
    if classifier.bias is None:
        raise InputError(f"norm needs a student whose linear layer has a bias, and {name}'s has none")
    plain = feature_map.dim() == 4 and feature_map.shape[1] == classifier.in_features
    if plain:
        signed = torch.randn(feature_map.shape, generator=torch.Generator().manual_seed(0)).to(feature_map)
        with preserved(network, feature_map):
            said = network.eval().forward_head(signed)  # type: ignore[operator]
        plain = torch.allclose(said, classifier(signed.mean(dim=(2, 3))), rtol=1e-3, atol=1e-4)
    if not plain:
        raise InputError(
            f"norm needs a student whose head is average pooling and one linear layer, with nothing before or between: "
            f"{name} has another"
        )
