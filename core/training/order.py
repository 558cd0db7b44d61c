"""The order of an epoch, where training stands in it, and this process's share of it: of every loader."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


class EpochOrder:
    """Batches of one epoch after the other, a function of (seed, epoch) alone.

    A batch then does not depend on the number of processes or workers, and stopping at any batch loses nothing. With
    ``world`` processes, rank r takes every world-th image of each global batch, from r on.

    Args: images in all; images of one step over all processes; the seed; this process and how many there are.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches of one epoch: whole ones alone, unless a loader keeps the rest."""
        return self.size // self.batch_size

    def generator(self, epoch: int) -> torch.Generator:
        """What the epoch's order and further draws of it come from."""
        # Numbers far apart, so that no two (seed, epoch) share a stream.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """All positions, int64 ``[N]``, in the order that this generator draws first."""
        return torch.randperm(self.size, generator=generator)

    def share(self, step: int) -> slice:
        """The places of this process's images of a step in the epoch's order."""
        return slice(step * self.batch_size + self.rank, min((step + 1) * self.batch_size, self.size), self.world)

    def begin(self) -> None:
        """Goes on to the next epoch where the current one is over."""
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its batches already handed out; a finished epoch counts as the start of the next."""
        if self.position >= len(self):
            return {"epoch": self.epoch + 1, "position": 0}
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises: InputError where the epoch has no such batch."""
        if not 0 <= state["position"] <= len(self):
            raise InputError(
                f"the saved run stood at batch {state['position']} of an epoch that now has {len(self)}: "
                "resume with the same data and batch size"
            )
        self.epoch, self.position = state["epoch"], state["position"]
