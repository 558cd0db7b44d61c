"""Sums over a data set that grow on the device and reduce by addition."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningSums:
    """One tensor ``sums``, added to batch by batch without a host sync; over several processes the sum of theirs.

    Where there are several, create it with ``device=``: a process without data has no batch to follow.
    """

    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(shape, dtype=_precision(torch.device(device)), device=device)

    def _add(self, values: Tensor) -> None:
        """Add ``values [..., N]``, summed over their last dimension."""
        if self.sums.device != values.device:  # the first batch decides
            self.sums = self.sums.to(values.device, _precision(values.device))
        self.sums += values.sum(dim=-1, dtype=self.sums.dtype)


def _precision(device: torch.device) -> torch.dtype:
    # Apple's MPS has no float64; elsewhere float64 keeps counts exact and the split of the data out of the sums.
    return torch.float32 if device.type == "mps" else torch.float64
