"""as_network by parts: families of timm, torchvision and transformers, and why others are refused."""

from __future__ import annotations

from typing import Any

import families
import pytest
import timm_names
import tiny
import torch
from torch import Tensor, nn

from core import InputError, Split, as_network, check_network
from core.split import Cut

K = families.K
CUTS = {  # torchvision: the value behind which each is cut, and the shape of the map at 64 pixels
    "resnet18": ("layer4", (512, 2, 2)),
    "densenet121": ("relu", (1024, 2, 2)),
    "mobilenet_v3_small": ("features", (576, 2, 2)),
    "shufflenet_v2_x0_5": ("conv5", (1024, 2, 2)),
    "squeezenet1_1": ("features", (512, 3, 3)),
    "convnext_tiny": ("features", (768, 2, 2)),
    "swin_t": ("permute", (768, 2, 2)),
    "alexnet": ("features", (256, 3, 3)),
}


@pytest.mark.parametrize("name", CUTS)
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    size = 128 if name == "alexnet" else 64
    torch.manual_seed(0)
    network: Any = as_network(models.get_model(name, weights=None, num_classes=K), x := torch.randn(2, 3, size, size))
    target, shape = CUTS[name]
    cut: Cut = network.features.__self__
    assert cut.at[1] == target and cut.layout == "NCHW"
    assert check_network(network, x).shape[1:] == shape
    families.a_copy_has_its_own_weights(network, x)


FAST = ("resnet", "swin", "beit", "mobilenet_v2", "pvt_v2", "segformer", "siglip", "regnet")
LAYOUTS = {"beit": "NLC", "siglip": "NLC", "swin": "NLC", "pvt_v2": "NLC"}


@pytest.mark.parametrize("kind", FAST)
def test_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, size = tiny.build(kind, dict(tiny.classes())[kind], K)
    network: Any = families.ask(model, x := torch.randn(2, 3, size, size), images=x)
    assert isinstance(network, Split) and network(x).shape == (2, K)
    if kind != "segformer":
        assert network.features.__self__.layout == LAYOUTS.get(kind, "NCHW")


def test_images_of_the_size_that_the_model_names() -> None:
    pytest.importorskip("transformers")
    model, size = tiny.build("beit", "BeitForImageClassification", K)
    network: Any = as_network(model)
    assert network.forward_features(torch.randn(1, 3, size, size)).shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vit", "ViTForImageClassification classifies by its class token"),
        ("deit", "classifies by its class token"),
        ("dinov2", "by its class token and the mean of its map together"),
        ("cvt", "has no one map of several places"),
        ("imagegpt", r"fails on images \(2, 3, 64, 64\)"),
    ],
)
def test_transformers_that_are_refused(kind: str, said: str) -> None:
    pytest.importorskip("transformers")
    model, size = tiny.build(kind, dict(reversed(tiny.classes()))[kind], K)
    with pytest.raises(InputError, match=said) as caught:
        as_network(model, torch.randn(2, 3, size, size))
    assert "\n" not in str(caught.value)


def test_auxiliary_heads_and_single_places_are_refused() -> None:
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(InputError, match=r"GoogLeNetOutputs and not logits.*without its auxiliary heads"):
        as_network(models.googlenet(num_classes=K, init_weights=False), torch.randn(2, 3, 64, 64))
    as_network(models.googlenet(num_classes=K, init_weights=False, aux_logits=False), torch.randn(2, 3, 64, 64))
    with pytest.raises(InputError, match=r"ResNet: its last map is 1 x 1 at 32 x 32 pixels.*give larger images"):
        as_network(models.resnet18(num_classes=K), torch.randn(2, 3, 32, 32))


class AttentionPooled(nn.Module):
    """New weights attend almost evenly: it must not pass for a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.query, self.fc = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 1), nn.Linear(16, K)
        nn.init.normal_(self.query.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x).flatten(2).transpose(1, 2)
        return self.fc((self.query(tokens).softmax(dim=1).transpose(1, 2) @ tokens).squeeze(1))


class WithClassToken(nn.Module):
    def __init__(self, uses: str) -> None:
        super().__init__()
        self.body, self.token, self.fc = (
            nn.Conv2d(3, 16, 8, stride=8),
            nn.Parameter(torch.randn(1, 1, 16)),
            nn.Linear(16, K),
        )
        self.mix, self.uses = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), uses

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), self.body(x).flatten(2).transpose(1, 2)], dim=1)
        tokens = self.mix(tokens)
        if self.uses == "token":
            return self.fc(tokens[:, 0])
        return self.fc(tokens[:, 1:].mean(dim=1) if self.uses == "mean" else tokens.mean(dim=1))


def test_own_models() -> None:
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(InputError, match="has no one map of several places"):
        as_network(AttentionPooled(), x)
    with pytest.raises(InputError, match="classifies by its class token, or by others"):
        as_network(WithClassToken("token"), x)
    with pytest.raises(InputError, match="class token and the mean of its map together"):
        as_network(WithClassToken("all"), x)
    network = families.ask(WithClassToken("mean"), x, images=x)
    wide: Any = network.forward_features(torch.randn(2, 3, 32, 64))  # type: ignore[operator]
    assert wide.shape == (2, 16, 4, 8)


def test_the_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = WithClassToken("mean").train()
    model.mix.eval()
    nn.init.zeros_(model.fc.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    as_network(model)
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_check_does_not_spoil_what_a_model_keeps_for_evaluation() -> None:
    """LeViT keeps its attention biases, which start at zero, from one pass in evaluation mode to the next."""
    timm = pytest.importorskip("timm")
    options = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (1, 1, 1), "key_dim": 8}
    model, x = timm.create_model("levit_128s", num_classes=K, **options).eval(), torch.randn(2, 3, 224, 224)
    before = model(x)
    model.train().eval()  # drops them
    check_network(as_network(model), x)
    torch.testing.assert_close(model(x), before)


# Sweeps: every family is either right or refused with a reason.


def outcome(model: nn.Module, x: Tensor) -> str:
    try:
        families.ask(model, x, images=x)
    except InputError as error:
        if "1 x 1" not in str(error) or x.shape[-1] > 200:
            return str(error)
        return outcome(model, torch.randn(2, 3, 2 * x.shape[-1], 2 * x.shape[-1]))
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "size"), timm_names.CONFIGURATIONS)
def test_every_timm_configuration(name: str, options: dict[str, Any], size: int) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=K, **options)
    size = model.pretrained_cfg["input_size"][-1] if size == 224 else size
    said = outcome(model, torch.randn(2, 3, size, size))
    assert not said or any(word in said for word in timm_names.REASONS), said


@pytest.mark.slow
def test_every_torchvision_model() -> None:
    models = pytest.importorskip("torchvision.models")
    refused = {}
    for name in models.list_models(module=models):
        with torch.device("meta"):
            size = sum(p.numel() for p in models.get_model(name, weights=None).parameters())
        if size < 30e6:
            side = 224 if name.startswith(("vit", "maxvit")) else 107 if name.startswith("inception") else 64
            refused[name] = outcome(models.get_model(name, weights=None, num_classes=K), torch.randn(2, 3, side, side))
    assert {name for name, said in refused.items() if said} == {"googlenet", "inception_v3"}, refused


REFUSED = {  # model types of transformers
    "class token": {"deit", "dinov2", "dinov2_with_registers", "pvt", "vit", "vit_msn"},
    "no one map": {"cvt"},
    "fails on images": {"imagegpt", "siglip2"},  # colours as words; patches
    "cannot be traced": {"perceiver"},
    "fails within hiera": {"hiera"},
    "not logits": {"pp_lcnet"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), tiny.classes())
def test_every_transformers_class(kind: str, name: str) -> None:
    if kind in tiny.UNFIT:
        pytest.skip("cannot be made small")
    try:
        model, size = tiny.build(kind, name, K)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    said = outcome(model, torch.randn(2, 3, size, size))
    expected = [reason for reason, kinds in REFUSED.items() if kind in kinds]
    assert bool(said) == bool(expected) and all(reason in said for reason in expected), said
