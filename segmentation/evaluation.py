"""Intersection over union of every network of a model in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from core.errors import InputError, notice
from core.training.command import align

PREDICTIONS = {"student": "pred_sem_seg", "teacher": "pred_sem_seg_teacher"}


@METRICS.register_module()
class NetworkIoU(IoUMetric):
    """mmseg's IoUMetric of one network: unrounded, per class, and over the classes that occur.

    Gives ``<role>/mIoU``, ``<role>/aAcc`` and ``<role>/IoU.<class>`` in percent. A class that no label shows has no IoU
    (mmseg counts 0 as soon as one pixel is taken for it): where all classes occur the mean is mmseg's own.

    Args: "student" or "teacher"; the rest is IoUMetric's.
    """

    def __init__(self, role: str, **kwargs: Any) -> None:
        # Counts of pixels are small: "gpu" gathers them over the processes' own network, "cpu" by files in the way.
        super().__init__(prefix=role, **{"collect_device": "gpu", **kwargs})
        self.prediction = PREDICTIONS[role]

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        # A network evaluated alone gives its prediction the plain name, whatever its role.
        own = [{**s, "pred_sem_seg": s.get(self.prediction, s["pred_sem_seg"])} for s in data_samples]
        super().process(data_batch, own)

    def compute_metrics(self, results: list) -> dict[str, float]:
        if self.format_only:
            return super().compute_metrics(results)
        intersection, union, _, labelled = (torch.stack(part).double().sum(0) for part in zip(*results, strict=True))
        occurs = labelled > 0
        if not occurs.any():
            raise InputError("no evaluated pixel has a label: is everything marked as ignored?")
        iou = 100 * intersection / union
        names = self.dataset_meta["classes"]
        if not occurs.all():
            absent = ", ".join(names[k] for k in (~occurs).nonzero().flatten().tolist())
            others = int(occurs.sum())
            notice(f"no evaluated pixel is labelled {absent}: mIoU is the mean over the other {others} classes")
        per_class = {f"IoU.{names[k]}": iou[k].item() for k in occurs.nonzero().flatten().tolist()}
        accuracy = 100 * intersection.sum() / labelled.sum()
        return {"mIoU": iou[occurs].mean().item(), "aAcc": accuracy.item(), **per_class}


@torch.no_grad()
def evaluate(model: Any, loader: Any, evaluator: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """All metrics of a model on a loader, with a progress bar on a terminal."""
    from tqdm import tqdm

    model.eval()
    judge = Evaluator(list(evaluator))
    judge.dataset_meta = loader.dataset.metainfo
    for batch in tqdm(loader, unit="batch", disable=None, leave=False, dynamic_ncols=True):
        judge.process(data_samples=model.val_step(batch), data_batch=batch)
    return {name: float(value) for name, value in judge.evaluate(len(loader.dataset)).items()}


def table(values: Mapping[str, float]) -> str:
    """mIoU, pixel accuracy and IoU of each class in percent, a column for each network."""
    roles = [name.removesuffix("/mIoU") for name in values if name.endswith("/mIoU")]
    rows = [["%", *roles]]
    for row in dict.fromkeys(name.partition("/")[2] for name in values):
        numbers = (values.get(f"{role}/{row}") for role in roles)
        rows.append([row.removeprefix("IoU."), *("-" if n is None else f"{n:.2f}" for n in numbers)])
    return "\n".join(align(rows))
