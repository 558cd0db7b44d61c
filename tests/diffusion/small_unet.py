"""The U-Net of the tests of progressive distillation: 8 x 8 pixels, one channel, 42,000 parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.progressive.network import UNetConfig, build_unet

SMALL = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4)


def unet(config: UNetConfig = SMALL, seed: int = 0) -> Any:
    """A network whose output is not close to 0, unlike that of a fresh one."""
    torch.manual_seed(seed)
    network = build_unet(config, 1, 8)
    nn.init.normal_(network.conv_out.weight, std=0.1)
    return network


def diffusers_folder(path: Path, **scheduler: Any) -> Path:
    """A folder of the ddpm-cifar10 layout: network and scheduler of diffusers side by side, nothing of ours."""
    from diffusers import DDPMScheduler

    unet().save_pretrained(path)
    DDPMScheduler(**scheduler).save_pretrained(path)
    return path
