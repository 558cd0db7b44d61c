"""What the benchmark's rows have in common: paired measurements of time and memory, and the steps that are measured.

A row is the median of paired ratios with its interval against a target, as a line of a table and in a figure.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import Timer
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from core.training.distiller import Batch, Distiller, Losses, Progress
from core.training.meters import LossBuffer
from core.training.step import train_step

PROGRESS = Progress(1, 0.5, 4, 2.0)
Step = Callable[[], None]
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)
Values = tuple[list[float], str]
"""A value for each pair of measurements, and what they were measured on, in words."""


@dataclass(frozen=True)
class Measure:
    """What is measured, in ``unit`` (a ratio has none), and the value it must not exceed (``at_least``: reach)."""

    what: str
    values: Callable[[Any], Values]
    target: float | None = None
    at_least: bool = False
    unit: str = ""

    def good(self, value: float) -> bool | None:
        if self.target is None:
            return None
        return value >= self.target if self.at_least else value <= self.target


def cuda_seconds(work: Callable[[], object], times: int) -> float:
    """The duration of so many calls on the GPU, from their first kernel to their last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(largest sum of live tensor bytes during ``run``, bytes live at its end, what it returns included)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.backends.cudnn.flags(benchmark=False):  # its trials take memory that no later step does
            kept = run()
        peak, end = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks
        with torch.profiler.profile(profile_memory=True) as profiler:
            kept = run()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
        live = list(itertools.accumulate(event["args"]["Bytes"] for event in changes))
        peak, end = max(live), live[-1]
    del kept
    return peak, end


def paired(a: Callable[[], float], b: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """What both return, called in turn (A B, B A, ...) after a warm-up; garbage is collected between pairs alone."""
    for warm_up in (a, b):
        warm_up()
    gc.disable()
    try:
        results = []
        for k in range(pairs):
            gc.collect()
            values = {side: side() for side in ((a, b) if k % 2 == 0 else (b, a))}
            results.append((values[a], values[b]))
        return results
    finally:
        gc.enable()


def ratios(results: Sequence[tuple[float, float]], unit: str, scale: float = 1.0) -> Values:
    """First over second of each pair, and the medians of both (times ``scale``) in words."""
    a, b = (scale * statistics.median(side) for side in zip(*results, strict=True))
    return [x / y for x, y in results], f"{a:.4g} : {b:.4g} {unit}"


@dataclass(frozen=True)
class Settings:
    """How all rows are measured. ``now``: wall or processor time, the latter for a machine that others use too."""

    device: torch.device
    pairs: int
    quick: bool
    now: Callable[[], float] = time.perf_counter

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """A size, by where it is measured."""
        return quick if self.quick else gpu if self.on_gpu else cpu

    def timer(self, work: Callable[[], object], times: int = 1) -> Callable[[], float]:
        """How long ``work`` takes so many times, by CUDA events on a GPU."""
        return partial(cuda_seconds, work, times) if self.on_gpu else partial(Timer(work, timer=self.now).timeit, times)

    def ratio(self, a: Callable[[], float], b: Callable[[], float], on: str, unit: str, scale: float = 1.0) -> Values:
        """The first's seconds over the second's. ``on``: the sizes, in front of the medians of both in ``unit``."""
        values, medians = ratios(paired(a, b, self.pairs), unit, scale)
        return values, f"{on} {medians}"

    def step_ratio(self, step: Step, other: Step, sizes: str) -> Values:
        """How long one takes over the other; on a GPU several together are timed, so that the host is ahead of it."""
        repeat = 5 if self.on_gpu else 1
        return self.ratio(self.timer(step, repeat), self.timer(other, repeat), f"{sizes},", "ms a step", 1e3 / repeat)

    def memory_ratio(self, ours: Callable[[], Step], other: Callable[[], Step], sizes: str) -> Values:
        """Peak bytes of one over the other, from building the networks to the end of their second step.

        One measurement on the CPU, where it is the same each time. Args: what builds the networks and returns a step.
        """

        def two_steps(build: Callable[[], Step]) -> Step:
            step = build()
            step()
            step()
            return step

        peaks = []
        for _ in range(self.pairs if self.on_gpu else 1):
            (a, kept_a), (b, kept_b) = (peak_bytes(partial(two_steps, build), self.device) for build in (ours, other))
            peaks.append((a, b))
        values, on = ratios(peaks, "MiB", 2**-20)
        return values, f"{sizes}, {on}; {(a - kept_a) / (b - kept_b):.4f} without weights and momentum"


# --- steps ------------------------------------------------------------------------------------------------------------


def own_step(distiller: Distiller, batch: Batch, optimizer: Callable[..., Any] = sgd, *, bf16: bool = False) -> Step:
    """Training's own step on one batch: with the method's own views, backward and optimiser."""
    optim = optimizer(distiller.parameter_groups())
    device = next(distiller.parameters()).device
    accelerator = SimpleNamespace(device=device, scaler=None, no_sync=lambda module: contextlib.nullcontext())
    losses = LossBuffer(device, lambda values: values, "")

    def forward(*arguments: Any) -> tuple[Losses, Mapping[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return distiller(*arguments)

    def step() -> None:
        train_step(forward, distiller, optim, batch, PROGRESS, accelerator, losses)
        losses.close_step(0)
        losses.rows.clear()

    return step


def bare_step(
    networks: Mapping[str, nn.Module],
    forward: Callable[[], Losses],
    optimizer: Callable[..., Any] = sgd,
    teacher: Callable[[], object] | None = None,
) -> Step:
    """Forward, backward and step of the networks, and nothing else but what a fixed ``teacher`` forwards before."""
    optim = optimizer([{"params": list(network.parameters())} for network in networks.values()])

    def step() -> None:
        if teacher is not None:
            with torch.no_grad():
                teacher()
        first, *others = (value for terms in forward().values() for value in terms.values())
        sum(others, start=first).backward()
        optim.step()
        optim.zero_grad()

    return step


# --- results ----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples))
    return medians[round(0.025 * resamples)], medians[round(0.975 * resamples) - 1]


def summary(name: str, measure: Measure, values: Sequence[float], on: str) -> dict[str, Any]:
    """A row of the benchmark. ``reached`` judges the median, ``certain`` says whether the whole interval agrees."""
    low, high = interval(values)
    middle = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "row": name, "what": measure.what, "unit": measure.unit, "target": measure.target, "at_least": measure.at_least,
        "median": middle[1], "quartiles": [middle[0], middle[2]], "interval": [low, high],
        "reached": measure.good(middle[1]), "certain": measure.good(low) == measure.good(high),
        "pairs": len(values), "on": on, "values": list(values),
    }  # fmt: skip


LINE = "{:<30} {:>8}  {:<18}  {:<18}  {:<8}  {:<12}  {}"
HEADER = LINE.format("row", "median", "quartiles", "95 % of the median", "target", "reached", "measured on")


def line(result: Mapping[str, Any]) -> str:
    """A ``summary`` as a line below ``HEADER``; "unsure" where the interval holds the target."""
    target = "" if result["target"] is None else f"{'>=' if result['at_least'] else '<='} {result['target']:g}"
    reached = {True: "yes", False: "no", None: ""}[result["reached"]] + ("" if result["certain"] else ", unsure")
    spans = (f"{low:.4g} .. {high:.4g}" for low, high in (result["quartiles"], result["interval"]))
    return LINE.format(result["row"], f"{result['median']:.4g}", *spans, target, reached, result["on"])


CHANGE = "{:<30} {:>8} {:>8}  {:<9}  {}"


def changes(results: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became of earlier results, as lines: of each row that both have, whether it got slower (or heavier).

    It did where the whole interval of the median lies on the worse side of the earlier one. Rows that were measured on
    other sizes are named and not judged.
    """
    known = {row["row"]: row for row in before}
    lines = [CHANGE.format("row", "before", "now", "change", "")]
    for row in results:
        if (old := known.get(row["row"])) is None:
            continue
        on, once = (r["on"].rpartition(", ")[0] for r in (row, old))
        words = ("more memory", "less memory") if row["what"].startswith("peak memory") else ("slower", "faster")
        above, below = row["interval"][0] > old["interval"][1], row["interval"][1] < old["interval"][0]
        verdict = words[above == row["at_least"]] if above or below else "no difference that shows"
        if on != once:
            verdict = f"measured on other sizes before: {once}"
        change = f"{100 * (row['median'] / old['median'] - 1):+.1f} %"
        lines.append(CHANGE.format(row["row"], f"{old['median']:.4g}", f"{row['median']:.4g}", change, verdict))
    return lines if len(lines) > 1 else ["no row of these was measured before"]


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a row: median, quartiles (thick), 95 % interval (thin), target (dashed, shaded on its good side)."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from core.analysis.colors import BLUE, GREEN
    from core.files import save_figure

    figure = Figure(figsize=(9, 1.1 * len(results) + 0.6), layout="constrained")
    for result, axis in zip(results, figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        axis.plot(result["interval"], [0, 0], color=BLUE, linewidth=1.5)
        axis.plot(result["quartiles"], [0, 0], color=BLUE, linewidth=6, alpha=0.4, solid_capstyle="butt")
        axis.plot(result["median"], 0, "o", color=BLUE, markersize=5)
        axis.margins(x=0.15)
        if result["target"] is not None:
            axis.axvline(result["target"], color="0.2", linestyle="--", linewidth=1)
            left, right = axis.get_xlim()
            good = (result["target"], right) if result["at_least"] else (left, result["target"])
            axis.axvspan(*good, color=GREEN, alpha=0.12, linewidth=0)
            axis.set_xlim(left, right)
        axis.set_title(f"{result['row']}: {result['median']:.4g} {result['unit']}".rstrip(), fontsize=8, loc="left")
        axis.set_xlabel(f"{result['what']} ({result['unit'] or 'ratio'})", fontsize=7)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
    legend = [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="median"),
        Line2D([], [], color=BLUE, linewidth=6, alpha=0.4, label="quartiles"),
        Line2D([], [], color=BLUE, linewidth=1.5, label="95 % interval"),
        Line2D([], [], color="0.2", linestyle="--", linewidth=1, label="target"),
        Patch(facecolor=GREEN, alpha=0.12, label="its good side"),
    ]
    figure.legend(handles=legend, fontsize="small", loc="outside upper center", ncols=len(legend), frameon=False)
    save_figure(figure, path)
