"""DisWOT's losses against loops, what they do not see, unequal networks, and who learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig
from classification.methods.base import Output
from classification.networks import create_network
from core.adm import ADMConfig
from core.distillation import kd_loss
from core.errors import InputError
from core.training.distiller import Progress
from offline_kd.methods.diswot import DisWOT, DisWOTOptions, relation_loss, semantic_loss, similarities

CLASSES, SIZE = 5, 16
START = Progress(0, 0.0, 10, 1.0)


def distiller_of(
    options: DisWOTOptions | None = None,
    adm: ADMConfig | None = None,
    teacher: str = "cifar_wrn_10_2",  # 128 channels
    student: str = "cifar_resnet8",  # 64
) -> ClassificationDistiller:
    networks = {"teacher": create_network(teacher, CLASSES), "student": create_network(student, CLASSES)}
    return ClassificationDistiller(
        networks,
        {role: NetworkConfig(role, lr=0.03 if role == "student" else 0.4) for role in networks},
        dict.fromkeys(networks, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))),
        DisWOT(options, with_adm=adm is not None),
        adm,
        OptimizerConfig(lr=0.05, weight_decay=0.1),
        batch_of(2)["image"],
        num_classes=CLASSES,
    ).train()


def batch_of(count: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return {"image": images, "target": torch.arange(count) % CLASSES, "index": torch.arange(count)}


def reached(distiller: ClassificationDistiller, loss: Tensor) -> set[str]:
    """teacher, student, adapter, phi: whose parameters a loss has a gradient to."""
    owners = {"method.adapter": "adapter", "adm.": "phi", "networks.teacher": "teacher", "networks.student": "student"}
    found = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(found.values()), retain_graph=True, allow_unused=True)
    names = [n for n, g in zip(found, gradients, strict=True) if g is not None and g.abs().max() > 0]
    return {next(owner for start, owner in owners.items() if n.startswith(start)) for n in names}


def maps(*shape: int, seed: int = 0) -> Tensor:
    """A map behind a ReLU, in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).clamp_min(0)


# --- formulas ---------------------------------------------------------------------------------------------------------


def rows_by_loops(vectors: list[list[float]]) -> list[list[float]]:
    """rn(A A^T), entry by entry."""
    result = []
    for a in vectors:
        row = [sum(x * y for x, y in zip(a, b, strict=True)) for b in vectors]
        length = math.sqrt(sum(x * x for x in row))
        result.append([x / length for x in row])
    return result


def squared_distance(a: list[list[float]], b: list[list[float]]) -> float:
    return sum((x - y) ** 2 for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))


def test_similarities_are_gram_matrices_with_rows_of_length_1() -> None:
    a = torch.randn(2, 4, 7, dtype=torch.float64)
    wanted = torch.tensor([rows_by_loops(block) for block in a.tolist()], dtype=torch.float64)
    torch.testing.assert_close(similarities(a), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(similarities, a.requires_grad_())


@pytest.mark.parametrize("student", [(5, 3, 4, 2), (5, 6, 2, 2), (5, 2, 1, 1)])
def test_relation_loss_is_the_papers(student: tuple[int, ...]) -> None:
    s, t = maps(*student) + 0.01, maps(5, 3, 4, 2, seed=1)
    wanted = squared_distance(*(rows_by_loops(m.flatten(1).tolist()) for m in (s, t))) / 5**2
    assert wanted > 1e-3
    assert relation_loss(s, t).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("size", [(4, 2), (2, 2), (1, 3)])
def test_semantic_loss_is_the_papers(size: tuple[int, int]) -> None:
    s, t = torch.randn(3, 4, *size, dtype=torch.float64), maps(3, 4, 4, 2, seed=2) + 0.01
    wanted = 0.0
    for image_s, image_t in zip(s.flatten(2).tolist(), t.flatten(2).tolist(), strict=True):
        wanted += squared_distance(rows_by_loops(image_t), rows_by_loops(image_s)) / (3 * 4)
    assert wanted > 1e-2
    assert semantic_loss(s, t).item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("loss", [relation_loss, semantic_loss])
def test_gradients_are_right_and_go_to_the_student_alone(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    s, t = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True), maps(3, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s)
    grad_s, grad_t = torch.autograd.grad(loss(s, t), (s, t), allow_unused=True)
    assert grad_s.abs().max() > 1e-4 and grad_t is None


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def test_relation_loss_sees_how_images_resemble_each_other_and_nothing_else() -> None:
    t = maps(6, 3, 4, 4)
    turned = (t.flatten(1) @ rotation(48)).view(6, 16, 3, 1)  # any rotation of the features, any shape, any scale
    for same in (t, 7.0 * t, turned, t.flip(1), t.flip(2)):
        assert relation_loss(same, t).item() < 1e-20
    assert relation_loss(t.flip(0), t).item() > 1e-3


def test_semantic_loss_sees_how_channels_resemble_each_other_and_nothing_else() -> None:
    t = maps(3, 5, 4, 4)
    turned = (t.flatten(2) @ rotation(16)).view(3, 5, 2, 8)  # the same rotation of all channels' locations
    each = torch.tensor([2.0, 0.1, 30.0], dtype=torch.float64).view(3, 1, 1, 1)
    for same in (t, each * t, turned, t.flip(2), t.transpose(2, 3)):
        assert semantic_loss(same, t).item() < 1e-20
    assert semantic_loss(t.flip(1), t).item() > 1e-3


def test_dead_channels_and_images_are_finite() -> None:
    """A Gram row of zeros stays zeros: it differs from the teacher's by that one's length, 1, and from none by 0."""
    s, t = maps(3, 4, 3, 3), maps(3, 4, 3, 3, seed=3)
    s[:, 1] = 0
    t[2, 1] = 0
    x = torch.where(s > 0, s, -1.0).requires_grad_()  # what a dead channel is before its ReLU
    loss = semantic_loss(F.relu(x), t)
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[:, 1].abs().max() == 0 and x.grad.abs().max() > 0
    rows = (similarities(s.flatten(2)) - similarities(t.flatten(2))).square().sum(dim=2)
    assert rows[0, 1].item() == pytest.approx(1.0) and rows[2, 1].item() == 0
    blank = torch.zeros(4, 2, 3, 3, requires_grad=True)
    relation_loss(F.relu(blank), t.float().new_ones(4, 2, 3, 3)).backward()
    assert blank.grad is not None and blank.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [relation_loss, semantic_loss])
def test_gram_matrices_are_float32_under_autocast(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    s, t = ((300.0 * maps(4, 32, 8, 8, seed=k)).to(dtype) for k in range(2))  # products up to 1e7: over float16's
    wanted = loss(s.float(), t.float())
    with torch.autocast("cpu", dtype):
        given = loss(s.requires_grad_(), t)
    assert given.dtype == torch.float32 and torch.equal(given.detach(), wanted)
    given.backward()
    assert s.grad is not None and s.grad.isfinite().all()


def test_maps_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 images"):
        relation_loss(maps(3, 2, 2, 2), maps(2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\) images and channels"):
        semantic_loss(maps(3, 2, 2, 2), maps(3, 4, 2, 2))


@pytest.mark.parametrize("count", [2, 8])
def test_losses_are_those_of_the_spec(count: int) -> None:
    torch.manual_seed(4)
    options = DisWOTOptions(ce=0.3, kd=0.6, tau=2.0, relation=100.0, semantic=4.0)
    method = DisWOT(options)
    method.adapter = nn.Identity()
    z = {role: torch.randn(count, CLASSES, dtype=torch.float64) for role in ("student", "teacher")}
    f = {role: torch.randn(count, 3, 4, 4, dtype=torch.float64) for role in z}  # before the ReLU
    outputs = {role: Output(z[role], [torch.zeros(count, 1, 8, 8), f[role]], lambda x: x) for role in z}
    target = torch.arange(count) % CLASSES
    losses = method.losses(outputs, {"target": target}, START)
    relu = {role: f[role].clamp_min(0) for role in f}
    wanted = {
        "ce": 0.3 * F.cross_entropy(z["student"], target),
        "kd": 0.6 * kd_loss(z["student"], z["teacher"], 2.0),
        "relation": 100.0 * count / 64 * relation_loss(relu["student"], relu["teacher"]),
        "semantic": 4.0 * semantic_loss(relu["student"], relu["teacher"]),
    }
    assert losses.keys() == {"student"} and losses["student"].keys() == wanted.keys()
    for term, value in wanted.items():
        assert losses["student"][term].item() == pytest.approx(value.item(), rel=1e-12), term
    assert DisWOTOptions() == DisWOTOptions(ce=0.1, kd=0.9, tau=4.0, relation=3000.0, semantic=2.5)


# --- as a method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adm", [None, ADMConfig(alpha=1.0, beta=0.0, gamma=0.0)])
def test_each_loss_reaches_whom_it_should(adm: ADMConfig | None) -> None:
    distiller = distiller_of(adm=adm)
    losses, _ = distiller(batch_of(), START)
    assert losses.keys() == {"student"}
    terms = losses["student"]
    assert terms.keys() == {"ce", "kd", "relation", "semantic"} | ({"consensus", "phi"} if adm is not None else set())
    assert reached(distiller, terms["semantic"]) == {"student", "adapter"}
    for term in {"ce", "kd", "relation", "consensus"} & terms.keys():
        assert reached(distiller, terms[term]) == {"student"}, term
    assert all(not p.requires_grad for p in distiller.networks["teacher"].parameters())


def test_the_adapter_learns_with_the_student_and_is_in_no_network() -> None:
    distiller = distiller_of()
    adapter = distiller.method.adapter
    assert isinstance(adapter, nn.Sequential) and adapter.conv.weight.shape == (128, 64, 1, 1)
    assert adapter.conv.bias is None and isinstance(adapter.bn, nn.BatchNorm2d) and adapter.bn.training
    groups = distiller.parameter_groups()
    assert [group["lr"] for group in groups] == [0.03, 0.03]  # the student's rate, not the teacher's or the recipe's
    assert groups[1]["weight_decay"] == 0.1
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in adapter.parameters()}
    plain = create_network("cifar_resnet8", CLASSES).state_dict().keys()
    assert distiller.networks["student"].state_dict().keys() == plain == distiller.export("student").state_dict().keys()
    teacher = {name: value.clone() for name, value in distiller.networks["teacher"].state_dict().items()}
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    optim = distiller.optimizer.make(groups)
    losses, _ = distiller(batch_of(), START)
    distiller.backward(losses, sum(losses["student"].values()), SimpleNamespace(scaler=None))  # type: ignore[arg-type]
    optim.step()
    assert all(not torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
    after = distiller.networks["teacher"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in teacher.items())  # BatchNorm's statistics too


def test_looking_at_the_networks_moves_nothing() -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    networks = {"teacher": create_network("cifar_wrn_10_2", 5), "student": create_network("cifar_resnet8", 5).train()}
    before = {name: value.clone() for name, value in networks["student"].state_dict().items()}
    DisWOT().prepare(networks, dict.fromkeys(networks, images))
    assert networks["student"].training and all(p.requires_grad for p in networks["student"].parameters())
    assert all(torch.equal(value, before[name]) for name, value in networks["student"].state_dict().items())


def test_equal_channels_or_no_semantic_loss_need_no_adapter() -> None:
    same = distiller_of(teacher="cifar_resnet14")
    without = distiller_of(DisWOTOptions(semantic=0.0))
    for distiller, terms in (
        (same, {"ce", "kd", "relation", "semantic"}),
        (without, {"ce", "kd", "relation"}),
    ):
        assert not list(distiller.method.parameters()) and len(distiller.parameter_groups()) == 1
        losses, _ = distiller(batch_of(), START)
        assert losses["student"].keys() == terms


@pytest.mark.parametrize("student", ["cifar_vgg8", "cifar_shufflenetv2"])
def test_maps_of_other_sizes_are_compared_as_they_are(student: str) -> None:
    distiller = distiller_of(student=student)
    outputs = distiller.outputs(batch_of()["image"])
    assert outputs["student"].maps[-1].shape[-2:] != outputs["teacher"].maps[-1].shape[-2:]
    losses, _ = distiller(batch_of(), START)
    for term in ("relation", "semantic"):
        assert losses["student"][term].item() > 0 and "student" in reached(distiller, losses["student"][term])


def test_training_brings_the_similarities_closer() -> None:
    distiller = distiller_of(DisWOTOptions(ce=0.0, kd=0.0), student="cifar_resnet8")
    optim = distiller.optimizer.make(distiller.parameter_groups())
    values = []
    for _ in range(15):
        losses, _ = distiller(batch_of(), START)
        values.append({term: value.item() for term, value in losses["student"].items()})
        distiller.backward(losses, sum(losses["student"].values()), SimpleNamespace(scaler=None))  # type: ignore[arg-type]
        optim.step()
        optim.zero_grad()
    for term in ("relation", "semantic"):
        assert values[-1][term] < 0.7 * values[0][term], term


@pytest.mark.parametrize("option", ["ce", "kd", "relation", "semantic", "tau"])
def test_wrong_options_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"diswot.{option} must") as error:
        DisWOTOptions(**{option: -1.0})
    assert "\n" not in str(error.value)
    if option == "tau":
        with pytest.raises(InputError, match=r"diswot\.tau must be positive"):
            DisWOTOptions(tau=0.0)
