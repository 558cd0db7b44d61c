"""The transformer of the tests of DiT: 8 x 8 pixels, a few thousand parameters."""

from __future__ import annotations

import torch
from torch import nn

from diffusion.dit.model import DiT, DiTConfig

SMALL = DiTConfig(size=None, width=16, depth=2, heads=4, patch=2)


def dit(
    config: DiTConfig = SMALL, channels: int = 3, size: int = 8, classes: int = 10, seed: int = 0, **options: bool
) -> DiT:
    """A network in evaluation mode whose output is not 0, unlike that of a fresh one."""
    torch.manual_seed(seed)
    network = DiT(config, channels, size, classes, **options)
    for name, weight in network.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(weight, std=0.2)
    return network.eval()
