"""What a run records while it trains: metrics, best, summary, curves, console; for ``fit`` and segmentation's hook."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .checkpoint import BEST, numbered, point, prune, step_of
from .lines import start_line, time_left, training_line
from .meters import Clock, LossBuffer, peak_memory
from .run import RunFolder, read_metrics
from .seed import random_state

DRAW_EVERY = 60.0
"""Least seconds between two drawings of the curves, one takes up to seconds; the end of the run always draws."""
SILENT = 30.0
"""Seconds without a line, after which one process says one before its log point."""
FILES = "metrics.jsonl (every value), curves.png, checkpoints/, at the end summary.json"
BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {remaining} left{postfix}"  # leaves room for the losses


@dataclass(eq=False)
class Recorder:
    """Losses, times, the best evaluation and where they are written."""

    run: RunFolder
    device: torch.device
    processes: int  # by how many the run trains
    mean: Callable[[Tensor], Tensor]  # of a tensor over all processes
    gather: Callable[[Any], list[Any]]  # this process's object -> those of all processes
    advice: str  # what may help against losses that are not finite
    total: int  # steps of the whole run, in `unit`s ("step", "iteration")
    log_every: int  # steps between training lines; on the terminal and in log.txt the first step has one besides
    keep: int  # checkpoints besides the best
    unit: str = "step"
    epoch_length: int | None = None  # steps of an epoch; lines then say the epoch too
    select: str | None = None  # the evaluated value whose maximum makes `best`; None: there is no best
    track: Callable[[dict[str, float], int], object] = lambda values, step: None  # scalars for TensorBoard or another
    progress_bar: bool = True  # shown only on a terminal

    def __post_init__(self) -> None:
        self.losses = LossBuffer(self.device, self.mean, self.advice)
        self.clock = Clock(self.device, self.processes)
        self.best: dict[str, Any] | None = None
        self._started, self._drawn = time.perf_counter(), -math.inf

    def restore(self, state: Mapping[str, Any] | None, step: int, rank: int) -> dict[str, Any] | None:
        """Goes on from what ``state()`` said after ``step`` steps; None: from nothing.

        Returns: the random state of this process (``rank``), None where there is none to go on with exactly.
        """
        if state is None:
            self.run.cut_metrics(0)
            return None
        self.run.cut_metrics(state["metrics_size"], state.get("metrics", {}).get("sha256"))
        if state.get("run", self.run.identity) != self.run.identity:
            raise InputError(f"{self.run.checkpoints} are of another run: move them away, or choose another --out")
        processes = state["processes"]
        own = processes[min(rank, len(processes) - 1)]
        self.best, self.losses.rows = state["best"], own["window"]
        self.clock = Clock(self.device, self.processes, state["seconds"], state["samples"])
        if len(processes) != self.processes:
            said = f"saved by {len(processes)} process(es), resumed by {self.processes}"
            self.run.log(f"{said}: not bit by bit alike")
        for checkpoint in numbered(self.run.checkpoints) if self.run.main and self.best is not None else ():
            if step_of(checkpoint) == self.best["step"]:
                point(BEST, checkpoint)
        if self.run.main:
            prune(self.run.checkpoints, self.keep)  # a kill may have come before
        self.run.log(f"resuming from {self.unit} {step} ({self.run.checkpoints})")
        return own["random"] if len(processes) == self.processes else None

    def start(
        self,
        step: int,
        networks: Mapping[str, torch.nn.Module],
        about: Mapping[str, Mapping[str, Any]],
        sizes: Mapping[str, int],
        precision: str,
    ) -> None:
        """Before the first step that is taken now: says what trains where, shows the bar, starts the clock.

        Args: the steps that are done; the others as of ``start_line``.
        """
        from tqdm import tqdm

        self.run.write_environment(str(self.device))
        self.run.log(start_line(networks, about, sizes, self.device, precision, self.processes))
        board = ", tensorboard/" if (self.run.path / "tensorboard").exists() else ""
        self.run.log(f"these lines go into {self.run.path / 'log.txt'}; beside it {FILES}{board}")
        hidden = None if self.progress_bar and self.run.main else True
        self.bar = tqdm(total=self.total, initial=step, disable=hidden, dynamic_ncols=True, bar_format=BAR)
        self._first, self._said = step + 1, time.perf_counter()
        self._warm = self._said
        self.clock.resume()

    def after_step(self, step: int, images: int, rate: float, stop: bool) -> bool:
        """Counts a step and, at log points, writes a training line: learning rate, images/s, means of the losses.

        Args: how many steps are done with this one; images of it, on this process; the learning rate; whether this
            process was told to stop.
        Returns: whether to stop now: several processes do it after the same step, at a log point.
        Raises: TrainingError for a NaN.
        """
        self.losses.close_step(step)
        self.clock.samples += images
        self.bar.update()
        if step % self.log_every and step < self.total:
            silent = self.processes == 1 and time.perf_counter() - self._said > SILENT
            if step == self._first or silent:  # a look alone: the log point's line is of all its steps
                self._say(step, {"lr": rate, "images_per_second": self.clock.rate(), **self.losses.check()})
            return stop and self.processes == 1
        means = self.losses.flush()
        values = {"lr": rate, "images_per_second": self.clock.tick(), **means}
        self._line("train", step, values)
        self._say(step, values)
        told = bool(self.losses.mean(torch.tensor(float(stop), device=self.device)) > 0)  # any of them
        return told and step < self.total

    def evaluated(self, step: int, values: Mapping[str, Any]) -> bool:
        """An evaluation line. Returns: whether it is the best so far."""
        self._line("evaluation", step, values)
        if scores := _scores(values):
            self.run.log(f"{self._place(step)}  {scores}")
        if self.select is None or (self.best is not None and values[self.select] <= self.best[self.select]):
            return False
        self.best = {"step": step, **self._epoch(step), "selected_by": self.select, **values}
        return True

    def has_waited(self, step: int, patience: int | None, interval: int) -> bool:
        """Whether ``patience`` evaluations, one each ``interval`` steps, have brought none better than the best."""
        return patience is not None and self.best is not None and step - self.best["step"] >= patience * interval

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this, and the random state of each process."""
        window = [{**row, "values": row["values"].cpu()} for row in self.losses.rows]
        own = {"random": random_state(), "window": window}
        return {
            "run": self.run.identity, "best": self.best, "seconds": self.clock.seconds, "samples": self.clock.samples,
            "metrics_size": self.run.metrics_size(), "metrics": self.run.metrics_hash(), "processes": self.gather(own),
        }  # fmt: skip

    def draw(self) -> None:
        """The curves, unless they were drawn a moment ago."""
        if time.perf_counter() - self._drawn >= DRAW_EVERY:
            self.run.draw()
            self._drawn = time.perf_counter()

    def finish(self, step: int, summary: Mapping[str, Any], *, early: bool = False) -> dict[str, Any]:
        """Writes ``summary.json`` and the curves; ``early``: patience is at its end. Returns: what the summary says."""
        self.bar.close()
        early = early and step < self.total
        ending: dict[str, Any] = {}
        if early and self.best is not None:
            reason = f"no evaluation since {self.unit} {self.best['step']} brought a better {self.select}"
            ending = {"stopped_early": {"at": step, "of": self.total, "best": self.best["step"], "why": reason}}
            self.run.log(f"stopped early at {self.unit} {step} of {self.total} (fit.patience): {reason}")
        elif step < self.total:
            place = f"{self.unit} {step} of {self.total}"
            self.run.log(f"interrupted at {place}; the same command goes on from here")
        lines = read_metrics(self.run.metrics_file)
        result = {
            "status": "finished" if early or step >= self.total else "interrupted",
            "step": step,
            **ending,
            **self._epoch(step),
            "last": next((line for line in reversed(lines) if line["kind"] == "evaluation"), None),
            "best": self.best,
            "seconds": self.clock.seconds,
            "images_per_second": self.clock.samples * self.processes / max(self.clock.seconds, 1e-9),
            "wall_seconds_of_last_start": time.perf_counter() - self._started,
            "peak_memory_bytes": peak_memory(self.device),
            "metrics": self.run.metrics_hash(),
            **summary,
        }
        self.run.write_json("summary.json", result)
        self.run.draw()
        return result

    def _line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.run.metric({"kind": kind, "step": step, **self._epoch(step), **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.track({f"{kind}/{self.run.shown(name)}": value for name, value in numbers.items()}, step)

    def _say(self, step: int, values: Mapping[str, Any]) -> None:
        """A training line: on the bar where there is one, else on the terminal; always in ``log.txt``."""
        values = {self.run.shown(name): value for name, value in values.items()}
        said, now = training_line(values, peak_memory(self.device)), time.perf_counter()
        self._said = now
        place = f"{self.unit} {step}/{self.total}"
        if step == self._first:  # which also compiled, warmed up, started workers: no measure of what is left
            self._warm, left = now, ""
        else:
            left = time_left((now - self._warm) / (step - self._first) * (self.total - step))
        self.bar.set_postfix_str(said)
        self.run.log("  ".join(filter(None, (place, said, left))), shown=self.bar.disable)

    def _epoch(self, step: int) -> dict[str, float]:
        return {} if self.epoch_length is None else {"epoch": step / self.epoch_length}

    def _place(self, step: int) -> str:
        if self.epoch_length is None:
            return f"{self.unit} {step}/{self.total}"
        return f"epoch {step / self.epoch_length:g}/{self.total / self.epoch_length:g}  {self.unit} {step}"


def _scores(values: Mapping[str, Any]) -> str:
    """Each network's top-1 or mIoU in percent."""
    shown = {"top1": "", "mIoU": "mIoU "}
    parts = ((*name.rpartition("/")[::2], value) for name, value in values.items())
    return "  ".join(f"{role} {shown[term]}{value:.2f} %" for role, term, value in parts if term in shown)
