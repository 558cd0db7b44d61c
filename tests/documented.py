"""Commands and Python blocks of the documents and docstrings, and a small world that has what they read."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/segmentation"))

from street import TINY, make_street  # noqa: E402, F401

PROGRAMS = ("python", "pip", "make", "torchrun", "ruff", "mypy")
PACKAGES = ("core", "classification", "offline_kd", "segmentation", "diffusion", "tools")


@dataclass(frozen=True)
class Block:
    """Of a document, ``bash`` or ``python``."""

    language: str
    text: str


def entry_points() -> list[Path]:
    """Every script that is called as a command, what others read the results of first."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    found = [file.relative_to(ROOT) for file in files if '__name__ == "__main__"' in file.read_text()]
    first = ("encode_latents.py", "train.py")
    return sorted(found, key=lambda file: (file.parent, first.index(file.name) if file.name in first else len(first)))


def documents() -> dict[str, list[Block]]:
    """The blocks of README.md, CONTRIBUTING.md and docs/*.md, commands in docstrings by package; by name."""
    found = {}
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", file.read_text(), flags=re.M | re.S)
        found[str(file.relative_to(ROOT))] = [Block(*block) for block in blocks]
    for script in [*entry_points(), Path("tools/report.py")]:  # reproduce.py hands on to that one
        text = ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""
        commands = re.findall(r"^    ((?:python|torchrun) .*?[^\\])$", text, flags=re.M | re.S)
        found.setdefault(f"docstrings of {script.parts[0]}", []).extend(Block("bash", line) for line in commands)
    return {name: blocks for name, blocks in found.items() if blocks}


@cache
def command_lines(block: str) -> tuple[tuple[str, ...], ...]:
    """The commands that a shell makes of a block: loops unrolled, variables filled in, no ``*`` expanded, nothing run.

    Of ``make TARGET``, those of the target.
    """
    with TemporaryDirectory() as folder:
        bin, log = Path(folder, "bin"), Path(folder, "log")
        bin.mkdir()
        log.touch()
        (bin / ".installed").touch()
        for name in PROGRAMS:
            (bin / name).write_text(f'#!/bin/sh\nprintf "%s\\037" {name} "$@" >> {log}\necho >> {log}\n')
            (bin / name).chmod(0o755)
        bash = ["/bin/bash", "-euf", "-c", block]
        done = subprocess.run(bash, env={"PATH": str(bin)}, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{block}"
        found: list[tuple[str, ...]] = []
        for line in log.read_text().split("\037\n")[:-1]:
            words = tuple(line.split("\037"))
            if words[0] == "make":
                env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
                make = ["make", "-n", "--no-print-directory", *words[1:], f"BIN={bin}", f"VENV={bin}"]
                made = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True)
                assert made.returncode == 0, f"{made.stderr}\n{words}"
                found += command_lines(made.stdout.replace(f"{bin}/", ""))
            else:
                found.append(words)
        return tuple(found)


def without_repeats(commands: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without those that differ from an earlier one in their seed alone, or in nothing."""
    seeds = re.compile(r"(?<=--seed )\d+|(?<=-)\d(?=[ /]|$)")
    return list({seeds.sub("0", " ".join(command)): command for command in reversed(commands)}.values())[::-1]


def text_of(command: tuple[str, ...]) -> str:
    return shlex.join(command)


# --- what the commands read -------------------------------------------------------------------------------------------


def make_world(world: Path) -> None:
    """The repository's folders by links, so that paths are as documented, and small made-up data, weights, networks."""
    for name in (*PACKAGES, "results", "docs"):
        (world / name).symlink_to(ROOT / name)
    make_images(world / "data/tiny-imagenet-32", classes=100)
    for folder in ("data/cifar10-jpeg", "imagenet"):
        make_images(world / folder, classes=10)
    (world / "data/cifar10-jpeg-2000").symlink_to("cifar10-jpeg")
    (world / "photos").symlink_to("imagenet")
    (world / "photo.png").symlink_to("imagenet/val/n000/0.png")
    for folder in ("generated", "images", "data/cifar10-png", "samples", "real"):  # of the digits classifier's size
        make_images(world / folder, classes=10, split="", size=8)
    make_images(world / "data/camvid/leftImg8bit", classes=1)
    boxes = [f"val\tn{c:03d}\t{n}\t8\t8\t40\t48\n" for c in range(100) for n in range(2)]
    for folder in (".", "data/tiny-imagenet-32"):
        (world / folder / "boxes.tsv").write_text("split\twnid\timage\tx0\ty0\tx1\ty1\n" + "".join(boxes))
    make_weights(world)


def make_images(root: Path, classes: int, split: str | None = None, size: int = 32) -> None:
    """Noise, ``root/{train,val}/<class>/<number>.png``, 8 of each class to train on and 2 to evaluate on."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)) if split is None else ((split, 8),):
        for c in range(classes):
            folder = root / part / f"n{c:03d}"
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(generator.integers(256, size=(size, size, 3), dtype=np.uint8)).save(folder / f"{n}.png")


def make_weights(world: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from classification.networks import create_network

    (world / "weights").mkdir()
    for depth, folder in ((20, world), (44, world / "weights"), (56, world / "weights")):
        network = create_network(f"cifar_resnet{depth}_a", num_classes=10)
        save_file(network.state_dict(), folder / f"resnet{depth}-cifar10.safetensors")
    torch.save({"model": create_network("cifar_resnet20", num_classes=10).state_dict()}, world / "resnet20.pth")
    np.savez(world / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(32), sigma=np.eye(32))


def make_vae(folder: Path) -> None:
    """Half a picture's height and width, four channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=8, **kinds).save_pretrained(folder)
