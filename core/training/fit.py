"""The training loop of every task that has none of its own: one function, read from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import InputError, unknown
from ..ranges import Count, Positive, Share, check_ranges
from ..split import model_of
from . import checkpoint as checkpoints
from .average import Averages, averaged_role
from .command import Stop
from .distiller import Batch, Distiller, Progress
from .precision import native_precision
from .recorder import Recorder
from .run import RunFolder
from .schedule import Schedule
from .seed import random_state, restore_random_state
from .step import batch_length, share_buffers, train_step


class Data(Protocol):
    """Batches of the rest of the current epoch each time it is iterated, and where it stands. May be endless."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class FitConfig:
    """How long to train, how often to look, and on what.

    Args:
        epochs: passes over the data.
        steps: optimiser steps; where given, epochs do not count.
        accumulate: parts into which a batch is split, one after the other, to fit the memory; the gradient is the
            whole batch's.
        clip: largest gradient norm over all networks together; none unless given.
        log_every: steps between lines of metrics (and between looks at the losses for NaN).
        evaluate_every: steps between evaluations, each with a checkpoint; every epoch unless given.
        patience: evaluations in a row without a better selected value, after which the run ends early.
        ema_decay: of a moving average of each student's weights, which is evaluated and saved beside it.
        ema_warmup: the average's decay rises from 0, as 1 - step^(-2/3).
        keep: checkpoints kept besides the best.
        precision: fp32, bf16, fp16 (GPUs only), or auto: bf16 where the machine computes it natively, else fp32.
        device: auto takes a GPU where there is one.
        compile: torch.compile of the whole forward with its losses.
        deterministic: bit-equal repeats on a GPU too, slower (on the CPU they always are).
        trackers: where metrics go besides the run folder: tensorboard, wandb, ... (accelerate's names).
    """

    epochs: Positive | None = None
    steps: Count | None = None
    accumulate: Count = 1
    clip: Positive | None = None
    log_every: Count = 50
    evaluate_every: Count | None = None
    patience: Count | None = None
    ema_decay: Share | None = None
    ema_warmup: bool = False
    keep: Count = 2
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    deterministic: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_ranges("fit.", self)
        if self.ema_warmup and self.ema_decay is None:
            raise InputError("fit.ema_warmup is of an average that fit.ema_decay asks for: give both")


UNSAID: Mapping[str, Any] = {"patience": None, "ema_decay": None, "ema_warmup": False}
"""Options that ``config.yaml`` leaves out where they say nothing: runs from before they existed stay the same."""


def make_accelerator(config: FitConfig, run: RunFolder | str, *, unused_parameters: bool = False) -> Any:
    """accelerate's Accelerator for this config. Raises: InputError for fp16 on the CPU or an uninstalled tracker."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs, LoggerType, ProjectConfiguration

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = native_precision(on_cpu)[0] if config.precision == "auto" else config.precision
    if precision == "fp16" and on_cpu:
        raise InputError("fp16 needs a GPU: on the CPU use --fit.precision bf16 or fp32")
    for name in config.trackers:
        if name not in LoggerType.list():
            raise unknown("tracker", name, LoggerType.list())
        if name != "all" and name not in map(str, get_available_trackers()):
            raise InputError(f"fit.trackers: {name} is not installed here")
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    path = str(run.path if isinstance(run, RunFolder) else run)
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(project_dir=path, logging_dir=f"{path}/tensorboard"),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate refuses device, precision or trackers: {error}") from error


def fit(
    distiller: Distiller,
    data: Data,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    schedule: Schedule,
    config: FitConfig,
    run: RunFolder,
    accelerator: Any,
    evaluate: Callable[[], dict[str, float]] | None = None,
    select: str | None = None,
    summary: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    pictures: Callable[[int], Mapping[str, Tensor]] | None = None,
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Trains to the end, or resumes a run that was cut off, exactly; returns what ``summary.json`` says.

    Args:
        optimizer: makes the optimiser from ``distiller.parameter_groups()``; each group keeps its own base rate.
        schedule: epochs done -> factor on each group's base learning rate.
        evaluate: -> values to log; called in evaluation mode. None: no evaluation and no ``best``.
        select: the evaluated value whose maximum makes ``best``.
        summary: what to say in ``summary.json`` besides.
        sizes: of the data, by what they count ("training images"): said at the start.
        pictures: after so many steps -> what the networks make, uint8 ``[h, w, 3]`` by ``<role>/<what>``; called by
            the main process at each evaluation, in evaluation mode, where there is a tracker.
    Raises: TrainingError for a NaN loss (naming network, term and step) or a full disk; InputError for a wrong config.
    """
    from accelerate.utils import gather_object

    if config.patience is not None and (evaluate is None or select is None):
        raise InputError("fit.patience: of this training no evaluation is better than another: leave it out")
    steps_per_epoch: int | None = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
    total_steps, interval = durations(config, steps_per_epoch)
    epoch_length = steps_per_epoch or interval
    if config.compile:
        distiller.compile()
    module = accelerator.prepare(distiller)  # not the optimiser: accelerate's wrapper costs 0.1 ms a step
    optim = optimizer(distiller.parameter_groups())
    averages = Averages(distiller, config)
    base_rates = [group["lr"] for group in optim.param_groups]
    recorder = Recorder(
        run, accelerator.device, accelerator.num_processes,
        mean=lambda values: accelerator.reduce(values, reduction="mean"), gather=lambda own: gather_object([own]),
        advice="lower the learning rate, clip gradients (--fit.clip 1.0) or train in bf16 / fp32",
        total=total_steps, log_every=config.log_every, keep=config.keep, epoch_length=epoch_length, select=select,
        track=lambda values, step: accelerator.log(values, step=step), progress_bar=progress_bar,
    )  # fmt: skip
    run.open()
    if config.log_every > total_steps:
        run.log(f"note: fit.log_every {config.log_every} is longer than the run of {total_steps} steps")
    parts: dict[str, Any] = {"optimizer": optim, "data": data, "scaler": accelerator.scaler}
    step = _load(recorder, distiller, parts, accelerator)
    purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers("adm", init_kwargs=purge)
    saved_at, factor = step, None
    batches = chain.from_iterable(repeat(data))
    distiller.train()
    about = (summary or {}).get("networks", {})
    recorder.start(step, dict(distiller.networks.items()), about, sizes or {}, accelerator.mixed_precision)
    with Stop().listening() as stop, recorder.bar:
        while step < total_steps and not recorder.has_waited(step, config.patience, interval):
            now = schedule(step / epoch_length)
            progress = Progress(step, step / epoch_length, total_steps, total_steps / epoch_length, now)
            if now != factor:
                factor = now
                for group, rate in zip(optim.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
            batch = next(batches)
            train_step(
                module, distiller, optim, batch, progress, accelerator, recorder.losses,
                accumulate=config.accumulate, clip=config.clip,
            )  # fmt: skip
            step += 1
            averages.update(step)
            stopping = recorder.after_step(step, batch_length(batch), optim.param_groups[0]["lr"], stop.requested)
            if step % interval == 0 or step == total_steps:
                recorder.clock.pause()
                best = False
                if evaluate is not None:
                    distiller.eval()
                    share_buffers(distiller)
                    values = evaluate()
                    distiller.train()
                    best = recorder.evaluated(step, values)
                _show(distiller, pictures, accelerator, step)
                _save(recorder, step, distiller, parts, accelerator, config.keep, best)
                recorder.draw()
                saved_at = step
                recorder.clock.resume()
            if stopping:
                if saved_at != step:
                    _save(recorder, step, distiller, parts, accelerator, config.keep, best=False)
                break

    result = recorder.finish(step, summary or {}, early=recorder.has_waited(step, config.patience, interval))
    for tracker in accelerator.trackers:  # not end_training(): the processes stay together for a next call
        tracker.finish()
    accelerator.trackers.clear()
    return result


def _show(
    distiller: Distiller, pictures: Callable[[int], Mapping[str, Tensor]] | None, accelerator: Any, step: int
) -> None:
    """Hands an evaluation's pictures to the trackers that take some; changes nothing in the training."""
    if pictures is None or not accelerator.is_main_process or not accelerator.trackers:
        return
    state = random_state()
    distiller.eval()
    drawn = {f"evaluation/{name}": picture[None].numpy() for name, picture in pictures(step).items()}
    distiller.train()
    restore_random_state(state)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(drawn, step=step, **form)


def durations(config: FitConfig, steps_per_epoch: int | None) -> tuple[int, int]:
    """(steps in all, steps between evaluations) of a run. Raises: InputError for a config that makes no run."""
    if steps_per_epoch == 0:
        raise InputError("the training set yields no batch: it is smaller than a batch may be")
    if config.epochs is None and config.steps is None:
        raise InputError("how long? give --fit.epochs or --fit.steps")
    if config.steps is None and steps_per_epoch is None:
        raise InputError("data without an end need --fit.steps")
    total = round((config.epochs or 0) * (steps_per_epoch or 0)) if config.steps is None else config.steps
    if total < 1:
        raise InputError(f"nothing to train: fit.epochs {config.epochs} is less than one step")
    return total, config.evaluate_every or steps_per_epoch or total


_NETWORKS = ("networks.", "moving_averages.")
"""How the names of a distiller's state begin that belong to a network, which has a file of its own."""


def _save(
    recorder: Recorder, step: int, distiller: Distiller, parts: dict[str, Any], accelerator: Any, keep: int, best: bool
) -> None:
    """A checkpoint of all that an exact resume needs. Raises: TrainingError for a NaN loss or weight, a full disk."""
    recorder.losses.check()
    state = {
        "step": step, **recorder.state(),
        **{name: None if part is None else part.state_dict() for name, part in parts.items()},
        # Weights, buffers and extra state (torch's get_extra_state) that belong to no network: adapters, heads.
        "extra": {k: v for k, v in distiller.state_dict().items() if not k.startswith(_NETWORKS)},
    }  # fmt: skip
    if recorder.run.main:
        weights = {
            r: (model_of(distiller.networks[r]).state_dict(), distiller.metadata(r)) for r in distiller.trained()
        }
        for role in list(weights):
            if (name := averaged_role(role)) in distiller.moving_averages:
                said = {**weights[role][1], "role": name}
                weights[name] = model_of(distiller.moving_averages[name]).state_dict(), said
        checkpoints.save_checkpoint(recorder.run.checkpoints, step, weights, state, best=best, keep=keep)
    accelerator.wait_for_everyone()


def _load(recorder: Recorder, distiller: Distiller, parts: dict[str, Any], accelerator: Any) -> int:
    """Puts everything back as the newest checkpoint has it. Returns: the steps done, 0 where there is none."""
    run = recorder.run
    found = checkpoints.latest_checkpoint(run.checkpoints, run.log) if run.main else None
    accelerator.wait_for_everyone()
    last = checkpoints.goal(run.checkpoints / checkpoints.LAST)
    if not run.main and last.exists():
        found = checkpoints.read_checkpoint(last)
    if found is None:
        recorder.restore(None, 0, 0)
        return 0
    weights, state = found
    for role in distiller.trained():
        model_of(distiller.networks[role]).load_state_dict(weights[role])
    for name, average in distiller.moving_averages.items():
        model_of(average).load_state_dict(weights[name])
    distiller.load_state_dict(state["extra"], strict=False)
    for name, part in parts.items():
        if part is not None and state[name] is not None:
            part.load_state_dict(state[name])
    if (random := recorder.restore(state, state["step"], accelerator.process_index)) is not None:
        restore_random_state(random)
    return state["step"]
