"""What every family of networks is asked, for the sweeps over the libraries."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from core import Split, as_network, check_network
from core.network import without_zeros
from core.split import logits_of

K = 5


def ask(model: nn.Module, x: Tensor, **given: Any) -> nn.Module:
    """Makes a Network of a model and asserts all that ADM needs of it. Raises: InputError where it is refused."""
    network: Any = as_network(model, **given)
    keys = list(model.state_dict())
    check_network(network, x)
    for training in (False, True):
        network.train(training)
        state = copy.deepcopy(network.state_dict())
        torch.manual_seed(3)
        whole = logits_of(model(x)).detach()
        network.load_state_dict(state)  # batch statistics moved
        torch.manual_seed(3)
        parts = network.forward_head(feature_map := network.forward_features(x)).detach()
        limit = 1e-4 * float(whole.abs().max())
        assert torch.allclose(parts, whole, rtol=1e-4, atol=limit), "the two halves are not the whole"
        network.load_state_dict(state)
        torch.manual_seed(3)
        assert torch.allclose(logits_of(network(x)), whole, rtol=1e-4, atol=limit), "forward is not the model's"
    assert feature_map.dim() == 4
    for module in network.modules():  # as in the check: by batch statistics, and without dropout
        module.training = isinstance(module, _BatchNorm)
    dims = max(p.dim() for p in network.parameters())  # of the patches' or the first convolution
    with without_zeros(network):
        network.forward_head(network.forward_features(x)).logsumexp(1).sum().backward()
    first = next(p for p in network.parameters() if p.requires_grad and p.dim() == dims)
    assert first.grad is not None and first.grad.abs().max() > 0, "no gradient reaches the backbone"
    network.zero_grad()
    same_names(network, model, keys)
    a_copy_has_its_own_weights(network, x)
    return network


def same_names(network: nn.Module, model: nn.Module, keys: list[str]) -> None:
    """State dict and named parameters agree, and what is saved loads strictly in the library."""
    state = network.state_dict()
    assert {name for name, _ in network.named_parameters(remove_duplicate=False)} <= state.keys()
    assert [name.removeprefix("model.") for name in state] == keys
    model.load_state_dict((network.model if isinstance(network, Split) else network).state_dict())  # type: ignore[union-attr]


def a_copy_has_its_own_weights(network: nn.Module, x: Tensor) -> None:
    network.train().eval()  # drops what LeViT keeps for evaluation, and cannot copy
    twin: Any = copy.deepcopy(network)
    with torch.no_grad():
        before = network(x)
        assert torch.allclose(twin(x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
        for p in network.parameters():
            p.mul_(0.5).add_(0.01)
        after, same = network(x), twin.forward_head(twin.forward_features(x))
    assert torch.allclose(same, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert not torch.equal(after, before)
