"""DiT's files: published ``.pt``, diffusers' folders (which we also write, with ``adm.json``), and our checkpoints.

diffusers computes another time embedding than DiT (its frequencies end at 1/127 of the exponent, DiT's at 1/128), even
for DiT's own weights. ``load_dit_pipeline`` puts that right; a folder opened by diffusers alone samples worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError, first_line
from core.files import leftover
from core.training.checkpoint import numbered
from core.weights import read_metadata, read_state_dict, split_key
from diffusion.dit.model import SIZES, DiT, DiTConfig, sincos_table
from diffusion.files import ABOUT, check_layers, read_about, read_json, reading, save_pipeline

# ours -> diffusers'; several where ours is their concatenation
LAYERS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
    "blocks.{i}.adaLN_modulation.1": ["transformer_blocks.{i}.norm1.linear"],
    "blocks.{i}.attn.qkv": [f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"],
    "blocks.{i}.attn.proj": ["transformer_blocks.{i}.attn1.to_out.0"],
    "blocks.{i}.mlp.fc1": ["transformer_blocks.{i}.ff.net.0.proj"],
    "blocks.{i}.mlp.fc2": ["transformer_blocks.{i}.ff.net.2"],
}
# once in all of DiT, once in every block of diffusers'
SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def load_dit(path: str | Path) -> DiT:
    """A DiT in evaluation mode, float32, on the CPU; its sizes are read off the weights.

    Args:
        path: DiT's ``.pt`` (a state dict, or a checkpoint, of which it takes "ema" or else "model", or what FILE#KEY
            says), a ``.safetensors`` of DiT's names, a diffusers folder (of the network or of a DiTPipeline), or the
            folder of a run of ours: of that the last exported student.
    Raises: InputError for what is none of these, unreadable, not finite, or a pickle that could run code.
    """
    path = Path(path)
    if path.is_dir():
        folder = find_transformer(path)
        about = read_about(folder if (folder / ABOUT).is_file() else folder.parent)
        model = _build(str(folder), *_read_folder(folder))
        model.null_label = bool(about.get("null_label", True))
        return model
    if not split_key(path)[0].is_file():
        raise InputError(f"no DiT at {path}: name a .pt or .safetensors file, a diffusers folder or a run folder")
    said, state = read_metadata(path), read_state_dict(path)
    # A published file does not say whether it has a null label: 10, 100 or 1000 rows are classes, and nothing else.
    table = state.get("y_embedder.embedding_table.weight", torch.empty(0))
    without = said.get("kind") != "dit" and table.shape[:1] in ((10,), (100,), (1000,))
    if without:
        state["y_embedder.embedding_table.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    model = _build(str(path), state, None if "heads" not in said else int(said["heads"]))
    model.null_label = not without and said.get("null_label") != "untrained"
    return model


def null_label(path: Path) -> bool:
    """Whether the network of a file or folder can be guided (see ``DiT``); of a folder it reads no weights."""
    file = split_key(path)[0].is_file()
    return load_dit(path).null_label if file else bool(read_json(path / ABOUT).get("null_label", True))


def exports(run: Path) -> list[Path]:
    """The networks that a run exported, the earliest first. Raises: InputError for one without its ``adm.json``."""
    steps = [step for step in numbered(run / "export") if step.is_dir()]
    found = [path for step in steps for path in sorted(step.iterdir()) if path.is_dir() and not leftover(path)]
    for path in found:
        if not (path / ABOUT).is_file():
            raise InputError(f"{path / ABOUT} is missing: bring it back, or delete {path}")
    return found


def find_transformer(folder: Path) -> Path:
    """The folder with the ``config.json`` of diffusers' network in or under ``folder``. Raises: InputError."""
    students = [path for path in exports(folder) if path.name == "student"]
    for place in (folder, *students[-1:]):
        for candidate in (place / "transformer", place):
            if (candidate / "config.json").is_file():
                return candidate
    raise InputError(
        f"{folder} holds no DiT: name a folder with config.json or transformer/config.json, or a run folder that has "
        "exported a student"
    )


def save_dit(folder: Path, model: DiT, *, latent_scale: float | None = None, **about: Any) -> None:
    """Writes a folder that ``load_dit``, ``load_dit_pipeline`` and diffusers read; whole or not at all.

    Args:
        latent_scale: by which the VAE's latents were multiplied, None for a network of pixels.
        about: more for ``adm.json``, such as the step.
    Raises: TrainingError where the disk is full.
    """
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    with torch.device("meta"):  # takes no numbers from torch's generator
        network: Any = DiTTransformer2DModel(
            num_attention_heads=model.heads,
            attention_head_dim=model.width // model.heads,
            in_channels=model.channels,
            out_channels=model.out_channels,
            num_layers=len(model.blocks),
            sample_size=model.input_size,
            patch_size=model.patch,
            num_embeds_ada_norm=model.classes,
            norm_eps=1e-6,
        )
    network.load_state_dict(_to_diffusers(model), assign=True)
    scheduler: Any = DDIMScheduler(clip_sample=False)  # its other defaults are DiT's schedule
    said = {name: getattr(model, name) for name in ("channels", "input_size", "classes", "learn_sigma", "null_label")}
    about = {"kind": "dit", **said, "latent_scale": latent_scale, **about}
    vae: list[str | None] = [None, None] if latent_scale is None else ["diffusers", "AutoencoderKL"]
    save_pipeline(folder, network, "transformer", "DiTPipeline", json.loads(scheduler.to_json_string()), about, vae=vae)


def load_dit_pipeline(folder: str | Path, vae: Any = None) -> Any:
    """diffusers' ``DiTPipeline`` with DDIM and DiT's own time embedding, of our exported folder or a published one.

    As the pipeline is, it guides all channels of the noise and takes 1000 for the null label; here that stands for the
    network's own. Where the network is one of pixels, no VAE decodes.

    Args: ``vae``: an ``AutoencoderKL``, or its folder or hub name; unless the folder has its own.
    Raises: InputError where the VAE is missing or of other latents, or the folder is none of a pipeline.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    folder = Path(folder)
    about, index = read_json(folder / "adm.json"), read_json(folder / "model_index.json")
    pixels = bool(about) and about.get("latent_scale") is None
    if vae is None and not pixels and (folder / "vae" / "config.json").is_file():
        vae = folder / "vae"
    if vae is None and not pixels:
        raise InputError(f"{folder} samples latents: name the VAE that decodes them, a folder or a hub name")
    check_layers(folder / "transformer")
    read_json(folder / "scheduler/scheduler_config.json")  # raises: diffusers would look for what is wrong on its hub
    with reading(f"cannot open a DiTPipeline of {folder}"):
        network = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", norm_eps=1e-6)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        if isinstance(vae, str | Path):
            vae = AutoencoderKL.from_pretrained(vae)
        said: Any = network.config
        scale = about.get("latent_scale")
        if not pixels and vae.config.latent_channels != said.in_channels:
            theirs = vae.config.latent_channels
            raise InputError(f"{folder} has {said.in_channels} channels, the VAE {theirs}: name its own VAE")
        if scale is not None and not math.isclose(vae.config.scaling_factor, scale):
            raise InputError(
                f"{folder} was trained on latents times {scale}, the VAE's are times {vae.config.scaling_factor}: name "
                "the VAE that encoded them"
            )
        if said.num_embeds_ada_norm > 1000:
            raise InputError(
                f"{folder} has {said.num_embeds_ada_norm} classes; DiTPipeline takes 1000 for the null label"
            )
    for block in network.transformer_blocks:
        embedding: Any = block.norm1.emb
        embedding.time_proj.downscale_freq_shift = 0
        # The pipeline's null label, 1000, is the network's own.
        embedding.class_embedder.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].clamp(max=said.num_embeds_ada_norm), *inputs[1:])
        )
    return DiTPipeline(network.eval(), _Pixels() if pixels else vae, scheduler, id2label=index.get("id2label"))


class _Pixels:
    """In the place of a VAE where the network's samples are images."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z)


def _build(name: str, state: dict[str, Tensor], heads: int | None = None) -> DiT:
    """The network of a state dict with DiT's names. Raises: InputError."""
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        out = len(state["final_layer.linear.bias"]) // patch**2
        input_size = patch * math.isqrt(state["pos_embed"].shape[1])
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"{name} holds no DiT: {first_line(error)} is missing or of another shape") from error
    published = {width: heads for width, _, heads in SIZES.values()}
    if heads is None and width not in published:
        raise InputError(
            f"{name} does not say how many heads its attention has, and width {width} is of no published DiT: name the "
            "folder that was exported"
        )
    if width % (heads or 1):
        raise InputError(f"{name} says that it has {heads} heads, and its width {width} is no multiple of that")
    config = DiTConfig(None, width, depth, heads or published[width], patch)
    with torch.device("meta"):
        model = DiT(config, channels, input_size, classes, learn_sigma=out == 2 * channels)
    try:
        model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        raise InputError(f"{name} does not fit a DiT: {reason}") from error
    for key, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(f"{name}: the weight {key} is not finite")
    if not torch.allclose(model.pos_embed, sincos_table(width, model.side), atol=1e-2):
        raise InputError(f"{name} has positions of its own: a DiT's are the fixed sines and cosines of row and column")
    return model.eval()


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], int]:
    """A diffusers folder's weights by DiT's names, and the number of heads. Raises: InputError."""
    from diffusers import DiTTransformer2DModel

    said = read_json(folder / "config.json")
    kind, activation = said.get("_class_name"), said.get("activation_fn", "gelu-approximate")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel") or activation != "gelu-approximate":
        raise InputError(
            f"{folder} holds a {kind} with {activation}, not a DiTTransformer2DModel with gelu-approximate"
        )
    check_layers(folder)
    with reading(f"cannot read the network of {folder}"):
        network: Any = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
        theirs = network.state_dict()
        state = {}
        for ours, names, joined in _names(len(network.transformer_blocks)):
            first, *others = (theirs[name] for name in names)
            if not joined and not all(torch.equal(first, other) for other in others):
                name = names[0].partition(".emb.")[2]
                raise InputError(
                    f"{folder}: each block has a {name} of its own (trained by diffusers); a DiT has one for all"
                )
            state[ours] = torch.cat([first, *others]) if joined else first
        state["pos_embed"] = sincos_table(network.inner_dim, network.config.sample_size // network.config.patch_size)
        return state, network.config.num_attention_heads


def _to_diffusers(model: DiT) -> dict[str, Tensor]:
    state, result = model.state_dict(), dict[str, Tensor]()
    for ours, names, joined in _names(len(model.blocks)):
        whole = state[ours].detach().float().cpu()
        parts = whole.chunk(len(names)) if joined else [whole] * len(names)
        result |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return result


def _names(depth: int) -> Iterator[tuple[str, list[str], bool]]:
    """A weight of ours, diffusers' names of it, and whether it is their concatenation or equals each of them."""
    for kind in ("weight", "bias"):
        for ours, names in LAYERS.items():
            for i in range(depth if "{i}" in ours else 1):
                yield f"{ours}.{kind}".format(i=i), [f"{name}.{kind}".format(i=i) for name in names], True
        for ours, name in SHARED.items():
            if kind == "weight" or not ours.startswith("y_embedder"):
                names = [f"transformer_blocks.{i}.norm1.emb.{name}.{kind}" for i in range(depth)]
                yield f"{ours}.{kind}", names, False
