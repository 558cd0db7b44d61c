"""The ways in which people copy a network, by which a copy must compute with weights of its own."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

WAYS = ("deepcopy", "pickle", "torch.save", "AveragedModel", "ModelEmaV3")


def changed(network: nn.Module) -> None:
    """Gives it other weights, in place."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.5).add_(0.1)


def copied(network: nn.Module, way: str) -> Any:
    """The network once more, of its class."""
    if way == "deepcopy":
        return copy.deepcopy(network)
    if way == "pickle":
        return pickle.loads(pickle.dumps(network))
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    if way == "AveragedModel":
        return torch.optim.swa_utils.AveragedModel(network).module
    return pytest.importorskip("timm.utils").ModelEmaV3(network).module
