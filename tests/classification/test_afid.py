"""AFID: its attention, fusion, losses and ramp against a naive reference, and two networks that need each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classification.config import TrainConfig
from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig, build_networks
from classification.methods.afid import (
    AFID,
    FUSION,
    AFIDOptions,
    ChannelAttention,
    FusionHead,
    Interaction,
    SpatialAttention,
    ramp_weight,
    split_at_stem,
)
from classification.networks import create_network
from classification.tools.evaluate import parse_options, weights_command
from core.adapter import Adapter
from core.adm import ADMConfig, ADMLoss
from core.errors import InputError
from core.network import stage_maps
from core.training.checkpoint import save_checkpoint
from core.training.distiller import Progress
from core.weights import read_metadata

CLASSES = 5
START = Progress(0, 0.0, 10, 1.0)
UNEQUAL = {"teacher": "cifar_wrn_10_2", "student": "cifar_resnet8"}  # stems 16 and 16, last maps 128 and 64 channels
EQUAL = {"teacher": "cifar_resnet8", "student": "cifar_resnet8"}


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prepared(names: Mapping[str, str], size: int = 8, **options: Any) -> tuple[AFID, dict[str, nn.Module], Tensor]:
    """AFID and its networks in float64 and training mode, and images."""
    networks = build_networks({role: NetworkConfig(name) for role, name in names.items()}, CLASSES, 0)
    method = AFID(AFIDOptions(**options))
    x = random(4, 3, size, size)
    networks = method.prepare(networks, dict.fromkeys(networks, x[:2].float()))
    return method.double(), {role: network.double() for role, network in networks.items()}, x


def distiller_of(
    names: Mapping[str, str], adm: ADMConfig | None = None, optimizer: OptimizerConfig | None = None
) -> ClassificationDistiller:
    configs = {role: NetworkConfig(name) for role, name in names.items()}
    return ClassificationDistiller(
        build_networks(configs, CLASSES, 0),
        configs,
        dict.fromkeys(names, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))),
        AFID(),
        adm,
        optimizer or OptimizerConfig(),
        batch_of(2)["image"],
        num_classes=CLASSES,
    )


def batch_of(count: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return {"image": images, "target": torch.arange(count) % CLASSES, "index": torch.arange(count), "weight": 1.0}


class Ones(nn.Module):
    """An attention that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[:, :1])


def without_interaction(method: AFID) -> AFID:
    for interaction in (method.after_stem, method.after_stages):
        interaction.attentions = nn.ModuleList([Ones()])
    return method


# --- the equations ----------------------------------------------------------------------------------------------------


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def naive_m(attention: SpatialAttention, x: Tensor) -> Tensor:
    """m of one image ``[C, H, W]``, number by number."""
    channels, height, width = x.shape
    down, up = (attention.channel.f[k].weight.flatten(1).tolist() for k in (0, 2))  # type: ignore[operator]
    values = x.tolist()
    pooled = []
    for pool in (lambda v: sum(v) / len(v), max):
        vector = [pool([values[c][i][j] for i in range(height) for j in range(width)]) for c in range(channels)]
        hidden = [max(0.0, sum(w * v for w, v in zip(row, vector, strict=True))) for row in down]
        pooled.append([sum(w * v for w, v in zip(row, hidden, strict=True)) for row in up])
    gate = [sigmoid(a + b) for a, b in zip(*pooled, strict=True)]
    planes = torch.zeros(2, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            u = [gate[c] * values[c][i][j] for c in range(channels)]
            planes[0, i, j], planes[1, i, j] = sum(u) / channels, max(u)
    kernel, seen = attention.conv.weight[0].tolist(), planes.tolist()
    m = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            total = 0.0
            for plane in range(2):
                for a in range(7):
                    for b in range(7):
                        if 0 <= i + a - 3 < height and 0 <= j + b - 3 < width:
                            total += kernel[plane][a][b] * seen[plane][i + a - 3][j + b - 3]
            m[i, j] = sigmoid(total)
    return m


def test_spatial_attention_and_the_crosswise_interaction() -> None:
    x_1, x_2 = random(2, 32, 3, 4), random(2, 32, 3, 4, seed=4)
    interaction = Interaction(32, 32).double()
    (attention,) = interaction.attentions
    assert attention.channel.f[0].weight.shape == (2, 32, 1, 1)  # type: ignore[union-attr, index]
    for_1, for_2 = interaction(x_1, x_2)
    assert for_1.shape == for_2.shape == (2, 1, 3, 4)
    for b in range(2):
        torch.testing.assert_close(for_1[b, 0], naive_m(attention, x_2[b]))  # type: ignore[arg-type]
        torch.testing.assert_close(for_2[b, 0], naive_m(attention, x_1[b]))  # type: ignore[arg-type]
    assert len(list(interaction.parameters())) == 3  # two 1x1 and one 7x7: shared, no biases


def test_unequal_maps_have_their_own_attention_and_m_is_resized() -> None:
    interaction = Interaction(8, 6).double()
    first, second = interaction.attentions
    x_1, x_2 = random(2, 8, 4, 4), random(2, 6, 2, 2)
    for_1, for_2 = interaction(x_1, x_2)
    for b in range(2):
        small = naive_m(second, x_2[b])  # type: ignore[arg-type]
        # Bilinear from 2 to 4 positions lies at -0.25, 0.25, 0.75, 1.25 of the small grid, clamped to it.
        line = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(for_1[b, 0], line @ small @ line.T)
        large = naive_m(first, x_1[b])  # type: ignore[arg-type]
        # ... and from 4 to 2 at 0.5 and 2.5: the middle of the two in the half.
        half = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
        torch.testing.assert_close(for_2[b, 0], half @ large @ half.T)


def test_gradients_of_the_interaction() -> None:
    interaction = Interaction(3, 2).double()
    inputs = (random(1, 3, 3, 3).requires_grad_(), random(1, 2, 2, 2, seed=5).requires_grad_())
    assert torch.autograd.gradcheck(interaction, inputs)
    narrow: Any = ChannelAttention(3).f[0]
    assert narrow.weight.shape[0] == 1


def naive_fusion(head: FusionHead, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The fused map and z_f in training mode, from maps of one size, with plain loops over channels."""
    x = []
    for phi, one in zip(head.adapters, maps, strict=True):
        weight = None if phi.conv is None else phi.conv.weight[:, :, 0, 0]  # type: ignore[union-attr, index]
        x += list(one.unbind(1) if weight is None else torch.einsum("oc,bchw->bohw", weight, one).unbind(1))

    def normalised(channel: Tensor, bn: nn.BatchNorm2d, c: int) -> Tensor:
        mean = channel.sum() / channel.numel()
        variance = (channel - mean).square().sum() / channel.numel()
        return (bn.weight[c] * (channel - mean) / (variance + 1e-5).sqrt() + bn.bias[c]).clamp_min(0.0)

    height, width = maps[0].shape[-2:]
    hidden = []
    for c, channel in enumerate(x):
        padded, out = F.pad(channel, (1, 1, 1, 1)), torch.zeros_like(channel)
        for a in range(3):
            for b in range(3):
                out += head.depthwise.conv.weight[c, 0, a, b] * padded[:, a : a + height, b : b + width]
        hidden.append(normalised(out, head.depthwise.bn, c))
    fused = []
    for o, row in enumerate(head.pointwise.conv.weight[:, :, 0, 0]):
        out = torch.zeros_like(hidden[0])
        for c, channel in enumerate(hidden):
            out = out + row[c] * channel
        fused.append(normalised(out, head.pointwise.bn, o))
    pooled = torch.stack([channel.sum(dim=(1, 2)) / (height * width) for channel in fused], dim=1)
    return torch.stack(fused, dim=1), pooled @ head.fc.weight.T + head.fc.bias


@pytest.mark.parametrize("widths", [(4, 4), (5, 3), (3, 5)])
def test_fusion_head(widths: tuple[int, int]) -> None:
    head = FusionHead(*widths, CLASSES).double()
    for module in (head.depthwise.bn, head.pointwise.bn):
        nn.init.uniform_(module.weight, 0.5, 2.0)
        nn.init.uniform_(module.bias, -1.0, 1.0)
    maps = [random(2, c, 3, 4, seed=seed) for seed, c in enumerate(widths)]
    fused = head.forward_features(*maps)
    wanted, logits = naive_fusion(head, maps)
    assert fused.shape == (2, min(widths), 3, 4)
    torch.testing.assert_close(fused, wanted)
    torch.testing.assert_close(head.forward_head(fused), logits)
    # Only the wider map has a 1x1 in front, and only where widths differ.
    assert [phi.conv is not None for phi in head.adapters] == [c > min(widths) for c in widths]


def test_fusion_pools_to_the_smaller_size() -> None:
    head = FusionHead(4, 4, CLASSES).double()
    large, small = random(2, 4, 6, 4), random(2, 4, 3, 2, seed=4)
    pooled = large.unflatten(2, (3, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(head.forward_features(large, small), head.forward_features(pooled, small))


@pytest.mark.parametrize(
    ("epoch", "ramp", "wanted"),
    [
        (0.0, 80, math.exp(-5)),
        (0.99, 80, math.exp(-5)),  # whole epochs alone count
        (40.5, 80, math.exp(-1.25)),
        (79.0, 80, math.exp(-5 / 6400)),
        (80.0, 80, 1.0),
        (299.0, 80, 1.0),
        (3.0, 4, math.exp(-5 / 16)),
        (0.0, 0, 1.0),
    ],
)
def test_ramp(epoch: float, ramp: int, wanted: float) -> None:
    assert ramp_weight(epoch, ramp, random(1)).item() == pytest.approx(wanted, rel=1e-12)
    weight = ramp_weight(epoch, ramp, torch.ones(1, dtype=torch.bfloat16))
    assert weight.dtype == torch.float32 and weight.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("names", "tau", "weight", "ramp"), [(UNEQUAL, 1.0, 1.0, 80), (UNEQUAL, 3.0, 0.5, 4), (EQUAL, 2.0, 2.0, 0)]
)
def test_whole_method_against_a_naive_one(names: Mapping[str, str], tau: float, weight: float, ramp: int) -> None:
    method, networks, x = prepared(names, tau=tau, weight=weight, ramp=ramp)
    target = torch.tensor([0, 3, 1, 3])
    twins: list[Any] = [copy.deepcopy(network) for network in networks.values()]  # with statistics of their own
    outputs = method(networks, dict.fromkeys(networks, x))
    losses = method.losses(outputs, {"target": target}, Progress(7, 3.5, 10, 5.0))

    def crosswise(interaction: Interaction, maps: list[Tensor]) -> list[Tensor]:
        """x_1 <- m_2 x_1, x_2 <- m_1 x_2."""
        m = [
            torch.stack([naive_m(interaction.attentions[-k], image) for image in one])  # type: ignore[arg-type]
            for k, one in enumerate(maps)
        ]
        return [m[1][:, None] * maps[0], m[0][:, None] * maps[1]]

    stems = crosswise(method.after_stem, [twin.stem(x) for twin in twins])
    lasts = []
    for twin, current in zip(twins, stems, strict=True):
        for stage in twin.stages:
            current = stage(F.relu(current) if twin.relu_between_stages else current)
        lasts.append(twin.neck(current))
    z = [
        F.linear(F.relu(one).mean(dim=(2, 3)), twin.fc.weight, twin.fc.bias)
        for twin, one in zip(twins, crosswise(method.after_stages, lasts), strict=True)
    ]
    fused, z_f = naive_fusion(method.fusion, lasts)
    torch.testing.assert_close(outputs[FUSION].maps, [fused])
    for role, last in zip(names, lasts, strict=True):
        torch.testing.assert_close(outputs[role].maps[-1], last)
    assert list(outputs) == [*names, FUSION]

    p = lambda logits: [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.tolist()]  # noqa: E731

    def imitation(own: Tensor, goal: Tensor) -> float:
        rows = list(zip(p(own / tau), p(goal / tau), strict=True))
        return tau**2 * sum(b * math.log(b / a) for q, g in rows for a, b in zip(q, g, strict=True)) / len(rows)

    w = weight * (1.0 if ramp == 0 else math.exp(-5 * (1 - 3 / ramp) ** 2))
    goals = {**dict.fromkeys(names, z_f), FUSION: (z[0] + z[1]) / 2}
    for (role, goal), own in zip(goals.items(), [*z, z_f], strict=True):
        torch.testing.assert_close(outputs[role].logits, own)
        torch.testing.assert_close(outputs[role].head(outputs[role].maps[-1]), own)
        ce = -sum(math.log(row[y]) for row, y in zip(p(own), target.tolist(), strict=True)) / len(target)
        assert losses[role]["ce"].item() == pytest.approx(ce, rel=1e-9)
        assert losses[role]["kd"].item() == pytest.approx(w * imitation(own, goal), rel=1e-8)
        assert losses[role].keys() == {"ce", "kd"}


def test_without_weight_there_is_no_imitation() -> None:
    method, networks, x = prepared(EQUAL, weight=0.0)
    losses = method.losses(method(networks, dict.fromkeys(networks, x)), {"target": torch.arange(4)}, START)
    assert [terms.keys() for terms in losses.values()] == [{"ce"}] * 3


# --- who gets which gradient ------------------------------------------------------------------------------------------


def test_gradients_cross_over() -> None:
    method, networks, x = prepared(UNEQUAL)
    losses = method.losses(method(networks, dict.fromkeys(networks, x)), {"target": torch.arange(4)}, START)
    owners = {**networks, "attention": nn.ModuleList([method.after_stem, method.after_stages]), FUSION: method.fusion}
    named = [(f"{owner}.{name}", p) for owner, m in owners.items() for name, p in m.named_parameters()]

    def reached(loss: Tensor) -> set[str]:
        gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        return {name for (name, _), g in zip(named, gradients, strict=True) if g is not None and g.abs().max() > 0}

    every = {name for name, _ in named}
    fusion = {name for name in every if name.startswith(f"{FUSION}.")}
    fc = {role: {f"{role}.fc.weight", f"{role}.fc.bias"} for role in networks}
    # Each last map has an attention of its own, which serves the peer.
    serves = {"student": "attention.1.attentions.0.", "teacher": "attention.1.attentions.1."}
    for role, other in (("teacher", "student"), ("student", "teacher")):
        idle = fusion | fc[other] | {name for name in every if name.startswith(serves[other])}
        for term in ("ce", "kd"):  # the peer's whole body, but neither its classifier nor the imitated fusion head
            assert reached(losses[role][term]) == every - idle, (role, term)
    # The fusion head reads both last maps in front of the second interaction; z_e is a target and gets nothing.
    second = {name for name in every if name.startswith("attention.1.")}
    for term in ("ce", "kd"):
        assert reached(losses[FUSION][term]) == every - fc["teacher"] - fc["student"] - second, term
    total = torch.stack([value for terms in losses.values() for value in terms.values()]).sum()
    assert reached(total) == every  # DistributedDataParallel waits for each


@pytest.mark.parametrize("names", [UNEQUAL, EQUAL])
def test_the_feature_loss_cannot_shrink_the_maps_by_the_last_attention(names: Mapping[str, str]) -> None:
    distiller = distiller_of(names, ADMConfig())
    losses, _ = distiller(batch_of(), START)
    last: Any = distiller.method.after_stages
    for term, reaches in (("feature", False), ("consensus", True), ("ce", True)):
        gradients = torch.autograd.grad(
            losses["student"][term], list(last.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and g.abs().max() > 0 for g in gradients) == reaches, term


@pytest.mark.parametrize("adm", [None, ADMConfig(0.3, 0.7, 0.5)])
@pytest.mark.parametrize("names", [UNEQUAL, EQUAL])
def test_each_part_of_a_network_runs_once_a_step(names: Mapping[str, str], adm: ADMConfig | None) -> None:
    distiller = distiller_of(names, adm)
    counts: dict[str, int] = {}
    for role, network in distiller.networks.items():
        for name, module in network.named_modules():
            if not list(module.children()) and not isinstance(module, nn.Identity):

                def count(*_: Any, key: str = f"{role}.{name}") -> None:
                    counts[key] = counts.get(key, 0) + 1

                module.register_forward_hook(count)
                counts[f"{role}.{name}"] = 0
    losses, _ = distiller(batch_of(), START)
    heads = {f"{role}.fc" for role in names}
    assert {key for key, n in counts.items() if n != 1} == (heads if adm is not None else set())
    assert all(counts[key] == 1 + (adm is not None) for key in heads)
    wanted: dict[str, set[str]] = {role: {"ce", "kd"} for role in (*names, FUSION)}
    if adm is not None:
        wanted["teacher"] |= {"divergence"}
        wanted["student"] |= {"consensus", "feature"} | ({"phi"} if names is UNEQUAL else set())
    assert {role: set(terms) for role, terms in losses.items()} == wanted


def test_two_students_learn_alike_and_the_fusion_head_is_none() -> None:
    names = {"student": "cifar_resnet8", "student_2": "cifar_resnet8"}
    losses, _ = distiller_of(names)(batch_of(), START)
    assert {role: set(terms) for role, terms in losses.items()} == {role: {"ce", "kd"} for role in (*names, FUSION)}
    with pytest.raises(InputError, match="ADM needs a teacher and a student"):
        distiller_of(names, ADMConfig())


# --- networks and their maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar_wrn_10_2", 16),
        ("cifar_resnet8", 16),
        ("cifar_vgg8", 32),
        ("cifar_mobilenetv2_050", 32),
        ("cifar_shufflenetv1", 16),
        ("resnet18", 64),
        ("mobilenetv1_100", 64),
        ("mobilenetv2_050", 64),
        ("efficientnet_lite0", 64),
    ],
)
def test_stem_and_stages_are_the_network(name: str, size: int) -> None:
    network: Any = create_network(name, CLASSES).eval()
    x = torch.randn(2, 3, size, size)
    stem, stages = split_at_stem(network)
    with torch.no_grad():
        final, maps = stages(stem(x))
        wanted_final, wanted = stage_maps(network, x)
        assert torch.equal(network.forward_head(final), network(x))
    assert torch.equal(final, wanted_final)
    maps = [*maps[:-1], final]
    assert [m.shape for m in maps] == [m.shape for m in wanted]
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))


def test_maps_do_not_depend_on_preact() -> None:
    network: Any = create_network("cifar_resnet8", CLASSES, preact=False).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        final, maps = network.forward_stages(network.forward_stem(x))
        wanted, intermediates = network.forward_intermediates(x)
    assert torch.equal(final, wanted)
    assert all(torch.equal(a, b) for a, b in zip(maps, intermediates[1:], strict=True))


@pytest.mark.parametrize(
    ("names", "stems", "lasts"),
    [
        ({"teacher": "resnet26d", "student": "resnet18"}, ["after_stem"], ["after_stages"]),
        ({"teacher": "resnet18", "student": "mobilenetv2_050"}, [], ["after_stem", "after_stages"]),
        (UNEQUAL, ["after_stem"], ["after_stages"]),
    ],
)
def test_attention_of_one_hands_out_the_networks_own_maps(
    names: Mapping[str, str], stems: list[str], lasts: list[str]
) -> None:
    size = 8 if names is UNEQUAL else 64
    networks = build_networks({role: NetworkConfig(name) for role, name in names.items()}, CLASSES, 0)
    x = torch.randn(2, 3, size, size)
    method = AFID()
    before = {role: copy.deepcopy(network.state_dict()) for role, network in networks.items()}
    networks = method.prepare(networks, dict.fromkeys(networks, x))
    for role, network in networks.items():  # the look at their maps leaves no trace
        assert network.training
        assert all(torch.equal(v, before[role][k]) for k, v in network.state_dict().items())
    for name in (*stems, *lasts):  # one attention where channels agree, else two
        assert len(getattr(method, name).attentions) == (1 if name in stems else 2), name
    views = dict.fromkeys(networks, x)
    for network in networks.values():
        network.eval()
    with torch.no_grad():
        real = method(networks, views)
        plain = without_interaction(method)(networks, views)
        for role, network in networks.items():
            _, maps = stage_maps(network, x)
            assert len(plain[role].maps) == len(maps)
            for own, wanted, interacted in zip(plain[role].maps, maps, real[role].maps, strict=True):
                assert torch.equal(own, wanted)
                assert interacted.shape == wanted.shape and not torch.allclose(interacted, wanted)
            assert torch.equal(plain[role].logits, network(x))
            head: Any = network.forward_head  # the second interaction is inside the method's own head
            assert not torch.allclose(real[role].logits, head(real[role].maps[-1]))


@pytest.mark.parametrize("consensus", ["ce", "kd"])
@pytest.mark.parametrize("names", [UNEQUAL, EQUAL])
def test_adm_is_what_it_would_be_behind_the_second_interaction(names: Mapping[str, str], consensus: Any) -> None:
    method, networks, x = prepared(names)
    with torch.no_grad():
        outputs = method(networks, dict.fromkeys(networks, x))
        s, t = outputs["student"], outputs["teacher"]
        m_s, m_t = method.after_stages(t.maps[-1], s.maps[-1])[::-1]
        channels = s.maps[-1].shape[1], t.maps[-1].shape[1]
        adm = ADMLoss(0.3, 0.7, Adapter(*channels), consensus=consensus, train_adapter=False).double()
        target = torch.tensor([0, 3, 1, 3])
        before = adm.terms(s.maps[-1], t.maps[-1], target, s.head, t.head)
        heads = [networks[role].forward_head for role in ("student", "teacher")]
        behind = adm.terms(m_s * s.maps[-1], m_t * t.maps[-1], target, *heads)  # type: ignore[arg-type]
    assert before.keys() == behind.keys() == {"consensus", "divergence"}
    for term, value in before.items():
        torch.testing.assert_close(value, behind[term], rtol=1e-9, atol=0.0)
    assert m_s.std() > 0.001 and m_t.std() > 0.001  # or nothing would be shown


# --- the run ----------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    optimizer = OptimizerConfig(lr=0.2, weight_decay=1e-3, learning_rates={"cifar_resnet8": 0.05})
    distiller = distiller_of(UNEQUAL, ADMConfig(), optimizer)
    groups = distiller.parameter_groups()
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.2, 1e-3), (0.05, 1e-3), (0.05, 1e-3), (0.05, 1e-5)]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in distiller.parameters()}
    fusion = distiller.method.fusion
    assert {id(p) for p in groups[3]["params"]} == {id(p) for p in fusion.parameters()}  # type: ignore[union-attr]
    optim = distiller.optimizer.make(groups)
    assert [g["nesterov"] for g in optim.param_groups] == [False, False, False, True]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_the_fusion_head_steps_by_nesterov(momentum: float, nesterov: bool) -> None:
    optimizer = OptimizerConfig(lr=0.1, momentum=momentum, weight_decay=0.5, nesterov=nesterov)
    distiller = distiller_of(UNEQUAL, None, optimizer)
    optim = distiller.optimizer.make(distiller.parameter_groups())
    attention, fusion = (group["params"][0] for group in optim.param_groups[2:])
    velocity: dict[Any, Tensor] = {}
    for k in range(2):
        optim.zero_grad()
        losses, _ = distiller(batch_of(), START)
        torch.stack([value for terms in losses.values() for value in terms.values()]).sum().backward()
        wanted = {}
        for p, decay, looks_ahead in ((attention, 0.5, nesterov), (fusion, 1e-5, True)):
            gradient = p.grad + decay * p.detach()
            velocity[p] = gradient if k == 0 else momentum * velocity[p] + gradient
            direction = gradient + momentum * velocity[p] if looks_ahead else velocity[p]
            wanted[p] = p.detach() - 0.1 * direction
        optim.step()
        for p, value in wanted.items():
            torch.testing.assert_close(p.detach(), value)


def test_roles_of_a_run() -> None:
    distiller = distiller_of(UNEQUAL, ADMConfig())
    assert distiller.output_roles == ["teacher", "student", FUSION]
    assert distiller.phases == (("teacher", "student", FUSION),) and not distiller.unused_parameters
    assert distiller.pairs == [("student", "teacher")]
    assert list(distiller.trained()) == ["teacher", "student"]  # what is saved as a network
    extra = {key for key in distiller.state_dict() if key.startswith("method.")}  # what a resumed run gets back
    assert "method.fusion.depthwise.bn.running_mean" in extra and "method.after_stem.attentions.0.conv.weight" in extra


def test_evaluation_runs_both_together() -> None:
    distiller = distiller_of(UNEQUAL).train()
    images = batch_of()["image"]
    outputs = distiller.outputs(images)
    alone: Any = distiller.networks["student"]
    with torch.no_grad():
        alone.eval()
        assert not torch.allclose(outputs["student"].logits, alone(distiller.views(images)["student"]))
    # The peer's weights alone change what the student says.
    nn.init.normal_(distiller.networks["teacher"].stem.weight)  # type: ignore[union-attr, arg-type]
    changed = distiller.outputs(images)["student"].logits
    assert not torch.allclose(outputs["student"].logits, changed)


def test_losses_are_in_full_precision_under_autocast() -> None:
    distiller = distiller_of(UNEQUAL, ADMConfig())
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = distiller(batch_of(), START)
    values = [value for terms in losses.values() for value in terms.values()]
    assert all(value.dtype == torch.float32 and value.isfinite() for value in values)


def test_a_network_alone_is_not_afids_and_says_so(tmp_path: Path) -> None:
    distiller = distiller_of(UNEQUAL)
    with pytest.warns(UserWarning, match="student: trained by AFID, it needs its peer's attention"):
        assert distiller.export("student") is distiller.networks["student"]
    weights = {role: (distiller.networks[role].state_dict(), distiller.metadata(role)) for role in distiller.trained()}
    folder = save_checkpoint(tmp_path, 1, weights, {})
    file = folder / "student.safetensors"
    assert read_metadata(file)["export_note"] == AFID.export_note
    older = tmp_path / "older/student.safetensors"  # of a version that named the note otherwise
    older.parent.mkdir()
    said = distiller.metadata("student")
    save_file(load_file(file), older, {**said, "caveat": said.pop("export_note")})
    for written in (file, older):
        with pytest.warns(UserWarning, match="student.safetensors: trained by AFID.*its figures are not AFID's"):
            command = weights_command(parse_options(["--weights", str(written), "--data.name", "digits"]))
        assert command.config.networks["student"].name == "cifar_resnet8"


@pytest.mark.parametrize("count", [1, 3])
def test_other_than_two_networks_are_refused(count: int) -> None:
    roles = ("teacher", "student", "student_2")[3 - count :]
    with pytest.raises(InputError, match=f"AFID trains exactly two networks, and there are {count}"):
        AFID().check(TrainConfig(), roles, [])


def test_unknown_stems_are_refused() -> None:
    with pytest.raises(InputError, match="does not know where the stem of MobileNetV3 ends: it knows the CIFAR"):
        split_at_stem(create_network("mobilenetv3_small_050", CLASSES))


@pytest.mark.parametrize(("name", "value"), [("tau", 0.0), ("tau", -1.0), ("weight", -0.1), ("ramp", -1)])
def test_values_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"afid.{name} must"):
        AFIDOptions(**{name: value})
