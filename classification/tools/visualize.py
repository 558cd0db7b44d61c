"""Figures of a run: what both networks look at (Figure 1), attention over training (Table 17), calibration (Figure 10).

    python classification/tools/visualize.py runs/dml+adm
    python classification/tools/visualize.py runs/dml+adm --checkpoint all --boxes boxes.tsv

Writes into `<run>/figures/`: `maps.png`, `reliability.png`, `attention.json` and `attention.png`; with `--boxes` also
`boxes.json` (and `boxes.png` of several checkpoints). `--checkpoint` other than last puts its name into theirs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from classification.config import ONLINE, Task
from classification.data import DataConfig, Streamed
from classification.data.datasets import SMALL
from classification.evaluation import evaluate, similarities
from classification.experiment import Experiment, command_of, images_at, load_checkpoint, restore
from core.adm import consensus_attention
from core.analysis.attention import KEYS
from core.analysis.calibration import draw_reliability
from core.analysis.colors import role_color, series_color
from core.analysis.curves import draw_curves
from core.analysis.looks import MARKERS
from core.analysis.maps import box_share, cam, draw_maps, pair_maps, relative_cam
from core.errors import InputError
from core.files import how_to_make, make_folder, save_figure, save_json
from core.images import EXTENSIONS
from core.training.checkpoint import find_checkpoint, numbered, step_of
from core.training.command import DONE, add_device, align, device_of, parse, run_command, tool_parser
from core.training.run import environment, read_json, read_metrics

MOST_ROWS = 50
BOXES_HELP = (
    "TSV with an object box an image: columns that make up the end of its path (as split, class, image), then x0, y0, "
    "x1, y1 in pixels, corners inclusive; for square images that evaluation sees whole"
)


def main(argv: Sequence[str] | None = None, task: Task = ONLINE) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    run = Path(parse_options(argv).run)
    command = command_of(run, task)
    options = parse_options(argv, command.config.data)
    command = replace(command, config=replace(command.config, data=options.data))
    every = options.checkpoint == "all"
    folders = numbered(run / "checkpoints") if every else []
    folders = folders or [find_checkpoint(run, "last" if every else options.checkpoint)]

    experiment = restore(command, folders[0])
    device = device_of(options)
    experiment.distiller.to(device).eval()
    boxes = read_boxes(experiment, options) if options.boxes is not None else None
    figures = make_folder(run / "figures")
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    metrics = [m for m in read_metrics(run / "metrics.jsonl", summary) if m.get("kind") == "evaluation"]
    of_split = "" if options.split == "test" else f"-{options.split}"
    rows: list[dict[str, Any]] = []
    for folder in folders:
        load_checkpoint(experiment.distiller, folder)
        suffix = of_split if options.checkpoint == "last" else f"{of_split}-{folder.name}"
        draw_pairs(experiment, options, boxes, figures, suffix)
        images = experiment.evaluation_loader(experiment.split(options.split))
        calibrations = evaluate(experiment.distiller, images).calibrations
        draw_reliability(calibrations, figures / f"reliability{suffix}.png")
        if boxes is not None:
            step = step_of(folder)
            epoch = next((line.get("epoch") for line in metrics if line.get("step") == step), None)
            shares = box_shares(experiment, options, boxes)
            rows.append({"checkpoint": folder.name, "step": step, "epoch": epoch, "shares": shares})
    draw_attention(metrics, figures)
    if boxes is not None:
        suffix = of_split if options.checkpoint == "last" else f"{of_split}-{'all' if every else folders[0].name}"
        about = {"run": str(run), "split": options.split, "boxes": options.boxes, "environment": environment(device)}
        save_json({**about, "images": int(boxes[:, 0].isfinite().sum()), "rows": rows}, figures / f"boxes{suffix}.json")
        names = list(rows[0]["shares"])
        cells = [[str(row["step"]), *(f"{100 * row['shares'][n]['mean']:.2f}" for n in names)] for row in rows]
        print("\n".join(["share inside the object box, %:", *align([["step", *names], *cells])]))
        if len(rows) > 1:
            draw_box_shares(rows, figures / f"boxes{suffix}.png")
    print(f"figures are in {figures}")
    return DONE


def parse_options(argv: Sequence[str] | None, data: DataConfig | None = None) -> Any:
    """The command line; ``data``: the defaults of its data options. Raises: InputError for anything wrong with it."""
    from jsonargparse.typing import PositiveInt

    parser = tool_parser(
        "Draws a run's maps (Figure 1), attention over training (Table 17) and calibration (Figure 10)."
    )
    add = parser.add_argument
    add("run", type=str, help="run folder; figures go into its figures/")
    add("--checkpoint", type=str, default="last", help="last, best, step-00000123, or all that were kept")
    add("--images", type=PositiveInt, default=6, help="rows of maps.png, spread evenly over the split")
    add("--split", type=Literal["test", "validation"], default="test", help="which images")
    add("--boxes", type=str, default=None, help=BOXES_HELP)
    add("--box_size", type=PositiveInt, default=64, help="height and width in pixels of the images with the boxes")
    add_device(parser)
    add("--data", type=DataConfig, default=data or DataConfig())
    options = parse(parser, argv)
    if options.images > MOST_ROWS:
        raise InputError(f"--images {options.images}: maps.png has {MOST_ROWS} rows at most")
    return options


def draw_pairs(experiment: Experiment, options: Any, boxes: Tensor | None, figures: Path, suffix: str) -> None:
    """Figure 1 for each pair of student and teacher: ``maps.png``, or ``maps-<student>-<teacher>.png`` of several."""
    distiller, split = experiment.distiller, experiment.split(options.split)
    choice = torch.arange(len(split)) if boxes is None else boxes[:, 0].isfinite().nonzero().squeeze(1)
    count = min(options.images, len(choice))
    positions = choice[[i * len(choice) // count for i in range(count)]]
    images, target = images_at(split, positions.tolist()), split.targets[positions]
    device = next(distiller.parameters()).device
    outputs = distiller.outputs(images.to(device))
    cams = {r: cam(outputs[r].maps[-1], outputs[r].head, target.to(device)) for r in distiller.output_roles}
    compared = similarities(distiller, outputs)
    pairs = distiller.pairs
    labels = row_labels(experiment, target, {role: outputs[role].logits.argmax(1).cpu() for role in cams})
    outlines = boxes[positions] * (images.shape[-1] / options.box_size) if boxes is not None else None
    drawn: list[Any] = list(pairs) or [tuple(reversed(cams))]
    for pair in drawn:
        if pair in compared:
            student, teacher = pair
            maps = pair_maps(compared[pair], cams[teacher], cams[student])
        else:
            maps = {f"CAM {role}": relative_cam(cams[role]) for role in reversed(pair)}
            if pairs:
                print(
                    f"the maps of {pair[0]} and {pair[1]} have different channels and no adapter (a run without ADM): "
                    "there is no S to draw, CAM alone is"
                )
        name = "-".join(["maps", *pair] if len(pairs) > 1 else ["maps"])
        draw_maps(images, maps, figures / f"{name}{suffix}.png", labels, outlines)


def row_labels(experiment: Experiment, target: Tensor, predictions: Mapping[str, Tensor]) -> list[str]:
    """For each image its class and which networks recognise it."""
    labels = []
    for row, wanted in enumerate(target.tolist()):
        name = experiment.datasets.class_names[wanted].split(",")[0][:20]
        right = [role for role, classes in predictions.items() if classes[row] == wanted]
        labels.append(f"{name}\ncorrect: {', '.join(right) or 'none'}")
    return labels


def draw_attention(metrics: Sequence[Mapping[str, Any]], figures: Path) -> None:
    """Table 17 over training: ``attention.json``, ``attention.png`` and, printed, up to nine epochs."""
    keys = ("step", "epoch", "split", *KEYS)
    found = [{key: line[key] for key in keys} for line in metrics if all(line.get(key) is not None for key in keys)]
    if not found:
        print("no attention over training: this run logged none (no ADM, and maps of different channels)")
        return
    plain = [{key.removeprefix("attention/"): value for key, value in row.items()} for row in found]
    save_json({"rows": plain}, figures / "attention.json")
    draw_curves([{"kind": "evaluation", **row} for row in found], figures / "attention.png")
    shown = sorted({round(i * (len(found) - 1) / 8) for i in range(9)})
    heads = ["epoch", *(key.removeprefix("attention/").replace("_", " ") for key in KEYS)]
    print(
        "\n".join(align([heads, *([f"{found[i]['epoch']:g}", *(f"{found[i][k]:.4f}" for k in KEYS)] for i in shown)]))
    )


def read_boxes(experiment: Experiment, options: Any) -> Tensor:
    """The object box of each image of a split ``[N, 4]``: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; nan for none.

    A box belongs to the image whose path ends in the row's columns before x0, joined by "/", whatever its suffix.
    Raises: InputError for a file that does not read so, and where no image of the split has a box.
    """
    by_default = "crop_flip" if experiment.datasets.image_size <= SMALL else "random_resized_crop"
    augmentation = experiment.command.config.data.augmentation or by_default
    if isinstance(experiment.split(options.split), Streamed) and augmentation == "random_resized_crop":
        raise InputError("--boxes needs images that evaluation sees whole, but it cuts the centre out of these")
    files = experiment.image_files(options.split)
    table = box_table_of(Path(options.boxes), options.box_size)
    depth = next(iter(table)).count("/") + 1
    names = ["/".join(file.with_suffix("").parts[-depth:]) for file in files]
    none = [math.nan] * 4
    boxes = torch.tensor([table.get(name, none) for name in names])
    if not boxes.isfinite().any():
        raise InputError(
            f"{options.boxes} has no box for this split: it names {next(iter(table))}, images are {names[0]}"
        )
    return boxes


def box_table_of(file: Path, size: int) -> dict[str, list[float]]:
    """``{"train/n01443537/0": [x0, y0, x1, y1]}``, x1 and y1 exclusive. Raises: InputError naming the line."""
    corners = ("x0", "y0", "x1", "y1")
    if not file.is_file():
        raise InputError(f"no box file {file}{how_to_make(file)}")
    table: dict[str, list[float]] = {}
    with open(file, newline="") as opened:
        reader = csv.reader(opened, delimiter="\t")
        header = next(reader, [])
        if tuple(header[-4:]) != corners or len(header) < 5:
            raise InputError(f"{file}: its first line must name columns for the image and then x0, y0, x1, y1 (tabs)")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            try:
                x0, y0, x1, y1 = (float(value) for value in row[len(header) - 4 :])
            except ValueError as error:
                raise InputError(f"{where}: four numbers x0, y0, x1, y1 must end it") from error
            if not (0 <= x0 <= x1 < size and 0 <= y0 <= y1 < size):
                raise InputError(f"{where}: not a box within {size} x {size} pixels: check --box_size")
            name = "/".join(row[: len(header) - 4])
            name = str(Path(name).with_suffix("")) if name.lower().endswith(EXTENSIONS) else name
            if name in table:
                raise InputError(f"{where}: a second box of {name}: give one an image")
            table[name] = [x0, y0, x1 + 1, y1 + 1]
    if not table:
        raise InputError(f"{file} holds no box")
    return table


@torch.no_grad()
def box_shares(experiment: Experiment, options: Any, boxes: Tensor) -> dict[str, dict[str, float]]:
    """How much of consensus, discrepancy (1 - S) and both CAMs lies inside the object box, over the split.

    Returns: for each its ``mean`` share, ``over_area`` (mean of the share less the box's share of the image, that is
    less what it would be by chance) and the ``standard_error`` of that; ``area`` itself too.
    """
    distiller, size = experiment.distiller, (options.box_size, options.box_size)
    device = next(distiller.parameters()).device
    pairs = distiller.pairs
    found: dict[str, list[Tensor]] = {}
    for batch in experiment.evaluation_loader(experiment.split(options.split)):
        inside = boxes[batch["index"].cpu()]
        has = inside[:, 0].isfinite()
        if not has.any():
            continue
        inside = inside[has].to(device)
        target = batch["target"][has].to(device)
        outputs = distiller.outputs(batch["image"][has].to(device))
        weights = {"area": torch.ones(len(inside), 1, 1, device=device)}
        for (student, teacher), similarity in similarities(distiller, outputs).items():
            pair = f" {student} {teacher}" if len(pairs) > 1 else ""
            weights[f"consensus{pair}"] = consensus_attention(similarity).squeeze(1)
            weights[f"discrepancy{pair}"] = 1.0 - similarity
        for role in distiller.output_roles:
            weights[f"CAM {role}"] = cam(outputs[role].maps[-1], outputs[role].head, target).clamp_min(0.0)
        for name, values in weights.items():
            found.setdefault(name, []).append(box_share(values, inside, size))
    shares = {name: torch.cat(parts).cpu() for name, parts in found.items()}
    area = shares.pop("area")
    result = {"area": {"mean": area.mean().item()}}
    for name, share in shares.items():
        over = (share - area)[share.isfinite()]  # a map without any mass has no share
        error = (over.std() / len(over) ** 0.5).item()
        result[name] = {"mean": share.nanmean().item(), "over_area": over.mean().item(), "standard_error": error}
    return result


def draw_box_shares(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The shares over training; by chance each would be the box's share of the image's area."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    unit = "epoch" if all(row["epoch"] is not None for row in rows) else "step"
    x = [row[unit] for row in rows]
    names = list(rows[0]["shares"])
    for name in names:
        shares = [row["shares"][name] for row in rows]
        y = [100 * share["mean"] for share in shares]
        if name == "area":
            axis.plot(x, y, color="0.3", linestyle="--", linewidth=1, label="area of the box (chance)")
            continue
        number = names.index(name)
        role = name.removeprefix("CAM ")
        color, marker = series_color(2 + number) if role == name else role_color(role), MARKERS[number % len(MARKERS)]
        axis.plot(x, y, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=name)
        reach = [196 * share["standard_error"] for share in shares]
        low, high = [a - r for a, r in zip(y, reach, strict=True)], [a + r for a, r in zip(y, reach, strict=True)]
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.set(
        xlabel=unit, ylabel="share inside the object box (%)", title="bands: 95 % intervals of the distance from chance"
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3, linewidth=0.6)
    figure.legend(*axis.get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=2)
    save_figure(figure, path)


if __name__ == "__main__":
    run_command(main)
