"""ShuffleNets for 32x32 images, with a 1x1 stem and without its pooling. Both start from PyTorch's default init.

V1 (3 groups): Zhang et al., CVPR 2018; V2 (1x): Ma et al., ECCV 2018; in the form of HobbitLong/RepDistiller
(models/ShuffleNetv1.py, models/ShuffleNetv2.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, Stage

STEM_WIDTH = 24
GROUPS = 3


class ShuffleUnitV1(nn.Module):
    """1x1 group convolution, shuffle, depthwise 3x3, 1x1 group convolution; ends before its last ReLU.

    With stride 1 the input is added; with stride 2 it is average-pooled and concatenated, and the branch only fills up
    the channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = channels if stride == 1 else channels - in_channels
        hidden = branch // 4
        self.groups = 1 if in_channels == STEM_WIDTH else GROUPS
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, branch, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.channel_shuffle(y, self.groups)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            return torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        y += x
        return y


class ShuffleNetV1(CifarNetwork):
    """A 1x1 stem and stages of 4, 8 and 4 units, the first of each with stride 2."""

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True) -> None:
        channels = [STEM_WIDTH, 240, 480, 960]
        stages = []
        for stage, count in enumerate((4, 8, 4)):
            out = channels[stage + 1]
            first = ShuffleUnitV1(channels[stage], out, 2)
            stages.append(Stage(first, *(ShuffleUnitV1(out, out, 1) for _ in range(count - 1))))
        super().__init__(
            ConvBN(in_chans, STEM_WIDTH, 1),
            stages,
            channels=channels,
            reductions=[1, 2, 4, 8],
            num_classes=num_classes,
            preact=preact,
        )


class ShuffleUnitV2(nn.Module):
    """Half of the channels passes; the other half goes through 1x1, depthwise 3x3 and 1x1 convolution; shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn2(self.conv2(right))
        right = F.relu(self.bn3(self.conv3(right)), inplace=True)
        return F.channel_shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleDownV2(nn.Module):
    """Halves the map in two branches: left depthwise 3x3 and 1x1 (1, 2), right 1x1, depthwise 3x3 and 1x1 (3, 4, 5)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return F.channel_shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(CifarNetwork):
    """A 1x1 stem, stages of one halving unit and 3, 7 and 3 others, and a 1x1 convolution to 1024 channels."""

    FEATURES = 1024

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True) -> None:
        channels = [STEM_WIDTH, 116, 232, 464]
        stages = []
        for stage, count in enumerate((3, 7, 3)):
            out = channels[stage + 1]
            stages.append(
                nn.Sequential(ShuffleDownV2(channels[stage], out), *(ShuffleUnitV2(out) for _ in range(count)))
            )
        super().__init__(
            nn.Sequential(ConvBN(in_chans, STEM_WIDTH, 1), nn.ReLU(inplace=True)),
            stages,
            ConvBN(channels[-1], self.FEATURES, 1),
            channels=channels,
            reductions=[1, 2, 4, 8],
            num_features=self.FEATURES,
            num_classes=num_classes,
            preact=preact,
        )
