"""What both networks of a run see: image, truth, predictions, their maps' similarity and both attentions.

    python segmentation/tools/visualize.py runs/x --images 4

Writes `<run>/figures/maps.png`; `--checkpoint` other than last puts its name into the file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import make_folder
from core.training.command import DONE, LineParser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", help="run folder")
    add("--checkpoint", default="last", help="last, best or iter_400")
    add("--images", type=int, default=4, help="rows of the figure, spread evenly over the evaluated images")
    add("--data-root", help="folder of the data set, if not where the run's config says")
    options = parser.parse_args(argv)
    if options.images < 1:
        raise InputError("--images must be at least 1")

    from segmentation.experiment import restore  # after the command line is read: --help is quick

    found = restore(options.run, None, options.checkpoint, None, options.data_root)
    suffix = "" if options.checkpoint == "last" else f"-{found.checkpoint.stem}"
    file = make_folder(Path(options.run) / "figures") / f"maps{suffix}.png"
    draw(found, options.images, file)
    print(f"written to {file}")
    return DONE


def draw(found: Any, count: int, file: Path) -> None:
    """The figure, a row for each of ``count`` images; labels carry each network's pixel accuracy there."""
    import torch
    from mmengine.dataset import pseudo_collate

    from core.adm import consensus_attention, divergence_attention
    from core.analysis.maps import draw_maps

    dataset = found.loader.dataset
    count = min(count, len(dataset))
    classes, palette = dataset.metainfo["classes"], torch.tensor(dataset.metainfo["palette"], dtype=torch.uint8)
    pictures: dict[str, list[Any]] = {name: [] for name in ("image", "truth", "teacher", "student")}
    similarities, labels = [], []
    seen: set[int] = set()
    comparable = found.model.adm is not None or len({n.decode_head.channels for n in found.networks.values()}) == 1
    for position in range(count):
        batch = pseudo_collate([dataset[position * len(dataset) // count]])
        with torch.no_grad():
            (sample,) = found.model.val_step(batch)
            if comparable:
                data = found.model.data_preprocessor(batch, False)
                similarities.append(found.model.similarity(data["inputs"])[0].cpu())
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
    if comparable:
        sides = {tuple(s.shape) for s in similarities}
        if len(sides) > 1:
            raise InputError(f"the images have different sizes, and so have their maps ({sides}): give --images 1")
        similarity = torch.stack(similarities)
        shown = {
            "similarity S": similarity,
            "consensus attention": consensus_attention(similarity).squeeze(1),
            "divergence attention": divergence_attention(similarity).squeeze(1),
        }
    else:
        print("the maps have different channels and no adapter (a run without ADM): there is no S to draw")
    legend = {classes[k]: palette[k].tolist() for k in sorted(seen)}
    if (stacked["truth"] == 0).all(dim=1).any():
        legend["ignored"] = [0, 0, 0]
    images = stacked.pop("image")
    draw_maps(images, shown, file, labels, pictures=stacked, legend=legend, side=2.4)


def _resized(picture: Any, size: Sequence[int]) -> Any:
    import torch.nn.functional as F

    return F.interpolate(picture[None], size=tuple(size), mode="nearest")[0]


if __name__ == "__main__":
    run_command(main)
