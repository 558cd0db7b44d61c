"""What both networks of a pair see: a figure of it, and the statistics of their similarity over an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate

from core.adm import consensus_attention, divergence_attention, spatial_similarity
from core.analysis.attention import AttentionStatistics
from core.analysis.maps import draw_maps
from core.errors import InputError


def comparable(model: Any) -> bool:
    """Whether the two networks' maps have an S: by an adapter, or because their channels agree."""
    return model.adm is not None or len({network.decode_head.channels for network in model.networks.values()}) == 1


class SimilarityWatch:
    """S of every evaluated image, from what the heads' last layers are given: no forward is taken for it.

    Args: a pair with ``comparable`` maps. Call ``update`` after each batch and ``close`` at the end.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.statistics = AttentionStatistics(next(model.parameters()).device)
        self._maps: dict[str, list[Any]] = {role: [] for role in ("teacher", "student")}
        self._hooks = [
            model.networks[role].decode_head.conv_seg.register_forward_pre_hook(partial(self._take, role))
            for role in self._maps
        ]

    def _take(self, role: str, module: Any, inputs: tuple[Any, ...]) -> None:
        self._maps[role].append(inputs[0])

    @torch.no_grad()
    def update(self) -> None:
        for teacher, student in zip(*self._maps.values(), strict=True):
            ours = student if self.model.adm is None else self.model.adm.project(student, teacher)
            self.statistics.update(spatial_similarity(ours, teacher))
        for maps in self._maps.values():
            maps.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def draw(model: Any, dataset: Any, count: int, file: Path) -> bool:
    """What both networks of a pair in evaluation mode see, a row for each of ``count`` images spread over the data set.

    Labels carry each network's pixel accuracy there. Returns: whether there is an S to show.
    Raises: InputError where the images have different sizes.
    """
    count = min(count, len(dataset))
    classes, palette = dataset.metainfo["classes"], torch.tensor(dataset.metainfo["palette"], dtype=torch.uint8)
    pictures: dict[str, list[Any]] = {name: [] for name in ("image", "truth", "teacher", "student")}
    similarities, labels = [], []
    seen: set[int] = set()
    compared = comparable(model)
    for position in range(count):
        batch = pseudo_collate([dataset[position * len(dataset) // count]])
        with torch.no_grad():
            (sample,) = model.val_step(batch)
            if compared:
                data = model.data_preprocessor(batch, False)
                similarities.append(model.similarity(data["inputs"])[0].cpu())
        truth = sample.gt_sem_seg.data[0].cpu()
        maps = {"teacher": sample.pred_sem_seg_teacher.data[0].cpu(), "student": sample.pred_sem_seg.data[0].cpu()}
        valid = truth < len(classes)
        seen |= set(torch.cat([m[valid].unique() for m in (truth, *maps.values())]).tolist())
        right = {role: 100 * (m == truth)[valid].float().mean().item() for role, m in maps.items()}
        labels.append("correct pixels, %\n" + "\n".join(f"{role} {share:.1f}" for role, share in right.items()))
        colors = torch.cat([palette, torch.zeros(1, 3, dtype=torch.uint8)])  # ignored pixels are black
        pictures["image"].append(_resized(batch["inputs"][0].flip(0), truth.shape))
        for name, m in {"truth": torch.where(valid, truth, len(classes)), **maps}.items():
            pictures[name].append(colors[m].permute(2, 0, 1))
    size = pictures["truth"][0].shape[-2:]
    stacked = {n: torch.stack([_resized(p, size) for p in several]) for n, several in pictures.items()}
    shown = {}
    if compared:
        sides = {tuple(s.shape) for s in similarities}
        if len(sides) > 1:
            raise InputError(f"the images have different sizes, and so have their maps ({sides}): give --images 1")
        similarity = torch.stack(similarities)
        shown = {
            "similarity S": similarity,
            "consensus attention": consensus_attention(similarity).squeeze(1),
            "divergence attention": divergence_attention(similarity).squeeze(1),
        }
    legend = {classes[k]: palette[k].tolist() for k in sorted(seen)}
    if (stacked["truth"] == 0).all(dim=1).any():
        legend["ignored"] = [0, 0, 0]
    images = stacked.pop("image")
    draw_maps(images, shown, file, labels, pictures=stacked, legend=legend, side=2.4)
    return compared


def _resized(picture: Any, size: Sequence[int]) -> Any:
    return F.interpolate(picture[None], size=tuple(size), mode="nearest")[0]
