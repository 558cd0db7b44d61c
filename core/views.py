"""timm models whose features are no map ``[B, C, H, W]``, seen as Networks.

A view is the model itself under another class: it shares the model's ``__dict__`` and so its parameters, buffers,
hooks and modes, names them alike, and has every other method of the model's class. What is saved loads strictly in
timm.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .network import preserved


class View(nn.Module):
    """What stands before a model's own class. ``self`` is the model: ``super()`` calls timm's methods."""

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` -> logits ``[B, K]``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the last map ``[B, C, h, w]``."""
        return self.forward_intermediates(x, indices=1)[0]

    _made_of: ClassVar[tuple[Any, Any]]

    if TYPE_CHECKING:  # of the model's class, which comes behind this one

        def forward_intermediates(self, x: Tensor, **options: Any) -> Any: ...

        def forward_head(self, x: Tensor) -> Tensor: ...

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: a copy or an unpickled view makes it anew from its two parts.
        kind, own = type(self)._made_of
        if type(self) is not _class(kind, own):  # FSDP, parametrisations: a class on top of this one
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        return _empty, (kind, own), self.__dict__.copy()


class ChannelsLastFeatures(View):
    """timm models that hand out ``[B, H, W, C]`` (Swin, MambaOut, ...)."""

    def forward_intermediates(self, x: Tensor, indices: Any = None, **options: Any) -> Any:
        """Images -> (the last map, the stage maps); with further options, timm's own answer."""
        final, maps = super().forward_intermediates(x, indices=indices, **options)
        return (final, maps) if options else (final.permute(0, 3, 1, 2), maps)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map -> logits."""
        return super().forward_head(x.permute(0, 2, 3, 1))


class TokenFeatures(View):
    """timm transformers with patch tokens ``[B, prefix + N, C]`` and average pooling: the map is the N patch tokens."""

    def forward_intermediates(self, x: Tensor, indices: Any = None, **options: Any) -> Any:
        """Images -> (the last map, the maps of up to four blocks); with further options, timm's own answer."""
        if options:
            return super().forward_intermediates(x, indices=indices, **options)
        model: Any = self
        if indices is None:
            blocks = len(model.feature_info)
            indices = sorted({round((k + 1) * blocks / 4) - 1 for k in range(4)}) if blocks >= 4 else None
        final, maps = super().forward_intermediates(x, indices=indices)
        h, w = maps[-1].shape[-2:]
        patches = final[:, getattr(model, "num_prefix_tokens", 0) :]  # [B, N, C]
        return patches.transpose(1, 2).unflatten(2, (h, w)), maps

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map -> logits."""
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
    made: Any = _class(kind, own)  # type: ignore[arg-type]
    return made.__new__(made)


@cache
def _class(kind: type[Kind], own: type[nn.Module]) -> type[Kind]:
    return type(
        own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__, "_made_of": (kind, own)}
    )


# timm models whose features are tokens [B, N, C] without any attribute that tells so.
TOKEN_MODELS = ("MlpMixer", "EfficientFormer", "Hiera", "Levit", "LevitDistilled", "Twins")


def seen_as_network(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A model with timm's interface: itself where its features are a map, else its view.

    Args: as of ``as_network``. Raises: InputError for class tokens, attention pooling and two predictions.
    """
    name = type(model).__name__
    if getattr(model, "distilled_training", False):
        raise InputError(f"{name} returns two predictions while it trains: leave its distilled_training off")
    pooling = getattr(model, "global_pool", "avg")
    if pooling in ("token", "map") or getattr(model, "attn_pool", None) is not None:
        raise InputError(
            f"{name} classifies by its class token or by attention pooling (global_pool={pooling!r}), not by the mean "
            "of its map: weights on the map's locations would do nothing, or not what ADM means by them. Create it "
            "with global_pool='avg', or take another family"
        )
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return view(ChannelsLastFeatures, model)
    tokens = name in TOKEN_MODELS and not getattr(model, "use_conv", False)  # LeViT has both layouts
    if tokens or hasattr(model, "num_prefix_tokens") or getattr(model, "output_fmt", "NCHW") == "NLC":
        return view(TokenFeatures, model)
    if images is not None:
        with torch.no_grad(), preserved(model, images):
            features = model.eval().forward_features(images)  # type: ignore[operator]
        if isinstance(features, Tensor) and features.dim() == 3:
            return view(TokenFeatures, model)
    return model
