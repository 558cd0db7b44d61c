"""Encoding a folder of images by a tiny VAE: the latents, what interruption leaves, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, in_two_processes
from torch import Tensor

pytest.importorskip("diffusers")

from core.errors import InputError
from diffusion.dit.data import LabelledConfig, Latents, labelled_loader, load_labelled, read_index, shard_file
from diffusion.dit.sampling import load_vae
from diffusion.tools import encode_latents
from diffusion.tools.encode_latents import weights_hash

Shell = Callable[[Callable[[list[str]], int], list[str]], tuple[int, str, str]]
SIZE = 16
NAMES = ["b/3.JPEG", "a/2.JPEG", "c/1.png", "a/10.JPEG", "b/deeper/4.JPEG", "a/1.JPEG", "c/9.JPEG", "c/7.JPEG"]
ORDER = ["a/1.JPEG", "a/10.JPEG", "a/2.JPEG", "b/3.JPEG", "b/deeper/4.JPEG", "c/1.png", "c/7.JPEG", "c/9.JPEG"]
LABELS = [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("vae") / "vae"
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth random pictures of several sizes (even: a half of an odd one is a matter of taste), one grey."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for n, name in enumerate(NAMES):
        file = folder / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        picture = coarse.resize((20 + 8 * n, 70 - 6 * n), Image.Resampling.BICUBIC)
        (picture.convert("L") if n == 3 else picture).save(file, quality=95)
    return folder


def command(images: Path, vae: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--image_size", str(SIZE), "--shard_size", "3", "--batch_size", "2", "--workers", "1"]
    return [str(images), "--vae", str(vae), "--out", str(out), "--device", "cpu", *sizes, *more]


@pytest.fixture(scope="module")
def whole(images: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents of all images, made in one go."""
    out = tmp_path_factory.mktemp("latents") / "whole"
    assert encode_latents.main(command(images, vae, out)) == 0
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def prepared(file: Path) -> Tensor:
    """DiT's preparation by its definition, with torch's interpolation in the place of Pillow's: [3, H, H], 0..255."""
    image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).float()
    while min(image.shape[1:]) >= 2 * SIZE:
        height, width = image.shape[1] // 2, image.shape[2] // 2
        image = torch.nn.functional.interpolate(image[None], (height, width), mode="area")[0]
    factor = SIZE / min(image.shape[1:])
    height, width = round(image.shape[1] * factor), round(image.shape[2] * factor)
    image = torch.nn.functional.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    return image[:, top : top + SIZE, left : left + SIZE].clamp(0, 255)


# --- what is written --------------------------------------------------------------------------------------------------


def test_latents_are_the_vae_s_of_each_image_and_its_mirror_image(images: Path, vae: Path, whole: Path) -> None:
    data = load_labelled(LabelledConfig("latents", str(whole), classes=3, image_size=SIZE, latent_scale=0.18215))
    assert isinstance(data, Latents) and (data.channels, data.size) == (4, 8)
    assert data.class_names == ("a", "b", "c") and data.labels.tolist() == LABELS
    network = load_vae(vae)
    for row, name in enumerate(ORDER):
        pixels = np.asarray(encode_latents.centre(Image.open(images / "train" / name).convert("RGB"), SIZE))
        exact = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        assert (exact - prepared(images / "train" / name)).abs().max() < 4  # Pillow rounds after each of its passes
        for mirrored in (False, True):
            image = exact.flip(2) if mirrored else exact
            expected = network.encode(image[None] / 127.5 - 1).latent_dist
            mean, std = data.read(torch.tensor([row]), torch.tensor([mirrored]))[0].float()
            torch.testing.assert_close(mean, expected.mean[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(std, expected.std[0], rtol=1e-3, atol=1e-4)
    image, mirror_image = (data.read(torch.tensor([0]), torch.tensor([m]))[0, 0] for m in (False, True))
    assert not torch.allclose(image.flip(2), mirror_image, atol=1e-3)  # a VAE knows left from right
    assert next(iter(labelled_loader(data, 4, flip=True, seed=0)))["image"].shape == (4, 4, 8, 8)


def test_the_index_says_what_made_it(vae: Path, whole: Path) -> None:
    index = read_index(whole)
    assert (index.vae, index.scale, index.image_size, index.shape) == (str(vae), 0.18215, SIZE, (4, 8, 8))
    assert (index.classes, index.class_names, index.count, index.shards) == (3, ("a", "b", "c"), 8, 3)
    assert index.vae_sha256 == weights_hash(load_vae(vae))
    assert sorted(content(whole)) == ["index.json", *(shard_file(whole, n).name for n in range(3))]
    modes = {file.stat().st_mode & 0o777 for file in whole.iterdir()}
    assert len(modes) == 1  # as the user's umask says, for all of them


def test_halving_is_the_mean_of_four_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    mean = pixels.astype(float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    got = np.asarray(encode_latents.centre(Image.fromarray(pixels), 16)).astype(float)
    assert np.abs(got - mean).max() <= 1  # rounded after each of the two directions
    wide = Image.fromarray(np.repeat(np.arange(20, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2))
    assert np.asarray(encode_latents.centre(wide, 16))[0, :, 0].tolist() == list(range(2, 18))


def test_threads_and_a_pipeline_s_vae_change_nothing(images: Path, vae: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "pipeline/vae")
    arguments = command(images / "train", tmp_path / "pipeline", tmp_path / "out", "--workers", "3")
    assert encode_latents.main(arguments) == 0
    made, before = content(tmp_path / "out"), content(whole)
    assert made.pop("index.json") != before["index.json"]  # another VAE's name
    assert made == {name: data for name, data in before.items() if name != "index.json"}


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_equals_uninterrupted(
    images: Path, vae: Path, whole: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    moments_of, calls = encode_latents.moments_of, []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:  # the first batch of the second shard
            os.kill(os.getpid(), number)
        return moments_of(*arguments)

    monkeypatch.setattr(encode_latents, "moments_of", interrupted)
    code, out, err = shell(encode_latents.main, command(images, vae, tmp_path))
    assert code == 130 and "8 images of 3 classes: 3 of 3 shards to make" in out and "is not complete" in err
    assert len(calls) == 3 and sorted(content(tmp_path)) == ["index.json", "latents-00000.safetensors"]
    with pytest.raises(InputError, match=r"2 of 3 shards are missing .*latents-00001"):
        load_labelled(LabelledConfig("latents", str(tmp_path)))
    stamp = shard_file(tmp_path, 0).stat().st_mtime_ns
    code, out, _ = shell(encode_latents.main, command(images, vae, tmp_path))
    assert code == 0 and "2 of 3 shards to make" in out and f"{tmp_path} is complete" in out
    assert content(tmp_path) == content(whole) and shard_file(tmp_path, 0).stat().st_mtime_ns == stamp
    calls.clear()
    assert shell(encode_latents.main, command(images, vae, tmp_path))[0] == 0 and not calls


def test_broken_shards_and_what_a_kill_left_are_made_anew(
    images: Path, vae: Path, whole: Path, tmp_path: Path, shell: Shell
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shard_file(out, 0).write_bytes(shard_file(out, 0).read_bytes()[:-5])
    shard_file(out, 1).rename(f"{shard_file(out, 1)}.writing")
    shutil.copy(shard_file(out, 2), tmp_path / "kept")
    code, said, err = shell(encode_latents.main, command(images, vae, out))
    assert code == 0 and "2 of 3 shards to make" in said and "latents-00000.safetensors is broken" in err
    assert content(out) == content(whole)


def test_full_disk(images: Path, vae: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # the index fits, a shard does not
    try:
        code, _, err = shell(encode_latents.main, command(images, vae, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "cannot write" in err and "latents-00000.safetensors: File too large" in err, err
    assert sorted(content(tmp_path / "out")) == ["index.json"]
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code, _, err = shell(encode_latents.main, command(images, vae, tmp_path / "other"))
    assert code == 2 and "has room for 0.0 GB, the latents need" in err and not list((tmp_path / "other").iterdir())


@pytest.mark.slow
def test_two_processes_write_what_one_does(images: Path, vae: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    shard_file(tmp_path / "out", 1).unlink()  # one shard for two processes
    for name in ("out", "new"):
        done = in_two_processes(ROOT / "diffusion/tools/encode_latents.py", *command(images, vae, tmp_path / name))
        assert done.stdout.count("is complete") == 1
        assert content(tmp_path / name) == content(whole)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scale", "0.5"], "holds latents with scale 0.18215, this command says 0.5"),
        (["--image_size", "32"], "holds latents with image_size 16, this command says 32"),
        (["--shard_size", "4"], "holds latents with shard_size 3, this command says 4"),
        (["--vae", "OTHER"], "holds latents of another VAE, "),
        (["--vae", "/absent/vae"], "no VAE in /absent/vae: the folder does not exist"),
        (["--vae", "IMAGES"], "neither config.json nor vae/config.json is there"),
        (["--image_size", "15"], "--image_size 15 is no multiple of 2"),
        (["--batch_size", "0"], 'batch_size": Not of type PositiveInt: 0'),
        (["--image_size", "100000"], 'image_size": Not of type ImageSize: 100000'),
        (["--workers", "1000000"], 'workers": Not of type Threads: 1000000'),
        (["--scale", "0"], "--scale must be positive"),
        (["--scle", "1"], "did you mean scale"),
    ],
)
def test_another_vae_scale_or_size_is_one_line(
    images: Path, vae: Path, whole: Path, tmp_path: Path, shell: Shell, arguments: list[str], said: str
) -> None:
    if "OTHER" in arguments:
        from diffusers import AutoencoderKL

        other = AutoencoderKL.from_pretrained(vae)
        with torch.no_grad():
            next(other.parameters()).add_(1e-3)
        other.save_pretrained(tmp_path / "other")
    given = [{"OTHER": str(tmp_path / "other"), "IMAGES": str(images)}.get(a, a) for a in arguments]
    before = content(whole)
    code, _, err = shell(encode_latents.main, command(images, vae, whole, *given))
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert content(whole) == before


def test_what_the_memory_cannot_hold_is_refused(
    images: Path, vae: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 4 * 2 * 2 * SIZE**2 * 8  # two images and their mirror images after the VAE's first convolution
    many = ["--shard_size", "1000000000"]
    for total, more, said in (
        (first - 1, [], f"--batch_size 2 of --image_size {SIZE} needs"),
        (first, many, "--shard_size 1000000000 needs"),
    ):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))  # noqa: B023
        code, _, err = shell(encode_latents.main, command(images, vae, tmp_path / "out", *more))
        assert code == 2 and said in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()


def test_wrong_images_and_folders_are_one_line(
    images: Path, vae: Path, whole: Path, tmp_path: Path, shell: Shell
) -> None:
    def refused(said: str, images: Path = images, out: Path = tmp_path / "out", *more: str) -> None:
        code, _, err = shell(encode_latents.main, command(images, vae, out, *more))
        assert code == 2 and said in err and err.count("\n") == 1, err

    refused(f"image folder {tmp_path / 'none'} does not exist", tmp_path / "none")
    (tmp_path / "empty/a").mkdir(parents=True)
    refused("no image (.jpg, ", tmp_path / "empty")
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/train/c/7.JPEG").rename(tmp_path / "images/train/c/8.JPEG")
    refused("latents of images with other names", tmp_path / "images", whole)
    (tmp_path / "images/train/c/8.JPEG").unlink()
    refused("holds latents with count 8, this command says 7", tmp_path / "images", whole)
    for workers in ("1", "3"):
        file = tmp_path / "images/train/b/3.JPEG"
        file.write_bytes(file.read_bytes()[:300])
        refused(
            f"cannot decode {file}: broken or no image", tmp_path / "images", tmp_path / "out", "--workers", workers
        )
        assert sorted(content(tmp_path / "out")) == ["index.json", "latents-00000.safetensors"]
    (tmp_path / "out/index.json").unlink()
    refused("holds latents without index.json")
    refused("is a file", out=tmp_path / "images/train/c/1.png")
    text = (whole / "index.json").read_text()
    (tmp_path / "out/index.json").write_text(text[:40])
    refused("index.json is broken")


def test_latents_that_are_not_finite(images: Path, vae: Path, tmp_path: Path, shell: Shell) -> None:
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        other.quant_conv.bias.fill_(1e6)  # beyond float16
    other.save_pretrained(tmp_path / "vae")
    code, _, err = shell(encode_latents.main, command(images, tmp_path / "vae", tmp_path / "out"))
    assert code == 1 and "latents of a/1.JPEG or of an image after it are not finite" in err


def test_vaes_that_are_none(vae: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = "diffusion_pytorch_model.safetensors"

    def changed(name: str, **config: Any) -> Path:
        shutil.copytree(vae, tmp_path / name)
        said = json.loads((vae / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**said, **config}))
        return tmp_path / name

    with pytest.raises(InputError, match=r"shifts its latents by 0.1"):
        load_vae(changed("shifted", shift_factor=0.1))
    lacking = changed("lacking")
    save_file({k: v for k, v in load_file(vae / weights).items() if "quant_conv" not in k}, lacking / weights)
    with pytest.raises(InputError, match=r"lacks weights: \w*quant_conv\.\w+ \(4 in all\)"):
        load_vae(lacking)
    cut = changed("cut")
    (cut / weights).write_bytes((vae / weights).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"no AutoencoderKL in .*cut"):
        load_vae(cut)
    unet = changed("unet")
    (unet / "config.json").write_text('{"_class_name": "UNet2DModel", "norm_num_groups": null, "layers_per_block": 2}')
    with pytest.raises(InputError, match=r"no AutoencoderKL in .*unet"):
        load_vae(unet)
