"""What a folder of images holds, and what networks see of it: classes, sizes, broken files, and one picture.

    python classification/tools/look.py imagenet --data.image_size 32 --out look.png

Every image is decoded once. The picture shows augmented training images as the options of `--data` make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError
from core.files import save_figure
from core.progress import progress_bar
from core.training.command import DONE, align, parse, run_command, tool_parser

if TYPE_CHECKING:
    from torch import Tensor

    from classification.data import DataConfig, DataSets
    from classification.data.sources import Source

MOST_CLASSES = 30  # that are listed one by one
MOST_BROKEN = 20  # files
UNEVEN = 5.0  # times as many images of one class as of another
ROWS, COLUMNS = 4, 8  # of the picture


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, also where images are broken, which training would refuse."""
    from classification.data import DataConfig, load_datasets
    from classification.data.datasets import IN_MEMORY_NAMES
    from classification.data.sources import sources

    parser = tool_parser("Says what a folder of images holds, and draws what training sees of it.")
    parser.add_argument(
        "root", type=str, help="folder with train and val, each with a folder for each class; or of the classes alone"
    )
    parser.add_argument("--out", type=str, default="look.png", help="the picture")
    parser.add_argument("--data", type=DataConfig, default=DataConfig(name="folder"))
    options = parse(parser, argv)
    config = replace(options.data, root=options.root)
    if config.name not in IN_MEMORY_NAMES:
        train, test = sources(config.name, config.root, config.download)
        check_images([train] if test is train else [train, test], config)
    datasets = load_datasets(config)
    print("\n".join(count_lines(datasets)))
    draw(datasets, config, Path(options.out))
    print(f"training sees images of {datasets.image_size} x {datasets.image_size} pixels, as in {options.out}")
    return DONE


def check_images(splits: Sequence[Source], config: DataConfig) -> None:
    """Decodes every image, and says how large they are. Raises: InputError where some are broken, naming them."""
    import torch

    from classification.data import Streamed, StreamLoader
    from classification.data.datasets import CHUNK, worth_workers

    broken: list[InputError] = []
    found: list[Tensor] = []
    total = sum(len(s.targets) for s in splits)
    with progress_bar(total, "decoding") as bar:
        for source in splits:
            split = Streamed(source, source.targets, torch.arange(len(source.targets)), size_of, size_of)
            workers = worth_workers(len(split), config.workers)
            for batch in StreamLoader(split, CHUNK, train=False, workers=workers, skipped=broken):
                found.append(batch["image"])
                bar.update(len(batch["image"]))
    for error in broken[:MOST_BROKEN]:
        print(error)
    if broken:
        raise InputError(f"{len(broken):,} of {total:,} images cannot be read: replace or delete them, and look again")
    sizes = torch.cat(found)  # width, height
    areas = sizes.prod(dim=1)
    small, large = (" x ".join(map(str, sizes[int(at)].tolist())) for at in (areas.argmin(), areas.argmax()))
    square = int((sizes[:, 0] == sizes[:, 1]).sum())
    print(f"{len(sizes):,} images, none broken: {small} to {large} pixels (width x height), {square:,} of them square")


def size_of(image: Any) -> Tensor:
    """Width and height, int64 ``[2]``."""
    import torch

    return torch.tensor(image.size)


def count_lines(datasets: DataSets) -> list[str]:
    """The images of each class in each split, in lines; of many classes, those with the fewest and the most."""
    import torch

    splits = {"training": datasets.train, "held out": datasets.validation, "test": datasets.test}
    counts = {
        name: torch.bincount(split.targets, minlength=datasets.num_classes).tolist()
        for name, split in splits.items()
        if split is not None
    }
    training = counts["training"]
    shown = list(range(datasets.num_classes))
    if len(shown) > MOST_CLASSES:
        by_count = sorted(shown, key=lambda c: training[c])
        shown = [*by_count[: MOST_CLASSES // 2], *by_count[-MOST_CLASSES // 2 :]]
    rows = [["class", *counts]] + [[datasets.class_names[c], *(f"{n[c]:,}" for n in counts.values())] for c in shown]
    rows.append([f"all {datasets.num_classes:,}", *(f"{sum(n):,}" for n in counts.values())])
    lines = align(rows)
    fewest, most = min(training), max(training)
    if most > UNEVEN * fewest:
        names = [datasets.class_names[training.index(count)] for count in (fewest, most)]
        lines.append(f"note: classes are uneven: {names[0]} has {fewest:,} training images, {names[1]} {most:,}")
    return lines


def draw(datasets: DataSets, config: DataConfig, file: Path) -> None:
    """One batch of training, each image with its class, as PNG (or by the file's suffix)."""
    from matplotlib.figure import Figure

    from classification.data import make_loader

    batch = next(iter(make_loader(datasets.train, ROWS * COLUMNS, train=True, seed=config.split_seed)))
    figure = Figure(figsize=(1.3 * COLUMNS, 1.5 * ROWS), layout="constrained")
    axes = figure.subplots(ROWS, COLUMNS)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, target in zip(axes.flat, batch["image"], batch["target"].tolist(), strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(datasets.class_names[target][:18], fontsize=8)
    save_figure(figure, file)


if __name__ == "__main__":
    run_command(main)
