"""Pictures of what the students of a run sample: a grid for each step count, and how the images come about.

    python diffusion/tools/sample.py runs/pd+adm --steps 8 4 2 1
    python diffusion/tools/sample.py runs/pd+adm/round-0004/student --gif true --out figures/

All networks start from the same noise, so that an image keeps its place from grid to grid. Writes ``samples.png`` (a
grid a step count), ``trajectory-<steps>.png`` (a row an image: z before each step, then the result) and, if wanted,
the same as ``trajectory-<steps>.gif``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core.analysis.figures import save_figure
from core.errors import InputError
from core.training.command import DONE, missing_extra, parse, run_command
from diffusion.tools.runs import find_students, home

COLUMNS = 9
"""At most so many columns of a trajectory; of more steps some are left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    folders = find_students(options.networks, options.steps)
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise missing_extra(error, "diffusion") from error
    from diffusion.sampling import denoise, initial_noise, load_student, to_uint8

    out = Path(options.out) if options.out is not None else home(options.networks[0]) / "figures"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    grids: dict[str, Tensor] = {}
    for folder in folders:
        student = load_student(folder, device)
        steps = options.sampling_steps or student.steps
        z = initial_noise(options.seed, range(options.rows * options.columns), student.shape).to(device)
        states = [z[: options.rows].cpu()]
        for step in denoise(student.model, student.schedule, student.prediction, steps, z, options.last_step):
            states.append(step.z[: options.rows].cpu())
            last = step.z
        name = f"{steps:04d}"
        label = f"{steps} step{'s' if steps > 1 else ''}"
        if label in grids:  # networks of several runs
            label, name = f"{folder.parent.parent.name}, {label}", f"{folder.parent.parent.name}-{name}"
        grids[label] = tile(to_uint8(last.cpu()), options.columns)
        chosen = [round(i * steps / min(steps, COLUMNS - 1)) for i in range(min(steps, COLUMNS - 1) + 1)]
        stride = student.schedule.timesteps // steps
        times = [student.schedule.timesteps - i * stride for i in chosen]
        draw_trajectory([to_uint8(states[i]) for i in chosen], times, out / f"trajectory-{name}.png")
        if options.gif:
            save_gif([tile(to_uint8(state), 1) for state in states], out / f"trajectory-{name}.gif")
    draw_grids(grids, out / "samples.png")
    print(f"figures are in {out}")
    return DONE


def parse_options(argv: Sequence[str] | None) -> Any:
    """The command line. Raises: InputError for anything wrong with it."""
    from jsonargparse import ArgumentParser

    description = "Draws what distilled diffusion models sample."
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    add = parser.add_argument
    add("networks", nargs="+", type=str, help="run folders of chains, or folders of single networks")
    add("--steps", type=int, nargs="+", default=[], help="of a run, only the students of these step counts; else all")
    add("--sampling_steps", type=int, default=None, help="sample in so many steps, not in those of training")
    add("--rows", type=int, default=6, help="of a grid; also the images whose trajectory is drawn")
    add("--columns", type=int, default=8, help="of a grid")
    add("--seed", type=int, default=0, help="with an image's number it decides the noise that the image starts from")
    add("--last_step", type=Literal["noisy", "clean"], default="noisy", help="CFD's end (index 0), or x itself")
    add("--gif", type=bool, default=False, help="write each trajectory as a GIF too, a frame a step")
    add("--device", type=Literal["auto", "cpu"], default="auto", help="auto takes a GPU where there is one")
    add("--out", type=str, default=None, help="folder of the figures; figures/ of the first run or round unless given")
    options = parse(parser, argv)
    for name in ("rows", "columns", "sampling_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1: {value}")
    if options.seed < 0:
        raise InputError(f"--seed must not be negative: {options.seed}")
    return options


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """uint8 ``[N, C, H, W]``, N a multiple of ``columns`` -> one image ``[h, w, 3]``, white between them."""
    rows = len(images) // columns
    padded = torch.nn.functional.pad(images.expand(-1, 3, -1, -1), (0, gap, 0, gap), value=255)
    height, width = padded.shape[-2:]
    grid = (
        padded.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    )
    return grid[:-gap, :-gap]


def draw_grids(grids: dict[str, Tensor], file: Path) -> None:
    """The grids ``[h, w, 3]`` side by side, four a row, each under its name."""
    from matplotlib.figure import Figure

    columns = min(len(grids), 4)
    rows = -(-len(grids) // columns)
    height, width = next(iter(grids.values())).shape[:2]
    figure = Figure(figsize=(3.2 * columns, (3.2 * height / width + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (name, grid) in zip(axes, grids.items(), strict=False):
        axis.imshow(grid.numpy(), interpolation="nearest")
        axis.set_title(name, fontsize="small")
    save_figure(figure, file)


def draw_trajectory(states: Sequence[Tensor], times: Sequence[int], file: Path) -> None:
    """A column for each state uint8 ``[rows, C, H, W]``, under its time."""
    from matplotlib.figure import Figure

    rows, _, height, width = states[0].shape
    figure = Figure(figsize=(0.9 * len(states), 0.9 * rows * height / width + 0.3), layout="constrained")
    axes = figure.subplots(1, len(states), squeeze=False)[0]
    for axis, state, t in zip(axes, states, times, strict=True):
        axis.imshow(tile(state, 1).numpy(), interpolation="nearest")
        axis.set_title(f"t = {t}", fontsize="x-small")
        axis.axis("off")
    save_figure(figure, file)


def save_gif(frames: Sequence[Tensor], file: Path, shortest: int = 64) -> None:
    """A frame of a fifth of a second for each image uint8 ``[h, w, 3]``, the last one for two seconds."""
    from PIL import Image

    factor = max(1, shortest // min(frames[0].shape[:2]))
    pictures = [
        Image.fromarray(frame.repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy()) for frame in frames
    ]
    durations = [200] * (len(pictures) - 1) + [2000]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


if __name__ == "__main__":
    run_command(main)
