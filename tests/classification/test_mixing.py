"""Mixup and cutmix: one draw a step for all networks, soft targets in every loss, exact resuming, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import arguments, assert_same_runs, cut_at
from torch import Tensor

from classification.config import parse_command
from classification.data.mixing import SALT, Mixing
from classification.experiment import Experiment, build
from core.training.distiller import Batch, Progress
from core.training.meters import LossBuffer
from core.training.seed import mix
from core.training.step import train_step

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
MIX = ["--data.mixup", "0.8", "--data.cutmix", "1.0"]
START = Progress(0, 0.0, 100, 10.0)
CLASSES = 4


def at(step: int) -> Progress:
    return Progress(step, step / 10, 100, 10.0)


def batch_of(count: int, *views: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, *views, 3, 10, 8), generator=generator, dtype=torch.uint8)
    return {"image": images, "target": torch.arange(count) % CLASSES, "index": torch.arange(count), "weight": 1.0}


def mixed_by_hand(batch: Batch, mixup: float, cutmix: float, prob: float, switch: float, seed: int) -> Any:
    """(images, targets, "mixup" or "cutmix" or "", lambda), float64, from the formulas of the two papers and numpy."""
    draw = np.random.RandomState(seed % 2**32)
    images, count = batch["image"].double(), len(batch["target"])
    onehot = torch.eye(CLASSES, dtype=torch.float64)[batch["target"]]
    if draw.rand() >= prob:
        return images, onehot, "", 1.0
    cuts = draw.rand() < switch if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cuts else mixup
    lam = draw.beta(alpha, alpha)
    result, height, width = images.clone(), *images.shape[-2:]
    if cuts:
        side = np.sqrt(1 - lam)
        h, w = int(height * side), int(width * side)
        y, x = draw.randint(height), draw.randint(width)
        top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
        left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
        lam = 1 - (bottom - top) * (right - left) / (height * width)
    for i in range(count):
        other = images[count - 1 - i]
        if cuts:
            result[i][..., top:bottom, left:right] = other[..., top:bottom, left:right]
        else:
            result[i] = lam * images[i] + (1 - lam) * other
    return result, lam * onehot + (1 - lam) * onehot.flip(0), "cutmix" if cuts else "mixup", lam


def soft(logits: Tensor, q: Tensor, smoothing: float = 0.0) -> float:
    """Cross-entropy towards probabilities, in float64."""
    z = logits.detach().double()
    log_p = z - z.exp().sum(dim=1, keepdim=True).log()
    q = q.double() * (1 - smoothing) + smoothing / q.shape[1]
    return float(-(q * log_p).sum(dim=1).mean())


def imitation(logits: Tensor, other: Tensor) -> float:
    p, q = (x.detach().double().softmax(dim=1) for x in (logits, other))
    return float((q * (q.log() - p.log())).sum(dim=1).mean())


def experiment_of(tmp_path: Path, *more: str, method: str = "dml+adm") -> Experiment:
    return build(parse_command(arguments(tmp_path / "run", *MIX, *more, method=method)))


def mixed_batch(experiment: Experiment, count: int = 7) -> Batch:
    train = experiment.datasets.train
    batch = {"image": train.images[:count], "target": train.targets[:count], "index": torch.arange(count)}  # type: ignore[union-attr]
    assert experiment.distiller.mixing is not None
    return experiment.distiller.mixing(batch, START)


# --- the images and targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixup", "cutmix", "prob"), [(0.8, 1.0, 1.0), (0.2, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.5, 0.6)]
)
@pytest.mark.parametrize(("count", "views"), [(8, ()), (7, ()), (6, (2,))])
def test_images_and_targets_are_those_of_the_formulas(
    mixup: float, cutmix: float, prob: float, count: int, views: tuple[int, ...]
) -> None:
    mixing = Mixing(mixup, cutmix, prob, 0.4, num_classes=CLASSES, seed=9)
    kinds = []
    for step in range(20):
        batch = batch_of(count, *views)
        before = batch["image"].clone()
        states = np.random.get_state()[2], torch.get_rng_state()
        found = mixing(batch, at(step))
        images, targets, kind, _ = mixed_by_hand(batch, mixup, cutmix, prob, 0.4, mix(9, SALT, step))
        assert found["image"].dtype == torch.uint8 and found["image"].shape == before.shape
        assert (found["image"] - images).abs().max() <= (0.5001 if kind == "mixup" else 0)
        torch.testing.assert_close(found["target"].double(), targets, rtol=1e-6, atol=1e-6)
        assert found["index"] is batch["index"] and torch.equal(batch["image"], before)
        assert np.random.get_state()[2] == states[0] and torch.equal(torch.get_rng_state(), states[1])
        kinds.append(kind)
    assert set(kinds) == {kind for kind, on in (("mixup", mixup), ("cutmix", cutmix), ("", prob < 1)) if on}


def test_each_step_has_its_own_draw_and_each_seed() -> None:
    batch = batch_of(8)
    drawn = [
        Mixing(0.8, 0.0, 1.0, 0.5, num_classes=CLASSES, seed=seed)(batch, at(step))["target"][0].max()
        for seed in (0, 1)
        for step in range(10)
    ]
    assert len({float(value) for value in drawn}) == 20


def test_all_networks_and_all_parts_of_a_batch_see_one_draw(tmp_path: Path) -> None:
    from accelerate import Accelerator

    experiment = experiment_of(tmp_path, "--networks.teacher.mean", "[0.5, 0.5, 0.5]")
    distiller = experiment.distiller.train()
    batch = next(iter(experiment.train_loader()))
    assert distiller.mixing is not None
    wanted = distiller.mixing(batch, at(4))
    assert not torch.equal(wanted["image"], batch["image"])
    seen: list[dict[str, Tensor]] = []
    real = distiller.method.forward

    def forward(networks: Any, views: dict[str, Tensor], learning: Any = None) -> Any:
        seen.append(dict(views))
        return real(networks, views, learning)

    distiller.method.forward = forward  # type: ignore[method-assign]
    optimizer = experiment.command.config.optimizer.make(distiller.parameter_groups())
    losses = LossBuffer(torch.device("cpu"), lambda values: values, "")
    train_step(distiller, distiller, optimizer, batch, at(4), Accelerator(cpu=True), losses, accumulate=3)
    assert len(seen) == 3
    for role in ("teacher", "student"):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in distiller.normalisation[role])
        raw = 255 * (torch.cat([views[role] for views in seen]) * std + mean)
        assert (raw - wanted["image"]).abs().max() < 1e-3


# --- soft targets in the losses ---------------------------------------------------------------------------------------

METHODS = {
    "vanilla": [],
    "dml": [],
    "kdcl": ["--kdcl.variant", "mean"],
    "kdcl general": ["--kdcl.variant", "general", "--data.validation", "0.2", "--kdcl.views", "shared"],
    "shake": ["--shake.online_teacher", "true"],
    "afd": [],
    "afid": [],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_cross_entropy_is_towards_the_mixed_labels(tmp_path: Path, name: str) -> None:
    smoothing = 0.0 if name.startswith("kdcl") else 0.2
    more = [*METHODS[name], "--label_smoothing", str(smoothing)]
    experiment = experiment_of(tmp_path, *more, method=name.partition(" ")[0])
    distiller, batch = experiment.distiller.train(), mixed_batch(experiment)
    assert 0.05 < float(batch["target"].max(dim=1).values[0]) < 0.95 and batch["target"].shape == (7, 3)
    outputs = distiller.method(distiller.networks, distiller.views(batch["image"]))
    losses = distiller.method.losses(outputs, batch, START)
    assert set(losses) == set(outputs)
    for role, terms in losses.items():
        wanted = soft(outputs[role].logits, batch["target"], smoothing)
        assert float(terms["ce"].detach()) == pytest.approx(wanted, rel=1e-5), role
    if name == "dml":
        for role, other in (("teacher", "student"), ("student", "teacher")):
            wanted = imitation(outputs[role].logits, outputs[other].logits)
            assert float(losses[role]["kd"].detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_smoothing_mixed_labels_is_timms_mixing_of_smoothed_ones() -> None:
    from timm.data.mixup import mixup_target

    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5
    ours = F.cross_entropy(logits, mixup_target(target, 5, 0.3, 0.0).double(), label_smoothing=0.1)
    theirs = -(mixup_target(target, 5, 0.3, 0.1).double() * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("consensus", ["ce", "kd"])
def test_consensus_and_divergence_are_towards_the_mixed_labels_and_train_one_network_each(
    tmp_path: Path, consensus: str
) -> None:
    weights = ["--adm.alpha", "0.5", "--adm.beta", "2", "--adm.consensus", consensus]
    experiment = experiment_of(tmp_path, *weights)
    distiller, batch = experiment.distiller.train(), mixed_batch(experiment)
    assert distiller.adm is not None
    outputs = distiller.method(distiller.networks, distiller.views(batch["image"]))
    losses = distiller.adm.losses(outputs, batch, START, ("teacher", "student"))
    (similarity,) = distiller.adm.similarities({role: o.maps[-1] for role, o in outputs.items()}).values()
    attended = {}
    for role, sign in (("student", 1.0), ("teacher", -1.0)):
        weight = 1 + sign * similarity.double()
        weight = (weight / (weight.mean(dim=(1, 2), keepdim=True) + 1e-5))[:, None]
        logits = {r: o.head((weight * o.maps[-1].double()).float()) for r, o in outputs.items()}
        attended[role] = logits
    co = soft(attended["student"]["student"], batch["target"])
    if consensus == "kd":
        co = imitation(attended["student"]["student"], attended["student"]["teacher"])
    di = soft(attended["teacher"]["teacher"], batch["target"])
    assert float(losses["student"]["consensus"].detach()) == pytest.approx(0.5 * co, rel=1e-3, abs=1e-6)
    assert float(losses["teacher"]["divergence"].detach()) == pytest.approx(2 * di, rel=1e-3)
    for role, other, term in (("student", "teacher", "consensus"), ("teacher", "student", "divergence")):
        for where, trained in ((role, True), (other, False)):
            parameters = [p for p in distiller.networks[where].parameters() if p.requires_grad]
            found = torch.autograd.grad(losses[role][term], parameters, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool(g.any()) for g in found) is trained


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["memory", "one by one", "files"])
def test_resumed_equals_uninterrupted_by_other_workers_too(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    more = [*MIX, "--label_smoothing", "0.1", "--data.mixup_prob", "0.9", "--fit.accumulate", "2"]
    if loader != "memory":
        more += ["--data.auto_augment", "rand-m9-mstd0.5-inc1", "--data.color_jitter", "0.3", "--data.re_prob", "0.3"]
    if loader == "files":
        more += ["--data.name", "folder", "--data.root", str(pictures(tmp_path / "data")), "--data.in_memory", "false"]
    assert command(arguments(tmp_path / "whole", *more, "--data.workers", "0"))[0] == 0
    argv = arguments(tmp_path / "cut", *more, "--data.workers", "2")
    for stop in (4, 7):
        cut_at(stop, argv, command, monkeypatch)
    assert command(argv)[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def pictures(root: Path) -> Path:
    """Digits of three classes as files, ten to train on."""
    from PIL import Image

    from classification.data import Arrays, DataConfig, load_datasets

    data = load_datasets(DataConfig("digits", classes=3, per_class=10))
    assert isinstance(data.train, Arrays) and isinstance(data.test, Arrays)
    for split, name in ((data.train, "train"), (data.test, "val")):
        for k, (image, target) in enumerate(zip(split.images, split.targets.tolist(), strict=True)):
            (root / name / str(target)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / str(target) / f"{k:04}.png")
    return root


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "kdcl"], "kdcl.variant minlogit goes by the class index of each image, and data.mixup and"),
        (["--method", "kdcl", "--kdcl.variant", "naive"], "kdcl.variant naive goes by the class index"),
        (["--method", "kdcl+adm", "--kdcl.variant", "linear"], "kdcl.variant linear goes by the class index"),
        (["--method", "switokd"], "SwitOKD goes by the class index of each image, and data.mixup and data.cutmix"),
        (["--adm.divergence", "kd"], "adm.divergence kd keeps what a teacher said of each image by its number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_a_class_index_refuses_in_one_line(
    tmp_path: Path, command: Command, more: list[str], message: str
) -> None:
    code, _, said = command(arguments(tmp_path / "run", *MIX, *more))
    (line,) = said.splitlines()
    assert code == 2 and line.startswith(f"error: {message}") and not (tmp_path / "run").exists()


def test_a_side_of_weight_0_needs_no_class_index(tmp_path: Path) -> None:
    assert experiment_of(tmp_path, "--adm.divergence", "kd", "--adm.beta", "0").distiller.mixing is not None
