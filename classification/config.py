"""The command line of a task of image classification, made from its options: of online distillation, or another."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from classification.methods import METHODS, Method
from classification.methods.base import MethodOptions
from classification.networks.libraries import folder_weights
from classification.networks.pretrained import find_weights
from classification.options import NetworkConfig, TrainConfig
from core.errors import InputError, parse_label
from core.training import fit
from core.training.command import config_files, dry_run_wanted, parse, say_ranges, train_parser
from core.training.precision import settled
from core.training.run import flatten, read_config
from core.weights import weights_hash

# What a resumed run may change: where and on what it runs, not what it computes.
MAY_CHANGE = ("data.root", "data.download", "data.workers", "fit.device", "fit.keep", "fit.trackers", "progress_bar")


# Options that a run's ``config.yaml`` leaves out where they say nothing: runs from before they existed stay the same.
UNSAID: Mapping[str, Mapping[str, Any]] = {
    "adm": {"feature_targets": "student"},
    "data": {
        "test": 0.2,
        "auto_augment": None,
        "color_jitter": None,
        "re_prob": 0.0,
        "re_mode": "pixel",
        "mixup": 0.0,
        "cutmix": 0.0,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
    },
    "optimizer": {"name": "sgd", "filter_bias_and_bn": False, "layer_decay": None, "options": {}},
    "schedule": {"warmup_steps": 0, "warmup_from": 0.0},
    "fit": fit.UNSAID,
}


@dataclass(frozen=True)
class Task:
    """What tells one task of image classification from another; data, networks, loop and tools are the same.

    Args: the package that it lives in; its methods by label; its config, for the defaults; one line for ``--help``.
    """

    name: str
    methods: Mapping[str, type[Method]]
    config: type[TrainConfig]
    description: str


ONLINE = Task(
    "classification",
    METHODS,
    TrainConfig,
    "Trains teacher and student together: mutual learning and its relatives, with or without ADM.",
)


@dataclass(frozen=True)
class Command:
    """A parsed command: the config, its method's options, whether it only looks ("time": and times), and its task."""

    config: TrainConfig
    options: Any
    dry_run: Literal["time"] | bool = False
    task: Task = ONLINE

    @property
    def method(self) -> tuple[str, bool]:
        """The method's name, and whether ADM is composed with it."""
        return parse_label(self.config.method, self.task.methods)

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the run's results, as ``config.yaml`` keeps it; ``--config`` reads it back.

        Raises: InputError where a weight file is missing, or is not the one that the run in ``out`` began with.
        """
        values = asdict(self.config)
        if self.task is not ONLINE:
            values = {"task": self.task.name, **values}
        file = self.config.out / "config.yaml"
        recorded = flatten(read_config(file)) if file.is_file() else {}
        for role, weights in self.weight_files.items():
            known = recorded.get(f"networks.{role}.sha256"), self.config.networks[role].sha256
            values["networks"][role]["sha256"] = weights_hash([weights], *known)
        del values["out"]
        name, with_adm = self.method
        if not with_adm:
            del values["adm"]
        elif self.config.adm.divergence != "kd":
            del values["adm"]["delta"]  # it decides nothing then
        if not self.config.data.noise:  # likewise
            for key in ("noise", "noise_exclude_true", "noise_seed"):
                del values["data"][key]
        for section, silent in UNSAID.items():
            for key, value in silent.items() if section in values else ():
                if values[section][key] == value:
                    del values[section][key]
        for network in values["networks"].values():
            for key in ("backbone_lr_factor", "size"):
                if network[key] is None:
                    del network[key]
        if not self.config.label_smoothing:
            del values["label_smoothing"]
        if own := asdict(self.options):
            values[name] = own
        return values

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        """The weight file of each network that starts from one, or from a local folder's. Raises: InputError."""
        files: dict[str, Path] = {}
        for role, network in self.config.networks.items():
            if network.weights is not None:
                files[role] = find_weights(network.weights, role, network.name)
            elif network.pretrained and (file := folder_weights(network.name)) is not None:
                files[role] = file
        return files


def make_parser(prog: str | None = None, task: Task = ONLINE) -> Any:
    """The parser of ``<task>/tools/train.py``."""
    from jsonargparse import SUPPRESS

    epilog = f"Methods: {', '.join(task.methods)}; each alone or with +adm."
    parser = train_parser(task.config, prog, task.description, epilog)
    parser.add_argument("--task", choices=[task.name], default=task.name, help=SUPPRESS)  # a run's config.yaml says it
    for name, method in task.methods.items():
        if fields(method.Options):
            parser.add_argument(f"--{name}", type=method.Options, default=method.Options())
            say_ranges(parser, method.Options, f"--{name}.")
    return parser


def parse_command(argv: Sequence[str] | None = None, prog: str | None = None, task: Task = ONLINE) -> Command:
    """The command line as a ``Command``. Raises: InputError for anything wrong with it."""
    argv = sys.argv[1:] if argv is None else argv
    _check_task(task, argv)
    nested = [f"networks.<role>.{f.name}" for f in fields(NetworkConfig)]
    cfg = parse(make_parser(prog, task), argv, nested).as_dict()
    options = {name: cfg.pop(name) for name in task.methods if name in cfg}
    dry_run = dry_run_wanted(cfg.pop("dry_run"), cfg.pop("time"))
    for key in ("config", "task"):
        cfg.pop(key, None)
    config = task.config(**cfg)
    config = replace(config, fit=settled(config.fit, config.out))
    name, with_adm = parse_label(config.method, task.methods)
    _check_flags(task, name, with_adm, argv)
    if not config.networks:
        raise InputError("no networks: choose a recipe (--config), or give --networks.student.name cifar_resnet8x4")
    _check_pairs(config, with_adm)
    return Command(config, options.get(name, MethodOptions()), dry_run, task)


def task_of(file: Path) -> str | None:
    """The task that a recipe or a run's ``config.yaml`` says it is of; None where it says nothing or is unreadable."""
    import yaml

    try:
        said = yaml.safe_load(file.read_text()) if file.is_file() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # the parser says what is wrong with it
        return None
    return said.get("task") if isinstance(said, dict) else None


def _check_task(task: Task, argv: Sequence[str]) -> None:
    """Raises: InputError for a config file that says it is of another task: its options would seem unknown."""
    for file in config_files(argv):
        if (said := task_of(file)) not in (None, task.name):
            raise InputError(f"{file} is of {said}, and this is {task.name}: use {said}/tools/train.py")


def _check_pairs(config: TrainConfig, with_adm: bool) -> None:
    """Raises: InputError for options that are right alone, and not beside each other."""
    for role in config.networks:
        if not isinstance(role, str):  # YAML's 1 is a number
            raise InputError(f"networks.{role}: its role must be teacher, teacher_2, ..., student, student_2, ...")
        kind, _, number = role.partition("_")
        before = kind if number == "2" else f"{kind}_{int(number) - 1}" if number.isdecimal() else None
        wrong = role != kind and (before not in config.networks or number.startswith("0"))
        if wrong and kind in ("teacher", "student"):  # of another kind whoever builds it says so
            raise InputError(f"networks.{role}: a {kind}'s roles are {kind}, {kind}_2, {kind}_3, ..., without a gap")
        network = config.networks[role]
        if network.backbone_lr_factor is not None and not (network.weights or network.pretrained):
            raise InputError(
                f"networks.{role}.backbone_lr_factor is of what starts from weights, and {role} starts at random: "
                f"give --networks.{role}.weights or --networks.{role}.pretrained true, or leave it out"
            )
    if config.fit.patience is not None and not config.data.validation:
        raise InputError(
            "fit.patience without held-out images would choose the run's end by the test images: give "
            "--data.validation 0.1, or leave it out"
        )
    if with_adm and config.label_smoothing and config.adm.alpha and config.adm.consensus == "kd":
        raise InputError(
            "adm.consensus kd imitates the teacher and has no label that label_smoothing could smooth: choose "
            "--adm.consensus ce, or leave label_smoothing out"
        )
    if with_adm and config.data.mixing and config.adm.beta and config.adm.divergence == "kd":
        raise InputError(
            f"adm.divergence kd keeps what a teacher said of each image by its number, and {config.data.mixing} shows "
            "another mixture each time: choose --adm.divergence ce, or leave it out"
        )
    if with_adm and not (config.adm.alpha or config.adm.beta or config.adm.gamma):
        name = config.method.partition("+")[0]
        raise InputError(f"adm.alpha, adm.beta and adm.gamma are all 0: give one of them, or --method {name}")


def _check_flags(task: Task, name: str, with_adm: bool, argv: Sequence[str]) -> None:
    """Raises: InputError for a flag that counts for nothing: another method's, or ADM's without +adm.

    Those in a recipe stay unused: it serves the runs of all methods.
    """
    for flag in (argument.partition("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")):
        owner = flag.partition(".")[0]
        if owner == "adm" and not with_adm:
            raise InputError(f"{flag} counts only with +adm: choose --method {name}+adm, or leave it out")
        if owner in task.methods and owner != name:
            own = [f"{name}.{f.name}" for f in fields(task.methods[name].Options)]
            known = f"its options are {', '.join(own)}" if own else "it has no options"
            raise InputError(f"{flag} does not apply to {name}: {known}")
