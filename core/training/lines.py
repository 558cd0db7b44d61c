"""What a training says while it runs, in the same words in every task."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

LEFT_OUT = ("lr", "images_per_second")  # said behind the losses


def start_line(
    networks: Mapping[str, torch.nn.Module],
    about: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    device: torch.device,
    precision: str,
    processes: int,
) -> str:
    """What trains on what and where.

    Args: the networks by role; what ``summary.json`` says ``about`` each, of which "name" is read where there is one;
        the sizes of the data by what they count; ``precision`` may be accelerate's "no", fp32.
    """
    said = []
    for role, network in networks.items():
        fixed = "" if any(p.requires_grad for p in network.parameters()) else "fixed, "
        count = sum(p.numel() for p in network.parameters())
        said.append(f"{' '.join(filter(None, (role, about.get(role, {}).get('name'))))} ({fixed}{count:,} parameters)")
    where = f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)
    parts = (
        ", ".join(said),
        ", ".join(f"{count:,} {what}" for what, count in sizes.items()),
        f"{where}, {'fp32' if precision == 'no' else precision}",
        f"{processes} process{'' if processes == 1 else 'es'} of {torch.get_num_threads()} thread(s)",
    )
    return "; ".join(filter(None, parts))


def training_line(values: Mapping[str, Any], memory: int) -> str:
    """``teacher ce 1.65, kd 0.08  student ce 1.64  lr 0.05  1375 images/s  0.4 GiB``: what a log point measured.

    Args: ``<role>/<term>``, ``lr`` and ``images_per_second``; the peak of memory in bytes.
    """
    terms: dict[str, list[str]] = {}
    for name, value in values.items():
        if name not in LEFT_OUT:
            role, _, term = name.rpartition("/")
            terms.setdefault(role, []).append(f"{term} {value:.4g}")
    losses = [f"{role} {', '.join(those)}".strip() for role, those in terms.items()]
    rate = values["images_per_second"]
    speed = f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"
    return "  ".join([*losses, f"lr {values['lr']:.3g}", speed, f"{memory / 2**30:.1f} GiB"])


def time_left(seconds: float) -> str:
    """Seconds as ``0:03:05 left``."""
    return f"{timedelta(seconds=round(seconds))} left"
