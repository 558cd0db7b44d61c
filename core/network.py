"""What ADM asks of a network, and how networks of other libraries come to offer it.

timm's CNNs and the CIFAR networks of `classification` are Networks as they are; ``as_network`` adapts timm's
channels-last and token models, ``Split`` makes a Network of any two callables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import InputError

# timm models whose features are tokens [B, N, C] without any attribute that tells so.
TOKEN_MODELS = ("MlpMixer", "EfficientFormer", "Hiera", "Levit", "LevitDistilled", "Twins")


@runtime_checkable
class Network(Protocol):
    """``forward(x) == forward_head(forward_features(x))``, and a head that accepts a reweighted map (timm's names)."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` -> the last map ``[B, C, h, w]``."""

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map ``[B, C, h, w]`` -> logits ``[B, K]``."""

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> (the last map, the stage maps in order, the stem's first where it has one)."""


class Split(nn.Module):
    """A Network from two callables: any torchvision, transformers or own model.

    Args:
        features: images ``[B, 3, H, W]`` -> the last map before pooling ``[B, C, h, w]``.
        head: that map -> logits ``[B, K]``.
        model: the model behind them, where they are plain functions, so that its parameters are found.

    torchvision: ``children = list(m.children())``, then
    ``Split(nn.Sequential(*children[:-2]), nn.Sequential(children[-2], nn.Flatten(), children[-1]))``.
    transformers: ``Split(lambda x: m.resnet(x).last_hidden_state, lambda f: m.classifier(m.resnet.pooler(f)), m)``.
    """

    def __init__(
        self, features: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], model: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.features, self.head, self.model = features, head, model

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        final = self.features(x)
        return final, [final]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _TimmAdapter(nn.Module):
    """A timm model whose features are not ``[B, C, H, W]``; its state dict is the timm model's own, key for key."""

    forward_head: Callable[[Tensor], Tensor]
    forward_intermediates: Callable[..., tuple[Tensor, list[Tensor]]]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.num_features: int = model.num_features
        self.num_classes: int = model.num_classes
        self.register_load_state_dict_pre_hook(_prefix_keys)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.model.state_dict(*args, **kwargs)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, indices=1)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _prefix_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


class ChannelsLastFeatures(_TimmAdapter):
    """timm models that hand out ``[B, H, W, C]`` (Swin, MambaOut, ...)."""

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        final, maps = self.model.forward_intermediates(x, indices=indices)
        return final.permute(0, 3, 1, 2), maps

    def forward_head(self, x: Tensor) -> Tensor:
        return self.model.forward_head(x.permute(0, 2, 3, 1))


class TokenFeatures(_TimmAdapter):
    """timm transformers with patch tokens ``[B, prefix + N, C]`` and average pooling: the map is the N patch tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.prefix: int = getattr(model, "num_prefix_tokens", 0)
        blocks = len(model.feature_info)
        self.stages = sorted({round((k + 1) * blocks / 4) - 1 for k in range(4)}) if blocks >= 4 else None

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        final, maps = self.model.forward_intermediates(x, indices=self.stages if indices is None else indices)
        h, w = maps[-1].shape[-2:]
        patches = final[:, self.prefix :]  # [B, N, C]
        return patches.transpose(1, 2).unflatten(2, (h, w)), maps

    def forward_head(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C]
        if self.prefix:  # average pooling leaves the prefix tokens out: their values do not matter
            tokens = torch.cat([tokens.new_zeros(len(tokens), self.prefix, tokens.shape[2]), tokens], dim=1)
        return self.model.forward_head(tokens)


def as_network(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """The model itself if it is a Network already, else the adapter for a timm model of another layout.

    Args: a model; a small batch ``[B, 3, H, W]``, with which token models that do not say so are recognised too.
    Raises: InputError where ADM could not act: class-token or attention pooling, several maps, no timm interface.
    """
    name = type(model).__name__
    if isinstance(model, (Split, _TimmAdapter)):
        return model
    missing = [m for m in ("forward_features", "forward_head", "forward_intermediates") if not hasattr(model, m)]
    if missing:
        raise InputError(f"{name} has no {missing[0]}: wrap it as core.Split(features, head), two callables")
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
        return ChannelsLastFeatures(model)
    tokens = name in TOKEN_MODELS and not getattr(model, "use_conv", False)  # LeViT has both layouts
    if tokens or hasattr(model, "num_prefix_tokens") or getattr(model, "output_fmt", "NCHW") == "NLC":
        return TokenFeatures(model)
    if images is not None:
        with torch.no_grad(), preserved(model, images):
            features = model.eval().forward_features(images)  # type: ignore[operator]
        if isinstance(features, Tensor) and features.dim() == 3:
            return TokenFeatures(model)
    return model


@contextmanager
def preserved(network: nn.Module, images: Tensor) -> Iterator[Callable[[], None]]:
    """Puts modes, buffers and random state back in the end; yields a function that puts the buffers back at once."""
    modes = [(module, module.training) for module in network.modules()]
    # The buffer itself and its value: some networks (ConViT) replace a buffer by one of another shape.
    buffers = [(m, name, b, b.clone()) for m, _ in modes for name, b in m._buffers.items() if b is not None]

    def reset() -> None:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer.copy_(value)

    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        try:
            yield reset
        finally:
            reset()
            for module, mode in modes:
                module.training = mode


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


@torch.no_grad()
def check_network(network: nn.Module, images: Tensor, role: str = "network") -> Tensor:
    """The start-up check on one small batch ``[B, 3, H, W]``, B >= 2: would ADM act on this network, and mean anything?

    Returns: the last map ``[B, C, H, W]``. Leaves weights, buffers, modes and random state as they were.
    Raises: InputError where there are no parameters, where the map is not ``[B, C, H, W]`` or has a single location,
        where the head of the features is not the network, or where reweighting the map leaves the logits unchanged.
        Warns where a training-mode head moves buffers (BatchNorm behind the pooling: each extra head call moves its
        statistics).
    """
    if next(network.parameters(), None) is None:
        raise InputError(f"{role} has no parameters: name the model behind both parts, Split(features, head, model)")
    generator = torch.Generator().manual_seed(0)
    zeros = [p for p in network.parameters() if p.dim() == 2 and not p.any()]
    head: Callable[[Tensor], Tensor] = network.forward_head  # type: ignore[assignment]
    with preserved(network, images) as reset:
        try:
            for p in zeros:  # a classifier that starts at zero (Mixer, Hiera) would hide what its map does
                p.copy_(torch.randn(p.shape, generator=generator))
            # BatchNorm by batch statistics, since those of an untrained network let its logits span many decades;
            # everything else as in evaluation, since random layers would blur the comparison.
            for module in network.modules():
                module.training = isinstance(module, _BatchNorm)
            feature_map = network.forward_features(images)  # type: ignore[operator]
            _check_map(feature_map, images, role)
            before = {name: buffer.clone() for name, buffer in network.named_buffers()}
            logits = head(feature_map)
            if any(not torch.equal(buffer, before[name]) for name, buffer in network.named_buffers()):
                text = f"{role}: its head moves buffers in training; each ADM term moves them again"
                warnings.warn(text, stacklevel=3)
            reset()
            whole = network(images)
            scale = whole.abs().max().clamp_min(1e-12)
            if logits.shape != whole.shape or (logits - whole).abs().max() > 1e-3 * scale:
                raise InputError(f"{role}: forward_head(forward_features(x)) is not forward(x): check its two halves")
            weight = torch.rand(feature_map[:, :1].shape, generator=generator).to(feature_map) * 2
            if (head(feature_map * weight) - logits).abs().max() <= 1e-6 * scale:
                raise InputError(f"{role}: its logits do not change when its map is reweighted: ADM would do nothing")
            return feature_map
        finally:
            for p in zeros:
                p.zero_()


def _check_map(feature_map: object, images: Tensor, role: str) -> None:
    if not isinstance(feature_map, Tensor) or feature_map.dim() != 4:
        shape = tuple(feature_map.shape) if isinstance(feature_map, Tensor) else type(feature_map).__name__
        raise InputError(f"{role}: its features are {shape}, not a map [B, C, H, W]; see core.as_network, core.Split")
    if feature_map.shape[-2:].numel() == 1:
        raise InputError(
            f"{role}: its last map is 1 x 1 at {tuple(images.shape[-2:])} pixels, where every attention is 1 and ADM "
            "does nothing: use larger images or a network with a smaller stride, and split it before its pooling"
        )


def check_pair(map_student: Tensor, map_teacher: Tensor, student: str = "student", teacher: str = "teacher") -> None:
    """Refuses maps that cannot be compared location by location (one is not an even reduction of the same image).

    Raises: InputError where the aspect ratios differ by more than rounding a side up or down explains: 8 x 8 against
        4 x 8 or 16 x 4, but not 7 x 7 against 4 x 4.
    """
    (hs, ws), (ht, wt) = map_student.shape[-2:], map_teacher.shape[-2:]
    h, w, large_h, large_w = min(hs, ht), min(ws, wt), max(hs, ht), max(ws, wt)
    # h is large_h / r rounded, so that large_h / (h + 1) < r < large_h / (h - 1), and w alike: is there such an r?
    one_ratio = large_h * (w - 1) < large_w * (h + 1) and large_w * (h - 1) < large_h * (w + 1)
    if (hs - ht) * (ws - wt) < 0 or not one_ratio:
        raise InputError(
            f"the maps of {student} ({hs} x {ws}) and {teacher} ({ht} x {wt}) cannot be compared location by location: "
            "give both networks images of one aspect ratio"
        )
