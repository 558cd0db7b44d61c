"""Sums over a data set that grow on the device, and of such Table 17: how unevenly ADM weights a map's locations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adm import consensus_attention, divergence_attention
from ..errors import InputError


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


KEYS = (
    *(f"attention/{side}_{of}" for side in ("consensus", "divergence") for of in ("min", "max", "variance")),
    "attention/similarity",
)


class AttentionStatistics(RunningSums):
    """Means over images of each image's own minimum, maximum and variance of both attentions, and of its mean S.

    Table 17 does not say whether its extremes are per image or over the data set. Its numbers do: a minimum of 0.68 and
    a maximum of 1.30 at variance 0.03 lie about 1.8 standard deviations off the mean 1, as extremes of the 49 locations
    of one image do; over millions of locations they would lie at 5 and more. The variance is the population's, over
    the locations of one image.

    Images that a sampler repeats to even out the processes must be left out by the caller.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(1 + len(KEYS), device=device)

    @torch.no_grad()
    def update(self, similarity: Tensor) -> None:
        """Add the images of S ``[B, H, W]`` (or ``[B, *places]``), as ``spatial_similarity`` gives it. No host sync."""
        columns = [torch.ones(len(similarity), dtype=similarity.dtype, device=similarity.device)]
        for attention in (consensus_attention(similarity), divergence_attention(similarity)):
            weights = attention.flatten(1)  # [B, P]
            columns += [weights.amin(dim=1), weights.amax(dim=1), weights.var(dim=1, unbiased=False)]
        columns.append(similarity.mean(dim=tuple(range(1, similarity.dim()))))
        self._add(torch.stack(columns))

    def compute(self) -> dict[str, float]:
        """The seven means, by the names in ``KEYS``. Reads the device once. Raises: InputError without any image."""
        count, *sums = self.sums.tolist()
        if count == 0:
            raise InputError("no attention statistics: not one image was evaluated")
        return {key: value / count for key, value in zip(KEYS, sums, strict=True)}
