"""The training loop on networks of a few numbers: exact resuming, NaN, gradients, schedules, logging."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from runs import ROOT, assert_same, assert_same_runs, lines
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import InputError, TrainingError
from core.training import checkpoint as checkpoints
from core.training.command import Stop, run_command
from core.training.distiller import Distiller, Progress
from core.training.fit import FitConfig, durations, fit, make_accelerator
from core.training.run import RunFolder, read_config, read_json, read_metrics
from core.training.schedule import ScheduleConfig, make_schedule
from core.training.seed import random_state, restore_random_state, seed_everything


class TinyData:
    """20 samples in batches of 8, 8 and 4, shuffled anew each epoch; batches of the rest of the epoch."""

    def __init__(self, size: int = 20, batch_size: int = 8) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 6, generator=generator)
        self.target = torch.arange(size) % 3
        self.size, self.batch_size, self.epoch, self.position = size, batch_size, 0, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch))
        for k in range(self.position, len(self)):
            self.position = k + 1
            rows = order[k * self.batch_size : (k + 1) * self.batch_size]
            yield {"image": self.x[rows], "target": self.target[rows], "index": rows, "weight": 1.0}
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        done = self.position == len(self)
        return {"epoch": self.epoch + done, "position": 0 if done else self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Endless:
    """Batches without end or length, as data that are drawn rather than read."""

    def __init__(self) -> None:
        self.drawn = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.drawn += 1
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.drawn))
            yield {"image": x, "target": torch.arange(4) % 3}

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


class TinyDistiller(Distiller):
    """Teacher and student that imitate each other, an adapter between them; ``after`` is called after each step."""

    calls: Tensor

    def __init__(self, *, dropout: float = 0.0, after: Callable[[int], None] | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.networks = nn.ModuleDict(
            {
                "teacher": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)),
                "student": nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, 3)),
            }
        )
        self.adapter = nn.Linear(3, 3, bias=False)
        self.register_buffer("calls", torch.zeros(()))
        self.after = after
        self.seen: list[Progress] = []
        self.poison: tuple[int, str, str] | None = None

    def forward(self, batch: Any, progress: Progress, phase: str | None = None) -> tuple[Any, Any]:
        self.seen.append(progress)
        self.calls += 1
        logits = {role: network(batch["image"]) for role, network in self.networks.items()}
        losses: dict[str, dict[str, Tensor]] = {}
        for own, other in (("teacher", "student"), ("student", "teacher")):
            losses[own] = {"ce": F.cross_entropy(logits[own], batch["target"])}
            goal = logits[other].detach().softmax(dim=1)
            losses[own]["kd"] = F.cross_entropy(self.adapter(logits[own]) if own == "student" else logits[own], goal)
        if self.poison is not None and progress.step + 1 == self.poison[0]:
            losses[self.poison[1]][self.poison[2]] = losses[self.poison[1]][self.poison[2]] * float("nan")
        if phase is not None:
            losses = {phase: losses[phase]}
        return losses, {"student/confidence": logits["student"].detach().softmax(dim=1).amax(dim=1).mean()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        student = [*self.networks["student"].parameters(), *self.adapter.parameters()]
        return [{"params": list(self.networks["teacher"].parameters()), "lr": 0.2}, {"params": student, "lr": 0.1}]

    def after_step(self, batch: Any, progress: Progress) -> None:
        if self.after is not None:
            self.after(progress.step + 1)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(
    path: Path,
    config: FitConfig,
    distiller: TinyDistiller | None = None,
    *,
    data: Any = None,
    schedule: ScheduleConfig = ScheduleConfig("constant"),  # noqa: B008
    evaluate: bool = False,
    optimizer: Any = sgd,
) -> dict[str, Any]:
    distiller = distiller if distiller is not None else TinyDistiller()
    data = data if data is not None else TinyData()
    config = replace(config, device="cpu", trackers=())
    run = RunFolder(path, {"fit": {"epochs": config.epochs, "steps": config.steps}})
    accelerator = make_accelerator(config, run)
    seed_everything(0, "training")

    def look() -> dict[str, float]:
        assert not distiller.training
        with torch.no_grad():
            x, y = TinyData().x, TinyData().target
            return {
                f"{r}/top1": 100 * (n(x).argmax(1) == y).float().mean().item() for r, n in distiller.networks.items()
            }

    epochs = durations(config, len(data))[0] / len(data) if hasattr(data, "__len__") else 1.0
    rate = make_schedule(schedule, epochs)
    select = "student/top1" if evaluate else None
    return fit(
        distiller, data, optimizer, rate, config, run, accelerator, look if evaluate else None, select,
        summary={"method": "tiny"}, progress_bar=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(quick: None) -> None:
    """Curves are drawn for real in the tests of the command."""


def stop_after(*steps: int) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step in steps else None


# --- exact resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", [(None,), ("teacher", "student")], ids=["together", "in_turn"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stops", [(6,), (4,), tuple(range(1, 12))], ids=["after_epoch", "mid_epoch", "each_step"])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, stops: tuple[int, ...], accumulate: int, phases: tuple[Any, ...]
) -> None:
    config = FitConfig(epochs=4, accumulate=accumulate, log_every=5, clip=2.0)
    schedule = ScheduleConfig("multistep", milestones=(1, 3), warmup=0.5)

    def make(*steps: int) -> TinyDistiller:
        distiller = TinyDistiller(dropout=0.3, after=stop_after(*steps))
        distiller.phases = phases
        return distiller

    whole = train(tmp_path / "whole", config, make(), schedule=schedule, evaluate=True)
    assert whole["status"] == "finished" and whole["step"] == 12
    for stop in stops:
        cut = train(tmp_path / "cut", config, make(*stops), schedule=schedule, evaluate=True)
        assert (cut["status"], cut["step"]) == ("interrupted", stop)
    train(tmp_path / "cut", config, make(), schedule=schedule, evaluate=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in lines(tmp_path / "cut") if line["kind"] == "train"] == [5, 10, 12]


def test_resume_restores_what_a_new_start_would_not_have(tmp_path: Path) -> None:
    config = FitConfig(epochs=4, log_every=5)
    train(tmp_path / "whole", config, TinyDistiller(dropout=0.3))
    train(tmp_path / "cut", config, TinyDistiller(dropout=0.3, after=stop_after(4)))
    state = torch.load(tmp_path / "cut/checkpoints/last/state.pt", weights_only=True)
    assert state["step"] == 4 and state["data"] == {"epoch": 1, "position": 1}
    assert state["optimizer"]["state"] and state["extra"].keys() == {"adapter.weight", "calls"}
    assert [row["step"] for row in state["processes"][0]["window"]] == [1, 2, 3, 4]
    # Without the generators the dropout masks differ: so the equality of the tests above is no accident.
    state["processes"][0]["random"]["torch"] = torch.Generator().manual_seed(1).get_state()
    torch.save(state, tmp_path / "cut/checkpoints/last/state.pt")
    train(tmp_path / "cut", config, TinyDistiller(dropout=0.3))
    with pytest.raises(AssertionError):
        assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_run_resumes_from_its_last_checkpoint_and_cuts_the_metrics(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 8:
            raise Killed

    config = FitConfig(epochs=4, log_every=1)
    train(tmp_path / "whole", config, TinyDistiller(dropout=0.3), evaluate=True)
    with pytest.raises(Killed):
        train(tmp_path / "cut", config, TinyDistiller(dropout=0.3, after=kill), evaluate=True)
    assert (
        lines(tmp_path / "cut")[-1]["step"] == 7 and os.readlink(tmp_path / "cut/checkpoints/last") == "step-00000006"
    )
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "ep')  # the line that was being written
    (tmp_path / "cut/checkpoints/step-00000008.writing").mkdir()
    train(tmp_path / "cut", config, TinyDistiller(dropout=0.3), evaluate=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob("*.writing"))


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    config = FitConfig(epochs=1, log_every=1)
    train(tmp_path / "whole", config)
    distiller = TinyDistiller(after=lambda step: 1 / (step - 2))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", config, distiller)
    assert len(lines(tmp_path / "cut")) == 1
    train(tmp_path / "cut", config)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = train(tmp_path / "run", FitConfig(epochs=2), evaluate=True)
    before = checkpoints.read_checkpoint(tmp_path / "run/checkpoints/last")
    distiller = TinyDistiller()
    again = train(tmp_path / "run", FitConfig(epochs=2), distiller, evaluate=True)
    assert not distiller.seen
    assert again["status"] == "finished" and again["best"] == first["best"] and again["last"] == first["last"]
    assert_same(before, checkpoints.read_checkpoint(tmp_path / "run/checkpoints/last"))


def test_resume_takes_the_checkpoint_before_a_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = FitConfig(epochs=4, log_every=1)
    train(tmp_path / "whole", config, TinyDistiller(dropout=0.3), evaluate=True)
    train(tmp_path / "cut", config, TinyDistiller(dropout=0.3, after=stop_after(9)), evaluate=True)
    state = tmp_path / "cut/checkpoints/step-00000009/state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    capsys.readouterr()
    train(tmp_path / "cut", config, TinyDistiller(dropout=0.3), evaluate=True)
    said = capsys.readouterr().err
    assert "step-00000009 is damaged" in said and "step-00000006 instead of step-00000009" in said
    assert "resuming from step 6" in said
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_endless_data_need_steps_and_resume_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps"):
        train(tmp_path / "none", FitConfig(epochs=2), data=Endless())
    config = FitConfig(steps=9, evaluate_every=4, log_every=2)
    train(tmp_path / "whole", config, data=Endless(), evaluate=True)
    train(tmp_path / "cut", config, TinyDistiller(after=stop_after(5)), data=Endless(), evaluate=True)
    train(tmp_path / "cut", config, data=Endless(), evaluate=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in lines(tmp_path / "cut") if line["kind"] == "evaluation"] == [4, 8, 9]


def test_same_seed_same_run_other_start_other_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, FitConfig(epochs=1), TinyDistiller(dropout=0.3))
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    seed_everything(7)
    one = torch.rand(3)
    seed_everything(7, "network", "student")
    assert not torch.equal(one, torch.rand(3))


def test_random_state_returns_all_generators_through_a_file(tmp_path: Path) -> None:
    import random

    import numpy as np

    seed_everything(1)
    random.gauss(0, 1)
    np.random.randn()
    torch.save(random_state(), tmp_path / "state.pt")

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3)[2].item()]

    before = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == before


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 2, 1000])
@pytest.mark.parametrize(("role", "term"), [("teacher", "kd"), ("student", "ce")])
def test_nan_names_network_term_and_step_and_saves_nothing(
    tmp_path: Path, role: str, term: str, log_every: int
) -> None:
    distiller = TinyDistiller()
    distiller.poison = (5, role, term)
    with pytest.raises(TrainingError, match=f"{role}'s {term} is nan at step 5:"):
        train(tmp_path / "run", FitConfig(epochs=4, log_every=log_every), distiller, evaluate=True)
    assert [p.name for p in checkpoints.numbered(tmp_path / "run/checkpoints")] == ["step-00000003"]
    networks, state = checkpoints.read_checkpoint(tmp_path / "run/checkpoints/last")
    assert all(v.isfinite().all() for weights in networks.values() for v in weights.values())
    assert all(row["values"].isfinite().all() for row in state["processes"][0]["window"])
    assert not (tmp_path / "run/summary.json").exists()


def test_nan_in_one_part_of_a_batch_or_in_an_observation_is_noticed(tmp_path: Path) -> None:
    class Strange(TinyDistiller):
        def forward(self, batch: Any, progress: Progress, phase: str | None = None) -> tuple[Any, Any]:
            losses, observed = super().forward(batch, progress, phase)
            bad = (batch["index"] == last).any()
            return losses, {**observed, "spread": observed["student/confidence"] / (~bad).float()}

    last = torch.randperm(20, generator=torch.Generator().manual_seed(0))[-1]  # of the first epoch: step 3
    with pytest.raises(TrainingError, match="spread is inf at step 3:"):
        train(tmp_path / "run", FitConfig(epochs=1, accumulate=2, log_every=100), Strange())


def test_nan_right_before_a_stop_is_not_saved(tmp_path: Path) -> None:
    distiller = TinyDistiller(after=stop_after(2))
    distiller.poison = (2, "student", "ce")
    with pytest.raises(TrainingError, match="student's ce is nan at step 2"):
        train(tmp_path / "run", FitConfig(epochs=4, log_every=100), distiller)
    assert not (tmp_path / "run/checkpoints").exists() or not checkpoints.numbered(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("where", ["networks.student.3.bias", "adapter.weight"])
def test_infinite_weights_are_never_saved(tmp_path: Path, where: str) -> None:
    distiller = TinyDistiller()

    def overflow(step: int) -> None:
        if step == 6:  # the loss of step 6 was finite, only the weights that come out of it are not
            distiller.get_parameter(where).data[0] = math.inf

    distiller.after = overflow
    with pytest.raises(TrainingError, match=r"(student|outside the networks): the weight .* is not finite at step 6"):
        train(tmp_path / "run", FitConfig(epochs=4, log_every=1000), distiller)
    assert [p.name for p in checkpoints.numbered(tmp_path / "run/checkpoints")] == ["step-00000003"]


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(tmp_path: Path, config: FitConfig, size: int = 7) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradients of one step over ``size`` samples as the optimiser sees them, and the logged line."""
    seen: dict[str, Tensor] = {}
    distiller = TinyDistiller()

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.update({n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None})
            super().step(closure)

    name = f"run{len(list(tmp_path.iterdir()))}"
    train(tmp_path / name, config, distiller, data=TinyData(size, size), optimizer=lambda g: Spy(g, lr=0.1))
    return seen, lines(tmp_path / name)[0]


@pytest.mark.parametrize("parts", [2, 3, 7, 100])
def test_gradient_of_the_parts_is_the_whole_batchs(tmp_path: Path, parts: int) -> None:
    whole, line = gradients(tmp_path, FitConfig(steps=1))
    split, split_line = gradients(tmp_path, FitConfig(steps=1, accumulate=parts))
    assert whole.keys() == split.keys() and len(whole) == 9
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-5, atol=1e-7)
    for name in ("teacher/ce", "student/ce", "student/kd", "student/confidence"):
        assert split_line[name] == pytest.approx(line[name], rel=1e-6)


def test_clip_bounds_the_norm_over_all_networks_together(tmp_path: Path) -> None:
    free, _ = gradients(tmp_path, FitConfig(steps=1))
    clipped, _ = gradients(tmp_path, FitConfig(steps=1, clip=0.05))
    norm = torch.cat([g.flatten() for g in free.values()]).norm()
    assert norm > 0.2
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] * (0.05 / norm), rtol=1e-4, atol=1e-8)
    loose, _ = gradients(tmp_path, FitConfig(steps=1, clip=1e6))
    assert_same(free, loose)


def test_phases_run_forward_backward_and_step_each(tmp_path: Path) -> None:
    distiller = TinyDistiller()
    distiller.phases = ("teacher", "student")
    weights: list[dict[str, Tensor]] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            weights.append({n: p.detach().clone() for n, p in distiller.named_parameters()})
            super().step(closure)

    train(tmp_path / "run", FitConfig(steps=2), distiller, optimizer=lambda g: Spy(g, lr=0.1, momentum=0.9))
    weights.append({n: p.detach().clone() for n, p in distiller.named_parameters()})
    assert len(distiller.seen) == 4 and len(weights) == 5
    for k, moving in enumerate(("teacher", "student", "teacher", "student")):
        for name, before in weights[k].items():
            moves = name.startswith(f"networks.{moving}") or (moving == "student" and name.startswith("adapter"))
            assert torch.equal(before, weights[k + 1][name]) != moves, (k, name)


# --- schedule, progress, logging --------------------------------------------------------------------------------------


def rates(tmp_path: Path, schedule: ScheduleConfig, epochs: float = 4) -> list[float]:
    train(tmp_path / "run", FitConfig(epochs=epochs, log_every=1), schedule=schedule)
    return [line["lr"] for line in lines(tmp_path / "run") if line["kind"] == "train"]


def test_milestones_count_completed_epochs(tmp_path: Path) -> None:
    given = rates(tmp_path, ScheduleConfig("multistep", milestones=(1, 3), factor=0.1))
    assert given == pytest.approx([0.2] * 3 + [0.02] * 6 + [0.002] * 3)


def test_every_group_keeps_its_own_base_rate_also_after_a_resume(tmp_path: Path) -> None:
    config = FitConfig(epochs=4, log_every=1)
    schedule = ScheduleConfig("multistep", milestones=(1,), factor=0.1)
    train(tmp_path / "run", config, TinyDistiller(after=stop_after(5)), schedule=schedule)
    groups = torch.load(tmp_path / "run/checkpoints/last/state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.01])
    train(tmp_path / "run", config, schedule=schedule)
    groups = torch.load(tmp_path / "run/checkpoints/last/state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.02, 0.01])


def test_warmup_then_cosine(tmp_path: Path) -> None:
    given = rates(tmp_path, ScheduleConfig("cosine", warmup=1.0))
    rise = [0.2 * k / 3 for k in range(3)]
    fall = [0.2 * 0.5 * (1 + math.cos(math.pi * k / 9)) for k in range(9)]
    assert given == pytest.approx(rise + fall)


def test_cosine_ends_at_zero_and_constant_stays() -> None:
    cosine = make_schedule(ScheduleConfig("cosine"), 10)
    assert cosine(0) == 1 and cosine(5) == pytest.approx(0.5) and cosine(10) == pytest.approx(0) == cosine(11)
    linear = make_schedule(ScheduleConfig("linear", warmup=2.0), 10)
    assert linear(1) == 0.5 and linear(2) == 1 and linear(8) == pytest.approx(0.25) and linear(10) == 0 == linear(11)
    constant = make_schedule(ScheduleConfig("constant", warmup=2), 10)
    assert [constant(e) for e in (0, 1, 2, 10)] == [0, 0.5, 1, 1]
    # 391 steps an epoch: step / 391 * ... must not round below a milestone.
    in_steps = ScheduleConfig("constant", warmup_steps=7, warmup_from=0.3)
    with pytest.raises(ValueError, match="in_epochs"):
        make_schedule(in_steps, 10)
    rising = make_schedule(in_steps.in_epochs(3), 10)
    assert [rising(step / 3) for step in range(9)] == pytest.approx([0.3 + 0.1 * step for step in range(7)] + [1.0] * 2)
    steps = make_schedule(ScheduleConfig("multistep", milestones=(140,), factor=0.1), 300)
    assert steps((140 * 391 - 1) / 391) == 1.0 and steps(140 * 391 / 391) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [{"milestones": (3, 1)}, {"warmup": -1}])
def test_wrong_schedules_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"schedule\.{next(iter(bad))} must"):
        ScheduleConfig(**bad)


def test_progress(tmp_path: Path) -> None:
    distiller = TinyDistiller()
    train(tmp_path / "run", FitConfig(epochs=2.5), distiller)
    assert [p.step for p in distiller.seen] == list(range(8))  # 2.5 x 3 steps, rounded
    assert [p.epoch for p in distiller.seen] == pytest.approx([k / 3 for k in range(8)])
    assert {(p.steps, p.epochs) for p in distiller.seen} == {(8, 8 / 3)}


def test_logged_values_are_the_means_since_the_last_line(tmp_path: Path) -> None:
    train(tmp_path / "each", FitConfig(epochs=3, log_every=1))
    train(tmp_path / "means", FitConfig(epochs=3, log_every=4))
    each, means = lines(tmp_path / "each"), lines(tmp_path / "means")
    assert [line["step"] for line in means] == [4, 8, 9]
    for line, start in zip(means, (0, 4, 8), strict=True):
        for name in ("teacher/ce", "teacher/kd", "student/ce", "student/kd", "student/confidence"):
            wanted = sum(x[name] for x in each[start : line["step"]]) / (line["step"] - start)
            assert line[name] == pytest.approx(wanted, rel=1e-12)
    assert each[0]["teacher/ce"] != each[1]["teacher/ce"]


def test_one_steps_line_is_that_steps_loss(tmp_path: Path) -> None:
    distiller = TinyDistiller()
    batch = next(iter(TinyData()))
    with torch.no_grad():
        losses, observed = distiller(batch, Progress(0, 0.0, 1, 1.0))
    train(tmp_path / "run", FitConfig(steps=1))
    line = lines(tmp_path / "run")[0]
    for name in ("teacher/ce", "student/kd"):
        role, term = name.split("/")
        assert line[name] == pytest.approx(losses[role][term].item(), rel=1e-7)
    assert line["student/confidence"] == pytest.approx(observed["student/confidence"].item(), rel=1e-7)
    assert line["epoch"] == pytest.approx(1 / 3) and line["images_per_second"] > 0


class HostReads(TorchDispatchMode):
    """The operators by which the host reads a value of the device, with what ``now`` says at that moment."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")

    def __init__(self, now: Callable[[], int]) -> None:
        super().__init__()
        self.now, self.reads = now, [0] * 100

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.reads[self.now()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_value_is_read_from_the_device_between_log_points(
    tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [0]

    def after(step: int) -> None:
        done[0] = step

    config = FitConfig(steps=12, log_every=6, evaluate_every=12, accumulate=accumulate, clip=1.0)
    with HostReads(lambda: done[0]) as mode:
        for name in ("tolist", "cpu", "numpy"):  # these copy without an operator of their own on the CPU
            real = getattr(Tensor, name)

            def counted(self: Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Any:
                mode.reads[done[0]] += 1
                return real(self, *args, **kwargs)

            monkeypatch.setattr(Tensor, name, counted)
        train(tmp_path / "run", config, TinyDistiller(after=after))
    inside = [k for k in range(2, 12) if k != 6]
    assert [k for k in inside if mode.reads[k]] == []
    assert mode.reads[1] and mode.reads[6] and mode.reads[12]  # the first step and the log points: the counter works


def test_evaluation_and_best(tmp_path: Path) -> None:
    result = train(tmp_path / "run", FitConfig(epochs=6, keep=1), evaluate=True)
    looks = [line for line in lines(tmp_path / "run") if line["kind"] == "evaluation"]
    assert [line["step"] for line in looks] == [3, 6, 9, 12, 15, 18]
    top = max(line["student/top1"] for line in looks)
    first = next(line for line in looks if line["student/top1"] == top)
    assert result["best"]["student/top1"] == top and result["best"]["step"] == first["step"]
    assert result["best"]["selected_by"] == "student/top1" and result["last"] == looks[-1]
    folder = tmp_path / "run/checkpoints"
    assert (
        os.readlink(folder / "best") == f"step-{first['step']:08d}" and os.readlink(folder / "last") == "step-00000018"
    )
    assert {p.name for p in checkpoints.numbered(folder)} == {os.readlink(folder / n) for n in ("best", "last")}
    assert json.loads((tmp_path / "run/summary.json").read_text())["best"] == result["best"]


def test_without_evaluation_there_is_no_best(tmp_path: Path) -> None:
    result = train(tmp_path / "run", FitConfig(epochs=2))
    assert result["best"] is None and result["last"] is None
    assert not (tmp_path / "run/checkpoints/best").exists()
    assert len(checkpoints.numbered(tmp_path / "run/checkpoints")) == 2


def test_frozen_network_is_not_saved(tmp_path: Path) -> None:
    distiller = TinyDistiller()
    distiller.networks["teacher"].requires_grad_(False)
    distiller.parameter_groups = lambda: [{"params": list(distiller.networks["student"].parameters())}]  # type: ignore[method-assign]
    train(tmp_path / "run", FitConfig(epochs=1), distiller)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints/last").iterdir()) == ["state.pt", "student.safetensors"]


def test_summary_counts_images_seconds_and_memory(tmp_path: Path) -> None:
    result = train(tmp_path / "run", FitConfig(epochs=2))
    assert result["images_per_second"] == pytest.approx(40 / result["seconds"])
    assert result["peak_memory_bytes"] > 1e7 and result["method"] == "tiny"
    said = read_json(tmp_path / "run/summary.json")
    assert {**json.loads(json.dumps(result)), "run": said["run"]} == said


def test_bf16_on_the_cpu(tmp_path: Path) -> None:
    distiller, seen = TinyDistiller(), set()
    distiller.networks["student"].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train(tmp_path / "half", FitConfig(epochs=4, precision="bf16"), distiller)
    assert seen == {torch.bfloat16}
    line = lines(tmp_path / "half")[-1]
    assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
    weights, state = checkpoints.read_checkpoint(tmp_path / "half/checkpoints/last")
    assert {v.dtype for values in weights.values() for v in values.values()} == {torch.float32}
    assert state["scaler"] is None


# --- wrong configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "how long"),
        ({"epochs": 0}, "fit.epochs must be positive: 0"),
        ({"epochs": 0.01}, "nothing to train: fit.epochs 0.01 is less than one step"),
        ({"steps": -1}, "fit.steps must be at least 1: -1"),
        ({"epochs": 1, "accumulate": 0}, "fit.accumulate"),
        ({"epochs": 1, "log_every": 0}, "fit.log_every"),
        ({"epochs": 1, "keep": 0}, "fit.keep"),
        ({"epochs": 1, "clip": -1.0}, "fit.clip"),
        ({"epochs": 1, "clip": math.nan}, "fit.clip must be a number: nan"),
        ({"epochs": 1, "evaluate_every": 0}, "fit.evaluate_every"),
        ({"epochs": 1, "precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_wrong_configs_are_refused_before_anything_is_written(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", FitConfig(**config))
    assert not (tmp_path / "run").exists()


def test_what_is_legal_and_probably_meant_otherwise_is_a_line_of_warning(tmp_path: Path) -> None:
    train(tmp_path / "run", FitConfig(steps=2, log_every=50))
    log = (tmp_path / "run/log.txt").read_text()
    assert "note: fit.log_every 50 is longer than the run of 2 steps" in log
    assert ScheduleConfig(milestones=(1, 5, 9)).remarks(5.0) == [
        "note: schedule.milestones [5, 9] are not before the end of the run, epoch 5"
    ]
    assert "warmup 6 lasts the whole run" in ScheduleConfig("cosine", warmup=6.0).remarks(5.0)[0]
    assert not ScheduleConfig("cosine", warmup=1.0).remarks(5.0)


def test_empty_data_are_refused() -> None:
    with pytest.raises(InputError, match="no batch"):
        durations(FitConfig(epochs=1), 0)


def test_steps_count_where_both_are_given() -> None:
    assert durations(FitConfig(epochs=3, steps=5), 10) == (5, 10)
    assert durations(FitConfig(epochs=0.25, evaluate_every=2), 10) == (2, 2)


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "did you mean 'tensorboard'"), ("aim", "not installed")])
def test_unknown_or_absent_trackers_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_accelerator(FitConfig(epochs=1, device="cpu", trackers=(name,)), str(tmp_path))


# --- run folder -------------------------------------------------------------------------------------------------------


def opened(path: Path, config: dict[str, Any], **kwargs: Any) -> RunFolder:
    run = RunFolder(path, config, **kwargs)
    run.open()
    return run


def test_run_folder_of_another_config_is_refused_naming_the_key(tmp_path: Path) -> None:
    config = {
        "data": {"name": "digits", "root": "a"},
        "networks": {"student": {"name": "x"}},
        "rates": [1, 2],
        "seed": 0,
    }
    opened(tmp_path / "run", config)
    opened(tmp_path / "run", config)
    for change, said in (
        ({"seed": 1}, "with seed = 0, this command says 1"),
        ({"networks": {"student": {"name": "y"}}}, r"with networks\.student\.name = 'x', this command says 'y'"),
        ({"networks": {"student": {"name": "x"}, "teacher": {"name": "x"}}}, r"without networks\.teacher\.name"),
        ({"rates": [1, 3]}, "with rates = "),
        ({"extra": {"weight": 2}}, r"without extra\.weight, this command says 2"),
        ({"rates": 3, "task": "offline_kd"}, "without task, this command says 'offline_kd'"),  # the task first
    ):
        with pytest.raises(InputError, match=f"holds a run {said}"):
            RunFolder(tmp_path / "run", {**config, **change}, may_change=("data.root",))
    opened(tmp_path / "run", {**config, "data": {"name": "digits", "root": "b"}}, may_change=("data.root",))
    with pytest.raises(InputError, match=r"data\.root"):
        RunFolder(tmp_path / "run", config)
    with pytest.raises(InputError, match=r"data\.name"):
        RunFolder(tmp_path / "run", {**config, "data": {"name": "x", "root": "b"}}, may_change=("data.n", "data.root"))


def test_folders_that_hold_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        RunFolder(tmp_path / "full", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "file", {})
    with pytest.raises(InputError, match="cannot make the folder"):
        opened(tmp_path / "file/run", {})
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty", {})
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/config.yaml.writing").write_text("se")  # by a run killed in its first moments
    opened(tmp_path / "killed", {"seed": 1})
    assert yaml.safe_load((tmp_path / "killed/config.yaml").read_text()) == {"seed": 1}
    assert not (tmp_path / "killed/config.yaml.writing").exists()


HOLD = """
import sys, time
from pathlib import Path
from core.training.run import RunFolder
run = RunFolder(Path(sys.argv[1]), {"seed": 0})
run.open()
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    """The second is refused and told who trains there; a killed one holds nothing."""
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"is being trained by process {holder.pid} on "):
            RunFolder(run, {"seed": 0})
        RunFolder(run, {"seed": 0}, main=False)  # another rank of the same job
        assert read_config(run / "config.yaml") == {"seed": 0}  # whoever only reads is not kept out
        holder.kill()
        holder.wait()
        opened(run, {"seed": 0})
        opened(run, {"seed": 0})  # the same process, again
    finally:
        holder.kill()


def test_who_comes_between_check_and_lock_is_refused(tmp_path: Path) -> None:
    late = RunFolder(tmp_path / "run", {"seed": 0})  # nothing there yet
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(late.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = (late.path / "config.yaml").read_bytes()
        with pytest.raises(InputError, match="is being trained by"):
            late.open()
        assert (late.path / "config.yaml").read_bytes() == before
    finally:
        holder.kill()


def test_another_rank_may_write_into_the_folder_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"seed": 0})
    (run.path / "mmengine").mkdir(parents=True)  # mmengine's own log, of a rank that was faster
    run.open()
    assert read_config(run.path / "config.yaml") == {"seed": 0}


def spoiled(content: bytes) -> dict[str, bytes]:
    """What a crash, a full disk or a hand leaves of a file."""
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    lines = content.splitlines(keepends=True)
    return {
        "empty": b"", "half": content[:middle], "zeros": bytes(len(content)), "flipped": flipped,
        "garbage": b"\xff\x00{[",
        "without its last line": b"".join(lines[:-1]), "cut at a line": b"".join(lines[: len(lines) // 2]),
    }  # fmt: skip


def test_a_spoiled_config_is_known_and_written_again_by_its_own_command_alone(tmp_path: Path) -> None:
    config = {"method": "dml", "data": {"name": "digits", "root": "a"}, "seed": 0}
    run = opened(tmp_path / "run", config)
    run.write_environment("cpu")
    file = run.path / "config.yaml"
    for how, content in spoiled(file.read_bytes()).items():
        file.write_bytes(content)
        for read_it in (lambda: read_config(file), lambda: RunFolder(run.path, config)):
            with pytest.raises(InputError, match=r"config\.yaml"):
                read_it()
                pytest.fail(how)
        file.unlink()
        with pytest.raises(InputError, match="holds no run"):
            RunFolder(run.path, {**config, "seed": 1})
        opened(run.path, config)
        assert read_config(file) == config


@pytest.mark.parametrize("name", ["environment.json", "summary.json"])
def test_spoiled_json_is_written_anew(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = opened(tmp_path / "run", {"seed": 0}), opened(tmp_path / "other", {"seed": 1})
    for one in (run, other):
        one.write_environment("cpu")
        one.write_json("summary.json", {"status": "finished"})
    whole, foreign = (run.path / name).read_bytes(), (other.path / name).read_bytes()
    assert run.finished
    for how, content in {**spoiled(whole), "another run's": foreign}.items():
        (run.path / name).write_bytes(content)
        capsys.readouterr()
        if name == "summary.json":
            assert not run.finished, how
        else:
            run.write_environment("cpu")
            assert len(json.loads((run.path / name).read_text())["starts"]) == 1, how
        (said,) = capsys.readouterr().err.splitlines()
        assert name in said and "written anew" in said


def test_metrics_that_a_crash_spoiled_are_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = opened(tmp_path / "run", {"seed": 0})
    for step in range(6):
        run.metric({"kind": "train", "step": step})
    size = run.metrics_size()
    whole = run.metrics_file.read_bytes()
    for content, left in (
        (whole + b'{"kind": "train", "st', 6),  # after the checkpoint: cut back, nothing to say
        (whole[:-4], 5),
        (whole[: size // 2] + bytes(size - size // 2), 3),
        (b"", 0),
        (bytes(size), 0),
        (whole[:10] + b"\xff" + whole[11:], 5),
        (None, 0),
    ):
        run.metrics_file.unlink() if content is None else run.metrics_file.write_bytes(content)
        capsys.readouterr()
        run.cut_metrics(size)
        assert len(read_metrics(run.metrics_file)) == left
        run.metric({"kind": "train", "step": 6})
        assert read_metrics(run.metrics_file)[-1]["step"] == 6
        assert capsys.readouterr().err.count("\n") == (left < 6)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", {"seed": 0}, main=False)
    run.write_environment("cpu")
    run.metric({"kind": "train"})
    run.log("hello")
    run.write_json("summary.json", {})
    run.cut_metrics(0)
    assert not (tmp_path / "run").exists()


def test_metrics_are_full_precision_json_and_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", {})
    run.metric({"kind": "train", "step": 1, "student/ce": 1 / 3, "bad": float("nan"), "worse": -math.inf})
    size = run.metrics_size()
    run.metric({"kind": "train", "step": 2})
    assert read_metrics(run.metrics_file)[0] == {
        "kind": "train",
        "step": 1,
        "student/ce": 1 / 3,
        "bad": None,
        "worse": None,
    }
    with open(run.metrics_file, "a") as file:
        file.write('{"kind": "tra')
    assert [m["step"] for m in read_metrics(run.metrics_file)] == [1, 2]
    run.cut_metrics(size)
    assert [m["step"] for m in read_metrics(run.metrics_file)] == [1] and run.metrics_size() == size


def test_json_that_is_nested_without_end_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("[" * 100_000 + "\n" + '{"step": 1}\n')
    assert read_metrics(file) == [{"step": 1}]
    with pytest.raises(InputError, match="is damaged"):
        read_json(file)


def test_environment_names_every_start(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", {})
    run.write_environment("cpu")
    run.write_environment("cpu")
    starts = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    assert (
        len(starts) == 2
        and torch.__version__.startswith(starts[0]["versions"]["torch"])
        and starts[1]["device"] == "cpu"
    )
    assert starts[0]["processes"] == 1 and starts[0]["command"]


def test_a_line_that_cannot_be_written_is_said_in_one(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", {})
    run.metrics_file.mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        run.metric({"step": 1})
    (tmp_path / "run/log.txt").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*log\.txt"):
        run.log("hello")


# --- signals and exit codes -------------------------------------------------------------------------------------------


def test_stop_takes_one_signal_calmly_and_a_second_ctrl_c_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # a batch system may repeat it: no reason to lose the step
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stop_outside_the_main_thread_does_nothing() -> None:
    seen: list[bool] = []

    def work() -> None:
        with Stop().listening() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


FULL = "error: the memory is full: give a smaller batch or network, or fewer images at once"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such thing"), 2, "error: no such thing"),
        (TrainingError("it broke"), 1, "error: it broke"),
        (OSError(28, "No space left on device", "a.txt"), 1, "error: cannot write a.txt: No space left on device"),
        (MemoryError(), 1, FULL),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, FULL),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes"), 1, FULL),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == code and capsys.readouterr().err.splitlines() == [line]


def test_a_programming_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_command(lambda: int((torch.zeros(2) + torch.zeros(3)).sum()))
    with pytest.raises(FileNotFoundError):
        run_command(lambda: int(open("/nonexistent").read()))  # noqa: SIM115
    with pytest.raises(SystemExit) as end:
        run_command(lambda: None)
    assert end.value.code == 0


def test_a_config_keeps_numbers_that_are_not_finite_and_json_has_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"clip": math.inf, "sides": (1, 2)})
    run.open()
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"clip": math.inf, "sides": [1, 2]}
    RunFolder(run.path, {"clip": math.inf, "sides": (1, 2)})  # the same run: it may be resumed
    with pytest.raises(InputError, match="clip"):
        RunFolder(run.path, {"clip": None, "sides": (1, 2)})
    run.write_json("summary.json", {"loss": math.nan, "place": tmp_path})
    said = json.loads((run.path / "summary.json").read_text())
    assert {key: said[key] for key in ("loss", "place")} == {"loss": None, "place": str(tmp_path)}
