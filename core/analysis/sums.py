"""Sums over a data set that grow on the device and reduce by addition."""

from __future__ import annotations

import torch
from torch import Tensor


def _precision(device: torch.device) -> torch.dtype:
    # Apple's MPS has no float64; elsewhere float64 keeps counts exact and the split of the data out of the sums.
    return torch.float32 if device.type == "mps" else torch.float64


class RunningSums:
    """One tensor of sums, added to batch by batch without a host sync. Everything in it reduces by addition.

    Over several processes: create it with ``device=`` (a process without data has no batch to follow), then either
    ``all_reduce(sums.state()["sums"])`` in place, or ``load_state`` of what a reduction returned.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(shape, dtype=_precision(torch.device(device)), device=device)

    def _add(self, values: Tensor) -> None:
        """Add ``values [..., N]``, summed over their last dimension."""
        if self.sums.device != values.device:  # the first batch decides
            self.sums = self.sums.to(values.device, _precision(values.device))
        self.sums += values.sum(dim=-1, dtype=self.sums.dtype)

    def state(self) -> dict[str, Tensor]:
        """``{"sums": tensor}``, to be reduced by SUM. The tensor itself, not a copy: reducing it in place is enough."""
        return {"sums": self.sums}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace the sums by a reduced ``state()``."""
        self.sums = state["sums"].to(self.sums)
