"""Random state: seeding, and taking and restoring all of it for an exact resume."""

from __future__ import annotations

import random
import zlib
from typing import Any

import torch


def seed_everything(seed: int, *salt: int | str) -> None:
    """Seeds python, numpy and torch (all devices) from a seed and anything that tells one use from another."""
    import numpy as np

    mixed = zlib.crc32(repr((seed, *salt)).encode())
    random.seed(mixed)
    torch.manual_seed(mixed)
    np.random.seed(mixed)


def random_state() -> dict[str, Any]:
    """Every generator's state, of types that ``torch.load(weights_only=True)`` admits."""
    import numpy as np

    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    numpy = [name, keys.tolist(), *rest]
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def restore_random_state(state: dict[str, Any]) -> None:
    """The reverse of ``random_state``."""
    import numpy as np

    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
