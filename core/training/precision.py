"""``fit.precision auto``: bfloat16 where this machine computes it natively, else float32; a run keeps its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import notice
from .run import read_config

if TYPE_CHECKING:
    from .fit import FitConfig

NATIVE = ("amx_bf16", "avx512_bf16")
"""What a CPU says, in the kernel's words, whose instructions multiply bfloat16."""


def settled(config: FitConfig, out: Path) -> FitConfig:
    """The config with its precision, chosen once: that of the run that ``out`` holds, else this machine's; says which.

    Raises: InputError for a ``config.yaml`` that is not whole.
    """
    if config.precision != "auto":
        return config
    file = out / "config.yaml"
    fit = read_config(file).get("fit") if file.is_file() else None
    if isinstance(fit, dict) and fit.get("precision") in ("fp32", "bf16", "fp16"):
        precision, why = fit["precision"], f"with which the run in {out} began"
    else:
        precision, why = native_precision(on_cpu=config.device == "cpu" or not torch.cuda.is_available())
    notice(f"fit.precision auto: {precision}, {why}")
    return replace(config, precision=precision)


def native_precision(on_cpu: bool) -> tuple[Literal["fp32", "bf16"], str]:
    """What to train in on this machine, and why."""
    if on_cpu:
        has = next((name for name in NATIVE if name in cpu_flags()), None)
        return ("bf16", f"which this CPU has instructions for ({has})") if has else ("fp32", "as this CPU has no bf16")
    name = torch.cuda.get_device_name()
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return ("bf16", f"which {name} computes natively") if native else ("fp32", f"as {name} has no bf16 of its own")


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What this CPU can do, in the kernel's words; nothing where the system does not say it so."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
