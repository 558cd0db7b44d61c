"""DDIM sampling of progressively distilled networks, in any number of processes.

Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, with the clipping of Sun
et al. 2023 (CFD): x is clipped before the noise is computed from it, z at the very end.

Each image starts from noise that its seed and index alone determine, so that neither the number of processes nor the
batch size changes an image by more than the last bits of a convolution, at most one grey level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import InputError, TrainingError
from diffusion.files import check_layers, read_about, reading
from diffusion.schedule import TIMESTEPS, CosineSchedule, Prediction

LastStep = Literal["noisy", "clean"]
"""noisy: the last step lands on index 0, whose noise is 0.8 grey levels (CFD). clean: it returns x (Salimans & Ho)."""


class ImageNoise:
    """N(0, 1) for images of given indices, each from a generator of its own that (seed, index) alone determine.

    Every call is the next draw, float32 ``[len(indices), *shape]`` on the CPU: the first is where sampling starts, the
    k-th after it is that of the k-th sampling step. No two indices below 2^32 share a generator's seed; nor do two
    seeds below 4,000 among their first million indices.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]) -> None:
        # torch's generator keeps 32 bits of its seed: of hashes, two among 50,000 would often be the same.
        seeds = [(seed * 1_000_003 + index) % 2**32 for index in indices]
        self.generators = [torch.Generator().manual_seed(one) for one in seeds]
        self.shape = tuple(shape)

    def __call__(self) -> Tensor:
        noise = torch.empty(len(self.generators), *self.shape)
        for one, generator in zip(noise, self.generators, strict=True):
            one.normal_(generator=generator)
        return noise


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, by cutting off ``clamp(127.5 x + 128, 0, 255)``."""
    return (127.5 * images + 128.0).clamp(0.0, 255.0).to(torch.uint8)


@torch.no_grad()
def denoise(
    model: Any, schedule: CosineSchedule, prediction: Prediction, steps: int, z: Tensor, last_step: LastStep = "noisy"
) -> Iterator[Tensor]:
    """The sampler, from ``z`` ``[B, C, H, W]`` at index T: z after each step; the last one is the sample.

    Args:
        model: ``model(z, t)`` with t int64 ``[B]``, as diffusers' ``UNet2DModel``; in evaluation mode.
        prediction: what it predicts, "x" or "v".
        steps: a divisor of the schedule's T.
    Raises: InputError where T is not a multiple of ``steps``.
    """
    if steps < 1 or schedule.timesteps % steps:
        raise InputError(f"{steps} sampling steps do not divide the schedule's {schedule.timesteps} time steps")
    stride = schedule.timesteps // steps
    for start in range(schedule.timesteps, 0, -stride):
        t = torch.full((len(z),), start, device=z.device)
        output = model(z, t)
        x = schedule.predict_x(getattr(output, "sample", output), z, t, prediction).clamp(-1.0, 1.0)
        if start > stride:
            z = schedule.ddim(x, z, t, t - stride)  # the noise of z follows from the clipped x
        else:
            z = x if last_step == "clean" else schedule.ddim(x, z, t, t - stride).clamp(-1.0, 1.0)
        yield z


def in_batches(
    network: Any,
    indices: Sequence[int],
    seed: int,
    batch_size: int,
    draw: Callable[[Tensor, ImageNoise, slice], Tensor],
) -> Tensor:
    """Images of these indices of a ``Student`` or ``DiTStudent``, uint8 ``[N, C, H, W]`` on the CPU.

    Args: ``draw(z, noise, some) -> [B, C, H, W]`` in [-1, 1]: makes some of them from z; ``noise``: its further draws.
    Raises: TrainingError where an image is not finite (broken or diverged weights).
    """

    def start(some: slice) -> tuple[Tensor, ImageNoise]:
        noise = ImageNoise(seed, indices[some], network.shape)
        return noise(), noise

    images, started = [], start(slice(batch_size))
    for first in range(0, len(indices), batch_size):
        some = slice(first, first + batch_size)
        drawn = draw(*started, some)
        started = start(slice(some.stop, some.stop + batch_size))  # while the device computes
        if not drawn.isfinite().all():
            said = f"{indices[some][0]}..{indices[some][-1]} of {network.folder}"
            raise TrainingError(f"an image among {said} is not finite: NaN in the weights?")
        images.append(to_uint8(drawn).cpu())
    return torch.cat(images)


def own_share(count: int) -> range:
    """The indices among 0..count-1 that this process draws: every ``world``-th."""
    from accelerate import PartialState

    state = PartialState()
    return range(count)[state.process_index :: state.num_processes]


def gather_shares(rows: Tensor, count: int) -> Tensor:
    """What the processes made of their shares, in order of the indices: ``[count, ...]`` on the CPU, in all of them.

    Args: ``rows [len(own_share(count)), ...]``: this process's.
    """
    from accelerate import PartialState
    from accelerate.utils import gather

    state = PartialState()
    missing = -(-count // state.num_processes) - len(rows)
    everyone: Any = gather(torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]).to(state.device))
    shares = everyone.cpu().unflatten(0, (state.num_processes, -1))  # [processes, share, ...]
    return shares.transpose(0, 1).flatten(0, 1)[:count]


@dataclass(frozen=True)
class Student:
    """A distilled network as its folder holds it."""

    folder: Path
    model: Any
    """diffusers' ``UNet2DModel``, in evaluation mode."""
    schedule: CosineSchedule
    prediction: Prediction
    steps: int
    """With how many steps it was trained to sample."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of its images."""
        size = self.model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.config.in_channels, height, width

    def sample(
        self,
        indices: Sequence[int],
        seed: int,
        *,
        steps: int | None = None,
        batch_size: int = 256,
        last_step: LastStep = "noisy",
    ) -> Tensor:
        """Images of the given indices, uint8 ``[N, C, H, W]`` on the CPU; in ``self.steps`` steps unless given.

        Raises: InputError as ``denoise``; TrainingError as ``in_batches``.
        """

        def draw(z: Tensor, noise: ImageNoise, some: slice) -> Tensor:
            z = z.to(self.schedule.alpha.device, non_blocking=True)
            count = self.steps if steps is None else steps
            states = denoise(self.model, self.schedule, self.prediction, count, z, last_step)
            return deque(states, maxlen=1).pop()

        return in_batches(self, indices, seed, batch_size, draw)


def load_student(folder: str | Path, device: torch.device | str = "cpu") -> Student:
    """Reads a folder with a diffusers U-Net and our ``adm.json``.

    Raises: InputError where it is no such folder, or of a schedule or prediction that our sampler does not know.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no network: name a round's folder, with config.json and adm.json in it")
    try:
        said = read_about(folder)
        prediction, timesteps = said["prediction"], said["timesteps"]
        schedule, steps = said["schedule"], said["steps"]
    except KeyError as error:
        raise InputError(
            f"{folder} has no adm.json that says prediction, timesteps, schedule and steps: only networks that "
            "diffusion/tools/train.py wrote can be sampled here"
        ) from error
    if schedule != "cosine" or prediction not in ("x", "v"):
        raise InputError(f"{folder}: prediction {prediction!r} on a {schedule!r} schedule; known are x and v on cosine")
    if not (isinstance(timesteps, int) and isinstance(steps, int) and 0 < steps <= timesteps <= TIMESTEPS):
        raise InputError(f"{folder}/adm.json says {timesteps} timesteps and {steps} steps, which cannot be")
    model = read_unet(folder, str(folder)).to(device).eval().requires_grad_(False)
    return Student(folder, model, CosineSchedule(timesteps).to(device), prediction, steps)


def read_unet(folder: str | Path, name: str, **options: Any) -> Any:
    """diffusers' ``UNet2DModel`` of a folder. Raises: InputError where there is none, calling it ``name``."""
    from diffusers import UNet2DModel

    check_layers(Path(folder))
    with reading(f"cannot read the network of {name}"):
        return UNet2DModel.from_pretrained(folder, **options).to("cpu")  # raises where weights are missing
