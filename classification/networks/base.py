"""The one shape of all CIFAR networks: stem, stages, perhaps a neck; average pooling and a linear layer as the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import InputError


class ConvBN(nn.Sequential):
    """A square convolution ("same" padding) and its BatchNorm; no activation."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(channels)


class Stage(nn.Sequential):
    """Blocks with a ReLU between each two. It takes an activated map and ends before its own last ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self):
            # In place is safe between blocks alone: the maps at both ends of a stage belong to others too.
            x = block(F.relu(x, inplace=True) if index else x)
        return x


class NumberedConvs(nn.Module):
    """A block of convolutions ``conv1``, ``conv2``, ... without bias, each with its BatchNorm ``bn1``, ``bn2``, ...

    Args: (input channels, channels, kernel, stride, groups) of each, the last two 1 unless given.
    """

    def __init__(self, *convs: tuple[int, ...]) -> None:
        super().__init__()
        for number, (in_channels, channels, kernel, *more) in enumerate(convs, start=1):
            stride, groups = (*more, 1, 1)[:2]
            conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(channels))

    def layer(self, number: int, x: Tensor) -> Tensor:
        """Convolution ``number`` (from 1) and its BatchNorm."""
        return self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))

    def active(self, number: int, x: Tensor) -> Tensor:
        """``layer`` and a ReLU."""
        return F.relu(self.layer(number, x), inplace=True)


def make_stages(
    block: Callable[[int, int, int], nn.Module],
    channels: Sequence[int],
    counts: Sequence[int],
    *,
    first_stride: int,
    kind: type[nn.Sequential] = Stage,
) -> list[nn.Module]:
    """A stage of ``counts[i]`` blocks from each of ``channels`` to the next; its first changes channels and size.

    ``block``: (input channels, channels, stride) -> the block; the stride is 2 for all stages but perhaps the first.
    """
    strides = [first_stride, *[2] * (len(counts) - 1)]
    return [
        kind(block(before, width, stride), *(block(width, width, 1) for _ in range(count - 1)))
        for (before, width), count, stride in zip(pairwise(channels), counts, strides, strict=True)
    ]


class CifarNetwork(nn.Module):
    """Base of all CIFAR networks, with the interface of a timm model.

    The feature map is the one right before ReLU, global average pooling and the linear layer, so it is as wide as that
    layer and, with ``preact=True``, still signed (Algorithm 1 of the paper: ``fc(avgpool(attention * relu(map)))``).

    Without a neck (ResNet, VGG, MobileNetV1, ShuffleNetV1) a ReLU stands between every two of stem and stages; the maps
    are those in front of it (``preact=False``: behind it). With a neck (WRN: the final BatchNorm; MobileNetV2 and
    ShuffleNetV2: a 1x1 convolution and BatchNorm) the maps are what a stage hands to the next, and only the neck is
    followed by a ReLU. No handed-out map is modified later.

    Attributes:
        num_classes: width of the head; 0 means that the head ends with pooling.
        num_features: channels of the feature map.
        feature_info: a dict for the stem and for each stage, with its channels ``num_chs``, its ``reduction`` (input
            height over map height) and its ``module`` name.
    """

    inits: tuple[Callable[[nn.Module], None], ...] = ()
    """Each initialises a convolution or a linear layer in place; a family without any keeps PyTorch's defaults."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        neck: nn.Module | None = None,
        *,
        maps: Iterable[tuple[int, int]],
        num_features: int | None = None,
        num_classes: int,
        preact: bool,
    ) -> None:
        """``maps``: (channels, reduction) of stem and stages; ``num_features`` is the neck's width."""
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.neck = nn.Identity() if neck is None else neck
        self.relu_between_stages = neck is None
        self.preact = preact
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{index - 1}" if index else "stem"}
            for index, (width, reduction) in enumerate(maps)
        ]
        self.num_features = num_features or self.feature_info[-1]["num_chs"]
        self.apply(self._init)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the head (``nn.Identity`` when there are no classes)."""
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for timm's ``layer_decay``: blocks, or whole stages (``coarse``)."""
        stages = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(stages, None), (r"^neck", (99999,))]}

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the linear layer by a newly initialised one; 0 removes it."""
        like = next(self.stem.parameters())
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc.to(like.device, like.dtype)
        self._init(self.fc)

    def _init(self, module: nn.Module) -> None:
        for init in self.inits:
            init(module)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> feature map [B, num_features, h, w]."""
        return self.forward_stages(self.forward_stem(x))[0]

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the stem's map, for a method that changes it before ``forward_stages``."""
        return self._next_map(0, x)

    def forward_stages(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stem's map -> the feature map, and the maps of the stages as ``forward_intermediates`` gives them."""
        maps = []
        for index in range(1, len(self.feature_info)):
            x = self._next_map(index, x)
            maps.append(x)
        return self._last_map(x), maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map [B, num_features, h, w] -> logits [B, num_classes], or pooled features [B, num_features]."""
        x = F.relu(x) if self.preact else x
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The feature map and the maps of stem and stages, from one pass (signature and meaning of timm 1.0).

        Args:
            x: images [B, C, H, W].
            indices: which maps, 0 being the stem: None for all, an int n for the last n, a sequence for just those
                (negative ones count from the end). The maps come in the network's order.
            norm: WRN: hand out the last map behind the final BatchNorm; elsewhere there is nothing to apply.
            stop_early: stop behind the last wanted map; the first result is then that map.
            output_fmt: "NCHW" alone.
            intermediates_only: return the list alone.

        Returns:
            ``(feature map, maps)``, the first being what ``forward_features`` returns, or the list of maps.

        Raises: InputError for another ``output_fmt``, or an index out of range.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt {output_fmt!r}: CIFAR networks hand out 'NCHW' maps only")
        last, maps = len(self.feature_info) - 1, []
        taken = range(last + 1) if indices is None else _taken(last + 1, indices)
        for index in range(max(taken) + 1 if stop_early else last + 1):
            x = self._next_map(index, x)
            if index in taken:
                maps.append(x)
        normalised = norm and last in taken and isinstance(self.neck, nn.BatchNorm2d)
        if index == last and (normalised or not intermediates_only):
            x = self._last_map(x)
            if normalised:
                maps[-1] = x
        return maps if intermediates_only else (x, maps)

    def _next_map(self, index: int, x: Tensor) -> Tensor:
        """Map ``index`` (0 = stem) from the one before it (from the images)."""
        if index == 0:
            x = self.stem(x)
        else:
            x = self.stages[index - 1](F.relu(x) if self.relu_between_stages and self.preact else x)
        return F.relu(x) if self.relu_between_stages and not self.preact else x

    def _last_map(self, x: Tensor) -> Tensor:
        """The feature map from the last stage's map."""
        x = self.neck(x)
        return x if self.preact or self.relu_between_stages else F.relu(x)


def _taken(count: int, indices: int | Sequence[int]) -> Sequence[int]:
    """Absolute positions among ``count`` maps of the last so many, or of a sequence. Raises: InputError for none."""
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    if not wanted or not all(-count <= index < count for index in wanted):
        raise InputError(f"indices {indices}: name one or more of the maps 0 to {count - 1}, or -{count} to -1")
    return [index % count for index in wanted]


def classifier_of(network: nn.Module) -> nn.Linear:
    """W and b of a network that tells which they are, as timm's and the CIFAR networks do.

    Raises: InputError where it does not, or where they are no linear layer.
    """
    get_classifier: Any = getattr(network, "get_classifier", lambda: None)
    classifier = get_classifier()
    if not isinstance(classifier, nn.Linear):
        name = type(network).__name__
        raise InputError(f"the method needs a network that ends with one linear layer, and {name} does not")
    return classifier


def init_conv(module: nn.Module) -> None:
    """Kaiming normal, fan out, for a convolution: N(0, sqrt(2 / (k * k * channels))); its bias 0.

    A depthwise convolution counts all its channels as fan out, as the published CIFAR networks do.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linear(module: nn.Module, std: float | None = None) -> None:
    """Bias 0 for a linear layer, and N(0, std) for its weight (None: PyTorch's default)."""
    if isinstance(module, nn.Linear):
        if std is not None:
            nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
