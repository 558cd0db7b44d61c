"""``Split``: a Network of two callables, and ``Split.at``: of a model and the name of one of its layers."""

from __future__ import annotations

import dis
import inspect
import operator
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import InputError, first_line, unknown
from .network import kept_attributes

Half = Callable[[Any, Tensor], Any]


class Split(nn.Module):
    """A Network from two callables, which never hold the model themselves: a deep copy computes with its own weights.

    Args:
        features: ``features(model, x)``: images ``[B, 3, H, W]`` -> the last map before pooling ``[B, C, h, w]``.
        head: ``head(model, f)``: that map -> logits ``[B, K]``, or an output or dict that has ``logits``.
        model: the model behind them. Without it both are modules, called with ``x`` and ``f`` alone.
    Raises: InputError for functions without a model, or functions that take it from elsewhere.

    It can be pickled where ``features`` and ``head`` can, which is to say where they are no lambdas.
    """

    def __init__(
        self, features: Callable[..., Tensor], head: Callable[..., Tensor], model: nn.Module | None = None
    ) -> None:
        super().__init__()
        for name, half in (("features", features), ("head", head)):
            _check_half(name, half, model)
        self.model = model
        self.features, self.head = features, head

    @classmethod
    def at(cls, model: nn.Module, layer: str) -> Split:
        """A Network whose map is what the module ``layer`` of ``model`` puts out; its head is the rest of the model.

        The forward methods of the model, and of what contains the layer, are traced (torch.fx) with this module's
        training flags; every other module is called as it is. Numbers that these methods read from themselves are
        taken as they are now.
        Args: the model; a name out of ``model.named_modules()``, e.g. ``"layer4"`` or ``"features.denseblock4"``.
        Raises: InputError where there is no such layer, where it is not called exactly once, where the rest of the
            model needs more than the map, or where the model cannot be traced: then give two callables.
        """
        names = [name for name, _ in model.named_modules() if name]
        if layer not in names:
            raise unknown(f"layer of {type(model).__name__}", layer, names)
        parts = layer.split(".")
        cut = Cut(("call_module", layer, None), [".".join(parts[:k]) for k in range(len(parts))])
        cut.prepare(model)
        return cls(cut.features, cut.head, model)

    @property
    def traced(self) -> bool:
        """Whether its halves were found by tracing the model, whose whole they must then be."""
        return isinstance(getattr(self.features, "__self__", None), Cut)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` -> the last map ``[B, C, h, w]``."""
        return self.features(x) if self.model is None else self.features(self.model, x)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last map ``[B, C, h, w]`` -> logits ``[B, K]``."""
        return logits_of(self.head(x) if self.model is None else self.head(self.model, x))

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> (the last map, that map alone)."""
        final = self.forward_features(x)
        return final, [final]

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        return self.forward_head(self.forward_features(x))


def model_of(network: nn.Module) -> nn.Module:
    """The model behind a ``Split``, whose names its library's weight files have; any other network itself."""
    return network.model if isinstance(network, Split) and network.model is not None else network


def _check_half(name: str, half: Any, model: nn.Module | None) -> None:
    if model is None:
        if not isinstance(half, nn.Module):
            raise InputError(
                f"Split: {name} is a function, so that the model behind it must be named, and given to it: "
                "Split(features=lambda m, x: ..., head=lambda m, f: ..., model=m)"
            )
        return
    owner = getattr(half, "__self__", None)
    outside: list[object] = [half, owner, *(getattr(half, "__defaults__", None) or ())]
    if inspect.isfunction(half):
        outside += inspect.getclosurevars(half).nonlocals.values()
        loaded = (i.argval for i in dis.get_instructions(half) if i.opname == "LOAD_GLOBAL")
        outside += [half.__globals__.get(name) for name in loaded]
    if any(isinstance(one, nn.Module) for one in outside):
        raise InputError(
            f"Split: {name} holds a module of its own, which a copy of the Split would go on using: take it from the "
            f"first argument, as in {name}=lambda m, {'x' if name == 'features' else 'f'}: ..., with model=m"
        )
    try:
        inspect.signature(half).bind(model, None)
    except TypeError:
        raise InputError(f"Split: with a model, {name} is called with two arguments, {name}(model, x)") from None
    except ValueError:  # a callable without a signature
        pass


def logits_of(output: Any) -> Any:
    """The logits of what a model returns: a tensor, or an output or dict with ``logits``. Raises: InputError."""
    if isinstance(output, (Tensor, fx.Proxy)):
        return output
    logits = None
    if isinstance(output, dict):
        logits = output.get("logits")
    elif not isinstance(output, (tuple, list)):
        logits = getattr(output, "logits", None)
    if logits is None:
        mend = ": create it without its auxiliary heads" if isinstance(output, (tuple, list)) else ""
        raise InputError(f"it returns {type(output).__name__} and not logits, nor an output that has logits{mend}")
    return logits


# Cutting a model in two.


class Cut:
    """Where the forward pass of a model is cut, and the two halves as functions that take the model.

    Args:
        at: the value to cut behind: the traced call's kind, the name of its target, and which of the calls alike it is
            (None: the only one, and of an output with several parts the one that is used).
        opened: the names of the modules whose forward is traced ("" is the model); all others are called as they are.
        layout: of that value: "NCHW" (also ``[B, C, ...]``), "NHWC", or "NLC", tokens ``[B, prefix + h w, C]``.
        prefix: tokens before those of the map; the head gets zeros in their place.
    """

    def __init__(
        self, at: tuple[str, str, int | None], opened: Collection[str] = ("",), layout: str = "NCHW", prefix: int = 0
    ) -> None:
        self.at, self.opened, self.layout, self.prefix = at, tuple(opened), layout, prefix
        self._halves: dict[tuple[bool, ...], tuple[Half, Half]] = {}

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        """Images -> the map ``[B, C, h, w]``."""
        f = self._in_its_mode(model)[0](model, x)
        if self.layout == "NHWC":
            return f.permute(0, 3, 1, 2)
        if self.layout == "NLC":
            patches = f[:, self.prefix :].transpose(1, 2)
            return patches.unflatten(2, grid(patches.shape[2], x.shape[-2], x.shape[-1]))
        return f

    def head(self, model: nn.Module, f: Tensor) -> Any:
        """The map ``[B, C, h, w]`` -> what the model returns."""
        if self.layout == "NHWC":
            f = f.permute(0, 2, 3, 1)
        elif self.layout == "NLC":
            f = f.flatten(2).transpose(1, 2)
            if self.prefix:
                f = torch.cat([f.new_zeros(f.shape[0], self.prefix, f.shape[2]), f], dim=1)
        return self._in_its_mode(model)[1](model, f)

    def prepare(self, model: nn.Module) -> None:
        """Traces both modes now. Raises: InputError where that cannot be done."""
        with kept_modes(model):
            for mode in (True, False):
                model.train(mode)
                self._in_its_mode(model)

    def _in_its_mode(self, model: nn.Module) -> tuple[Half, Half]:
        # What a traced forward does may depend on the training flag of the module that it belongs to.
        modes = tuple(model.get_submodule(name).training for name in self.opened)
        if modes not in self._halves:
            # Not as a decorator, which would load torch's compiler with this module.
            cut = torch.compiler.disable(self._cut) if torch.compiler.is_compiling() else self._cut
            self._halves[modes] = cut(model)
        return self._halves[modes]

    def _cut(self, model: nn.Module) -> tuple[Half, Half]:
        graph = trace(model, self.opened)
        name = type(model).__name__
        kind, target, index = self.at
        calls = [node for node in graph.nodes if (node.op, target_name(node)) == (kind, target)]
        if index is None and len(calls) != 1:
            times = "called more than once" if calls else "not called"
            raise InputError(f"{name}: {target} is {times} in one pass, so that it has no one map: {CALLABLES}")
        if (index or 0) >= len(calls):
            raise InputError(f"{name}: its forward pass differs while it trains: {CALLABLES}")
        node = calls[index or 0]
        if index is None and len(node.users) == 1 and _takes_part(user := next(iter(node.users))):
            node = user
        skips = [user for user in used_behind(graph, node) if user is not node]
        if skips:
            said = "the images" if skips[0].op == "placeholder" else f"{target_name(skips[0])}, which comes before it"
            raise InputError(f"{name}: behind {target} it needs more than that map, namely {said}: {CALLABLES}")
        return halves(graph, node, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
        return self  # the halves hold no tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_halves": {}}


CALLABLES = "give two callables, Split(features=lambda m, x: ..., head=lambda m, f: ..., model=m)"
_PARTS_OF: tuple[Any, ...] = (getattr, operator.getitem)


def target_name(node: fx.Node) -> str:
    """What a traced call calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _takes_part(node: fx.Node) -> bool:
    """Whether a node takes one of the values out of a tuple or an output class."""
    return node.target in _PARTS_OF and isinstance(node.args[1], (int, str)) and node.args[1] not in dir(Tensor)


def grid(places: int, height: int, width: int) -> tuple[int, int]:
    """How many places a map has in each direction, of images ``height`` x ``width``. Raises: InputError."""
    h = max(1, round((places * height / width) ** 0.5))
    if h * (places // h) != places:
        raise InputError(f"{places} places are no map of images {height} x {width}")
    return h, places // h


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Puts every module's training flag back in the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Root(nn.Module):
    """Gives the model one input and one output, whatever else its forward takes and returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))


class _Typed(fx.Proxy):
    """A value whose precision is known: models compare the images' with their weights' before they convert them."""

    @property
    def dtype(self) -> torch.dtype:
        types: dict[str, torch.dtype] = self.tracer.types  # type: ignore[attr-defined]
        first = (kind for kind in types.values() if kind.is_floating_point)  # the images are of the model's precision
        return types[self.node.target] if self.node.target in types else next(first, torch.float32)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else their values would become constants

    def __init__(self, root: nn.Module, opened: Collection[str]) -> None:
        super().__init__()
        self.opened = {f"model.{name}".rstrip(".") for name in opened}
        self.types = {name: value.dtype for name, value in [*root.named_parameters(), *root.named_buffers()]}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def proxy(self, node: fx.Node) -> fx.Proxy:
        known = node.op == "placeholder" or node.target in self.types
        return _Typed(node, self) if known else super().proxy(node)


def trace(model: nn.Module, opened: Collection[str]) -> fx.Graph:
    """The forward pass of the model's logits in its present mode, in terms of the modules that are not ``opened``.

    Raises: InputError where control flow depends on the data, where random numbers are drawn between the modules, or
        where values are made there that would not move with the model.
    """
    name = type(model).__name__
    before, root = _random_states(), _Root(model)
    try:
        with kept_attributes(map(model.get_submodule, opened)):  # nothing of the tracing stays behind
            graph = _Tracer(root, opened).trace(root)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # whatever a model does to a value that has no numbers
        raise InputError(f"{name} cannot be traced ({first_line(error)}): {CALLABLES}") from error
    if before != _random_states():
        raise InputError(f"{name} draws random numbers between its modules: {CALLABLES}")
    for node in reversed(graph.nodes):
        if node.op in ("call_module", "get_attr"):
            if not node.target.startswith("model."):
                raise InputError(f"{name} makes a tensor between its modules that would not move with it: {CALLABLES}")
            node.target = node.target.removeprefix("model.")
        if not node.users and node.target in _PARTS_OF:
            graph.erase_node(node)
    return graph


def _random_states() -> tuple[object, ...]:
    numpy = sys.modules.get("numpy")
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    return [bytes(state.tolist()) for state in generators], random.getstate(), numpy and str(numpy.random.get_state())


def of_images(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values depend on the images."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(one in found for one in node.all_input_nodes):
            found.add(node)
    return found


def used_behind(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """What the nodes behind ``node`` need of the images up to it: ``[node]`` alone where the graph can be cut there."""
    dependent, before = of_images(graph), set()
    for one in graph.nodes:
        before.add(one)
        if one is node:
            break
    behind = [one for one in graph.nodes if one not in before]
    return list(dict.fromkeys(i for one in behind for i in one.all_input_nodes if i in before and i in dependent))


def halves(graph: fx.Graph, node: fx.Node, model: nn.Module) -> tuple[Half, Half]:
    """Two functions: (model, images) -> the node's value; (model, that value) -> the graph's output."""
    nodes, dependent = list(graph.nodes), of_images(graph)
    position = nodes.index(node)
    copies: dict[fx.Node, fx.Node] = {}
    first = fx.Graph()
    for one in nodes[: position + 1]:
        copies[one] = first.node_copy(one, copies.__getitem__)
    first.output(copies[node])

    second = fx.Graph()
    value = second.placeholder("x")
    if any(_writes(user, model) for user in node.users):
        value = second.call_method("clone", (value,))  # the head is called more than once with one map
    copies = {node: value}
    for one in nodes[:position]:
        if one not in dependent and one.op != "placeholder":
            copies[one] = second.node_copy(one, copies.__getitem__)
    for one in nodes[position + 1 :]:
        copies[one] = second.node_copy(one, copies.__getitem__)
    return _function(first), _function(second)


def _writes(node: fx.Node, model: nn.Module) -> bool:
    """Whether a call changes its input in place."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in model.get_submodule(str(node.target)).modules())
    asked = bool(node.kwargs.get("inplace", False)) or any(one is True for one in node.args)
    return asked or target_name(node).removesuffix("__").endswith("_")


def _function(graph: fx.Graph) -> Half:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]
