"""CIFAR ResNets: 6n+2 layers with basic blocks, their widened variants, and ResNet-50 with bottlenecks.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, in the form of
HobbitLong/RepDistiller (models/resnet.py, models/resnetv2.py); option A as in akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, NumberedConvs, init_conv, make_stages
from core.errors import unknown


class SubsampleShortcut(nn.Module):
    """Option A: every second pixel, and zero channels in equal parts before and behind. No parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        added = channels - in_channels
        self.padding = (0, 0, 0, 0, added // 2, added - added // 2)  # width, height, channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def make_shortcut(kind: str, in_channels: int, channels: int, stride: int) -> nn.Module:
    """The identity where the shape stays, else option A (no parameters) or B (1x1 convolution and BatchNorm)."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    if kind == "A":
        return SubsampleShortcut(in_channels, channels, stride)
    return ConvBN(in_channels, channels, 1, stride)


class BasicBlock(NumberedConvs):
    """Two 3x3 convolutions and a shortcut; ends before its ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__((in_channels, channels, 3, stride), (channels, channels, 3))
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(2, self.active(1, x))
        y += self.shortcut(x)
        return y


class Bottleneck(NumberedConvs):
    """1x1, 3x3 (with the stride) and 1x1 convolution from a quarter of the channels to all, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        width = channels // self.expansion
        super().__init__((in_channels, width, 1), (width, width, 3, stride), (width, channels, 1))
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(3, self.active(2, self.active(1, x)))
        y += self.shortcut(x)
        return y


class ResNet(CifarNetwork):
    """A 3x3 stem without pooling, then stages of residual blocks with strides 1, 2, 2, ...

    Args:
        blocks: number of blocks in each stage; n, n, n makes a ResNet of 6n+2 layers.
        widths: width of each stage (a bottleneck puts out four times as many channels).
        stem_width: channels of the stem.
        shortcut: "A" or "B", see ``make_shortcut``.
    """

    inits = (init_conv,)

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        preact: bool = True,
        *,
        blocks: Sequence[int],
        widths: Sequence[int] = (16, 32, 64),
        stem_width: int = 16,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        shortcut: Literal["A", "B"] = "B",
    ) -> None:
        if shortcut not in ("A", "B"):
            raise unknown("shortcut", shortcut, ("A", "B"))
        channels = [stem_width, *(width * block.expansion for width in widths)]
        super().__init__(
            ConvBN(in_chans, stem_width, 3),
            make_stages(partial(block, shortcut=shortcut), channels, blocks, first_stride=1),
            channels=channels,
            reductions=[1, *(2**stage for stage in range(len(widths)))],
            num_classes=num_classes,
            preact=preact,
        )
