"""Wide ResNets of 6n+4 layers.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, in the form of HobbitLong/RepDistiller (models/wrn.py).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks.base import CifarNetwork, init_conv, init_linear, make_stages
from core.errors import InputError


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
            channels=channels,
            reductions=[1, 1, 2, 4],
            num_classes=num_classes,
            preact=preact,
        )
