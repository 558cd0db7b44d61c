"""The segmentor of two networks: every term against loops, who learns from what, pausing, freezing, two processes.

The test of two processes starts this very file under torchrun (`work` below).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import in_two_processes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("mmseg", reason="needs mmsegmentation: pip install -e '.[segmentation]'")

from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, SegDataPreProcessor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from core.adm import attend, consensus_attention, divergence_attention, spatial_similarity
from core.distillation import distances
from core.errors import InputError
from segmentation import distiller as distiller_module
from segmentation import losses as losses_module
from segmentation.distiller import ROLES, DistillationSegmentor, ViewsDataPreProcessor, auxiliary_heads
from segmentation.losses import DenseADM, Output, adm_config, parse_method, pixels_of, teacher_learns

CLASSES, SIZE = 4, (16, 24)
ALL = ["vanilla", "dml", "kdcl", "switokd", "kd"]
SGD = {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


def head(kind: str, channels: int, width: int, index: int, **more: Any) -> dict[str, Any]:
    return {
        "type": kind, "in_channels": width, "in_index": index, "channels": channels, "num_classes": CLASSES,
        "norm_cfg": {"type": "BN"}, "loss_decode": {"type": "CrossEntropyLoss"}, "dropout_ratio": 0.0, **more,
    }  # fmt: skip


def network(kind: str = "ASPPHead", channels: int = 8, stride: int = 8, **more: Any) -> dict[str, Any]:
    """An ``EncoderDecoder`` with 4 base channels and an auxiliary head of weight 0.4; its map is 1/``stride``."""
    size = {"dilations": (1, 2)} if kind == "ASPPHead" else {"pool_scales": (1, 2)}
    auxiliary = {"num_convs": 1, "concat_input": False, "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4}}
    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "ResNetV1c", "depth": 18, "base_channels": 4, "stem_channels": 4, "norm_cfg": {"type": "BN"},
            "strides": (1, 2, 1, 1) if stride == 8 else (1, 2, 2, 1), "dilations": (1, 1, 2, 4),
        },
        "decode_head": head(kind, channels, 32, 3, **{**size, **more}),
        "auxiliary_head": head("FCNHead", 6, 16, 2, **auxiliary),
        "test_cfg": {"mode": "whole"},
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _mmseg() -> None:
    prepare()


def prepare() -> None:
    init_default_scope("mmseg")
    MMLogger.get_current_instance().setLevel("WARNING")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained teacher's file."""
    prepare()
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"state_dict": varied(MODELS.build(ConfigDict(network(channels=12)))).state_dict(), "meta": {}}, file)
    return str(file)


def varied(module: nn.Module) -> nn.Module:
    """Classifiers as after training: mmseg starts them at std 0.01 and bias 0, where many mistakes do not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "conv_seg" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return module


def built(method: str, **options: Any) -> DistillationSegmentor:
    """As a run starts: channels 12 (teacher) and 8."""
    config = {"teacher": network(channels=12), "student": network(channels=8), "method": method, **options}
    model = MODELS.build(ConfigDict(type="DistillationSegmentor", **config))
    model.init_weights()
    return model


def segmentor(method: str, **options: Any) -> DistillationSegmentor:
    """In float64."""
    return varied(built(method, **options)).double()  # type: ignore[return-value]


def of_method(method: str, weights: str, **options: Any) -> DistillationSegmentor:
    kd = {"teacher_weights": weights} if parse_method(method)[0] == "kd" else {}
    return segmentor(method, **kd, **options)


def samples(labels: Tensor) -> list[SegDataSample]:
    """Labels ``[B, H, W]`` as mmseg packs them."""
    meta = {"ori_shape": tuple(labels.shape[-2:]), "img_shape": tuple(labels.shape[-2:])}
    return [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label[None])) for label in labels]


def batch(images: int = 3, views: int = 1, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Normalised images and labels: a band is ignored in each image, single pixels too, and all of the second image."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(images, 3 * views, *size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (images, *size), generator=generator)
    labels[:, :3] = 255
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    labels[1] = 255
    return inputs, labels


def step(model: Any, wrapper: Any, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What mmengine's ``train_step`` does behind the data preprocessor."""
    with wrapper.optim_context(model):
        losses = model(inputs, samples(labels), mode="loss")
    total, named = getattr(model, "module", model).parse_losses(losses)
    wrapper.update_params(total)
    return named


def optimizer_of(model: nn.Module, **options: Any) -> Any:
    return build_optim_wrapper(
        model, {"optimizer": SGD, "constructor": "DistillationOptimWrapperConstructor", **options}
    )


# The definitions, pixel by pixel.


def loop_weights(size: int, length: int) -> Tensor:
    """``[length, size]``: what each of ``size`` points gives to each of ``length``, linearly between pixel centres."""
    weights = torch.zeros(length, size, dtype=torch.float64)
    for i in range(length):
        x = max((i + 0.5) * size / length - 0.5, 0.0)
        weights[i, int(x)] += 1 - (x - int(x))
        weights[i, min(int(x) + 1, size - 1)] += x - int(x)
    return weights


def loop_resize(z: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[..., h, w] -> [..., H, W]``, bilinear."""
    return loop_weights(z.shape[-2], size[0]) @ z @ loop_weights(z.shape[-1], size[1]).T


def loop_mean(labels: Tensor, normalise: str, value: Callable[[int, int, int, int], float]) -> float:
    """The sum of ``value(image, row, column, label)`` over labelled pixels by the number of all (or labelled) ones."""
    total, count = 0.0, 0
    for b, image in enumerate(labels.tolist()):
        for i, row in enumerate(image):
            for j, y in enumerate(row):
                if y != 255:
                    total, count = total + value(b, i, j, y), count + 1
    return total / (labels.numel() if normalise == "all" else max(count, 1))


def loop_softmax(z: Tensor, tau: float = 1.0) -> list[Any]:
    """``[B, K, H, W]`` -> p[b][i][j][k]."""
    exps = [[[[math.exp(v / tau) for v in c] for c in r] for r in x] for x in z.permute(0, 2, 3, 1).tolist()]
    return [[[[e / sum(c) for e in c] for c in r] for r in x] for x in exps]


def loop_ce(z: Tensor, labels: Tensor, normalise: str, factor: Sequence[float] = (1.0,) * CLASSES) -> float:
    p = loop_softmax(z)
    return loop_mean(labels, normalise, lambda b, i, j, y: -factor[y] * math.log(p[b][i][j][y]))


def loop_kd(z: Tensor, other: Tensor, labels: Tensor, normalise: str, tau: float) -> float:
    p, q = loop_softmax(z, tau), loop_softmax(other, tau)

    def divergence(b: int, i: int, j: int, y: int) -> float:
        return tau**2 * sum(m * math.log(m / n) for m, n in zip(q[b][i][j], p[b][i][j], strict=True))

    return loop_mean(labels, normalise, divergence)


def loop_distance(p: list[Any], q: list[Any], labels: Tensor) -> float:
    """The mean one-norm of p - q at the labelled pixels."""

    def norm(b: int, i: int, j: int, y: int) -> float:
        return sum(abs(m - n) for m, n in zip(p[b][i][j], q[b][i][j], strict=True))

    return loop_mean(labels, "valid", norm)


class Seen:
    """What enters each classifier of both networks during a forward."""

    def __init__(self, model: DistillationSegmentor) -> None:
        self.maps: dict[tuple[str, int], Tensor] = {}
        self.heads: dict[tuple[str, int], Any] = {}
        for role, net in model.networks.items():
            for index, each in enumerate([net.decode_head, *auxiliary_heads(net)]):
                self.heads[role, index] = each
                each.conv_seg.register_forward_hook(self.keep(role, index))

    def keep(self, role: str, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.maps[role, index] = inputs[0].detach()

        return hook

    def logits(self, role: str, index: int = 0, attention: Tensor | None = None) -> Tensor:
        """``[B, K, H, W]``: the head on its map, which is multiplied by ``[B, h, w]`` first."""
        f, conv = self.maps[role, index], self.heads[role, index].conv_seg
        f = f if attention is None else f * attention[:, None]
        z = torch.einsum("kc,bchw->bkhw", conv.weight.detach()[:, :, 0, 0], f) + conv.bias.detach()[:, None, None]
        return loop_resize(z, SIZE)


def loop_losses(model: DistillationSegmentor, seen: Seen, labels: Tensor) -> dict[str, float]:
    """Every term by its definition, from what entered the classifiers."""
    method, normalise, tau = model.method, model.normalise, model.tau
    z = {role: seen.logits(role) for role in ("teacher", "student")}
    wanted: dict[str, float] = {}
    for role in z:
        if role == "student" or method != "kd":
            wanted[f"{role}/loss_ce"] = loop_ce(z[role], labels, normalise)
            wanted[f"{role}/loss_aux"] = 0.4 * loop_ce(seen.logits(role, 1), labels, normalise)
    if method == "kdcl":
        target = torch.zeros_like(z["teacher"])
        for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).tolist():
            y = int(labels[b, i, j])
            if y != 255:
                for k in range(CLASSES):
                    target[b, k, i, j] = min(float(x[b, k, i, j] - x[b, y, i, j]) for x in z.values())
        others = {"teacher": target, "student": target}
    elif method == "vanilla":
        others = {}
    else:
        others = {"student": z["teacher"]} | ({} if method == "kd" else {"teacher": z["student"]})
    for role, other in others.items():
        wanted[f"{role}/loss_kd"] = model.weights[role] * loop_kd(z[role], other, labels, normalise, tau)
    if model.adm is not None:
        wanted |= loop_adm(model.adm, seen, labels, normalise)
    return wanted


def loop_adm(adm: DenseADM, seen: Seen, labels: Tensor, normalise: str) -> dict[str, float]:
    o, phi = adm.config, adm.adapter.conv.weight.detach()[:, :, 0, 0]  # type: ignore[union-attr]
    f_t, f_s = seen.maps["teacher", 0], seen.maps["student", 0]
    b, _, h, w = f_s.shape  # the student's map is the smaller one, or of the same size
    ratio = f_t.shape[-1] // w
    pooled = f_t.unflatten(3, (w, ratio)).unflatten(2, (h, ratio)).mean(dim=(3, 5))
    projected = torch.einsum("tc,bchw->bthw", phi, f_s)
    s = torch.zeros(b, h, w, dtype=torch.float64)
    for n, i, j in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(w)).tolist():
        u, v = projected[n, :, i, j], pooled[n, :, i, j]
        s[n, i, j] = u @ v / (u.norm() * v.norm())
    s_t = loop_resize(s, f_t.shape[-2:])
    a_co = (1 + s) / ((1 + s).mean(dim=(1, 2), keepdim=True) + 1e-5)
    a_co_t = (1 + s_t) / ((1 + s_t).mean(dim=(1, 2), keepdim=True) + 1e-5)
    a_di = (1 - s_t) / ((1 - s_t).mean(dim=(1, 2), keepdim=True) + 1e-5)
    wanted: dict[str, float] = {}
    co = seen.logits("student", 0, a_co)
    if o.alpha and o.consensus == "ce":
        wanted["student/loss_consensus"] = o.alpha * loop_ce(co, labels, normalise)
    elif o.alpha:
        other = seen.logits("teacher", 0, a_co_t)
        wanted["student/loss_consensus"] = o.alpha * loop_kd(co, other, labels, normalise, o.tau)
    if o.beta:
        wanted["teacher/loss_divergence"] = o.beta * loop_ce(seen.logits("teacher", 0, a_di), labels, normalise)
    difference = projected - pooled
    if o.gamma:
        wanted["student/loss_feature"] = o.gamma * float((difference**2).mean())
    if o.phi_loss == "own":
        energy = max(float((pooled**2).sum()), float((f_s**2).sum()) / 4)
        wanted["student/loss_phi"] = float((difference**2).sum()) / energy
    return wanted


CASES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "dml": {"tau": 2.0, "weight": {"teacher": 0.3, "student": 1.5}, "normalise": "valid"},
    "kdcl": {"tau": 2.0},
    "kd": {"weight": 0.7},
    "vanilla+adm": {"adm": {"alpha": 0.0}},
    "dml+adm": {},
    "dml+adm valid": {"normalise": "valid", "adm": {"consensus": "kd", "tau": 2.0, "gamma": 0.5}},
    "dml+adm sizes": {"student": network("PSPHead", 8, stride=16), "adm": {"consensus": "kd"}, "size": (32, 32)},
    "dml+adm letter": {"adm": {"phi_loss": "feature", "gamma": 2.0, "alpha": 1.0, "beta": 0.0}},
    "kdcl+adm": {},
    "switokd+adm": {"tau": 2.0},
    "kd+adm": {"adm": {"alpha": 0.4}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_term_is_its_definition(case: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(CASES[case])
    monkeypatch.setattr(sys.modules[__name__], "SIZE", options.pop("size", SIZE))
    model = of_method(case.split()[0], weights, **options)
    model.watch(torch.optim.SGD(model.parameters(), lr=0.1))
    seen = Seen(model)
    inputs, labels = batch(views=2 if model.method == "kdcl" else 1, size=SIZE)
    losses = model.loss(inputs, samples(labels))
    wanted = loop_losses(model, seen, labels)
    gate = 1.0 - float(losses.pop("teacher/paused", torch.zeros(())))
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = gate if name.startswith("teacher") else 1.0
        assert losses[name].item() == pytest.approx(scale * value, rel=2e-6, abs=1e-12), name
        assert value > 0


@pytest.mark.parametrize("normalise", ["all", "valid"])
@pytest.mark.parametrize("method", ["dml+adm", "kdcl+adm", "switokd+adm"])
def test_without_any_label_nothing_but_the_maps_is_learned(method: str, normalise: str) -> None:
    model = segmentor(method, normalise=normalise, adm={"consensus": "kd" if normalise == "valid" else "ce"})
    model.watch(torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, labels = batch()
    losses = model.loss(inputs, samples(torch.full_like(labels, 255)))
    assert all(bool(value.isfinite()) for value in losses.values())
    for name, value in losses.items():
        assert (value.item() > 0) == (name in ("student/loss_feature", "student/loss_phi")), name
    model.parse_losses(losses)[0].backward()
    assert all(not p.grad.any() for p in model.teacher.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_vanilla_is_each_network_alone() -> None:
    """mmseg's own losses of each network, class weights aside, are what it is trained by."""
    model = segmentor("vanilla")
    inputs, labels = batch()
    losses = model.loss(inputs, samples(labels))
    for role, net in model.networks.items():
        own = net.loss(inputs, samples(labels))
        torch.testing.assert_close(losses[f"{role}/loss_ce"], own["decode.loss_ce"])
        torch.testing.assert_close(losses[f"{role}/loss_aux"], own["aux.loss_ce"])


def test_class_weights_of_a_head_count() -> None:
    weighted = network(channels=8)
    weighted["decode_head"]["loss_decode"] = {"type": "CrossEntropyLoss", "class_weight": [1.0, 2.0, 0.5, 0.0]}
    inputs, labels = batch()
    values = []
    for student in (network(channels=8), weighted):
        model = segmentor("vanilla", student=student)
        seen = Seen(model)
        values.append(float(model.loss(inputs, samples(labels))["student/loss_ce"]))
    ce = loop_ce(seen.logits("student"), labels, "all", [1.0, 2.0, 0.5, 0.0])
    assert values[1] == pytest.approx(ce, rel=1e-6) and values[0] != pytest.approx(ce, rel=1e-3)


def reached(model: DistillationSegmentor, loss: Tensor) -> set[str]:
    """Which parts get a gradient that is not 0."""
    parts = {**model.networks, "phi": model.adm} if model.adm is not None else model.networks
    parameters = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
    found = set()
    for name, own in parameters.items():
        if own and loss.requires_grad:
            gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
            if any(g is not None and bool(g.any()) for g in gradients):
                found.add(name)
    return found


@pytest.mark.parametrize("consensus", ["ce", "kd"])
@pytest.mark.parametrize("method", ALL)
def test_each_term_trains_its_own_network_alone(
    method: str, consensus: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distiller_module, "teacher_learns", lambda *_: torch.ones(()))
    adm = {"consensus": consensus, "gamma": 0.1}
    model = of_method(f"{method}+adm", weights, adm=adm)
    model.watch(torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, labels = batch()
    for name, loss in model.loss(inputs, samples(labels)).items():
        if name != "teacher/paused":
            assert reached(model, loss) == ({"phi"} if name == "student/loss_phi" else {name.split("/")[0]}), name


def test_by_the_letter_the_feature_loss_trains_phi() -> None:
    model = segmentor("dml+adm", adm={"phi_loss": "feature"})
    losses = model.loss(*(lambda x, y: (x, samples(y)))(*batch()))
    assert reached(model, losses["student/loss_feature"]) == {"student", "phi"}
    model = segmentor("dml+adm", adm={"phi_loss": "feature", "gamma": 0.0})
    assert not any(p.requires_grad for p in model.adm.parameters())  # type: ignore[union-attr]


def test_a_teacher_that_imitates_its_students_map() -> None:
    model = segmentor("dml+adm", adm={"feature_targets": "both", "gamma": 0.1})
    losses = model.loss(*(lambda x, y: (x, samples(y)))(*batch()))
    assert reached(model, losses["teacher/loss_feature"]) == {"teacher"}
    assert losses["teacher/loss_feature"].item() == pytest.approx(losses["student/loss_feature"].item())
    with pytest.raises(InputError, match="feature_targets"):
        adm_config({"feature_targets": "both"}, "kd", used=True)


def test_phi_changes_nobody_elses_gradient() -> None:
    inputs, labels = batch()
    gradients = []
    for without in ("", "student/loss_phi"):
        model = segmentor("dml+adm")
        losses = model.loss(inputs, samples(labels))
        losses.pop(without, None)
        model.parse_losses(losses)[0].backward()
        gradients.append([p.grad for net in model.networks.values() for p in net.parameters()])
        assert (model.adm.adapter.conv.weight.grad is None) == bool(without)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_equal_channels_need_no_phi() -> None:
    model = segmentor("dml+adm", student=network("PSPHead", channels=12))
    assert list(model.adm.parameters()) == []  # type: ignore[union-attr]
    inputs, labels = batch()
    assert "student/loss_phi" not in model.loss(inputs, samples(labels))


@pytest.mark.parametrize("consensus", ["ce", "kd"])
def test_the_uniform_control_is_the_plain_losses_once_more(consensus: str) -> None:
    """Where the attention is 1 (up to its guard of 1e-5), the head says about the map what it said without it."""
    weights = {"alpha": 0.2, "beta": 0.6, "consensus": consensus, "control": "uniform"}
    losses = segmentor("dml+adm", adm=weights).loss(*(lambda x, y: (x, samples(y)))(*batch()))
    student = losses["student/loss_ce" if consensus == "ce" else "student/loss_kd"]
    torch.testing.assert_close(losses["student/loss_consensus"], 0.2 * student, rtol=3e-5, atol=0)
    torch.testing.assert_close(losses["teacher/loss_divergence"], 0.6 * losses["teacher/loss_ce"], rtol=3e-5, atol=0)


def test_the_shuffled_control_moves_s_within_each_image_alike_for_all_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor] = []
    for name in ("consensus_loss", "divergence_loss"):
        real = getattr(losses_module, name)
        monkeypatch.setattr(losses_module, name, lambda s, *rest, real=real: used.append(s) or real(s, *rest))
    model = segmentor("dml+adm", adm={"control": "shuffled"})
    inputs, labels = batch()
    model.eval().loss(inputs, samples(labels))
    own = model.similarity(inputs)  # what is shown and logged stays ADM's own
    assert len(used) == 2 and torch.equal(*used)
    assert not torch.equal(used[0], own)
    for shuffled, s in zip(used[0], own, strict=True):
        torch.testing.assert_close(shuffled.flatten().sort().values, s.flatten().sort().values)
        assert float(s.std()) > 0


@pytest.mark.parametrize("control", ["uniform", "shuffled"])
@pytest.mark.parametrize("consensus", ["ce", "kd"])
def test_a_controls_gradients_go_where_they_go_without_it(control: str, consensus: str) -> None:
    model = segmentor("dml+adm", adm={"control": control, "consensus": consensus, "gamma": 0.1})
    inputs, labels = batch()
    for name, loss in model.loss(inputs, samples(labels)).items():
        assert reached(model, loss) == ({"phi"} if name == "student/loss_phi" else {name.split("/")[0]}), name


@pytest.mark.parametrize("attention", [consensus_attention, divergence_attention])
def test_reweighted_logits_are_the_head_on_the_reweighted_map(attention: Any) -> None:
    """``A (z - b) + b``, also with dropout, whose mask is then the plain logits' own."""
    head = MODELS.build(network(dropout_ratio=0.5)["decode_head"]).double().train()
    varied(head)
    entered: list[Tensor] = []
    head.conv_seg.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    feature = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    s = spatial_similarity(feature, torch.randn_like(feature))
    logits = head.cls_seg(feature)
    output = Output(feature, logits, torch.zeros(2, CLASSES, 3, 5), head)
    dropped = entered[0]
    assert (dropped == 0).any() and not torch.equal(dropped, feature)
    reweighted = output.finish(attend(output.reweighable(), s, attention))
    torch.testing.assert_close(reweighted, head.conv_seg(attend(dropped, s, attention)), rtol=1e-12, atol=1e-12)
    for value in (reweighted, head.conv_seg(attend(dropped, s, attention))):
        grads = torch.autograd.grad(value.square().sum(), list(head.conv_seg.parameters()), retain_graph=True)
        if value is reweighted:
            first = grads
    torch.testing.assert_close(grads, first)


def test_images_of_two_views_go_one_to_each_network() -> None:
    model = segmentor("kdcl")
    entered: dict[str, Tensor] = {}
    for role, net in model.networks.items():
        net.backbone.register_forward_pre_hook(lambda module, inputs, role=role: entered.update({role: inputs[0]}))
    inputs, labels = batch(views=2)
    model.loss(inputs, samples(labels))
    assert torch.equal(entered["teacher"], inputs[:, :3]) and torch.equal(entered["student"], inputs[:, 3:])
    model.loss(inputs[:, :3], samples(labels))
    assert torch.equal(entered["teacher"], inputs[:, :3]) and torch.equal(entered["student"], inputs[:, :3])


@pytest.mark.parametrize("training", [True, False])
def test_views_are_preprocessed_as_plain_images(training: bool) -> None:
    options: dict[str, Any] = {
        "mean": [120.0, 110.0, 100.0], "std": [50.0, 60.0, 70.0], "bgr_to_rgb": True, "size": (20, 30),
        "pad_val": 0, "seg_pad_val": 255,
    }  # fmt: skip
    stock, own = SegDataPreProcessor(**options), ViewsDataPreProcessor(**options)
    images = [torch.randint(0, 256, (6, *SIZE), dtype=torch.uint8) for _ in range(2)]
    labels = batch(2)[1]

    def run(preprocessor: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        done = preprocessor({"inputs": inputs, "data_samples": samples(labels)}, training)
        return done["inputs"], [sample.gt_sem_seg.data for sample in done["data_samples"]]

    both, padded = run(own, images)
    for view in (slice(0, 3), slice(3, 6)):
        wanted, same = run(stock, [image[view] for image in images])
        torch.testing.assert_close(both[:, view], wanted, rtol=0, atol=0)
        torch.testing.assert_close(run(own, [image[view] for image in images])[0], wanted, rtol=0, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(padded, same, strict=True))
    assert both.shape == (2, 6, *((20, 30) if training else SIZE))


def opinions(labels: Tensor, trial: int) -> dict[str, Tensor]:
    """Logits ``[B, K, H, W]`` of a teacher and a student that know the labels and err, alike in every third trial."""
    generator = torch.Generator().manual_seed(trial)
    onehot = nn.functional.one_hot(labels.masked_fill(labels == 255, 0), CLASSES).permute(0, 3, 1, 2).double()
    knows = torch.rand(2, generator=generator, dtype=torch.float64) * 4
    noise = 2 * torch.randn(2, *onehot.shape, generator=generator, dtype=torch.float64)
    if trial % 3 == 0:
        noise[1] = noise[0] + 0.1 * noise[1]
        knows[1] = 0.9 * knows[0]
    return {role: onehot * k + n for role, k, n in zip(("teacher", "student"), knows, noise, strict=True)}


def says(logits: Mapping[str, Tensor], labels: Tensor) -> float:
    outputs = {role: Output(z, z, z, None) for role, z in logits.items()}  # type: ignore[arg-type]
    return float(teacher_learns(outputs, pixels_of(labels)))


def test_the_teacher_pauses_where_the_formula_says() -> None:
    """Against loops over the labelled pixels; what the networks say at ignored ones must not matter."""
    labels = batch()[1]
    found = set()
    for trial in range(30):
        z = opinions(labels, trial)
        p = {role: loop_softmax(x) for role, x in z.items()}
        truth = [[[[float(k == y) for k in range(CLASSES)] for y in row] for row in image] for image in labels.tolist()]
        r_s, r_t = (loop_distance(p[role], truth, labels) for role in ("student", "teacher"))
        gap = loop_distance(p["student"], p["teacher"], labels)
        expert = gap > r_s - math.exp(-r_t / (r_s + r_t)) * r_t and r_t < r_s
        for x in z.values():  # opinions at ignored pixels
            x.masked_fill_((labels == 255)[:, None], 1e3 * (trial % 2))
        assert says(z, labels) == (0.0 if expert else 1.0)
        found.add((expert, r_t < r_s))
        pixels, count = pixels_of(labels), int((labels != 255).sum())
        sums = distances(z["student"], z["teacher"], pixels.targets, pixels.valid)
        assert sums.tolist() == pytest.approx([r_s * count, r_t * count, gap * count])
    assert found == {(True, True), (False, True), (False, False)}


def copied(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_a_paused_teacher_does_not_move_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = segmentor("switokd+adm")
    wrapper = optimizer_of(model)
    inputs, labels = batch()
    assert float(step(model, wrapper, inputs, labels)["teacher/paused"]) in (0.0, 1.0)
    for gate in (1.0, 0.0, 0.0, 1.0):  # from the first on, there is momentum
        monkeypatch.setattr(distiller_module, "teacher_learns", lambda *_, gate=gate: torch.tensor(gate))
        before = {role: copied(net) for role, net in model.networks.items()}
        statistics = [b.clone() for b in model.teacher.buffers()]
        named = step(model, wrapper, inputs, labels)
        assert float(named["teacher/paused"]) == 1.0 - gate
        assert moved(model.teacher, before["teacher"]) == (gate == 1.0) and moved(model.student, before["student"])
        assert any(not torch.equal(a, b) for a, b in zip(model.teacher.buffers(), statistics, strict=True))
        for name, value in named.items():
            if name.startswith("teacher/loss"):
                assert bool(value) == (gate == 1.0), name


@pytest.mark.parametrize("gates", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_of_a_batch_in_parts_those_that_learn_count(
    gates: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = segmentor("switokd+adm")
    wrapper = optimizer_of(model, accumulative_counts=2)
    drawn = iter(gates)
    monkeypatch.setattr(distiller_module, "teacher_learns", lambda *_: torch.tensor(next(drawn)))
    before = copied(model.teacher)
    for _ in gates:
        assert not moved(model.teacher, before)
        step(model, wrapper, *batch())
    assert moved(model.teacher, before) == (1.0 in gates)


def test_losses_that_no_step_followed_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where gradient scaling leaves out a step whose gradients overflow."""
    model = segmentor("switokd")
    wrapper = optimizer_of(model)
    inputs, labels = batch()
    step(model, wrapper, inputs, labels)
    for gate in (1.0, 0.0):
        monkeypatch.setattr(distiller_module, "teacher_learns", lambda *_, gate=gate: torch.tensor(gate))
        losses = model.loss(inputs, samples(labels))
    before = copied(model.teacher)
    wrapper.update_params(model.parse_losses(losses)[0])
    assert not moved(model.teacher, before)


def test_switokd_wants_an_optimiser_that_can_skip() -> None:
    inputs, labels = batch()
    with pytest.raises(InputError, match="DistillationOptimWrapperConstructor"):
        segmentor("switokd").loss(inputs, samples(labels))


@pytest.mark.parametrize("method", ["kd", "kd+adm"])
def test_a_fixed_teacher_stays_as_it_was_trained(method: str, weights: str) -> None:
    model = built(method, teacher_weights=weights).double()
    trained = torch.load(weights, weights_only=True)["state_dict"]
    wrapper = optimizer_of(model)
    model.eval()
    model.train()
    assert model.student.training and not any(m.training for m in model.teacher.modules())
    before = copied(model.student)
    for _ in range(2):
        named = step(model, wrapper, *batch())
    assert moved(model.student, before)
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(torch.equal(value, trained[key].to(value)) for key, value in model.teacher.state_dict().items())
    assert not any(name.startswith("teacher") for name in named)


def test_where_a_teachers_weights_come_from(weights: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(weights, weights_only=True)["state_dict"]
    whole = {f"teacher.{key}": value for key, value in state.items()} | {"student.x": torch.zeros(1)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": whole, "meta": {"iter": 3}}, tmp_path / "iter_3.pth")
    torch.save(state, tmp_path / "plain.pth")
    for file in ("a.safetensors", "iter_3.pth", "plain.pth"):
        model = built("dml", teacher_weights=str(tmp_path / file))
        assert all(torch.equal(value, state[key]) for key, value in model.teacher.state_dict().items()), file


def test_weights_that_do_not_fit(weights: str, tmp_path: Path) -> None:
    class Unsafe:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": Unsafe()}, tmp_path / "unsafe.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    state = torch.load(weights, weights_only=True)["state_dict"]
    torch.save({k: v for k, v in state.items() if k != "decode_head.conv_seg.bias"}, tmp_path / "less.pth")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save({**state, "decode_head.conv_seg.bias": torch.zeros(9)}, tmp_path / "shape.pth")
    for file, said in (
        ("none.pth", "no weight file"),
        ("unsafe.pth", "reading it could run code"),
        ("damaged.pth", "cannot read"),
        ("less.pth", "another network: decode_head.conv_seg.bias"),
        ("more.pth", "another network: more"),
        ("shape.pth", "another network: decode_head.conv_seg.bias"),
    ):
        with pytest.raises(InputError, match=said) as error:
            built("kd", teacher_weights=str(tmp_path / file))
        assert file in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_network_starts_alike_whatever_is_trained_beside_it() -> None:
    starts = []
    for seed, method, teacher in ((1, "dml", 12), (1, "dml+adm", 12), (1, "vanilla", 6), (2, "dml", 12)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model = built(method, teacher=network(channels=teacher))
        assert torch.equal(torch.get_rng_state(), state) and torch.initial_seed() == seed
        starts.append(copied(model.student))
    for other in starts[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(starts[0], starts[3], strict=True))
    networks = [copied(net) for net in segmentor("dml", student=network(channels=12)).networks.values()]
    assert any(not torch.equal(a, b) for a, b in zip(*networks, strict=True))


def test_the_student_leaves_as_a_stock_network(tmp_path: Path) -> None:
    model = built("dml+adm")
    wrapper = optimizer_of(model)
    inputs, labels = batch()
    step(model, wrapper, inputs.float(), labels)
    torch.save(model.student.state_dict(), tmp_path / "student.pth")
    stock = MODELS.build(ConfigDict(network(channels=8)))
    assert type(stock) is EncoderDecoder
    stock.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True), strict=True)
    model.eval()
    stock.eval()
    assert torch.equal(stock(inputs.float(), mode="tensor"), model(inputs.float(), mode="tensor"))


def test_one_pass_predicts_with_both() -> None:
    model = segmentor("dml+adm").eval()
    inputs, labels = batch()
    done = samples(labels)
    for sample in done:
        sample.set_metainfo({"ori_shape": (20, 30)})
    predicted = model(inputs, done, mode="predict")
    for role, field in (("student", "pred_sem_seg"), ("teacher", "pred_sem_seg_teacher")):
        alone = samples(labels)
        for sample in alone:
            sample.set_metainfo({"ori_shape": (20, 30)})
        for own, both in zip(model.networks[role].predict(inputs, alone), predicted, strict=True):
            assert both.get(field).data.shape == (1, 20, 30)
            assert torch.equal(both.get(field).data, own.pred_sem_seg.data)
    assert any(not torch.equal(s.pred_sem_seg.data, s.pred_sem_seg_teacher.data) for s in predicted)


def test_similarity_is_what_training_compares() -> None:
    model = segmentor("dml+adm").eval()
    inputs, _ = batch()
    f = {r: n.decode_head._forward_feature(n.extract_feat(inputs)) for r, n in model.networks.items()}
    projected = torch.nn.functional.conv2d(f["student"], model.adm.adapter.conv.weight)  # type: ignore[union-attr]
    wanted = torch.cosine_similarity(projected, f["teacher"], dim=1)
    similarity = model.similarity(inputs)
    torch.testing.assert_close(similarity, wanted, rtol=1e-6, atol=1e-6)
    assert not similarity.requires_grad
    with pytest.raises(ValueError, match="unequal channels"):
        segmentor("dml").similarity(inputs)


class HostReads(TorchDispatchMode):
    """Counts what a step reads from the device: on a GPU each such read waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalise", ["all", "valid"])
@pytest.mark.parametrize("method", ALL)
def test_a_step_reads_nothing_from_the_device(method: str, normalise: str, weights: str) -> None:
    model = of_method(f"{method}+adm", weights, normalise=normalise)
    wrapper = optimizer_of(model)
    inputs, labels = batch()
    with HostReads() as host:
        step(model, wrapper, inputs, labels)
    assert len(host.reads) == (1 if method == "switokd" else 0)  # that one decides whether the optimiser skips


def test_under_autocast_the_losses_are_float32() -> None:
    inputs, labels = batch()
    losses = []
    for enabled in (False, True):
        model = segmentor("dml+adm", adm={"consensus": "kd"}).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(inputs.float(), samples(labels)))
    for name, value in losses[1].items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(losses[0][name]), rel=0.1), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dmll+adm"}, "did you mean 'dml\\+adm'"),
        ({"method": "dml+amd"}, "unknown method 'dml\\+amd'"),
        ({"method": "kd"}, "model.teacher_weights=FILE"),
        ({"method": "kd+adm", "teacher_weights": "x", "adm": {"beta": 0.6}}, "the teacher is fixed"),
        ({"adm": {"divergence": "kd"}}, "every pixel of every image"),
        ({"adm": {"alpah": 1.0}}, "did you mean 'alpha'"),
        ({"adm": {"alpha": -1.0}}, "adm.alpha must not be negative"),
        ({"adm": {"consensus": "kl"}}, "unknown value of adm.consensus 'kl'"),
        ({"adm": {"tau": 0.0}}, "adm.tau must be positive"),
        ({"adm": {"control": "shufled"}}, "unknown value of adm.control 'shufled': did you mean 'shuffled'"),
        ({"tau": 0.0}, "model.tau must be positive"),
        ({"weight": -1.0}, "must not be negative"),
        ({"weight": {"techer": 1.0}}, "did you mean 'teacher'"),
        ({"normalise": "vaild"}, "did you mean 'valid'"),
        ({"student": network(num_classes=5)}, "student: FCNHead has 4 classes .* the student's decode head has 5"),
        ({"teacher": network(num_classes=5)}, "teacher: .* has 5 classes .* the student's decode head has 4"),
        ({"student": network(ignore_index=254)}, "ignores"),
        ({"student": network(loss_decode={"type": "DiceLoss"})}, "one softmax CrossEntropyLoss"),
        ({"student": network(loss_decode={"type": "CrossEntropyLoss", "use_sigmoid": True})}, "softmax"),
        ({"student": network(sampler={"type": "OHEMPixelSampler"})}, "no sampler"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        built(**{"method": "dml+adm", **options})
    assert "\n" not in str(error.value)


def test_heads_without_a_map_before_the_classifier_are_refused() -> None:
    student = network()
    student["decode_head"] = head("DepthwiseSeparableASPPHead", 8, 32, 3, c1_in_channels=4, c1_channels=4)
    with pytest.raises(InputError, match="DepthwiseSeparableASPPHead does not tell its map from its classifier"):
        built("dml+adm", student=student)


def test_in_evaluation_one_image_is_enough() -> None:
    inputs, labels = batch()
    segmentor("dml+adm").eval().loss(inputs[:1], samples(labels[:1]))


def test_options_with_a_fixed_teacher_are_the_offline_ones() -> None:
    offline, online = (adm_config({}, method, used=True) for method in ("kd", "dml"))
    assert (offline.alpha, offline.beta, offline.gamma) == (0.1, 0.0, 0.0)
    assert (online.alpha, online.beta, online.gamma) == (0.2, 0.6, 0.01)
    assert adm_config({"beta": 0.6}, "kd", used=False).beta == 0.6  # without ADM it does nothing


# Two processes.

RUNS: dict[str, dict[str, Any]] = {
    "dml+adm": {},
    "dml+adm valid": {"normalise": "valid"},
    "kdcl+adm": {},
    "switokd+adm": {},
    "kd+adm": {},
}


def frozen_run(case: str, weights: str, rank: int, processes: int) -> dict[str, Any]:
    """Two steps without what is not a sum over images: BatchNorm's statistics, and phi's own loss, a quotient."""
    torch.manual_seed(3)
    model: Any = of_method(case.split()[0], weights, adm={"phi_loss": "feature", "gamma": 0.1}, **RUNS[case])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(False)
    segmentor_itself = model
    if processes > 1:
        model = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    wrapper = optimizer_of(model)
    gradients: list[list[Tensor | None]] = []
    wrapper.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([None if p.grad is None else p.grad.clone() for p in segmentor_itself.parameters()])
    )
    inputs, labels = batch(4, views=2 if segmentor_itself.method == "kdcl" else 1)
    own = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    paused = [float(step(model, wrapper, inputs[own], labels[own]).get("teacher/paused", 0.0)) for _ in range(3)]
    return {"gradients": gradients, "weights": copied(segmentor_itself), "paused": paused}


def gates(own: slice) -> list[float]:
    """SwitOKD's decisions about some of the four images of a batch; which network knows more differs between halves."""
    labels = batch(4)[1]
    labels[3, 4:] = 255  # shares of different size
    decisions = []
    for trial in range(40):
        z = opinions(labels, trial)
        mixed = {role: torch.cat([z[role][:2], z[other][2:]]) for role, other in (ROLES, ROLES[::-1])}
        decisions.append(says({role: x[own] for role, x in mixed.items()}, labels[own]))
    return decisions


def work(folder: Path) -> None:
    """What each of the two processes does."""
    torch.distributed.init_process_group("gloo")
    prepare()
    rank = torch.distributed.get_rank()
    report: dict[str, Any] = {case: frozen_run(case, str(folder / "teacher.pth"), rank, 2) for case in RUNS}
    report["gates"] = gates(slice(2 * rank, 2 * rank + 2))
    torch.save(report, folder / f"report{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(weights: str) -> list[dict[str, Any]]:
    folder = Path(weights).parent
    in_two_processes(__file__, folder)
    return [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", RUNS)
def test_two_processes_are_one(case: str, two: list[dict[str, Any]], weights: str) -> None:
    one = frozen_run(case, weights, 0, 1)
    assert len(one["gradients"]) == 3
    for report in two:
        assert report[case]["paused"] == one["paused"]
        for ours, theirs in zip(report[case]["gradients"], one["gradients"], strict=True):
            scale = max(float(g.abs().max()) for g in theirs if g is not None)
            for a, b in zip(ours, theirs, strict=True):
                if b is None:
                    assert a is None
                else:
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * scale)
    first, second = (report[case]["weights"] for report in two)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_processes_pause_the_teacher_together(two: list[dict[str, Any]]) -> None:
    together, alone = gates(slice(0, 4)), [gates(slice(0, 2)), gates(slice(2, 4))]
    assert two[0]["gates"] == two[1]["gates"] == together
    assert alone[0] != together and alone[1] != together  # else this shows nothing


if __name__ == "__main__":
    work(Path(sys.argv[1]))
