"""What training does to images beside cropping: timm's policies, colour jitter, erasing; and which data it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import arguments, lines
from torch import Tensor

from classification.config import parse_command
from classification.data import Arrays, DataConfig, Streamed, StreamLoader, load_datasets, make_loader
from classification.data.classes import check_classes
from classification.data.policy import Erase, auto_augmenter
from core.errors import InputError
from core.training.seed import mix, seeded

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
ALL: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "re_prob": 0.5}
GREY = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root/{train,val}/{a,b}/N.png`: 7 + 2 coloured images a class, larger than what they are cropped to."""
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 7), ("val", 2)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for k in range(number):
                pixels = torch.randint(256, (30, 24, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{k}.png")
    return root


def streamed(photographs: Path, **options: Any) -> Streamed:
    data = load_datasets(
        DataConfig("folder", str(photographs), image_size=16, augmentation="random_resized_crop", **options)
    )
    assert isinstance(data.train, Streamed) and isinstance(data.test, Streamed)
    return data.train


def in_memory(**options: Any) -> Streamed:
    data = load_datasets(DataConfig("digits", classes=3, per_class=7, **options))
    assert isinstance(data.train, Streamed) and isinstance(data.test, Arrays)
    return data.train


def epochs(split: Streamed, count: int = 2, **options: Any) -> list[dict[str, Any]]:
    loader = StreamLoader(split, 4, train=True, seed=5, **options)
    return [batch for _ in range(count) for batch in loader]


def assert_equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "target", "index"))


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["stream", "memory"])
def test_an_image_is_cropped_then_augmented_then_erased_by_timm_from_its_own_seed(
    photographs: Path, where: str
) -> None:
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms as T

    split = streamed(photographs, **ALL) if where == "stream" else in_memory(**ALL)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if where == "stream" else ((0.3058,) * 3, (0.3187,) * 3)
    crops = {
        "stream": [T.RandomResizedCrop(16), T.RandomHorizontalFlip()],
        "memory": [T.RandomCrop(16, 4)],
    }
    settings = {"translate_const": 7, "img_mean": tuple(round(255 * value) for value in mean)}
    steps = [*crops[where], rand_augment_transform("rand-m9-mstd0.5-inc1", settings), T.ColorJitter(0.4, 0.4, 0.4)]
    wanted = T.Compose([*steps, T.ToTensor(), T.Normalize(mean, std), RandomErasing(0.5, mode="pixel", device="cpu")])
    seen = 0
    batches = epochs(split, 2, views=2)
    for epoch, part in enumerate((batches[: len(batches) // 2], batches[len(batches) // 2 :])):
        for batch in part:
            for index, views in zip(batch["index"].tolist(), batch["image"], strict=True):
                for view, image in enumerate(views):
                    with seeded(mix(5, epoch, index, view)):
                        reference = wanted(split.source.image(int(split.indices[index])))
                    raw = 255 * (reference * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))
                    assert image.dtype == torch.uint8
                    assert (image - raw.clamp(0, 255)).abs().max() <= 0.51
                    seen += 1
    assert seen >= 2 * 2 * 12


@pytest.mark.parametrize("where", ["stream", "memory"])
def test_neither_workers_nor_a_resume_change_an_image(photographs: Path, where: str) -> None:
    split = streamed(photographs, **ALL) if where == "stream" else in_memory(**ALL)
    whole = epochs(split, workers=0)
    assert not torch.equal(whole[0]["image"], whole[len(whole) // 2]["image"])
    assert_equal(whole, epochs(split, workers=2))
    second = StreamLoader(split, 4, train=True, seed=5)
    second.load_state_dict({"epoch": 0, "position": 2})
    assert_equal(whole[2:], [*second, *second])


def test_images_in_memory_are_the_same_ones_and_evaluation_leaves_them_alone() -> None:
    plain = load_datasets(DataConfig("digits", classes=3, per_class=7, validation=0.2))
    other = load_datasets(DataConfig("digits", classes=3, per_class=7, validation=0.2, re_prob=1e-9))
    assert isinstance(plain.train, Arrays) and isinstance(other.train, Streamed)
    assert torch.equal(plain.train.targets, other.train.targets)
    assert torch.equal(plain.train.indices, other.train.indices)
    stored = next(iter(make_loader(other.train, 21, train=False)))
    assert torch.equal(stored["image"], plain.train.images)
    for a, b in ((plain.validation, other.validation), (plain.test, other.test)):
        assert isinstance(a, Arrays) and isinstance(b, Arrays) and torch.equal(a.images, b.images)


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5-inc1", "rand-m10-n3-p1-tweights", "rand-m15-mmax15-inc1-t3a", "augmix-m10-w4-d2-b1", "original",
     "originalr-mstd0.5", "v0", "v0r", "3a", "rand"],
)  # fmt: skip
def test_every_policy_of_timm_takes_every_draw(policy: str) -> None:
    """At magnitude 10 timm keeps 0 bits of each colour, which Pillow refuses from 13 on."""
    pixels = torch.randint(256, (12, 12, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    augment = auto_augmenter(policy, 12, GREY[0])
    results = set()
    with seeded(3):
        for _ in range(200):
            result = augment(image)
            assert result.size == (12, 12) and result.mode == "RGB"
            results.add(result.tobytes())
    assert len(results) > 3


@pytest.mark.parametrize(
    "policy",
    ["trivial", "", "random-m9", "rand-m", "rand-mstd", "rand-q5", "rand-m9.5", "rand--m9", "rand-m9999", "rand-tnone",
     "rand-n99-tweights", "augmix-q1", "original-m9", "rand-m9_mstd0.5"],
)  # fmt: skip
def test_another_policy_is_refused_with_an_example(tmp_path: Path, command: Command, policy: str) -> None:
    code, _, said = command(arguments(tmp_path / "run", "--data.auto_augment", policy))
    (line,) = said.splitlines()
    assert code == 2 and line.startswith(f"error: data.auto_augment {policy!r} is no policy of timm's")
    assert "rand-m9-mstd0.5-inc1" in line and not (tmp_path / "run").exists()


def test_the_colour_jitter_stays_within_its_factors() -> None:
    image = Image.new("RGB", (4, 4), (100, 100, 100))  # grey: brightness alone changes it
    split = in_memory(color_jitter=0.2, augmentation="none")
    with seeded(0):
        levels = {int(split.augment(image.resize((16, 16))).amax()) for _ in range(200)}
    assert min(levels) < 85 and max(levels) > 115
    assert min(levels) >= 80 and max(levels) <= 120


# --- erasing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_a_rectangle_is_erased_and_nothing_else_changes(mode: Any) -> None:
    image = torch.arange(3 * 40 * 40).remainder(251).to(torch.uint8).view(3, 40, 40)
    erase = Erase(0.5, mode, *GREY)
    erased, filled = 0, []
    with seeded(4):
        for _ in range(300):
            result = erase(image.clone())
            assert result.dtype == torch.uint8
            changed = (result != image).any(dim=0)
            if not changed.any():
                continue
            erased += 1
            rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
            (top, bottom), (left, right) = ((int(x.min()), int(x.max()) + 1) for x in (rows, columns))
            assert 0.015 < (bottom - top) * (right - left) / 1600 < 0.36
            inside = result[:, top:bottom, left:right]
            assert changed[top:bottom, left:right].float().mean() > 0.98  # else noise met the pixel's own value
            filled.append(inside.flatten(1).double())
            if mode != "pixel":
                assert (inside == inside[:, :1, :1]).all()
            if mode == "const":
                assert inside[:, 0, 0].tolist() == [128, 102, 76]
    assert 120 < erased < 180
    if mode == "pixel":
        values = torch.cat(filled, dim=1)
        assert values.mean(dim=1).tolist() == pytest.approx([127.5, 103, 86], abs=4)  # of clipped normal draws
        assert int(values.min()) == 0 and int(values.max()) == 255


# --- a run ------------------------------------------------------------------------------------------------------------


def test_what_was_given_is_written_down_and_nothing_else(tmp_path: Path) -> None:
    before = parse_command(arguments(tmp_path / "run")).resolved()["data"]
    assert not {"auto_augment", "color_jitter", "re_prob", "re_mode", "mixup", "cutmix", "mixup_prob"} & before.keys()
    given = ["--data.auto_augment", "original", "--data.re_prob", "0.25", "--data.cutmix", "1"]
    after = parse_command(arguments(tmp_path / "run", *given)).resolved()["data"]
    assert after == {**before, "auto_augment": "original", "re_prob": 0.25, "cutmix": 1.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.re_prob", "1.5"], "data.re_prob must be in [0, 1]: 1.5"),
        (["--data.re_mode", "black"], "data.re_mode"),
        (["--data.color_jitter", "-1"], "data.color_jitter must not be negative: -1"),
        (["--data.mixup", "-0.1"], "data.mixup must not be negative: -0.1"),
        (["--data.mixup_prob", "2"], "data.mixup_prob must be in [0, 1]: 2"),
        (["--data.classes", "1"], "digits has one class here (0), and there is nothing to tell apart"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, command: Command, more: list[str], message: str) -> None:
    code, _, said = command(arguments(tmp_path / "run", *more))
    (line,) = said.splitlines()
    assert code == 2 and line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_a_dry_run_and_noisy_labels_go_with_all_of_it(tmp_path: Path, command: Command) -> None:
    more = ["--data.auto_augment", "augmix-m3", "--data.re_prob", "0.5", "--data.noise", "0.3", "--data.mixup", "0.2"]
    assert command(arguments(tmp_path / "run", *more, "--data.workers", "0", "--dry-run", "--time"))[0] == 0
    assert command(arguments(tmp_path / "run", *more, "--data.workers", "0", "--fit.epochs", "1"))[0] == 0
    assert lines(tmp_path / "run", "evaluation")


# --- too few images ---------------------------------------------------------------------------------------------------


def folder(root: Path, train: dict[str, int]) -> Path:
    for split, counts in (("train", train), ("val", dict.fromkeys(train, 1))):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (8, 8), (40 * k, 90, 30)).save(root / split / name / f"{k}.png")
    return root


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ({"a": 3}, {}, "folder has one class here (a), and there is nothing to tell apart: give two folders"),
        ({"a": 3, "b": 1}, {}, "class b has one training image, from which nothing can be learnt of it"),
        (
            {"a": 12, "b": 4},
            {"validation": 0.1},
            "data.validation 0.1 holds out none of the 4 training images of class b: give at least 0.25",
        ),
        ({"a": 12, "b": 2}, {"validation": 0.9}, "data.validation 0.9 leaves none of the 2 training images of class b"),
    ],
    ids=["one class", "one image", "no validation", "no training"],
)
def test_too_few_images_are_refused(
    tmp_path: Path, command: Command, train: dict[str, int], options: dict[str, Any], message: str
) -> None:
    root = folder(tmp_path / "data", train)
    given = ["--data.validation", str(options["validation"])] if options else []
    data = ["--data.name", "folder", "--data.root", str(root), "--data.classes", "null", "--data.per_class", "null"]
    code, _, said = command(arguments(tmp_path / "run", *data, *given, "--batch_size", "3"))
    (line,) = said.splitlines()
    assert code == 2 and line.startswith(f"error: {message}") and not (tmp_path / "run").exists()


def test_few_images_that_were_asked_for_are_no_mistake(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 3, "b": 3})
    one = DataConfig("folder", str(root), per_class=1)
    check_classes(load_datasets(one), one)
    least = DataConfig("folder", str(root), validation=0.34)
    data = load_datasets(least)
    assert data.validation is not None and len(data.validation) == 2
    check_classes(data, least)
    with pytest.raises(InputError, match=r"give at least 0\.34"):
        less = DataConfig("folder", str(root), validation=0.1)
        check_classes(load_datasets(DataConfig("folder", str(root))), less)


def test_every_network_sees_the_same_erased_view(tmp_path: Path) -> None:
    from classification.experiment import build

    given = ["--data.re_prob", "1", "--data.auto_augment", "rand-m9", "--networks.teacher.mean", "[0.1, 0.1, 0.1]"]
    experiment = build(parse_command(arguments(tmp_path / "run", *given, "--data.workers", "0")))
    batch = next(iter(experiment.train_loader()))
    raw: dict[str, Tensor] = {}
    for role, x in experiment.distiller.views(batch["image"]).items():
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in experiment.distiller.normalisation[role])
        raw[role] = 255 * (x * std + mean)
    assert (raw["teacher"] - raw["student"]).abs().max() < 1e-3
    assert (raw["teacher"] - batch["image"]).abs().max() < 1e-3
