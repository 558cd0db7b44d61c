"""Noisy labels: who gets which label, that nothing else changes, and that a run keeps and tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import arguments, assert_same_runs, stop_at
from safetensors.torch import load_file, save_file

from classification.config import parse_command
from classification.data import Arrays, DataConfig, Streamed, load_datasets, make_loader
from classification.data.noise import draw_noise, save_noise, with_noise
from classification.experiment import Experiment, build
from core.errors import InputError
from core.training.seed import mix

pytestmark = pytest.mark.usefixtures("quick")
Command = Callable[[list[str]], tuple[int, str, str]]
TARGETS = torch.arange(6000) % 10
# 99.9 % of what is really uniform lies below: chi-square with 9 and with 8 degrees of freedom
CHI_SQUARE = {10: 27.9, 9: 26.1}


@pytest.mark.parametrize("exclude_true", [False, True])
def test_a_share_of_the_labels_is_uniform_over_all_classes(exclude_true: bool) -> None:
    noise = draw_noise(TARGETS, 10, 0.5, seed=3, exclude_true=exclude_true)
    assert len(noise.index) == 3000 and len(noise.index.unique()) == 3000
    assert torch.equal(noise.index, noise.index.sort().values)
    assert torch.equal(noise.true, TARGETS[noise.index])
    shifts = ((noise.given - noise.true) % 10).bincount(minlength=10)  # uniform whatever the true class is
    if exclude_true:
        assert shifts[0] == 0
        shifts = shifts[1:]
    assert ((shifts - 3000 / len(shifts)) ** 2 / (3000 / len(shifts))).sum() < CHI_SQUARE[len(shifts)]
    # Neither the images nor the labels follow each other: of an image's neighbour half are chosen too, a tenth alike.
    assert 0.45 < (noise.index.diff() == 1).float().mean() < 0.55
    alike = (noise.given.diff() == 0).float().mean()
    assert 0.05 < alike < 0.15
    assert ((noise.true.bincount() - 300).abs() < 60).all()


def test_one_seed_draws_one_noise_and_less_of_it_is_a_part() -> None:
    torch.manual_seed(1)
    noise = draw_noise(TARGETS, 10, 0.3, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = draw_noise(TARGETS.clone(), 10, 0.3, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(noise.index, again.index) and torch.equal(noise.given, again.given)
    assert not torch.equal(noise.index, draw_noise(TARGETS, 10, 0.3, seed=4).index)
    less = draw_noise(TARGETS, 10, 0.1, seed=3)
    assert len(less.index) == 600
    where = torch.searchsorted(noise.index, less.index)
    assert torch.equal(noise.index[where], less.index) and torch.equal(noise.given[where], less.given)
    first = torch.randperm(6000, generator=torch.Generator().manual_seed(mix(3, 0)))[:600]
    assert len(set(first.tolist()) & set(less.index.tolist())) < 100  # not the first images of the first epoch


@pytest.mark.parametrize(("images", "share", "count"), [(30, 0.3, 9), (30, 0.01, 0), (7, 0.5, 4), (10, 0.99, 10)])
def test_how_many(images: int, share: float, count: int) -> None:
    targets = torch.arange(images) % 3
    if count:
        assert len(draw_noise(targets, 3, share, 0).index) == count
    else:
        with pytest.raises(InputError, match=r"data\.noise 0\.01 of 30 training images changes no label"):
            draw_noise(targets, 3, share, 0)


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(InputError, match=rf"^data\.noise must be (in \[0, 1\)|a number): {share}$"):
        load_datasets(DataConfig(name="digits", noise=share))
    with pytest.raises(InputError, match=r"data\.noise_exclude_true needs at least 2 classes"):
        draw_noise(torch.zeros(4, dtype=torch.int64), 1, 0.5, 0, exclude_true=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 6 validation digits of three classes as files, which are streamed at 20 pixels."""
    digits = load_datasets(DataConfig(name="digits")).train
    assert isinstance(digits, Arrays)
    root = tmp_path_factory.mktemp("noise")
    for split, first, number in (("train", 0, 8), ("val", 8, 2)):
        for label in range(3):
            place = root / split / str(label)
            place.mkdir(parents=True)
            for k in (digits.targets == label).nonzero().squeeze(1)[first : first + number].tolist():
                Image.fromarray(digits.images[k].permute(1, 2, 0).numpy()).save(place / f"{k}.png")
    return root


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_loader_hands_out_the_given_labels(folder: Path, in_memory: bool, workers: int) -> None:
    data = load_datasets(DataConfig(name="folder", root=str(folder), in_memory=in_memory))
    before = data.train.targets.clone()
    noise = draw_noise(data.train.targets, 3, 0.5, 0, exclude_true=True)
    noisy = with_noise(data.train, noise)
    assert isinstance(noisy, Arrays if in_memory else Streamed) and torch.equal(data.train.targets, before)
    expected = before.clone()
    for index, given in zip(noise.index.tolist(), noise.given.tolist(), strict=True):
        expected[index] = given
    assert (expected != before).sum() == 12
    seen = {}
    for clean, batch in zip(
        make_loader(data.train, 5, train=True, workers=workers),
        make_loader(noisy, 5, train=True, workers=workers),
        strict=True,
    ):
        assert torch.equal(clean["image"], batch["image"]) and torch.equal(clean["index"], batch["index"])
        assert torch.equal(clean["target"], before[clean["index"]])
        seen |= dict(zip(batch["index"].tolist(), batch["target"].tolist(), strict=True))
    assert [seen[k] for k in range(24)] == expected.tolist()


def noisy_run(tmp_path: Path, *more: str, method: str = "dml+adm") -> Experiment:
    return build(parse_command(arguments(tmp_path, "--data.noise", "0.4", *more, method=method)))


def test_a_run_trains_on_the_same_noise_whatever_its_method_and_networks(tmp_path: Path) -> None:
    clean = build(parse_command(arguments(tmp_path, "--data.validation", "0.2")))
    one = noisy_run(tmp_path, "--data.validation", "0.2")
    assert clean.noise is None and one.noise is not None and len(one.noise.index) == 12
    others = [
        noisy_run(tmp_path, "--data.validation", "0.2", method="vanilla"),
        noisy_run(tmp_path, "--data.validation", "0.2", "--networks.teacher.name", "cifar_resnet14"),
        noisy_run(tmp_path, "--data.validation", "0.2", "--seed", "1", "--data.noise_seed", "0"),
    ]
    for experiment in (one, *others):
        assert experiment.noise is not None
        assert torch.equal(experiment.datasets.train.targets, one.datasets.train.targets)
        assert torch.equal(experiment.noise.index, one.noise.index)
        assert torch.equal(experiment.datasets.train.targets[one.noise.index], one.noise.given)
        for split in ("test", "validation"):
            assert torch.equal(experiment.split(split).targets, clean.split(split).targets)
    assert not torch.equal(one.datasets.train.targets, clean.datasets.train.targets)
    other = noisy_run(tmp_path, "--data.validation", "0.2", "--seed", "1")
    assert not torch.equal(other.datasets.train.targets, one.datasets.train.targets)
    labels = torch.cat([batch["target"] for batch in one.train_loader(None)])
    assert torch.equal(labels.bincount(), one.datasets.train.targets.bincount())
    excluded = noisy_run(tmp_path, "--data.noise_exclude_true", "true").noise
    assert excluded is not None and bool((excluded.given != excluded.true).all())


def test_the_run_folder_tells_and_a_resume_keeps_it(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--data.noise", "0.3", "--fit.epochs", "2"]
    assert command(arguments(tmp_path / "whole", *more))[0] == 0
    argv = arguments(tmp_path / "cut", *more)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert command(argv)[0] == 130
    file = tmp_path / "cut/label_noise.safetensors"
    told = load_file(file)
    assert command(argv)[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    noise = build(parse_command(argv)).noise
    assert noise is not None and told.keys() == {"index", "true", "given"}
    for tensors in (told, load_file(file), load_file(tmp_path / "whole/label_noise.safetensors")):
        assert all(torch.equal(tensors[name], getattr(noise, name)) for name in told)
    assert len(told["index"]) == 9

    other = arguments(tmp_path / "cut", "--data.noise", "0.4", "--fit.epochs", "2")
    code, _, said = command(other)
    assert code == 2 and "holds a run with data.noise = 0.3" in said
    code, printed, _ = command(arguments(tmp_path / "none", *more, "--dry-run"))
    wrong = int((noise.given != noise.true).sum())
    assert code == 0 and f"noisy labels: 9 drawn anew, {wrong} of them are wrong" in printed
    code, _, said = command(arguments(tmp_path / "none", "--data.noise", "1.5"))
    assert code == 2 and said == "error: data.noise must be in [0, 1): 1.5\n"
    assert not (tmp_path / "none").exists()


def test_labels_that_differ_from_those_of_the_run_are_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = draw_noise(TARGETS, 10, 0.1, seed=0)
    file = tmp_path / "noise.safetensors"
    save_noise(noise, file)
    written = file.stat().st_mtime_ns
    save_noise(noise, file)
    assert file.stat().st_mtime_ns == written and not list(tmp_path.glob("*writing*"))
    for other in (replace(noise, given=noise.given.roll(1)), draw_noise(TARGETS, 10, 0.2, seed=0)):
        with pytest.raises(InputError, match="tells of other noisy labels"):
            save_noise(other, file)

    argv = arguments(tmp_path / "run", "--data.noise", "0.3")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert command(argv)[0] == 130
    file = tmp_path / "run/label_noise.safetensors"
    told = load_file(file)
    save_file({**told, "given": told["given"].roll(1)}, file)
    code, _, said = command(argv)
    assert code == 2 and "tells of other noisy labels" in said and said.count("error: ") == 1
