"""The training loop of every task that has none of its own: one function, read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from core.errors import InputError, unknown
from core.training import checkpoint as checkpoints
from core.training.command import Stop
from core.training.distiller import Batch, Distiller, Losses, Progress
from core.training.meters import Clock, Window, peak_memory
from core.training.run import RunFolder
from core.training.schedule import Schedule
from core.training.seed import random_state, restore_random_state

DRAW_EVERY = 60.0
"""Least seconds between two drawings of the curves, one takes up to seconds; the end of the run always draws."""


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
        keep: checkpoints kept besides the best.
        precision: fp32, bf16, or fp16 (GPUs only).
        device: auto takes a GPU where there is one.
        compile: torch.compile of the whole forward with its losses.
        deterministic: bit-equal repeats on a GPU too, slower (on the CPU they always are).
        trackers: where metrics go besides the run folder: tensorboard, wandb, ... (accelerate's names).
    """

    epochs: float | None = None
    steps: int | None = None
    accumulate: int = 1
    clip: float | None = None
    log_every: int = 50
    evaluate_every: int | None = None
    keep: int = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    deterministic: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)


def make_accelerator(config: FitConfig, run: RunFolder | str, *, unused_parameters: bool = False) -> Any:
    """accelerate's Accelerator for this config. Raises: InputError for fp16 on the CPU or an uninstalled tracker."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs, LoggerType, ProjectConfiguration

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.precision == "fp16" and on_cpu:
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
            mixed_precision="no" if config.precision == "fp32" else config.precision,
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
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Trains to the end, or resumes a run that was cut off, exactly; returns what ``summary.json`` says.

    Args:
        optimizer: makes the optimiser from ``distiller.parameter_groups()``; each group keeps its own base rate.
        schedule: epochs done -> factor on each group's base learning rate.
        evaluate: -> values to log; called in evaluation mode. None: no evaluation and no ``best``.
        select: the evaluated value whose maximum makes ``best``.
        summary: what to say in ``summary.json`` besides.
    Raises: TrainingError for a NaN loss (naming network, term and step) or a full disk; InputError for a wrong config.
    """
    steps_per_epoch: int | None = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
    total_steps, interval = durations(config, steps_per_epoch)
    epoch_length = steps_per_epoch or interval
    if config.compile:
        distiller.compile()
    module = accelerator.prepare(distiller)  # not the optimiser: accelerate's wrapper costs 0.1 ms a step
    optim = optimizer(distiller.parameter_groups())
    base_rates = [group["lr"] for group in optim.param_groups]
    window = Window(
        accelerator.device,
        lambda values: accelerator.reduce(values, reduction="mean"),
        "lower the learning rate, clip gradients (--fit.clip 1.0) or train in bf16 / fp32",
    )
    clock = Clock(accelerator.device, accelerator.num_processes)
    step, best = 0, None
    factor, started_at = None, time.perf_counter()

    run.open()
    run.write_environment(str(accelerator.device))
    resumed = _load(run, distiller, optim, data, accelerator)
    if resumed is not None:
        step, best = resumed["step"], resumed["best"]
        window.rows = resumed["window"]
        clock.restore(resumed["seconds"], resumed["samples"])
    purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers("adm", init_kwargs=purge)

    def save(is_best: bool = False) -> None:
        window.check()
        state = {
            "step": step, "best": best, "seconds": clock.seconds, "samples": clock.samples,
            "optimizer": optim.state_dict(), "data": data.state_dict(), "metrics_size": run.metrics_size(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "extra": _extra(distiller),
            "processes": _gather({"random": random_state(), "window": window.rows_on_cpu()}, accelerator),
        }  # fmt: skip
        if run.main:
            weights = {r: (distiller.networks[r].state_dict(), distiller.metadata(r)) for r in distiller.trained()}
            checkpoints.save_checkpoint(run.checkpoints, step, weights, state, best=is_best, keep=config.keep)
        accelerator.wait_for_everyone()

    def report(values: dict[str, float], kind: str) -> None:
        line = {"kind": kind, "step": step, "epoch": step / epoch_length, **values}
        run.metric(line)
        accelerator.log({f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}, step=step)

    bar = _bar(total_steps, step, progress_bar and accelerator.is_main_process)
    batches = _endless(data)
    distiller.train()
    saved_at, drawn_at = step, -math.inf
    clock.resume()
    with Stop().listening() as stop, bar:
        while step < total_steps:
            now = schedule(step / epoch_length)
            progress = Progress(step, step / epoch_length, total_steps, total_steps / epoch_length, now)
            if now != factor:
                factor = now
                for group, rate in zip(optim.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
            batch: Batch = {k: _to(v, accelerator.device) for k, v in next(batches).items()}
            batch = distiller.before_step(batch, progress)
            for phase in distiller.phases:
                for part, share, final in _parts(batch, config.accumulate):
                    synchronise = final and not distiller.reduces_itself
                    with contextlib.nullcontext() if synchronise else accelerator.no_sync(module):
                        losses, observed = _shared(share, *module(part, progress, phase))
                        distiller.backward(losses, window.add(losses, observed), accelerator)
                distiller.before_update()
                _step(optim, distiller, config.clip, accelerator.scaler)
            distiller.after_step(batch, progress)
            step += 1
            clock.samples += _length(batch)
            window.close_step(step)
            bar.update()

            stopping = False
            if step % config.log_every == 0 or step == total_steps:
                means = window.flush()
                rate = clock.tick()
                report({"lr": optim.param_groups[0]["lr"], "images_per_second": rate, **means}, "train")
                bar.set_postfix({k: f"{v:.3f}" for k, v in means.items() if k.endswith("/ce")})
                stopping = _any(stop.requested, accelerator)
            elif accelerator.num_processes == 1:
                stopping = stop.requested
            if step % interval == 0 or step == total_steps:
                clock.pause()
                improved = False
                if evaluate is not None:
                    distiller.eval()
                    _share_buffers(distiller, accelerator)
                    values = evaluate()
                    distiller.train()
                    report(values, "evaluation")
                    run.log(_line(step, step / epoch_length, total_steps / epoch_length, values))
                    improved = select is not None and (best is None or values[select] > best[select])
                    if improved:
                        best = {"step": step, "epoch": step / epoch_length, "selected_by": select, **values}
                save(improved)
                if time.perf_counter() - drawn_at >= DRAW_EVERY:
                    run.draw()
                    drawn_at = time.perf_counter()
                saved_at = step
                clock.resume()
            if stopping and step < total_steps:
                if saved_at != step:
                    save()
                run.log(f"interrupted at step {step} of {total_steps}; the same command goes on from here")
                break

    status = "finished" if step >= total_steps else "interrupted"
    last = next((m for m in reversed(run.metrics()) if m["kind"] == "evaluation"), None)
    result = {
        "status": status, "step": step, "epoch": step / epoch_length, "last": last, "best": best,
        "seconds": clock.seconds,
        "images_per_second": clock.samples * accelerator.num_processes / max(clock.seconds, 1e-9),
        "wall_seconds_of_last_start": time.perf_counter() - started_at,
        "peak_memory_bytes": peak_memory(accelerator.device), **(summary or {}),
    }  # fmt: skip
    run.write_json("summary.json", result)
    run.draw()
    for tracker in accelerator.trackers:  # not end_training(): the processes stay together for a next call
        tracker.finish()
    accelerator.trackers.clear()
    return result


def durations(config: FitConfig, steps_per_epoch: int | None) -> tuple[int, int]:
    """(steps in all, steps between evaluations) of a run. Raises: InputError for a config that makes no run."""
    if steps_per_epoch == 0:
        raise InputError("the training set yields no batch: it is smaller than a batch may be")
    if config.epochs is None and config.steps is None:
        raise InputError("how long? give --fit.epochs or --fit.steps")
    if config.steps is not None:
        total = config.steps
    elif steps_per_epoch is None:
        raise InputError("data without an end need --fit.steps")
    else:
        assert config.epochs is not None
        total = round(config.epochs * steps_per_epoch)
    for name in ("accumulate", "log_every", "keep"):
        if getattr(config, name) < 1:
            raise InputError(f"fit.{name} must be at least 1")
    if config.clip is not None and config.clip <= 0:
        raise InputError(f"fit.clip must be positive: {config.clip}")
    if config.evaluate_every is not None and config.evaluate_every < 1:
        raise InputError("fit.evaluate_every must be at least 1")
    if total < 1:
        raise InputError("nothing to train: fit.epochs or fit.steps is 0 or less")
    return total, config.evaluate_every or steps_per_epoch or total


def _endless(data: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from data


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _parts(batch: Batch, parts: int) -> Iterator[tuple[Batch, float, bool]]:
    """The batch in ``parts`` pieces: (piece, its share of the gradient, whether it is the last)."""
    weight = float(batch.get("weight", 1.0))
    if parts == 1:
        yield batch, weight, True
        return
    length = _length(batch)
    parts = min(parts, length)
    for k in range(parts):
        start, end = length * k // parts, length * (k + 1) // parts
        piece = {name: v[start:end] if isinstance(v, Tensor) else v for name, v in batch.items()}
        yield piece, weight * (end - start) / length, k == parts - 1


def _shared(share: float, losses: Losses, observed: Mapping[str, Tensor]) -> tuple[Losses, Mapping[str, Tensor]]:
    """One forward's losses and observations, times its share of the batch."""
    if share == 1.0:
        return losses, observed
    weighted = {role: {term: value * share for term, value in terms.items()} for role, terms in losses.items()}
    return weighted, {name: value * share for name, value in observed.items()}


def _length(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _step(optim: torch.optim.Optimizer, distiller: Distiller, clip: float | None, scaler: Any) -> None:
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optim)
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), clip)
    if scaler is not None:
        scaler.step(optim)
        scaler.update()
    else:
        optim.step()
    optim.zero_grad()


def _any(flag: bool, accelerator: Any) -> bool:
    """Whether any process was told to stop: all leave after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def _gather(state: dict[str, Any], accelerator: Any) -> list[dict[str, Any]]:
    from accelerate.utils import gather_object

    return gather_object([state])


def _share_buffers(distiller: Distiller, accelerator: Any) -> None:
    # Between two forwards each process has BatchNorm statistics of its own; the first process's are those saved.
    if accelerator.num_processes > 1:
        for buffer in distiller.buffers():
            torch.distributed.broadcast(buffer, 0)


def _extra(distiller: Distiller) -> dict[str, Any]:
    """Weights, buffers and extra state (torch's ``get_extra_state``) that belong to no network: adapters, heads."""
    return {k: v for k, v in distiller.state_dict().items() if not k.startswith("networks.")}


def _load(
    run: RunFolder, distiller: Distiller, optim: torch.optim.Optimizer, data: Data, accelerator: Any
) -> dict[str, Any] | None:
    found = checkpoints.latest_checkpoint(run.checkpoints, run.log) if run.main else None
    accelerator.wait_for_everyone()
    last = run.checkpoints / checkpoints.LAST
    if not run.main and last.exists():
        found = checkpoints.read_checkpoint(last)
    if found is None:
        run.cut_metrics(0)
        return None
    weights, state = found
    for role in distiller.trained():
        distiller.networks[role].load_state_dict(weights[role])
    distiller.load_state_dict(state["extra"], strict=False)
    optim.load_state_dict(state["optimizer"])
    data.load_state_dict(state["data"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    processes = state.pop("processes")
    if len(processes) == accelerator.num_processes:
        own = processes[accelerator.process_index]
        restore_random_state(own["random"])
    else:
        run.log(f"saved by {len(processes)} process(es), resumed by {accelerator.num_processes}: not bit by bit alike")
        own = processes[0]
    state["window"] = own["window"]
    run.cut_metrics(state["metrics_size"])
    best = state["best"]
    if run.main and best is not None and (target := run.checkpoints / f"step-{best['step']:08d}").exists():
        checkpoints.link(run.checkpoints, checkpoints.BEST, target)
    run.log(f"resuming from step {state['step']} ({run.checkpoints})")
    return state


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="step", disable=None if shown else True, dynamic_ncols=True)


def _line(step: int, epoch: float, epochs: float, values: Mapping[str, float]) -> str:
    tops = "  ".join(f"{k.removesuffix('/top1')} {v:.2f} %" for k, v in values.items() if k.endswith("/top1"))
    return f"epoch {epoch:g}/{epochs:g}  step {step}  {tops}".rstrip()
