"""A state dict into a network: it must fit exactly, but for a classifier that may be made anew for other classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.errors import InputError
from core.split import model_of
from core.weights import check_finite


class OtherClasses(InputError):
    """The weights fit but for their classifier, which is for another number of classes."""


def load_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    training: bool = True,
    new_head: bool = False,
) -> int | None:
    """Loads weights in the network's own keys; of a ``Split``, in those of the model behind it.

    Args:
        source: the file or name that errors call them by.
        training: whether the network is to be trained: weights that are not finite are then refused, else said.
        new_head: whether a classifier for other classes is left as the network drew it; all else must fit anyway.
    Returns: of how many classes the weights are where their classifier was left out, else None.
    Raises: InputError for another architecture, another number of classes (``OtherClasses``, unless ``new_head``), or
        values that are not finite; ``network`` is then unchanged.
    """
    network = model_of(network)
    own = network.state_dict()
    # Files older than PyTorch 0.4.1 have no num_batches_tracked; load_state_dict then leaves it as it is.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    classes = None if missing or unexpected or not reshaped else _other_classes(network, state, own, reshaped)
    if classes is not None:
        if not new_head:
            in_network = own[reshaped[0]].shape[0]
            raise OtherClasses(f"{source} holds weights for {classes} classes, but the network has {in_network}")
        state, reshaped = {key: tensor for key, tensor in state.items() if key not in reshaped}, []
    shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in reshaped]
    whole = [  # integers, as of a quantised file, would be taken for weights
        f"{key} {state[key].dtype}"
        for key in own
        if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    parts = {"missing": missing, "unexpected": unexpected, "other shape": shapes, "no numbers with a fraction": whole}
    more = {kind: f" and {len(keys) - 3} more" if len(keys) > 3 else "" for kind, keys in parts.items()}
    if problems := [f"{kind} {', '.join(keys[:3])}{more[kind]}" for kind, keys in parts.items() if keys]:
        raise InputError(f"{source} is of another architecture than {type(network).__name__}: {'; '.join(problems)}")
    check_finite(source, state, training=training)
    network.load_state_dict({**own, **state})
    return classes


def _other_classes(
    network: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor], reshaped: list[str]
) -> int | None:
    """The number of classes in ``state`` where it differs from the network's in that alone, else None."""
    first = {(state[key].shape[:1], own[key].shape[:1]) for key in reshaped}
    alike = all(state[key].shape[1:] == own[key].shape[1:] for key in reshaped)
    if len(first) != 1 or not alike or not set(reshaped) <= _classifier(network):
        return None
    in_file, in_network = (shape.numel() if shape else 0 for shape in next(iter(first)))
    return in_file if in_file and in_file != in_network else None


def _classifier(network: nn.Module) -> set[str]:
    """The names of the classifier's parameters: the network says it (timm's, ours), else its last layer's are."""
    if hasattr(network, "get_classifier"):
        heads: Any = network.get_classifier()  # type: ignore[operator]
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        found = {id(parameter) for head in heads if isinstance(head, nn.Module) for parameter in head.parameters()}
    else:
        layers = [list(module.parameters(recurse=False)) for module in network.modules()]
        found = {id(parameter) for parameter in next(filter(None, reversed(layers)), [])}
    return {name for name, parameter in network.named_parameters() if id(parameter) in found}
