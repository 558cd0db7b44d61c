"""Runs in groups that differ in nothing but their seed: their scores, and how far they lie from a baseline's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.analysis.looks import CONTROLS
from core.errors import InputError
from tools.runs import Run
from tools.stats import Difference, paired

# Where and on what a run ran, and how much it said meanwhile: no different experiment.
IGNORED = (
    "seed", "data.root", "data.download", "data.workers", "fit.device", "fit.keep", "fit.log_every", "fit.trackers",
    "progress_bar", "data_root", "run.", "train_dataloader.num_workers", "val_dataloader", "env_cfg", "visualizer",
    "log_level", "custom_imports",
)  # fmt: skip

MEASURES = {"top1": "top-1", "mIoU": "mIoU"}
"""What is compared, in percent, and how it is called: the first of these that a run has, else what its evaluation files
hold first (a FID)."""

KINDS = ("distance", "score")  # what an evaluation of images calls its FID and its IS
PERCENT = (*MEASURES, "top5", "aAcc", "ece")


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, by seed. ``config``: what decides it."""

    runs: dict[Any, Run]
    config: Mapping[str, Any]
    label: str = ""

    @property
    def chosen_by(self) -> list[str]:
        """By what and on which split the best evaluations were chosen."""
        told = set()
        for summary in (run.summary for run in self.runs.values()):
            best = summary.get("best")
            told.add(f"{best.get('selected_by')} on {summary.get('selected_on', best.get('split'))}" if best else "-")
        return sorted(told)


@dataclass(frozen=True)
class Comparison:
    """Groups by a measure, and the roles that all have."""

    measure: str
    groups: Sequence[Group]
    roles: Sequence[str]
    baseline: str | None = None
    """As the command named it."""
    versus: Mapping[tuple[str, str], Difference] = field(default_factory=dict)
    """By (label, role): a group's last scores less those of its baseline, in points."""

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs.values()]

    @property
    def has_best(self) -> bool:
        """Whether a best evaluation was chosen in any run: where images are evaluated there is but one."""
        return any(run.summary.get("best") for run in self.runs)

    def scores(self, group: Group, role: str, which: str = "last") -> dict[Any, float]:
        """The measure by seed, of "last" or "best"."""
        of = last_scores if which == "last" else lambda run: run.summary.get("best") or {}
        found = ((seed, score(of(run), role, self.measure)) for seed, run in group.runs.items())
        return {seed: value for seed, value in found if value is not None}


# --- scores -----------------------------------------------------------------------------------------------------------


def last_scores(run: Run) -> dict[str, Any]:
    """A run's last evaluation, with what was evaluated afterwards of a diffusion run."""
    return {**run.last, **image_scores(run)}


def image_scores(run: Run) -> dict[str, float]:
    """{"4 steps/FID": 4.7, "4 steps/IS": 9.0, ...} from a diffusion run's ``evaluation*.json``, FID before proxies.

    A run that is looked at several times, or with several weights of guidance, has those for roles.
    """
    found: dict[str, float] = {}
    names = (name for name in run.files if name.startswith("evaluation"))
    for name in sorted(names, key=lambda name: (name != "evaluation-inception", name)):
        report = run.files[name]
        for row in report["rows"] if "features" in report else ():  # else it is another task's
            role = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
            if row.get("guidance") is not None:
                role = f"iteration {row['iteration']}, guidance {row['guidance']:g}"
            found |= {f"{role}/{known}": row[known] for kind, known in report["features"].items() if kind in KINDS}
    return found


def score(values: Mapping[str, Any], role: str, measure: str) -> float | None:
    """Percent. On the test set also where another split was used to choose."""
    return values.get(f"test/{role}/{measure}", values.get(f"{role}/{measure}"))


def measure_of(run: Run) -> str:
    """What a run is compared by. Raises: InputError for a finished one that holds no evaluation, naming the command."""
    of_images = [key.rpartition("/")[2] for key in image_scores(run)]
    held = [*of_images, *(key.rpartition("/")[2] for key in run.last if "/" in key)]
    if not held and run.finished:  # only diffusion is evaluated afterwards
        features = " --features digits" if run.config.get("data.name") == "digits" else ""
        raise InputError(
            f"{run.path} is not evaluated, so that there is nothing to compare: "
            f"first python diffusion/tools/evaluate.py {run.path}{features}"
        )
    return next((measure for measure in [*MEASURES, *of_images] if measure in held), "top1")


def method_of(run: Run) -> tuple[str, str | None]:
    """The method, and of ADM the control in the place of its attention: ("dml+adm", "uniform")."""
    given = (run.config.get("adm.control"), run.config.get("adm.attention"))  # older runs of diffusion say the second
    return str(run.config.get("method", "run")), next((word for word in given if word in CONTROLS), None)


def named(measure: str) -> str:
    return MEASURES.get(measure, measure)


def lower_is_better(measure: str) -> bool:
    return measure.startswith(("FID", "FD-")) or measure in ("nll", "ece")


# --- groups -----------------------------------------------------------------------------------------------------------


def compare_runs(runs: Sequence[Run], measure: str | None = None, baseline: str | None = None) -> Comparison:
    """Groups runs and pairs them with a baseline. Raises: InputError where they cannot be compared."""
    measures = {measure_of(run): run for run in reversed(runs)}
    if measure is None and len(measures) > 1:
        told = "; ".join(f"{run.path}: {named(name)}" for name, run in reversed(measures.items()))
        raise InputError(f"the runs measure different things ({told})")
    measure = measure or next(iter(measures))
    roles = common_roles(runs, measure)
    compared = Comparison(measure, make_groups(runs), roles, baseline)
    return compared if baseline is None else replace(compared, versus=differences_from(baseline, compared))


def common_roles(runs: Sequence[Run], measure: str) -> list[str]:
    """The roles that all runs evaluate, teachers first. Raises: InputError where there is none."""
    pattern = re.compile(rf"([^/]+)/{re.escape(measure)}")
    by_run = [{match[1] for key in last_scores(run) if (match := pattern.fullmatch(key))} for run in runs]
    common = set.intersection(*by_run)
    if not common:
        told = "; ".join(f"{run.path}: {', '.join(sorted(r)) or 'none'}" for run, r in zip(runs, by_run, strict=True))
        raise InputError(
            f"the runs have no role in common with a {named(measure)} ({told}): name those that train the same one"
        )
    order = {"teacher": 0, "student": 1}
    return sorted(common, key=lambda role: (order.get(role.partition("_")[0], 2), len(role), role))


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but their seed, in the order of their first run.

    Raises: InputError where two runs of one group have the same seed: it would count twice.
    """
    found: dict[str, Group] = {}
    for run in runs:
        config = experiment(run)
        group = found.setdefault(repr(sorted(config.items())), Group({}, config))
        if same := group.runs.get(run.seed):
            raise InputError(f"{same.path} and {run.path} are one experiment with one seed: give one of them")
        group.runs[run.seed] = run
    groups = list(found.values())
    return [replace(group, label=label(group, groups)) for group in groups]


def experiment(run: Run) -> dict[str, Any]:
    """The part of the config that decides what is computed, options that are not set left out.

    Weights that a network starts from count by their path, in which the run's own seed reads ``{seed}``: each seed of
    an experiment may have a teacher of its own.
    """
    deciding = {}
    for key, value in run.config.items():
        if value is None or value == {} or key.startswith(IGNORED) or key.endswith("sha256"):
            continue
        if (key in ("teacher", "init") or key.endswith((".weights", ".teacher_weights"))) and isinstance(value, str):
            value = re.sub(rf"(?<!\d){re.escape(str(run.seed))}(?!\d)", "{seed}", value)
        deciding[key] = value
    return deciding


def label(group: Group, groups: Sequence[Group]) -> str:
    """The method, and whatever else tells this group from others that have that option too."""
    method = group.config.get("method", "run")
    told = []
    for key, value in group.config.items():
        rivals = [g.config for g in groups if key in g.config or g.config.get("method") == group.config.get("method")]
        if key != "method" and any(rival.get(key) != value for rival in rivals):
            told.append(f"{key.removeprefix('networks.').removesuffix('.name')}={value}")
    return " ".join([str(method), *told])


def differences_from(baseline: str, compared: Comparison) -> dict[tuple[str, str], Difference]:
    """``versus``, of each other group. Raises: InputError naming the labels where no group has the baseline's name."""
    groups = compared.groups
    rivals = [group for group in groups if group.label == baseline]
    rivals = rivals or [group for group in groups if group.config.get("method") == baseline]
    if not rivals:
        labels = ", ".join(repr(group.label) for group in groups)
        raise InputError(f"no group is {baseline!r}: --baseline is a method or one of {labels}")
    found = {}
    for group in (group for group in groups if group not in rivals):
        rival = match(group, rivals)
        for role in compared.roles:
            theirs = compared.scores(rival, role) if rival is not None else {}
            found[group.label, role] = paired(compared.scores(group, role), theirs)
    return found


def match(group: Group, rivals: Sequence[Group]) -> Group | None:
    """The only baseline; of several the one that agrees in every option that both have, the method aside."""
    for rival in rivals:
        common = (group.config.keys() & rival.config.keys()) - {"method"}
        if len(rivals) == 1 or all(group.config[key] == rival.config[key] for key in common):
            return rival
    return None
