"""DiT's files: ours, DiT's own, diffusers'; the pipeline that samples as DiT does, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import assert_same
from small_dit import SMALL, dit
from torch import Tensor

pytest.importorskip("diffusers")

from core.errors import InputError
from diffusion.dit.convert import load_dit, load_dit_pipeline, null_label, save_dit
from diffusion.dit.distiller import DiTDistiller
from diffusion.dit.model import DiT, DiTConfig
from diffusion.dit.training import load_teacher
from diffusion.files import read_about

PUBLISHED = DiTConfig(size=None, width=384, depth=1, heads=6, patch=4)
"""A width whose number of heads is known; one block keeps it small."""


def an_input() -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return z, torch.tensor([0, 13, 500, 999]), torch.tensor([0, 3, 9, 10])


@torch.no_grad()
def output_of(network: Any) -> Tensor:
    output = network(*an_input())
    return getattr(output, "sample", output)


def published_state(**options: Any) -> dict[str, Tensor]:
    return dit(PUBLISHED, **options).state_dict()


class Harm:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# --- our folder and diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_an_exported_network_comes_back(tmp_path: Path, learn_sigma: bool) -> None:
    network = dit(learn_sigma=learn_sigma)
    save_dit(tmp_path / "student", network, latent_scale=None, step=7)
    for path in (tmp_path / "student", tmp_path / "student" / "transformer"):
        again = load_dit(path)
        assert_same(again.state_dict(), network.state_dict())
        assert (again.config, again.channels, again.input_size, again.classes) == (SMALL, 3, 8, 10)
        assert again.learn_sigma == learn_sigma and not again.training
        assert [w.requires_grad for w in again.parameters()] == [w.requires_grad for w in network.parameters()]
        assert torch.equal(output_of(again), output_of(network))
    assert read_about(tmp_path / "student") == {
        "kind": "dit", "channels": 3, "input_size": 8, "classes": 10, "learn_sigma": learn_sigma,
        "null_label": True, "latent_scale": None, "step": 7,
    }  # fmt: skip


def test_diffusers_computes_the_same_once_its_time_embedding_is_put_right(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    network: Any = dit()
    save_dit(tmp_path, network)
    theirs: Any = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer").eval()
    wanted = output_of(network)
    assert (output_of(theirs) - wanted).abs().max() > 0.01 * wanted.abs().max()  # as diffusers opens it
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(output_of(theirs), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output_of(load_dit_pipeline(tmp_path).transformer), wanted, rtol=1e-5, atol=1e-5)


def test_saving_replaces_what_was_there_and_takes_no_random_numbers(tmp_path: Path) -> None:
    save_dit(tmp_path / "student", dit(), step=1)
    network, before = dit(seed=1), torch.get_rng_state()
    save_dit(tmp_path / "student", network, step=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads((tmp_path / "student/adm.json").read_text())["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert_same(load_dit(tmp_path / "student").state_dict(), network.state_dict())


def test_a_run_folder_is_its_last_export(tmp_path: Path) -> None:
    for step in (200, 1000):
        save_dit(tmp_path / "export" / f"step-{step:08d}" / "student", dit(seed=step))
    assert_same(load_dit(tmp_path).state_dict(), dit(seed=1000).state_dict())


def test_another_trainers_folder_of_diffusers_loads(tmp_path: Path) -> None:
    """The layouts of published weights: no ``adm.json``, other ``norm_eps``, a pipeline with its VAE, or pickled."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    options: dict[str, Any] = {"num_embeds_ada_norm": 10, "sample_size": 8, "in_channels": 3, "out_channels": 6}
    network: Any = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, **options)
    network.eval()
    shared = network.transformer_blocks[0].norm1.emb.state_dict()
    network.transformer_blocks[1].norm1.emb.load_state_dict(shared)
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    vae = a_vae(latent_channels=3)
    pipeline: Any = DiTPipeline(network, vae, DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "a")
    index = json.loads((tmp_path / "a/model_index.json").read_text())
    (tmp_path / "a/model_index.json").write_text(json.dumps({**index, "id2label": {"0": "cat, kitten"}}))
    network.save_pretrained(tmp_path / "b", safe_serialization=False)
    for folder in (tmp_path / "a", tmp_path / "a" / "transformer", tmp_path / "b"):
        again = load_dit(folder)
        assert again.config == DiTConfig(None, 16, 2, 2, 2)
        torch.testing.assert_close(output_of(again), output_of(network), rtol=1e-3, atol=1e-3)  # other norm_eps
    pipeline = load_dit_pipeline(tmp_path / "a")
    assert pipeline.labels == {"cat": 0, "kitten": 0}
    assert pipeline.transformer.config.norm_eps == 1e-6 != network.config.norm_eps
    torch.testing.assert_close(
        output_of(pipeline.transformer), output_of(load_dit(tmp_path / "a")), rtol=1e-5, atol=1e-5
    )
    assert_same(pipeline.vae.state_dict(), vae.state_dict())

    torch.nn.init.zeros_(network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight)
    network.save_pretrained(tmp_path / "c")
    with pytest.raises(InputError, match=r"each block has a timestep_embedder\.linear_1\.weight of its own"):
        load_dit(tmp_path / "c")


# --- the pipeline -----------------------------------------------------------------------------------------------------


def a_vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)  # 44,000 parameters
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    widths: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    vae: Any = AutoencoderKL(down_block_types=down, up_block_types=up, **widths, **options)
    return vae.eval()


@torch.no_grad()
def ddim_by_loop(network: DiT, z: Tensor, labels: list[int], scale: float, steps: int) -> Tensor:
    """Song et al. 2021 with eta = 0, guided in all channels; times 0, 1000 / steps, ...; from the formulas."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
    y, null = torch.tensor(labels), torch.full((len(labels),), network.classes)
    channels, stride = z.shape[1], 1000 // steps
    for time in reversed(range(0, stride * steps, stride)):
        t = torch.full((len(z),), time)
        c, u = (network(z, t, label)[:, :channels] for label in (y, null))
        eps = u + scale * (c - u)
        x = (z - (1 - abar[time]) ** 0.5 * eps) / abar[time] ** 0.5
        then = abar[time - stride] if time else 1.0
        z = then**0.5 * x + (1 - then) ** 0.5 * eps
    return z


def run(pipeline: Any, labels: list[int], scale: float, steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline(labels, scale, generator, num_inference_steps=steps, output_type="pt").images


def first_noise(labels: list[int], channels: int) -> Tensor:
    return torch.randn(len(labels), channels, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_pipeline_samples_pixels_by_the_formula(tmp_path: Path, scale: float, learn_sigma: bool) -> None:
    network, labels = dit(channels=1, classes=4, learn_sigma=learn_sigma), [0, 3]
    with torch.no_grad():
        network.final_layer.linear.weight.mul_(0.1)  # noise in the range of noise
    save_dit(tmp_path, network)
    wanted = ddim_by_loop(network, first_noise(labels, 1), labels, scale, 10)
    assert wanted.std() > 0.1 and not torch.equal(wanted[0], wanted[1])
    wanted = (wanted / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(run(load_dit_pipeline(tmp_path), labels, scale, 10), wanted, rtol=1e-5, atol=1e-5)


def test_the_pipeline_decodes_latents_by_their_vae(tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    network, labels, vae = dit(channels=4), [9], a_vae(latent_channels=4)
    save_dit(tmp_path / "student", network, latent_scale=0.18215)
    vae.save_pretrained(tmp_path / "vae")
    z = ddim_by_loop(network, first_noise(labels, 4), labels, 2.0, 4)
    with torch.no_grad():
        wanted = (vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert wanted.std() > 0.01
    for given in (vae, tmp_path / "vae", str(tmp_path / "vae")):
        images = run(load_dit_pipeline(tmp_path / "student", given), labels, 2.0, 4)
        torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)
    opened = DiTPipeline.from_pretrained(tmp_path / "student", vae=vae)  # diffusers reads the folder by itself too
    assert opened.transformer.config.norm_eps == 1e-6


def test_the_pipeline_refuses_another_vae(tmp_path: Path) -> None:
    save_dit(tmp_path / "student", dit(channels=4), latent_scale=0.2)
    with pytest.raises(InputError, match="name the VAE that decodes them"):
        load_dit_pipeline(tmp_path / "student")
    with pytest.raises(InputError, match=r"latents times 0\.2, the VAE's are times 0\.18215"):
        load_dit_pipeline(tmp_path / "student", a_vae(latent_channels=4))
    with pytest.raises(InputError, match="has 4 channels, the VAE 3"):
        load_dit_pipeline(tmp_path / "student", a_vae(latent_channels=3, scaling_factor=0.2))
    with pytest.raises(InputError, match="cannot open"):
        load_dit_pipeline(tmp_path / "student", tmp_path / "none")
    with pytest.raises(InputError, match="cannot open"):
        load_dit_pipeline(tmp_path / "student" / "transformer", a_vae(latent_channels=4))
    save_dit(tmp_path / "many", dit(classes=1001))
    with pytest.raises(InputError, match="1001 classes; DiTPipeline takes 1000 for the null label"):
        load_dit_pipeline(tmp_path / "many")


# --- DiT's own files and checkpoints ----------------------------------------------------------------------------------


def test_a_file_in_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = dit(PUBLISHED).half().state_dict()
    torch.save(state, tmp_path / "DiT.pt")
    again = load_dit(tmp_path / "DiT.pt").state_dict()
    assert_same(again, {key: weight.float() for key, weight in state.items()})


@pytest.mark.parametrize("layout", ["plain", "module.", "ema", "model"])
def test_dits_own_files_load(tmp_path: Path, layout: str) -> None:
    network, file = dit(PUBLISHED), tmp_path / "DiT.pt"
    state, other = network.state_dict(), dit(PUBLISHED, seed=1).state_dict()
    content: Any = {
        "plain": state,
        "module.": {f"module.{key}": weight for key, weight in state.items()},
        # as its trainer writes them
        "ema": {"model": other, "ema": state, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="DiT-S/4")},
        "model": {"model": state, "opt": {}},
    }[layout]
    torch.save(content, file)
    again = load_dit(file)
    assert_same(again.state_dict(), state)
    assert again.config.resolved() == PUBLISHED.resolved()
    assert (again.classes, again.input_size, again.learn_sigma) == (10, 8, True)
    assert torch.equal(output_of(again), output_of(network))


def test_a_file_without_a_null_label_has_as_many_classes_as_rows(tmp_path: Path) -> None:
    network = dit(PUBLISHED)
    state = network.state_dict()
    table = "y_embedder.embedding_table.weight"
    torch.save({"ema": {**state, table: state[table][:10]}}, tmp_path / "DiT.pt")
    torch.save(state, tmp_path / "eleven.pt")
    again = load_dit(tmp_path / "DiT.pt")
    assert again.classes == 10 and torch.equal(output_of(again)[:3], output_of(network)[:3])
    save_dit(tmp_path / "folder", again)
    for name, learned in (("DiT.pt", False), ("folder", False), ("eleven.pt", True)):
        assert load_dit(tmp_path / name).null_label is null_label(tmp_path / name) is learned


def test_a_published_size_is_known_by_its_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = DiT(DiTConfig("S/2"), 4, 32, 1000).state_dict()
    state = {key: torch.zeros(1, dtype=torch.float16).expand(weight.shape) for key, weight in shapes.items()}
    state["pos_embed"] = DiT(DiTConfig(None, 384, 1, 6, 2), 4, 32, 1).pos_embed.data
    torch.save(state, tmp_path / "DiT-S-2.pt")  # zeros that share one number: a small file
    network = load_dit(tmp_path / "DiT-S-2.pt")
    assert network.config.resolved() == DiTConfig("S/2").resolved()
    assert (network.channels, network.input_size, network.classes) == (4, 32, 1000)
    assert network.final_layer.linear.weight.dtype == torch.float32


def test_a_checkpoint_of_ours_says_how_many_heads_it_has(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network, file = dit(), tmp_path / "student.safetensors"
    save_file(network.state_dict(), file, DiTDistiller(network).metadata("student"))
    again = load_dit(file)
    assert again.config == SMALL
    assert torch.equal(output_of(again), output_of(network))
    save_file(network.state_dict(), file)
    with pytest.raises(
        InputError, match="does not say how many heads its attention has, and width 16 is of no published"
    ):
        load_dit(file)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"channels": 4}, "has channels 3, wanted is 4"),
        ({"size": 32}, "has input size 8, wanted is 32"),
        ({"classes": 1000}, "has classes 10, wanted is 1000"),
        ({"patch": 4}, "has patch size 2, wanted is 4: .*same tokens"),
    ],
)
def test_a_teacher_for_other_data_is_refused(tmp_path: Path, wanted: dict[str, int], said: str) -> None:
    save_dit(tmp_path / "t", dit())
    patch = wanted.pop("patch", 2)
    data: Any = SimpleNamespace(**{"channels": 3, "size": 8, "classes": 10, "latent_scale": None, **wanted})
    with pytest.raises(InputError, match=said) as caught:
        load_teacher(str(tmp_path / "t"), data, patch)
    assert "\n" not in str(caught.value)


def test_pickles_that_could_run_code_are_refused(tmp_path: Path) -> None:
    harm, file = tmp_path / "harmed", tmp_path / "DiT.pt"
    torch.save({"ema": published_state(), "args": Harm(harm)}, file)
    with pytest.raises(InputError, match="could run code") as caught:
        load_dit(file)
    assert "weights_only" not in str(caught.value)  # torch's advice is to run the code
    save_dit(tmp_path / "student", dit())
    (tmp_path / "student/adm.json").unlink()  # a folder of somebody else's
    folder = tmp_path / "student" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"pos_embed.proj.bias": Harm(harm)}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="cannot read the network"):
        load_dit(folder)
    assert not harm.exists()


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "none"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"no DiT at .*{name}"):
        load_dit(tmp_path / name)


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_cut_file_is_named(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / name
    if file.suffix == ".pt":
        torch.save(published_state(), file)
    else:
        save_file(published_state(), file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        load_dit(file)


def without(key: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in published_state().items() if name != key}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: {"fc.weight": torch.zeros(3, 3)}, "holds no DiT: 'x_embedder.proj.weight' is missing"),
        (lambda: {**published_state(), "x_embedder.proj.weight": torch.zeros(3)}, "holds no DiT"),
        (lambda: {**published_state(), "y_embedder.embedding_table.weight": torch.tensor(1.0)}, "holds no DiT"),
        (lambda: without("blocks.0.attn.qkv.bias"), "does not fit a DiT: .*blocks.0.attn.qkv.bias"),
        (lambda: {**published_state(), "more": torch.zeros(1)}, 'does not fit a DiT: .*"more"'),
        (
            lambda: published_state() | {"t_embedder.mlp.0.bias": torch.full((384,), torch.nan)},
            "mlp.0.bias is not finite",
        ),
        (lambda: published_state() | {"pos_embed": torch.zeros(1, 4, 384)}, "positions of its own"),
        (lambda: [1, 2], "holds no state dict"),
        (lambda: {"ema": 3}, "holds no state dict"),
        (lambda: {}, "holds no state dict"),
    ],
)
def test_what_is_no_dit_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content(), tmp_path / "file.pt")
    with pytest.raises(InputError, match=said) as caught:
        load_dit(tmp_path / "file.pt")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_dit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no DiT: name a folder"):
        load_dit(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="holds a UNet2DModel"):
        load_dit(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        load_dit(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(InputError, match="cannot read the network"):
        load_dit(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_layers", 10**9, "num_layers 1000000000: a network has 1 to 1024 layers"),
        ("num_layers", 0, "num_layers 0: a network has"),
        ("num_layers", "x", "cannot"),
        ("num_attention_heads", None, "cannot"),
        ("num_embeds_ada_norm", {}, "cannot"),
        ("sample_size", [1], "cannot"),
        ("patch_size", 0, "cannot"),
    ],
)
def test_a_folder_whose_config_says_what_cannot_be_is_refused(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    save_dit(tmp_path / "run", dit())
    (tmp_path / "run/adm.json").write_text("{}")  # as another's trainer leaves it, without digests
    config = tmp_path / "run/transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    for load in (load_dit, partial(load_dit_pipeline, vae="/absent")):
        with pytest.raises(InputError, match=said) as error:
            load(tmp_path / "run")
        assert "\n" not in str(error.value)


def test_what_trainers_leave_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """DiT's own training script keeps weights, average, optimiser and command line; some compile and wrap as well."""
    model, average = published_state(), {key: 2 * tensor for key, tensor in published_state().items()}
    average["pos_embed"] = model["pos_embed"]
    file = tmp_path / "0050000.pt"
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        named = ({f"{prefix}{key}": tensor for key, tensor in state.items()} for state in (model, average))
        torch.save(dict(zip(("model", "ema"), named, strict=True)) | {"opt": {}, "args": argparse.Namespace(a=1)}, file)
        key = "y_embedder.embedding_table.weight"
        assert torch.equal(load_dit(file).state_dict()[key], average[key])
        assert torch.equal(load_dit(f"{file}#model").state_dict()[key], model[key])
    assert "ema was taken" in capsys.readouterr().err


@pytest.mark.parametrize("heads", ["0", "-1", "five", "", "5", "1000"])
def test_metadata_that_say_no_possible_heads_are_refused(heads: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(published_state(), tmp_path / "a.safetensors", {"heads": heads})
    with pytest.raises(InputError, match="heads") as caught:
        load_dit(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
