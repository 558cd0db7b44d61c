"""DiT's data: latents on disk, drawn anew each time, and pixels with labels; order, resume, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from core.errors import InputError
from core.files import save_json
from diffusion.data import ImageLoader
from diffusion.dit.data import (
    LabelledConfig,
    LabelledData,
    LatentIndex,
    Latents,
    Pixels,
    class_files,
    labelled_loader,
    load_labelled,
    shard_file,
)

INDEX = LatentIndex("vae", "0" * 64, 0.5, 32, (2, 4, 4), 3, ("a", "b", "c"), 22, 8, "1" * 64)


def write_latents(folder: Path, index: LatentIndex = INDEX, std: float = 0.0) -> Tensor:
    """A folder of random latents, labels 0 1 2 0 1 ...; returns the moments ``[N, 2, 2, C, h, w]``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(index.count, 2, 2, *index.shape, generator=generator).half()
    moments[:, :, 1] = std
    labels = torch.arange(index.count) % index.classes
    for n in range(index.shards):
        own = slice(index.rows(n).start, index.rows(n).stop)
        save_file({"moments": moments[own].clone(), "labels": labels[own].clone()}, shard_file(folder, n))
    save_json(asdict(index), folder / "index.json")
    return moments


def latents(folder: Path, **options: Any) -> Latents:
    data = load_labelled(LabelledConfig("latents", str(folder), **options))
    assert isinstance(data, Latents)
    return data


def endless(loader: Any, count: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    while len(found) < count:
        for batch in loader:
            found.append(batch)
            if len(found) == count:
                break
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- latents ----------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_means_of_image_or_mirror_image_with_their_labels(tmp_path: Path) -> None:
    moments = write_latents(tmp_path)
    data = latents(tmp_path)
    assert (data.channels, data.size, data.classes, data.latent_scale) == (2, 4, 3, 0.5)
    assert data.class_names == ("a", "b", "c")
    means = 0.5 * moments[:, :, 0].float()  # [N, 2, C, h, w]
    seen: dict[bool, list[int]] = {True: [], False: []}
    for batch in endless(labelled_loader(data, 4, flip=True, seed=0), 20):
        assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.int64
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            (place,) = (means == image).flatten(2).all(2).nonzero().tolist()  # of exactly one image, one orientation
            assert place[0] % 3 == label
            seen[bool(place[1])].append(place[0])
    assert 20 < len(seen[True]) < 60 and len(set(seen[True] + seen[False])) == 22
    unflipped = endless(labelled_loader(data, 4, flip=False, seed=0), 5)
    assert all((means[:, 0] == x).flatten(1).all(1).any() for batch in unflipped for x in batch["image"])


def test_an_epoch_has_each_image_once(tmp_path: Path) -> None:
    write_latents(tmp_path)
    loader = labelled_loader(replace(latents(tmp_path), labels=torch.arange(22)), 4, flip=False, seed=0)
    orders = [[n for batch in loader for n in batch["label"].tolist()] for _ in range(2)]
    assert len(loader) == 5 and all(len(order) == len(set(order)) == 20 for order in orders) and orders[0] != orders[1]


def test_the_noise_is_standard_normal_and_new_in_every_step(tmp_path: Path) -> None:
    index = replace(INDEX, shape=(4, 16, 16), scale=0.25)
    moments = write_latents(tmp_path, index, std=2.0)

    def noises(seed: int) -> Tensor:
        """[steps, B, C, h, w]"""
        found = endless(labelled_loader(latents(tmp_path), 8, flip=False, seed=seed), 6)
        loader = labelled_loader(replace(latents(tmp_path), labels=torch.arange(22)), 8, flip=False, seed=seed)
        means = [moments[batch["label"], 0, 0].float() for batch in endless(loader, 6)]
        return torch.stack([(b["image"] / 0.25 - mean) / 2.0 for b, mean in zip(found, means, strict=True)])

    noise = noises(0)
    assert noise.shape == (6, 8, 4, 16, 16)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    flat = noise.flatten(2).flatten(0, 1)
    correlations = torch.corrcoef(flat) - torch.eye(48)
    assert correlations.abs().max() < 0.2  # 1024 values each: 6 standard deviations
    assert torch.equal(noise, noises(0)) and not torch.equal(noise, noises(1))


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_processes_share_the_batches_of_one(tmp_path: Path, kind: str) -> None:
    data = make(kind, tmp_path)
    whole = endless(labelled_loader(data, 8, flip=True, seed=3), 5)
    for world in (2, 4):
        for rank in range(world):
            share = endless(labelled_loader(data, 8, flip=True, seed=3, rank=rank, world=world), 5)
            for one, part in zip(whole, share, strict=True):
                assert same({key: value[rank::world] for key, value in one.items()}, part)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_resumes_anywhere_to_the_bit(tmp_path: Path, kind: str) -> None:
    data = make(kind, tmp_path)
    whole = endless(labelled_loader(data, 4, flip=True, seed=0), 13)
    for cut in (2, 5, 8):  # an epoch has 5 batches
        first = labelled_loader(data, 4, flip=True, seed=0)
        endless(first, cut)
        second = labelled_loader(data, 4, flip=True, seed=0)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(same(a, b) for a, b in zip(endless(second, 13 - cut), whole[cut:], strict=True))
    with pytest.raises(InputError, match="resume with the same data"):
        second.load_state_dict({"epoch": 0, "position": 6})
    for size, world in ((23, 1), (8, 3), (0, 1)):
        with pytest.raises(InputError, match="batch"):
            labelled_loader(data, size, flip=True, seed=0, world=world)


def make(kind: str, folder: Path) -> LabelledData:
    if kind == "latents":
        write_latents(folder, std=1.0)
        return latents(folder)
    pixels = torch.randint(256, (22, 1, 4, 4), dtype=torch.uint8)
    return Pixels(torch.arange(22) % 3, ("a", "b", "c"), 1, 4, pixels=pixels)


def test_only_what_is_read_comes_into_memory(tmp_path: Path) -> None:
    import psutil

    count = 2**17  # of 32 kB each: 4.3 GB, of which the file system stores nothing
    index = replace(INDEX, shape=(4, 32, 32), image_size=256, count=count, shard_size=count)
    labels, size = 8 * count, 32_768 * count
    header = {
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, labels]},
        "moments": {"dtype": "F16", "shape": [count, 2, 2, 4, 32, 32], "data_offsets": [labels, labels + size]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(shard_file(tmp_path, 0), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + labels + size)
    save_json(asdict(index), tmp_path / "index.json")
    before = psutil.Process().memory_info().rss
    batches = endless(labelled_loader(latents(tmp_path), 32, flip=True, seed=0), 3)
    assert batches[0]["image"].shape == (32, 4, 32, 32) and batches[0]["image"].count_nonzero() == 0
    assert psutil.Process().memory_info().rss - before < 200e6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_batches_of_a_gpu_are_those_of_the_cpu(tmp_path: Path, kind: str) -> None:
    data = make(kind, tmp_path)
    options: dict[str, Any] = {"flip": True, "seed": 3}
    here, there = (endless(labelled_loader(data, 8, device=d, **options), 5) for d in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        assert b["image"].is_cuda and b["label"].is_cuda and torch.equal(a["label"], b["label"].cpu())
        if kind == "pixels":  # latents have noise of the device's own generator
            assert torch.equal(a["image"], b["image"].cpu())
    again = endless(labelled_loader(data, 8, device="cuda", **options), 5)
    assert all(same(a, b) for a, b in zip(there, again, strict=True))


def broken_index(folder: Path) -> None:
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[: len(text) // 2])


def other_classes(folder: Path) -> None:
    save_json(asdict(replace(INDEX, classes=4)), folder / "index.json")


def short_shard(folder: Path) -> None:
    moments = torch.zeros(5, 2, 2, *INDEX.shape, dtype=torch.float16)
    save_file({"moments": moments, "labels": torch.zeros(5, dtype=torch.int64)}, shard_file(folder, 1))


def other_shape(folder: Path) -> None:
    moments = torch.zeros(8, 2, 2, 2, 8, 8, dtype=torch.float16)
    save_file({"moments": moments, "labels": torch.zeros(8, dtype=torch.int64)}, shard_file(folder, 1))


def other_labels(folder: Path) -> None:
    moments = torch.zeros(8, 2, 2, *INDEX.shape, dtype=torch.float16)
    save_file({"moments": moments, "labels": torch.full((8,), 3)}, shard_file(folder, 1))


def cut_shard(folder: Path) -> None:
    content = shard_file(folder, 1).read_bytes()
    shard_file(folder, 1).write_bytes(content[: len(content) - 10])


@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (lambda folder: (folder / "index.json").unlink(), {}, r"no index.json in .*encode_latents.py"),
        (broken_index, {}, r"index.json is broken"),
        (
            lambda folder: save_json(asdict(replace(INDEX, classes=4)), folder / "index.json"),
            {},
            r"index.json is broken",
        ),
        (lambda folder: (folder / "index.json").write_text("[]"), {}, r"index.json is broken"),
        (lambda folder: shard_file(folder, 1).unlink(), {}, r"1 of 3 shards are missing .*latents-00001.safetensors"),
        (short_shard, {}, r"latents-00001.safetensors holds 5 images, index.json says 8"),
        (other_shape, {}, r"holds latents float16 \[2, 8, 8\], index.json says float16 \[2, 4, 4\]"),
        (other_labels, {}, r"has labels 3 to 3 of 3 classes"),
        (cut_shard, {}, r"latents-00001.safetensors is broken: delete it"),
        (None, {"latent_scale": 0.18215}, r"have scale 0.5, --data.latent_scale says 0.18215"),
        (None, {"image_size": 256}, r"images of 32 x 32 pixels, --data.image_size says 256"),
        (None, {"classes": 1000}, r"has 3 classes, --data.classes says 1000"),
    ],
)
def test_what_is_wrong_with_latents_is_said_in_a_line(
    tmp_path: Path, damage: Callable[[Path], Any] | None, options: dict[str, Any], said: str
) -> None:
    write_latents(tmp_path)
    if damage is not None:
        damage(tmp_path)
    with pytest.raises(InputError, match=said) as error:
        latents(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_wanted_scale_size_and_classes_that_are_there(tmp_path: Path) -> None:
    write_latents(tmp_path)
    assert len(latents(tmp_path, latent_scale=0.5, image_size=32, classes=3).labels) == 22


def test_a_limit_is_spread_over_the_shards(tmp_path: Path) -> None:
    moments = write_latents(tmp_path)
    data = latents(tmp_path, limit=4)
    rows = [0, 5, 11, 16]
    assert data.labels.tolist() == [row % 3 for row in rows]
    read = data.read(torch.tensor([3, 1]), torch.tensor([True, False]))
    assert torch.equal(read, torch.stack([moments[16, 1], moments[5, 0]]))
    assert len(latents(tmp_path, limit=100).labels) == 22


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_digits_have_their_labels_and_the_order_of_plain_images() -> None:
    from sklearn.datasets import load_digits

    config = LabelledConfig("digits")
    data = load_labelled(config)
    assert isinstance(data, Pixels) and not config.flips
    assert (data.channels, data.size, data.classes, data.latent_scale) == (1, 8, 10, None)
    assert data.labels.tolist() == load_digits().target.tolist()
    assert torch.equal(data.pixels[:, 0].double(), torch.from_numpy(load_digits().images * 255 / 16).round())
    plain = ImageLoader(data.pixels, 64, flip=True, seed=2)
    labelled = labelled_loader(replace(data, labels=torch.arange(1797)), 64, flip=True, seed=2)
    for a, b in zip(plain, labelled, strict=True):
        assert torch.equal(a["image"], b["image"])
        original = data.pixels[b["label"]].float() / 127.5 - 1
        mirrored = (original != b["image"]).flatten(1).any(1)
        assert torch.equal(original.flip(3)[mirrored], b["image"][mirrored])


def test_folder_of_classes(tmp_path: Path) -> None:
    for name, colour in (
        ("train/dog/x/2.png", 3),
        ("train/dog/1.JPEG", 2),
        ("train/cat/9.jpg", 1),
        ("test/a/1.png", 9),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6), colour).save(tmp_path / name)
    (tmp_path / "train/dog/._1.JPEG").write_bytes(b"what a Mac leaves")
    data = load_labelled(LabelledConfig("folder", str(tmp_path), classes=2))
    assert isinstance(data, Pixels) and data.pixels.is_contiguous() and data.class_names == ("cat", "dog")
    assert data.pixels.shape == (3, 3, 6, 6) and data.pixels[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert data.labels.tolist() == [0, 1, 1] and data.labels.dtype == torch.int64
    below = load_labelled(LabelledConfig("folder", str(tmp_path / "train"), limit=2, image_size=4))
    assert below.labels.tolist() == [0, 1] and (below.size, below.classes) == (4, 2)
    assert class_files(f"{tmp_path}/").files == class_files(tmp_path / "train").files
    (tmp_path / "train/eel").mkdir()
    with pytest.raises(InputError, match=r"no image .* in the class folder .*train/eel"):
        load_labelled(LabelledConfig("folder", str(tmp_path)))
    Image.new("L", (6, 8), 9).save(tmp_path / "train/eel/1.png")
    with pytest.raises(InputError, match=r"eel/1.png is 6 x 8 pixels"):
        load_labelled(LabelledConfig("folder", str(tmp_path)))
    (tmp_path / "flat").mkdir()
    Image.new("L", (6, 8), 9).save(tmp_path / "flat/1.png")
    for root, said in ((tmp_path / "flat", "no class folders in"), (tmp_path / "none", "does not exist")):
        with pytest.raises(InputError, match=said):
            load_labelled(LabelledConfig("folder", str(root)))
    (tmp_path / "wide/a").mkdir(parents=True)
    Image.new("L", (6, 8), 9).save(tmp_path / "wide/a/1.png")
    with pytest.raises(InputError, match=r"6 x 8 pixels, DiT takes square ones"):
        load_labelled(LabelledConfig("folder", str(tmp_path / "wide")))


def test_torchvision_s_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    contents: dict[str, dict[str, Any]] = {"batches.meta": {"label_names": [f"class {n}" for n in range(10)]}}
    for part in ("data_batch_1", "data_batch_2"):
        pixels = np.zeros((5, 3, 32, 32), np.uint8)
        pixels[:, 1, 5, 7] = range(5)
        contents[part] = {"data": pixels.reshape(5, -1), "labels": [9, 8, 7, 6, int(part[-1])]}
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    sums = []
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", sums[1:])
    monkeypatch.setattr(CIFAR10, "test_list", sums[2:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": sums[0][0], "key": "label_names", "md5": sums[0][1]})
    data = load_labelled(LabelledConfig("cifar10", str(tmp_path)))
    assert isinstance(data, Pixels) and data.pixels.shape == (10, 3, 32, 32) and data.pixels.is_contiguous()
    assert data.labels.tolist() == [9, 8, 7, 6, 1, 9, 8, 7, 6, 2] and data.class_names[0] == "class 0"
    assert data.pixels[:, 1, 5, 7].tolist() == [0, 1, 2, 3, 4] * 2 and data.pixels.sum() == 20
    assert load_labelled(LabelledConfig("cifar10", str(tmp_path), limit=2)).labels.tolist() == [9, 9]
    with pytest.raises(InputError, match=r"cifar10 is missing .*--data.download true"):
        load_labelled(LabelledConfig("cifar10", str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "data.limit must be at least 1"),
        ({"classes": 0}, "data.classes must be at least 1"),
        ({"name": "digits", "image_size": 16}, "digits has a size of its own"),
        ({"name": "folder", "latent_scale": 0.2}, "folder has no latents"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LabelledConfig(**options)
