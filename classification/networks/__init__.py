"""Networks by name: the CIFAR families defined here, everything else from timm."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import nn

from classification.networks.base import CifarNetwork
from classification.networks.libraries import (
    HUB,
    LOCAL_DIR,
    create_of_library,
    fetch_state,
    folder_of,
    hub_says_once,
    of_library,
    torchvision_names,
)
from classification.networks.mobilenet import MobileNetV1, MobileNetV2
from classification.networks.resnet import Bottleneck, ResNet, WideResNet
from classification.networks.shufflenet import ShuffleNetV1, ShuffleNetV2
from classification.networks.state import load_state
from classification.networks.vgg import VGG
from core.errors import InputError, first_line, unknown

__all__ = ["CIFAR_NETWORKS", "CifarNetwork", "create_network"]

# Each takes num_classes, in_chans and preact.
CIFAR_NETWORKS: dict[str, Callable[..., CifarNetwork]] = {
    # cifar_resnet8, 14, 20, 32, 44, 56, 110: 6n + 2 layers; cifar_resnet20_a, 32_a, 44_a, 56_a, 110_a
    **{f"cifar_resnet{6 * n + 2}": partial(ResNet, blocks=(n, n, n)) for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"cifar_resnet{6 * n + 2}_a": partial(ResNet, blocks=(n, n, n), shortcut="A") for n in (3, 5, 7, 9, 18)},
    "cifar_resnet8x4": partial(ResNet, blocks=(1, 1, 1), stem_width=32, widths=(64, 128, 256)),
    "cifar_resnet32x4": partial(ResNet, blocks=(5, 5, 5), stem_width=32, widths=(64, 128, 256)),
    "cifar_resnet50": partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3), stem_width=64, widths=(64, 128, 256, 512)),
    **{
        f"cifar_wrn_{depth}_{width}": partial(WideResNet, depth=depth, width=width)
        for depth, widths in {10: (1, 2), 16: (1, 2, 10), 40: (1, 2, 4)}.items()
        for width in widths
    },
    "cifar_vgg8": partial(VGG, count=1),
    "cifar_vgg13": partial(VGG, count=2),
    "cifar_mobilenetv1": MobileNetV1,
    "cifar_mobilenetv2_050": partial(MobileNetV2, width=0.5),
    "cifar_mobilenetv2_100": partial(MobileNetV2, width=1.0),
    "cifar_shufflenetv1": ShuffleNetV1,
    "cifar_shufflenetv2": ShuffleNetV2,
}


def create_network(
    name: str, num_classes: int, *, in_chans: int = 3, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Builds a CIFAR network of ``CIFAR_NETWORKS``, or else a timm model.

    Args:
        name: e.g. "cifar_wrn_16_2", "resnet18", "resnet18.a1_in1k", "hf-hub:someone/network", "local-dir:folder",
            "torchvision/resnet18", "transformers/folder".
        num_classes: width of the head.
        in_chans: image channels.
        pretrained: the library's own weights (for a CIFAR network, see ``pretrained.load_weights``); a classifier for
            other classes is drawn anew.
        options: further options: ``preact`` and the family's for a CIFAR network, a timm model's own otherwise.
            timm's ResNets get ``zero_init_last=False`` unless told otherwise: their residual BatchNorms then start at 1
            as torchvision's, which is the paper's ImageNet recipe, and not at 0.
    Raises: InputError for an unknown name or option, or pretrained weights that do not exist or cannot be fetched.
    """
    if name in CIFAR_NETWORKS:
        build = CIFAR_NETWORKS[name]
        if pretrained:
            raise InputError(f"{name} has no downloadable weights: leave pretrained out and give a weight file")
        fixed = {"num_classes", "in_chans", *getattr(build, "keywords", ())}  # the rest is free for the caller
        free = [option for option in signature(build).parameters if option not in fixed]
        if strange := [option for option in options if option not in free]:
            raise InputError(f"{name} has no option {', '.join(strange)}: its options are {', '.join(free)}")
        return build(num_classes, in_chans, **options)

    if of_library(name):
        network = create_of_library(name, num_classes, in_chans, **options)
        if pretrained:
            load_state(network, fetch_state(name), name, new_head=True)
        return network
    folder_of(name)  # which says what is wrong with a folder

    import timm

    if ":" not in name and not timm.is_model(name):  # "hf-hub:..." and "local-dir:..." name a place, not a model
        known = [*CIFAR_NETWORKS, *timm.list_models(), *torchvision_names()]
        raise unknown("network", name, difflib.get_close_matches(name, known, n=1, cutoff=0.5) or CIFAR_NETWORKS)
    if timm.models.is_model_in_modules(name, {"resnet"}):
        options = {"zero_init_last": False, **options}
    try:
        with hub_says_once():
            return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=in_chans, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(f"{name}: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained and ":" not in name and "." not in name:
            raise
        hint = "; without internet access, leave pretrained out and give a weight file" if pretrained else ""
        if name.startswith(HUB):
            hint = f"; without internet access, name a folder: {LOCAL_DIR}FOLDER"
        reason = first_line(error).rstrip(".")
        raise InputError(f"{name}: {reason}{hint}") from error
