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

from classification.networks.pretrained import load_weights
from classification.networks.resnet import ResNet
from core.errors import InputError
from core.files import how_to_make
from core.weights import read_state_dict, split_key
from diffusion.data import read_named


class CifarResNet(nn.Module):
    """uint8 ``[B, 3, H, W]`` -> (features ``[B, 64]``, logits ``[B, 10]``); ImageNet's mean and std, as akamaster used.

    A CIFAR ResNet of 6n+2 layers (He et al. 2016, section 4.2) with parameter-free shortcuts. Its state dict has the
    names of the published files, from which evaluations know the weights again (``Extractor.identity``).
    """

    network: ResNet
    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        network = ResNet(classes, preact=False, blocks=3 * [(depth - 2) // 6], shortcut="A")
        self.conv1, self.bn1 = network.stem.conv, network.stem.bn
        self.layer1, self.layer2, self.layer3 = network.stages
        self.linear = network.fc
        self.__dict__["network"] = network  # the same modules, not to be found twice
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1), persistent=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """0..255 ``[B, 3, H, W]`` -> the last map ``[B, 64, H / 4, W / 4]``."""
        return self.network.forward_features((images / 255.0 - self.mean) / self.std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.network.forward_head(self.forward_features(images), pre_logits=True)
        return pooled, self.network.fc(pooled)


def resnet_depth(name: str) -> int:
    """56 for "resnet56"; 0 for what names no CIFAR ResNet."""
    number = name.removeprefix("resnet")
    depth = int(number) if number != name and number.isdigit() else 0
    return depth if depth > 2 and depth % 6 == 2 else 0


def load_resnet(depth: int, file: str | Path) -> CifarResNet:
    """Raises: InputError for a missing, unreadable or unfitting file."""
    if not split_key(file)[0].is_file():
        raise InputError(
            f"no weight file {file} for --features resnet{depth}: the CIFAR-10 ResNets are in pretrained_models of "
            f"github.com/akamaster/pytorch_resnet_cifar10; .th or .safetensors{how_to_make(file)}"
        )
    try:
        state = read_state_dict(file)
        network = CifarResNet(depth, len(state.get("linear.bias", ())) or 10)
        load_weights(network.network, file)
    except InputError as error:
        raise InputError(f"{file} does not hold a CIFAR ResNet-{depth}: {error}") from error
    return network


class DigitsClassifier(nn.Module):
    """uint8 ``[B, 3, 8, 8]`` (grey: the channels' mean) -> (features ``[B, 32]``, logits ``[B, 10]``)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 32)
        self.linear = nn.Linear(32, 10)

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
