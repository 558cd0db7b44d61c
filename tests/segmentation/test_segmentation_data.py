"""Order and augmentation: numbered draws that neither workers, processes nor an interruption change; label checks."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from street import DEEPLAB, TINY

from core.errors import InputError
from segmentation import data
from segmentation.config import complete, load_config, parse_options
from segmentation.data import NumberedSampler, PhotoMetricDistortionPerNetwork, check_labels


def sampler(size: int = 7, seed: int = 3, rank: int = 0, processes: int = 1) -> NumberedSampler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "get_dist_info", lambda: (rank, processes))
        return NumberedSampler(range(size), seed)


def first(source: NumberedSampler, count: int) -> list[tuple[int, int]]:
    return list(itertools.islice(iter(source), count))


def test_each_pass_shows_every_image_once_in_a_new_order() -> None:
    draws = first(sampler(), 21)
    assert [number for _, number in draws] == list(range(21))
    passes = [[index for index, _ in draws[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert first(sampler(seed=4), 21) != draws


def test_processes_share_one_order() -> None:
    whole = first(sampler(), 20)
    shares = [first(sampler(rank=rank, processes=2), 10) for rank in range(2)]
    assert [draw for pair in zip(*shares, strict=True) for draw in pair] == whole


@pytest.mark.parametrize("processes", [1, 2])
def test_a_skip_goes_on_where_the_draws_were(processes: int) -> None:
    whole = first(sampler(rank=processes - 1, processes=processes), 20)
    resumed = sampler(rank=processes - 1, processes=processes)
    resumed.skip(9)
    assert first(resumed, 11) == whole[9:]


@pytest.fixture
def dataset(street: Path) -> Any:
    cfg = load_config(DEEPLAB, {"data_root": str(street), **parse_options(TINY)})
    return data.DATASETS.build(complete(cfg, 1, "cpu").train_dataloader.dataset)


def test_a_draw_is_augmented_alike_whatever_was_drawn_before(dataset: Any) -> None:
    again = []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        again.append(dataset[1, 17])
    assert torch.equal(again[0]["inputs"], again[1]["inputs"])
    assert torch.equal(again[0]["data_samples"].gt_sem_seg.data, again[1]["data_samples"].gt_sem_seg.data)
    other = dataset[1, 18]["inputs"]
    assert other.shape == again[0]["inputs"].shape
    assert not torch.equal(other, again[0]["inputs"])
    dataset.seed += 1
    assert not torch.equal(dataset[1, 17]["inputs"], again[0]["inputs"])


def test_a_draw_leaves_the_generators_of_the_training_alone(dataset: Any) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = drawn()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dataset[0, 5]
    assert drawn() == expected


def test_a_label_that_is_no_class_is_named_with_its_file(street: Path, dataset: Any) -> None:
    sample = dataset[0, 0]["data_samples"]
    check_labels(sample, 19, 255)
    sample.gt_sem_seg.data[0, 3, 4] = 33
    with pytest.raises(InputError, match=r"ulm_00000\d_gtFine_labelTrainIds.png holds label 33, but there are 19"):
        check_labels(sample, 19, 255)


def test_each_network_gets_a_distortion_of_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    transform = PhotoMetricDistortionPerNetwork()
    differing = 0
    for seed in range(8):
        np.random.seed(seed)
        views = transform({"img": image.copy()})["img"]
        assert views.shape == (6, 8, 6)
        assert views.dtype == np.uint8
        np.random.seed(seed)
        plain = data.PhotoMetricDistortion()
        assert (plain({"img": image.copy()})["img"] == views[..., :3]).all()
        assert (plain({"img": image.copy()})["img"] == views[..., 3:]).all()
        differing += bool((views[..., :3] != views[..., 3:]).any())
    assert differing >= 6
