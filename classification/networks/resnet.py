"""CIFAR ResNets: 6n+2 layers with basic blocks, their widened variants, and ResNet-50 with bottlenecks.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, in the form of
HobbitLong/RepDistiller (models/resnet.py, models/resnetv2.py); option A as in akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, Stage, init_conv
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ends before its ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = make_shortcut(shortcut, in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution to four times the width, and a shortcut; ends before its ReLU."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
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
        stages = []
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            first = block(channels[stage], width, 1 if stage == 0 else 2, shortcut)
            others = (block(channels[stage + 1], width, 1, shortcut) for _ in range(count - 1))
            stages.append(Stage(first, *others))
        super().__init__(
            ConvBN(in_chans, stem_width, 3),
            stages,
            channels=channels,
            reductions=[1, *(2**stage for stage in range(len(widths)))],
            num_classes=num_classes,
            preact=preact,
        )

    def init_module(self, module: nn.Module) -> None:
        init_conv(module)
