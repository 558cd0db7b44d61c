"""What goes wrong in silence on several processes: two networks that learn from each other, wrapped one by one."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch.distributed as dist
from torch import nn

APART = (
    "is wrapped by itself for several processes: parts that are called past the wrapper get other gradients on each. "
    "Wrap one module that holds both networks and computes the loss in its forward"
)


def warn_where_apart(*heads: Any) -> None:
    """Warns where one DistributedDataParallel holds a network that trains, and not the other one that trains with it.

    Takes the networks' bound methods; says nothing of other callables, whose network nobody knows. It looks through all
    objects of the process (a tenth of a second), and only where there are several processes: call it once.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    owners = [getattr(head, "__self__", None) for head in heads]
    networks = [n for n in owners if isinstance(n, nn.Module) and any(p.requires_grad for p in n.parameters())]
    wrappers = [x for x in gc.get_objects() if issubclass(type(x), nn.parallel.DistributedDataParallel)]
    for wrapper in wrappers:
        inside = {id(module) for module in wrapper.modules()}
        held = [network for network in networks if id(network) in inside]
        if held and len(held) < len(networks):
            warnings.warn(f"{type(held[0]).__name__} {APART}", stacklevel=6)  # whoever called the loss
            return
