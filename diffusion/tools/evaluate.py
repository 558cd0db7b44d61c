"""FID and IS (Table 6) of the students of a run, of single networks, or of a folder of images.

    python diffusion/tools/evaluate.py runs/pd+adm --steps 4 2 1 --inception weights-inception-2015-12-05-6726825d.pth
    python diffusion/tools/evaluate.py runs/digits --features digits --samples 2000
    python diffusion/tools/evaluate.py --images generated/ --real data/cifar10-png/

Several processes: `accelerate launch` or `torchrun` before it; the images are the same whatever their number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.analysis.figures import save_json
from core.errors import InputError
from core.training.command import DONE, missing_extra, parse, run_command
from core.training.run import environment
from diffusion.data import DataConfig
from diffusion.tools.runs import data_of, find_students, home

if TYPE_CHECKING:
    from diffusion.metrics import Extractor, Statistics


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    networks = find_students(options.networks, options.steps)
    if networks:
        options = parse_options(argv, data_of(Path(options.networks[0])))

    try:  # after the command line is read: --help is quick
        import diffusers  # noqa: F401
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise missing_extra(error, "diffusion") from error
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu")
    try:
        report = evaluate(options, networks, state)
    finally:
        state.destroy_process_group()
    if not state.is_main_process:
        return DONE
    print("\n".join(table(report)))
    out = options.out
    if out is None and len(options.networks) == 1:
        out = home(options.networks[0]) / f"evaluation-{options.features.partition(':')[0]}.json"
    if out is not None:
        save_json(report, out)
        print(f"written to {out}")
    return DONE


def parse_options(argv: Sequence[str] | None, data: DataConfig | None = None) -> Any:
    """The command line; ``data``: the defaults of its data options. Raises: InputError for anything wrong with it."""
    from jsonargparse import ArgumentParser

    description = "FID and IS of distilled diffusion models, by torch-fidelity."
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    add = parser.add_argument
    add("networks", nargs="*", type=str, help="run folders of chains, or folders of single networks")
    add("--steps", type=int, nargs="+", default=[], help="of a run, only the students of these step counts; else all")
    add("--sampling_steps", type=int, default=None, help="sample in so many steps, not in those of training")
    add("--images", type=str, default=None, help="instead of networks, a folder of .png or .jpg images")
    add("--samples", type=int, default=50_000, help="images drawn from each network")
    add("--seed", type=int, default=0, help="with an image's number it decides the noise that the image starts from")
    add("--last_step", type=Literal["noisy", "clean"], default="noisy", help="CFD's end (index 0), or x itself")
    add("--batch_size", type=int, default=256, help="images sampled at once by a process")
    add("--features", type=str, default="inception", help="inception, or a proxy: resnet56:FILE or digits")
    add("--inception", type=str, default=None, help="local file of Inception's weights; downloaded unless given")
    add("--feature_batch_size", type=int, default=64, help="images at once through the extractor")
    add("--splits", type=int, default=10, help="of the inception score")
    add("--real", type=str, default=None, help="folder of real images, or .npz with mu and sigma; else --data")
    add("--cache", type=str, default=None, help="folder that keeps real images' statistics; beside torch's hub cache")
    add("--save", type=str, default=None, help="folder for the samples as .png, in one folder a network")
    add("--device", type=Literal["auto", "cpu"], default="auto", help="auto takes a GPU where there is one")
    add("--out", type=str, default=None, help="JSON file; of one run or round evaluation-<features>.json in its folder")
    add("--data", type=DataConfig, default=data or DataConfig())
    options = parse(parser, argv)
    if bool(options.networks) == (options.images is not None):
        raise InputError("give run or network folders, or --images FOLDER")
    for name in ("samples", "batch_size", "feature_batch_size", "splits", "sampling_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1: {value}")
    if options.seed < 0:
        raise InputError(f"--seed must not be negative: {options.seed}")
    return options


def evaluate(options: Any, networks: Sequence[Path], state: Any) -> dict[str, Any]:
    """Samples and scores; returns what is written as JSON, in the main process; the others help to sample.

    Args: what ``parse_options`` gives; the networks' folders; accelerate's ``PartialState``.
    """
    from diffusion.metrics import InFolder, scores
    from diffusion.sampling import load_student, sample_shared

    extractor, real = prepare(options, state.device) if state.is_main_process else (None, None)
    rows: list[dict[str, Any]] = []
    for folder in networks:
        student = load_student(folder, state.device)
        steps = options.sampling_steps or student.steps
        draw = partial(
            student.sample, seed=options.seed, steps=steps, batch_size=options.batch_size, last_step=options.last_step
        )
        started = time.perf_counter()
        images = sample_shared(options.samples, draw)
        row = {"network": str(folder), "trained_steps": student.steps, "steps": steps, "images": len(images)}
        row["sampling_seconds"] = time.perf_counter() - started
        if extractor is not None and real is not None:
            if options.save is not None:
                save_images(images, Path(options.save) / f"{folder.parent.name}-steps-{steps:04d}")
            rows.append({**row, **scores(images, real, extractor, options.splits)})
    if extractor is None or real is None:
        return {}
    if options.images is not None:
        folder_images = InFolder(options.images)
        row = {"network": options.images, "images": len(folder_images)}
        rows.append({**row, **scores(folder_images, real, extractor, options.splits)})
    features = extractor.features
    return {
        "features": {"name": options.features, **asdict(features), "sha256": extractor.identity},
        "real": {"source": options.real or asdict(options.data), "images": real.count},
        "seed": options.seed,
        "last_step": options.last_step,
        "splits": options.splits,
        "rows": rows,
        "environment": environment(str(state.device)),
    }


def prepare(options: Any, device: Any) -> tuple[Extractor, Statistics]:
    """The extractor, and the statistics of the real images. Raises: InputError."""
    from diffusion.data import load_images
    from diffusion.metrics import Extractor, features_of, real_statistics

    features = features_of(options.features, options.inception)
    extractor = Extractor(features, device, options.feature_batch_size)
    print(f"{features.distance} and {features.score} by {features.note or features.extractor}", flush=True)
    real = real_statistics(
        load_images(options.data) if options.real is None else options.real, extractor, options.cache
    )
    return extractor, real


def save_images(images: Any, folder: Path) -> None:
    """uint8 ``[N, 1 or 3, H, W]`` as ``00000.png``, ... Raises: InputError where there can be no such folder."""
    from PIL import Image

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    for number, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:05d}.png")


def table(report: dict[str, Any]) -> list[str]:
    """The rows of a report as text."""
    distance, score = (report["features"][key] for key in ("distance", "score"))
    keys = (distance, score, f"{score} std")
    lines = [["network", "steps", *keys]]
    for row in report["rows"]:
        lines.append([row["network"], str(row.get("steps", "-")), *(f"{row[key]:.4f}" for key in keys)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


if __name__ == "__main__":
    run_command(main)
