"""What ``train.py progressive`` and ``train.py dit`` share: their configs, batches and optimisers, and the dry run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from core.errors import InputError
from core.training.command import dry_run_wanted, parse, train_parser
from core.training.distiller import Distiller
from core.training.fit import UNSAID
from core.training.precision import settled
from core.training.run import read_config
from core.training.step import memory_estimate, seconds_a_step
from core.training.task import gigabytes
from core.weights import weights_hash

# What a resumed run may change: where and on what it runs, not what it computes. A started base network has been read.
MAY_CHANGE = (
    *("data.root", "data.download", "teacher", "init", "gradient_checkpointing"),
    *("fit.device", "fit.keep", "fit.trackers", "progress_bar"),
)

DryRun = Literal["time"] | bool


class TrainingConfig:
    """What a training's config can do besides holding its values."""

    out: Path
    teacher: str | None
    teacher_sha256: str | None

    def idle(self) -> dict[str, str]:
        """How the flags begin that do nothing here, each with what it would count."""
        raise NotImplementedError

    def teacher_files(self) -> Iterable[Path]:
        """The files whose content is the weights of a fixed teacher. Raises: InputError where it has none."""
        raise NotImplementedError

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the results, as ``config.yaml`` keeps it; ``--config`` reads it back.

        Raises: InputError where there is no teacher, or its weights are not those that the run began with.
        """
        values = asdict(self)  # type: ignore[call-overload]
        for name in ("out", *(flag.strip("-.") for flag in self.idle())):
            values.pop(name, None)
        files, recorded = list(self.teacher_files()), self.out / "config.yaml"
        known = [read_config(recorded).get("teacher_sha256")] if recorded.is_file() else []
        for name in UNSAID:  # no option of theirs: parse_config refuses it
            del values["fit"][name]
        values["teacher_sha256"] = weights_hash(files, *known, self.teacher_sha256) if files else None
        return values


Config = TypeVar("Config", bound=TrainingConfig)


def parse_config(kind: type[Config], argv: Sequence[str], prog: str | None = None) -> tuple[Config, DryRun]:
    """(a config of this dataclass, the dry run that is wanted). Raises: InputError for a wrong command line."""
    try:
        values = parse(train_parser(kind, prog), argv).as_dict()
    except InputError as error:
        if "adm.attention" in str(error):  # in the recipes and run folders of earlier versions
            raise InputError("adm.attention is adm.control now: none (was consensus), uniform or shuffled") from error
        raise
    dry_run = dry_run_wanted(values.pop("dry_run"), values.pop("time"))
    values.pop("config", None)
    values["fit"] = settled(values["fit"], values["out"])
    config = kind(**values)
    for name, nothing in UNSAID.items():
        if getattr(config.fit, name) != nothing:  # type: ignore[attr-defined]
            raise InputError(f"--fit.{name} is of image classification and counts for nothing here: leave it out")
    if config.teacher_sha256 is not None and not list(config.teacher_files()):
        raise InputError("--teacher_sha256 is that of a teacher's weights, and there are none: give --teacher")
    for begin, needs in config.idle().items():
        for flag in (word.partition("=")[0] for word in argv):
            if flag.startswith(begin):
                raise InputError(f"{flag} counts only with {needs}")
    return config, dry_run


class DiffusionDistiller(Distiller):
    """One learning rate and weight decay for all; what does not learn is in evaluation mode.

    Averages of weights have a constant decay from the first step (``follow``), unlike torch's ``AveragedModel``.
    """

    def __init__(self, lr: float = 1e-4, weight_decay: float = 0.0, ema: float = 0.9999) -> None:
        super().__init__()
        self.lr, self.weight_decay, self.ema = lr, weight_decay, ema

    def train(self, mode: bool = True) -> DiffusionDistiller:
        super().train(mode)
        for module in (*self.children(), *self.networks.children()):
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        rates = {"lr": self.lr, "weight_decay": self.weight_decay}
        return [{"params": [p for p in n.parameters() if p.requires_grad], **rates} for n in self.trained().values()]

    def follow(self, average: nn.Module, network: nn.Module) -> None:
        """Moves the average of a network's weights by ``1 - ema`` of the way."""
        get_ema_multi_avg_fn(self.ema)(list(average.parameters()), list(network.parameters()), 0)


def make_loader(kind: Callable[..., Any], data: Any, config: Any, accelerator: Any, seed: int) -> Any:
    """This process's batches. Raises: InputError for an unfitting batch size.

    Args: what makes the loader, and what it loads; the training's config; the seed of the order.
    """
    if config.batch_size // accelerator.num_processes < config.fit.accumulate:
        raise InputError(f"batch_size {config.batch_size} cannot be cut into {config.fit.accumulate} parts a process")
    return kind(
        data,
        config.batch_size,
        flip=config.data.flips,
        seed=seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Raises: InputError where so many bytes are more than the device has."""
    import psutil

    has = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    if needed > has:
        raise InputError(f"{what} needs {needed / 2**30:,.1f} GiB at least, and here are {has / 2**30:,.1f} GiB")


def check_size(name: str, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Raises: InputError for a network that cannot be trained for want of memory, before it takes any."""
    with torch.device("meta"):
        size = sum(p.nbytes for p in build().parameters())
    check_memory(f"to train a {name} of this size", 4 * size, device)  # weights, gradients and Adam's two moments


def check_batch(distiller: Distiller, loader: Any, config: Any, accelerator: Any) -> None:
    """Raises: InputError for a batch that the memory cannot hold. The loader is of no use afterwards."""
    needed = _memory(distiller, loader, config, accelerator)
    check_memory(f"--batch_size {config.batch_size} (less with --fit.accumulate)", needed, accelerator.device)


def describe_memory(distiller: Distiller, loader: Any, config: Any, accelerator: Any) -> str:
    """A dry run's line on memory, from a forward of two images."""
    return gigabytes(_memory(distiller, loader, config, accelerator))


def _memory(distiller: Distiller, loader: Any, config: Any, accelerator: Any) -> int:
    batch = {name: values[:2] for name, values in next(iter(loader)).items()}
    part = config.batch_size // accelerator.num_processes // config.fit.accumulate
    with accelerator.autocast():
        return memory_estimate(distiller.to(accelerator.device), batch, part, moments=2)


def time_step(distiller: Distiller, loader: Any, optimizer: Any, config: Any, accelerator: Any) -> float:
    """Seconds of a step as ``fit`` takes it; the networks move on."""
    fit = config.fit
    return seconds_a_step(distiller, loader, optimizer, accelerator, accumulate=fit.accumulate, clip=fit.clip)


def count(network: nn.Module) -> int:
    """Its parameters, fixed ones too."""
    return sum(p.numel() for p in network.parameters())
