"""Offline distillation of mixed images: the student's labels are soft, its teacher's word is as ever, DKD refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_runs, offline_arguments, stop_at

from classification.config import parse_command
from classification.experiment import build
from core.training.distiller import Progress
from offline_kd.config import OFFLINE

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
MIX = ["--data.mixup", "0.8", "--data.cutmix", "1.0"]
START = Progress(0, 0.0, 100, 10.0)


@pytest.mark.parametrize("method", ["vanilla", "kd", "diswot", "norm"])
def test_labels_are_soft_and_imitation_is_as_ever(tmp_path: Path, teacher: Path, method: str) -> None:
    argv = offline_arguments(tmp_path / "run", teacher, *MIX, "--label_smoothing", "0.1", method=f"{method}+adm")
    experiment = build(parse_command(argv, task=OFFLINE))
    distiller, train = experiment.distiller.train(), experiment.datasets.train
    batch: dict[str, Any] = {"image": train.images[:8], "target": train.targets[:8], "index": torch.arange(8)}  # type: ignore[union-attr]
    assert distiller.mixing is not None
    batch = dict(distiller.mixing(batch, START))
    outputs = distiller.method(distiller.networks, distiller.views(batch["image"]), ("student",))
    losses = distiller.method.losses(outputs, batch, START)["student"]
    z_s, z_t = (outputs[role].logits.detach().double() for role in ("student", "teacher"))
    q = batch["target"].double() * 0.9 + 0.1 / 5
    wanted = -(q * z_s.log_softmax(dim=1)).sum(dim=1).mean()
    share = getattr(distiller.method.options, "ce", 1.0)
    assert float(losses["ce"].detach()) == pytest.approx(float(share * wanted), rel=1e-5)
    if method in ("kd", "diswot"):
        options = distiller.method.options
        p_s, p_t = (z.div(options.tau).softmax(dim=1) for z in (z_s, z_t))
        kd = options.kd * options.tau**2 * (p_t * (p_t.log() - p_s.log())).sum(dim=1).mean()
        assert float(losses["kd"].detach()) == pytest.approx(float(kd), rel=1e-4)
    whole, _ = distiller(batch, START)
    total = torch.stack([value for terms in whole.values() for value in terms.values()]).sum()
    total.backward()
    assert "consensus" in whole["student"] and whole.keys() == {"student"}
    assert all(p.grad is None for p in distiller.networks["teacher"].parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in distiller.networks["student"].parameters())


def test_resumed_equals_uninterrupted(
    tmp_path: Path, teacher: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*MIX, "--data.auto_augment", "augmix-m5-w2", "--data.re_prob", "0.5"]
    assert command(offline_arguments(tmp_path / "whole", teacher, *more, "--data.workers", "0"))[0] == 0
    argv = offline_arguments(tmp_path / "cut", teacher, *more, "--data.workers", "2")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert command(argv)[0] == 130
    assert command(argv)[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_dkd_needs_a_class_index(tmp_path: Path, teacher: Path, command: Command) -> None:
    code, _, said = command(offline_arguments(tmp_path / "run", teacher, "--data.mixup", "0.2", method="dkd"))
    (line,) = said.splitlines()
    assert code == 2 and line.startswith("error: DKD goes by the class index of each image, and data.mixup leaves it")
    assert not (tmp_path / "run").exists()
