"""ADM's consensus loss where there are no classes: a regression whose error counts more where the maps agree.

The paper prints Eq. 6, 7 and 11 for classifiers only, and no code of it for diffusion is public. Here, with the
student's output o, the detached target y* it regresses ``[B, C, H, W]``, the maps F_s, F_t ``[B, C', h, w]``, the base
loss's weight w and a gate g of each image ``[B]``:

    S    = cos over channels (F_t, F_s)                                Eq. 6, detached, float32
    A    = (1 + S) / (1 + S_bar + 1e-5)                                Eq. 7's attention, mean 1 for each image
    L_co = 1/B sum_i g_i w_i mean_{C, H, W} (A_i (o_i - y*_i)^2)       form "output"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core.adm import Control, Head, consensus_attention, consensus_kd_loss, control, spatial_similarity
from core.distillation import full_precision
from core.errors import InputError
from core.network import Network
from core.ranges import Factor, NonNegative, check_ranges
from core.split import Split
from diffusion.proxies import load_resnet, resnet_depth


@dataclass(frozen=True)
class ConsensusConfig:
    """The consensus loss of a diffusion student. Where the paper is silent, the default is what this project decided.

    Args:
        alpha: weight of the consensus loss; 1.0 as in the paper's offline distillation on CIFAR (0.1 on ImageNet), for
            both losses have the same unit.
        form: "output" weighs the squared error of the output, Eq. 7 for a regression: the mean weight is 1, and the
            minimum stays where student and target are equal (default). "head" compares what both heads make of their
            reweighted maps, the letter of Eq. 11. "feature" weighs the squared difference of the maps, a feature loss
            that plain distillation does not have. "classifier" is Eq. 11 through a frozen image classifier.
        control: none is ADM. Two controls, without which no gain may be called ADM's, for the term also raises the
            weight of the gated times: uniform sets A = 1, shuffled permutes S over the places of each image.
        centre: subtract each channel's spatial mean before the similarity. Off, Eq. 6 as written (default), although A
            then stays within a few percent of 1 (docs/results.md), so that it weighs hardly anything.
        gate: the loss acts at times below this share of T; the paper's t < 400 of 1000.
        classifier: file of the frozen classifier of form "classifier"; a CIFAR ResNet, as resnet56:FILE.
    """

    alpha: NonNegative = 1.0
    form: Literal["output", "head", "feature", "classifier"] = "output"
    control: Control = "none"
    centre: bool = False
    gate: Factor = 0.4
    classifier: str | None = None

    def __post_init__(self) -> None:
        check_ranges("adm.", self)
        if (self.form == "classifier") != (self.classifier is not None):
            raise InputError(
                "adm.form classifier needs --adm.classifier resnet56:FILE, and no other form has a use for it: "
                f"form {self.form}, classifier {self.classifier}"
            )


def gate(time: Tensor, limit: float) -> Tensor:
    """1 where ``time`` ``[B]`` is below the limit, else 0, ``[B]`` float32: a factor, so that nothing waits for it.

    The loss is divided by B and not by the number of open gates: its expected gradient is then constant, it is never
    0/0, and the mean over processes is the mean over the whole batch.
    """
    return (time < limit).float()


def similarity(map_student: Tensor, map_teacher: Tensor, centre: bool = False) -> Tensor:
    """Eq. 6: S ``[B, h, w]``, detached; with ``centre`` of maps without their channels' spatial means."""
    if centre:
        map_student, map_teacher = (m - m.mean((2, 3), keepdim=True) for m in (map_student, map_teacher))
    return spatial_similarity(map_student, map_teacher)


def output_loss(output: Tensor, target: Tensor, a: Tensor, factor: Tensor) -> Tensor:
    """Form "output": ``1/B sum_i factor_i mean (A_i (o_i - y*_i)^2)``, a scalar; factor ``[B]`` is g w.

    A ``[B, 1, h, w]`` of another size than the images (a DiT's token covers 2 x 2 of them) is repeated to it.
    """
    error = (full_precision(output) - full_precision(target.detach())).square()  # [B, C, H, W]
    if a.shape[-2:] != error.shape[-2:]:
        a = F.interpolate(a, size=error.shape[-2:], mode="nearest")
    return _mean(a * error, factor)


def map_loss(form: str, maps: Sequence[Tensor], heads: Sequence[Head], a: Tensor, factor: Tensor) -> Tensor:
    """Form "feature", ``1/B sum_i factor_i mean (A_i (F_t - F_s)^2)``, or "head", the letter of Eq. 11:
    ``1/B sum_i factor_i mean (h_s(A F_s) - h_t(A F_t))^2``. Maps and heads are the student's, then the teacher's."""
    ours, theirs = maps
    if form == "feature":
        return _mean(a * (full_precision(theirs.detach()) - full_precision(ours)).square(), factor)
    with torch.no_grad():
        target = full_precision(heads[1](a.to(theirs.dtype) * theirs))
    return _mean((full_precision(heads[0](a.to(ours.dtype) * ours)) - target).square(), factor)


def classifier_loss(
    output: Tensor, target: Tensor, network: Network, factor: Tensor, kind: Control = "none"
) -> tuple[Tensor, Tensor]:
    """Form "classifier": Eq. 11 through a frozen classifier of images in [-1, 1]. Returns: (a scalar, S).

    S and A are those of the classifier's own last maps; ``factor`` ``[B]`` is the gate alone, for a divergence of two
    class distributions is no error in x.
    """
    with torch.no_grad():
        map_target = network.forward_features(target.detach())
    map_output, head = network.forward_features(output), network.forward_head
    s = similarity(map_output, map_target)
    return consensus_kd_loss(control(s, kind), map_output, map_target, head, head, weight=factor), s


def load_classifier(name: str) -> Split:
    """The frozen classifier of form "classifier", from "resnet56:FILE": images ``[B, 3, 32, 32]`` in [-1, 1] -> logits.

    Raises: InputError for another name, or a missing or unfitting file.
    """
    kind, _, file = name.partition(":")
    if not file or not resnet_depth(kind):
        raise InputError(f"unknown adm.classifier {name!r}: a CIFAR ResNet and its file, as resnet56:FILE")
    network = load_resnet(resnet_depth(kind), file).eval().requires_grad_(False)
    return Split(
        features=lambda m, x: m.forward_features(127.5 * x + 127.5),
        head=lambda m, f: m.network.forward_head(f),
        model=network,
    )


def _mean(error: Tensor, factor: Tensor) -> Tensor:
    return (factor.to(error.dtype) * error.mean((1, 2, 3))).mean()


def observations(s: Tensor, opened: Tensor) -> dict[str, Tensor]:
    """What to log: of S ``[B, h, w]``, of ADM's attention within an image (the controls' too), of the gates ``[B]``."""
    return {
        "adm/similarity": s.mean(),
        "adm/similarity_min": s.amin(),
        "adm/similarity_max": s.amax(),
        "adm/attention_std": consensus_attention(s).flatten(1).std(dim=1, unbiased=False).mean(),
        "adm/active": opened.mean(),
    }
