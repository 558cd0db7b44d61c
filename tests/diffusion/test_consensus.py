"""The consensus loss as a regression against loops in float64, its gate, its controls, and who gets a gradient."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.adm import consensus_attention, control
from core.errors import InputError
from core.split import Split
from diffusion.consensus import (
    ConsensusConfig,
    classifier_loss,
    gate,
    load_classifier,
    map_loss,
    observations,
    output_loss,
    similarity,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_attention(map_student: Tensor, map_teacher: Tensor) -> list[list[list[float]]]:
    """(1 + S) / (1 + S_bar + 1e-5) by the definition: [B][h][w]."""
    result = []
    for s, t in zip(map_student, map_teacher, strict=True):
        cosines = [
            [float(s[:, i, j] @ t[:, i, j]) / math.sqrt(float(s[:, i, j] @ s[:, i, j]) * float(t[:, i, j] @ t[:, i, j]))
             for j in range(s.shape[2])]
            for i in range(s.shape[1])
        ]  # fmt: skip
        mean = sum(map(sum, cosines)) / (s.shape[1] * s.shape[2])
        result.append([[(1 + c) / (1 + mean + 1e-5) for c in row] for row in cosines])
    return result


@pytest.mark.parametrize("channels", [3, 4])  # 4 equals the batch: each image must keep its own attention
def test_output_form_equals_its_definition(channels: int) -> None:
    o, y, f_s = random(4, 2, 6, 6), random(4, 2, 6, 6, seed=1), random(4, channels, 6, 6, seed=2)
    f_t = f_s + random(4, channels, 6, 6, seed=3)
    w, g = torch.tensor([1.0, 7.0, 2.5, 30.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    a = loop_attention(f_s, f_t)
    expected = 0.0
    for n in range(4):
        total = sum(
            a[n][i][j] * float(o[n, c, i, j] - y[n, c, i, j]) ** 2 for c in range(2) for i in range(6) for j in range(6)
        )
        expected += float(g[n] * w[n]) * total / (2 * 6 * 6) / 4
    found = output_loss(o, y, consensus_attention(similarity(f_s, f_t)), g * w)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_token_counts_for_the_pixels_it_covers() -> None:
    o, y, a = random(1, 1, 4, 4), random(1, 1, 4, 4, seed=1), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).double()
    expected = sum(float(a[0, 0, i // 2, j // 2] * (o - y)[0, 0, i, j] ** 2) for i in range(4) for j in range(4)) / 16
    assert output_loss(o, y, a, torch.ones(1)).item() == pytest.approx(expected, rel=1e-12)


def test_head_and_feature_forms_equal_their_definitions() -> None:
    f_s, f_t, factor = random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1), torch.tensor([1.0, 0.0, 2.0])
    a = torch.tensor(loop_attention(f_s, f_t), dtype=torch.float64)  # [B, h, w]
    heads = [nn.Conv2d(4, 2, 3, padding=1).double() for _ in range(2)]
    weighted = [heads[i](a[:, None] * f) for i, f in enumerate((f_s, f_t))]
    expected = sum(float(factor[n]) * (weighted[0][n] - weighted[1][n]).square().mean().item() for n in range(3)) / 3
    found = map_loss("head", (f_s, f_t), heads, consensus_attention(similarity(f_s, f_t)), factor)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert heads[0].weight.grad is not None and heads[1].weight.grad is None

    expected = sum(float(factor[n]) * (a[n] * (f_t[n] - f_s[n]).square()).mean().item() for n in range(3)) / 3
    assert map_loss("feature", (f_s, f_t), (), a[:, None], factor).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_reaches_the_output_alone() -> None:
    """S and A are detached, and so is the target: the gradient is that of a fixed weight."""
    tensors = [random(2, 3, 4, 4, seed=i).requires_grad_() for i in range(4)]
    o, y, f_s, f_t = tensors
    a = consensus_attention(similarity(f_s, f_t))
    assert not a.requires_grad
    output_loss(o, y, a, torch.tensor([1.0, 3.0])).backward()
    assert y.grad is None and f_s.grad is None and f_t.grad is None and o.grad is not None
    factor = torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(o.grad, factor * a * 2 * (o - y).detach() / (3 * 4 * 4) / 2)

    map_loss("feature", (f_s, f_t), (), a, torch.ones(2)).backward()
    assert f_s.grad is not None and f_t.grad is None


def test_the_minimum_stays_where_output_and_target_are_equal() -> None:
    """With the network's freedom to choose every pixel, any positive attention has the same minimum."""
    y, f = random(2, 1, 3, 3), random(2, 4, 3, 3, seed=1)
    o = y.clone().requires_grad_()
    loss = output_loss(o, y, consensus_attention(similarity(f, random(2, 4, 3, 3, seed=2))), torch.ones(2))
    loss.backward()
    assert loss.item() == 0 and o.grad is not None and not o.grad.any()


def test_closed_gates_leave_a_finite_zero_and_divide_by_the_batch() -> None:
    o, y, a = random(4, 1, 2, 2).requires_grad_(), random(4, 1, 2, 2, seed=1), torch.ones(4, 1, 2, 2)
    closed = gate(torch.tensor([410, 500, 1024, 409.6]), 409.6)
    loss = output_loss(o, y, a, closed)
    loss.backward()
    assert loss.item() == 0 and o.grad is not None and not o.grad.any()
    one = gate(torch.tensor([409, 500, 1024, 410]), 409.6)
    assert one.tolist() == [1, 0, 0, 0] and one.dtype == torch.float32
    assert output_loss(o, y, a, one).item() == pytest.approx((o - y)[0].square().mean().item() / 4, rel=1e-6)


def test_nothing_depends_on_values_read_from_the_device() -> None:
    """A tensor without data (torch's meta device) refuses whatever a GPU would have to be waited for."""
    o, y, f_s, f_t = (torch.empty(3, 4, 5, 5, device="meta") for _ in range(4))
    w, t = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    for kind in ("none", "uniform", "shuffled"):
        s = similarity(f_s, f_t, centre=True)
        a = consensus_attention(control(s, kind))  # type: ignore[arg-type]
        opened = gate(t, 400.0)
        for loss in (output_loss(o, y, a, opened * w), map_loss("feature", (f_s, f_t), (), a, w)):
            assert loss.shape == ()
        assert all(value.shape == () for value in observations(s, opened).values())


def test_controls() -> None:
    f_s = random(3, 4, 5, 5)
    f_t = f_s + random(3, 4, 5, 5, seed=1)
    o, y, w = random(3, 2, 5, 5, seed=2), random(3, 2, 5, 5, seed=3), torch.tensor([1.0, 2.0, 0.0])
    s = similarity(f_s, f_t)
    a = consensus_attention(s)
    uniform = consensus_attention(control(s, "uniform"))
    torch.testing.assert_close(uniform, torch.ones_like(a), rtol=0, atol=2e-5)
    plain = sum(float(w[n]) * (o[n] - y[n]).square().mean().item() for n in range(3)) / 3
    assert output_loss(o, y, uniform, w).item() == pytest.approx(plain, rel=2e-5)

    shuffled = consensus_attention(control(s, "shuffled"))
    assert not torch.equal(shuffled, a)
    torch.testing.assert_close(shuffled.flatten(1).sort(dim=1)[0], a.flatten(1).sort(dim=1)[0])  # image by image
    places = [shuffled[n].flatten().argsort().argsort() for n in range(3)]
    own = [a[n].flatten().argsort().argsort() for n in range(3)]
    assert not torch.equal(places[0][own[0].argsort()], places[1][own[1].argsort()])  # each its own permutation


def test_mean_attention_is_one_and_equal_maps_weigh_nothing() -> None:
    f = random(2, 8, 4, 4)
    torch.testing.assert_close(
        consensus_attention(similarity(f, f)), torch.ones(2, 1, 4, 4).double(), rtol=0, atol=1e-5
    )
    a = consensus_attention(similarity(f, random(2, 8, 4, 4, seed=1)))
    torch.testing.assert_close(a.mean((1, 2, 3)), torch.ones(2).double(), rtol=0, atol=1e-4)
    assert a.std() > 0.1


def test_centred_similarity_ignores_what_all_places_share() -> None:
    f_s, f_t, offset = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), 50 * random(2, 3, 1, 1, seed=2)
    assert similarity(f_s + offset, f_t + offset).min() > 0.9
    torch.testing.assert_close(similarity(f_s + offset, f_t + offset, True), similarity(f_s, f_t, True))
    mean_s, mean_t = (torch.stack([f[:, c].mean((1, 2)) for c in range(3)], dim=1) for f in (f_s, f_t))
    a, b = f_s[0, :, 1, 2] - mean_s[0], f_t[0, :, 1, 2] - mean_t[0]
    assert similarity(f_s, f_t, True)[0, 1, 2].item() == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-9)


def test_half_precision_maps_are_compared_in_float32() -> None:
    f = torch.randn(2, 16, 4, 4).bfloat16()
    s = similarity(f, f)
    assert s.dtype == torch.float32 and s.max() <= 1
    o = torch.randn(2, 3, 4, 4).bfloat16().requires_grad_()
    loss = output_loss(o, torch.randn(2, 3, 4, 4), consensus_attention(s), torch.tensor([1e4, 1.0]))
    assert loss.dtype == torch.float32
    head = nn.Conv2d(16, 3, 1).bfloat16()
    assert map_loss("head", (f, f), (head, head), consensus_attention(s), torch.ones(2)).dtype == torch.float32


def test_classifier_form_is_eq_11_and_trains_what_made_the_image() -> None:
    conv, linear = nn.Conv2d(1, 6, 3, padding=1).double(), nn.Linear(6, 5).double()
    network = Split(conv, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)).requires_grad_(False)
    o, y, g = random(3, 1, 4, 4).requires_grad_(), random(3, 1, 4, 4, seed=1), torch.tensor([1.0, 0.0, 1.0])
    loss, s = classifier_loss(o, y, network, g)
    a = torch.tensor(loop_attention(conv(o).detach(), conv(y)), dtype=torch.float64)
    expected = 0.0
    for n in range(3):
        p_y, p_o = (linear((a[n] * conv(x)[n]).mean((1, 2))).softmax(0) for x in (y, o.detach()))
        expected += float(g[n] * (p_y * (p_y.log() - p_o.log())).sum()) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-9) and s.shape == (3, 4, 4)
    loss.backward()
    assert o.grad is not None and o.grad[0].any() and not o.grad[1].any()
    assert conv.weight.grad is None


def test_observations_describe_similarity_attention_and_gate() -> None:
    s = torch.tensor([[[0.5, 1.0]], [[-0.5, 0.0]]])
    seen = {name: float(value) for name, value in observations(s, torch.tensor([1.0, 0.0])).items()}
    attentions = ([1.5 / 1.75, 2 / 1.75], [0.5 / 0.75, 1 / 0.75])
    assert seen["adm/similarity"] == 0.25 and seen["adm/active"] == 0.5
    assert (seen["adm/similarity_min"], seen["adm/similarity_max"]) == (-0.5, 1.0)
    assert seen["adm/attention_std"] == pytest.approx(sum((b - a) / 2 for a, b in attentions) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": -1.0}, "adm.alpha must not be negative: -1.0"),
        ({"gate": 0.0}, r"adm.gate must be in \(0, 1\]: 0.0"),
        ({"gate": 400.0}, r"adm.gate must be in \(0, 1\]: 400.0"),
        ({"alpha": float("nan")}, "adm.alpha must be a number: nan"),
        ({"form": "classifier"}, "needs --adm.classifier"),
        ({"classifier": "resnet56:x"}, "no other form has a use for it"),
    ],
)
def test_refuses_options_that_make_no_sense(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        dataclasses.replace(ConsensusConfig(), **change)


def test_classifier_file(tmp_path: Path, shared_data: Path) -> None:
    for name in ("resnet56", "vgg16:x", "resnet57:x"):
        with pytest.raises(InputError, match="as resnet56:FILE"):
            load_classifier(name)
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        load_classifier(f"resnet20:{tmp_path / 'missing.safetensors'}")
    network = load_classifier(f"resnet20:{shared_data / 'weights/resnet20-cifar10.safetensors'}")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert network.forward_features(images).shape == (2, 64, 8, 8)
    _, logits = network.model(127.5 * images + 127.5)  # type: ignore[misc]
    torch.testing.assert_close(network(images), logits)
    assert not any(p.requires_grad for p in network.parameters())
