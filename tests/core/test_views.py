"""Views of timm models: they are the model under another class, with its names, methods and weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from copies import WAYS, changed, copied
from torch import Tensor, nn

from core import as_network

timm = pytest.importorskip("timm")
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2, "global_pool": "avg"},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 12,
        "depths": (1, 1, 1),
        "num_heads": (1, 2, 2),
    },
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **OPTIONS[name])


def images(name: str) -> Tensor:
    return torch.randn(2, 3, OPTIONS[name]["img_size"], OPTIONS[name]["img_size"])


@pytest.fixture(params=OPTIONS)
def name(request: Any) -> str:
    return request.param


def test_a_view_is_the_model_and_leaves_its_object_alone(name: str) -> None:
    model, x = model_of(name), images(name)
    own = type(model)
    features = model.eval().forward_features(x)
    network: Any = as_network(model)
    assert isinstance(network, own) and type(model) is own and network is not model
    assert torch.equal(model.forward_features(x), features) and model.forward_features(x).shape != network(x).shape
    network.train()
    assert model.training
    nn.init.ones_(network.head.weight if name.startswith("vit") else network.head.fc.weight)
    assert torch.equal(model.eval()(x), network(x))
    new = nn.Linear(1, 1)
    network.extra = new
    assert model.extra is new


def test_names_and_hooks_are_timms(name: str) -> None:
    model = model_of(name)
    network: Any = as_network(model)
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(network.state_dict()) == list(model.state_dict())
    assert network.no_weight_decay() == model.no_weight_decay()
    from timm.optim import create_optimizer_v2

    ours, theirs = (create_optimizer_v2(m, "adamw", 0.1, 0.1).param_groups for m in (network, model))
    assert [[id(p) for p in g["params"]] for g in ours] == [[id(p) for p in g["params"]] for g in theirs]
    if name.startswith("vit"):
        [decay] = [g["weight_decay"] for g in ours if any(p is model.pos_embed for p in g["params"])]
        assert decay == 0
    assert network.group_matcher() == model.group_matcher()
    network.set_grad_checkpointing(True)
    assert model.grad_checkpointing if name.startswith("vit") else model.layers[0].grad_checkpointing
    network.set_grad_checkpointing(False)
    network.reset_classifier(7)
    assert network(images(name)).shape == (2, 7) == model(images(name)).shape
    assert network.get_classifier() is model.get_classifier()


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_with_its_own_weights(name: str, way: str) -> None:
    network, x = as_network(model_of(name).eval()), images(name)
    twin = copied(network, way)
    assert type(twin) is type(network)
    before = network(x)
    changed(network)
    assert not torch.allclose(network(x), before)
    torch.testing.assert_close(twin.forward_head(twin.forward_features(x)), before)


def test_functional_call_and_compile(name: str) -> None:
    network, x = as_network(model_of(name).eval()), images(name)
    values = {n: p * 0.5 for n, p in network.named_parameters()}
    assert not torch.allclose(torch.func.functional_call(network, values, (x,)), network(x))
    torch.testing.assert_close(torch.compile(network, backend="eager")(x), network(x))
    halves: Any = torch.compile(lambda x: network.forward_head(network.forward_features(x)), backend="eager")  # type: ignore[operator]
    torch.testing.assert_close(halves(x), network(x))


def test_timms_own_options_of_forward_intermediates() -> None:
    name = "vit_tiny_patch16_224"
    model, x = model_of(name).eval(), images(name)
    network: Any = as_network(model)
    ours = network.forward_intermediates(x, indices=2, intermediates_only=True, output_fmt="NLC")
    theirs = model.forward_intermediates(x, indices=2, intermediates_only=True, output_fmt="NLC")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert network.get_intermediate_layers(x, n=1)[0].shape == model.get_intermediate_layers(x, n=1)[0].shape


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_and_distributed_checkpoints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    network, x = as_network(model_of(name)), images(name)
    wrapped = nn.parallel.DistributedDataParallel(network)
    wrapped(x).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    state = {"model": get_model_state_dict(network), "optimizer": optimizer.state_dict()}
    monkeypatch.setenv("LOCAL_RANK", "0")  # which a checkpoint of several processes asks for
    checkpoint.save(state, checkpoint_id=tmp_path / "saved")
    other = as_network(model_of(name))
    changed(other)
    loaded = {"model": get_model_state_dict(other)}
    checkpoint.load(loaded, checkpoint_id=tmp_path / "saved")
    set_model_state_dict(other, loaded["model"])
    torch.testing.assert_close(other.eval()(x), network.eval()(x))
