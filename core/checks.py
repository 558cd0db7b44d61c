"""The start-up checks: would ADM act on a network, or on a pair of them, and mean anything?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adapter import Adapter
from .errors import InputError
from .maps import check_maps
from .network import preserved, without_zeros
from .processes import APART
from .split import CALLABLES, Split, logits_of
from .views import View

LOUD = 10.0
_TRACED = f"takes another way where it is traced, so that its two halves are not the model: {CALLABLES}"
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@torch.no_grad()
def check_network(network: nn.Module, images: Tensor, role: str = "network") -> Tensor:
    """The start-up check on one small batch ``[B, 3, H, W]``, B >= 2: would ADM act on this network, and mean anything?

    Returns: the last map ``[B, C, h, w]``. Leaves weights, buffers, modes and random state as they were.
    Raises: InputError where there are no parameters, where the map is not ``[B, C, h, w]``, has its channels last or a
        single place, where the head of the features is not the network, where the head changes the map, or where
        reweighting the map leaves the logits unchanged.
        Warns where a training-mode head moves buffers (BatchNorm behind the pooling: each extra head call moves its
        statistics), and where the network is wrapped for several processes by itself.
    """
    network = _unwrapped(network, role)
    if next(network.parameters(), None) is None:
        raise InputError(f"{role} has no parameters: name the model behind both parts, Split(features, head, model)")
    missing = [name for name in ("forward_features", "forward_head") if not hasattr(network, name)]
    if missing:
        raise InputError(f"{role}: {type(network).__name__} has no {missing[0]}: wrap it by as_network(model)")
    head: Callable[[Tensor], Tensor] = network.forward_head  # type: ignore[assignment]
    with preserved(network, images) as reset, without_zeros(network):
        # BatchNorm by batch statistics, since those of an untrained network let its logits span many decades;
        # everything else as in evaluation, since random layers would blur the comparison.
        for module in network.modules():
            module.training = isinstance(module, _BatchNorm)
        feature_map = network.forward_features(images)  # type: ignore[operator]
        _check_shape(feature_map, network, images, role)
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        version = feature_map._version
        logits = head(feature_map)
        if feature_map._version != version:
            raise InputError(f"{role}: its head changes the map in place, and is called more than once: copy it there")
        if any(not torch.equal(buffer, before[name]) for name, buffer in network.named_buffers()):
            text = f"{role}: its head moves buffers in training; each ADM term moves them again"
            warnings.warn(text, stacklevel=3)
        reset()
        whole = network(images)
        if not (isinstance(logits, Tensor) and isinstance(whole, Tensor)):
            raise InputError(f"{role}: it returns {type(whole).__name__} and its head {type(logits).__name__}: logits?")
        scale = whole.abs().max().clamp_min(1e-12)
        if logits.shape != whole.shape or (logits - whole).abs().max() > 1e-3 * scale:
            raise InputError(f"{role}: forward_head(forward_features(x)) is not forward(x): check its two halves")
        sharded = any(base.__name__ == "FSDPModule" for base in type(network).__mro__)
        if isinstance(network, Split) and network.traced and not sharded:  # a sharded one cannot be called past itself
            reset()
            logits = logits_of(network.model(images))  # type: ignore[misc]
            if logits.shape != whole.shape or (logits - whole).abs().max() > 1e-3 * scale:
                raise InputError(f"{role}: {type(network.model).__name__} {_TRACED}")
        _check_layout(head, feature_map, role)
        if not _weights_count(head, feature_map):
            raise InputError(f"{role}: its logits do not change when its map is reweighted: ADM would do nothing")
        return feature_map


def _weights_count(head: Callable[[Tensor], Tensor], feature_map: Tensor) -> bool:
    """Whether weights on a map's places change the logits; where its own values are too small to tell, by noise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(feature_map[:, :1].shape, generator=generator).to(feature_map) * 2
    for f in (feature_map, LOUD * torch.randn(feature_map.shape, generator=generator).to(feature_map)):
        logits = head(f)
        if (head(f * weight) - logits).abs().max() > 1e-6 * logits.abs().max().clamp_min(1e-12):
            return True
    return False


def _unwrapped(network: nn.Module, role: str) -> nn.Module:
    kinds = {base.__name__ for module in network.modules() for base in type(module).__mro__}
    sharded = "FSDPModule" in kinds and not {"forward_features", "forward_head"} <= vars(network).keys()
    if sharded or not kinds.isdisjoint(WRAPPERS):
        warnings.warn(f"{role} {APART}", stacklevel=4)
    return network.module if type(network).__name__ in WRAPPERS else network  # type: ignore[return-value]


def _check_shape(feature_map: object, network: nn.Module, images: Tensor, role: str) -> None:
    if not isinstance(feature_map, Tensor):
        raise InputError(
            f"{role}: its features are {type(feature_map).__name__}, not a map [B, C, H, W]; see as_network, Split"
        )
    shape, fmt = tuple(feature_map.shape), getattr(network, "output_fmt", "NCHW")
    if not 3 <= len(shape) <= 5 or (images.dim() == 4 and len(shape) != 4):
        raise InputError(f"{role}: its features are {shape}, not a map [B, C, H, W]; see as_network, Split")
    if fmt in ("NHWC", "NLC") and not isinstance(network, View):
        raise InputError(f"{role}: its features {shape} are {fmt}, channels last: wrap it by as_network(model)")
    if math.prod(shape[2:]) == 1:
        raise InputError(
            f"{role}: its last map is 1 x 1 at {tuple(images.shape[-2:])} pixels, where every attention is 1 and ADM "
            "does nothing: use larger images or a network with a smaller stride, and split it before its pooling"
        )


def _check_layout(head: Callable[[Tensor], Tensor], feature_map: Tensor, role: str) -> None:
    places = range(2, feature_map.dim())
    if pools(head, feature_map, places):
        return
    try:
        last = pools(head, feature_map, range(1, feature_map.dim() - 1))
    except Exception:  # a head that can do without the channels is not what it seems
        return
    if last:
        raise InputError(
            f"{role}: its head averages over dimensions 1 to {feature_map.dim() - 2} of its features "
            f"{tuple(feature_map.shape)}, so that they have their channels last: wrap it by as_network(model), or "
            "permute them in features and in head"
        )


def pools(head: Callable[[Tensor], Tensor], like: Tensor, dims: range, start: int = 0) -> bool:
    """Whether a head sees the mean over ``dims`` of its input alone (from ``start`` of the first of them on).

    It is shown noise of the size of ``like``, and the same noise with something added whose mean is zero.
    """
    generator = torch.Generator().manual_seed(1)
    noise, added = (torch.randn(like.shape, generator=generator).to(like) for _ in range(2))
    part = added.narrow(dims[0], start, like.shape[dims[0]] - start)
    added = torch.cat([0 * added.narrow(dims[0], 0, start), part - part.mean(tuple(dims), keepdim=True)], dims[0])
    # Large values: attention with new weights would weight small ones all alike.
    before, after = head(LOUD * noise), head(LOUD * (noise + added))
    limit = max(1e-4, 16 * torch.finfo(like.dtype).eps)
    return bool((after - before).abs().max() <= limit * (before.amax(0) - before.amin(0)).max())


@dataclass(frozen=True)
class Pair:
    """What ``check_pair`` found: both last maps' shapes, without the batch, and whether phi is needed."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    needs_adapter: bool

    def __str__(self) -> str:
        s, t = (f"{m[0]} channels, {' x '.join(map(str, m[1:]))} places" for m in (self.student, self.teacher))
        phi = f"Adapter({self.student[0]}, {self.teacher[0]}) is needed" if self.needs_adapter else "no adapter needed"
        return f"student's map: {s}\nteacher's map: {t}\nphi: {phi}"


def check_pair(student: nn.Module, teacher: nn.Module, images: Tensor, adapter: Adapter | None = None) -> Pair:
    """The start-up check of a pair on one small batch of images ``[B, 3, H, W]``, B >= 2: call it once, and print it.

    ``adapter``: phi, where you have it already.
    Returns: shapes of both maps and whether phi is needed; ``str`` of it is three lines for people.
    Raises: InputError, a ValueError, as ``check_network`` for each, where the maps are no even reductions of one image,
        or where the adapter does not fit them. Warns as ``check_network``.
    """
    maps = [check_network(network, images, role) for network, role in ((student, "student"), (teacher, "teacher"))]
    check_maps(maps[0], maps[1])
    cs, ct = maps[0].shape[1], maps[1].shape[1]
    if adapter is not None and (adapter.student_channels, adapter.teacher_channels) != (cs, ct):
        raise InputError(
            f"the adapter is {adapter.extra_repr()}, the maps have {cs} and {ct} channels: Adapter({cs}, {ct})"
        )
    return Pair(tuple(maps[0].shape[1:]), tuple(maps[1].shape[1:]), cs != ct)
