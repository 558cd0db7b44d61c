"""Split of two callables and Split.at a layer: names, copies, modes, and what cannot be cut."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copies import WAYS, changed, copied
from torch import Tensor, nn
from torch.nn import functional as F

from core import InputError, Split, as_network, check_network

K = 5


class Net(nn.Module):
    """A network as they are written: functions and attributes between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(OrderedDict(one=nn.Conv2d(8, 12, 1), two=nn.Conv2d(12, 12, 1)))
        self.scale = nn.Parameter(torch.ones(12, 1, 1))
        self.register_buffer("shift", torch.zeros(12, 1, 1))
        self.fc = nn.Linear(12, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)) * self.scale + self.shift
        x = F.dropout(F.relu(x, inplace=True), 0.5, self.training)
        return self.fc(x.mean(dim=(2, 3)))


def features(m: Net, x: Tensor) -> Tensor:
    return m.body(m.stem(x))


def head(m: Net, f: Tensor) -> Tensor:
    return m.fc(F.relu(f * m.scale + m.shift).mean(dim=(2, 3)))


def by_callables() -> Split:
    return Split(features, head, Net())


MADE: dict[str, Callable[[], Any]] = {
    "callables": by_callables,
    "a layer": lambda: Split.at(Net(), "body"),
    "a layer within": lambda: Split.at(Net(), "body.two"),
    "parts": lambda: as_network(Net(), torch.randn(2, 3, 32, 32)),
}
X = torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("name", MADE)
def test_it_is_the_model(name: str) -> None:
    network = MADE[name]()
    assert check_network(network, X).shape == (4, 12, 8, 8)
    for training in (True, False):
        network.train(training)
        torch.manual_seed(0)
        whole = network.model(X)
        torch.manual_seed(0)
        parts = network.forward_head(network.forward_features(X))
        if training and name != "callables":
            assert torch.equal(parts, whole)  # with its dropout
        elif not training:
            torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_with_its_own_weights(name: str, way: str) -> None:
    network = MADE[name]().eval()
    twin = copied(network, way)
    before = network(X)
    torch.testing.assert_close(twin(X), before)
    changed(network)
    assert not torch.allclose(network(X), before)
    torch.testing.assert_close(twin.forward_head(twin.forward_features(X)), before)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin(X), network(X))


@pytest.mark.parametrize("name", MADE)
def test_names_agree(name: str) -> None:
    network = MADE[name]()
    names = {n for n, _ in network.named_parameters()}
    assert names == {f"model.{n}" for n, _ in network.model.named_parameters()}
    assert list(network.state_dict()) == [f"model.{n}" for n in network.model.state_dict()]
    values = {n: p + 1 for n, p in network.named_parameters()}
    there = torch.func.functional_call(network.eval(), values, (X,))
    assert not torch.allclose(there, network(X))
    network.load_state_dict({n: torch.zeros_like(v) for n, v in network.state_dict().items()}, assign=True)
    assert not network(X).any()


@pytest.mark.parametrize("name", MADE)
def test_it_compiles(name: str) -> None:
    network = MADE[name]()
    compiled = torch.compile(network, backend="eager")
    torch.testing.assert_close(compiled(X).shape, network(X).shape)
    network.eval()
    torch.testing.assert_close(compiled(X), network(X))
    parts = torch.compile(lambda x: network.forward_head(network.forward_features(x)), backend="eager", fullgraph=True)
    torch.testing.assert_close(parts(X), network(X))


def test_modules_need_no_model() -> None:
    m = Net()
    split = Split(nn.Sequential(m.stem, m.body), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.fc))
    assert check_network(split, X).shape == (4, 12, 8, 8)
    assert {n for n, _ in split.named_parameters()} <= set(split.state_dict())


def test_callables_that_hold_a_module_are_refused() -> None:
    m = Net()

    class Other:
        body = m

    with pytest.raises(InputError, match="features is a function, so that the model behind it must be named"):
        Split(lambda x: m.body(x), lambda f: m.fc(f))  # type: ignore[misc]
    for wrong in (lambda _, x: m.body(m.stem(x)), m.forward, m.stem, lambda _, x, m=m: m(x), lambda _, x: GLOBAL(x)):
        with pytest.raises(InputError, match="features holds a module of its own"):
            Split(wrong, head, m)
    with pytest.raises(InputError, match=r"head is called with two arguments, head\(model, x\)"):
        Split(features, lambda f: f, m)
    Split(lambda m, x: features(m, x), lambda m, f: head(m, f), m)
    Split(lambda m, x: m.GLOBAL(x), head, m)  # an attribute of that name is no module from outside


GLOBAL = nn.Conv2d(3, 8, 3)


def test_the_head_leaves_the_map_alone() -> None:
    """What follows the layer writes into it: ReLU in place."""

    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.body(self.stem(x)), inplace=True).mean(dim=(2, 3)))

    network = Split.at(Written(), "body").eval()
    feature_map = network.forward_features(X)
    before = feature_map.clone()
    network.forward_head(feature_map)
    assert torch.equal(feature_map, before) and (before < 0).any()


def test_modes_of_single_modules_count() -> None:
    """A frozen model keeps its dropout off while what holds it trains."""
    network = Split.at(Net(), "body").train()
    network.model.eval()  # type: ignore[union-attr]
    assert torch.equal(network(X), network(X))
    network.train()
    assert not torch.equal(network(X), network(X))


class Odd(Net):
    """Each way of forward that has no one place to cut behind, or cannot be traced."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.kept = way, []

    def forward(self, x: Tensor) -> Any:
        f = self.stem(x)
        if self.way == "branch" and f.sum() > 0:
            f = -f
        if self.way == "random" and self.training and torch.rand(()) < 2:
            f = 2 * f
        if self.way == "tensor":
            f = f + torch.ones(8, 1, 1)
        if self.way == "never":
            return self.fc(F.pad(f, (0, 0, 0, 0, 0, 4)).mean(dim=(2, 3)))
        b = self.body(f)
        if self.way == "twice":
            b = self.body(f) + b
        if self.way == "skip":
            b = b[:, :8] + f
            return self.fc(F.pad(b, (0, 0, 0, 0, 0, 4)).mean(dim=(2, 3)))
        if self.way == "size":
            return self.fc(b.sum(dim=(2, 3)) / x.shape[-1])
        logits = self.fc(b.mean(dim=(2, 3)))
        if self.way == "several" and self.training:
            return logits, logits
        if self.way == "dict":
            self.kept.append(b)
            return {"logits": logits}
        return logits


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("branch", r"Odd cannot be traced \(symbolically traced variables cannot be used as inputs to control flow\)"),
        ("random", "Odd draws random numbers between its modules"),
        ("tensor", "makes a tensor between its modules"),
        ("twice", "body is called more than once in one pass"),
        ("never", "body is not called in one pass"),
        ("skip", "behind body it needs more than that map, namely stem"),
        ("size", "behind body it needs more than that map, namely the images"),
        ("several", "it returns tuple and not logits, .*: create it without its auxiliary heads"),
    ],
)
def test_what_cannot_be_cut_is_refused(way: str, said: str) -> None:
    model = Odd(way)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with pytest.raises(InputError, match=said) as caught:
        Split.at(model, "body")
    assert "\n" not in str(caught.value)
    assert way == "random" or torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_outputs_with_logits() -> None:
    model = Odd("dict").eval()
    network = Split.at(model, "body")
    assert torch.equal(network(X), model(X)["logits"])
    assert len(model.kept) == 1  # nothing of the tracing


def test_unknown_layers_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown layer of Net 'boddy': did you mean 'body'"):
        Split.at(Net(), "boddy")


def test_a_model_that_is_something_else_when_traced_is_found_by_the_check() -> None:
    class Typed(Net):
        def forward(self, x: Tensor) -> Tensor:
            f = self.body(self.stem(x))
            return self.fc(f.mean(dim=(2, 3)) * (2 if isinstance(f, Tensor) else 1))

    with pytest.raises(InputError, match="Typed takes another way where it is traced"):
        check_network(Split.at(Typed(), "body"), X)
    with pytest.raises(InputError, match="the head of its features is not the model"):
        as_network(Typed(), X)
