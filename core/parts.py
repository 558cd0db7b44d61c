"""``as_network``: any image classifier as a Network, by its parts: what makes the map, and what makes logits of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .checks import pools
from .errors import InputError, first_line
from .maps import one_ratio
from .network import preserved, without_zeros
from .split import CALLABLES, Cut, Split, halves, logits_of, of_images, target_name, trace, used_behind
from .views import View, seen_as_network

MOST_PREFIX_TOKENS = 8  # a class token, one for distillation, up to four registers

# What may stand between a map and its flattening or pooling where a head does not average: nothing that mixes places.
BY_PLACE = (
    *("Conv2d", "BatchNorm2d", "Dropout", "Dropout2d", "Identity", "ReLU", "ReLU6", "SiLU", "GELU", "Hardswish"),
    *("AdaptiveAvgPool2d", "AvgPool2d", "AdaptiveMaxPool2d", "MaxPool2d", "Flatten"),
    *("relu", "dropout", "adaptive_avg_pool2d", "avg_pool2d", "adaptive_max_pool2d", "max_pool2d", "boolean_dispatch"),
    *("flatten", "view", "reshape", "size", "getattr", "mean", "amax"),
)


def as_network(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A Network of an image classifier of timm, torchvision, transformers or your own; the model itself if it is one.

    A timm model is seen through a view of the same parameters (``core/views.py``); any other one becomes a ``Split``
    behind the last value of its forward pass that is a map of several places: its pooling and classifier are the head.
    That is found on two images, and checked: the head of the features is the model, the head averages over the map's
    places (or treats each alike and flattens them), and no class token has a part in it.
    Args: a model; a small batch of images ``[B, 3, H, W]`` (else random ones of the size that the model names, or 224).
    Raises: InputError, a ValueError, where ADM could not act or nothing can be said: class tokens, attention pooling,
        several outputs while training, a map of one place, a forward pass that torch.fx cannot trace.
    """
    if isinstance(model, (Split, View)):
        return model
    if all(hasattr(model, name) for name in ("forward_features", "forward_head", "forward_intermediates")):
        return seen_as_network(model, images)
    name = type(model).__name__
    x = some_images(model) if images is None else images[:2]
    with torch.no_grad(), preserved(model, x), without_zeros(model):
        search = _Search(model.eval(), x)
        cut = search.cut()
        try:
            parts, whole = logits_of(cut.head(model, cut.features(model, x))), logits_of(model(x))
        except RuntimeError as error:
            raise InputError(f"{name} cannot be cut before its pooling ({first_line(error)}): {CALLABLES}") from error
        if not torch.allclose(parts, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
            raise InputError(f"{name}: the head of its features is not the model: {CALLABLES}")
    cut.prepare(model)
    return Split(cut.features, cut.head, model)


def some_images(model: nn.Module) -> Tensor:
    """Two random images ``[2, C, H, W]`` of the size that the model's ``config`` names (transformers), or of 224."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size: Any = getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    weights = [p for p in model.parameters() if p.is_floating_point()]
    channels = getattr(config, "num_channels", None) or next((p.shape[1] for p in weights if p.dim() == 4), 3)
    generator = torch.Generator().manual_seed(0)
    like = weights[0] if weights else torch.zeros(())
    return torch.randn(2, channels, height, width, generator=generator).to(like)


class _Run(fx.Interpreter):
    """The traced forward pass on images, with what each call took and put out (copies: some calls work in place)."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.values: dict[fx.Node, Any] = {}
        self.unchanged: dict[fx.Node, fx.Node] = {}  # dropout, identity -> what goes into it

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        inputs = [i for i in n.all_input_nodes if isinstance(self.values[i], Tensor)]
        if isinstance(value, Tensor) and len(inputs) == 1 and torch.equal(value, self.values[inputs[0]]):
            self.unchanged[n] = inputs[0]
        return value


class _Search:
    """For the last map of a model, with as few of its modules opened as its pooling needs to come to light."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x, self.name = model, x, type(model).__name__
        self.opened, self.closed = [""], {}  # closed: what cannot be traced, and why
        self._look()
        while leaf := self._leaf_to_open():
            self.opened.append(leaf)
            try:
                self._look()
            except InputError as error:
                self.opened.remove(leaf)
                self.closed[leaf] = str(error)
                self._look()

    def _look(self) -> None:
        self.graph = trace(self.model, self.opened)
        run = _Run(self.model, self.graph)
        try:
            run.run(self.x)
        except Exception as error:
            where = f"within {self.opened[-1]}" if len(self.opened) > 1 else f"on images {tuple(self.x.shape)}"
            mend = CALLABLES if len(self.opened) > 1 else "give some, as_network(model, images)"
            raise InputError(f"{self.name} fails {where} when it is traced ({first_line(error)}): {mend}") from error
        self.values, self.unchanged = run.values, run.unchanged
        self.nodes, self.dependent = list(self.graph.nodes), of_images(self.graph)
        learned = [i for i, node in enumerate(self.nodes) if self._has_parameters(node)]
        behind = learned[-1] if learned else 0
        self.cuts = [
            node
            for i, node in enumerate(self.nodes)
            if i < behind and self._is_map(node) and used_behind(self.graph, node) == [node]
        ]

    def _has_parameters(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return any(user in self.dependent for user in node.users)
        return node.op == "call_module" and any(True for _ in self.model.get_submodule(str(node.target)).parameters())

    def _is_map(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        called = self._called(node).lower().replace("_", "")
        made = node in self.dependent and node.op != "placeholder" and "avgpool" not in called and called != "mean"
        return made and isinstance(value, Tensor) and any(self._layouts(value))

    def _layouts(self, value: Tensor) -> Iterator[tuple[str, int]]:
        """The ways to read a value as a map of the images: layout and number of prefix tokens, as of ``Cut``."""
        size = (self.x.shape[-2], self.x.shape[-1])
        shape = tuple(value.shape)
        if len(shape) == 4:
            for layout, (h, w) in (("NCHW", shape[2:]), ("NHWC", shape[1:3])):
                if h * w > 1 and one_ratio((h, w), size):
                    yield layout, 0
        elif len(shape) == 3:
            for prefix in range(min(MOST_PREFIX_TOKENS, shape[1] - 2) + 1):
                h = round(((shape[1] - prefix) * size[0] / size[1]) ** 0.5)
                w = (shape[1] - prefix) // max(h, 1)
                if h * w == shape[1] - prefix > 1 and h * size[1] == w * size[0] and size[0] % h == 0:
                    yield "NLC", prefix
                    break

    def _leaf_to_open(self) -> str | None:
        """The first module behind the last map found that takes a map, or the images, and puts out none."""
        start = self.nodes.index(self.cuts[-1]) + 1 if self.cuts else 0
        for node in self.nodes[start:]:
            if node.op != "call_module" or self._is_map(node) or target_name(node) in self.closed:
                continue
            takes_map = any(
                i.op == "placeholder" or self._is_map(i) or not isinstance(self.values[i], Tensor)
                for i in node.all_input_nodes
            )
            if takes_map and any(True for _ in self.model.get_submodule(target_name(node)).children()):
                return target_name(node)
        return None

    def cut(self) -> Cut:
        """Raises: InputError with the reason why there is none."""
        for node in reversed(self.cuts):
            head = self._head(node)
            found = self._read(node, head)
            if found is None:
                if self.values[node].dim() == 3:  # perhaps [B, C, N]: what it was made of comes before it
                    continue
                break
            layout, prefix = found
            self._check_tokens(head, self.values[node], layout, prefix)
            while (before := self.unchanged.get(node)) in self.cuts:
                node = before
            alike = [n for n in self.nodes if (n.op, target_name(n)) == (node.op, target_name(node))]
            return Cut((node.op, target_name(node), alike.index(node)), self.opened, layout, prefix)
        raise InputError(self._why_not())

    def _head(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        second = halves(self.graph, node, self.model)[1]
        return lambda f: logits_of(second(self.model, f))

    def _called(self, node: fx.Node) -> str:
        name = target_name(node)
        return type(self.model.get_submodule(name)).__name__ if node.op == "call_module" else name

    def _read(self, node: fx.Node, head: Callable[[Tensor], Tensor]) -> tuple[str, int] | None:
        """How the head reads the value: what it averages over are the places."""
        value = self.values[node]
        layouts = list(self._layouts(value))
        for layout, prefix in layouts:
            dims = range(2, 4) if layout == "NCHW" else range(1, value.dim() - 1)
            try:
                if pools(head, value, dims, prefix):
                    return layout, prefix
            except RuntimeError:
                continue
        rest = self.nodes[self.nodes.index(node) + 1 :]
        at_maps = [n for n in rest if any(i is node or self._is_map(i) for i in n.all_input_nodes)]
        by_place = all(self._called(n) in BY_PLACE and self._mixes_nothing(n) for n in at_maps)
        return ("NCHW", 0) if by_place and ("NCHW", 0) in layouts else None

    def _mixes_nothing(self, node: fx.Node) -> bool:
        module = self.model.get_submodule(target_name(node)) if node.op == "call_module" else None
        return not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1)

    def _check_tokens(self, head: Callable[[Tensor], Tensor], value: Tensor, layout: str, prefix: int) -> None:
        generator = torch.Generator().manual_seed(2)
        weight, noise = torch.ones_like(value[..., :1]), torch.randn(value.shape, generator=generator).to(value)
        if layout == "NCHW":
            weight = torch.ones_like(value[:, :1])
        drawn = 2 * torch.rand(weight.shape, generator=generator).to(value)
        weight = torch.cat([weight[:, :prefix], drawn[:, prefix:]], dim=1)
        before = head(noise)
        limit = 1e-6 * before.abs().max()
        if (head(noise * weight) - before).abs().max() <= limit:
            raise InputError(
                f"{self.name} classifies by its class token, or by others that are no places of its map: weights on "
                "the map's places would do nothing. Take a model that averages over its map, or " + CALLABLES
            )
        other = torch.cat([0 * noise[:, :prefix], noise[:, prefix:]], dim=1)
        if prefix and (head(other) - before).abs().max() > limit:
            raise InputError(
                f"{self.name} classifies by its class token and the mean of its map together, and ADM weights a map "
                "alone. Take a model that averages over its map, or " + CALLABLES
            )

    def _why_not(self) -> str:
        size = " x ".join(map(str, self.x.shape[-2:]))
        for node in reversed(self.nodes):
            value, inputs = self.values.get(node), [i for i in node.all_input_nodes if self._is_map(i)]
            single = isinstance(value, Tensor) and value.dim() == 4 and value.shape[-2:].numel() == 1
            called = self._called(node).lower()
            if single and inputs and not any(word in called for word in ("avgpool", "avg_pool", "pooler", "mean")):
                return (
                    f"{self.name}: its last map is 1 x 1 at {size} pixels, where every attention is 1 and ADM does "
                    "nothing: give larger images, as_network(model, images)"
                )
        if self.closed:
            return next(iter(self.closed.values()))
        return (
            f"{self.name} has no one map of several places ([B, C, h, w], or tokens) that its head averages, at {size} "
            f"pixels: {CALLABLES}"
        )
