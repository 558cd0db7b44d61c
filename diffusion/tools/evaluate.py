"""FID and IS (Tables 6 and 7) of the networks of a run, of single networks, or of a folder of images.

    python diffusion/tools/evaluate.py runs/pd+adm --steps 4 2 1 --inception weights-inception-2015-12-05-6726825d.pth
    python diffusion/tools/evaluate.py --images generated/ --real data/cifar10-png/

Of a DiT's run it scores every exported iteration, with guidance and without. Several processes: `accelerate launch` or
`torchrun` for `python`; the images are the same whatever their number. The results are written after each network, and
the same command again goes on with those that are missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch import Tensor

from core.errors import InputError
from core.files import make_folder
from core.progress import progress_bar
from core.training.command import DONE, parse, run_command
from core.training.run import environment, identity_of, is_main_process, save_signed_json
from diffusion import metrics
from diffusion.data import DataConfig, load_images
from diffusion.dit.data import LabelledConfig, load_labelled
from diffusion.dit.sampling import load_dit_student
from diffusion.files import need_packages, read_json
from diffusion.sampling import gather_shares, load_student, own_share
from diffusion.tools import runs

CHUNK = 1024
"""About so many images in memory at once: 50,000 of 256 x 256 pixels would take 10 GB in each process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(words, DataConfig() if {"-h", "--help"} & set(words) else None)
    networks = runs.find_students(options.networks, options.steps)
    # Once more: which data options there are, and their defaults, depends on the networks.
    options = parse_options(words, runs.data_of(Path(options.networks[0])) if networks else DataConfig())
    need_packages("diffusers", "torch_fidelity")
    from accelerate import PartialState

    # Where the main process looks at a million real images, the others wait longer than by default.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(hours=6))
    try:
        results = evaluate(options, networks, state)
    finally:
        state.destroy_process_group()
    if results is not None:
        print("\n".join(table(results.report)))
        if results.file is not None:
            print(f"written to {results.file}")
    return DONE


def parse_options(argv: Sequence[str], data: DataConfig | None = None) -> Any:
    """The command line; ``data``: the defaults of its data options. Raises: InputError for anything wrong with it."""
    parser = runs.tool_parser("FID and IS of distilled diffusion models, by torch-fidelity.")
    add = parser.add_argument
    runs.add_sampling_options(parser, "*")
    add("--images", type=str, default=None, help="instead of networks, a folder of .png or .jpg images")
    add("--samples", type=PositiveInt, default=50_000, help="images drawn from each network")
    add("--batch_size", type=PositiveInt, default=256, help="images sampled at once by a process")
    add("--features", type=str, default="inception", help="inception, or a proxy: resnet56:FILE or digits")
    add("--inception", type=str, default=None, help="local file of Inception's weights; downloaded unless given")
    add("--feature_batch_size", type=PositiveInt, default=64, help="images at once through the extractor")
    add("--splits", type=PositiveInt, default=10, help="of the inception score")
    add("--real", type=str, default=None, help="folder of real images, or .npz with mu and sigma; else --data")
    add("--cache", type=str, default=None, help="folder that keeps real images' statistics; beside torch's hub cache")
    add("--save", type=str, default=None, help="folder for the samples as .png, in one folder a network")
    add("--out", type=str, default=None, help="JSON file; of one run or round evaluation-<features>.json in its folder")
    data = data or LabelledConfig()  # it has all options that DataConfig has
    add("--data", type=type(data), default=data)
    options = parse(parser, argv)
    if bool(options.networks) == (options.images is not None):
        raise InputError("give run or network folders, or --images FOLDER")
    if options.inception is not None and options.features != "inception":
        raise InputError(f"--inception counts only with --features inception, not with {options.features}")
    return options


def evaluate(options: Any, networks: Sequence[Path], state: Any) -> Results | None:
    """Samples and scores. Returns the results in the main process, None in the others, which help.

    Args: what ``parse_options`` gives; the networks; accelerate's ``PartialState``.
    """
    from accelerate.utils import broadcast_object_list

    if options.samples < state.num_processes:
        raise InputError(f"--samples {options.samples} are fewer than the {state.num_processes} processes")
    dit = runs.dit_options(options, networks, state.device)
    with state.main_process_first():  # it downloads Inception, the others find it
        features = metrics.features_of(options.features, options.inception)
        extractor = metrics.Extractor(features, state.device, options.feature_batch_size)
    results = None
    if state.is_main_process:
        print(f"{features.distance} and {features.score} by {features.note or features.extractor}", flush=True)
        results = Results(options, dit, real_side(options, extractor), extractor)
    plan = [
        {"network": str(network), "guidance": guidance, "sha256": runs.content_hash(network)}
        for network in networks
        for guidance in (dit.guidance if dit is not None and runs.is_dit(network) else (None,))
    ]
    # As the main process sees the file: by now it may have written the first row.
    missing: list[Any] = [None if results is None else results.missing(plan)]
    for entry in broadcast_object_list(missing)[0]:
        about, draw, folder = prepare(options, entry, dit, state.device)
        started = time.perf_counter()
        found = sampled_features(draw, options, extractor, folder)
        if results is not None:
            about |= {"images": options.samples, "sampling_seconds": time.perf_counter() - started}
            results.add({**entry, **about, **metrics.scores(found, results.real, extractor, options.splits)})
    if results is not None and options.images is not None:
        images = metrics.InFolder(options.images)
        about = {"network": options.images, "images": len(images)}
        results.add({**about, **metrics.scores(extractor(images), results.real, extractor, options.splits)})
    return results


def prepare(
    options: Any, entry: dict[str, Any], dit: runs.DiTOptions | None, device: Any
) -> tuple[dict[str, Any], Callable[[Sequence[int]], Tensor], str]:
    """What a row says of its network, ``draw(indices) -> images``, and the name of the folder for them."""
    path, guidance = Path(entry["network"]), entry["guidance"]
    shared = {"seed": options.seed, "batch_size": options.batch_size}
    if dit is not None and guidance is not None:
        network = load_dit_student(path, device)
        draw = partial(network.sample, guidance=guidance, vae=dit.vae, **dit.settings, **shared)
        about = {"iteration": network.step, "steps": dit.settings["steps"]}
        return about, draw, f"{path.parent.name}-{path.stem}-guidance-{guidance:g}"
    student = load_student(path, device)
    steps = options.sampling_steps or student.steps
    draw = partial(student.sample, steps=steps, last_step=options.last_step, **shared)
    return {"trained_steps": student.steps, "steps": steps}, draw, f"{path.parent.name}-steps-{steps:04d}"


def sampled_features(
    draw: Callable[[Sequence[int]], Tensor], options: Any, extractor: metrics.Extractor, folder: str
) -> dict[str, Tensor]:
    """Features ``[samples, C]`` by layer, in all processes, each of which samples its share of the images."""
    own = own_share(options.samples)
    chunk = -(-CHUNK // options.batch_size) * options.batch_size
    parts = []
    with progress_bar(len(own), f"sampling {folder}", shown=is_main_process()) as bar:
        for first in range(0, len(own), chunk):
            indices = own[first : first + chunk]
            images = draw(indices)
            if options.save is not None:
                save_images(images, indices, Path(options.save) / folder)
            parts.append(extractor(images, shown=False))
            bar.update(len(indices))
    return {key: gather_shares(torch.cat([part[key] for part in parts]), options.samples) for key in parts[0]}


def real_side(options: Any, extractor: metrics.Extractor) -> metrics.Statistics:
    """The statistics of the real images. Raises: InputError."""
    source, data = options.real, options.data
    if source is None and not isinstance(data, LabelledConfig):
        source = load_images(data)
    elif source is None and data.name == "latents":
        raise InputError(
            "latents hold no images to compare with: name the real side by --real, a folder of images or an .npz with "
            "mu and sigma, such as guided-diffusion's VIRTUAL_imagenet256_labeled.npz"
        )
    elif source is None:
        pixels: Any = load_labelled(data)
        source = pixels.pixels
    return metrics.real_statistics(source, extractor, options.cache)


class Results:
    """The rows and the file that keeps them, which is written anew with each.

    Rows that are there already stay if they were made with the same settings and their network is unchanged. A file of
    other settings is renamed, to ``.json.before``, as soon as there is a row in its stead.
    """

    def __init__(
        self, options: Any, dit: runs.DiTOptions | None, real: metrics.Statistics, extractor: metrics.Extractor
    ) -> None:
        self.real = real
        out = options.out
        if out is None and len(options.networks) == 1:
            out = runs.home(options.networks[0]) / f"evaluation-{options.features.partition(':')[0]}.json"
        self.file = None if out is None else Path(out)
        settings = {
            "features": {"name": options.features, **asdict(extractor.features), "sha256": extractor.identity},
            "real": {"source": options.real or asdict(options.data), "images": real.count},
            **{name: getattr(options, name) for name in ("samples", "seed", "sampling_steps", "last_step", "splits")},
            "dit": None if dit is None else {**dit.settings, "vae": options.vae},
        }
        if self.file is not None and (self.file.parent / "config.yaml").is_file():
            settings["run"] = identity_of(self.file.parent / "config.yaml")
        if self.file is not None and self.file.is_dir():
            raise InputError(f"--out {self.file} is a folder: name the JSON file in it")
        if self.file is not None:
            make_folder(self.file.parent, "--out")
        self.report: dict[str, Any] = {**settings, "rows": [], "environment": environment(str(extractor.device))}
        try:
            before = {} if self.file is None else read_json(self.file)
        except InputError as error:
            raise InputError(f"{error}: it is no JSON of results; name another --out, or delete it") from error
        now = json.loads(json.dumps(settings))
        before = {"run": now.get("run"), **before} if before else {}  # of an earlier version
        changed = [key for key in now if before and _setting(before, key) != _setting(now, key)]
        self.rename = bool(changed)
        if changed:
            print(f"{self.file} is of other settings ({changed[0]}): it becomes {self.file}.before", flush=True)
        elif before:
            self.report["rows"] = before.get("rows", [])

    def missing(self, plan: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of ``{"network", "guidance", "sha256"}`` that have no row. Rows of what they were before go."""
        now = {_key(entry): entry["sha256"] for entry in plan}
        self.report["rows"] = [r for r in self.report["rows"] if now.get(_key(r), r.get("sha256")) == r.get("sha256")]
        held = {_key(row) for row in self.report["rows"]}
        return [entry for entry in plan if _key(entry) not in held]

    def add(self, row: dict[str, Any]) -> None:
        """Raises: TrainingError where the disk is full."""
        others = [held for held in self.report["rows"] if _key(held) != _key(row)]
        self.report["rows"] = [*others, row]
        distance = self.report["features"]["distance"]
        under = "" if row.get("guidance") is None else f", {_under(row['guidance'])}"
        print(f"{row['network']}{under}: {distance} {row[distance]:.4f}", flush=True)
        if self.file is None:
            return
        if self.rename:
            os.replace(self.file, f"{self.file}.before")
            self.rename = False
        save_signed_json(self.report, self.file)


def _setting(report: dict[str, Any], key: str) -> Any:
    """What must be the same in two reports; of the features it is the weights, wherever their file lies."""
    value = report.get(key)
    return value.get("sha256") if key == "features" and isinstance(value, dict) else value


def _key(row: dict[str, Any]) -> tuple[str, float | None]:
    return row["network"], row.get("guidance")


def _under(guidance: float) -> str:
    return "no guidance" if guidance == 1 else f"guidance {guidance:g}"


def save_images(images: Tensor, indices: Sequence[int], folder: Path) -> None:
    """uint8 ``[N, 1 or 3, H, W]`` as ``00000.png``, ... Raises: InputError where there can be no such folder."""
    make_folder(folder)
    for number, image in zip(indices, images, strict=True):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:05d}.png")


def table(report: dict[str, Any]) -> list[str]:
    """The rows of a report as text: first those of chains and folders, then those of DiTs, a line a network."""
    distance, score = (report["features"][key] for key in ("distance", "score"))
    keys = (distance, score, f"{score} std")
    plain = [["network", "steps", *keys]]
    for row in report["rows"]:
        if row.get("guidance") is None:
            plain.append([row["network"], str(row.get("steps", "-")), *(f"{row[key]:.4f}" for key in keys)])
    rows = {(row["network"], row["guidance"]): row for row in report["rows"] if row.get("guidance") is not None}
    scales = sorted({guidance for _, guidance in rows}, reverse=True)
    heads = [f"{key}, {_under(scale)}" for scale in scales for key in keys[:2]]
    guided = [["network", "iteration", *heads]]
    for network in sorted({network for network, _ in rows}):
        own = [rows.get((network, g), {}) for g in scales]
        iteration = next(str(row["iteration"]) for row in own if row)
        cells = [f"{row[key]:.4f}" if row else "-" for row in own for key in keys[:2]]
        guided.append([network, "-" if iteration == "None" else iteration, *cells])
    return [line for part in (plain, guided) if len(part) > 1 for line in _aligned(part)]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


if __name__ == "__main__":
    run_command(main)
