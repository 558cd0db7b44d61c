"""On what runs were trained: one command has other digits on another kind of processor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tools.runs import Run
from tools.stats import counted

Groups = Mapping[str, Mapping[Any, Run]]
"""Runs by label and seed."""
Place = tuple[str, str]
"""Kind of device and what it is: a GPU, or a CPU with its instruction set and threads; "" where that is not known."""


def processor(start: Mapping[str, Any]) -> str:
    """What an entry of ``environment.json`` calls the GPU, or the CPU (an old one its architecture)."""
    known = start.get("device_name", "?")
    return str(known if _kind(start) == "cuda" else start.get("cpu", known))


def differing_hardware(groups: Groups) -> list[str]:
    """A line, where runs that are set beside each other come from different hardware, none where they do not.

    A CPU that was not recorded may be any, and so differs from a GPU alone.
    """
    by_label = {label: [place for run in runs.values() for place in places_of(run)] for label, runs in groups.items()}
    counts = Counter(place for places in by_label.values() for place in places)
    if not _differ(counts):
        return []
    parts = []
    for (_, name), count in sorted(counts.items()):
        parts.append(f"{name or 'a CPU that was not recorded'} ({counted(count, 'run')})")
    line = f"Different hardware, which moves results beyond what seeds do: {', '.join(parts)}."
    mixed = [label for label, places in by_label.items() if _differ(places)]
    return [f"{line} Averaged over several: {'; '.join(mixed)}." if mixed else line]


def differing_in_pairs(groups: Groups, baselines: Mapping[str, str]) -> list[str]:
    """As ``differing_hardware``, of runs that are averaged or whose difference from a baseline is taken, alone."""
    differing: dict[str, Mapping[Any, Run]] = {}
    for label in groups:
        pair = {name: groups[name] for name in (baselines.get(label, label), label) if name in groups}
        differing |= pair if differing_hardware(pair) else {}
    return differing_hardware(differing)


def unknown_processors(groups: Groups) -> list[str]:
    """A line, where it is not known on which processor runs were trained: none was recorded at first."""
    runs = [run for by_seed in groups.values() for run in by_seed.values()]
    unknown = sum(not places_of(run) or ("cpu", "") in places_of(run) for run in runs)
    which = "these" if unknown == len(runs) else f"{unknown} of these {len(runs)}"
    told = f"On which processor {which} runs were trained is not known: it was not recorded then."
    return [told] if unknown else []


def places_of(run: Run) -> set[Place]:
    """Where a run was trained: a resumed one may have been in several places."""
    starts = run.files.get("environment", {}).get("starts") or ()
    return {(_kind(start), _name(start)) for start in starts if _kind(start)}


def _differ(places: Iterable[Place]) -> bool:
    found = set(places)
    return len({kind for kind, _ in found}) > 1 or len({name for _, name in found if name}) > 1


def _kind(start: Mapping[str, Any]) -> str:
    return str(start.get("device") or "").partition(":")[0]


def _name(start: Mapping[str, Any]) -> str:
    if _kind(start) == "cuda":
        return processor(start)
    threads = start.get("threads", "?")
    return f"{start['cpu']}, {counted(threads, 'thread')}" if start.get("cpu") else ""
