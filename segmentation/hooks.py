"""What mmengine's Runner is given so that a run leaves, stops and resumes like those of the other tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, all_reduce, broadcast, get_dist_info
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from core.errors import TrainingError
from core.files import write_atomically
from core.training.command import Stop
from core.training.meters import Clock, LossBuffer, peak_memory
from core.training.recorder import DRAW_EVERY
from core.training.run import RunFolder
from core.training.seed import random_state, restore_random_state, seed_everything
from segmentation.checkpoint import BEST, LAST, checkpoint_path, point, prune
from segmentation.export import export_network

ADVICE = "lower the learning rate, clip gradients (--cfg-options optim_wrapper.clip_grad.max_norm=1.0) or train in fp32"


class RunHook(Hook):
    """Run folder, checkpoints, stopping and exact resuming.

    Losses: see ``core.training.meters.LossBuffer``; the device is only waited for at log points and saves. A
    checkpoint follows each evaluation, every ``save_every`` iterations, and an interruption.

    Args:
        run: the folder.
        cfg: of the run; its seed is that of what training draws (dropout), with the process's number.
        text: the same config as text, for the checkpoints.
        stop: says when to finish the iteration, save and leave.
        resuming: whether the Runner resumes one of our checkpoints.
        log_every, save_every, keep, select: as in ``configs/_base_/runtime.py``.
        summary: what to say in ``summary.json`` besides.
    """

    priority = "VERY_LOW"  # after the scheduler's step: what is saved is the state before the next iteration

    def __init__(
        self,
        run: RunFolder,
        cfg: Config,
        text: str,
        stop: Stop,
        *,
        resuming: bool,
        log_every: int,
        save_every: int | None,
        keep: int,
        select: str,
        summary: Mapping[str, Any],
    ) -> None:
        self.run, self.cfg, self.text, self.stop, self.resuming = run, cfg, text, stop, resuming
        self.log_every, self.save_every, self.keep, self.select = log_every, save_every, keep, select
        self.summary = summary
        self.result: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self.rank, self.processes = get_dist_info()
        self._loaded: dict[str, Any] | None = None
        self._saving: dict[str, Any] = {}
        self._before_evaluation: dict[str, Any] = {}
        self._started = False
        self._drawn = -math.inf
        self._rate = 0.0

    # Start

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if not self.resuming:
            return
        ours, theirs = set(bare(runner.model).state_dict()), set(checkpoint["state_dict"])
        if ours != theirs:
            raise TrainingError(f"the checkpoint has other weights than this model, as {min(ours ^ theirs)}")
        self._loaded = checkpoint["run"]

    def before_train(self, runner: Any) -> None:
        self.device = next(runner.model.parameters()).device
        self.window = LossBuffer(self.device, self._mean, ADVICE)
        self.clock = Clock(self.device, self.processes)
        self.run.open()
        self.run.write_environment(str(self.device))
        if (state := self._loaded) is None:
            self.run.cut_metrics(0)
        else:
            self.best = state["best"]
            self.clock.restore(state["seconds"], state["samples"])
            self.run.cut_metrics(state["metrics_size"])
            processes = state["processes"]
            if len(processes) != self.processes:
                self.run.log(
                    f"saved by {len(processes)} process(es), resumed by {self.processes}: not bit by bit alike"
                )
            self.window.rows = processes[min(self.rank, len(processes) - 1)]["window"]
            if self.run.main and self.best is not None and checkpoint_path(self.run.path, self.best["step"]).exists():
                point(self.run.path, BEST, self.best["step"])
            self.run.log(f"resuming from iteration {runner.iter} ({self.run.checkpoints})")
        self.bar = _bar(runner.max_iters, runner.iter, self.run.main)
        self.began = time.perf_counter()
        self.clock.resume()

    # Each iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if not self._started:  # not earlier: the loaders draw their own seeds when they start
            self._started = True
            processes = [] if self._loaded is None else self._loaded["processes"]
            if len(processes) == self.processes:
                restore_random_state(processes[self.rank]["random"])
            else:
                seed_everything(self.cfg.seed, "training", self.rank, runner.iter)
        self._rate = runner.optim_wrapper.get_lr()["lr"][0]

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step = runner.iter + 1
        terms = {name.replace("/loss_", "/"): value for name, value in outputs.items() if name != "loss"}
        self.window.observe(terms)
        self.window.close_step(step)
        self.clock.samples += len(data_batch["inputs"])
        self.bar.update()
        stopping = self.processes == 1 and self.stop.requested
        if step % self.log_every == 0 or step == runner.max_iters:
            means = self.window.flush()
            self._report(runner, "train", step, {"lr": self._rate, "images_per_second": self.clock.tick(), **means})
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in means.items() if name.endswith("/ce")})
            stopping = self._any(self.stop.requested)
        if stopping and step < runner.max_iters:
            runner.train_loop.stop_training = True
        due = self.save_every is not None and step % self.save_every == 0
        if (due or stopping or step == runner.max_iters) and not _evaluates(runner, step):
            self.clock.pause()
            self._save(runner, step)
            self.clock.resume()

    # Evaluation

    def before_val(self, runner: Any) -> None:
        self.clock.pause()
        self._before_evaluation = random_state()
        self._share_buffers(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        step, values = runner.iter, {name: float(value) for name, value in (metrics or {}).items()}
        restore_random_state(self._before_evaluation)  # so that evaluating changes nothing in the training
        self._report(runner, "evaluation", step, {"split": "val", **values})
        self.run.log(f"iteration {step}/{runner.max_iters}  {scores(values)}")
        if self.select not in values:
            raise TrainingError(f"run.select = {self.select!r} is not evaluated: choose one of {', '.join(values)}")
        improved = self.best is None or not values[self.select] <= self.best[self.select]
        if improved:
            self.best = {"step": step, "selected_by": self.select, "split": "val", **values}
        self._save(runner, step, improved)
        if time.perf_counter() - self._drawn >= DRAW_EVERY:
            self.run.draw()
            self._drawn = time.perf_counter()
        self.clock.resume()

    # End

    def after_train(self, runner: Any) -> None:
        self.bar.close()
        finished = runner.iter >= runner.max_iters
        if not finished:
            self.run.log(f"interrupted at iteration {runner.iter} of {runner.max_iters}; the same command goes on")
        elif self.run.main:
            student = bare(runner.model).networks["student"]
            metainfo = runner.train_dataloader.dataset.metainfo
            export_network(self.cfg, student, "student", metainfo, self.run.path)
        self.result = {
            "status": "finished" if finished else "interrupted",
            "step": runner.iter,
            "last": next((m for m in reversed(self.run.metrics()) if m["kind"] == "evaluation"), None),
            "best": self.best,
            "selected_on": "val",
            "note": "best was chosen by the mIoU of the evaluated images: read last",
            "seconds": self.clock.seconds,
            "images_per_second": self.clock.samples * self.processes / max(self.clock.seconds, 1e-9),
            "wall_seconds_of_last_start": time.perf_counter() - self.began,
            "peak_memory_bytes": peak_memory(self.device),
            **self.summary,
        }
        self.run.write_json("summary.json", self.result)
        self.run.draw()

    # Parts

    def _report(self, runner: Any, kind: str, step: int, values: dict[str, Any]) -> None:
        self.run.metric({"kind": kind, "step": step, **values})
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)}
        runner.visualizer.add_scalars(numbers, step=step)

    def _save(self, runner: Any, step: int, best: bool = False) -> None:
        self.window.check()
        self._share_buffers(runner)
        check_weights(bare(runner.model), step)
        self._saving = {
            "best": self.best,
            "seconds": self.clock.seconds,
            "samples": self.clock.samples,
            "metrics_size": self.run.metrics_size(),
            "processes": all_gather_object({"random": random_state(), "window": self.window.rows_on_cpu()}),
        }
        if self.run.main:
            meta = {"epoch": 0, "iter": step}

            def write(path: Path) -> None:
                runner.save_checkpoint(str(path.parent), path.name, meta=meta, by_epoch=False)

            write_atomically(checkpoint_path(self.run.path, step), write)
            point(self.run.path, LAST, step)
            if best:
                point(self.run.path, BEST, step)
            prune(self.run.path, self.keep)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self._saving
        checkpoint["meta"]["cfg"] = self.text
        # Histories are objects that weights_only=True refuses, and numpy's scalars are too.
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = type(hub["log_scalars"])()
        hub["runtime_info"] = {k: v.item() if hasattr(v, "item") else v for k, v in hub["runtime_info"].items()}

    def _share_buffers(self, runner: Any) -> None:
        # Between two forwards each process has BatchNorm statistics of its own; the first process's are those saved.
        if self.processes > 1:
            for buffer in bare(runner.model).buffers():
                broadcast(buffer, 0)

    def _mean(self, values: Tensor) -> Tensor:
        if self.processes > 1:
            all_reduce(values, op="mean")
        return values

    def _any(self, flag: bool) -> bool:
        """Whether any process was told to stop: all leave after the same iteration."""
        if self.processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        all_reduce(flags)
        return bool(flags > 0)


def bare(model: Any) -> Any:
    """The model without the wrapper that several processes put around it."""
    return model.module if is_model_wrapper(model) else model


def check_weights(model: nn.Module, step: int) -> None:
    """Raises: TrainingError naming the first weight that is not finite."""
    values = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    for name, good in zip(values, finite, strict=True):
        if not good:
            role, _, weight = name.partition(".")
            raise TrainingError(f"{role}: the weight {weight} is not finite at iteration {step}; nothing was saved")


def scores(values: Mapping[str, float]) -> str:
    """The mIoU of each network in a line."""
    found = {name.removesuffix("/mIoU"): value for name, value in values.items() if name.endswith("/mIoU")}
    return "  ".join(f"{role} mIoU {value:.2f} %" for role, value in found.items())


def _evaluates(runner: Any, step: int) -> bool:
    """Whether the loop evaluates after this iteration; the checkpoint is then saved behind it."""
    loop = runner.train_loop
    due = step % loop.val_interval == 0 or step == loop.max_iters
    return runner.val_loop is not None and step >= loop.val_begin and due


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="iteration", disable=None if shown else True, dynamic_ncols=True)
