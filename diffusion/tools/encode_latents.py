"""Encodes a folder of labelled images, as ImageNet lies, by a VAE once and for all, for the training of DiT.

    python diffusion/tools/encode_latents.py imagenet/ --vae stabilityai/sd-vae-ft-ema --out latents/
    torchrun --nproc_per_node 8 diffusion/tools/encode_latents.py imagenet/ --vae sd-vae/ --out latents/

Of each image and of its mirror image it keeps mean and standard deviation in float16; ImageNet at 256 pixels takes
42 GB. ``diffusion/dit/data.py`` says how they lie and reads them. Shards appear whole or not at all: the same command
again, with any number of processes, makes those that are missing.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt, restricted_number_type
from PIL.Image import Image, Resampling
from torch import Tensor

from core.errors import InputError, TrainingError
from core.files import make_folder, write_atomically
from core.images import open_image
from core.training.command import DONE, INTERRUPTED, Stop, parse, run_command
from core.training.run import save_signed_json
from diffusion.data import in_order, scaled
from diffusion.dit.data import INDEX, ClassFiles, LatentIndex, check_of, class_files, open_shard, read_index, shard_file
from diffusion.dit.sampling import load_vae
from diffusion.files import need_packages
from diffusion.tools import runs
from diffusion.training import check_memory

ImageSize: Any = restricted_number_type("ImageSize", int, [(">=", 8), ("<=", 4096)])
Threads: Any = restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    need_packages("diffusers")
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu")
    try:
        return encode(options, state)
    finally:
        state.destroy_process_group()


def parse_options(argv: Sequence[str] | None) -> Any:
    """The command line. Raises: InputError for anything wrong with it."""
    parser = runs.tool_parser("Latents of labelled images, of both the image and its mirror image, by a VAE.")
    add = parser.add_argument
    add("images", type=str, help="folder with a sub-folder for each class, or with such a folder train/ in it")
    add("--vae", type=str, default="stabilityai/sd-vae-ft-ema", help="AutoencoderKL: a folder, or a name on the hub")
    add("--out", type=str, required=True, help="folder of the latents")
    add("--scale", type=float, default=None, help="factor on the latents; the VAE's own (0.18215) unless given")
    add("--image_size", type=ImageSize, default=256, help="height and width of the images in pixels")
    add(
        "--batch_size",
        type=PositiveInt,
        default=32,
        help="images at once, in each process; their mirror images come on top",
    )
    add("--shard_size", type=PositiveInt, default=4096, help="images in a file; being cut off costs the file begun")
    add("--workers", type=Threads, default=4, help="threads that decode images, in each process")
    runs.add_device(parser)
    options = parse(parser, argv)
    if options.scale is not None and not 0 < options.scale < math.inf:
        raise InputError(f"--scale must be positive: {options.scale}")
    return options


def encode(options: Any, state: Any) -> int:
    """Makes the missing shards, this process its part of them; returns the exit code.

    Args: what ``parse_options`` gives; accelerate's ``PartialState``.
    Raises: InputError for broken images, a VAE that is none, or a folder of other latents; TrainingError for a full
        disk or latents that are not finite.
    """
    from accelerate.utils import broadcast_object_list

    images = class_files(options.images)
    vae = load_vae(options.vae, state.device)
    index = describe(options, vae, images)
    check_room(options, vae, index, state.device)
    out = Path(options.out)
    check_folder(out, index)
    todo: list[Any] = [prepare(out, index, images.labels) if state.is_main_process else None]
    missing = broadcast_object_list(todo)[0]  # one view of the folder, before anything is written there
    own = missing[state.process_index :: state.num_processes]
    if state.is_main_process:
        print(f"{index.count} images of {index.classes} classes: {len(missing)} of {index.shards} shards to make")
    with Stop().listening() as stop:
        if own:
            encode_shards(vae, images, index, own, options, stop, shown=state.is_main_process)
    if stop.requested:
        if state.is_main_process:
            print(f"stopped: {out} is not complete, the same command goes on with it", file=sys.stderr)
        return INTERRUPTED
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{out} is complete")
    return DONE


def describe(options: Any, vae: Any, images: ClassFiles) -> LatentIndex:
    """The index of what is to be made. Raises: InputError for an image size that the VAE cannot halve."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if options.image_size % factor:
        raise InputError(f"--image_size {options.image_size} is no multiple of {factor}, by which this VAE reduces it")
    size = options.image_size // factor
    paths = "\n".join(images.files).encode(errors="surrogateescape")
    return LatentIndex(
        vae=options.vae,
        vae_sha256=weights_hash(vae),
        scale=vae.config.scaling_factor if options.scale is None else options.scale,
        image_size=options.image_size,
        shape=(vae.config.latent_channels, size, size),
        classes=len(images.names),
        class_names=images.names,
        count=len(images.files),
        shard_size=options.shard_size,
        files_sha256=hashlib.sha256(paths).hexdigest(),
    )


def check_room(options: Any, vae: Any, index: LatentIndex, device: torch.device) -> None:
    """Raises: InputError for a batch or a shard that the memory cannot hold."""
    pixels = 2 * min(options.batch_size, index.count) * index.image_size**2
    first = 4 * pixels * vae.config.block_out_channels[0]  # what its first convolution puts out
    check_memory(f"--batch_size {options.batch_size} of --image_size {index.image_size}", first, device)
    shard = 2 * min(index.shard_size, index.count) * bytes_of(index)  # its parts, and the whole
    check_memory(f"--shard_size {index.shard_size}", shard, torch.device("cpu"))


def bytes_of(index: LatentIndex) -> int:
    """What an image takes: its moments and those of its mirror image in float16, its label and two check sums."""
    return 2 * 2 * math.prod(index.shape) * 2 + 3 * 8


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a module's weights and their names, whatever files they came in."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def check_folder(out: Path, index: LatentIndex) -> None:
    """Raises: InputError where the folder holds latents of another VAE, scale, size or other images."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out names a folder")
    if not (out / INDEX).is_file():
        if next(out.glob(shard_file(out, 0).name.replace("00000", "*")), None) is not None:
            raise InputError(f"{out} holds latents without {INDEX}: bring it back, or choose another --out")
        return
    before = read_index(out)
    if before.vae_sha256 != index.vae_sha256:
        hashes = f"weights {before.vae_sha256[:12]}, not {index.vae_sha256[:12]}"
        raise InputError(f"{out} holds latents of another VAE, {before.vae} ({hashes}): choose another --out")
    for key in ("scale", "image_size", "shard_size", "classes", "count"):
        then, now = getattr(before, key), getattr(index, key)
        if then != now:
            raise InputError(f"{out} holds latents with {key} {then}, this command says {now}: choose another --out")
    if before.files_sha256 != index.files_sha256:
        raise InputError(f"{out} holds latents of images with other names: choose another --out")


def prepare(out: Path, index: LatentIndex, labels: Tensor) -> list[int]:
    """Makes the folder and its index; returns the shards that are still to be made. For one process alone.

    Raises: InputError where there can be no such folder or it has not enough room; TrainingError as for any file.
    """
    room = shutil.disk_usage(make_folder(out)).free
    missing = []
    for shard in range(index.shards):
        if not shard_file(out, shard).is_file():
            missing.append(shard)
            continue
        try:
            found = open_shard(out, index, shard)
            found.check_all()
            same = torch.equal(found.labels, labels[index.rows(shard)])
        except InputError:
            same = False
        if not same:
            print(f"{shard_file(out, shard)} is broken: it is made anew", file=sys.stderr)
            missing.append(shard)
    need = sum(len(index.rows(shard)) for shard in missing) * bytes_of(index)
    if need > room:
        raise InputError(f"{out} has room for {room / 1e9:.1f} GB, the latents need {need / 1e9:.1f} GB more")
    if not (out / INDEX).is_file():
        save_signed_json(asdict(index), out / INDEX)
    return missing


def encode_shards(
    vae: Any, images: ClassFiles, index: LatentIndex, shards: Sequence[int], options: Any, stop: Stop, *, shown: bool
) -> None:
    """Writes these shards, until it is stopped: the one begun is then lost.

    Raises: InputError naming a broken image; TrainingError where latents are not finite, or the disk is full.
    """
    from safetensors.torch import save
    from tqdm import tqdm

    def batches(shard: int) -> list[range]:
        # Never across shards: latents do not depend on which shards are made now, and by which process.
        rows = index.rows(shard)
        return [rows[first : first + options.batch_size] for first in range(0, len(rows), options.batch_size)]

    def read(batch: range) -> Tensor:  # uint8 [B, 3, H, H]
        decoded = [centre(open_image(Path(images.folder, images.files[row])), index.image_size) for row in batch]
        return torch.from_numpy(np.stack([np.asarray(image) for image in decoded])).permute(0, 3, 1, 2)

    total = sum(len(index.rows(shard)) for shard in shards)
    with (
        ThreadPoolExecutor(options.workers) as pool,  # Pillow decodes and resizes without Python's lock
        tqdm(total=total, unit="image", disable=None if shown else True, dynamic_ncols=True) as bar,
    ):
        decoded = in_order(pool, read, [batch for shard in shards for batch in batches(shard)], options.workers + 1)
        for shard in shards:
            parts = []
            for batch in batches(shard):
                parts.append(moments_of(vae, next(decoded)))
                if not parts[-1].isfinite().all():
                    first = images.files[batch[0]]
                    raise TrainingError(f"the latents of {first} or of an image after it are not finite")
                bar.update(len(batch))
                if stop.requested:
                    return
            labels = images.labels[index.rows(shard)].contiguous()
            moments = torch.cat(parts).contiguous()
            named = zip(index.rows(shard), labels.tolist(), moments, strict=True)
            checks = torch.tensor(
                [[check_of(index, row, label, m, pair[m]) for m in (0, 1)] for row, label, pair in named]
            )
            content = save({"moments": moments, "labels": labels, "checks": checks})
            # save_file would make a file that others can't read
            write_atomically(shard_file(Path(options.out), shard), partial(Path.write_bytes, data=content))


def centre(image: Image, size: int) -> Image:
    """The central square of an image, ``size`` pixels wide, as DiT prepares ImageNet.

    Its size is halved by averaging as long as the shorter side stays at least ``size``, then bicubic interpolation
    brings that to ``size``.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def moments_of(vae: Any, images: Tensor) -> Tensor:
    """uint8 ``[B, 3, H, H]`` -> float16 ``[B, 2, 2, C, h, w]``: image and mirror image; mean and standard deviation."""
    pixels = scaled(images.to(vae.device))
    distribution = vae.encode(torch.cat([pixels, pixels.flip(3)])).latent_dist
    both = torch.stack([distribution.mean, distribution.std], dim=1)  # [2B, 2, C, h, w]
    return both.unflatten(0, (2, -1)).transpose(0, 1).half().cpu()


if __name__ == "__main__":
    run_command(main)
