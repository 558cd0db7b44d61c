"""The U-Net of progressive distillation: built by diffusers, kept as a folder that diffusers and our sampler read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from core.errors import InputError
from core.ranges import Count, Range, Share, Size, check_ranges
from diffusion.files import read_json, reading, save_pipeline
from diffusion.sampling import Student, load_student, read_unet
from diffusion.schedule import CosineSchedule, Prediction, cosine_betas

DIFFUSERS_NAMES: dict[Prediction, str] = {"x": "sample", "v": "v_prediction"}


@dataclass(frozen=True)
class UNetConfig:
    """The base network; the students are its copies. The defaults are Sun et al.'s for CIFAR-10 (35.7 M parameters).

    Args:
        width: channels of the first level, a multiple of ``groups``.
        multipliers: channels of each level, in widths; each level but the last halves height and width.
        blocks: residual blocks a level.
        attention: image sizes with self-attention (one head); the middle block always has it.
        dropout: in the base network; students have none.
        groups: of GroupNorm.
        init: "cfd" is Sun et al.'s (Xavier uniform, the last layer of each block and of the network nearly 0), or
            "diffusers", torch's defaults.
    """

    width: Size = 128
    multipliers: tuple[Annotated[int, Range(1, 64)], ...] = (1, 2, 2, 2)
    blocks: Annotated[int, Range(1, 64)] = 2
    attention: tuple[Count, ...] = (16,)
    dropout: Share = 0.1
    groups: Size = 32
    init: Literal["cfd", "diffusers"] = "cfd"

    def __post_init__(self) -> None:
        check_ranges("network.", self)
        if not self.multipliers:
            raise InputError("network.multipliers needs a level at least, as [1, 2]")
        if self.width % self.groups:
            raise InputError(f"network.width {self.width} is no multiple of network.groups {self.groups}")

    def arguments(self, channels: int, size: int) -> dict[str, Any]:
        """diffusers' arguments for images of ``channels`` x ``size`` x ``size``. Raises: InputError for a size."""
        levels = len(self.multipliers)
        if size % 2 ** (levels - 1):
            raise InputError(
                f"images of {size} pixels cannot be halved {levels - 1} times: give --network.multipliers fewer levels"
            )
        sizes = [size // 2**level for level in range(levels)]
        if missing := sorted(set(self.attention) - set(sizes)):
            raise InputError(f"network.attention {missing}: the levels of {size}-pixel images have sizes {sizes}")
        kinds = ["Attn" if s in self.attention else "" for s in sizes]
        return {
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": tuple(self.width * m for m in self.multipliers),
            "layers_per_block": self.blocks,
            "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
            "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            "attention_head_dim": None,
            "norm_num_groups": self.groups,
            "dropout": self.dropout,
        }


def build_unet(config: UNetConfig, channels: int, size: int) -> Any:
    """A fresh ``UNet2DModel`` for images of ``channels`` x ``size`` x ``size``, from torch's generator."""
    from diffusers import UNet2DModel

    network: Any = UNet2DModel(**config.arguments(channels, size))
    if config.init == "cfd":
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                last = name.endswith(("conv2", "to_out.0", "conv_out"))
                nn.init.xavier_uniform_(module.weight, gain=1e-5 if last else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return network


def load_teacher(folder: Path) -> Student:
    """A teacher's folder, ours or any diffusers folder on our schedule that predicts x or v.

    Raises: InputError, naming prediction type and schedule where these are others.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"--teacher {folder} holds no network (no config.json): name a diffusers folder of a U-Net")
    if (folder / "adm.json").is_file():
        return load_student(folder)
    said = read_json(folder / "scheduler/scheduler_config.json") or read_json(folder / "scheduler_config.json")
    if not said:
        raise InputError(
            f"--teacher {folder} says neither what it predicts nor on which schedule (no adm.json, no "
            "scheduler_config.json): a teacher predicts x or v on our cosine schedule; it may serve as --init"
        )
    with reading(f"--teacher {folder}: its scheduler_config.json is wrong"):
        prediction, betas = str(said.get("prediction_type", "epsilon")), said.get("trained_betas")
        name = f"{len(betas)} betas of its own" if betas else f"{said.get('beta_schedule', 'linear')!r}"
        known = {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()}
        timesteps = len(betas) - 1 if betas else 0
        same = timesteps > 0 and torch.allclose(torch.tensor(betas, dtype=torch.float64), cosine_betas(timesteps))
    if prediction not in known or not same:
        raise InputError(
            f"--teacher {folder} predicts {prediction!r} on the schedule {name} of {said.get('num_train_timesteps')} "
            "times; a teacher predicts x ('sample') or v ('v_prediction') on our cosine schedule (1025 betas): start "
            "the base network from it by --init"
        )
    model = read_unet(folder, f"--teacher {folder}").eval().requires_grad_(False)
    return Student(folder, model, CosineSchedule(timesteps), known[prediction], timesteps)


def check_network(network: Any, name: str, channels: int, size: int, config: UNetConfig | None = None) -> None:
    """Raises: InputError where a network is for other images, has other levels than ``config`` or is not finite."""
    said = network.config
    if said.in_channels != channels or said.out_channels != channels or said.sample_size not in (size, [size, size]):
        raise InputError(
            f"{name} is for images of {said.in_channels} x {said.sample_size} pixels and puts out {said.out_channels} "
            f"channels, the data have {channels} x {size}"
        )
    if config is not None:
        wanted = config.arguments(channels, size)
        for key in ("block_out_channels", "layers_per_block", "down_block_types"):
            theirs = said[key] if isinstance(said[key], int) else tuple(said[key])
            if theirs != wanted[key]:
                raise InputError(
                    f"{name} has {key} {theirs}, --network says {wanted[key]}: a student is its teacher's copy, so "
                    "give --network the same size"
                )
    for key, value in network.state_dict().items():
        if not bool(value.isfinite().all()):
            raise InputError(f"{name}: the weight {key} is not finite")


def copy_without_dropout(network: Any) -> Any:
    """A trainable copy of a U-Net, in training mode; its configuration says so too."""
    from diffusers import UNet2DModel

    copy = UNet2DModel.from_config({**network.config, "dropout": 0.0})
    copy.load_state_dict(network.state_dict())
    return copy.train()


def scheduler_config(prediction: Prediction, steps: int, timesteps: int) -> dict[str, Any]:
    """A diffusers DDIMScheduler that samples as ``diffusion.sampling`` does: called with ``num_inference_steps=steps``,
    ``eta=0``, ``use_clipped_model_output=True``."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": timesteps + 1,
        "trained_betas": cosine_betas(timesteps).tolist(),
        "prediction_type": DIFFUSERS_NAMES[prediction],
        "clip_sample": True,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
        "steps_offset": timesteps // steps,
    }


def save_student(folder: Path, network: Any, prediction: Prediction, steps: int, timesteps: int, **about: Any) -> None:
    """Writes a folder that ``UNet2DModel.from_pretrained``, ``DDIMPipeline.from_pretrained`` and ``load_student`` read.

    It appears whole or not at all. ``about``: more for ``adm.json``. Raises: TrainingError where the disk is full.
    """
    about = {"prediction": prediction, "timesteps": timesteps, "steps": steps, "schedule": "cosine", **about}
    save_pipeline(folder, network, ".", "DDIMPipeline", scheduler_config(prediction, steps, timesteps), about)


class InputHook:
    """Reads the input of a U-Net's last convolution, ``[B, C, H, W]``, while the network runs as it is.

    A hook and no cut network: state dict, configuration and folder stay diffusers' own. Register it after copying, for
    a copied module would keep the hook of the original.
    """

    def __init__(self, network: Any) -> None:
        self._seen: list[Tensor] = []
        network.conv_out.register_forward_pre_hook(lambda module, inputs: self._seen.append(inputs[0]))

    def take(self) -> Tensor:
        """The map of the last forward; no other is kept."""
        last = self._seen[-1]
        self._seen.clear()
        return last
