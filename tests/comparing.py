"""Bitwise comparison of what two runs leave, durations apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TIMES = ("seconds", "images_per_second", "metrics_size")


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise equality of nested values."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in TIMES:
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
