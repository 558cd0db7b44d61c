"""What ADM asks of a network, and what may be asked of any network without changing it.

timm's CNNs and the CIFAR networks of `classification` are Networks as they are; ``as_network`` makes Networks of other
image classifiers, ``Split`` of any two callables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Network(Protocol):
    """``forward(x) == forward_head(forward_features(x))``, and a head that accepts a reweighted map (timm's names)."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` -> the last map ``[B, C, h, w]``."""

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map ``[B, C, h, w]`` -> logits ``[B, K]``."""

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> (the last map, the stage maps in order, the stem's first where it has one)."""


@contextmanager
def preserved(network: nn.Module, images: Tensor) -> Iterator[Callable[[], None]]:
    """Puts modes, buffers, other attributes and random state back in the end, and the buffers when what it yields is
    called.
    """
    modes = [(module, module.training) for module in network.modules()]
    # The buffer itself and its value: some networks (ConViT) replace a buffer by one of another shape.
    buffers = [(m, name, b, b.clone()) for m, _ in modes for name, b in m._buffers.items() if b is not None]

    def reset() -> None:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer.copy_(value)

    # What shards a module keeps its own account of it.
    own = [module for module, _ in modes if not type(module).__module__.startswith("torch.distributed")]
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []), kept_attributes(own):
        try:
            yield reset
        finally:
            reset()
            for module, mode in modes:
                module.training = mode


@contextmanager
def kept_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts back what modules keep beside parameters, buffers and children (LeViT: the biases that it used last)."""
    plain = (dict, list, set)
    torchs_own = vars(nn.Module()).keys()
    before = []
    for module in modules:
        own = {name: value for name, value in vars(module).items() if name not in torchs_own}
        before.append((vars(module), {name: (v, v.copy() if type(v) in plain else v) for name, v in own.items()}))
    try:
        yield
    finally:
        for attributes, kept in before:
            for name in attributes.keys() - kept.keys() - torchs_own:
                del attributes[name]
            for name, (value, copied) in kept.items():
                attributes[name] = value
                if type(value) in plain:
                    value.clear()
                    value.extend(copied) if isinstance(value, list) else value.update(copied)


@contextmanager
def without_zeros(network: nn.Module) -> Iterator[None]:
    """Random values in place of matrices that are all zero: a classifier that starts so hides what its map does."""
    generator = torch.Generator().manual_seed(0)
    zeros = [p for p in network.parameters() if p.dim() == 2 and not p.any()]
    with torch.no_grad():
        for p in zeros:
            p.copy_(torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


def stage_maps(network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One forward: the last map ``[B, C, H, W]`` and the stage maps for the feature loss, the last map at their end.

    The stem's map is left out (Algorithm 1): the CIFAR networks' first, and of timm's those of stride 2 or less.
    """
    final, maps = network.forward_intermediates(x)  # type: ignore[operator]
    info: Sequence[dict[str, Any]] = getattr(network, "feature_info", None) or []
    if len(info) == len(maps) > 1:
        if info[0]["module"] == "stem" and info[0]["reduction"] <= 2:
            maps = maps[1:]
        else:
            maps = [m for m, i in zip(maps, info, strict=True) if i["reduction"] > 2] or maps[-1:]
    return final, [*maps[:-1], final]
