"""CIFAR ResNets: 6n+2 layers with basic blocks, their widened variants, ResNet-50 with bottlenecks, and wide ResNets.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, in the form of
HobbitLong/RepDistiller (models/resnet.py, models/resnetv2.py); option A as in akamaster/pytorch_resnet_cifar10.
Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, in the form of RepDistiller's models/wrn.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, NumberedConvs, init_conv, init_linear, make_stages
from core.errors import InputError, unknown


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
            maps=zip(channels, [1, *(2**stage for stage in range(len(widths)))], strict=True),
            num_classes=num_classes,
            preact=preact,
        )


class WideBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice. Takes and puts out raw sums.

    Where the width changes, the shortcut is a bare 1x1 convolution of the *activated* input (in the first group of
    width 1 it does not).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        y = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        y = self.conv2(y)
        y += x if self.shortcut is None else self.shortcut(activated)
        return y


class WideResNet(CifarNetwork):
    """A bare 3x3 convolution, three groups of ``(depth - 4) // 6`` blocks, and a final BatchNorm as the neck.

    The maps of the groups are raw sums: the BatchNorms that follow belong to the next group and to the neck, and run
    once.

    Args:
        depth: number of layers, 6n+4.
        width: multiple of the group widths 16, 32, 64.
    """

    inits = (init_conv, init_linear)

    def __init__(
        self, num_classes: int = 100, in_chans: int = 3, preact: bool = True, *, depth: int, width: int
    ) -> None:
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise InputError(f"a wide ResNet has 6n+4 layers (10, 16, 22, 28, 40, ...), not {depth}")
        channels = [16, 16 * width, 32 * width, 64 * width]
        super().__init__(
            nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False),
            make_stages(WideBlock, channels, [count] * 3, first_stride=1, kind=nn.Sequential),
            nn.BatchNorm2d(channels[-1]),
            maps=zip(channels, (1, 1, 2, 4), strict=True),
            num_classes=num_classes,
            preact=preact,
        )
