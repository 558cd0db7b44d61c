"""Eq. 12 over epochs: what a teacher said of each image one epoch ago, kept on disk, through kills and resumes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import ROOT, arguments, assert_same_runs, in_two_processes, stop_at
from test_methods import CLASSES, MEAN, STD, HostReads, distiller_of, images, reached
from torch import Tensor

import classification.predictions
from classification.config import parse_command
from classification.data.datasets import Arrays
from classification.data.loaders import InMemoryLoader
from classification.distiller import ClassificationDistiller
from classification.methods.dml import DML, DMLOptions
from classification.methods.vanilla import Vanilla
from classification.predictions import PredictionStore, PreviousPredictions, data_hash, delta_of
from core.adm import ADMConfig
from core.errors import InputError, TrainingError
from core.training.checkpoint import read_checkpoint
from core.training.distiller import Progress
from core.training.fit import FitConfig

KD = ADMConfig(0.3, 0.7, 0.5, divergence="kd")
ALONE: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, scaler=None)
Command = Callable[[list[str]], tuple[int, str, str]]


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (5, [0.0, 0.2, 1 / 3, 7 / 15, 0.6]),
        (4.2, [0.0, 0.2, 1 / 3, 7 / 15, 0.6]),  # the part of an epoch is one, too
        (3, [0.0, 0.2, 0.6]),
        (2, [0.0, 0.2]),
        (1, [0.0]),
        (0.5, [0.0]),
    ],
)
def test_delta_grows_linearly_from_the_second_epoch_to_the_last(epochs: float, expected: list[float]) -> None:
    assert [delta_of(e, epochs, (0.2, 0.6)) for e in range(len(expected))] == pytest.approx(expected)


def test_values_of_the_options() -> None:
    assert ADMConfig().delta == (0.2, 0.6) and ADMConfig().divergence == "ce"
    for delta in ((-0.1, 0.5), (0.2, 1.1), (float("nan"), 0.5)):
        with pytest.raises(InputError, match=r"adm.delta must be (in \[0, 1\]|a number)"):
            ADMConfig(delta=delta)


# --- Eq. 12, end to end -----------------------------------------------------------------------------------------------


def data_of(count: int, seed: int = 1) -> Any:
    """A training set: random images of 5 classes."""
    targets = torch.arange(count) % CLASSES
    train = Arrays(images(count, seed), targets, torch.arange(count), augmentation="crop", padding=1)
    return SimpleNamespace(train=train, num_classes=CLASSES)


def attach(
    distiller: ClassificationDistiller, run: Path, datasets: Any, batch_size: int = 4, **options: Any
) -> InMemoryLoader:
    loader = InMemoryLoader(datasets.train, batch_size, train=True, seed=3, **options)
    assert distiller.previous is not None
    distiller.previous.attach(run, datasets, loader, FitConfig(), ALONE)
    return loader


def steps_of(loader: InMemoryLoader, epochs: int, start: int = 0) -> Iterator[tuple[dict[str, Any], Progress]]:
    length = len(loader)
    step = start
    while step < epochs * length:
        for batch in loader:
            yield batch, Progress(step, step / length, epochs * length, float(epochs))
            step += 1


def train_step(
    distiller: ClassificationDistiller, optim: torch.optim.Optimizer, batch: Any, progress: Progress, parts: int = 1
) -> tuple[Any, list[Any]]:
    """What ``fit`` does in a step: (the batch that the forward saw, the losses of each forward)."""
    batch, seen = distiller.before_step(batch, progress), []
    length = len(batch["target"])
    for phase in distiller.phases:
        for k in range(parts):
            rows = slice(length * k // parts, length * (k + 1) // parts)
            part = {name: v[rows] if isinstance(v, Tensor) else v for name, v in batch.items()}
            losses, _ = distiller(part, progress, phase)
            share = (rows.stop - rows.start) / length
            total: Any = sum(value * share for terms in losses.values() for value in terms.values())
            distiller.backward(losses, total, ALONE)
            seen.append((share, losses))
        distiller.before_update()
        optim.step()
        optim.zero_grad()
    distiller.after_step(batch, progress)
    return batch, seen


def softmax(z: Tensor) -> Tensor:
    e = (z - z.max()).exp()
    return e / e.sum()


def teachers_view(distiller: ClassificationDistiller, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(the plain logits, those of the map under the divergence attention) of each image, location by location."""
    teacher: Any
    student: Any
    teacher, student = distiller.networks["teacher"], distiller.networks["student"]
    adapter = next(p for name, p in distiller.named_parameters() if ":teacher.adapter" in name).flatten(1)
    raw = batch["image"].float()
    x = (raw - 255 * torch.tensor(MEAN).view(-1, 1, 1)) / (255 * torch.tensor(STD).view(-1, 1, 1))
    plain, attended = [], []
    with torch.no_grad():
        for k in range(len(x)):
            ft, fs = (net.forward_intermediates(x[k : k + 1])[0][0] for net in (teacher, student))
            projected = torch.einsum("tc,chw->thw", adapter, fs)
            s = torch.empty(ft.shape[1:], dtype=torch.float64)
            for i in range(s.shape[0]):
                for j in range(s.shape[1]):
                    a, b = ft[:, i, j], projected[:, i, j]
                    s[i, j] = (a @ b) / (a.norm() * b.norm())
            for weight, result in ((torch.ones_like(s), plain), ((1 - s) / (1 - s.mean() + 1e-5), attended)):
                result.append(teacher.fc.weight @ (weight * ft).mean(dim=(1, 2)) + teacher.fc.bias)
    return plain, attended


@pytest.mark.parametrize(("count", "parts"), [(11, 1), (13, 1), (11, 2)], ids=["whole", "drops_a_batch", "accumulated"])
def test_four_epochs_are_equation_12(tmp_path: Path, count: int, parts: int) -> None:
    """Against a dict of what was said in the epoch before, in float64 (what is stored: rounded to float16)."""
    distiller = distiller_of(Vanilla(), KD, dtype=torch.float64)
    loader = attach(distiller, tmp_path, data_of(count))
    optim = distiller.optimizer.make(distiller.parameter_groups())
    said: list[dict[int, Tensor]] = [{}, {}, {}, {}]
    deltas, unknown = [0.0, 0.2, 0.4, 0.6], 0
    for batch, progress in steps_of(loader, 4):
        epoch = int(progress.epoch)
        plain, attended = teachers_view(distiller, batch)
        expected = 0.0
        for k, index in enumerate(batch["index"].tolist()):
            goal = torch.eye(CLASSES, dtype=torch.float64)[batch["target"][k]]
            if epoch > 0 and index in said[epoch - 1]:
                goal = (1 - deltas[epoch]) * goal + deltas[epoch] * said[epoch - 1][index].double()
            elif epoch > 0:
                unknown += 1
            expected -= sum(float(goal[c] * softmax(attended[k])[c].log()) for c in range(CLASSES)) / len(plain)
            said[epoch][index] = softmax(plain[k]).half()
        _, seen = train_step(distiller, optim, batch, progress, parts)
        loss = sum(share * losses["teacher"]["divergence"].item() for share, losses in seen)
        assert loss == pytest.approx(0.7 * expected, rel=1e-6), progress
    assert [len(s) for s in said] == [12 if count == 13 else count] * 4
    assert (unknown > 0) == (count == 13)  # whoever was in the dropped batch of the epoch before


def test_its_gradient_reaches_the_teacher_alone(tmp_path: Path) -> None:
    distiller = distiller_of(DML(), KD)
    loader = attach(distiller, tmp_path, data_of(8))
    optim = distiller.optimizer.make(distiller.parameter_groups())
    for batch, progress in steps_of(loader, 2):
        seen, _ = train_step(distiller, optim, batch, progress)
    assert (seen["delta/teacher"] > 0).all() and not seen["previous/teacher"].requires_grad
    losses, _ = distiller(seen, progress)
    assert reached(distiller, losses["teacher"]["divergence"]) == {"teacher"}
    assert reached(distiller, losses["student"]["consensus"]) == {"student"}


def test_several_teachers_in_turn_have_a_store_each(tmp_path: Path) -> None:
    distiller = distiller_of(DML(DMLOptions(update="alternate")), KD, ("teacher", "teacher_2", "student"))
    loader = attach(distiller, tmp_path, data_of(8))
    optim = distiller.optimizer.make(distiller.parameter_groups())
    last: dict[str, dict[int, Tensor]] = {"teacher": {}, "teacher_2": {}}
    real = PreviousPredictions.after_step
    for batch, progress in steps_of(loader, 3):
        given: dict[str, Tensor] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                PreviousPredictions, "after_step", lambda s, z, p, given=given: (given.update(z), real(s, z, p))[1]
            )
            seen, _ = train_step(distiller, optim, batch, progress)
        for role, before in last.items():
            for k, index in enumerate(batch["index"].tolist()):
                if progress.epoch >= 1:
                    assert torch.equal(seen[f"previous/{role}"][k], before[index].float())
                before[index] = given[role][k].softmax(dim=0).half()
            assert (seen[f"delta/{role}"] == torch.tensor([0.0, 0.2, 0.6])[int(progress.epoch)]).all()
    assert {p.name for p in (tmp_path / "predictions").iterdir()} == {
        f"{role}.{suffix}" for role in last for suffix in ("json", "probabilities", "epochs", "sums")
    }


def test_where_nothing_is_attached_or_used_it_is_equation_8(tmp_path: Path) -> None:
    batch = next(iter(attach(distiller_of(Vanilla(), KD), tmp_path, data_of(8))))
    later = Progress(4, 2.0, 8, 4.0)
    plain = distiller_of(Vanilla(), ADMConfig(0.3, 0.7, 0.5))
    for distiller in (distiller_of(Vanilla(), KD), plain):
        before = distiller.before_step(batch, later)
        assert before is batch
        torch.testing.assert_close(
            distiller(before, later)[0]["teacher"]["divergence"], plain(batch, later)[0]["teacher"]["divergence"]
        )
    assert plain.previous is None and not plain._keeps_logits
    assert distiller_of(Vanilla(), ADMConfig(beta=0.0, divergence="kd")).previous is None
    assert list(tmp_path.iterdir()) == []  # attaching alone writes nothing


def test_a_step_reads_nothing_from_the_device(tmp_path: Path) -> None:
    distiller = distiller_of(DML(), KD)
    loader = attach(distiller, tmp_path, data_of(8))
    optim = distiller.optimizer.make(distiller.parameter_groups())
    with HostReads() as mode:
        for batch, progress in steps_of(loader, 2):
            train_step(distiller, optim, batch, progress)
    assert mode.reads == 0


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_the_loader_tells_the_rows_without_the_device(tmp_path: Path, rank: int, world: int) -> None:
    distiller = distiller_of(Vanilla(), KD)
    loader = attach(distiller, tmp_path, data_of(13), rank=rank, world=world)
    previous = distiller.previous
    assert previous is not None
    for batch, progress in steps_of(loader, 3):
        step = progress.step % len(loader)
        elsewhere = batch["index"].to("meta")  # holds no value that could be read
        assert previous._rows_of(elsewhere, int(progress.epoch), step).tolist() == batch["index"].tolist()


# --- the store --------------------------------------------------------------------------------------------------------


def store_of(folder: Path, samples: int = 6, classes: int = 3, data: str = "d") -> PredictionStore:
    return PredictionStore(folder / "predictions/teacher", samples, classes, data)


def rows_of(seed: int, count: int, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), count).astype(np.float16)


def test_two_generations(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.create()
    a, b, c, again = (rows_of(seed, 3) for seed in range(4))
    store.write(4, np.array([5, 0, 2]), a)
    store.write(5, np.array([0, 1, 2]), b)
    found, known = store.read(4, np.array([0, 1, 2, 5]))
    assert np.array_equal(found[[0, 2, 3]], a[[1, 2, 0]]) and known.tolist() == [True, False, True, True]
    assert not found[1].any()
    assert store.count(4) == store.count(5) == 3
    # A part of an epoch that runs again only overwrites its own rows.
    store.write(5, np.array([2]), again[:1])
    found, known = store.read(5, np.array([0, 1, 2]))
    assert np.array_equal(found, np.stack([b[0], b[1], again[0]])) and known.all()
    assert np.array_equal(store.read(4, np.array([5, 0, 2]))[0], a) and store.count(5) == 3
    # A later epoch's rows, and an earlier one's, are not taken for it.
    store.write(6, np.array([0, 1, 2]), c)
    assert store.read(4, np.array([0, 1, 5]))[1].tolist() == [False, False, True] and store.count(4) == 1
    assert store.read(6, np.array([0, 1, 5]))[1].tolist() == [True, True, False]
    store.create()
    assert store.count(4) == store.count(5) == store.count(6) == 0 and not store.read(6, np.arange(6))[0].any()


def test_a_row_that_was_cut_off_counts_for_no_epoch_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path)
    store.create()
    store.write(0, np.arange(6), rows_of(0, 6))
    real = classification.predictions._write_rows

    def cut(file: Path, rows: np.ndarray, values: np.ndarray) -> None:
        if file == store.probabilities:
            raise KeyboardInterrupt
        real(file, rows, values)

    monkeypatch.setattr(classification.predictions, "_write_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        store.write(2, np.array([1, 4]), rows_of(1, 2))
    assert store.count(0) == 4 and store.read(0, np.arange(6))[1].tolist() == [True, False, True, True, False, True]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path)
    store.create()

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for pwrite, reason in ((full, "No space left on device"), (lambda *arguments: 1, "the disk is full")):
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(TrainingError, match=f"cannot write .*teacher.epochs: {reason}"):
            store.write(0, np.array([0]), rows_of(0, 1))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot make .*predictions: "):
        store_of(tmp_path / "file").create()


def test_rows_that_are_not_of_the_store_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.create()
    for rows in (np.array([6]), np.array([-1])):  # the first row of the other generation, the last one of this
        with pytest.raises(ValueError, match="a store of 6 samples"):
            store.write(0, rows, rows_of(0, 1))
    with pytest.raises(ValueError, match="2 rows of 3"):
        store.write(0, np.array([0, 1]), rows_of(0, 2, classes=4))
    assert store.count(0) == store.count(1) == 0


def test_a_store_of_other_data_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path).create()
    store_of(tmp_path).check()
    for other, message in (
        (store_of(tmp_path, samples=7), "with samples 6, this one has 7"),
        (store_of(tmp_path, samples=5), "with samples 6, this one has 5"),
        (store_of(tmp_path, classes=4), "with classes 3, this one has 4"),
        (store_of(tmp_path, data="e"), "with targets_hash d, this one has e"),
    ):
        with pytest.raises(InputError, match=f"teacher.json is of a training set {message}: resume with the data set"):
            other.check()
    targets, indices = torch.tensor([0, 1, 2]), torch.arange(3)
    hashes = {
        data_hash(targets, indices, 3),
        data_hash(targets, indices, 4),
        data_hash(targets, indices + 1, 3),
        data_hash(targets.flip(0), indices, 3),
        data_hash(targets[:2], indices[:2], 3),
    }
    assert len(hashes) == 5 and data_hash(targets.clone(), indices, 3) in hashes


@pytest.mark.parametrize("damage", ["no header", "half a header", "no epochs", "cut"])
def test_a_damaged_store_is_refused(tmp_path: Path, damage: str) -> None:
    store = store_of(tmp_path)
    store.create()
    if damage == "no header":
        store.header.unlink()
    elif damage == "half a header":
        store.header.write_text('{"samples": ')
    elif damage == "no epochs":
        store.epochs.unlink()
    else:
        os.truncate(store.probabilities, 60)
    with pytest.raises(InputError, match=r"teacher.json.*: bring back .*predictions as the run left it, or start anew"):
        store.check()


def test_imagenets_size_opens_at_once_and_is_never_whole_in_memory(tmp_path: Path) -> None:
    samples, classes, batch = 1_281_167, 1000, 256
    store = PredictionStore(tmp_path / "teacher", samples, classes, "d")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    store.create()
    store.check()
    assert time.perf_counter() - began < 2
    generator = np.random.default_rng(0)
    rows = generator.choice(samples, batch, replace=False)
    rows[0] = samples - 1
    values = [rows_of(seed, batch, classes) for seed in (0, 1)]
    for epoch in (0, 1):
        store.write(epoch, rows, values[epoch])
    for epoch in (0, 1):
        found, known = store.read(epoch, rows)
        assert np.array_equal(found, values[epoch]) and known.all()
        assert store.count(epoch) == batch
    assert store.probabilities.stat().st_size == 2 * samples * classes * 2 > 5e9
    assert store.probabilities.stat().st_blocks * 512 < 2 * batch * 16384
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak < 200e6


# --- checkpoints ------------------------------------------------------------------------------------------------------


def stepped(run: Path, datasets: Any, steps: int) -> ClassificationDistiller:
    distiller = distiller_of(Vanilla(), KD)
    loader = attach(distiller, run, datasets)
    optim = distiller.optimizer.make(distiller.parameter_groups())
    for batch, progress in steps_of(loader, 9):
        if progress.step == steps:
            break
        train_step(distiller, optim, batch, progress)
    return distiller


def test_a_checkpoint_names_what_a_resume_needs(tmp_path: Path) -> None:
    datasets = data_of(11)  # 3 steps an epoch
    state = stepped(tmp_path, datasets, 3).state_dict()["adm.previous._extra_state"]
    said = {"path": "predictions/teacher", "shape": [2, 11, CLASSES], "previous": 11, "current": 0, "epoch": 1}
    assert state == {"teacher": {**said, "data": state["teacher"]["data"]}}
    distiller = stepped(tmp_path, datasets, 8)
    state = distiller.state_dict()["adm.previous._extra_state"]
    assert state["teacher"]["epoch"] == 2 and state["teacher"]["current"] == 8
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    def resume(datasets: Any, state: Any) -> None:
        fresh = distiller_of(Vanilla(), KD)
        attach(fresh, tmp_path, datasets)
        fresh.load_state_dict({"adm.previous._extra_state": state}, strict=False)
        assert fresh.previous is not None and fresh.previous.made
        assert fresh.previous.get_extra_state() == state  # a checkpoint from here says the same

    resume(datasets, state)
    with pytest.raises(InputError, match="with samples 11, this one has 10: resume with the data set"):
        resume(data_of(10), state)
    for changed, message in (
        ({}, "the checkpoint says nothing of it"),
        ({"teacher": {**state["teacher"], "data": "other"}}, "it was made for 11 samples of 5 classes, data other"),
        ({"teacher": {**state["teacher"], "current": 9}}, "8 predictions of epoch 2 instead of 9"),
        ({"teacher": {**state["teacher"], "previous": 10}}, "11 predictions of epoch 1 instead of 10"),
        ({"teacher": {**state["teacher"], "epoch": 1}}, "8 predictions|0 predictions|3 predictions"),
    ):
        with pytest.raises(InputError, match=rf"predictions does not fit the checkpoint \(teacher: .*({message})"):
            resume(datasets, changed)
    # Where nothing is attached, as in evaluation, it asks for nothing.
    shutil.rmtree(tmp_path / "predictions")
    distiller_of(Vanilla(), KD).load_state_dict({"adm.previous._extra_state": state}, strict=False)
    with pytest.raises(InputError, match="no predictions of the epoch before can be read"):
        resume(datasets, state)


def test_a_step_after_a_checkpoint_without_a_word_of_it_is_refused(tmp_path: Path) -> None:
    distiller = distiller_of(Vanilla(), KD)
    batch = next(iter(attach(distiller, tmp_path, data_of(8))))
    with pytest.raises(InputError, match="the checkpoint says nothing of the teacher's predictions"):
        distiller.before_step(batch, Progress(2, 1.0, 8, 4.0))
    del batch["index"]
    with pytest.raises(InputError, match="these batches have no index"):
        distiller.before_step(batch, Progress(0, 0.0, 8, 4.0))
    assert list(tmp_path.iterdir()) == []


# --- the training command ---------------------------------------------------------------------------------------------

EQ_12 = ["--adm.divergence", "kd", "--adm.delta", "[0.3, 0.9]"]
STORE = ("teacher.json", "teacher.probabilities", "teacher.epochs", "teacher.sums")


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ends the run without a word right after this step."""
    real = ClassificationDistiller.after_step

    def after_step(self: ClassificationDistiller, batch: Any, progress: Any) -> None:
        real(self, batch, progress)
        if progress.step + 1 == step:
            raise Killed

    monkeypatch.setattr(ClassificationDistiller, "after_step", after_step)


class Killed(Exception):
    pass


@pytest.mark.usefixtures("quick")
def test_cut_runs_equal_a_whole_one(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 steps an epoch: killed mid-epoch and set back to the epoch's start, then stopped mid-epoch."""
    from classification.tools.train import main

    assert command(arguments(tmp_path / "whole", *EQ_12))[0] == 0
    argv = arguments(tmp_path / "cut", *EQ_12)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            main(argv)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        code, _, said = command(argv)
        assert code == 130 and "resuming from step 3" in said
    code, _, said = command(argv)
    assert code == 0 and "resuming from step 7" in said
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    for name in STORE:
        ours, its = (tmp_path / run / "predictions" / name for run in ("whole", "cut"))
        assert ours.read_bytes() == its.read_bytes()

    # Evaluation needs no store.
    from classification.experiment import command_of, restore
    from classification.tools.evaluate import main as evaluate
    from core.training.checkpoint import find_checkpoint

    shutil.rmtree(tmp_path / "whole/predictions")
    run = tmp_path / "whole"
    weights = read_checkpoint(run / "checkpoints/last")[0]["teacher"]
    restored = restore(command_of(run), find_checkpoint(run, "last")).distiller
    assert all(torch.equal(value, weights[name]) for name, value in restored.networks["teacher"].state_dict().items())
    assert evaluate([str(run)]) == 0


@pytest.mark.usefixtures("quick")
def test_a_resume_without_its_predictions_is_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(tmp_path / "run", *EQ_12)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert command(argv)[0] == 130
    store = tmp_path / "run/predictions"
    shutil.copytree(store, tmp_path / "kept")
    header = json.loads((store / "teacher.json").read_text())
    later = PredictionStore(store / "teacher", header["samples"], header["classes"], header["targets_hash"])
    for damage, message in (
        (lambda: shutil.rmtree(store), "no predictions of the epoch before can be read from"),
        (lambda: later.header.write_text(json.dumps({**header, "samples": 24})), "with samples 24, this one has 30"),
        (lambda: later.header.write_text(json.dumps({**header, "classes": 4})), "with classes 4, this one has 3"),
        (lambda: os.truncate(later.epochs, 200), "are missing or cut off"),
        (
            lambda: later.write(3, np.arange(8), rows_of(0, 8)),
            "does not fit the checkpoint (teacher: 22 predictions of epoch 1 instead of 30, later epochs overwrite",
        ),
        (later.create, "does not fit the checkpoint (teacher: 0 predictions of epoch 1 instead of 30"),
    ):
        damage()
        code, _, said = command(argv)
        assert code == 2 and message in said and len([x for x in said.splitlines() if "error" in x]) == 1, said
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", store)
    assert command(argv)[0] == 0


@pytest.mark.usefixtures("quick")
def test_checkpoints_that_miss_an_epochs_end_and_dry_runs(tmp_path: Path, command: Command) -> None:
    for dry in ([], ["--dry-run"]):
        code, _, said = command(arguments(tmp_path / "run", *EQ_12, "--fit.evaluate_every", "2", *dry))
        assert code == 2 and "fit.evaluate_every 2 does not divide the 3 steps" in said and len(said.splitlines()) == 1
    code, _, said = command(arguments(tmp_path / "run", "--adm.divergence", "kd", "--adm.delta", "[0.2, 2]"))
    assert code == 2 and "adm.delta must be in [0, 1]" in said
    code, printed, _ = command(arguments(tmp_path / "run", *EQ_12, "--dry-run"))
    assert code == 0 and "3 steps an epoch" in printed and not (tmp_path / "run").exists()
    code, _, said = command(arguments(tmp_path / "run", *EQ_12, "--fit.evaluate_every", "1", "--fit.epochs", "1"))
    assert code == 0, said


def test_the_config_names_delta_only_where_it_counts(tmp_path: Path) -> None:
    adm = parse_command(arguments(tmp_path, *EQ_12)).resolved()["adm"]
    assert adm["divergence"] == "kd" and list(adm["delta"]) == [0.3, 0.9]
    assert "delta" not in parse_command(arguments(tmp_path)).resolved()["adm"]  # nor did it in older runs' config.yaml


def test_each_process_writes_its_own_rows_and_reads_those_of_all(tmp_path: Path) -> None:
    """Two processes' parts, step by step in turn: 13 images in batches of 6, 6 and a last one, which is dropped."""
    distillers, order = [], []
    for rank in (0, 1):
        distiller = distiller_of(Vanilla(), KD)
        loader = attach(distiller, tmp_path, data_of(13), batch_size=6, rank=rank, world=2)
        assert distiller.previous is not None
        distiller.previous.accelerator = SimpleNamespace(
            is_main_process=rank == 0, wait_for_everyone=lambda rank=rank: order.append(rank)
        )
        distillers.append((distiller, distiller.optimizer.make(distiller.parameter_groups()), steps_of(loader, 3)))
    written: dict[int, dict[int, Tensor]] = {0: {}, 1: {}, 2: {}}
    for _ in range(3 * 2):
        for distiller, optim, steps in distillers:
            batch, progress = next(steps)
            epoch = int(progress.epoch)
            seen, _ = train_step(distiller, optim, batch, progress)
            assert distiller.previous is not None
            (store,) = distiller.previous.stores.values()
            for k, index in enumerate(batch["index"].tolist()):
                written[epoch][index] = torch.from_numpy(store.read(epoch, np.array([index]))[0][0])
                known = epoch > 0 and index in written[epoch - 1]
                assert seen["delta/teacher"][k] == (torch.tensor([0.0, 0.2, 0.6])[epoch] if known else 0.0)
                if known:
                    assert torch.equal(seen["previous/teacher"][k], written[epoch - 1][index].float())
    assert [len(rows) for rows in written.values()] == [12, 12, 12] and store.count(2) == 12
    assert order == [0, 1] + 3 * [0, 1]  # the file is there, and at the end of each epoch


@pytest.mark.slow
def test_two_processes_write_all_rows(tmp_path: Path) -> None:
    """33 images in batches of 14, 14 and 5, the last one of 3 and 2."""
    data = ["--data.per_class", "11", "--batch_size", "14", "--fit.epochs", "3", "--progress_bar", "false"]
    in_two_processes(ROOT / "classification/tools/train.py", *arguments(tmp_path / "run", *EQ_12, *data))
    header = json.loads((tmp_path / "run/predictions/teacher.json").read_text())
    assert header["samples"] == 33
    store = PredictionStore(tmp_path / "run/predictions/teacher", 33, 3, header["targets_hash"])
    assert [store.count(epoch) for epoch in range(4)] == [0, 33, 33, 0]
    for epoch in (1, 2):
        found, known = store.read(epoch, np.arange(33))
        assert known.all() and np.allclose(found.astype(np.float64).sum(axis=1), 1, atol=2e-3)
        assert len(np.unique(found, axis=0)) > 25  # each its own
    state = read_checkpoint(tmp_path / "run/checkpoints/last")[1]["extra"]["adm.previous._extra_state"]["teacher"]
    assert state["epoch"] == 3 and state["previous"] == 33


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_and_the_same_is_stored(tmp_path: Path) -> None:
    stores = []
    for device in ("cpu", "cuda"):
        distiller = distiller_of(Vanilla(), KD, dtype=torch.float64).to(device)
        loader = attach(distiller, tmp_path / device, data_of(12), device=device)
        optim = distiller.optimizer.make(distiller.parameter_groups())
        for batch, progress in steps_of(loader, 3):
            if progress.step == 1:
                torch.cuda.set_sync_debug_mode("error")
            train_step(distiller, optim, batch, progress)
            if progress.step == 1:
                torch.cuda.set_sync_debug_mode("default")
        assert distiller.previous is not None
        (store,) = distiller.previous.stores.values()
        stores.append([store.read(epoch, np.arange(12)) for epoch in (1, 2)])
    for (a, known), (b, also) in zip(*stores, strict=True):
        assert known.all() and also.all()
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), atol=1e-3)
