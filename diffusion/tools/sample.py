"""Pictures of what the networks of a run sample: a grid for each step count, and how the images come about.

    python diffusion/tools/sample.py runs/pd+adm --steps 8 4 2 1
    python diffusion/tools/sample.py runs/dit --classes 207 360 --guidance 4 --vae stabilityai/sd-vae-ft-ema

All networks start from the same noise, so that an image keeps its place from grid to grid. Writes ``samples.png`` with
all grids. Of a chain there is one for each step count, and ``trajectory-<steps>.png`` (a row an image: z before each
step, then the result) and, if wanted, the same as ``trajectory-<steps>.gif``. Of a DiT's run there is one for each
exported iteration and guidance, a row a class, and beside it pixel for pixel ``samples-<iteration>-guidance-<g>.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from core.errors import InputError
from core.files import save_figure
from core.training.command import DONE, parse, run_command
from diffusion.dit.sampling import load_dit_student
from diffusion.files import need_packages
from diffusion.pictures import save_gif, tile
from diffusion.sampling import ImageNoise, denoise, load_student, to_uint8
from diffusion.tools import runs

COLUMNS = 9
"""At most so many columns of a trajectory; of more steps some are left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    folders = runs.find_students(options.networks, options.steps)
    need_packages("diffusers")
    device = runs.device_of(options)
    dit = runs.dit_options(options, folders, device)
    if dit is not None and not all(map(runs.is_dit, folders)):
        raise InputError("these are DiTs and students of a chain: draw them one after the other")
    if dit is None and options.classes is not None:
        raise InputError("--classes counts only for DiTs, and there is none among the networks")
    if dit is not None and options.gif:
        raise InputError("--gif counts only for the students of a chain, not for DiTs")
    out = runs.figures_folder(options.out, options.networks[0])
    if dit is not None:
        draw_classes(options, folders, dit, device, out)
        print(f"figures are in {out}")
        return DONE
    grids: dict[str, Tensor] = {}
    for folder in folders:
        student = load_student(folder, device)
        steps = options.sampling_steps or student.steps
        start = ImageNoise(options.seed, range(options.rows * options.columns), student.shape)().to(device)
        states = [start[: options.rows].cpu()]
        for z in denoise(student.model, student.schedule, student.prediction, steps, start, options.last_step):
            states.append(z[: options.rows].cpu())
        name = f"{steps:04d}"
        label = f"{steps} step{'s' if steps > 1 else ''}"
        if label in grids:  # networks of several runs
            label, name = f"{folder.parent.parent.name}, {label}", f"{folder.parent.parent.name}-{name}"
        grids[label] = tile(to_uint8(z.cpu()), options.columns)
        chosen = [round(i * steps / min(steps, COLUMNS - 1)) for i in range(min(steps, COLUMNS - 1) + 1)]
        stride = student.schedule.timesteps // steps
        times = [student.schedule.timesteps - i * stride for i in chosen]
        columns = {f"t = {t}": tile(to_uint8(states[i]), 1) for t, i in zip(times, chosen, strict=True)}
        draw_grids(columns, out / f"trajectory-{name}.png", columns=len(chosen), width=0.9, fontsize="x-small")
        if options.gif:
            save_gif([tile(to_uint8(state), 1) for state in states], out / f"trajectory-{name}.gif")
    draw_grids(grids, out / "samples.png")
    print(f"figures are in {out}")
    return DONE


def parse_options(argv: Sequence[str] | None) -> Any:
    """The command line. Raises: InputError for anything wrong with it."""
    parser = runs.tool_parser("Draws what distilled diffusion models sample.")
    add = parser.add_argument
    runs.add_sampling_options(parser, "+")
    add("--classes", type=int, nargs="+", default=None, help="of DiTs: those of the rows; --rows of them unless given")
    add("--rows", type=runs.UpTo100, default=6, help="of a grid; also the images whose trajectory is drawn")
    add("--columns", type=runs.UpTo100, default=8, help="of a grid")
    add("--gif", type=bool, default=False, help="of a chain: write each trajectory as a GIF too, a frame a step")
    add("--out", type=str, default=None, help="folder of the figures; figures/ of the first run or round unless given")
    return parse(parser, argv)


def draw_classes(options: Any, folders: Sequence[Path], dit: runs.DiTOptions, device: str, out: Path) -> None:
    """A grid for each DiT and guidance: a row a class, and in it the images of ``columns`` indices."""
    grids: dict[str, Tensor] = {}
    names: list[str] = []
    for folder in folders:
        network = load_dit_student(folder, device)
        count = network.model.classes
        rows = min(options.rows, count)
        classes = options.classes or [row * count // rows for row in range(rows)]
        labels = [label for label in classes for _ in range(options.columns)]
        names = [str(label) for label in classes]
        for guidance in dit.guidance:
            images = network.sample(
                range(len(labels)), options.seed, classes=labels, guidance=guidance, vae=dit.vae, **dit.settings
            )
            name = folder.stem if network.step is None else f"{network.step:08d}"
            said = name if network.step is None else f"iteration {network.step}"
            said += ", no guidance" if guidance == 1 else f", guidance {guidance:g}"
            if said in grids:  # of several runs, or of student and teacher
                run = "-".join(folder.absolute().parts[-4:-3] + folder.parts[-1:])
                name, said = f"{run}-{name}", f"{run}, {said}"
            grids[said] = tile(images, options.columns)
            Image.fromarray(grids[said].numpy()).save(out / f"samples-{name}-guidance-{guidance:g}.png")
    draw_grids(grids, out / "samples.png", names)


def draw_grids(
    grids: dict[str, Tensor],
    file: Path,
    rows_named: Sequence[str] = (),
    *,
    columns: int = 4,
    width: float = 3.2,
    fontsize: str = "small",
) -> None:
    """The grids ``[h, w, 3]`` side by side, each under its name; beside them the names of their rows.

    Args: ``columns``: grids a row; ``width``: of a grid, in inches.
    """
    from matplotlib.figure import Figure

    columns = min(len(grids), columns)
    rows = -(-len(grids) // columns)
    high, wide = next(iter(grids.values())).shape[:2]
    figure = Figure(figsize=(width * columns, (width * high / wide + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (name, grid) in zip(axes, grids.items(), strict=False):
        axis.imshow(grid.numpy(), interpolation="nearest")
        for row, said in enumerate(rows_named):
            axis.text(-0.01 * wide, (row + 0.5) * high / len(rows_named), said, ha="right", va="center", fontsize=6)
        axis.set_title(name, fontsize=fontsize)
    save_figure(figure, file)


if __name__ == "__main__":
    run_command(main)
