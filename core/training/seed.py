"""Random state: seeding, for good or for a while, and taking and restoring all of it for an exact resume."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_everything(seed: int, *salt: int | str) -> None:
    """Seeds python, numpy and torch (all devices) from a seed and anything that tells one use from another."""
    import numpy as np

    mixed = zlib.crc32(repr((seed, *salt)).encode())
    random.seed(mixed)
    torch.manual_seed(mixed)
    np.random.seed(mixed)


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; nearby inputs give unrelated seeds."""
    import numpy as np

    words = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch (CPU), and gives them their states back at the end."""
    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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
