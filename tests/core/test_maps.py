"""Maps of sequences, images and volumes: which pairs are refused, and every loss against images and plain matrices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core import Adapter, ADMLoss, InputError, feature_loss, mutual_loss, phi_loss, spatial_similarity
from core import adm as adm_module
from core.adm import attend, consensus_attention, control, divergence_attention, resize_similarity
from core.analysis.attention import AttentionStatistics
from core.maps import check_maps, pool_to, smaller_size

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
B, C, K = 3, 4, 5
SIZES = [(12,), (3, 4), (2, 3, 2)]

Shape = tuple[int, ...]


def map_of(channels: int, size: Sequence[int], batch: int = B) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, requires_grad=True)


class Head(nn.Module):
    """Average pooling over all places and a linear classifier."""

    def __init__(self, channels: int = C, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, K, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(dim=2))


# Which pairs.

COMPARABLE: list[tuple[str, Shape, Shape]] = [
    ("equal sizes, other channels", (4, 64, 7, 7), (4, 512, 7, 7)),
    ("one twice the other", (4, 8, 7, 7), (4, 8, 14, 14)),
    ("8 is 7 plus rounding", (4, 8, 8, 8), (4, 8, 7, 7)),
    ("an odd image, halved", (4, 8, 13, 25), (4, 8, 7, 13)),
    ("stride 8 against 32", (2, 8, 64, 128), (2, 8, 16, 32)),
    ("CIFAR, small", (128, 64, 8, 8), (128, 256, 8, 8)),
    ("few channels", (2, 3, 4, 4), (2, 3, 4, 4)),
    ("as many channels as rows", (4, 7, 7, 7), (4, 7, 7, 7)),
    ("a line of text", (8, 512, 1, 26), (8, 256, 1, 26)),
    ("a long line of text", (8, 512, 1, 512), (8, 512, 1, 512)),
    ("EEG: few channels, one row", (16, 8, 1, 256), (16, 16, 1, 256)),
    ("audio: mel bands and frames", (8, 2048, 2, 31), (8, 512, 4, 62)),
    ("audio: long", (2, 64, 8, 1024), (2, 128, 8, 1024)),
    ("audio: 8 channels, 8 bands, 100 frames", (2, 8, 8, 100), (2, 8, 8, 100)),
    ("audio: 8 channels, 8 bands, 250 frames", (2, 8, 8, 250), (2, 8, 8, 250)),
    ("lidar of 64 beams", (2, 64, 64, 2048), (2, 32, 64, 2048)),
    ("lidar of 16 beams", (2, 16, 16, 1024), (2, 32, 16, 1024)),
    ("segmentation of wide images", (2, 19, 16, 512), (2, 19, 16, 512)),
    ("a sequence", (4, 64, 100), (4, 128, 50)),
    ("a waveform", (2, 512, 1499), (2, 768, 749)),
    ("spectra as channels", (2, 80, 320), (2, 256, 320)),
    ("a video", (2, 432, 16, 7, 7), (2, 512, 8, 7, 7)),
    ("a flat volume", (2, 32, 4, 64, 64), (2, 64, 2, 16, 16)),
    ("one row in the end", (2, 8, 1, 4), (2, 8, 2, 8)),
]

REFUSED: list[tuple[Shape, Shape, str]] = [
    ((4, 8), (4, 8), r"\[B, C, L\], \[B, C, H, W\] or \[B, C, D, H, W\]"),
    ((4, 8, 7, 7), (4, 8, 49), "before global pooling"),
    ((4, 8, 1, 1, 7, 7), (4, 8, 1, 1, 7, 7), "before global pooling"),
    ((4, 8, 7, 7), (3, 8, 7, 7), "the same batch"),
    ((4, 8, 1, 1), (4, 8, 1, 1), "larger images, or cut the network earlier"),
    ((4, 8, 7, 1), (4, 8, 1, 7), "larger images, or cut the network earlier"),
    ((4, 8, 7, 7), (4, 8, 1, 1), "larger images, or cut the network earlier"),
    ((4, 8, 1), (4, 8, 1), "larger images"),
    ((4, 8, 1, 1, 1), (4, 8, 1, 1, 1), "larger images"),
    ((4, 8, 7, 7), (4, 8, 4, 9), r"\(7 x 7 against 4 x 9\)"),
    ((4, 8, 8, 8), (4, 8, 4, 8), "one aspect ratio"),
    ((4, 8, 7, 7), (4, 8, 4, 14), "one aspect ratio"),
    ((4, 8, 16, 4), (4, 8, 8, 8), "one aspect ratio"),
    ((4, 8, 4, 8, 8), (4, 8, 4, 4, 8), "one aspect ratio"),
    ((4, 7, 7, 768), (4, 7, 7, 768), r"student seems .* as_network\(model\), or give map\.permute\(0, 3, 1, 2\)"),
    ((4, 512, 7, 7), (4, 7, 7, 768), r"teacher seems .*map\.permute\(0, 3, 1, 2\)"),
    ((4, 7, 7, 384), (4, 7, 7, 768), "channels last"),
    ((4, 12, 12, 1024), (4, 12, 12, 1024), "channels last"),
    ((4, 7, 10, 768), (4, 7, 10, 768), "channels last"),
    ((4, 4, 4, 512), (4, 4, 4, 512), "channels last"),
    ((4, 1, 1, 768), (4, 1, 1, 768), "channels last"),
    ((2, 8, 7, 7, 768), (2, 8, 7, 7, 768), r"map\.permute\(0, 4, 1, 2, 3\)"),
    ((4, 197, 384), (4, 197, 768), r"class token|map\[:, 1:\]\.transpose\(1, 2\)"),
]


@pytest.mark.parametrize(("student", "teacher"), [(s, t) for _, s, t in COMPARABLE], ids=[n for n, *_ in COMPARABLE])
def test_maps_that_can_be_compared(student: Shape, teacher: Shape) -> None:
    check_maps(torch.empty(student, device="meta"), torch.empty(teacher, device="meta"))
    check_maps(torch.empty(teacher, device="meta"), torch.empty(student, device="meta"))


@pytest.mark.parametrize(("student", "teacher", "mend"), REFUSED)
def test_maps_that_cannot_be_compared(student: Shape, teacher: Shape, mend: str) -> None:
    maps = torch.zeros(student), torch.zeros(teacher)
    with pytest.raises(ValueError, match=mend) as error:
        check_maps(*maps)
    assert isinstance(error.value, InputError) and "\n" not in str(error.value)
    assert str(student) in str(error.value) and str(teacher) in str(error.value)
    with pytest.raises(InputError, match=mend):  # whose first call does the same
        ADMLoss(0.1, 0.1)(*maps, torch.zeros(len(maps[0]), dtype=torch.long), Head(), Head())


@pytest.mark.parametrize("wrong", [[torch.zeros(B, C, 3, 3)], (torch.zeros(B, C, 3, 3), []), None, {"map": 1}])
def test_several_maps_in_place_of_one(wrong: Any) -> None:
    good, target, head = torch.zeros(B, C, 3, 3), torch.zeros(B, dtype=torch.long), Head(dtype=torch.float32)
    for maps in ((wrong, good), (good, wrong)):
        with pytest.raises(InputError, match=f"not a {type(wrong).__name__}.*the last one"):
            check_maps(*maps)
        with pytest.raises(InputError, match="the last one"):
            ADMLoss(0.1, 0.1)(*maps, target, head, head)
        with pytest.raises(InputError, match=type(wrong).__name__):
            spatial_similarity(*maps)


def test_the_names_in_the_message_are_the_callers() -> None:
    with pytest.raises(InputError, match=r"of student_2 and .* of teacher_3"):
        check_maps(torch.zeros(2, 3, 1, 1), torch.zeros(2, 3, 1, 1), "student_2", "teacher_3")


def test_maps_are_looked_at_where_their_shapes_are_new_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Shape] = []

    def check(student: Tensor, teacher: Tensor) -> None:
        seen.append(tuple(student.shape))
        check_maps(student, teacher)

    monkeypatch.setattr(adm_module, "check_maps", check)
    loss, head = ADMLoss(0.1, 0.1), Head()
    for batch in (4, 4, 4, 2, 2):
        loss(map_of(C, (3, 3), batch), map_of(C, (3, 3), batch), torch.zeros(batch, dtype=torch.long), head, head)
    assert seen == [(4, C, 3, 3), (2, C, 3, 3)]
    with pytest.raises(InputError, match="single place"):  # a run whose images become too small stops there
        loss(map_of(C, (1, 1)), map_of(C, (1, 1)), torch.zeros(B, dtype=torch.long), head, head)


def test_a_teacher_map_without_gradient_is_said_once() -> None:
    s, t, y, head = map_of(C, (3, 3)), map_of(C, (3, 3)), torch.zeros(B, dtype=torch.long), Head()
    loss = ADMLoss(0.1, 0.1)
    with pytest.warns(UserWarning, match="beta trains its head alone: give beta=0") as said:
        loss(s, t.detach(), y, head, head)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(s, t.detach(), y, head, head)
        ADMLoss(0.1, 0.0)(s, t.detach(), y, head, head)  # a fixed teacher, as it should be
        ADMLoss(0.1, 0.1)(s, t, y, head, head)
        ADMLoss(0.1, 0.1)(s.detach(), t, y, head, head)  # the teacher's turn
        ADMLoss(0.1, 0.1)(s.detach(), t.detach(), y, head, head)
        with torch.no_grad():
            ADMLoss(0.1, 0.1)(s, t.detach(), y, head, head)  # looked at, not trained


# Every loss of sequences and volumes is that of the image with the same places.


def as_image(x: Tensor) -> Tensor:
    """``[B, C, *places] -> [B, C, P, 1]``."""
    return x.flatten(2).unsqueeze(3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("forms", [("ce", "ce"), ("kd", "kd")])
@pytest.mark.parametrize("channels", [(C, C), (C, 6)])
def test_adm_of_any_places_is_that_of_an_image(size: Shape, forms: Any, channels: tuple[int, int]) -> None:
    s, t = (map_of(c, size) for c in channels)
    y, previous = torch.randint(K, (B,)), torch.randn(B, K, dtype=torch.float64).softmax(1)
    heads = [Head(c) for c in channels]
    phi = None if channels[0] == channels[1] else Adapter(*channels).double()
    adm = ADMLoss(0.3, 0.7, phi, consensus=forms[0], divergence=forms[1], tau=2.0)
    wanted = [s, t, *adm.parameters(), *heads[0].parameters(), *heads[1].parameters()]

    def terms(*maps: Tensor) -> dict[str, Tensor]:
        return adm.terms(*maps, y, *heads, previous=previous, delta=0.4)

    mine, image = terms(s, t), terms(as_image(s), as_image(t))
    assert list(mine) == list(image) and (("phi" in mine) == (phi is not None))
    for name, value in mine.items():
        torch.testing.assert_close(value, image[name], **EXACT)
        for a, b in zip(
            *(torch.autograd.grad(x, wanted, allow_unused=True) for x in (value, image[name])), strict=True
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_similarity_attention_and_controls_of_any_places(size: Shape) -> None:
    s, t = map_of(C, size), map_of(C, size)
    similarity = spatial_similarity(s, t)
    assert similarity.shape == (B, *size)
    torch.testing.assert_close(similarity.flatten(1), F.cosine_similarity(s, t, dim=1).flatten(1).detach(), **EXACT)
    for attention, sign in ((consensus_attention, 1), (divergence_attention, -1)):
        weight = attention(similarity)
        mean = (1 + sign * similarity).flatten(1).mean(1) + 1e-5
        expected = (1 + sign * similarity).flatten(1) / mean[:, None]
        assert weight.shape == (B, 1, *size)
        torch.testing.assert_close(weight.flatten(1), expected, **EXACT)
        assert attend(s, similarity, attention).shape == s.shape
    shuffled = control(similarity, "shuffled")
    assert shuffled.shape == similarity.shape
    assert torch.equal(shuffled.flatten(1).sort().values, similarity.flatten(1).sort().values)
    statistics = AttentionStatistics(), AttentionStatistics()
    statistics[0].update(similarity)
    statistics[1].update(similarity.flatten(1).unsqueeze(2))
    assert statistics[0].compute() == pytest.approx(statistics[1].compute(), rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise_filter", ["none", "norm", "relu", "drop"])
@pytest.mark.parametrize("adapted", [True, False])
def test_feature_loss_of_any_places_is_that_of_an_image(size: Shape, noise_filter: Any, adapted: bool) -> None:
    s, t = map_of(C, size), map_of(6 if adapted else C, size)
    phi = Adapter(C, 6).double() if adapted else None
    mine = feature_loss(s, t, phi, noise_filter)
    image = feature_loss(as_image(s), as_image(t), phi, noise_filter)
    torch.testing.assert_close(mine, image, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(mine, s)[0], torch.autograd.grad(image, s)[0], **EXACT)


# Other sizes: pooling and resizing as matrices, one for each dimension.


def pooling(length: int, shorter: int) -> Tensor:
    """``[shorter, length]``: cell i is the mean of floor(i L / l) .. ceil((i + 1) L / l)."""
    matrix = torch.zeros(shorter, length, dtype=torch.float64)
    for i in range(shorter):
        low, high = i * length // shorter, -(-(i + 1) * length // shorter)
        matrix[i, low:high] = 1 / (high - low)
    return matrix


def resizing(length: int, longer: int) -> Tensor:
    """``[longer, length]``: linear between pixel centres, the border repeated."""
    matrix = torch.zeros(longer, length, dtype=torch.float64)
    for i in range(longer):
        x = max((i + 0.5) * length / longer - 0.5, 0.0)
        matrix[i, int(x)] += 1 - (x - int(x))
        matrix[i, min(int(x) + 1, length - 1)] += x - int(x)
    return matrix


def along(x: Tensor, size: Shape, matrix: Callable[[int, int], Tensor]) -> Tensor:
    """Applies the matrix of each trailing dimension."""
    first = x.dim() - len(size)
    for k, new in enumerate(size):
        x = (matrix(x.shape[first + k], new) @ x.movedim(first + k, -1)[..., None]).squeeze(-1).movedim(-1, first + k)
    return x


PAIRS = [((11,), (4,)), ((5,), (9,)), ((7, 8), (4, 4)), ((4, 6, 7), (2, 3, 4)), ((3, 4, 4), (6, 3, 3))]


@pytest.mark.parametrize(("size_s", "size_t"), PAIRS)
def test_unequal_sizes(size_s: Shape, size_t: Shape) -> None:
    """S at the smaller size, phi before it, resized for the larger map, its mean taken only then."""
    s, t, y = map_of(C, size_s), map_of(6, size_t), torch.randint(K, (B,))
    small = tuple(min(a, b) for a, b in zip(size_s, size_t, strict=True))
    assert smaller_size(s, t) == small
    torch.testing.assert_close(pool_to(s, small), along(s, small, pooling), **EXACT)
    phi = Adapter(C, 6).double()
    assert phi.conv is not None
    p = along(torch.einsum("dc,bc...->bd...", phi.conv.weight[:, :, 0, 0], s), small, pooling)
    q = along(t, small, pooling)
    torch.testing.assert_close(phi(s, small), p, **EXACT)
    torch.testing.assert_close(phi(s, small, frozen=True), p, **EXACT)
    similarity = (p * q).sum(1) / (p.square().sum(1).sqrt() * q.square().sum(1).sqrt())
    torch.testing.assert_close(spatial_similarity(phi(s), t), similarity.detach(), **EXACT)
    head_s, head_t = Head(C), Head(6)
    terms = ADMLoss(1.0, 1.0, phi).terms(s, t, y, head_s, head_t)
    for name, sign, feature_map, head, size in (
        ("consensus", 1, s, head_s, size_s),
        ("divergence", -1, t, head_t, size_t),
    ):
        resized = along(similarity, size, resizing)
        torch.testing.assert_close(resize_similarity(similarity, size), resized, **EXACT)
        weight = 1 + sign * resized
        weight = weight / (weight.flatten(1).mean(1)[(...,) + (None,) * len(size)] + 1e-5)
        pooled = (weight[:, None] * feature_map).flatten(2).mean(2)
        expected = -(head.fc(pooled).log_softmax(1)[torch.arange(B), y]).mean()
        torch.testing.assert_close(terms[name], expected, **EXACT)
    energy = max(q.square().sum().item(), along(s, small, pooling).square().sum().item() / 4)
    assert terms["phi"].item() == pytest.approx((q - p).square().sum().item() / energy, rel=1e-10)
    torch.testing.assert_close(phi_loss(phi(s, small), t, s), terms["phi"], **EXACT)
    torch.testing.assert_close(feature_loss(s, t, phi), (p - q).square().mean(), **EXACT)


def test_gradcheck_of_a_volume() -> None:
    s, t, y = map_of(C, (2, 2, 3)), map_of(6, (2, 4, 6)), torch.randint(K, (B,))
    phi, head_s, head_t = Adapter(C, 6).double(), Head(C), Head(6)
    adm = ADMLoss(1.0, 1.0, phi, consensus="kd")
    similarity = spatial_similarity(phi(s, smaller_size(s, t)), t)
    assert torch.autograd.gradcheck(lambda x: adm_module.consensus_loss(similarity, x, y, head_s), (s,))
    assert torch.autograd.gradcheck(lambda x: adm_module.divergence_loss(similarity, x, y, head_t), (t,))
    assert torch.autograd.gradcheck(lambda x: feature_loss(x, t, phi), (s,))
    adm(s, t, y, head_s, head_t).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (s, t, *adm.parameters()))


# phi.


def test_one_weight_serves_maps_of_all_dimensions() -> None:
    phi = Adapter(C, 6).double()
    assert {name: tuple(p.shape) for name, p in phi.state_dict().items()} == {"conv.weight": (6, C, 1, 1)}
    for size in SIZES:
        x = map_of(C, size)
        expected = torch.einsum("dc,bc...->bd...", next(phi.parameters())[:, :, 0, 0], x)
        torch.testing.assert_close(phi(x), expected, **EXACT)
    same = Adapter(C, C)
    assert same(x) is x
    torch.testing.assert_close(same(x, (1, 3, 1)), along(x, (1, 3, 1), pooling), **EXACT)


@pytest.mark.parametrize("channels", [(C, 6), (C, C)])
def test_an_adapter_of_other_channels_is_said(channels: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"Adapter\({channels[0]}, {channels[1]}\) got a map .* 5 channels"):
        Adapter(*channels)(torch.zeros(B, 5, 3, 3))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("size", SIZES)
def test_maps_and_adapter_of_different_precision(dtypes: tuple[torch.dtype, torch.dtype], size: Shape) -> None:
    """A network in bfloat16 and phi in float32, without autocast: as if both were in float32; the gradients arrive."""
    s, t = (torch.randn(B, c, *size).to(dtypes[0]).requires_grad_() for c in (C, 6))
    phi = Adapter(C, 6).to(dtypes[1])
    heads = [Head(c, dtype=dtypes[0]) for c in (C, 6)]
    adm = ADMLoss(0.5, 0.5, phi)
    terms = adm.terms(s, t, torch.randint(K, (B,)), *heads)
    full = Adapter(C, 6)
    full.load_state_dict(phi.state_dict())
    wanted = phi_loss(full(s.float()), t.float(), s.float())
    torch.testing.assert_close(terms["phi"], wanted)
    assert terms["phi"].dtype == torch.float32
    sum(terms.values(), start=torch.zeros(())).backward()
    for x in (s, t, *phi.parameters()):
        assert x.grad is not None and x.grad.dtype == x.dtype and x.grad.isfinite().all() and x.grad.abs().max() > 0
    torch.testing.assert_close(feature_loss(s, t, phi), feature_loss(s.float(), t.float(), full))


# What is no number that a weight may be.


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_weights_must_be_numbers_that_are_not_negative(value: float) -> None:
    logits = {"teacher": torch.zeros(B, K), "student": torch.ones(B, K)}
    y = torch.zeros(B, dtype=torch.long)
    for call, name in (
        (lambda: ADMLoss(value, 0.1), "alpha"),
        (lambda: ADMLoss(0.1, value), "beta"),
        (lambda: adm_module.ADMConfig(gamma=value), "gamma"),
        (lambda: mutual_loss(logits, y, value), "teacher"),
        (lambda: mutual_loss(logits, y, {"student": value}), "student"),
    ):
        with pytest.raises(ValueError, match=name) as error:
            call()
        assert isinstance(error.value, InputError) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(value: float) -> None:
    for call in (
        lambda: ADMLoss(0.1, 0.1, tau=value),
        lambda: mutual_loss(
            {"a": torch.zeros(B, K), "b": torch.zeros(B, K)}, torch.zeros(B, dtype=torch.long), 1.0, value
        ),
    ):
        with pytest.raises(InputError, match="tau"):
            call()
