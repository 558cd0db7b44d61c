"""The run's optimiser, by timm's name, and what of a network goes into which of its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from core.errors import InputError, first_line, unknown

SECOND_ORDER = "adahessian"  # wants gradients of gradients, which no step here makes


def create(
    name: str, groups: list[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimiser of groups that say their own rate and weight decay: torch's SGD as it is, all others timm's.

    Args: timm's name; the groups; rate, momentum (where the optimiser has one) and Nesterov's (of SGD) for groups
        without their own; further keywords of the optimiser, as betas.
    Raises: InputError for an unknown name, or what the optimiser refuses.
    """
    try:
        if name == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, **options)
        from timm.optim import create_optimizer_v2, list_optimizers

        known = [str(other) for other in list_optimizers() if other != SECOND_ORDER]
        if name == SECOND_ORDER:
            raise InputError(f"optimizer.name {name} needs second derivatives, which are not computed: choose adamw")
        if name not in known:
            raise unknown("optimizer.name", name, known)
        return create_optimizer_v2(groups, name, lr=lr, momentum=momentum, **options)
    except InputError:
        raise
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        given = f" with options {dict(options)}" if options else ""
        raise InputError(f"optimizer.name {name}{given}: {first_line(error)}") from error


def on_a_matrix(**settings: Any) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """The optimiser (see ``create``) of a small matrix, on which settings are tried before anything is built."""
    matrix = nn.Parameter(torch.zeros(64, 64))
    return create(groups=[{"params": [matrix]}], **settings), matrix


def moments(**settings: Any) -> int:
    """Values that the optimiser keeps for each weight of a matrix, rounded: 1 for SGD with momentum, 2 for AdamW."""
    with torch.random.fork_rng(devices=[]):
        optimizer, matrix = on_a_matrix(**settings)
        matrix.grad = torch.ones_like(matrix)
        optimizer.step()
    kept = optimizer.state[matrix].values()
    return round(sum(value.numel() for value in kept if isinstance(value, torch.Tensor)) / matrix.numel())


def network_groups(
    network: nn.Module,
    where: str,
    *,
    lr: float,
    weight_decay: float,
    filter_bias_and_bn: bool = False,
    layer_decay: float | None = None,
    backbone_lr_factor: float | None = None,
) -> list[dict[str, Any]]:
    """What is trained of a network, in groups with their rate and weight decay, the highest rate first.

    Args:
        network: its classifier is what its ``get_classifier()`` returns.
        where: what the option is called that chose the network, for messages.
        lr: rate of the last layer, where ``layer_decay`` makes the others slower.
        filter_bias_and_bn: no weight decay of vectors and of what the network's ``no_weight_decay()`` names (timm's
            rule).
        layer_decay: factor from each layer to the one before it, by the network's ``group_matcher`` (timm's).
        backbone_lr_factor: of the rate of all but the classifier.
    Raises: InputError for a network that does not say which its layers, or its classifier, are.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: Any = getattr(network, "no_weight_decay", set)() if filter_bias_and_bn else set()
    rule: dict[str, Any] = {"weight_decay_exclude_1d": filter_bias_and_bn, "no_weight_decay_list": exempt}
    if layer_decay is None:
        groups = param_groups_weight_decay(network, weight_decay, **rule)
    elif not hasattr(network, "group_matcher"):
        raise InputError(
            f"optimizer.layer_decay: {where} ({type(network).__name__}) does not say which of its layers come first, "
            "as timm's models and the CIFAR networks do: leave it out, or choose one of those"
        )
    else:
        groups = param_groups_layer_decay(network, weight_decay, layer_decay=layer_decay, **rule)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale", 1.0)
    if backbone_lr_factor is not None:
        groups = _slower_backbone(groups, _classifier(network, where), backbone_lr_factor)
    return sorted(groups, key=lambda group: -group["lr"])  # the first one's rate is the one that is logged


def _classifier(network: nn.Module, where: str) -> set[nn.Parameter]:
    found: Any = getattr(network, "get_classifier", lambda: None)()
    modules = found if isinstance(found, (tuple, list)) else [found]
    parameters = {p for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    if not parameters:
        raise InputError(
            f"{where}.backbone_lr_factor: {type(network).__name__} does not say which its classifier is: leave it out"
        )
    return parameters


def _slower_backbone(groups: list[dict[str, Any]], head: set[nn.Parameter], factor: float) -> list[dict[str, Any]]:
    parts = []
    for group in groups:
        for of_head in (True, False):
            if parameters := [p for p in group["params"] if (p in head) == of_head]:
                parts.append({**group, "params": parameters, "lr": group["lr"] * (1.0 if of_head else factor)})
    return parts
