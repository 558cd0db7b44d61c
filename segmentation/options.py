"""Which options a segmentation config may have: unknown keys, types and numbers are refused before they count."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, get_args

import torch
from mmengine import registry
from mmengine.config import Config
from mmseg import registry as mmseg_registry
from mmseg.registry import DATASETS, MODELS

from core.adm import ADMConfig
from core.errors import InputError, notice, unknown
from core.ranges import Count, Index, NonNegative, Pixels, Positive, Range, Seed, Share, Size
from core.training.run import flatten

TRACKERS = ("tensorboard",)
NUMBERS = {
    r"seed": Seed,
    r"batch_size|run\.(log_every|save_every|keep)|train_cfg\.(max_iters|val_interval|val_begin)": Count,
    r"crop_size\.\d+": Pixels,
    r".*_dataloader\.num_workers|param_scheduler\.\d+\.(begin|end)": Index,
    r"optim_wrapper\.optimizer\.(lr|weight_decay|eps)|param_scheduler\.\d+\.(eta_min|power)": NonNegative,
    r"optim_wrapper\.optimizer\.(momentum|dampening|betas\.\d+)": Share,
    r"model\.adm\.(alpha|beta|gamma|tau)": NonNegative,
    r"optim_wrapper\.clip_grad\.(max_norm|norm_type|clip_value)": Positive,
    r"optim_wrapper\.accumulative_counts|(train|val)_dataloader\.(batch_size|prefetch_factor)": Count,
    r"model\.data_preprocessor\.mean\.\d+": Annotated[float, Range(0, 255)],
    r"model\.data_preprocessor\.std\.\d+": Annotated[float, Range(0.01, 255)],
    r".*pipeline\.\d+\.ratio_range\.\d+": Positive,
    r"model\..*\.loss_weight": NonNegative,
    r"model\..*\.dropout_ratio": Share,
    r"model\..*head\.(num_classes|channels|in_channels|num_convs)": Size,
    r"model\..*backbone\.(depth|base_channels|stem_channels|num_stages)": Size,
    r"model\..*backbone\.(strides|dilations)\.\d+|model\..*head\.dilations\.\d+": Size,
}
"""What numbers may stand at our own keys, and at those of mmengine's that people change; keys as options name them."""
FILES = r"data_root|model\.teacher_weights|model\.(teacher|student)\.pretrained"
SET_BY = {
    r"train_dataloader\.batch_size": "batch_size",
    r"train_dataloader\.dataset\.seed|randomness\.seed": "seed",
    r".+\.data_root": "data_root",
    r"custom_imports(\..+)?": "the file of the config, which is read first",
    r"model\.data_preprocessor\.size|train_dataloader\..*pipeline\.\d+\.crop_size": "crop_size",
}
"""Keys that a run sets itself, from our own."""
READ_BY_RUNNER: dict[str, tuple[type, ...]] = {
    "model_wrapper_cfg": (Mapping,),
    "find_unused_parameters": (bool,),
    "sync_bn": (str,),
    "activation_checkpointing": (str, list, tuple),
    "compile": (bool, Mapping),
}
"""Keys of which mmengine's runner knows alone, and what they may be."""
SECTIONS: dict[str, tuple[str, ...]] = {
    "": ("custom_hooks", "randomness", *READ_BY_RUNNER),
    "run": (),
    "train_cfg": ("val_begin",),
    "val_cfg": ("fp16",),
    "randomness": ("deterministic",),
    "env_cfg": ("resource_limit",),
    "env_cfg.mp_cfg": (),
    "env_cfg.dist_cfg": ("timeout",),
    "optim_wrapper.clip_grad": ("type", "max_norm", "norm_type", "error_if_nonfinite", "foreach", "clip_value"),
    "optim_wrapper.paramwise_cfg": (
        "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "flat_decay_mult", "dwconv_decay_mult",
        "dcn_offset_lr_mult", "bypass_duplicate",
    ),
}  # fmt: skip
"""What these sections may have besides what the configs say."""
TYPED = (
    "model",
    "train_dataloader",
    "val_dataloader",
    "val_evaluator",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "val_cfg",
    "default_hooks",
    "custom_hooks",
    "visualizer",
    "model_wrapper_cfg",
    "randomness",
)
SEVERAL = ("val_evaluator", "param_scheduler", "custom_hooks")
"""Those of them that are lists."""
CHOICES = {
    "train_cfg.type": ("IterBasedTrainLoop",),
    "val_cfg.type": ("ValLoop",),
    "default_scope": ("mmseg",),
    "log_level": ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"),
    "sync_bn": ("torch", "mmcv"),
    "model.teacher.backbone.style": ("pytorch", "caffe"),
    "model.student.backbone.style": ("pytorch", "caffe"),
    "env_cfg.mp_cfg.mp_start_method": ("fork", "spawn", "forkserver"),
}
"""What these keys may say, where they say anything."""


def check_settings(cfg: Config) -> None:
    """Raises: InputError naming the first setting that no run could have."""
    check_numbers(cfg)
    check_sections(cfg)
    values = flatten(cfg.to_dict())
    for key, value in values.items():
        needed = key == "data_root"
        if re.fullmatch(FILES, key) and not (isinstance(value, str) or (value is None and not needed)):
            raise InputError(f"{key} is a {'folder' if needed else 'file'}, not {value!r}")
        if re.fullmatch(r"optim_wrapper\.optimizer\.(?!type$).+", key) and isinstance(value, str):
            raise InputError(f"{key} is a number or a switch, not {value!r}")
        if key == "randomness.deterministic" and not isinstance(value, bool):
            raise InputError(f"{key} is a switch, not {value!r}")
        if key.endswith("init_cfg") and not (value is None or isinstance(value, list)):
            raise InputError(f"{key} is a section with parts of its own, not {value!r}")
    for key, known in CHOICES.items():
        if values.get(key) is not None and values[key] not in known:
            raise unknown(key, str(values[key]), known)
    for number, scheduler in enumerate(cfg.param_scheduler):
        if scheduler.get("by_epoch", True):
            raise InputError(f"param_scheduler.{number}.by_epoch must be False: a run counts iterations, not epochs")
    if not re.fullmatch(r"(teacher|student)/(mIoU|aAcc|IoU\..+)", str(cfg.run.select)):
        raise InputError(f"run.select {cfg.run.select!r}: student/mIoU or teacher/mIoU, or their aAcc or IoU.<class>")
    for tracker in cfg.run.setdefault("trackers", list(TRACKERS)):
        if tracker not in TRACKERS:
            raise unknown("tracker", str(tracker), TRACKERS)


def check_sections(cfg: Config) -> None:
    """Raises: InputError naming the first section that is none, or a ``type`` in it that is unknown."""
    for name in TYPED:
        section = cfg.get(name) or {}
        check_types(section, f"{name}.")
        if isinstance(section, (list, tuple)) and name not in SEVERAL:
            raise InputError(f"{name} is a section with parts of its own, not {section!r}")
    for name, kinds in READ_BY_RUNNER.items():
        if cfg.get(name) is not None and not isinstance(cfg[name], kinds):
            raise InputError(f"{name} cannot be {cfg[name]!r}")
    backends = (cfg.get("visualizer") or {}).get("vis_backends") or []
    for part in backends if isinstance(backends, list) else [backends]:
        if not isinstance(part, Mapping):
            raise InputError(f"visualizer.vis_backends is a list of sections with a type each, not of {part!r}")


def say_odd(cfg: Config) -> None:
    """Says in a line each what is legal and probably meant otherwise."""
    total = cfg.train_cfg.max_iters
    values = flatten(_by_key(cfg.to_dict()))
    for key in (
        "run.log_every", "run.save_every", "train_cfg.val_interval", "train_cfg.val_begin",
        "optim_wrapper.accumulative_counts",
    ):  # fmt: skip
        if (value := values.get(key)) is not None and value > total:
            notice(f"note: {key} {value} is longer than the run of {total} iterations")
    for key, value in values.items():
        if re.fullmatch(r"param_scheduler\.\d+\.begin", key) and value >= total:
            notice(f"note: {key} {value} lies behind the run's end, {total}")
    for key, own in (("sampler", "NumberedSampler"), ("dataset", "NumberedDataset")):
        if (kind := (cfg.train_dataloader.get(key) or {}).get("type")) != own:
            notice(f"note: train_dataloader.{key} is {kind}, not {own}: an interrupted run does not resume exactly")
    rate = values["optim_wrapper.optimizer.lr"]
    if rate == 0:
        notice("note: optim_wrapper.optimizer.lr is 0: nothing is learnt")
    for key, value in values.items():
        if re.fullmatch(r"param_scheduler\.\d+\.eta_min", key) and value > rate > 0:
            notice(f"note: {key} {value} is above the learning rate {rate}, which will rise")


def check_numbers(cfg: Config) -> None:
    """Raises: InputError naming the first number of the config that is of another kind, not finite or out of range."""
    for key, value in flatten(_by_key(cfg.to_dict())).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} must be a finite number: {value}")
        listed, _, place = key.rpartition(".")
        if place.isdigit() and any(re.fullmatch(pattern, listed) for pattern in NUMBERS):
            raise InputError(f"{listed} must be one number")
        for pattern, kind in NUMBERS.items():
            if not re.fullmatch(pattern, key) or (value is None and key == "run.save_every"):
                continue
            number, bounds = get_args(kind)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and not (number is float and isinstance(value, float)):
                raise InputError(f"{key} must be {'a whole number' if number is int else 'a number'}: {value!r}")
            bounds.check(key, value)


def _by_key(value: Any) -> Any:
    """Lists as mappings from their positions, as mmengine's options name their items."""
    if isinstance(value, (list, tuple)):
        value = {str(position): item for position, item in enumerate(value)}
    return {key: _by_key(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def check_types(section: Any, key: str = "") -> None:
    """Raises: InputError for a ``type`` that no registry has, offering the nearest of its own."""
    if not isinstance(section, (Mapping, list, tuple)):
        raise InputError(f"{key.removesuffix('.')} is a section with parts of its own, not {section!r}")
    parts = section.items() if isinstance(section, Mapping) else enumerate(section)
    for name, part in parts:
        if name == "type" and isinstance(part, str) and _class_of(part) is None:
            registries = (registry.OPTIMIZERS, registry.PARAM_SCHEDULERS, MODELS, DATASETS, registry.DATA_SAMPLERS)
            raise unknown(f"{key}type", part, (known for one in registries for known in one.module_dict))
        if isinstance(part, (Mapping, list, tuple)):
            check_types(part, f"{key}{name}.")


def check_option(cfg: Config, key: str, value: Any) -> None:
    """Raises: InputError for an option that nothing would read, offering the nearest, or a value of another kind."""
    if own := next((own for pattern, own in SET_BY.items() if re.fullmatch(pattern, key)), None):
        raise InputError(f"unknown option {key}: it follows from {own}, give that")
    here: Any = cfg
    usual: Any = None
    optional, parts = False, key.split(".")
    for depth, part in enumerate(parts):
        place = ".".join(parts[:depth])
        if isinstance(here, (list, tuple)):
            if not part.isdigit() or int(part) >= len(here):
                raise InputError(f"unknown option {key}: {place} has the items 0 to {len(here) - 1}")
            here = usual = here[int(part)]
            optional = False
        elif isinstance(here, (Mapping, Config)):
            accepted = _accepted(here, place)
            if part not in here and accepted is not None and part not in accepted:
                names = sorted(set(accepted) | set(here))
                nearest = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
                meant = ".".join([*parts[:depth], *nearest])
                hint = f"did you mean {meant}?" if nearest else f"{place or 'a config'} has {', '.join(names)}"
                raise InputError(f"unknown option {key}: {hint}")
            optional = (accepted or {}).get(part, part) is None
            here = here.get(part)
            usual = (accepted or {}).get(part) if here is None else here
            here = {} if here is None and ".".join(parts[: depth + 1]) in SECTIONS else here
        elif here is None:
            return
        else:
            raise InputError(f"unknown option {key}: {place} is {here!r}, it has no parts")
    if key != "crop_size" and not (value is None and (optional or (isinstance(usual, str) and part != "type"))):
        _check_kind(key, value, usual)


def _check_kind(key: str, value: Any, usual: Any) -> None:
    """Raises: InputError where a value is of another kind than the usual one of an option."""
    several = isinstance(value, (Mapping, list, tuple))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    many = several and (key.startswith("model.") or ".pipeline." in key)  # there one value may stand for several
    kinds: tuple[tuple[Any, bool, str], ...] = (
        (Mapping, isinstance(value, Mapping), "a section with parts of its own"),
        ((list, tuple), several, "a section with parts of its own"),
        (bool, isinstance(value, bool) or value in (0, 1), "a number or a switch"),
        ((int, float), number or many, "a number or a switch"),
        (str, isinstance(value, str), "a text"),
    )
    for kind, fits, name in kinds:
        if isinstance(usual, kind):
            if not fits:
                raise InputError(f"the option {key} is {name}, not {value!r}")
            return


def _accepted(section: Mapping[str, Any] | Config, place: str) -> dict[str, Any] | None:
    """What a section's class takes besides what it has, with the defaults; None where it cannot be known."""
    if place in SECTIONS:
        return dict.fromkeys(SECTIONS[place])
    if place == "model.adm":
        return {field.name: field.default for field in fields(ADMConfig)}
    if "type" not in section:
        return _defaults(torch.utils.data.DataLoader) if "sampler" in section else None
    owner = _class_of(section["type"])
    if owner is None:
        return None
    found: dict[str, Any] = {"init_cfg": None}
    for parent in owner.__mro__ if inspect.isclass(owner) else (owner,):
        call = parent.__init__ if inspect.isclass(parent) else parent
        found = {**_defaults(call), **found}
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values()):
            break
    return found


def _defaults(call: Any) -> dict[str, Any]:
    named = [
        p for p in inspect.signature(call).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return {p.name: p.default for p in named if p.name != "self"}


def _class_of(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    registries = [value for source in (mmseg_registry, registry) for value in vars(source).values()]
    owners = (value.get(name) for value in registries if isinstance(value, registry.Registry))
    return next((owner for owner in owners if owner is not None), None)
