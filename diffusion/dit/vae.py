"""The VAE between images and latents: diffusers' ``AutoencoderKL`` as it was published, never trained here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError, first_line


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
        vae, info = AutoencoderKL.from_pretrained(said, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"no AutoencoderKL in {name}: {first_line(error)}") from error
    except TypeError as error:
        raise InputError(f"no AutoencoderKL in {name}: its config.json is another kind of model's") from error
    finally:
        logging.set_verbosity(before)
    if missing := info["missing_keys"]:
        raise InputError(f"the VAE in {name} lacks weights: {missing[0]} ({len(missing)} in all)")
    if vae.config.shift_factor:
        raise InputError(f"the VAE {name} shifts its latents by {vae.config.shift_factor}: only a scale is known here")
    return vae.float().to(device).eval().requires_grad_(False)


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a module's weights and their names, whatever files they came in."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()
