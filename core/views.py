"""timm models whose features are no map ``[B, C, H, W]``, seen as Networks.

A view is the model itself under another class: it shares the model's ``__dict__`` and so its parameters, buffers,
hooks and modes, names them alike, and has every other method of the model's class. What is saved loads strictly in timm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


class View(nn.Module):
    """What stands before a model's own class. ``self`` is the model: ``super()`` calls timm's methods."""

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` -> logits ``[B, K]``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the last map ``[B, C, h, w]``."""
        return self.forward_intermediates(x, indices=1)[0]

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Images -> (the last map, the stage maps)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map -> logits."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: a copy or an unpickled view makes it anew from its two parts.
        kind, own = type(self).__bases__
        return _empty, (kind, own), self.__dict__.copy()


class ChannelsLastFeatures(View):
    """timm models that hand out ``[B, H, W, C]`` (Swin, MambaOut, ...)."""

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        final, maps = super().forward_intermediates(x, indices=indices)
        return final.permute(0, 3, 1, 2), maps

    def forward_head(self, x: Tensor) -> Tensor:
        return super().forward_head(x.permute(0, 2, 3, 1))


class TokenFeatures(View):
    """timm transformers with patch tokens ``[B, prefix + N, C]`` and average pooling: the map is the N patch tokens."""

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        model: Any = self
        if indices is None:
            blocks = len(model.feature_info)
            indices = sorted({round((k + 1) * blocks / 4) - 1 for k in range(4)}) if blocks >= 4 else None
        final, maps = super().forward_intermediates(x, indices=indices)
        h, w = maps[-1].shape[-2:]
        patches = final[:, getattr(model, "num_prefix_tokens", 0) :]  # [B, N, C]
        return patches.transpose(1, 2).unflatten(2, (h, w)), maps

    def forward_head(self, x: Tensor) -> Tensor:
        model: Any = self
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C]
        # Average pooling leaves the prefix tokens out: their values do not matter.
        if prefix := getattr(model, "num_prefix_tokens", 0):
            tokens = torch.cat([tokens.new_zeros(len(tokens), prefix, tokens.shape[2]), tokens], dim=1)
        return super().forward_head(tokens)


Kind = TypeVar("Kind", bound=View)


def view(kind: type[Kind], model: nn.Module) -> Kind:
    """The model as a ``kind``: another object of the same state. The model's own object stays as it is."""
    seen = _empty(kind, type(model))
    object.__setattr__(seen, "__dict__", model.__dict__)
    return seen


def _empty(kind: type[Kind], own: type[nn.Module]) -> Kind:
    made = _class(kind, own)
    return made.__new__(made)


@lru_cache(maxsize=None)
def _class(kind: type[Kind], own: type[nn.Module]) -> type[Kind]:
    return type(own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})
