"""Which options a segmentation config may have: unknown keys, types and numbers are refused before they count."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from mmengine import registry
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg import registry as mmseg_registry
from mmseg.registry import DATASETS, MODELS

from core.adm import ADMConfig
from core.errors import InputError, unknown
from core.ranges import Count, Index, NonNegative, Pixels, Positive, Seed, Share, Size
from core.training.run import flatten

TRACKERS = ("tensorboard",)
NUMBERS = {
    r"seed": Seed,
    r"batch_size|run\.(log_every|save_every|keep)|train_cfg\.(max_iters|val_interval)": Count,
    r"crop_size\.\d+": Pixels,
    r".*_dataloader\.num_workers": Index,
    r"optim_wrapper\.optimizer\.(lr|weight_decay|eps)|param_scheduler\.\d+\.(eta_min|begin|end|power)": NonNegative,
    r"optim_wrapper\.optimizer\.(momentum|betas\.\d+)": Share,
    r"model\.adm\.(alpha|beta|gamma|tau)": NonNegative,
    r"optim_wrapper\.clip_grad\.max_norm": Positive,
    r"optim_wrapper\.accumulative_counts": Count,
    r"model\..*\.loss_weight": NonNegative,
    r"model\..*\.dropout_ratio": Share,
    r"model\..*head\.(num_classes|channels|in_channels|num_convs)": Size,
    r"model\..*backbone\.(depth|base_channels|stem_channels)": Size,
}
"""What numbers may stand at our own keys, and at those of mmengine's that people change; keys as options name them."""
TYPED = (
    "model",
    "train_dataloader",
    "val_dataloader",
    "val_evaluator",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
)


def check_settings(cfg: Config) -> None:
    """Raises: InputError naming the first setting that no run could have."""
    check_numbers(cfg)
    for name in TYPED:
        check_types(cfg[name], f"{name}.")
    if not isinstance(cfg.data_root, str):
        raise InputError(f"data_root is a folder, not {cfg.data_root!r}")
    if not re.fullmatch(r"(teacher|student)/(mIoU|aAcc|IoU\..+)", str(cfg.run.select)):
        raise InputError(f"run.select {cfg.run.select!r}: student/mIoU or teacher/mIoU, or their aAcc or IoU.<class>")
    for tracker in cfg.run.setdefault("trackers", list(TRACKERS)):
        if tracker not in TRACKERS:
            raise unknown("tracker", str(tracker), TRACKERS)


def check_numbers(cfg: Config) -> None:
    """Raises: InputError naming the first number of the config that is of another kind or out of its range."""
    for key, value in flatten(_by_key(cfg.to_dict())).items():
        for pattern, kind in NUMBERS.items():
            if not re.fullmatch(pattern, key) or (value is None and key == "run.save_every"):
                continue
            number, bounds = get_args(kind)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and not (number is float and isinstance(value, float)):
                raise InputError(f"{key} must be {'a whole number' if number is int else 'a number'}: {value!r}")
            if value not in bounds:
                raise InputError(f"{key} {bounds.says(value)}: {value}")


def _by_key(value: Any) -> Any:
    """Lists as mappings from their positions, as mmengine's options name their items."""
    if isinstance(value, (list, tuple)):
        value = {str(position): item for position, item in enumerate(value)}
    return {key: _by_key(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def check_types(section: Any, key: str = "") -> None:
    """Raises: InputError for a ``type`` that no registry has, offering the nearest of its own."""
    parts = section.items() if isinstance(section, Mapping) else enumerate(section)
    for name, part in parts:
        if name == "type" and isinstance(part, str) and _class_of(part) is None:
            registries = (registry.OPTIMIZERS, registry.PARAM_SCHEDULERS, MODELS, DATASETS, registry.DATA_SAMPLERS)
            raise unknown(f"{key}type", part, (known for one in registries for known in one.module_dict))
        if isinstance(part, (Mapping, list, tuple)):
            check_types(part, f"{key}{name}.")


def check_option(cfg: Config, key: str, value: Any) -> None:
    """Raises: InputError for an option that nothing would read, offering the nearest, or a text instead of a number."""
    here: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        place = ".".join(parts[:depth])
        if isinstance(here, (list, tuple)):
            if not part.isdigit() or int(part) >= len(here):
                raise InputError(f"unknown option {key}: {place} has the items 0 to {len(here) - 1}")
            here = here[int(part)]
        elif isinstance(here, (Mapping, Config)):
            if part not in here and (known := _accepted(here, place)) is not None and part not in known:
                names = sorted(known | set(here))
                nearest = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
                meant = ".".join([*parts[:depth], *nearest])
                hint = f"did you mean {meant}?" if nearest else f"{place or 'a config'} has {', '.join(names)}"
                raise InputError(f"unknown option {key}: {hint}")
            here = here.get(part)
            last = depth == len(parts) - 1
            if last and isinstance(here, (dict, list)) and not isinstance(value, (dict, list)) and key != "crop_size":
                raise InputError(f"the option {key} is a section with parts of its own, not {value!r}")
            if isinstance(here, (int, float)) and isinstance(value, str) and last:
                raise InputError(f"the option {key} is a number or a switch, not {value!r}")
        elif here is None:
            return
        else:
            raise InputError(f"unknown option {key}: {place} is {here!r}, it has no parts")


def _accepted(section: Mapping[str, Any] | Config, place: str) -> set[str] | None:
    """The arguments that a section's class takes besides those it has; None where they cannot be known."""
    if not place:
        return set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"} | {"find_unused_parameters"}
    if place == "model.adm":
        return {field.name for field in fields(ADMConfig)}
    if place == "run":
        return set()
    if "type" not in section:
        return set(inspect.signature(torch.utils.data.DataLoader).parameters) if "sampler" in section else None
    owner = _class_of(section["type"])
    if owner is None:
        return None
    names: set[str] = set()
    for parent in owner.__mro__ if inspect.isclass(owner) else (owner,):
        parameters = inspect.signature(parent.__init__ if inspect.isclass(parent) else parent).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names | {"init_cfg"}


def _class_of(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    registries = [value for source in (mmseg_registry, registry) for value in vars(source).values()]
    owners = (value.get(name) for value in registries if isinstance(value, registry.Registry))
    return next((owner for owner in owners if owner is not None), None)
