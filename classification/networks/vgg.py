"""CIFAR VGGs with BatchNorm and without fully connected layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, in the form of HobbitLong/RepDistiller
(models/vgg.py).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, ConvBN, Stage, init_conv, init_linear

WIDTHS = (64, 128, 256, 512, 512)


class Group(Stage):
    """3x3 convolutions (with bias) and BatchNorms, behind 2x2 max-pooling; ends before its last ReLU.

    ``pool_only_at`` limits the pooling to input maps of that height.
    """

    def __init__(self, in_channels: int, channels: int, count: int, pool_only_at: int | None = None) -> None:
        inputs = [in_channels] + [channels] * (count - 1)
        super().__init__(*(ConvBN(width, channels, 3, bias=True) for width in inputs))
        self.pool_only_at = pool_only_at

    def forward(self, x: Tensor) -> Tensor:
        if self.pool_only_at in (None, x.shape[2]):
            x = F.max_pool2d(x, 2)
        return super().forward(x)


class VGG(CifarNetwork):
    """Five groups of ``count`` convolutions; the first is the stem.

    Three poolings leave 4x4 of 32x32 pixels; images of 64 pixels are pooled once more, before the last group.
    """

    inits = (init_conv, partial(init_linear, std=0.01))

    def __init__(self, num_classes: int = 100, in_chans: int = 3, preact: bool = True, *, count: int) -> None:
        stem = Stage(*(ConvBN(width, WIDTHS[0], 3, bias=True) for width in [in_chans] + [WIDTHS[0]] * (count - 1)))
        stages = [Group(WIDTHS[group - 1], WIDTHS[group], count, 8 if group == 4 else None) for group in range(1, 5)]
        super().__init__(
            stem,
            stages,
            maps=zip(WIDTHS, (1, 2, 4, 8, 8), strict=True),
            num_classes=num_classes,
            preact=preact,
        )
