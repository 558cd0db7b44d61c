"""MobileNets for 32x32 images.

V1: Howard et al., arXiv:1704.04861, in the form of hfutqian/SwitOKD (Table 7 of SwitOKD).
V2: Sandler et al., "MobileNetV2", CVPR 2018, in the form of HobbitLong/RepDistiller (models/mobilenetv2.py).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, Stage, init_conv, init_linear


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution; ends before its last ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvBN(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise = ConvBN(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(F.relu(self.depthwise(x), inplace=True))


class MobileNetV1(CifarNetwork):
    """A 3x3 stem of stride 1, then 13 separable convolutions; a stage is all of one width. PyTorch's default init."""

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True) -> None:
        super().__init__(
            ConvBN(in_chans, 32, 3),
            [
                Stage(SeparableConv(32, 64, 1), SeparableConv(64, 128, 2), SeparableConv(128, 128, 1)),
                Stage(SeparableConv(128, 256, 2), SeparableConv(256, 256, 1)),
                Stage(SeparableConv(256, 512, 2), *(SeparableConv(512, 512, 1) for _ in range(5))),
                Stage(SeparableConv(512, 1024, 2), SeparableConv(1024, 1024, 1)),
            ],
            maps=[(32, 1), (128, 2), (256, 4), (512, 8), (1024, 16)],
            num_classes=num_classes,
            preact=preact,
        )


class InvertedResidual(nn.Module):
    """1x1 expansion (of factor 1 too), depthwise 3x3, linear 1x1 projection; with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = ConvBN(in_channels, hidden, 1)
        self.depthwise = ConvBN(hidden, hidden, 3, stride, groups=hidden)
        self.project = ConvBN(hidden, channels, 1)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.expand(x), inplace=True)
        y = F.relu(self.depthwise(y), inplace=True)
        y = self.project(y)
        if self.has_shortcut:
            y += x
        return y


class MobileNetV2(CifarNetwork):
    """A stem of stride 2, four stages of rows of inverted residuals, and a 1x1 convolution to 1280 channels.

    The activation is ReLU, not ReLU6, and widths are truncated, not rounded to multiples of 8.

    Args:
        width: multiple (at most 1) of all channel numbers but the last 1280.
    """

    inits = (init_conv, partial(init_linear, std=0.01))
    # (expansion, channels, blocks, stride of the first block) of each row of each stage
    STAGES = (
        ((1, 16, 1, 1), (6, 24, 2, 1)),
        ((6, 32, 3, 2),),
        ((6, 64, 4, 2), (6, 96, 3, 1)),
        ((6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True, *, width: float = 1.0) -> None:
        last = int(32 * width)
        stem = nn.Sequential(ConvBN(in_chans, last, 3, 2), nn.ReLU(inplace=True))
        channels, stages = [last], []
        for rows in self.STAGES:
            stage = nn.Sequential()
            for expansion, base, count, stride in rows:
                out = int(base * width)
                others = (InvertedResidual(out, out, 1, expansion) for _ in range(count - 1))
                stage.append(nn.Sequential(InvertedResidual(last, out, stride, expansion), *others))
                last = out
            channels.append(last)
            stages.append(stage)
        super().__init__(
            stem,
            stages,
            ConvBN(last, 1280, 1),
            maps=zip(channels, (2, 2, 4, 8, 16), strict=True),
            num_features=1280,
            num_classes=num_classes,
            preact=preact,
        )
