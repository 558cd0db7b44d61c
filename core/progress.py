"""How far something is that takes long."""

from __future__ import annotations

import sys
from typing import Any

MANY = 2000
"""Of what there are fewer takes no time worth a line."""


def progress_bar(total: int, what: str, unit: str = "image", *, shown: bool = True, many: int = MANY) -> Any:
    """tqdm's bar on a terminal, once a second has passed; elsewhere one line now, from ``many`` units on.

    To be used by ``with``, and moved by ``update(units)``. ``shown``: whether this process says it.
    """
    from tqdm import tqdm

    if shown and total >= many and not sys.stderr.isatty():
        print(f"{what}: {total:,} {unit}s", file=sys.stderr, flush=True)
    hidden = None if shown else True
    return tqdm(total=total, desc=what, unit=unit, disable=hidden, leave=False, dynamic_ncols=True, delay=1.0)
