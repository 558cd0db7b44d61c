"""What the tools share: the networks of a run, the data it was trained on, where to compute, how DiTs sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from core.errors import InputError
from core.files import make_folder
from core.training.checkpoint import step_of
from core.training.kept import refuse_kept
from core.training.run import read_config as read_signed_config
from diffusion.data import DataConfig
from diffusion.dit.convert import exports, null_label
from diffusion.dit.data import LabelledConfig
from diffusion.dit.gaussian import Sampler, spaced_times
from diffusion.dit.sampling import Precision, check_guidance, load_vae
from diffusion.files import read_json

UpTo100: Any = restricted_number_type("UpTo100", int, [(">", 0), ("<=", 100)])
"""Pictures along the side of a figure."""


def find_students(folders: Sequence[str | Path], steps: Sequence[int] = ()) -> list[Path]:
    """The networks among ``folders``, and those of each run: of a chain its rounds' students, most steps first; of a
    DiT's run all that it exported, the earliest first.

    Args: ``steps``: of a chain, only the students that sample in so many steps; of a DiT's run, only those iterations.
    Raises: InputError for what is neither, and where a run lacks one of these steps.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if is_network(folder):
            found.append(folder)
            continue
        rounds = {int(path.parent.name.removeprefix("round-")): [path] for path in folder.glob("round-*/student")}
        iterations: dict[int, list[Path]] = {}
        for path in exports(folder):
            iterations.setdefault(step_of(path.parent), []).append(path)
        known = iterations or rounds
        if not known:
            refuse_kept(folder)
            raise InputError(f"{folder} is neither a network's folder (config.json) nor a run with a finished round")
        if missing := sorted(set(steps) - set(known)):
            what = f"no network of iteration {missing[0]}" if iterations else f"no student of {missing[0]} steps"
            raise InputError(f"{folder} has {what}, only of {sorted(known, reverse=not iterations)}")
        found += [path for n in sorted(steps or known, reverse=not iterations) for path in known[n]]
    return found


def is_network(path: Path) -> bool:
    """Whether this is one network, not a run: a folder of diffusers' or ours, or a file of weights."""
    if path.is_file():
        return path.suffix in (".pt", ".safetensors")
    return any((path / name).is_file() for name in ("config.json", "adm.json", "model_index.json"))


def is_dit(network: Path) -> bool:
    """Whether a network is a DiT, and not a U-Net of a chain."""
    if network.is_file() or (network / "transformer/config.json").is_file():
        return True
    try:
        return "DiT" in str(read_json(network / "config.json").get("_class_name"))
    except InputError:
        return False


def home(folder: str | Path) -> Path:
    """Where results go: a run's folder; for a network's folder, which stays as diffusers wrote it, the round's."""
    folder = Path(folder)
    return folder.parent if is_network(folder) else folder


def figures_folder(out: str | None, folder: str | Path) -> Path:
    """Where figures go, ``figures`` of a run or round unless given; made. Raises: InputError where it cannot be."""
    return make_folder(Path(out) if out is not None else home(folder) / "figures")


def tool_parser(description: str) -> Any:
    """jsonargparse's parser as all tools have it, for ``core.training.command.parse``."""
    from core.training.command import tool_parser

    return tool_parser(description)


def add_device(parser: Any) -> None:
    about = "auto takes a GPU where there is one"
    parser.add_argument("--device", type=Literal["auto", "cpu"], default="auto", help=about)


def device_of(options: Any) -> str:
    """What ``--device`` means here."""
    return "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.yaml`` of a run, or of the round or run around a network's folder; empty where there is none."""
    for place in (folder, *list(folder.absolute().parents)[:3]):
        file = place / "config.yaml"
        if file.is_file():
            return read_signed_config(file)
    return {}


def data_of(folder: Path) -> DataConfig | LabelledConfig:
    """The images that a run, or a network of it, was trained on; the defaults where that is not known."""
    dit = (folder / "export").is_dir() or (is_network(folder) and is_dit(folder))
    config = read_config(folder)
    if not config and not is_network(folder):
        refuse_kept(folder)
        raise InputError(f"{folder}/config.yaml is missing: the run's command writes it again; or name its networks")
    said = config.get("data", {})
    return LabelledConfig(**said) if dit else DataConfig(**said)


def content_hash(network: Path) -> str:
    """SHA-256 of all files of a network."""
    files = [network] if network.is_file() else sorted(path for path in network.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(network)}\n".encode())
        with open(file, "rb") as opened:
            while some := opened.read(1 << 20):
                digest.update(some)
    return digest.hexdigest()


def add_sampling_options(parser: Any, networks: Literal["*", "+"]) -> None:
    """Which networks sample, how, and on what; ``networks``: whether there may be none.

    The options that only DiTs have are None where they are not given (see ``dit_options``).
    """
    add = parser.add_argument
    add(
        "networks", nargs=networks, type=str, help="run folders, or folders of single networks (of a DiT also its file)"
    )
    add("--steps", type=int, nargs="+", default=[], help="of a chain only these step counts, of a DiT's run iterations")
    add(
        "--sampling_steps",
        type=PositiveInt,
        default=None,
        help="sample in so many steps; else as trained, a DiT in 250",
    )
    add(
        "--seed",
        type=NonNegativeInt,
        default=0,
        help="with an image's number it decides the noise that the image starts from",
    )
    add("--last_step", type=Literal["noisy", "clean"], default="noisy", help="of a chain: CFD's end (index 0), or x")
    add_device(parser)
    add("--guidance", type=float, nargs="+", default=None, help="of DiTs: scales of guidance; 1 is none (default: 4 1)")
    add("--sampler", type=Sampler, default=None, help="of DiTs: ddpm (default) or ddim")
    add("--cfg_channels", type=Literal[3, 4], default=None, help="of DiTs: channels under guidance, 3 (default) or 4")
    add("--precision", type=Precision, default=None, help="of DiTs: fp32, tf32 (default: fp32 but on a GPU) or bf16")
    add("--vae", type=str, default=None, help="of DiTs of latents: AutoencoderKL, a folder or a name on the hub")


@dataclass(frozen=True)
class DiTOptions:
    """How DiTs sample. ``settings``: what decides the images besides guidance, seed and index."""

    guidance: tuple[float, ...]
    vae: Any
    settings: dict[str, Any]


def dit_options(options: Any, networks: Sequence[Path], device: torch.device | str) -> DiTOptions | None:
    """What the command line says of them, None where no network is a DiT. Switches TF32 as it says.

    Raises: InputError where an option does not fit the networks, or the VAE is none.
    """
    if not any(map(is_dit, networks)):
        for name in ("guidance", "sampler", "cfg_channels", "precision", "vae"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name} counts only for DiTs, and there is none among the networks")
        return None
    guidance = tuple(dict.fromkeys(options.guidance or (4.0, 1.0)))
    if not all(0 <= scale < math.inf for scale in guidance):
        raise InputError(f"--guidance must be finite and not negative: {list(guidance)}")
    if any(scale != 1 for scale in guidance):
        for network in filter(is_dit, networks):
            check_guidance(network, null_label(network), *guidance)
    if options.last_step != "noisy":
        raise InputError("--last_step counts only for the students of a chain, not for DiTs")
    precision = options.precision or "tf32"
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    settings: dict[str, Any] = {
        "steps": options.sampling_steps or 250,
        "sampler": options.sampler or "ddpm",
        "cfg_channels": options.cfg_channels or 3,
        "precision": precision,
    }
    spaced_times(settings["steps"], sampler=settings["sampler"])  # refuses before anything is read
    vae = None if options.vae is None else load_vae(options.vae, device)
    return DiTOptions(guidance, vae, settings)
