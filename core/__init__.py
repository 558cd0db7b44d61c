"""Asymmetric Decision-Making (ADM) for knowledge distillation. A name loads torch when first used, nothing heavier."""

# ruff: noqa: F403, F405

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds, with its types
    from .adapter import *
    from .adm import *
    from .analysis.attention import *
    from .checks import *
    from .distillation import *
    from .errors import *
    from .network import *
    from .parts import *
    from .split import *

__version__ = "0.1.0"

__all__ = [
    "ADMConfig",
    "ADMLoss",
    "Adapter",
    "AttentionStatistics",
    "InputError",
    "Network",
    "Split",
    "TrainingError",
    "as_network",
    "check_network",
    "check_pair",
    "consensus_attention",
    "consensus_kd_loss",
    "consensus_loss",
    "control",
    "divergence_attention",
    "divergence_kd_loss",
    "divergence_loss",
    "feature_loss",
    "kd_loss",
    "mutual_loss",
    "phi_loss",
    "spatial_similarity",
    "stage_maps",
]


_MODULES = ("errors", "adapter", "adm", "distillation", "network", "split", "parts", "checks", "analysis.attention")


def __getattr__(name: str) -> Any:
    # PEP 562: a command that needs `core.errors` alone must not wait for torch.
    if name in __all__:
        for module in _MODULES:
            if (value := getattr(import_module(f".{module}", __name__), name, None)) is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
