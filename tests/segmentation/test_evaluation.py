"""IoU of both networks: against loops, against mmseg's own metric, and as a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmseg.evaluation import IoUMetric

from core.errors import InputError
from segmentation.evaluation import NetworkIoU, table

CLASSES = ("road", "car", "sky", "train")


def samples(seed: int, classes: int, images: int = 3) -> list[dict[str, Any]]:
    """Predictions of both networks and truths ``[1, 5, 7]``, some pixels ignored."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> dict[str, torch.Tensor]:
        return {"data": torch.randint(high, (1, 5, 7), generator=generator)}

    found = []
    for _ in range(images):
        truth = drawn(classes)
        truth["data"][0, :2, :3] = 255
        found.append({"pred_sem_seg": drawn(4), "pred_sem_seg_teacher": drawn(classes), "gt_sem_seg": truth})
    return found


def judged(metric: IoUMetric, batch: list[dict[str, Any]]) -> dict[str, float]:
    metric.dataset_meta = {"classes": CLASSES}
    metric.process({}, batch)
    return metric.compute_metrics(metric.results)


def by_loops(batch: list[dict[str, Any]], key: str) -> dict[str, float]:
    pairs = [
        (int(p), int(t))
        for sample in batch
        for p, t in zip(sample[key]["data"].flatten(), sample["gt_sem_seg"]["data"].flatten(), strict=True)
        if t != 255
    ]
    result = {"aAcc": 100 * sum(p == t for p, t in pairs) / len(pairs)}
    ious = []
    for k, name in enumerate(CLASSES):
        if any(t == k for _, t in pairs):
            union = sum(k in pair for pair in pairs)
            ious.append(100 * sum(p == t == k for p, t in pairs) / union)
            result[f"IoU.{name}"] = ious[-1]
    return {"mIoU": sum(ious) / len(ious), **result}


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize(("role", "key"), [("student", "pred_sem_seg"), ("teacher", "pred_sem_seg_teacher")])
def test_iou_is_that_of_loops_over_pixels(role: str, key: str, classes: int) -> None:
    batch = samples(0, classes)  # with 3, the student also predicts a class that no label shows
    assert judged(NetworkIoU(role), batch) == pytest.approx(by_loops(batch, key), abs=1e-4)
    assert NetworkIoU(role).prefix == role


def test_iou_is_mmsegs_own_where_all_classes_occur() -> None:
    batch = samples(1, 4)
    theirs = judged(IoUMetric(), batch)
    ours = judged(NetworkIoU("student"), batch)
    assert {k: round(ours[k], 2) for k in ("mIoU", "aAcc")} == pytest.approx(
        {k: float(theirs[k]) for k in ("mIoU", "aAcc")}, abs=0.011
    )


def test_a_network_alone_has_the_plain_prediction() -> None:
    batch = [{k: v for k, v in sample.items() if k != "pred_sem_seg_teacher"} for sample in samples(2, 4)]
    assert judged(NetworkIoU("teacher"), batch) == judged(NetworkIoU("student"), batch)


def test_labels_that_are_all_ignored_are_an_error() -> None:
    batch = samples(0, 4, 1)
    batch[0]["gt_sem_seg"]["data"][:] = 255
    with pytest.raises(InputError, match="no evaluated pixel has a label"):
        judged(NetworkIoU("student"), batch)


def test_the_table_has_a_column_for_each_network() -> None:
    values = {"teacher/mIoU": 41.5, "teacher/IoU.road": 83.0, "student/mIoU": 7.25, "student/IoU.car": 7.25}
    assert table(values).splitlines() == [
        "%     teacher  student",
        "mIoU    41.50     7.25",
        "road    83.00        -",
        "car         -     7.25",
    ]
