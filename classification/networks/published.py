"""Weights from files: our own, timm's, and the checkpoints that other repositories published for the CIFAR networks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from classification.networks.mobilenet import MobileNetV2
from classification.networks.resnet import ResNet, WideResNet
from classification.networks.shufflenet import ShuffleNetV1, ShuffleNetV2
from classification.networks.vgg import VGG
from core.errors import InputError
from core.weights import read_state_dict

Rules = tuple[tuple[str, str], ...]


def _conv_bn(conv: str, bn: str, ours: str) -> Rules:
    return (conv, f"{ours}.conv."), (bn, f"{ours}.bn.")


_STEM = _conv_bn(r"^conv1\.", r"^bn1\.", "stem")
_LAYERS: Rules = tuple((rf"^layer{stage}\.", f"stages.{stage - 1}.") for stage in range(1, 5))

# What turns a published key into ours: all regular expressions of a family, in this order. Our own keys match none.
# Keys as in HobbitLong/RepDistiller and megvii-research/mdistiller; option-A ResNets as in
# akamaster/pytorch_resnet_cifar10. SwitOKD's MobileNetV1 was not published as a file.
_PUBLISHED: dict[type[nn.Module], Rules] = {
    ResNet: (
        *_STEM,
        *_LAYERS,
        *_conv_bn(r"\.(?:downsample|shortcut)\.0\.", r"\.(?:downsample|shortcut)\.1\.", ".shortcut"),
        (r"^linear\.", "fc."),
    ),
    WideResNet: (
        (r"^conv1\.", "stem."),
        (r"^bn1\.", "neck."),
        *((rf"^block{group}\.layer\.", f"stages.{group - 1}.") for group in range(1, 4)),
        (r"\.convShortcut\.", ".shortcut."),
    ),
    VGG: (
        (r"^block0\.", "stem."),
        *((rf"^block{group}\.", f"stages.{group - 1}.") for group in range(1, 5)),
        *_conv_bn(r"\.0\.(?=\w+$)", r"\.1\.(?=\w+$)", ".0"),
        *_conv_bn(r"\.3\.(?=\w+$)", r"\.4\.(?=\w+$)", ".1"),
        (r"^classifier\.", "fc."),
    ),
    MobileNetV2: (
        *_conv_bn(r"^conv1\.0\.", r"^conv1\.1\.", "stem.0"),
        *(
            (rf"^blocks\.{row}\.", f"stages.{place}.")
            for row, place in enumerate(("0.0", "0.1", "1.0", "2.0", "2.1", "3.0", "3.1"))
        ),
        *_conv_bn(r"\.conv\.0\.", r"\.conv\.1\.", ".expand"),
        *_conv_bn(r"\.conv\.3\.", r"\.conv\.4\.", ".depthwise"),
        *_conv_bn(r"\.conv\.6\.", r"\.conv\.7\.", ".project"),
        *_conv_bn(r"^conv2\.0\.", r"^conv2\.1\.", "neck"),
        (r"^classifier\.0\.", "fc."),
    ),
    ShuffleNetV1: (*_STEM, *_LAYERS, (r"^linear\.", "fc.")),
    ShuffleNetV2: (
        *_conv_bn(r"^conv1\.", r"^bn1\.", "stem.0"),
        *_LAYERS,
        *_conv_bn(r"^conv2\.", r"^bn2\.", "neck"),
        (r"^linear\.", "fc."),
    ),
}


def load_weights(network: nn.Module, file: str | Path) -> None:
    """Loads a weight file that fits exactly: in the network's own keys, or published ones for a CIFAR network.

    Raises:
        InputError: no such file, not a readable one, another architecture, or another number of classes; ``network``
            is then unchanged.
    """
    rules = _PUBLISHED.get(type(network), ())
    _load(network, {_own_key(key, rules): tensor for key, tensor in read_state_dict(file).items()}, file)


def _own_key(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _load(network: nn.Module, state: dict[str, Tensor], file: str | Path) -> None:
    """Strict loading, all checked before the first tensor is copied."""
    own = network.state_dict()
    # Files older than PyTorch 0.4.1 have no num_batches_tracked; load_state_dict then leaves it as it is.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    classes = _classifier_keys(network)
    if reshaped and not missing and not unexpected and all(key in classes for key in reshaped):
        in_file, in_network = state[reshaped[0]].shape[0], own[reshaped[0]].shape[0]
        if in_file != in_network:
            raise InputError(f"{file} holds weights for {in_file} classes, but the network has {in_network}")
    shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in reshaped]
    parts = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    if problems := [f"{kind} {_first_few(keys)}" for kind, keys in parts.items() if keys]:
        raise InputError(f"{file} is of another architecture than {type(network).__name__}: {'; '.join(problems)}")
    network.load_state_dict({**own, **state})


def _classifier_keys(network: nn.Module) -> set[str]:
    """Names of the parameters of the network's classifier, where it tells which module that is."""
    get_classifier = getattr(network, "get_classifier", None)
    if get_classifier is None:
        return set()
    parameters = {id(parameter) for parameter in get_classifier().parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in parameters}


def _first_few(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
