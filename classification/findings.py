"""What runs that were evaluated on the same images say of each other: for the page of a run, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classification.evaluation import Evaluation
from classification.experiment import Experiment, main_role
from classification.outcomes import Change, Pairing, accuracy_interval, changes, pair, per_class
from core.analysis.colors import rival_color, role_color
from core.training.run import read_json, read_metrics

MOST_CLASSES = 30
"""Classes that are told one by one; of more, those that changed most."""


@dataclass
class Measured:
    """One run, evaluated.

    ``report``: as ``evaluate.py`` writes it. ``predicted``: the class that each role says, ``[N]`` each, of the images
    whose classes are ``target``. ``config``: its ``config.yaml``, flat. ``macs``, ``weights``: by role,
    multiply-accumulates of an image and bytes of the weights. ``latency``: see ``latency.measure``; empty where no
    times were taken.
    """

    path: Path
    label: str
    experiment: Experiment
    report: dict[str, Any]
    evaluation: Evaluation
    predicted: dict[str, Tensor]
    target: Tensor
    config: dict[str, Any]
    macs: dict[str, int]
    weights: dict[str, int]
    latency: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @cached_property
    def start(self) -> dict[str, Any]:
        """Where it was trained, when it was started last; empty where that is not known."""
        file = self.path / "environment.json"
        return (read_json(file).get("starts") or [{}])[-1] if file.is_file() else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What its training said at its end; empty before."""
        file = self.path / "summary.json"
        return read_json(file) if file.is_file() else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Every line of its ``metrics.jsonl``."""
        return read_metrics(self.path / "metrics.jsonl", self.summary)

    @property
    def role(self) -> str:
        """The network that others are compared with: the student, where there is one."""
        return main_role(self.predicted)


@dataclass(frozen=True)
class Network:
    """One network of a page, by the name that it has there."""

    run: Measured
    role: str
    color: str

    @property
    def right(self) -> Tensor:
        """Bool ``[N]``."""
        return self.run.predicted[self.role] == self.run.target

    def value(self, score: str) -> float:
        """What the evaluation says, as ``top1``."""
        return self.run.report["values"][f"{self.role}/{score}"]

    @property
    def name(self) -> str | None:
        """Its architecture; None of a role that a method adds, and so below."""
        return self.run.report["networks"].get(self.role, {}).get("name")

    @property
    def label(self) -> str:
        """Its architecture, or else its role."""
        return self.name or self.role

    @property
    def parameters(self) -> int | None:
        return self.run.report["networks"].get(self.role, {}).get("parameters")

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of an image."""
        return self.run.macs.get(self.role)

    @property
    def weights_bytes(self) -> int | None:
        return self.run.weights.get(self.role)

    @property
    def latency(self) -> dict[str, dict[str, Any]]:
        """By batch size; empty where no times were taken."""
        return {batch: of[self.role] for batch, of in self.run.latency.items() if self.role in of}


@dataclass(frozen=True)
class Compared:
    """The main network and another on the same images."""

    theirs: str
    pairing: Pairing
    changes: list[Change]


class Findings:
    """Everything that the page tells, computed once. The first run is the main one, the others are its baselines."""

    def __init__(self, runs: Sequence[Measured]) -> None:
        self.runs, self.main = runs, runs[0]
        self.role = self.main.role
        self.networks = {role: Network(self.main, role, role_color(role)) for role in self.main.predicted}
        for number, run in enumerate(runs[1:]):
            self.networks[f"{run.role} of {run.label}"] = Network(run, run.role, rival_color(number))
        self.target, datasets = self.main.target, self.main.experiment.datasets
        self.names = datasets.class_names
        self.split, self.classes = self.main.report["split"], datasets.num_classes
        counted = {"train": datasets.train, "validation": datasets.validation, "test": datasets.test}
        self.counts = {
            name: torch.bincount(split.targets, minlength=self.classes).tolist()
            for name, split in counted.items()
            if split is not None
        }
        self.by_class = {
            name: per_class(network.right, self.target, self.classes).tolist()
            for name, network in self.networks.items()
        }
        rivals = [n for n in self.networks if n.startswith("teacher") and n != self.role]
        rivals = [
            *[n for n in rivals if self.networks[n].run is self.main],
            *list(self.networks)[len(self.main.predicted) :],
        ]
        self.compared = [self._compare(name) for name in rivals]

    def _compare(self, theirs: str) -> Compared:
        other = self.networks[theirs]
        ours, said = self.main.predicted[self.role], other.run.predicted[other.role]
        return Compared(theirs, pair(ours, said, self.target), changes(ours, said, self.target, self.classes))

    def interval(self, name: str) -> tuple[float, float]:
        """Of a network's accuracy, in percent."""
        return accuracy_interval(self.networks[name].right)

    @cached_property
    def shown(self) -> list[int]:
        """The classes that are told one by one: all, or those with the greatest changes against the last rival."""
        if self.classes <= MOST_CLASSES:
            return list(range(self.classes))
        counts = torch.tensor(self.counts[self.split]).clamp_min(1)
        ours = torch.tensor(self.by_class[self.role]) / counts
        theirs = torch.tensor(self.by_class[self.compared[-1].theirs]) / counts if self.compared else torch.ones(())
        return (ours - theirs).abs().argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values.tolist()

    def accuracies(self, name: str) -> list[float]:
        """Of the classes that are shown, in percent; nan where a class has no image."""
        counts = self.counts[self.split]
        return [100 * self.by_class[name][c] / counts[c] if counts[c] else float("nan") for c in self.shown]


def as_json(found: Findings) -> dict[str, Any]:
    """Everything in full precision, of all classes and confusions."""
    main = found.main
    networks = {
        name: {
            "run": str(network.run.path), "checkpoint": network.run.report["checkpoint"], "role": network.role,
            "name": network.name, **{score: network.value(score) for score in ("top1", "top5", "nll", "ece")},
            "top1_interval": found.interval(name), "parameters": network.parameters,
            "multiply_accumulates": network.macs, "weights_bytes": network.weights_bytes,
            "latency": network.latency or None,
        }
        for name, network in found.networks.items()
    }  # fmt: skip
    classes = [
        {
            "name": found.names[c],
            "images": {split: counts[c] for split, counts in found.counts.items()},
            "right": {name: right[c] for name, right in found.by_class.items()},
        }
        for c in range(found.classes)
    ]
    compared = [
        {"ours": found.role, "theirs": one.theirs, **one.pairing._asdict(), "confusions": _named(one.changes, found)}
        for one in found.compared
    ]
    return {
        "split": found.split,
        "images": main.report["images"],
        "networks": networks,
        "classes": classes,
        "compared": compared,
        "runs": [{"path": str(r.path), **r.report, "trained": r.start, "config": r.config} for r in found.runs],
        "environment": main.report["environment"],
    }


def _named(rows: Sequence[Change], found: Findings) -> list[dict[str, Any]]:
    return [{**asdict(row), "true": found.names[row.true], "said": found.names[row.said]} for row in rows]
