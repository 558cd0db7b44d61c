"""Figure 4: where a student's features agree with its teacher's, at each time and place.

    python diffusion/tools/visualize.py runs/pd+adm --steps 4

Both networks see the same noisy image at the same time; S (Eq. 6) compares the inputs of their last convolutions; of
DiTs the maps that ADM compares, through the run's phi.
Writes ``similarity-<steps>.png``, the maps of a few images over time and the mean of many, and its numbers as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from core.adm import consensus_attention
from core.analysis.colors import BLUE
from core.errors import InputError
from core.files import save_figure, save_json
from core.training.command import DONE, parse, run_command
from core.training.run import environment
from diffusion.consensus import similarity
from diffusion.data import DataConfig, load_images, scaled
from diffusion.dit import similarity as dit
from diffusion.dit.data import LabelledConfig, load_labelled
from diffusion.files import need_packages
from diffusion.progressive.network import InputHook, check_network, load_teacher
from diffusion.sampling import ImageNoise, load_student
from diffusion.tools import runs


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    config = runs.read_config(Path(options.run)) if options.run is not None else {}
    student_folder, teacher_folder = find_pair(options, config)
    kinds = [runs.is_dit(folder) for folder in (student_folder, teacher_folder)]
    if any(kinds) and not all(kinds):
        raise InputError(f"of {student_folder} and {teacher_folder} one is a DiT, the other is not: they have no S")
    options = parse_options(argv, runs.data_of(Path(options.run or student_folder)))
    need_packages("diffusers")
    look = look_at_dits if all(kinds) else look_at_unets
    found = look(options, config, student_folder, teacher_folder)
    chosen, maps, times, count = found.images, found.maps, found.times, len(found.images)

    out = runs.figures_folder(options.out, options.run or student_folder)
    rows = [{"t": t, **numbers(s)} for t, s in zip(times, maps, strict=True)]
    name = f"similarity-{found.label}"
    about = {"teacher": str(teacher_folder), "student": str(student_folder), "images": count, "seed": options.seed}
    save_json({**about, "rows": rows, "environment": environment(runs.device_of(options))}, out / f"{name}.json")
    draw(chosen[: options.rows], maps[:, : options.rows], rows, found.timesteps, out / f"{name}.png")
    heads = ("mean", "minimum", "maximum", "within_image_std", "attention_std")
    print(f"S of {student_folder} and {teacher_folder}, {count} images")
    print("     t  " + "  ".join(head.rjust(16) for head in heads))
    for row in rows:
        print(f"{row['t']:6d}  " + "  ".join(f"{row[head]:16.4f}" for head in heads))
    print(f"written to {out}")
    return DONE


@dataclass(frozen=True)
class Found:
    """What is drawn: images uint8 ``[N, C, H, W]`` and S ``[times, N, h, w]`` of them at these times of 0..T."""

    images: Tensor
    maps: Tensor
    times: Sequence[int]
    timesteps: int
    label: str
    """Of the student, for the files' names."""


def look_at_unets(options: Any, config: Mapping[str, Any], student_folder: Path, teacher_folder: Path) -> Found:
    """The pair of a chain. Raises: InputError where they do not fit each other, or the images."""
    device = runs.device_of(options)
    student, teacher = load_student(student_folder, device), load_teacher(teacher_folder)
    teacher.model.to(device)
    images = load_images(options.data)
    for network in (student, teacher):
        check_network(network.model, str(network.folder), images.shape[1], images.shape[-1])
    if teacher.schedule.timesteps != student.schedule.timesteps:
        raise InputError(
            f"{teacher_folder} has times 0..{teacher.schedule.timesteps}, {student_folder} "
            f"0..{student.schedule.timesteps}: they cannot see the same noisy image"
        )
    count = min(options.images, len(images))
    chosen = images[[i * len(images) // count for i in range(count)]]
    times = [round(i * student.schedule.timesteps / options.times) for i in range(options.times + 1)]
    maps = similarities(student, teacher, chosen, times, options.seed, options.batch_size)
    return Found(chosen, maps, times, student.schedule.timesteps, f"{student.steps:04d}")


def look_at_dits(options: Any, config: Mapping[str, Any], student_folder: Path, teacher_folder: Path) -> Found:
    """The pair of a DiT's run. Raises: InputError where they do not fit each other, or the images."""
    run = None if options.run is None else Path(options.run)
    pair = dit.load_pair(student_folder, teacher_folder, run, config, runs.device_of(options))
    data = load_labelled(options.data)
    if (data.channels, data.size) != (pair.student.channels, pair.student.input_size):
        raise InputError(
            f"the images are {data.channels} x {data.size} x {data.size}, {student_folder} takes "
            f"{pair.student.channels} x {pair.student.input_size} x {pair.student.input_size}: give its --data"
        )
    x, labels, shown = dit.chosen(data, min(options.images, len(data.labels)))
    last = pair.schedule.timesteps - 1
    times = [round(i * last / options.times) for i in range(options.times + 1)]
    maps = dit.similarities(pair, x, labels, times, options.seed, options.batch_size)
    name = student_folder.parent.name if options.run is not None else student_folder.name
    return Found(shown, maps, times, last + 1, name.removeprefix("step-"))


def parse_options(argv: Sequence[str] | None, data: DataConfig | LabelledConfig | None = None) -> Any:
    """The command line; ``data``: the defaults of its data options. Raises: InputError for anything wrong with it."""
    parser = runs.tool_parser("Draws the similarity of teacher and student over time and space (Figure 4).")
    add = parser.add_argument
    add("run", nargs="?", type=str, help="run folder of a chain or a DiT; figures go into its figures/")
    about = "of a chain the student of so many steps, else of the fewest; of a DiT's run the iteration, else the last"
    add("--steps", type=int, default=None, help=about)
    add("--student", type=str, default=None, help="instead of a run, a network's folder (and --teacher)")
    add("--teacher", type=str, default=None, help="folder of the teacher; of a run the one it had unless given")
    add("--images", type=PositiveInt, default=64, help="images of the mean, spread evenly over the set")
    add("--rows", type=runs.UpTo100, default=4, help="images whose maps are drawn")
    add("--times", type=runs.UpTo100, default=10, help="intervals into which 0..T is cut")
    add("--batch_size", type=PositiveInt, default=64, help="images at once")
    add("--seed", type=NonNegativeInt, default=0, help="of the noise")
    runs.add_device(parser)
    add("--out", type=str, default=None, help="folder of the figures; figures/ of the run or round unless given")
    data = data or LabelledConfig()  # it has all options that DataConfig has
    add("--data", type=type(data), default=data)
    options = parse(parser, argv)
    if (options.run is None) == (options.student is None):
        raise InputError("give one of a run folder, and --student FOLDER --teacher FOLDER")
    if options.student is not None and options.teacher is None:
        raise InputError("--student needs --teacher FOLDER")
    return options


def find_pair(options: Any, config: Mapping[str, Any]) -> tuple[Path, Path]:
    """The folders of student and teacher. Raises: InputError where a run does not have them."""
    if options.student is not None:
        return Path(options.student), Path(options.teacher)
    run = Path(options.run)
    if (run / "export").is_dir():
        return dit.find_pair(run, config, options.steps, options.teacher)
    folders = runs.find_students([run], [options.steps] if options.steps is not None else [])
    student = folders[-1]
    if options.teacher is not None or runs.is_dit(student):
        return student, Path(options.teacher or student)
    steps = int(student.parent.name.removeprefix("round-"))
    before = run / f"round-{2 * steps:04d}" / "student"
    given = config.get("teacher")
    candidates = [before, Path(given) if given else run / "base" / "teacher"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return student, folder
    raise InputError(f"the teacher of {student} is in none of {', '.join(map(str, candidates))}: name it by --teacher")


@torch.no_grad()
def similarities(
    student: Any, teacher: Any, images: Tensor, times: Sequence[int], seed: int, batch_size: int
) -> Tensor:
    """S (Eq. 6) of both networks on the same noisy images, ``[times, N, h, w]`` on the CPU.

    Args: two ``Student``; images uint8 ``[N, C, H, W]``; an image keeps its noise over all times.
    """
    device = next(student.model.parameters()).device
    hooks = [InputHook(network.model) for network in (student, teacher)]
    batches = []
    for first in range(0, len(images), batch_size):
        x = scaled(images[first : first + batch_size].to(device))
        noise = ImageNoise(seed, range(first, first + len(x)), x.shape[1:])().to(device)
        maps = []
        for time in times:
            t = torch.full((len(x),), time, device=device)
            z = student.schedule.noisy(x, noise, t)
            for network in (student, teacher):
                network.model(z, t)
            maps.append(similarity(hooks[0].take(), hooks[1].take()).cpu())
        batches.append(torch.stack(maps))
    return torch.cat(batches, dim=1)


def numbers(s: Tensor) -> dict[str, float]:
    """S ``[N, h, w]`` of one time: its mean; means over images of each image's minimum, maximum and std, and of A's."""
    flat = s.flatten(1)
    return {
        "mean": s.mean().item(),
        "minimum": flat.amin(1).mean().item(),
        "maximum": flat.amax(1).mean().item(),
        "within_image_std": flat.std(1, unbiased=False).mean().item(),
        "attention_std": consensus_attention(s).flatten(1).std(1, unbiased=False).mean().item(),
    }


def draw(images: Tensor, maps: Tensor, rows: Sequence[Mapping[str, Any]], timesteps: int, file: Path) -> None:
    """Above, a row an image and a column a time; below, S over time with the images' mean extremes.

    Args: images uint8 ``[N, C, H, W]``; maps ``[times, N, h, w]``, coloured between the smallest and the largest.
    """
    from matplotlib.figure import Figure

    times, count = len(maps), len(images)
    figure = Figure(figsize=(0.85 * (times + 1) + 1.0, 0.95 * count + 2.9), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[0.95 * count + 0.2, 2.7])
    above, below = parts
    axes = above.subplots(count, times + 1, squeeze=False)
    low, high = maps.min().item(), maps.max().item()
    for i in range(count):
        axes[i, 0].imshow(images[i].expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        for k in range(times):
            shown = axes[i, k + 1].imshow(maps[k, i].numpy(), vmin=low, vmax=high, interpolation="nearest")
    for k, row in enumerate(rows):
        axes[0, k + 1].set_title(f"t = {row['t']}", fontsize="x-small")
    for axis in axes.flatten():
        axis.axis("off")
    above.colorbar(shown, ax=axes, label="similarity S (cosine)", shrink=0.8)
    axis = below.subplots()
    t = [row["t"] for row in rows]
    axis.plot(t, [row["mean"] for row in rows], color=BLUE, marker="o", markersize=3, label="mean")
    axis.fill_between(
        t, [row["minimum"] for row in rows], [row["maximum"] for row in rows], color=BLUE, alpha=0.2, linewidth=0,
        label="mean of the images' extremes",
    )  # fmt: skip
    axis.axvline(0.4 * timesteps, color="0.4", linestyle="--", linewidth=1, label="0.4 T")
    axis.set(xlabel="time t of the noise", ylabel="similarity S (cosine)")
    axis.grid(alpha=0.3, linewidth=0.6)
    below.legend(*axis.get_legend_handles_labels(), fontsize="x-small", loc="outside lower center", ncols=3)
    save_figure(figure, file)


if __name__ == "__main__":
    run_command(main)
