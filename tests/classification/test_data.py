"""Data sets and loaders: splits, augmentation, exact resuming, sharing over processes, and every error message."""

from __future__ import annotations

import pickle
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from classification.data import (
    Arrays,
    Augmentation,
    DataConfig,
    InMemoryLoader,
    Streamed,
    StreamLoader,
    datasets,
    load_datasets,
    make_loader,
)
from classification.data.datasets import resize, transforms
from classification.data.sources import folder_sources
from core.errors import InputError

WIDTH, HEIGHT = 40, 56


@pytest.fixture(scope="session")
def digits() -> Arrays:
    train = load_datasets(DataConfig(name="digits")).train
    assert isinstance(train, Arrays)
    return train


@pytest.fixture(scope="session")
def noise() -> Arrays:
    """Images in which every crop and its mirror image differ, unlike the digits' black borders."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 8, 6), dtype=torch.uint8, generator=generator)
    return Arrays(images, torch.arange(40) % 4, torch.arange(40), "crop_flip", 4)


def write_folder(root: Path, digits: Arrays, train: int, test: int, sizes: tuple[tuple[int, int], ...]) -> Path:
    """`root/{train,val}/<class>/N.png` with real digits of three classes, widths and heights taken in turn."""
    for split, first, number in (("train", 0, train), ("val", train, test)):
        for label in range(3):
            folder = root / split / f"digit{label}"
            folder.mkdir(parents=True)
            members = (digits.targets == label).nonzero().squeeze(1)[first : first + number]
            for k, index in enumerate(members.tolist()):
                image = Image.fromarray(digits.images[index].permute(1, 2, 0).numpy())
                image.resize(sizes[k % len(sizes)]).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="session")
def large_folder(digits: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet in small: sizes differ and exceed the target size. 21 training and 9 test images."""
    root = tmp_path_factory.mktemp("large")
    return write_folder(root, digits, train=7, test=3, sizes=((WIDTH, HEIGHT), (HEIGHT, WIDTH), (90, 80)))


@pytest.fixture
def small_folder(digits: Arrays, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "small", digits, train=3, test=2, sizes=((16, 16),))


@pytest.fixture(scope="session")
def streamed(large_folder: Path) -> Streamed:
    train = load_datasets(DataConfig(name="imagenet", root=str(large_folder), image_size=32, in_memory=False)).train
    assert isinstance(train, Streamed)
    # Small images would be cropped after padding; ImageNet's augmentation is the one to test.
    augment, transform = transforms("random_resized_crop", 32, 0)
    return Streamed(train.source, train.targets, train.indices, augment, transform)


def images_by_index(batches: list[dict]) -> dict[int, Tensor]:
    return {int(i): image for batch in batches for i, image in zip(batch["index"], batch["image"], strict=True)}


def assert_equal(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"image", "target", "index", "weight"}
        assert a["weight"] == b["weight"]
        assert all(torch.equal(a[key], b[key]) for key in ("image", "target", "index"))


# In memory: crops and flips


def variants(image: Tensor, padding: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of the zero-padded image, as it is and flipped, by torchvision's own functions."""
    from torchvision.transforms import functional as F

    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4)
    found = {}
    for y in range(2 * padding + 1):
        for x in range(2 * padding + 1):
            crop = F.crop(padded, y, x, height, width)
            found[crop.numpy().tobytes()] = (y, x, False)
            found[F.hflip(crop).contiguous().numpy().tobytes()] = (y, x, True)
    return found


def test_crops_and_flips_are_torchvisions_and_uniform(noise: Arrays) -> None:
    known = [variants(image, padding=2) for image in noise.images]
    assert all(len(v) == 50 for v in known)
    loader = InMemoryLoader(replace(noise, padding=2), 16, train=True, seed=3)
    counts: dict[tuple[int, int, bool], int] = {}
    for _ in range(100):
        for batch in loader:
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                draw = known[index][image.numpy().tobytes()]  # a KeyError is an image that torchvision cannot give
                counts[draw] = counts.get(draw, 0) + 1
    expected = 100 * 40 / 50
    assert len(counts) == 50
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 85.4  # 99.9th percentile for 49 degrees of freedom
    assert sum(count for draw, count in counts.items() if draw[2]) == pytest.approx(2000, abs=100)


@pytest.mark.parametrize("augmentation", ["crop_flip", "crop", "none"])
def test_a_batch_equals_torchvision_for_the_same_draws(digits: Arrays, augmentation: Augmentation) -> None:
    from torchvision.transforms import functional as F

    loader = InMemoryLoader(replace(digits, augmentation=augmentation), 64, train=True, seed=5)
    padding = 0 if augmentation == "none" else 4
    order, generator = loader._order(0)
    down, right = torch.randint(2 * padding + 1, (2, len(digits)), generator=generator)
    flip = torch.rand(len(digits), generator=generator) < 0.5
    batch = next(iter(loader))
    assert batch["image"].dtype == torch.uint8 and batch["image"].is_contiguous()
    assert torch.equal(batch["index"], order[:64])
    assert torch.equal(batch["target"], digits.targets[order[:64]])
    for k in range(64):
        image = F.crop(F.pad(digits.images[order[k]], [padding] * 4), int(down[k]), int(right[k]), 16, 16)
        if augmentation == "crop_flip" and flip[k]:
            image = F.hflip(image)
        assert torch.equal(batch["image"][k], image)


def test_views_are_independent_and_the_first_is_the_only_one(noise: Arrays) -> None:
    one = list(InMemoryLoader(replace(noise, padding=2), 16, train=True, seed=1))
    loader = InMemoryLoader(replace(noise, padding=2), 16, train=True, seed=1, views=3)
    three = list(loader)
    draws = []
    for batch, single in zip(three, one, strict=True):
        assert batch["image"].shape == (len(single["index"]), 3, 3, 8, 6)
        assert torch.equal(batch["index"], single["index"])
        assert torch.equal(batch["image"][:, 0], single["image"])
        for index, views in zip(batch["index"].tolist(), batch["image"], strict=True):
            known = variants(noise.images[index], padding=2)
            draws.append([known[view.contiguous().numpy().tobytes()] for view in views])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(d[a] == d[b] for d in draws) < 6  # of 40; 0.8 by chance


# Epochs, positions, processes


def test_every_sample_once_an_epoch_in_another_order_each_time(digits: Arrays) -> None:
    loader = InMemoryLoader(digits, 100, train=True, seed=0)
    orders = [torch.cat([batch["index"] for batch in loader]) for _ in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(len(digits))) for order in orders)
    assert not torch.equal(*orders)
    other = torch.cat([batch["index"] for batch in InMemoryLoader(digits, 100, train=True, seed=1)])
    assert not torch.equal(orders[0], other)


def test_memory_resumes_in_the_middle_of_an_epoch(digits: Arrays) -> None:
    def fresh() -> InMemoryLoader:
        return InMemoryLoader(digits, 300, train=True, seed=2)

    whole = fresh()
    batches = [batch for _ in range(3) for batch in whole]
    assert len(batches) == 3 * len(whole) == 15
    for stop in (0, 1, 4, 5, 7, 12):
        first = fresh()
        seen: list[dict] = []
        while len(seen) < stop:
            for batch in first:
                seen.append(batch)
                if len(seen) == stop:
                    break
        assert first.state_dict() == {"epoch": stop // 5, "position": stop % 5}
        second = fresh()
        second.load_state_dict(first.state_dict())
        while len(seen) < 15:
            seen.extend(second)
        assert_equal(seen, batches)
        # Neither does leaving the loop and iterating again lose or repeat a batch.
        if 0 < stop < 5:
            assert_equal(list(first), batches[stop:5])


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumes_in_the_middle_of_an_epoch(streamed: Streamed, workers: int) -> None:
    reference = StreamLoader(streamed, 4, train=True, seed=2, workers=0)
    batches = [batch for _ in range(2) for batch in reference]
    assert len(batches) == 10  # 21 images: a last batch of 1 is dropped
    assert not torch.equal(batches[0]["image"], batches[5]["image"])
    first = StreamLoader(streamed, 4, train=True, seed=2, workers=workers)
    seen = []
    for batch in first:
        seen.append(batch)
        if len(seen) == 2:
            break
    assert first.state_dict() == {"epoch": 0, "position": 2}
    assert_equal([*seen, *first], batches[:5])
    second = StreamLoader(streamed, 4, train=True, seed=2, workers=workers)
    second.load_state_dict({"epoch": 0, "position": 2})
    assert_equal([*seen, *second, *second], batches)


def test_a_saved_position_beyond_the_epoch_is_refused(digits: Arrays) -> None:
    loader = InMemoryLoader(digits, 300, train=True)
    with pytest.raises(InputError, match="batch 9 of an epoch that now has 5"):
        loader.load_state_dict({"epoch": 0, "position": 9})


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_two_processes_share_the_batches_of_one(kind: str, digits: Arrays, streamed: Streamed) -> None:
    split, size = (digits, 64) if kind == "memory" else (streamed, 8)
    one = list(make_loader(split, size, train=True, seed=4))
    ranks = [list(make_loader(split, size, train=True, seed=4, rank=rank, world=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(one)
    for whole, first, second in zip(one, *ranks, strict=True):
        assert torch.equal(first["index"], whole["index"][0::2]) and torch.equal(second["index"], whole["index"][1::2])
        parts = images_by_index([first, second])
        assert parts.keys() == images_by_index([whole]).keys()
        assert all(torch.equal(parts[index], image) for index, image in images_by_index([whole]).items())


def test_weights_make_the_mean_of_uneven_shares_the_mean_of_the_batch(noise: Arrays) -> None:
    split = Arrays(noise.images[:21], noise.targets[:21], noise.indices[:21])
    ranks = [list(InMemoryLoader(split, 8, train=True, rank=rank, world=2)) for rank in range(2)]
    assert [len(batch["index"]) for batch in ranks[0]] == [4, 4, 3]
    assert [len(batch["index"]) for batch in ranks[1]] == [4, 4, 2]
    assert [batch["weight"] for batch in ranks[0]] == [1, 1, pytest.approx(1.2)]
    for first, second in zip(*ranks, strict=True):
        values = [batch["image"].double().mean((1, 2, 3)) for batch in (first, second)]
        weighted = (values[0].mean() * first["weight"] + values[1].mean() * second["weight"]) / 2
        assert weighted == pytest.approx(float(torch.cat(values).mean()))


@pytest.mark.parametrize(("images", "world", "batches"), [(19, 2, 2), (20, 2, 3), (17, 1, 2), (18, 1, 3), (16, 2, 2)])
def test_a_last_batch_of_one_sample_for_some_process_is_dropped(
    noise: Arrays, images: int, world: int, batches: int
) -> None:
    split = Arrays(noise.images[:images], noise.targets[:images], noise.indices[:images])
    loader = InMemoryLoader(split, 8, train=True, world=world)
    assert len(loader) == len(list(loader)) == batches


@pytest.mark.parametrize("kind", ["memory", "stream"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once_unchanged(kind: str, world: int, digits: Arrays, streamed: Streamed) -> None:
    split, size = (digits, 100) if kind == "memory" else (streamed, 7)
    seen: list[int] = []
    for rank in range(world):
        loader = make_loader(split, size, train=False, rank=rank, world=world)
        next(iter(loader))  # a broken off evaluation starts again from the first image
        batches = list(loader)
        assert len(batches) == len(loader) == len(list(loader))
        own = torch.cat([batch["index"] for batch in batches])
        assert torch.equal(own, torch.arange(len(split))[rank::world])
        seen += own.tolist()
        for batch in batches:
            assert batch["weight"] == 1.0
            assert torch.equal(batch["target"], split.targets[batch["index"]])
            if isinstance(split, Arrays):
                assert torch.equal(batch["image"], split.images[batch["index"]])
            else:
                assert batch["image"].shape[1:] == (3, 32, 32) and batch["image"].dtype == torch.uint8
    assert sorted(seen) == list(range(len(split)))


def test_evaluation_with_more_processes_than_images(noise: Arrays) -> None:
    split = Arrays(noise.images[:2], noise.targets[:2], noise.indices[:2])
    seen = [[b["index"].tolist() for b in InMemoryLoader(split, 4, train=False, rank=r, world=4)] for r in range(4)]
    assert seen == [[[0]], [[1]], [], []]


# Streaming


def test_stream_images_are_torchvisions_imagenet_transforms(streamed: Streamed) -> None:
    from torchvision import transforms as T

    usual = T.Compose([T.Resize(37), T.CenterCrop(32), T.PILToTensor()])
    batch = next(iter(StreamLoader(streamed, 21, train=False)))
    for k in range(21):
        assert torch.equal(batch["image"][k], usual(streamed.source.image(k)))
    pixels = streamed.source.image(0).size
    assert pixels == (WIDTH, HEIGHT)


def test_stream_gives_the_global_generators_back(streamed: Streamed) -> None:
    for workers in (0, 2):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        expected = random.random(), np.random.rand(), torch.rand(1)
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        assert len(list(StreamLoader(streamed, 8, train=True, workers=workers))) == 3
        assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_stream_seeds_all_three_generators_for_each_sample_and_view(streamed: Streamed) -> None:
    split = Streamed(streamed.source, streamed.targets, streamed.indices, draw_from_all, streamed.transform)
    loaders = [StreamLoader(split, 8, train=True, seed=7, workers=workers, views=2) for workers in (0, 2)]
    first, second = (list(loader) for loader in loaders)
    assert_equal(first, second)
    values = torch.cat([batch["image"] for batch in first])
    assert values.shape == (21, 2, 3)
    assert len(values.flatten(0, 1).unique(dim=0)) == 42
    single = list(StreamLoader(split, 8, train=True, seed=7))
    assert torch.equal(torch.cat([batch["image"] for batch in single]), values[:, 0])


def draw_from_all(image: Image.Image) -> Tensor:
    return torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))])


# Data sets


def test_digits_are_split_the_same_for_everyone() -> None:
    data = load_datasets(DataConfig(name="digits"))
    assert isinstance(data.train, Arrays) and isinstance(data.test, Arrays)
    assert (len(data.train), len(data.test), data.validation) == (1438, 359, None)
    assert data.train.images.shape == (1438, 3, 16, 16) and data.train.images.dtype == torch.uint8
    assert data.train.targets.bincount().tolist() == [142, 146, 142, 146, 145, 146, 145, 143, 139, 144]
    assert data.test.targets.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert torch.equal(torch.cat([data.train.indices, data.test.indices]).sort().values, torch.arange(1797))
    assert (data.num_classes, data.class_names[:2], data.image_size) == (10, ("0", "1"), 16)
    assert data.train.augmentation == "crop" and data.test.augmentation == "none"
    seeded = load_datasets(DataConfig(name="digits", split_seed=9))
    assert torch.equal(seeded.test.indices, data.test.indices)
    pixels = data.train.images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(data.mean, abs=1e-4)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(data.std, abs=1e-4)


def test_digits_keep_their_grey_levels() -> None:
    from sklearn.datasets import load_digits

    data = load_datasets(DataConfig(name="digits", image_size=8))
    assert isinstance(data.train, Arrays)
    grey = torch.from_numpy(load_digits().images)[data.train.indices]
    for channel in range(3):
        assert torch.equal(data.train.images[:, channel].double(), (grey * 255 / 16).round())


def test_resize_is_bilinear() -> None:
    images = torch.tensor([[0, 100], [200, 40]], dtype=torch.uint8).expand(1, 3, 2, 2)
    expected = torch.tensor([[0, 25, 75, 100], [50, 58.75, 76.25, 85], [150, 126.25, 78.75, 55], [200, 160, 80, 40]])
    assert (resize(images, 4)[0, 0] - expected).abs().max() <= 1


def test_validation_is_held_out_stratified_disjoint_and_seeded() -> None:
    def load(**options: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        data = load_datasets(DataConfig(name="digits", **options))  # type: ignore[arg-type]
        assert data.validation is not None
        return data.train.indices, data.validation.indices, data.validation.targets, data.test.indices

    train, validation, targets, test = load(validation=0.25)
    assert torch.equal(torch.cat([train, validation, test]).sort().values, torch.arange(1797))
    assert targets.bincount().tolist() == [36, 36, 36, 36, 36, 36, 36, 36, 35, 36]
    assert torch.equal(load(validation=0.25)[1], validation)
    assert not torch.equal(load(validation=0.25, split_seed=1)[1], validation)
    # The same images are held out, however few of the others are trained on.
    few, held_out, _, _ = load(validation=0.25, per_class=3)
    assert torch.equal(held_out, validation)
    assert len(few) == 30 and set(few.tolist()) <= set(train.tolist())


def test_classes_and_per_class_choose_training_images() -> None:
    data = load_datasets(DataConfig(name="digits", classes=3, per_class=20))
    assert (data.num_classes, data.class_names) == (3, ("0", "1", "2"))
    assert data.train.targets.bincount().tolist() == [20, 20, 20]
    assert data.test.targets.bincount().tolist() == [36, 36, 35]
    other = load_datasets(DataConfig(name="digits", classes=3, per_class=20, split_seed=1))
    assert not torch.equal(other.train.indices, data.train.indices)


def test_a_folder_of_small_images_is_held_in_memory(small_folder: Path, digits: Arrays) -> None:
    data = load_datasets(DataConfig(name="folder", root=str(small_folder)))
    assert isinstance(data.train, Arrays) and isinstance(data.test, Arrays)
    assert (data.image_size, data.class_names) == (16, ("digit0", "digit1", "digit2"))
    assert (data.train.augmentation, data.train.padding) == ("crop_flip", 4)
    assert data.mean == (0.485, 0.456, 0.406)
    expected = torch.cat([digits.images[digits.targets == label][:3] for label in range(3)])
    assert torch.equal(data.train.images, expected)
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    resized = load_datasets(DataConfig(name="folder", root=str(small_folder), image_size=8, augmentation="none"))
    assert isinstance(resized.train, Arrays) and resized.train.images.shape == (9, 3, 8, 8)


def test_a_folder_of_classes_alone_gives_up_a_share_of_each_for_the_test(
    digits: Arrays, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One split of a folder, opened by itself: every image is in one place, and the same one each time."""
    root = write_folder(tmp_path, digits, train=10, test=0, sizes=((16, 16),)) / "train"
    config = DataConfig(name="folder", root=str(root), validation=0.25)
    data = load_datasets(config)
    assert "20% of the images of each class are test images" in capfd.readouterr().err
    assert data.validation is not None
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {name: split.targets.bincount().tolist() for name, split in splits.items()}
    assert counts == {"train": [6] * 3, "validation": [2] * 3, "test": [2] * 3}
    assert torch.cat([split.indices for split in splits.values()]).sort().values.tolist() == list(range(30))
    whole = folder_sources(str(root))[0]
    for split in splits.values():
        assert isinstance(split, Arrays)
        for image, index in zip(split.images, split.indices.tolist(), strict=True):
            assert torch.equal(image, datasets.pixels(whole.image(index)))
    again = load_datasets(replace(config, validation=0.0, per_class=1))
    assert torch.equal(again.test.indices, data.test.indices)
    other = load_datasets(replace(config, split_seed=1))
    assert not torch.equal(other.test.indices, data.test.indices)
    for share in (0.0, 0.01):
        with pytest.raises(InputError, match=f"data.test {share} of 30 images leaves no test image"):
            load_datasets(replace(config, test=share))


def test_a_folder_of_large_images_is_streamed_through_workers(large_folder: Path) -> None:
    data = load_datasets(DataConfig(name="folder", root=str(large_folder), validation=0.3))
    assert isinstance(data.train, Streamed) and data.validation is not None
    assert (data.image_size, len(data.train), len(data.validation), len(data.test)) == (224, 15, 6, 9)
    loader = make_loader(data.train, 4, train=True, workers=2)
    batches = list(loader)
    assert isinstance(loader, StreamLoader) and [len(batch["index"]) for batch in batches] == [4, 4, 4, 3]
    assert all(batch["image"].shape[1:] == (3, 224, 224) for batch in batches)
    for batch in batches:
        for index, target in zip(batch["index"].tolist(), batch["target"].tolist(), strict=True):
            assert f"/digit{target}/" in data.train.source.describe(int(data.train.indices[index]))


def test_large_images_can_be_resized_into_memory(large_folder: Path) -> None:
    data = load_datasets(DataConfig(name="folder", root=str(large_folder), image_size=16))
    assert isinstance(data.train, Arrays) and data.train.images.shape == (21, 3, 16, 16)
    streamed = load_datasets(
        DataConfig(name="folder", root=str(large_folder), image_size=16, in_memory=False, augmentation="none")
    )
    batch = next(iter(make_loader(streamed.train, 21, train=False)))
    assert torch.equal(data.train.images, batch["image"])
    cropped = folder_sources(str(large_folder))[0].image(0).resize((16, 22), Image.Resampling.BILINEAR)
    assert torch.equal(data.train.images[0], torch.from_numpy(np.array(cropped)[3:19]).permute(2, 0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_many_images_are_decoded_in_chunks_by_workers(
    workers: int, small_folder: Path, digits: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "WORTH_WORKERS", 0)
    monkeypatch.setattr(datasets, "CHUNK", 2)
    data = load_datasets(DataConfig(name="folder", root=str(small_folder), workers=workers))
    assert isinstance(data.train, Arrays)
    expected_images = torch.cat([digits.images[digits.targets == label][:3] for label in range(3)])
    assert torch.equal(data.train.images, expected_images)
    expected = break_folder(small_folder, "broken")
    with pytest.raises(InputError) as error:
        load_datasets(DataConfig(name="folder", root=str(small_folder), workers=workers))
    assert expected in message(error)


@pytest.mark.parametrize("in_memory", [True, False])
def test_tar_files_equal_folders(small_folder: Path, tmp_path: Path, in_memory: bool) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(small_folder / split, arcname=split)
    config = {"name": "folder", "in_memory": in_memory}
    batches = [
        list(make_loader(load_datasets(DataConfig(root=str(root), **config)).train, 4, train=True, workers=2))  # type: ignore[arg-type]
        for root in (small_folder, tmp_path)
    ]
    assert_equal(*batches)


@pytest.mark.parametrize("in_memory", [None, False])
def test_timms_torchvision_sets_equal_folders(small_folder: Path, in_memory: bool | None) -> None:
    pytest.importorskip("timm")
    folder, timm = (
        load_datasets(DataConfig(name=name, root=str(small_folder), in_memory=in_memory))
        for name in ("folder", "torch/image_folder")
    )
    assert folder.class_names == timm.class_names
    assert_equal(*(list(make_loader(data.train, 4, train=True)) for data in (folder, timm)))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("RGB", "bmp"), ("L", "jpg")]
)
def test_any_image_becomes_rgb(small_folder: Path, mode: str, suffix: str) -> None:
    file = small_folder / "train" / "digit0" / "0.png"
    image = Image.open(file).convert(mode)
    file.unlink()
    image.save(file.with_suffix(f".{suffix}"))
    data = load_datasets(DataConfig(name="folder", root=str(small_folder)))
    assert isinstance(data.train, Arrays)
    decoded = np.array(Image.open(file.with_suffix(f".{suffix}")).convert("RGB"))
    assert torch.equal(data.train.images[0], torch.from_numpy(decoded).permute(2, 0, 1))


def test_cifar_is_read_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the real archive, with a few images of our own: only the checksums are passed over."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(2, 200, 3072), dtype=np.uint8)
    labels = [k % 100 for k in range(200)]
    for name, data in zip(("train", "test"), pixels, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{k:02d}" for k in range(100)]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    data = load_datasets(DataConfig(root=str(tmp_path)))
    assert isinstance(data.train, Arrays) and isinstance(data.test, Arrays)
    assert torch.equal(data.train.images, torch.from_numpy(pixels[0]).reshape(200, 3, 32, 32))
    assert torch.equal(data.test.images, torch.from_numpy(pixels[1]).reshape(200, 3, 32, 32))
    assert (data.num_classes, data.class_names[99], data.image_size) == (100, "class99", 32)
    assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert (data.train.augmentation, data.train.padding) == ("crop_flip", 4)


def test_jpeg_cifar10_loads_as_a_folder(shared_data: Path, tmp_path: Path) -> None:
    wanted = {f"cifar10/{split}/{name}" for split in ("test", "train") for name in ("airplane", "automobile")}
    left = dict.fromkeys(wanted, 5)
    with tarfile.open(shared_data / "cifar10-jpeg.tar.xz", "r|xz") as tar:
        for member in tar:
            folder = member.name.rpartition("/")[0]
            if member.isfile() and left.get(folder):
                left[folder] -= 1
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                file = tar.extractfile(member)
                assert file is not None
                (tmp_path / member.name).write_bytes(file.read())
            if not any(left.values()):
                break
    root = tmp_path / "cifar10"
    data = load_datasets(DataConfig(name="folder", root=str(root)))
    assert isinstance(data.train, Arrays)
    assert (data.class_names, data.image_size) == (("airplane", "automobile"), 32)
    assert data.train.images.shape == (10, 3, 32, 32) and len(data.test) == 10
    decoded = [np.array(Image.open(path)) for path in sorted((root / "train").glob("*/*.jpg"))]
    assert torch.equal(data.train.images, torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2))


def test_command_line_reads_the_config() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    options = ["--data.augmentation", "none", "--data.image_size", "64", "--data.validation", "0.1"]
    data = parser.parse_args(options).data
    assert DataConfig(**data.as_dict()) == DataConfig(augmentation="none", image_size=64, validation=0.1)
    text = " ".join(parser.format_help().split())
    assert "in [0, 1); stratified, drawn by `split_seed`" in text


# Errors


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "cifar"}, "unknown data set 'cifar': did you mean 'cifar10'?"),
        ({"augmentation": "crops"}, "unknown augmentation 'crops': did you mean 'crop'?"),
        ({"validation": 1.0}, "data.validation must be in [0, 1): 1.0"),
        ({"validation": -0.1}, "data.validation must be in [0, 1): -0.1"),
        ({"validation": 0.001}, "data.validation 0.001 of 1438 training images leaves no validation image"),
        ({"validation": 0.999}, "data.validation 0.999 of 1438 training images leaves no training image"),
        ({"classes": 11}, "data.classes is 11, but digits has 10 classes"),
        ({"classes": 0}, "data.classes must be at least 1: 0"),
        ({"per_class": 140}, "data.per_class is 140, but class 8 has 139 training images"),
        ({"per_class": 140, "validation": 0.5}, "data.per_class is 140, but class 8 has 69 training images"),
        ({"per_class": 0}, "data.per_class must be at least 1: 0"),
        ({"image_size": 0}, "data.image_size must be in [4, 4096]: 0"),
        ({"padding": -1}, "data.padding must be in [0, 4096]: -1"),
        ({"workers": -1}, "data.workers must be in [0, 1024]: -1"),
        ({"in_memory": False}, "data set digits is always held in memory: leave data.in_memory out"),
        ({"augmentation": "random_resized_crop"}, "augmentation random_resized_crop needs images that are not held in"),
        ({"name": "wds/shards"}, "wds/ sets can only be read in sequence, without sample numbers or exact resuming"),
        ({"name": "torhc/mnist"}, "unknown data set 'torhc/mnist': a name with a slash begins with torch/ or hfds/"),
        ({"name": "torch/nothing"}, "cannot load the train images of torch/nothing from data: Unknown torchvision"),
    ],
)
def test_impossible_options(options: dict, expected: str) -> None:
    with pytest.raises(InputError) as error:
        load_datasets(DataConfig(**{"name": "digits", **options}))
    assert expected in message(error)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_where_and_how(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_datasets(DataConfig(name=name, root=str(tmp_path)))
    assert str(tmp_path) in message(error) and "--data.download true" in message(error)


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import cifar

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(InputError) as error:
        load_datasets(DataConfig(root=str(tmp_path), download=True))
    assert message(error) == f"cannot download cifar100 to {tmp_path}: no route to host"


def break_folder(root: Path, damage: str) -> str:
    """Damage the folder; returns what the message must say."""
    train, val = root / "train", root / "val"
    if damage == "no root":
        root.rename(root.with_name("moved"))
        return f"data folder {root} does not exist"
    if damage == "no train":
        train.rename(root / "training")
        return f"no training images in {root}: expected {train} with a folder for each class"
    if damage == "no test":
        val.rename(root / "eval")
        return f"no test images in {root}: expected {val} or {root / 'validation'} or {root / 'test'}"
    if damage == "no classes":
        for folder in train.iterdir():
            folder.rename(root / folder.name)
        return f"no class folders in {train}"
    if damage == "empty class":
        (train / "digit9").mkdir()
        return f"class folder {train / 'digit9'} holds no image"
    if damage == "foreign test class":
        (val / "digit1").rename(val / "digit7")
        return f"{val} has class digit7, which {train} lacks"
    if damage == "broken":
        file = train / "digit1" / "1.png"
        file.write_bytes(file.read_bytes()[:60])
        return f"cannot decode {file}: broken or no image; replace or delete it"
    if damage == "empty file":
        (val / "digit1" / "1.png").write_bytes(b"")
        return f"cannot decode {val / 'digit1' / '1.png'}: broken or no image"
    if damage == "sizes":
        Image.new("RGB", (12, 16)).save(val / "digit1" / "1.png")
        return f"{val / 'digit1' / '1.png'} has 12x16 pixels, others 16x16: set data.image_size"
    if damage == "compressed tar":
        train.rename(root / "training")
        with tarfile.open(root / "train.tar", "w:gz") as tar:
            tar.add(root / "training", arcname="train")
        return f"cannot read {root / 'train.tar'} as an uncompressed tar file"
    raise AssertionError(damage)


@pytest.mark.parametrize(
    "damage",
    [
        "no root",
        "no train",
        "no test",
        "no classes",
        "empty class",
        "foreign test class",
        "broken",
        "empty file",
        "sizes",
        "compressed tar",
    ],
)
def test_damaged_folders(small_folder: Path, damage: str) -> None:
    expected = break_folder(small_folder, damage)
    with pytest.raises(InputError) as error:
        load_datasets(DataConfig(name="folder", root=str(small_folder)))
    assert expected in message(error)


def test_an_image_that_is_not_square_needs_a_size_in_memory(large_folder: Path) -> None:
    with pytest.raises(InputError, match=r"has 40x56 pixels: set data\.image_size"):
        load_datasets(DataConfig(name="folder", root=str(large_folder), in_memory=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_in_the_stream_is_named(small_folder: Path, workers: int) -> None:
    data = load_datasets(DataConfig(name="folder", root=str(small_folder), in_memory=False))
    loader = make_loader(data.train, 4, train=True, workers=workers)
    for expected in (break_folder(small_folder, "broken"), "cannot read"):
        with pytest.raises(InputError) as error:
            list(loader)
        assert expected in message(error) and str(small_folder / "train" / "digit1" / "1.png") in message(error)
        (small_folder / "train" / "digit1" / "1.png").unlink(missing_ok=True)


def test_batches_that_processes_cannot_share_are_refused(digits: Arrays) -> None:
    with pytest.raises(InputError, match="a batch of 3 images cannot be shared by 4 processes"):
        InMemoryLoader(digits, 3, train=True, world=4)
    few = Arrays(digits.images[:3], digits.targets[:3], digits.indices[:3])
    with pytest.raises(InputError, match="3 training images are too few for 2 process"):
        InMemoryLoader(few, 8, train=True, world=2)
