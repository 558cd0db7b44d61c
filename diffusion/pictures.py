"""Pictures of what a network samples: for the tools, and at the evaluations of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from core.files import make_folder, write_atomically
from diffusion.sampling import ImageNoise, to_uint8

SHOWN, COLUMNS = 16, 8
"""Images that a training shows, and how many of them in a row."""
FRAMES = 16
"""At most so many of a GIF; of more steps some are left out."""


def first_noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """Where the shown images start, at every evaluation, so that each keeps its place."""
    return ImageNoise(0, range(SHOWN), shape)().to(device)


def save_samples(states: Sequence[Tensor], folder: Path, role: str, step: int) -> Tensor:
    """Writes ``figures/samples-<role>-<step>.png`` and, anew each time, ``figures/trajectory-<role>.gif``.

    Args: z ``[SHOWN, C, H, W]`` before each step, then the images, in about [-1, 1]; of more than three channels, as
        latents have, the first three are shown. The run's folder; how many optimiser steps are done.
    Returns: the images as one, uint8 ``[h, w, 3]``.
    """
    last = len(states) - 1
    chosen = [states[round(k * last / min(last, FRAMES))] for k in range(min(last, FRAMES) + 1)]
    # NaN of weights that have diverged: fit stops at the checkpoint that follows.
    shown = [to_uint8(z[:, : 3 if z.shape[1] >= 3 else 1].float().nan_to_num().cpu()) for z in chosen]
    frames = [enlarged(tile(images, COLUMNS)) for images in shown]
    figures = make_folder(folder / "figures")
    picture = Image.fromarray(frames[-1].numpy())
    write_atomically(figures / f"samples-{role}-{step:08d}.png", lambda file: picture.save(file, "PNG"))
    write_atomically(figures / f"trajectory-{role}.gif", lambda file: save_gif(frames, file))
    return frames[-1]


def tile(images: Tensor, columns: int) -> Tensor:
    """uint8 ``[N, C, H, W]``, N a multiple of ``columns`` -> one image ``[h, w, 3]``, a white pixel between them."""
    rows, (height, width) = len(images) // columns, images.shape[-2:]
    cells = torch.nn.functional.pad(images.expand(-1, 3, -1, -1), (0, 1, 0, 1), value=255).unflatten(0, (rows, columns))
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), 3)[:-1, :-1]


def enlarged(picture: Tensor, shortest: int = 64) -> Tensor:
    """``[h, w, 3]`` with each pixel repeated, so that the shorter side has about ``shortest``."""
    factor = max(1, shortest // min(picture.shape[:2]))
    return picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def save_gif(frames: Sequence[Tensor], file: Path) -> None:
    """A frame of a fifth of a second for each image uint8 ``[h, w, 3]``, the last one for two seconds."""
    first, *others = (Image.fromarray(enlarged(frame).numpy()) for frame in frames)
    first.save(file, save_all=True, append_images=others, duration=[200] * len(others) + [2000], loop=0, format="GIF")
