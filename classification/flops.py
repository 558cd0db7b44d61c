"""What one forward costs: multiply-accumulates of each network, and the operations that ADM adds to them.

One multiply-accumulate (MAC) is two floating-point operations (FLOPs). Papers that give ResNet-34 3.67 G "FLOPs" count
MACs of convolutions and matrix products, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classification.distiller import ClassificationDistiller
from core.training.distiller import Batch, Progress

aten = torch.ops.aten

OF_OUTPUT: dict[Any, int] = {
    **dict.fromkeys((aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.exp, aten.pow), 1),
    **dict.fromkeys((aten.clamp, aten.clamp_min, aten.maximum, aten.relu), 1),
    aten.upsample_bilinear2d: 7,  # 4 products, 3 sums
}
"""FLOPs for each element of the result."""

OF_INPUT: dict[Any, int] = {
    **dict.fromkeys((aten.sum, aten.mean, aten._adaptive_avg_pool2d), 1),
    aten.linalg_vector_norm: 2,  # square, sum
    aten.mse_loss: 3,  # difference, square, sum
    aten._log_softmax: 3,  # exponential, sum, difference
}
"""FLOPs for each element of the first operand."""


@dataclass(frozen=True)
class Flops:
    """Multiply-accumulates of convolutions and matrix products, and single operations elsewhere (see the tables)."""

    macs: int
    others: int

    @property
    def total(self) -> int:
        """FLOPs: two for each multiply-accumulate."""
        return 2 * self.macs + self.others


def count(call: Callable[[], Any]) -> Flops:
    """What a call costs on any device, "meta" too, without its backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def elements(cost: int, of_input: bool) -> Callable[..., int]:
        return lambda *args, out_shape, **_: cost * (args[0] if of_input else out_shape).numel()

    table = {op: elements(cost, of is OF_INPUT) for of in (OF_OUTPUT, OF_INPUT) for op, cost in of.items()}
    # The counter knows no fused attention of the CPU: as plain matrix products it counts everywhere alike.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=table) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    others = sum(value for op, value in counts.items() if op in table)
    return Flops((sum(counts.values()) - others) // 2, others)


def count_forward(distiller: ClassificationDistiller, batch: Batch) -> tuple[dict[str, Flops], Flops | None]:
    """({role: its network's forward}, what ADM adds, None without it) for the first image of a batch.

    Only ``macs`` of a network is complete: not all of its normalisations and activations are in the tables.
    """
    one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    training = distiller.training
    distiller.eval()
    try:
        views = distiller.views(one["image"])
        networks = {r: count(lambda r=r: distiller.networks[r](views[r])) for r in distiller.configs}  # type: ignore[misc]
        adm = distiller.adm
        if adm is None:
            return networks, None
        outputs = distiller.outputs(one["image"])
        return networks, count(lambda: adm.losses(outputs, one, Progress(0, 0.0, 1, 1.0), list(outputs)))
    finally:
        distiller.train(training)
