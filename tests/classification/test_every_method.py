"""Every method of the table, alone and with ADM, through the command: it learns, resumes exactly, forwards once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_runs, digits, learning_arguments, read, stop_at, train_whole
from torch import Tensor

from classification.config import parse_command
from classification.experiment import build
from classification.methods import METHODS
from core.network import stage_maps
from core.training.distiller import Progress

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
STUDENT_2 = ["--networks.student_2.name", "cifar_resnet8"]
TEACHER_2 = ["--networks.teacher_2.name", "cifar_resnet8"]
LABELS = [f"{method}{adm}" for method in METHODS for adm in ("", "+adm")]
# Further forms of the methods, each by its flags.
FORMS: dict[str, list[str]] = {
    "dml+adm among three": ["--method", "dml+adm", *STUDENT_2],
    "dml+adm with Eq. 12": ["--method", "dml+adm", "--adm.divergence", "kd", "--adm.consensus", "kd"],
    "kdcl naive": ["--method", "kdcl", "--kdcl.variant", "naive"],
    "kdcl linear among three": ["--method", "kdcl", "--kdcl.variant", "linear", *STUDENT_2],
    "kdcl general": ["--method", "kdcl", "--kdcl.variant", "general", "--data.validation", "0.15"],
    "switokd 1T2S": ["--method", "switokd+adm", *STUDENT_2],
    "switokd 2T1S": ["--method", "switokd+adm", *TEACHER_2],
    "shake with an online teacher": ["--method", "shake+adm", "--shake.online_teacher", "true"],
    "afd among three": ["--method", "afd", *STUDENT_2],
}


def run_of(label: str, teacher: Path) -> list[str]:
    """The flags of a label or form. ``teacher``: a run folder whose teacher SHAKE starts from."""
    flags = FORMS.get(label, ["--method", label])
    if label.startswith("shake"):  # on standardised logits a young network learns slowly
        flags = [*flags, "--optimizer.lr", "0.01"]
        if label not in FORMS:
            flags += ["--networks.teacher.weights", str(teacher)]
    return flags


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a trained teacher."""
    from classification.tools.train import main

    out = tmp_path_factory.mktemp("teacher") / "run"
    train_whole(main, learning_arguments(out, "--method", "vanilla"))
    return out


QUICK = ("dml+adm", "kdcl+adm", "switokd+adm", "shake+adm", "afid+adm")  # one of a kind; the others take minutes


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=[] if label in QUICK else pytest.mark.slow) for label in [*LABELS, *FORMS]]
)
def test_learns(label: str, tmp_path: Path, command: Command, teacher: Path) -> None:
    code, _, said = command(learning_arguments(tmp_path, *run_of(label, teacher)))
    assert code == 0, said
    last = read(tmp_path / "summary.json")["last"]
    tops = {name: value for name, value in last.items() if name.endswith("/top1") and not name.startswith("test/")}
    assert {f"{role}/top1" for role in ("teacher", "student")} <= tops.keys()
    least = 25 if "online" in label else 35  # 20 is chance, 3 its standard deviation
    assert all(value > least for value in tops.values()), tops


@pytest.mark.parametrize("stop", [5, pytest.param(6, marks=pytest.mark.slow)], ids=["mid_epoch", "after_epoch"])
@pytest.mark.parametrize("label", [*LABELS, *FORMS])
def test_resumes_exactly(
    label: str, stop: int, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, teacher: Path
) -> None:
    """Three epochs of three steps, stopped in the second."""
    short = [*digits(5, 24, 50), "--fit.epochs", "3", "--schedule.milestones", "[2]", "--fit.log_every", "4"]
    whole, cut = (learning_arguments(tmp_path / run, *short, *run_of(label, teacher)) for run in ("whole", "cut"))
    code, _, said = command(whole)
    assert code == 0, said
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert command(cut)[0] == 130
    code, _, said = command(cut)
    assert code == 0 and f"resuming from step {stop}" in said
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


class Forwards:
    """Counts how often each network's stem and classifier run."""

    def __init__(self, networks: Any) -> None:
        self.stems: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        for role, network in networks.items():
            network.stem.register_forward_hook(lambda *_, role=role: self.stems.update([role]))
            network.fc.register_forward_hook(lambda *_, role=role: self.heads.update([role]))


def step(distiller: Any, batch: dict[str, Any], progress: Progress) -> None:
    batch = distiller.before_step(batch, progress)
    for phase in distiller.phases:
        losses, _ = distiller(batch, progress, phase)
        total = sum(value for terms in losses.values() for value in terms.values())
        distiller.backward(losses, total, type("Accelerator", (), {"scaler": None}))
        distiller.before_update()
    distiller.after_step(batch, progress)


@pytest.mark.parametrize("label", [*LABELS, *FORMS, "dml in turn"])
def test_a_step_runs_each_network_once(label: str, tmp_path: Path, teacher: Path) -> None:
    in_turn = label == "dml in turn"
    flags = ["--method", "dml", "--dml.update", "alternate"] if in_turn else run_of(label, teacher)
    experiment = build(parse_command(learning_arguments(tmp_path, *flags)))
    distiller = experiment.distiller.train()
    batch: dict[str, Any] = dict(next(iter(experiment.train_loader(None))))
    if distiller.method.needs_held_out:
        distiller.held_out = experiment.evaluation_loader(experiment.split("validation"))
    counted = Forwards(distiller.networks)
    step(distiller, batch, Progress(3, 0.25, 72, 6.0))
    roles = list(distiller.networks)
    assert counted.stems == dict.fromkeys(roles, len(distiller.phases)), "only updates in turn run a network again"
    # ADM: one more pass of each head and student or teacher; never more than a head a pair and side.
    pairs = len(distiller.adm.pairs) if distiller.adm is not None else 0
    for role in roles:
        assert counted.heads[role] <= len(distiller.phases) + 2 * pairs, role
    counted.stems.clear()
    step(distiller, batch, Progress(12, 1.0, 72, 6.0))  # an epoch's first step
    held_out = "general" in label  # KDCL's general target looks at the held-out images, one batch here
    assert counted.stems == dict.fromkeys(roles, len(distiller.phases) + held_out)


@pytest.mark.parametrize("label", LABELS)
def test_the_exported_student_is_the_network_alone(label: str, tmp_path: Path, teacher: Path) -> None:
    experiment = build(parse_command(learning_arguments(tmp_path, *run_of(label, teacher))))
    distiller = experiment.distiller.eval()
    plain = build(parse_command(learning_arguments(tmp_path, "--method", "vanilla"))).distiller.networks["student"]
    assert distiller.networks["student"].state_dict().keys() == plain.state_dict().keys()
    assert distiller.trained()["student"] is distiller.networks["student"]
    # What ADM compares is what the head is given.
    output: dict[str, Any] = distiller.outputs(torch.stack([experiment.datasets.train.images[k] for k in range(4)]))
    for role, said in output.items():
        torch.testing.assert_close(said.head(said.maps[-1]), said.logits, msg=f"{role}: head(map) is not its logits")
    view: Tensor = distiller.views(experiment.datasets.train.images[:4])["student"]
    if not label.startswith("afid"):  # whose networks see each other's attention
        torch.testing.assert_close(stage_maps(distiller.networks["student"], view)[0], output["student"].maps[-1])
