"""ShuffleNets for 32x32 images, with a 1x1 stem and without its pooling. Both start from PyTorch's default init.

V1 (3 groups): Zhang et al., CVPR 2018; V2 (1x): Ma et al., ECCV 2018; in the form of HobbitLong/RepDistiller
(models/ShuffleNetv1.py, models/ShuffleNetv2.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, NumberedConvs, make_stages

STEM_WIDTH = 24
GROUPS = 3


class ShuffleUnitV1(NumberedConvs):
    """1x1 group convolution, shuffle, depthwise 3x3, 1x1 group convolution; ends before its last ReLU.

    With stride 1 the input is added; with stride 2 it is average-pooled and concatenated, and the branch only fills up
    the channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        self.stride, self.groups = stride, 1 if in_channels == STEM_WIDTH else GROUPS
        branch = channels if stride == 1 else channels - in_channels
        hidden = branch // 4
        super().__init__(
            (in_channels, hidden, 1, 1, self.groups),
            (hidden, hidden, 3, stride, hidden),
            (hidden, branch, 1, 1, GROUPS),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.channel_shuffle(self.active(1, x), self.groups)
        y = self.layer(3, self.active(2, y))
        if self.stride == 2:
            return torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        y += x
        return y


class ShuffleNetV1(CifarNetwork):
    """A 1x1 stem and stages of 4, 8 and 4 units, the first of each with stride 2."""

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True) -> None:
        channels = [STEM_WIDTH, 240, 480, 960]
        stages = make_stages(ShuffleUnitV1, channels, (4, 8, 4), first_stride=2)  # drawn before the stem
        super().__init__(
            ConvBN(in_chans, STEM_WIDTH, 1),
            stages,
            maps=zip(channels, (1, 2, 4, 8), strict=True),
            num_classes=num_classes,
            preact=preact,
        )


class ShuffleUnitV2(NumberedConvs):
    """Half of the channels passes; the other half goes through 1x1, depthwise 3x3 and 1x1 convolution; shuffle.

    With stride 2 both branches take all channels, and the left one is a depthwise 3x3 and a 1x1 convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        half = channels // 2
        right = half if stride == 1 else in_channels
        left = ((in_channels, in_channels, 3, 2, in_channels), (in_channels, half, 1)) if stride == 2 else ()
        super().__init__(*left, (right, half, 1), (half, half, 3, stride, half), (half, half, 1))
        self.first = 1 + len(left)  # convolution of the right branch

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.first == 1 else (self.active(2, self.layer(1, x)), x)
        right = self.active(self.first + 2, self.layer(self.first + 1, self.active(self.first, right)))
        return F.channel_shuffle(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(CifarNetwork):
    """A 1x1 stem, stages of one halving unit and 3, 7 and 3 others, and a 1x1 convolution to 1024 channels."""

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True) -> None:
        channels = [STEM_WIDTH, 116, 232, 464]  # the stages are drawn before the stem
        stages = make_stages(ShuffleUnitV2, channels, (4, 8, 4), first_stride=2, kind=nn.Sequential)
        super().__init__(
            nn.Sequential(ConvBN(in_chans, STEM_WIDTH, 1), nn.ReLU(inplace=True)),
            stages,
            ConvBN(channels[-1], 1024, 1),
            maps=zip(channels, (1, 2, 4, 8), strict=True),
            num_features=1024,
            num_classes=num_classes,
            preact=preact,
        )
