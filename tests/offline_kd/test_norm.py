"""NORM: its formulas against loops, who learns from what, the folded student, and runs that are cut and read back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same, stop_at
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from classification.config import TrainConfig
from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig
from classification.evaluation import evaluate
from classification.experiment import load_checkpoint
from classification.methods.base import Output
from classification.networks import create_network
from classification.networks.pretrained import load_weights
from core.adm import ADMConfig
from core.distillation import feature_loss, standardise
from core.errors import InputError
from core.parts import as_network
from core.split import Split
from core.training.checkpoint import read_checkpoint
from core.training.distiller import Progress
from core.training.fit import FitConfig, fit, make_accelerator
from core.training.run import RunFolder
from core.training.schedule import ScheduleConfig, make_schedule
from core.training.seed import seed_everything
from offline_kd.methods.norm import NORM, Expanded, FeatureTransform, NORMOptions, affine_of, fold, norm_loss

CLASSES, SIZE = 5, 16
START = Progress(0, 0.0, 2400, 240.0)
CONSENSUS = ADMConfig(alpha=0.3, beta=0.0, gamma=0.0)


def distiller_of(
    options: NORMOptions | None = None,
    adm: ADMConfig | None = None,
    teacher: nn.Module | str = "cifar_resnet14",
    student: nn.Module | str = "cifar_resnet8",
) -> ClassificationDistiller:
    torch.manual_seed(3)
    given = {"teacher": teacher, "student": student}
    networks = {r: create_network(n, CLASSES) if isinstance(n, str) else n for r, n in given.items()}
    return ClassificationDistiller(
        networks,
        {role: NetworkConfig(role) for role in networks},
        dict.fromkeys(networks, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))),
        NORM(options or NORMOptions(n=2), with_adm=adm is not None),
        adm,
        OptimizerConfig(lr=0.05, weight_decay=0.1),
        images(2),
        num_classes=CLASSES,
    ).train()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch_of(count: int = 6) -> dict[str, Any]:
    return {"image": images(count), "target": torch.arange(count) % CLASSES, "index": torch.arange(count)}


def train(distiller: ClassificationDistiller, steps: int = 2) -> None:
    optim = distiller.optimizer.make(distiller.parameter_groups())
    for _ in range(steps):
        losses, _ = distiller(batch_of(), START)
        total = sum(value for terms in losses.values() for value in terms.values())
        distiller.backward(losses, total, SimpleNamespace(scaler=None))
        distiller.before_update()
        optim.step()
        optim.zero_grad()


def reached(distiller: ClassificationDistiller, loss: Tensor) -> set[str]:
    """Whose parameters a loss has a gradient to: networks.student, method.transform.expand, adm, ..."""
    found = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(found.values()), retain_graph=True, allow_unused=True)
    names = [n for n, g in zip(found, gradients, strict=True) if g is not None and g.abs().max() > 0]
    return {
        n.split(".")[0] if n.startswith("adm.") else ".".join(n.split(".")[: 3 if "transform" in n else 2])
        for n in names
    }


# --- formulas ---------------------------------------------------------------------------------------------------------


def pooled(x: Tensor, size: int) -> Tensor:
    """The maximum over each of ``size`` x ``size`` equal blocks."""
    side = x.shape[-1] // size
    result = torch.empty(*x.shape[:2], size, size, dtype=x.dtype)
    for i in range(size):
        for j in range(size):
            result[:, :, i, j] = x[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side].flatten(2).amax(2)
    return result


@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (4, 2), (2, 4), (1, 3)])
def test_norm_loss_is_the_sum_of_n_mean_squared_errors(student: int, teacher: int) -> None:
    e = torch.randn(3, 3 * 4, student, student, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 4, teacher, teacher, dtype=torch.float64, requires_grad=True)
    size = min(student, teacher)
    a, b = pooled(e.detach(), size), pooled(t.detach(), size)
    wanted = 0.0
    for segment in range(3):
        squares = [
            (a[i, segment * 4 + c, y, x] - b[i, c, y, x]).item() ** 2
            for i in range(3)
            for c in range(4)
            for y in range(size)
            for x in range(size)
        ]
        wanted += sum(squares) / len(squares)
    loss = norm_loss(e, t)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    loss.backward()
    assert e.grad is not None and e.grad.abs().max() > 0 and t.grad is None


def test_norm_loss_needs_whole_segments_and_full_precision() -> None:
    with pytest.raises(ValueError, match="10 channels are no multiple of the teacher's 4"):
        norm_loss(torch.zeros(1, 10, 2, 2), torch.zeros(1, 4, 2, 2))
    low = norm_loss(torch.randn(2, 8, 2, 2).bfloat16(), torch.randn(2, 4, 2, 2).bfloat16())
    assert low.dtype == torch.float32


def test_one_identity_segment_is_the_plain_feature_loss() -> None:
    transform = FeatureTransform(4, 4, 1).double()
    transform.expand.conv.weight.data.copy_(torch.eye(4).view(4, 4, 1, 1))
    transform.expand.bn = nn.Identity()
    x, t = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(norm_loss(transform(x)[0], t), feature_loss(x, t), rtol=1e-12, atol=0)


def normalised(x: Tensor, weight: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """BN(conv1x1(x)) location by location, with the batch's own statistics."""
    y = torch.empty(len(x), len(weight), *x.shape[2:], dtype=x.dtype)
    for b in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                y[b, :, i, j] = weight.flatten(1) @ x[b, :, i, j]
    for c in range(len(weight)):
        variance = ((y[:, c] - y[:, c].mean()) ** 2).mean()
        y[:, c] = (y[:, c] - y[:, c].mean()) / (variance + 1e-5).sqrt() * bn.weight[c] + bn.bias[c]
    return y


def trained_transform(channels: int = 4, teacher: int = 3, n: int = 2) -> FeatureTransform:
    """One whose BatchNorms have weights and statistics of their own."""
    transform = FeatureTransform(channels, teacher, n).double()
    for part in (transform.expand, transform.contract):
        nn.init.normal_(part.bn.weight)
        nn.init.normal_(part.bn.bias)
    for _ in range(5):
        transform(torch.randn(6, channels, 3, 3, dtype=torch.float64) * 2 + 1)
    return transform


@torch.no_grad()
def test_transform_is_two_normalised_convolutions_and_a_residual() -> None:
    transform = trained_transform().train()
    assert {name for name, _ in transform.named_parameters()} == {
        f"{part}.{name}" for part in ("expand", "contract") for name in ("conv.weight", "bn.weight", "bn.bias")
    }
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    e, out = transform(x)
    wanted = normalised(x, transform.expand.conv.weight, transform.expand.bn)
    assert e.shape == (2, 6, 3, 2)
    torch.testing.assert_close(e, wanted)
    torch.testing.assert_close(out, x + normalised(wanted, transform.contract.conv.weight, transform.contract.bn))


def test_transform_starts_with_kaiming_fan_out() -> None:
    transform = FeatureTransform(64, 128, 4)
    for part, fan_out in ((transform.expand, 512), (transform.contract, 64)):
        assert part.conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


@torch.no_grad()
def test_folding_is_exact() -> None:
    transform, classifier, folded = trained_transform().eval(), nn.Linear(4, 5).double(), nn.Linear(4, 5).double()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    for part, given in ((transform.expand, x), (transform.contract, transform(x)[0])):
        a, d = affine_of(part)
        torch.testing.assert_close(torch.einsum("oc,bchw->bohw", a, given) + d.view(-1, 1, 1), part(given))
    before = copy.deepcopy([transform.state_dict(), classifier.state_dict()])
    fold(transform, classifier, into=folded)
    torch.testing.assert_close(folded(x.mean((2, 3))), classifier(transform(x)[1].mean((2, 3))), rtol=1e-10, atol=1e-10)
    assert_same(before, [transform.state_dict(), classifier.state_dict()])


def factor(epoch: float, schedule: str) -> float:
    """s(e) as written down, for the published lengths."""
    if schedule == "cifar":
        return 0.1 if epoch < 10 else 0.5 if epoch < 20 else 1.0 if epoch < 180 else 0.5 if epoch < 210 else 0.1
    if schedule == "imagenet":
        return 0.1 if epoch < 5 else 0.5 if epoch < 15 else 0.9 if epoch < 60 else 0.5 if epoch < 80 else 0.1
    return 1.0


@pytest.mark.parametrize(("schedule", "length"), [("cifar", 240), ("imagenet", 100), ("constant", 30)])
@pytest.mark.parametrize("per_epoch", [1, 3, 391])
def test_schedule_of_the_feature_loss(schedule: Any, length: int, per_epoch: int) -> None:
    method = NORM(NORMOptions(schedule=schedule))

    def said(step: int, epochs: float) -> float:
        return method.factor(Progress(step, step / per_epoch, round(epochs * per_epoch), epochs)).item()

    for epoch in range(length):
        for step in {epoch * per_epoch, (epoch + 1) * per_epoch - 1}:  # an epoch's first step and its last
            assert said(step, length) == pytest.approx(factor(epoch, schedule), rel=1e-6), epoch
    for epochs in (length / 5, length * 2):  # another length: the same shares of the run
        for step in range(0, round(epochs * per_epoch), max(1, per_epoch // 3)):
            wanted = factor(step * length / (epochs * per_epoch), schedule)
            assert said(step, epochs) == pytest.approx(wanted, rel=1e-6), step


@pytest.mark.parametrize("epoch", [0.0, 30.0])
@pytest.mark.parametrize("kd", [0.0, 0.7])
def test_losses_are_those_of_the_paper(epoch: float, kd: float) -> None:
    torch.manual_seed(2)
    z = {role: torch.randn(4, CLASSES, dtype=torch.float64) * 2 for role in ("teacher", "student")}
    e, t = torch.randn(4, 6, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    target = torch.tensor([0, 4, 2, 2])
    outputs = {
        "teacher": Output(z["teacher"], [t], lambda x: x),
        "student": Expanded(z["student"], [], lambda x: x, e),
    }
    method = NORM(NORMOptions(ce=0.25, kd=kd, feature=3.0, tau=2.0, n=2)).double()
    losses = method.losses(outputs, {"target": target}, Progress(0, epoch, 2400, 240.0))

    def softmax(row: Tensor, tau: float) -> list[float]:
        powers = [math.exp(x / tau) for x in row.tolist()]
        return [p / sum(powers) for p in powers]

    rows = [(softmax(z["student"][i], 2.0), softmax(z["teacher"][i], 2.0)) for i in range(4)]
    kl = 4 * sum(b * math.log(b / a) for p, q in rows for a, b in zip(p, q, strict=True)) / 4
    ce = sum(-math.log(softmax(z["student"][i], 1.0)[y]) for i, y in enumerate(target.tolist())) / 4
    mse = sum((e[:, 3 * k : 3 * k + 3] - t).square().mean().item() for k in range(2))
    wanted = {"ce": 0.25 * ce, "norm": (0.1 if epoch == 0 else 1.0) * 3.0 * mse} | ({"kd": kd * kl} if kd else {})
    assert losses.keys() == {"student"} and losses["student"].keys() == wanted.keys()
    for term, value in wanted.items():
        assert losses["student"][term].item() == pytest.approx(value, rel=1e-7), term


def test_a_loss_of_weight_zero_is_left_out() -> None:
    losses, _ = distiller_of(NORMOptions(n=2, feature=0.0))(batch_of(), START)
    assert losses["student"].keys() == {"ce"}


# --- who learns from what ---------------------------------------------------------------------------------------------

WHOLE = {"networks.student", "method.transform.expand", "method.transform.contract", "method.classifier"}


@pytest.mark.parametrize("adm", [None, CONSENSUS, ADMConfig(0.3, 0.0, 0.5, consensus="kd")])
def test_student_transform_and_classifier_learn_and_the_teacher_does_not(adm: ADMConfig | None) -> None:
    distiller = distiller_of(NORMOptions(n=2, kd=0.5), adm, teacher="cifar_wrn_10_2")  # of other channels: with phi
    losses, _ = distiller(batch_of(), START)
    assert losses.keys() == {"student"}
    terms = losses["student"]
    more = {"consensus", "phi"} | ({"feature"} if adm is not None and adm.gamma else set())
    assert terms.keys() == {"ce", "kd", "norm"} | (more if adm is not None else set())
    for term in {"ce", "kd", "consensus"} & terms.keys():
        assert reached(distiller, terms[term]) == WHOLE, term
    assert reached(distiller, terms["norm"]) == {"networks.student", "method.transform.expand"}
    if adm is not None:
        assert reached(distiller, terms["phi"]) == {"adm"}
    sum(terms.values()).backward()
    frozen = {"networks.student.fc.weight", "networks.student.fc.bias"}
    for name, p in distiller.named_parameters():
        assert p.requires_grad != (name.startswith("networks.teacher") or name in frozen), name
        assert (p.grad is not None) == p.requires_grad, name  # several processes wait for every gradient


@pytest.mark.parametrize("adm", [None, CONSENSUS])
def test_a_step_moves_all_but_the_teacher(adm: ADMConfig | None) -> None:
    distiller = distiller_of(adm=adm)
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    train(distiller)
    moved = {name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("networks.teacher")}
    assert not distiller.networks["teacher"].training and distiller.networks["student"].training
    assert list(distiller.trained()) == ["student"] and distiller.method.transform.training


def test_one_optimiser_moves_everything_once_at_the_students_rate() -> None:
    distiller = distiller_of(adm=CONSENSUS, teacher="cifar_wrn_10_2")
    distiller.configs["teacher"] = NetworkConfig("a", lr=7.0)
    distiller.configs["student"] = NetworkConfig("b", lr=0.01)
    groups = distiller.parameter_groups()
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.01, 0.1)}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in distiller.parameters() if p.requires_grad}


def test_each_network_runs_once_a_step() -> None:
    distiller = distiller_of(adm=CONSENSUS)
    calls: dict[str, int] = {}
    parts = {**distiller.networks, "transform": distiller.method.transform}
    for name, module in parts.items():
        first: Any = next(m for m in module.modules() if isinstance(m, nn.Conv2d))  # type: ignore[union-attr]
        first.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    distiller(batch_of(), START)
    assert calls == {"teacher": 1, "student": 1, "transform": 1}


class Reads(TorchDispatchMode):
    """Counts values read from the device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device() -> None:
    distiller = distiller_of(NORMOptions(n=2, kd=0.5), CONSENSUS)
    with Reads() as counted:
        losses, _ = distiller(batch_of(), START)
        sum(losses["student"].values()).backward()
    assert counted.reads == 0


def test_mixed_precision_keeps_losses_in_float32() -> None:
    distiller = distiller_of(NORMOptions(n=2, kd=0.5), CONSENSUS)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = distiller(batch_of(), START)
    for term, value in losses["student"].items():
        assert value.dtype == torch.float32 and value.isfinite(), term
    sum(losses["student"].values()).backward()


def test_torch_compile_does_not_compile_anew_as_epochs_go_by() -> None:
    from torch._dynamo.utils import counters

    plain, distiller = (distiller_of(adm=CONSENSUS) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    distiller.compile(backend="eager")
    for step in (0, 1, 105, 251, 2150):
        progress = Progress(step, step / 10, 2400, 240.0)
        for term, value in distiller(batch_of(), progress)[0]["student"].items():
            torch.testing.assert_close(value, plain(batch_of(), progress)[0]["student"][term], msg=term)
    # The first one takes the epoch for a constant; the second serves whatever epoch comes.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


# --- outputs ----------------------------------------------------------------------------------------------------------

NAMES = ["cifar_resnet8", "cifar_wrn_10_1", "cifar_vgg8", "cifar_mobilenetv2_050", "cifar_shufflenetv1"]


@pytest.mark.parametrize("name", NAMES)
def test_maps_and_logits(name: str) -> None:
    distiller = distiller_of(NORMOptions(n=1, scale=2.0), student=name)
    train(distiller)
    plain = {r: create_network(n, CLASSES).eval() for r, n in (("teacher", "cifar_resnet14"), ("student", name))}
    for role, network in plain.items():
        network.load_state_dict(distiller.networks[role].state_dict())
    x = images(4)
    outputs, views = distiller.outputs(x), distiller.views(x)
    assert list(outputs) == distiller.output_roles == ["teacher", "student"]
    method: Any = distiller.method.eval()
    with torch.no_grad():
        t, s = (F.relu(plain[role].forward_features(views[role])) for role in ("teacher", "student"))  # type: ignore[operator]
        torch.testing.assert_close(outputs["teacher"].maps[-1], t)
        e, moved = method.transform(s)
        torch.testing.assert_close(outputs["student"].maps[-1], moved, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs["student"].e, e, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]
        assert moved.min() < 0
        raw = method.classifier(moved.mean((2, 3)))
        torch.testing.assert_close(outputs["student"].logits, standardise(raw, 2.0), rtol=1e-3, atol=1e-3)
        for role, output in outputs.items():
            torch.testing.assert_close(output.head(output.maps[-1]), output.logits, msg=role)
            torch.testing.assert_close(
                output.logits, standardise(plain[role](views[role]), 2.0), rtol=1e-3, atol=1e-3, msg=role
            )
            weighted = output.head(output.maps[-1] * torch.rand(4, 1, *output.maps[-1].shape[2:]))
            torch.testing.assert_close(weighted.var(1, unbiased=False).sqrt(), torch.full((4,), 2.0), rtol=1e-3, atol=0)


def test_evaluation_may_look_at_one_network_alone() -> None:
    distiller = distiller_of()
    both = distiller.outputs(images(4))
    for role, other in (("teacher", "student"), ("student", "teacher")):
        alone = distiller.outputs(images(4), without=[other])
        assert list(alone) == [role] and torch.equal(alone[role].logits, both[role].logits)


def test_consensus_compares_the_transformed_map_and_standardises() -> None:
    distiller = distiller_of(adm=CONSENSUS)  # equal channels: no phi
    assert distiller.pairs == [("student", "teacher")]
    assert distiller.adm is not None and not list(distiller.adm.parameters())
    outputs = distiller.method(distiller.networks, distiller.views(images(6)), distiller.phases[0])
    terms = distiller.adm.losses(outputs, batch_of(), START, distiller.phases[0])
    assert terms.keys() == {"student"} and terms["student"].keys() == {"consensus"}
    t, f = outputs["teacher"].maps[-1].double(), outputs["student"].maps[-1].detach().double()
    assert t.min() == 0 > f.min()
    classifier: Any = distiller.method.classifier
    total = 0.0
    for i in range(6):
        rows = [[cosine(f[i, :, a, b], t[i, :, a, b]) for b in range(f.shape[3])] for a in range(f.shape[2])]
        s = torch.tensor(rows, dtype=torch.float64)
        attention = (1 + s) / (1 + s.mean() + 1e-5)
        z = classifier.weight.double() @ (attention * f[i]).mean((1, 2)) + classifier.bias.double()
        z = 2.5 * (z - z.mean()) / (z.var(unbiased=False) + 1e-7).sqrt()
        total -= z.log_softmax(0)[i % CLASSES].item() / 6
    assert terms["student"]["consensus"].item() == pytest.approx(0.3 * total, rel=1e-5)


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


# --- the folded student -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_of_a_trained_student_are_a_plain_network(name: str) -> None:
    distiller = distiller_of(student=name)
    train(distiller, 4)
    before = copy.deepcopy(distiller.state_dict())
    plain: Any = create_network(name, CLASSES)
    plain.load_state_dict(distiller.networks["student"].state_dict())
    exported: Any = distiller.export("student")
    assert type(exported) is type(plain)
    distiller.double().eval()
    method: Any = distiller.method
    method._fold(distiller.networks["student"].fc)
    view = distiller.views(images(4))["student"].double()
    with torch.no_grad():
        x = F.relu(plain.double().eval().forward_features(view))
        wanted = method.classifier(method.transform(x)[1].mean((2, 3)))
        scale = wanted.abs().max()
        assert (exported(view) - wanted).abs().max() < 1e-9 * scale
        assert (plain(view) - wanted).abs().max() < 1e-5 * scale  # its classifier was rounded to float32
    distiller.float()
    assert_same(before, distiller.state_dict())  # looking changes nothing that is trained


def test_a_copy_of_the_distiller_folds_what_is_its_own() -> None:
    distiller = distiller_of()
    twin = copy.deepcopy(distiller)
    train(twin)
    assert not torch.equal(*(d.networks["student"].state_dict()["fc.weight"] for d in (distiller, twin)))
    torch.testing.assert_close(*(d.export("student").fc.weight for d in (copy.deepcopy(twin), twin)))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_timms_networks_can_be_students(name: str) -> None:
    more = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24} if "swin" in name else {}
    student, plain = (as_network(create_network(name, CLASSES, **more)) for _ in range(2))
    networks = {"teacher": create_network("resnet10t", CLASSES).eval(), "student": student}
    method, x = NORM(NORMOptions(n=2)), torch.randn(3, 3, 64, 64)
    assert method.prepare(networks, dict.fromkeys(networks, x)) is networks
    views = dict.fromkeys(networks, x)
    outputs = method(networks, views, ("student",))
    sum(method.losses(outputs, {"target": torch.arange(3)}, START)["student"].values()).backward()
    assert all(p.grad is None for p in networks["teacher"].parameters())
    plain.load_state_dict(student.state_dict())
    method.eval(), student.eval(), plain.eval()
    with torch.no_grad():
        wanted = method.classifier(method(networks, views)["student"].maps[-1].mean((2, 3)))
        assert (plain(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


# --- runs -------------------------------------------------------------------------------------------------------------


class Data:
    """30 images in batches of 12, 12 and 6, shuffled anew each epoch; batches of the rest of the epoch."""

    def __init__(self) -> None:
        self.all = batch_of(30)
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(30, generator=torch.Generator().manual_seed(self.epoch))
        for k in range(self.position, 3):
            self.position = k + 1
            yield {name: value[order[12 * k : 12 * k + 12]] for name, value in self.all.items()}
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        done = self.position == 3
        return {"epoch": self.epoch + done, "position": 0 if done else self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def run(path: Path, distiller: ClassificationDistiller) -> str:
    config = FitConfig(epochs=4, log_every=2, device="cpu", trackers=())
    folder = RunFolder(path, {"a": 1})
    accelerator = make_accelerator(config, folder)
    seed_everything(0, "training")
    return fit(
        distiller, Data(), distiller.optimizer.make, make_schedule(ScheduleConfig("constant"), 4.0), config, folder,
        accelerator, lambda: evaluate(distiller, [batch_of(20)]).values, "student/top1", progress_bar=False,
    )["status"]  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("adm", [None, CONSENSUS])
def test_a_cut_run_goes_on_exactly_and_leaves_a_plain_student(
    adm: ADMConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path / "whole", distiller_of(adm=adm)) == "finished"
    for stop in (3, 8):  # the end of an epoch, and the middle of one
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert run(tmp_path / "cut", distiller_of(adm=adm)) == "interrupted"
    resumed = distiller_of(adm=adm)
    assert run(tmp_path / "cut", resumed) == "finished"
    folder = tmp_path / "cut/checkpoints/last"
    weights, state = read_checkpoint(folder)
    assert_same((weights, state), read_checkpoint(tmp_path / "whole/checkpoints/last"))
    assert weights.keys() == {"student"} and "method.classifier.weight" in state["extra"]
    assert not torch.equal(weights["student"]["fc.weight"], state["extra"]["method.classifier.weight"])

    plain = create_network("cifar_resnet8", CLASSES).eval()
    load_weights(plain, folder / "student.safetensors")
    restored = distiller_of(adm=adm)
    load_checkpoint(restored, folder)
    trained, read = (d.outputs(images(8, seed=2))["student"].logits for d in (resumed, restored))
    assert torch.equal(trained, read)
    with torch.no_grad():
        alone = plain(restored.views(images(8, seed=2))["student"])
    torch.testing.assert_close(standardise(alone, 2.5), trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(alone.argmax(1), trained.argmax(1))


# --- what it refuses --------------------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("values", [{"tau": 0.0}, {"scale": 0.0}])
def test_options_must_be_positive(values: Any) -> None:
    assert f"norm.{next(iter(values))} must be positive" in refusal(lambda: NORMOptions(**values))


@pytest.mark.parametrize("values", [{"ce": -1.0}, {"kd": -1.0}, {"feature": -1.0}])
def test_weights_must_not_be_negative(values: Any) -> None:
    assert f"norm.{next(iter(values))} must not be negative" in refusal(lambda: NORMOptions(**values))


def test_a_classifier_that_nothing_trains_is_refused() -> None:
    assert "norm.ce and norm.kd are both 0" in refusal(lambda: NORMOptions(ce=0.0))
    NORMOptions(ce=0.0, kd=1.0)


def test_wrong_networks_are_refused() -> None:
    for roles in (("student",), ("teacher", "student", "student_2")):
        assert "teacher and student" in refusal(lambda roles=roles: NORM().check(TrainConfig(), roles, ["teacher"]))
    two = create_network("cifar_resnet8", 2)
    assert "3 classes" in refusal(lambda: distiller_of(student=two))
    bare: Any = create_network("cifar_resnet8", CLASSES)
    bare.fc = nn.Linear(64, CLASSES, bias=False)
    assert "ResNet's has none" in refusal(lambda: distiller_of(student=bare))
    deep: Any = create_network("cifar_resnet8", CLASSES)
    deep.fc = nn.Sequential(nn.Linear(64, CLASSES))
    assert "one linear layer" in refusal(lambda: distiller_of(student=deep))
    flat = Split(lambda m, x: x.mean((2, 3)), lambda m, x: x, nn.Linear(3, CLASSES))
    assert "a map [B, C, H, W], and its is (2, 3)" in refusal(lambda: distiller_of(teacher=flat))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto"])  # a layer, a LayerNorm before the linear
def test_a_student_whose_head_is_more_is_refused(name: str) -> None:
    networks = {"teacher": create_network("cifar_resnet8", CLASSES), "student": create_network(name, CLASSES)}
    said = refusal(lambda: NORM().prepare(networks, dict.fromkeys(networks, torch.randn(2, 3, 64, 64))))
    assert "a student whose head is average pooling and one linear layer" in said


def test_a_student_with_its_own_relu_in_the_head_is_refused() -> None:
    network: Any = create_network("cifar_resnet8", CLASSES)
    # signed maps, and a ReLU behind them
    split = Split(lambda m, x: m.forward_features(x), lambda m, f: m.forward_head(f), network)
    split.get_classifier = network.get_classifier
    assert "nothing before or between" in refusal(lambda: distiller_of(student=split))
