"""Paired measurements of time and memory: their median with its interval against a target, as a table and a figure."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


def seconds(work: Callable[[], object], now: Callable[[], float]) -> float:
    """The duration of one call by the clock ``now``."""
    before = now()
    work()
    return now() - before


def cuda_seconds(work: Callable[[], object]) -> float:
    """The duration of one call on the GPU, from its first kernel to its last."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(largest sum of live tensor bytes during ``run``, bytes live at its end, what it returns included)."""
    import torch

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
        (low, high), (old_low, old_high) = row["interval"], old["interval"]
        worse, better = (low > old_high, high < old_low) if not row["at_least"] else (high < old_low, low > old_high)
        verdict = "slower" if worse else "faster" if better else "no difference that shows"
        if row["what"].startswith("peak memory"):
            verdict = {"slower": "more memory", "faster": "less memory"}.get(verdict, verdict)
        if on != once:
            verdict = f"measured on other sizes before: {once}"
        change = f"{100 * (row['median'] / old['median'] - 1):+.1f} %"
        lines.append(CHANGE.format(row["row"], f"{old['median']:.4g}", f"{row['median']:.4g}", change, verdict))
    return lines if len(lines) > 1 else ["no row of these was measured before"]


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a row: median, quartiles (thick), 95 % interval (thin), target (dashed, green on its good side)."""
    from matplotlib.figure import Figure

    from core.files import save_figure

    figure = Figure(figsize=(9, 0.9 * len(results) + 0.3), layout="constrained")
    for result, axis in zip(results, figure.subplots(len(results), squeeze=False)[:, 0], strict=True):
        axis.plot(result["interval"], [0, 0], color="C0", linewidth=1.5)
        axis.plot(result["quartiles"], [0, 0], color="C0", linewidth=6, alpha=0.4, solid_capstyle="butt")
        axis.plot(result["median"], 0, "o", color="C0", markersize=5)
        if result["target"] is not None:
            axis.axvline(result["target"], color="0.2", linestyle="--", linewidth=1)
            axis.margins(x=0.15)
            left, right = axis.get_xlim()
            good = (result["target"], right) if result["at_least"] else (left, result["target"])
            axis.axvspan(*good, color="C2", alpha=0.12, linewidth=0)
            axis.set_xlim(left, right)
        title = f"{result['row']}: {result['median']:.4g} {result['unit']}".rstrip()
        axis.set_title(f"{title}   ({result['what']})", fontsize=8, loc="left")
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
    save_figure(figure, path)
