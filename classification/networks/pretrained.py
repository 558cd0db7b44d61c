"""Pre-trained networks: which file a config's ``weights`` names, whether it fits, and how it is loaded.

Files are our own, timm's, and the checkpoints that other repositories published for the CIFAR networks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from classification.networks.libraries import names_a_place, said_of
from classification.networks.mobilenet import MobileNetV2
from classification.networks.resnet import ResNet, WideResNet
from classification.networks.shufflenet import ShuffleNetV1, ShuffleNetV2
from classification.networks.state import OtherClasses, load_state
from classification.networks.vgg import VGG
from core.errors import InputError
from core.files import how_to_make
from core.training.average import SUFFIX
from core.training.checkpoint import BEST, LAST, goal, read_state
from core.training.kept import refuse_kept
from core.weights import read_metadata, read_state_dict, split_key, weights_hash


def find_weights(place: str | Path, role: str, architecture: str) -> Path:
    """The weight file of a network: ``place`` itself, or the one in a run folder or in one of its checkpoint folders.

    Args:
        place: a weight file, or FILE#KEY; a run folder of ours (its last checkpoint counts); a checkpoint folder
            (last, best, step-00000123); or either folder as FOLDER#ROLE, for its file of that role (student_ema).
        role: the role asked for. A folder's file of that role is taken; without one, the folder's only file of that
            architecture (its only teacher's, where a teacher is asked for and others fit too).
        architecture: the network's name.
    Raises: InputError where there is no such file, or several.
    """
    before, _, named = str(place).rpartition("#")
    in_folder = bool(before) and Path(before).is_dir() and not Path(place).exists()
    place, named = (Path(before), named) if in_folder else (Path(place), "")
    place = goal(place) if place.name in (LAST, BEST) else place
    if split_key(place)[0].is_file():
        return place
    if not place.is_dir():
        refuse_kept(place)
        raise InputError(f"no weight file {place}{how_to_make(place)}")
    last = goal(place / "checkpoints" / LAST)
    folder = last if last.is_dir() else place
    if (folder / "state.pt").is_file():
        read_state(folder)  # which says it where a weight file is not what was saved
    if (own := folder / f"{named or role}.safetensors").is_file():
        return own
    said = {file: read_metadata(file).get("architecture", "unknown") for file in sorted(folder.glob("*.safetensors"))}
    if not said:
        raise InputError(
            f"{place} holds no weights: give a weight file, a run folder with a checkpoint, or a checkpoint folder"
        )
    if named:
        raise InputError(f"{folder} holds no weights of {named}: it holds those of {', '.join(f.stem for f in said)}")
    own_weights = {file: name for file, name in said.items() if not file.stem.endswith(SUFFIX)}
    fitting = [file for file, name in own_weights.items() if same_architecture(name, architecture)]
    alike = [file for file in fitting if file.stem.partition("_")[0] == role.partition("_")[0]]
    for found in (alike, fitting):
        if len(found) == 1:
            return found[0]
    files = ", ".join(f"{file.stem} ({name})" for file, name in said.items())
    which = "several of its networks are" if fitting else "none of its networks is"
    raise InputError(f"{folder}: {which} {architecture}, which {role} is: it holds {files}; name the file")


def same_architecture(a: str, b: str) -> bool:
    """Whether two names may mean one architecture: the tag of timm's weights (resnet34.a1_in1k) does not count.

    A folder or a place on the hub says nothing of what it holds: it may be any, and the shapes tell when it is loaded.
    """
    return a == b or names_a_place(a) or names_a_place(b) or a.partition(".")[0] == b.partition(".")[0]


def check_weights(file: Path, role: str, architecture: str, num_classes: int | None, sha256: str | None = None) -> None:
    """Refuses a file that says it is of another network, or whose hash is not ``sha256`` (where one is given).

    ``num_classes``: None where weights for any number of classes will do.

    A file that says nothing passes: loading it compares its shapes with the network's.
    Raises: InputError, also for a file that cannot be read.
    """
    if sha256 is not None:
        weights_hash([file], sha256)
    said = read_metadata(file)
    if not same_architecture(said.get("architecture", architecture), architecture):
        raise InputError(
            f"{file} is of another architecture: it holds {said['architecture']}, and {role} is {architecture}"
        )
    if num_classes is not None and (classes := said.get("num_classes", str(num_classes))) != str(num_classes):
        raise OtherClasses(f"{file} holds weights for {classes} classes, but the network has {num_classes} ({role})")


def normalisation_of(name: str) -> dict[str, Any]:
    """``mean`` and ``std`` with which a name's own weights were trained; empty where its library does not say."""
    return {key: value for key, value in said_of(name).items() if key in ("mean", "std")}


def keeps_head(name: str, num_classes: int) -> bool:
    """Whether a name's own weights come with a classifier for so many classes; else it is drawn at random."""
    return said_of(name).get("num_classes") in (None, num_classes)


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


def load_weights(network: nn.Module, file: str | Path, *, training: bool = True, new_head: bool = False) -> int | None:
    """Loads a weight file that fits exactly: in the network's own keys, or published ones for a CIFAR network.

    ``training``, ``new_head`` and what is returned: as of ``load_state``.
    Raises: InputError for no such file, not a readable one, another architecture, another number of classes, or (unless
        not ``training``, which has a line of warning) values that are not finite; ``network`` is then unchanged.
    """
    state = {}
    for key, tensor in read_state_dict(file).items():
        for pattern, replacement in _PUBLISHED.get(type(network), ()):
            key = re.sub(pattern, replacement, key)
        state[key] = tensor
    return load_state(network, state, file, training=training, new_head=new_head)
