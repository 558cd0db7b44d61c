"""Measures what ADM and the training loop cost, as ratios: both sides in one process and in turn (A B, B A, A B, ...).

    python tools/benchmark/run.py --rows step_resnet32x4_8x4 loader --out runs/benchmark
    python tools/benchmark/run.py --compare runs/benchmark-before/benchmark.json

Writes ``benchmark.json`` and ``benchmark.png`` into the folder and prints the table. Seconds of different machines or
runs do not compare, the median of paired ratios does. A step is forward, backward and SGD. Memory is the largest sum of
live tensor bytes from building the networks to the end of their second step: on a GPU what the allocator reports, on
the CPU the same from torch.profiler's record of every allocation and release (temporaries inside operators too).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError, unknown
from core.files import save_json
from core.training.command import LineParser, run_command
from tools.benchmark.ratios import HEADER, Settings, changes, draw, line, summary
from tools.benchmark.rows import GPU_ROWS, ROWS

MOST_THREADS = 1024


def make_parser() -> argparse.ArgumentParser:
    from jsonargparse.typing import PositiveInt

    epilog = f"rows: {' '.join(ROWS)}\n\non a GPU also: {' '.join(GPU_ROWS)}"
    raw = argparse.RawDescriptionHelpFormatter
    parser = LineParser(description=__doc__, epilog=epilog, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="measure these alone (default: all, see below)")
    parser.add_argument("--pairs", type=PositiveInt, default=20, help="pairs of measurements for each row (20)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder to write to (runs/benchmark)")
    parser.add_argument("--quick", action="store_true", help="tiny networks: shows that all runs, measures nothing")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--threads", type=PositiveInt, default=os.cpu_count(), help="CPU threads (all cores)")
    clock = "cpu counts processor time, for a machine that others use too (loader, loop_...: always wall)"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier benchmark.json: says what got slower")
    return parser


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier benchmark.json. Raises: InputError where it is none."""
    try:
        rows = json.loads(file.read_text())["rows"] if file.is_file() else []
        if rows and all({"row", "median", "interval", "on"} <= row.keys() for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"--compare {file} is no benchmark.json of an earlier run")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError for an unknown row or option, or nothing to compare with."""
    args = make_parser().parse_args(argv)
    if args.threads > MOST_THREADS:
        raise InputError(f"--threads must be at most {MOST_THREADS}: {args.threads}")
    before = None if args.compare is None else read_rows(args.compare)
    rows = {**ROWS, **GPU_ROWS}
    for name in args.rows or ():
        if name not in rows:
            raise unknown("row", name, rows)
    from core.training.run import environment

    torch.set_num_threads(args.threads)
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    settings = Settings(torch.device("cuda" if on_gpu else "cpu"), args.pairs, args.quick, now)
    said = {"environment": environment(str(settings.device)), "clock": args.clock, "quick": args.quick}
    results: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for name in args.rows or [*ROWS, *(GPU_ROWS if on_gpu else ())]:
        torch.backends.cudnn.benchmark = True
        results.append(summary(name, rows[name], *rows[name].values(settings)))
        print(line(results[-1]), flush=True)
        save_json({**said, "rows": results}, args.out / "benchmark.json")
    draw(results, args.out / "benchmark.png")
    if before is not None:
        print(f"\nagainst {args.compare}:", *changes(results, before), sep="\n")
    return 0


if __name__ == "__main__":
    run_command(main)
