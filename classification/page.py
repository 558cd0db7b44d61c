"""The page of a run: words, tables and pictures of what was found, as one HTML file that needs nothing else."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from classification.findings import Compared, Findings, Measured
from classification.outcomes import LEVEL, Pairing
from core.analysis.attention import KEYS
from core.analysis.pages import page_template
from core.files import plain
from core.training.checkpoint import BEST, LAST
from core.training.run import flatten

MOST_CONFUSIONS = 12
UNEVEN = 1.5
"""Times as many images of one class as of another from which on the page says so."""
Grid = Sequence[Sequence[str]]
NONE = "-"


@dataclass(frozen=True)
class Section:
    """A part of the page: words, then tables by caption, pictures by caption (PNG), and text as it is by caption."""

    title: str
    words: Sequence[str] = ()
    grids: Mapping[str, Grid] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def as_html(found: Findings, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    """One page that needs nothing else. ``pictures``: by section (classes, confusions, calibration, maps, curves)."""
    template = page_template(
        Path(__file__).with_suffix(".html"),
        width=lambda png: int.from_bytes(png[16:20], "big"),  # pixels, in a PNG's head
        is_number=lambda cell: re.match(r"[-+]?\d", cell) is not None,
    )
    main = found.main
    sections = [
        Section("At a glance", headline(found), {_glance_caption(found): glance(found)}),
        _compared(found),
        _by_class(found, pictures["classes"]),
        _confusions(found, pictures["confusions"]),
        Section("Calibration", CALIBRATION, pictures=pictures["calibration"]),
        Section("Cost on this machine", _cost_words(found), _cost_grids(found)),
        Section("Maps", _map_words(found), pictures=pictures["maps"]),
        Section("Training", pictures=pictures["curves"]),
        _origin(found),
    ]
    title = f"{main.label}: {found.networks[found.role].label} by {main.config.get('method')}"
    kept = [s for s in sections if s.grids or s.pictures or s.texts]
    return template.render(title=title, sections=kept)


def _checkpoint(run: Measured) -> str:
    """Its step, and whether it is the run's last or best."""
    step = run.report["checkpoint"]
    names = [name for name in (LAST, BEST) if (run.path / "checkpoints" / name).resolve().name == step]
    return f"{step} ({' and '.join(names)})" if names else step


def headline(found: Findings) -> list[str]:
    """What was won and lost, in sentences."""
    main, ours = found.main, found.networks[found.role]
    low, high = found.interval(found.role)
    images = f"{main.report['images']:,} {found.split} images"
    words = [
        f"The {found.role}, {ours.label}, is right on {ours.value('top1'):.2f} % of {images} "
        f"(95 % interval {low:.2f} to {high:.2f})."
    ]
    for one in found.compared:
        words.append(f"{_against(one, found)} {_cheaper(found, one.theirs)}".strip())
    selected = str((main.summary.get("best") or {}).get("selected_by", ""))
    if selected.startswith("test/") and (main.path / "checkpoints/best").resolve().name == main.report["checkpoint"]:
        words.append("This checkpoint was chosen by its accuracy on the test images, which flatters it.")
    if main.summary.get("status") != "finished":
        words.append(f"The run is not finished: this is its checkpoint {main.report['checkpoint']}.")
    return words


def verdict(paired: Pairing) -> str:
    """Whether ours is better, where the interval and McNemar's test say so together."""
    (low, high), sure = paired.interval, paired.mcnemar < 1 - LEVEL
    return "above" if sure and low > 0 else "below" if sure and high < 0 else "not distinguishable from"


def _against(one: Compared, found: Findings) -> str:
    (low, high), theirs = one.pairing.interval, found.networks[one.theirs]
    return (
        f"It is {verdict(one.pairing)} the {one.theirs}, {theirs.label}, at {theirs.value('top1'):.2f} %: "
        f"{one.pairing.difference:+.2f} points ({low:+.2f} to {high:+.2f})."
    )


def _cheaper(found: Findings, theirs: str) -> str:
    """The sizes and times of two networks of the main run against each other."""
    ours, other = found.networks[found.role], found.networks[theirs]
    if other.run is not found.main or not (ours.parameters and ours.macs and other.parameters and other.macs):
        return ""
    told = (
        f"The {theirs} has {_times(other.parameters / ours.parameters)} as many parameters and "
        f"{_times(other.macs / ours.macs)} as many multiply-accumulates"
    )
    if ours.latency and other.latency:
        factor = other.latency["1"]["median_ms"] / ours.latency["1"]["median_ms"]
        told += f", and takes {_times(factor)} as long for one image"
    return f"{told}."


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.1f} times" if factor >= 1 else f"{factor:.2f} times"


def _glance_caption(found: Findings) -> str:
    return f"{found.main.report['images']:,} images of the {found.split} split, each network at its checkpoint"


def glance(found: Findings) -> Grid:
    """A column for each network, a row for each measure that one of them has."""
    networks = list(found.networks.values())

    def cell(value: Any, form: str, scale: float = 1) -> str:
        return NONE if value is None else format(value / scale, form)

    rows = {
        "network": [n.label for n in networks],
        "checkpoint": [_checkpoint(n.run) for n in networks],
        "top-1 (%)": [f"{n.value('top1'):.2f}" for n in networks],
        "95 % interval, bootstrap over images": [
            f"{low:.2f} to {high:.2f}" for low, high in map(found.interval, found.networks)
        ],
        "top-5 (%)": [f"{n.value('top5'):.2f}" for n in networks],
        "negative log-likelihood (nats)": [f"{n.value('nll'):.4f}" for n in networks],
        "calibration error, ECE (%)": [f"{n.value('ece'):.2f}" for n in networks],
        "parameters": [NONE if n.parameters is None else f"{n.parameters:,}" for n in networks],
        "multiply-accumulates an image (M)": [cell(n.macs, ",.2f", 1e6) for n in networks],
        "weights, float32 (MB)": [cell(n.weights_bytes, ",.2f", 1e6) for n in networks],
        "latency, 1 image (ms)": [cell(n.latency.get("1", {}).get("median_ms"), ",.2f") for n in networks],
        "throughput, batches of 32 (images/s)": [
            cell(n.latency.get("32", {}).get("images_per_second"), ",.0f") for n in networks
        ],
    }
    told = [[name, *cells] for name, cells in rows.items() if set(cells) != {NONE}]
    return [["", *found.networks], *told]


def _compared(found: Findings) -> Section:
    rows = [["theirs", "difference (points)", "95 % interval", "both right", f"only {found.role}", "only theirs",
             "neither", "McNemar p"]]  # fmt: skip
    for one in found.compared:
        p = one.pairing
        counts = [f"{n:,}" for n in (p.both, p.only_ours, p.only_theirs, p.neither)]
        low, high = p.interval
        rows.append([one.theirs, f"{p.difference:+.2f}", f"{low:+.2f} to {high:+.2f}", *counts, f"{p.mcnemar:.3g}"])
    words = (
        "Accuracy of ours less theirs on the same images, with a paired bootstrap over images and the exact McNemar "
        "test; they differ where both say so. This is about these trained networks: how much another seed changes is "
        "for tools/compare.py to say, from several runs.",
    )
    return Section(f"The {found.role} against the others", words, {"Images": rows} if found.compared else {})


def _by_class(found: Findings, pictures: Mapping[str, bytes]) -> Section:
    trained, seen = found.counts["train"], found.counts[found.split]
    words = [f"Images of a class: {_range(trained)} to train on, {_range(seen)} in the {found.split} split."]
    if max(trained) > UNEVEN * max(min(trained), 1):
        words.append("The classes are uneven: read each row beside its counts.")
    if len(found.shown) < found.classes:
        words.append(
            f"Shown are the {len(found.shown)} of {found.classes:,} classes that differ most; summary.json has all."
        )
    words.append("One image more or less moves a class of n images by 100/n points.")
    rows = [["class", "train images", f"{found.split} images", *(f"{name} (%)" for name in found.networks)]]
    columns = [found.accuracies(name) for name in found.networks]
    for c, *values in zip(found.shown, *columns, strict=True):
        told = [f"{value:.1f}" if seen[c] else NONE for value in values]
        rows.append([found.names[c], f"{trained[c]:,}", f"{seen[c]:,}", *told])
    return Section("By class", words, {"Right answers by class": rows}, pictures)


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _confusions(found: Findings, pictures: Mapping[str, bytes]) -> Section:
    grids: dict[str, Grid] = {}
    words = ["Images of one class that are taken for another; the greatest changes first."]
    for one in found.compared:
        rows = [change for change in one.changes if change.after != change.before]
        words.append(
            f"Against the {one.theirs}: mended {one.pairing.only_ours:,} (wrong there, and the {found.role} is right), "
            f"new {one.pairing.only_theirs:,} (right there, and the {found.role} is wrong)."
        )
        cells = [
            [found.names[c.true], found.names[c.said], *(f"{n:,}" for n in (c.before, c.after)),
             f"{c.after - c.before:+,}", *(f"{n:,}" for n in (c.mended, c.new))]
            for c in rows[:MOST_CONFUSIONS]
        ]  # fmt: skip
        left = f", {len(rows) - len(cells):,} more in summary.json" if len(rows) > len(cells) else ""
        if cells:
            head = [
                "true class",
                "taken for",
                f"by the {one.theirs}",
                f"by the {found.role}",
                "change",
                "mended",
                "new",
            ]
            grids[f"The {found.role} against the {one.theirs}{left}"] = [head, *cells]
    return Section("Confusions that changed", words, grids, pictures)


CALIBRATION = (
    "How often a network is right when it is so confident. Above the diagonal it is more often right than it believes, "
    "below it less. ECE is the mean distance, weighed by images, over 15 bins.",
)


def _cost_words(found: Findings) -> list[str]:
    main, here = found.main, found.main.report["environment"]
    words = []
    if main.latency:
        (repeats,) = {one["repeats"] for one in main.latency["1"].values()}
        words.append(
            f"Times of one forward in float32 on {_machine(here)}. The networks take turns, {repeats} times each with "
            "one image; images are on the device already, normalised."
        )
    if note := main.experiment.distiller.method.export_note:
        words.append(f"Note: {note}.")
    return words


def _machine(start: Mapping[str, Any]) -> str:
    """In words: device, threads, torch."""
    device = start.get("device_name", "?") if str(start.get("device", "")).startswith("cuda") else start.get("cpu", "?")
    threads = start.get("threads", "?")
    torch_version = start.get("versions", {}).get("torch", "?")
    return f"{device}, {threads} thread{'' if threads == 1 else 's'}, torch {torch_version}"


def _cost_grids(found: Findings) -> dict[str, Grid]:
    main = found.main
    rows = [["network", "batch", "median (ms)", "quartiles (ms)", "images/s", "repeats"]]
    for batch, by_role in main.latency.items():
        for role, one in by_role.items():
            low, high = one["quartiles_ms"]
            times = [f"{one['median_ms']:.3f}", f"{low:.3f} to {high:.3f}", f"{one['images_per_second']:,.0f}"]
            rows.append([f"{role} ({found.networks[role].label})", batch, *times, str(one["repeats"])])
    return {"Latency and throughput": rows} if main.latency else {}


def _map_words(found: Findings) -> list[str]:
    if KEYS[0] in found.main.report["values"]:  # there is an S
        return [
            "Where the networks agree (similarity S, consensus) and where not (discrepancy), and what each looks at."
        ]
    return ["What each network looks at."]


def _origin(found: Findings) -> Section:
    rows = [["", *(run.label for run in found.runs)]]
    told = [_trained(run) for run in found.runs]
    rows += [[key, *(one.get(key, NONE) for one in told)] for key in dict.fromkeys(k for one in told for k in one)]
    grids: dict[str, Grid] = {"Training": rows}
    usual = _defaults(found.main)
    config = found.main.config
    changed = [[key, str(value), str(usual.get(key, NONE))] for key, value in config.items() if usual.get(key) != value]
    if len(found.runs) > 1:
        keys = dict.fromkeys(key for run in found.runs for key in run.config)
        values = [[key, *(str(run.config.get(key, NONE)) for run in found.runs)] for key in keys]
        values = [row for row in values if len(set(row[1:])) > 1]
        grids["Options in which the runs differ"] = [["option", *(run.label for run in found.runs)], *values]
    grids[f"Options of {found.main.label} that are not the defaults"] = [["option", "value", "default"], *changed]
    commands = {
        f"Command of {run.label}": shlex.join(["python", *run.start["command"]])
        for run in found.runs
        if run.start.get("command")
    }
    return Section("What was run", (), grids, texts=commands)


def _trained(run: Measured) -> dict[str, str]:
    """By name what is known of a run's data and training."""
    start, summary, data = run.start, run.summary, run.experiment.command.config.data
    sets = run.experiment.datasets
    held_out = f", {len(sets.validation):,} validation" if sets.validation is not None else ""
    images = f"{len(sets.train):,} training{held_out}, {len(sets.test):,} test images of {sets.num_classes:,} classes"
    changed = ", with uncommitted changes" if start.get("uncommitted_changes") else ""
    return {
        "folder": str(run.path),
        "method": str(run.config.get("method")),
        "data": f"{data.name}{f', {data.root}' if data.name != 'digits' else ''}: {images}",
        "image size": f"{sets.image_size} x {sets.image_size} pixels",
        "seed": str(run.config.get("seed")),
        "status": f"{summary.get('status', 'not finished')}, step {summary.get('step', NONE)}",
        "training time": duration(summary["seconds"]) if summary.get("seconds") else NONE,
        "started": str(start.get("time", NONE)),
        "hardware": f"{_machine(start)}, {start.get('processes', '?')} process(es)" if start else NONE,
        "commit": f"{(start.get('commit') or 'unknown')[:12]}{changed}",
    }


def duration(seconds: float) -> str:
    """As ``1 h 02 min`` or ``3 min 05 s`` or ``4.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _defaults(run: Measured) -> dict[str, Any]:
    """Every option of the run's task and method at its default, flat."""
    command = run.experiment.command
    values = {**asdict(command.task.config()), command.method[0]: asdict(type(command.options)())}
    return flatten(plain(values))
