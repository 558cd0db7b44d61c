"""Images of a DiT, in any number of processes: noise and class of each come from (seed, index) alone.

So neither the number of processes nor the batch size changes an image by more than the last bits of the network, of
which the sampler makes more the longer it runs.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core.errors import InputError
from diffusion.dit.convert import load_dit
from diffusion.dit.gaussian import LinearSchedule, Sampler, guided, spaced_times, trajectory
from diffusion.dit.model import DiT
from diffusion.files import read_json, reading
from diffusion.sampling import ImageNoise, in_batches

Precision = Literal["fp32", "tf32", "bf16"]
LATENT_SCALE = 0.18215
"""Of Stable Diffusion's first VAEs, and so of the published DiTs."""
DECODED = 32
"""Images through a VAE at once."""


@dataclass(frozen=True)
class DiTStudent:
    """A DiT as its folder holds it, whatever its role."""

    folder: Path
    model: DiT
    """In evaluation mode."""
    schedule: LinearSchedule
    latent_scale: float | None
    """By which its latents are multiplied; None where it is one of pixels."""
    step: int | None
    """After how many optimiser steps it was exported; None where the folder does not say."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what it samples: latents or images."""
        return self.model.channels, self.model.input_size, self.model.input_size

    def sample(
        self,
        indices: Sequence[int],
        seed: int,
        *,
        classes: Sequence[int] | None = None,
        guidance: float = 1.0,
        steps: int = 250,
        sampler: Sampler = "ddpm",
        cfg_channels: int = 3,
        batch_size: int = 64,
        vae: Any = None,
        precision: Precision = "fp32",
    ) -> Tensor:
        """Images of the given indices (one at least), uint8 ``[N, C, H, W]`` on the CPU.

        Args:
            classes: a label for each index; unless given, index modulo the number of classes, which are then equally
                frequent.
            guidance, cfg_channels: as ``guided``.
            vae: what ``load_vae`` gives, for a network of latents.
            precision: bf16 computes the network, but not the sampler, under autocast. tf32 is torch's own switch.
        Raises: InputError for classes or steps that there are not, for guidance of a network that never learned a null
            label, and where the VAE is missing or of other latents; TrainingError where an image is not finite (broken
            or diverged weights).
        """
        count = self.model.classes
        labels = [index % count for index in indices] if classes is None else list(classes)
        if wrong := [label for label in labels if not 0 <= label < count]:
            raise InputError(f"{self.folder} has the classes 0 to {count - 1}, not {wrong[0]}")
        check_guidance(self.folder, self.model.null_label, guidance)
        self.check_vae(vae)
        times = spaced_times(steps, self.schedule.timesteps, sampler)

        @torch.no_grad()
        def draw(z: Tensor, noise: ImageNoise, some: slice) -> Tensor:
            y = torch.tensor(labels[some], device=self.model.pos_embed.device)

            def predict(z: Tensor, t: Tensor) -> Tensor:
                with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    return guided(self.model, z, t, y, guidance, cfg_channels)

            z = z.to(y.device)
            states = trajectory(predict, self.schedule, times, z, noise if sampler == "ddpm" else None)
            return self.decode(deque(states, maxlen=1).pop(), vae)

        return in_batches(self, indices, seed, batch_size, draw)

    def decode(self, z: Tensor, vae: Any = None) -> Tensor:
        """Latents ``[B, C, H, W]`` -> images ``[B, 3, ...]`` in about [-1, 1]; a network of pixels has them already."""
        if self.latent_scale is None:
            return z
        return torch.cat([vae.decode(some / self.latent_scale).sample for some in z.split(DECODED)])

    def check_vae(self, vae: Any) -> None:
        """Raises: InputError where a VAE is missing, too many or of other latents. Warns where its scale is another."""
        if self.latent_scale is None:
            if vae is not None:
                raise InputError(f"{self.folder} samples pixels: leave --vae out")
            return
        if vae is None:
            raise InputError(
                f"{self.folder} samples latents: name the VAE that decodes them by --vae, a folder or hub name"
            )
        if vae.config.latent_channels != self.model.channels:
            raise InputError(
                f"{self.folder} has latents of {self.model.channels} channels, --vae of {vae.config.latent_channels}"
            )
        if not math.isclose(vae.config.scaling_factor, self.latent_scale):
            warnings.warn(
                f"{self.folder} has latents times {self.latent_scale}, by which they are divided; --vae says "
                f"{vae.config.scaling_factor}: is it the VAE that encoded them?",
                stacklevel=3,
            )


def check_guidance(network: Path, null_label: bool, *scales: float) -> None:
    """Raises: InputError for guidance of a network that never learned a null label."""
    if not null_label and any(scale != 1 for scale in scales):
        raise InputError(
            f"{network} never learned a null label (--label_dropout 0, or no row for it): it cannot be guided; give "
            "--guidance 1"
        )


def load_dit_student(folder: str | Path, device: torch.device | str = "cpu") -> DiTStudent:
    """Reads what ``load_dit`` reads: an exported folder, or a published file or folder.

    Without our ``adm.json``, a network of four channels is taken for one of Stable Diffusion's latents, as those that
    DiT published are. Raises: InputError as ``load_dit``, and for a broken ``adm.json``.
    """
    folder = Path(folder)
    model = load_dit(folder)
    said = read_json(folder / "adm.json")
    scale = said.get("latent_scale", LATENT_SCALE if not said and model.channels == 4 else None)
    model.to(device).eval().requires_grad_(False)
    return DiTStudent(folder, model, LinearSchedule().to(device), scale, said.get("step"))


def load_vae(name: str | Path, device: torch.device | str = "cpu") -> Any:
    """diffusers' ``AutoencoderKL`` in float32, evaluation mode, without gradients; ``config.scaling_factor`` is DiT's.

    Args: a folder with ``config.json``, one of a pipeline with such a folder ``vae`` in it, or a name on the hub.
    Raises: InputError where there is none, one without all weights, or one whose latents are shifted too.
    """
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        folder /= "vae"
        if not (folder / "config.json").is_file():
            raise InputError(f"no VAE in {name}: neither config.json nor vae/config.json is there")
    if not folder.is_dir() and (folder.is_absolute() or folder.parts[:1] in ((".",), ("..",)) or len(folder.parts) > 2):
        raise InputError(f"no VAE in {name}: the folder does not exist")
    said, before = str(folder) if folder.is_dir() else str(name), logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of is an error here
    try:
        with reading(f"no AutoencoderKL in {name}"):
            vae, info = AutoencoderKL.from_pretrained(said, output_loading_info=True)
    except TypeError as error:
        raise InputError(f"no AutoencoderKL in {name}: its config.json is another kind of model's") from error
    finally:
        logging.set_verbosity(before)
    if missing := info["missing_keys"]:
        raise InputError(f"the VAE in {name} lacks weights: {missing[0]} ({len(missing)} in all)")
    if vae.config.shift_factor:
        raise InputError(f"the VAE {name} shifts its latents by {vae.config.shift_factor}: only a scale is known here")
    return vae.float().to(device).eval().requires_grad_(False)
