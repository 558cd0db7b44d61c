"""On what runs were trained: one command has other digits on another kind of processor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tools.runs import Run

UNKNOWN = "a CPU that is not recorded"
"""Of runs that were made before ``environment.json`` named the processor."""


def processor(start: Mapping[str, Any]) -> str:
    """What an entry of ``environment.json`` calls the GPU, or the CPU (an old one its architecture)."""
    known = start.get("device_name", "?")
    return str(known if _kind(start) == "cuda" else start.get("cpu", known))


def differing_hardware(groups: Mapping[str, Mapping[Any, Run]]) -> list[str]:
    """In words, where runs come from different hardware, and where that cannot be known; nothing where all is one.

    Hardware is a GPU, or a CPU with its instruction set and the number of threads. A CPU that is not recorded may be
    any, and so differs from a GPU alone. Args: the runs by label and seed.
    """
    counts: Counter[str] = Counter()
    mixed, unknown, total, kinds = [], 0, 0, set()
    for label, runs in groups.items():
        places: set[str] = set()
        for run in runs.values():
            starts = run.files.get("environment", {}).get("starts") or ()
            own = {_place(start) for start in starts if start.get("device")}  # of a resumed run there may be several
            kinds |= {_kind(start) for start in starts if start.get("device")}
            counts.update(own)
            total, unknown = total + 1, unknown + (not own or UNKNOWN in own)
            places |= own
        mixed += [label] if len(places) > 1 else []
    told = []
    if len(counts.keys() - {UNKNOWN}) > 1 or len(kinds) > 1:
        parts = ", ".join(
            f"{place} ({count} run{'' if count == 1 else 's'})" for place, count in sorted(counts.items())
        )
        told.append(f"Different hardware, which moves results beyond what seeds do: {parts}.")
        told[-1] += f" Averaged over several: {'; '.join(mixed)}." if mixed else ""
    if unknown:
        which = "these" if unknown == total else f"{unknown} of these {total}"
        told.append(f"On which processor {which} runs were trained is not known: it was not recorded then.")
    return told


def _kind(start: Mapping[str, Any]) -> str:
    return str(start.get("device", "")).partition(":")[0]


def _place(start: Mapping[str, Any]) -> str:
    if _kind(start) == "cuda":
        return processor(start)
    threads = start.get("threads", "?")
    return f"{start['cpu']}, {threads} thread{'' if threads == 1 else 's'}" if start.get("cpu") else UNKNOWN
