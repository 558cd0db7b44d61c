"""Networks by the name of a library or a folder: ``torchvision/NAME``, ``transformers/FOLDER``, ``local-dir:FOLDER``.

The last is timm's own way, and so is ``hf-hub:NAME``. A folder's weights are read like any other weight file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.errors import InputError, first_line, unknown

TORCHVISION, TRANSFORMERS, LOCAL_DIR, HUB = "torchvision/", "transformers/", "local-dir:", "hf-hub:"
FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm and transformers call the weights in a folder."""


@contextmanager
def hub_says_once() -> Iterator[None]:
    """Without a line of huggingface_hub for each time that it tries to reach the hub: its error says it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def of_library(name: str) -> bool:
    """Whether a name is torchvision's or transformers', whose models ``core.parts.as_network`` makes networks."""
    return name.startswith((TORCHVISION, TRANSFORMERS))


def names_a_place(name: str) -> bool:
    """Whether a name says where a network lies, and not which one it is: weights are compared by shape alone."""
    return ":" in name or name.startswith(TRANSFORMERS)


def folder_of(name: str) -> Path | None:
    """The local folder that a name means: of ``local-dir:FOLDER``, and of ``transformers/FOLDER`` where there is one.

    Raises: InputError for a folder that is missing, or does not hold a model of that library.
    """
    prefix = LOCAL_DIR if name.startswith(LOCAL_DIR) else TRANSFORMERS if name.startswith(TRANSFORMERS) else None
    if prefix is None:
        return None
    place = name.removeprefix(prefix)
    if not place:
        raise InputError(f"{name}: name a folder of a saved model, {prefix}FOLDER")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        hub_name = prefix == TRANSFORMERS and place.count("/") <= 1 and not place.startswith((".", "/", "~"))
        if hub_name:  # a name on the hub
            return None
        raise InputError(f"{name}: there is no folder {folder}")
    key = "architecture" if prefix == LOCAL_DIR else "model_type"
    if key not in read_json(folder / "config.json", name):
        library = "timm" if prefix == LOCAL_DIR else "transformers"
        other = f"{TRANSFORMERS}FOLDER" if prefix == LOCAL_DIR else f"{LOCAL_DIR}FOLDER"
        raise InputError(
            f"{name}: {folder} holds no model of {library} (its config.json has no {key}); {other} names another "
            "library's"
        )
    return folder


def read_json(file: Path, name: str) -> dict[str, Any]:
    """A JSON object in the folder of the network ``name``. Raises: InputError where there is none."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        reason = "there is no such file" if not file.exists() else first_line(error)
        raise InputError(f"{name} is no folder of a saved model: cannot read {file} ({reason})") from error
    return content


def folder_weights(name: str) -> Path | None:
    """The weight file of a name that means a local folder; None for another name. Raises: InputError without one."""
    folder = folder_of(name)
    if folder is None:
        return None
    for file in FILES:
        if (folder / file).is_file():
            return folder / file
    several = (
        " in one file: save_pretrained(folder, max_shard_size='100GB')" if any(folder.glob("*.index.json")) else ""
    )
    raise InputError(f"{name}: {folder} holds no weights ({' or '.join(FILES)}){several}")


def create_of_library(name: str, num_classes: int, in_chans: int, **options: Any) -> nn.Module:
    """A model of torchvision or transformers with newly drawn weights.

    Raises: InputError for an unknown name (offering the nearest) or option, a missing package, a folder that is no such
        model, a name on the hub that cannot be fetched, or other channels than 3.
    """
    if in_chans != 3:
        raise InputError(f"{name} takes images of 3 channels, and these have {in_chans}")
    try:
        if name.startswith(TORCHVISION):
            return _torchvision(name)[0](num_classes=num_classes, weights=None, **options)
        from transformers import AutoModelForImageClassification

        config = _config(name, **options)
        if config.num_labels != num_classes:  # setting it forgets the classes' names
            config.num_labels = num_classes
        return AutoModelForImageClassification.from_config(config)
    except ImportError as error:
        raise _missing(name, error) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: {first_line(error)[:200]}") from error


def fetch_state(name: str) -> Mapping[str, Tensor]:
    """The pre-trained weights of a torchvision model, or of a transformers model on the hub, in the library's names.

    Raises: InputError where there are none, or they cannot be fetched.
    """
    try:
        if name.startswith(TORCHVISION):
            return _torchvision(name)[1].get_state_dict(progress=False, check_hash=True)
        from transformers import AutoModelForImageClassification

        with hub_says_once():
            return AutoModelForImageClassification.from_pretrained(name.removeprefix(TRANSFORMERS)).state_dict()
    except ImportError as error:
        raise _missing(name, error) from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        hint = "without internet access, leave pretrained out and give a weight file"
        raise InputError(f"{name}: {first_line(error)[:200].rstrip('.')}; {hint}") from error


def said_of(name: str) -> dict[str, Any]:
    """What a name's own weights are known by: ``num_classes``, ``mean`` and ``std``, those that are said.

    Of a timm name (its hub's but after it is fetched), a torchvision name and a local folder; else empty.
    """
    if name.startswith(TORCHVISION):
        weights = _torchvision(name)[1]
        transforms = weights.transforms()
        return {"num_classes": len(weights.meta["categories"]), **_channels(transforms.mean, transforms.std)}
    if (folder := folder_of(name)) is not None:
        config = read_json(folder / "config.json", name)
        if name.startswith(LOCAL_DIR):
            config = {**config, **config.get("pretrained_cfg", {})}
            return {"num_classes": config.get("num_classes"), **_channels(config.get("mean"), config.get("std"))}
        file = folder / "preprocessor_config.json"
        seen = read_json(file, name) if file.is_file() else {}
        return {"num_classes": _config(name).num_labels, **_channels(seen.get("image_mean"), seen.get("image_std"))}
    if names_a_place(name) or name.startswith("cifar_"):
        return {}
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return {} if found is None else {"num_classes": found.num_classes, **_channels(found.mean, found.std)}


def _channels(mean: Any, std: Any) -> dict[str, Any]:
    return {"mean": tuple(mean), "std": tuple(std)} if mean and std else {}


def torchvision_names() -> list[str]:
    """``torchvision/NAME`` of each of its classifiers."""
    from torchvision import models

    return [f"{TORCHVISION}{name}" for name in models.list_models(module=models)]


def _torchvision(name: str) -> tuple[Any, Any]:
    """The function that builds a torchvision classifier, and its default weights."""
    from torchvision import models

    if name not in torchvision_names():
        raise unknown("network", name, torchvision_names())
    own = name.removeprefix(TORCHVISION)
    return models.get_model_builder(own), models.get_model_weights(own).DEFAULT


def _config(name: str, **changed: Any) -> Any:
    """The configuration of a transformers model. Raises: InputError where it cannot be had."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise _missing(name, error) from error
    place = folder_of(name) or name.removeprefix(TRANSFORMERS)
    try:
        with hub_says_once():
            return AutoConfig.from_pretrained(place, **changed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = f"; without internet access, name a folder: {TRANSFORMERS}FOLDER" if isinstance(place, str) else ""
        raise InputError(f"{name}: {first_line(error)[:200].rstrip('.')}{hint}") from error


def _missing(name: str, error: ImportError) -> InputError:
    package = error.name or name.partition("/")[0]
    return InputError(f"{name} needs the package {package}: pip install {package}")
