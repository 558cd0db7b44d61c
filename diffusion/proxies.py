"""Feature extractors that stand in for Inception where its weights or images of its kind are lacking.

Their scores carry their own names, FD-R56 and CS-R56 or FD-digits and CS-digits: they are not FID and IS, and compare
only with themselves. Both take uint8 images ``[B, 3, H, W]`` and return features for the distance and class logits.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import InputError
from core.weights import read_state_dict
from diffusion.data import read_named

WIDTHS = (16, 32, 64)


class _Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads the channels (option A)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride, self.added = (1, 0) if in_channels == channels else (2, channels - in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(
            y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        )


def _stage(in_channels: int, channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(_Block(in_channels, channels), *(_Block(channels, channels) for _ in range(count - 1)))


class CifarResNet(nn.Module):
    """ResNet of 6n+2 layers for 32x32 images (He et al. 2016, section 4.2), in the keys of akamaster's files.

    uint8 ``[B, 3, H, W]`` -> (features ``[B, 64]``, logits ``[B, 10]``); ImageNet's mean and std, as its authors used.
    """

    features = 64
    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        count = (depth - 2) // 6
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], count)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], count)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], count)
        self.linear = nn.Linear(WIDTHS[-1], classes)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1), persistent=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """0..255 ``[B, 3, H, W]`` -> the last map ``[B, 64, H / 4, W / 4]``."""
        x = F.relu(self.bn1(self.conv1((images / 255.0 - self.mean) / self.std)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.forward_features(images).mean(dim=(-2, -1))
        return pooled, self.linear(pooled)


def load_resnet(depth: int, file: str | Path) -> CifarResNet:
    """Raises: InputError for a missing, unreadable or unfitting file."""
    if not Path(file).is_file():
        raise InputError(
            f"no weight file {file} for --features resnet{depth}: the CIFAR-10 ResNets are in pretrained_models of "
            "github.com/akamaster/pytorch_resnet_cifar10; .th or .safetensors"
        )
    try:
        state = read_state_dict(file)
        network = CifarResNet(depth, len(state["linear.bias"]))
        network.load_state_dict(state)
    except (RuntimeError, KeyError, InputError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{file} does not hold a CIFAR ResNet-{depth}: {reason}") from error
    return network


class DigitsClassifier(nn.Module):
    """uint8 ``[B, 3, 8, 8]`` (grey: the channels' mean) -> (features ``[B, 32]``, logits ``[B, 10]``)."""

    features = 32

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, self.features)
        self.linear = nn.Linear(self.features, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[-2:] != (8, 8):
            raise InputError(f"--features digits takes images of 8x8 pixels, these have {tuple(images.shape[-2:])}")
        x = images.float().mean(dim=1, keepdim=True) / 127.5 - 1.0
        x = F.relu(self.hidden(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)))
        return x, self.linear(x)


@functools.cache
def train_digits() -> tuple[DigitsClassifier, float]:
    """Trains on four fifths of scikit-learn's digits with seed 0, on one thread of the CPU: always the same weights.

    Returns: the network (once trained, the same object), and its accuracy in percent on the last fifth.
    """
    images, target, _ = read_named("digits", "", False)
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_num_threads(1)  # other numbers would add in another order
            torch.manual_seed(0)
            network = DigitsClassifier()
            order = torch.randperm(len(images))
            held, train = order[: len(order) // 5], order[len(order) // 5 :]
            optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
            with torch.enable_grad():
                for _ in range(10):
                    for batch in train[torch.randperm(len(train))].split(64):
                        loss = F.cross_entropy(network(images[batch])[1], target[batch])
                        optimiser.zero_grad()
                        loss.backward()
                        optimiser.step()
            network.eval()
            with torch.no_grad():
                right = network(images[held])[1].argmax(1) == target[held]
    finally:
        torch.set_num_threads(threads)
    return network, 100.0 * right.float().mean().item()
