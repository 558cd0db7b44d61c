"""Sampling from a DiT's folder: images depend on (seed, index) alone, and are those of the formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_dit import dit
from torch import Tensor

pytest.importorskip("diffusers")

from core.errors import InputError, TrainingError
from diffusion.dit.convert import load_dit_pipeline, save_dit
from diffusion.dit.gaussian import LinearSchedule, guided, spaced_times, trajectory
from diffusion.dit.model import DiT
from diffusion.dit.sampling import DiTStudent, load_dit_student
from diffusion.sampling import ImageNoise, to_uint8

SHAPE = (3, 8, 8)


def calm(**options: Any) -> DiT:
    """Its noise is about as large as noise, so that samples stay in the range of images."""
    null_label = options.pop("null_label", True)
    network = dit(**options)
    network.null_label = null_label
    with torch.no_grad():
        network.final_layer.linear.weight.mul_(0.3)
        network.final_layer.linear.bias.mul_(0.1)
    return network


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> DiTStudent:
    folder = tmp_path_factory.mktemp("export") / "step-00000070/student"
    save_dit(folder, calm(), latent_scale=None, step=70)
    return load_dit_student(folder)


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae: Any = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, **blocks)
    return vae.eval()


def test_noise_is_of_each_image_and_draw() -> None:
    noise = ImageNoise(3, [5, 0, 7], SHAPE)
    draws = [noise() for _ in range(4)]
    assert draws[0].shape == (3, *SHAPE) and draws[0].dtype == torch.float32
    assert torch.equal(draws[0], ImageNoise(3, [5, 0, 7], SHAPE)())
    alone, other = ImageNoise(3, [7], SHAPE), ImageNoise(4, [7], SHAPE)
    for draw in draws:
        assert torch.equal(draw[2], alone()[0])
        assert not torch.equal(draw[2], other()[0])
    values = torch.stack(draws).flatten(2)
    assert len(values.flatten(0, 1).unique(dim=0)) == 12
    assert values.mean().abs() < 4 / math.sqrt(values.numel()) and 0.9 < values.std() < 1.1


def test_folder_says_what_it_holds(student: DiTStudent) -> None:
    assert student.shape == SHAPE and student.latent_scale is None and student.step == 70
    assert not student.model.training and not any(p.requires_grad for p in student.model.parameters())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_images_are_those_of_the_formula(student: DiTStudent, sampler: Any) -> None:
    """The loop written out: labels by index, guidance, the sampler, grey levels."""
    indices = [3, 14, 25]
    found = student.sample(indices, 5, guidance=2.0, steps=6, sampler=sampler)
    model, noise, y = student.model, ImageNoise(5, indices, SHAPE), torch.tensor([3, 4, 5])

    def predict(z: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return guided(model, z, t, y, 2.0)

    z, times = noise(), spaced_times(6, sampler=sampler)
    states = trajectory(predict, LinearSchedule(), times, z) if sampler == "ddim" else None
    states = states or trajectory(predict, LinearSchedule(), times, z, noise)
    expected = list(states)[-1]
    assert found.dtype == torch.uint8 and found.float().std() > 20
    assert torch.equal(found, to_uint8(expected))


@pytest.mark.parametrize("options", [{"sampler": "ddim"}, {"sampler": "ddpm"}, {"guidance": 3.0}])
def test_images_do_not_depend_on_batch_or_company(student: DiTStudent, options: dict[str, Any]) -> None:
    options = {"steps": 8, **options}
    whole = student.sample(range(12), 7, batch_size=12, **options)
    assert whole.shape == (12, *SHAPE) and whole.float().std() > 20
    for batch_size in (1, 5):
        other = student.sample(range(12), 7, batch_size=batch_size, **options)
        assert (whole.int() - other.int()).abs().max() <= 1
    # As another process would draw its share.
    assert (whole[1::3].int() - student.sample(range(12)[1::3], 7, **options).int()).abs().max() <= 1
    assert not torch.equal(whole, student.sample(range(12), 8, **options))


def test_classes_guidance_and_its_channels_count(student: DiTStudent) -> None:
    options: dict[str, Any] = {"steps": 4, "sampler": "ddim"}
    default = student.sample([3, 14], 0, **options)
    assert torch.equal(default, student.sample([3, 14], 0, classes=[3, 4], **options))
    assert not torch.equal(default, student.sample([3, 14], 0, classes=[4, 3], **options))
    assert torch.equal(default, student.sample([3, 14], 0, cfg_channels=4, **options))
    strong = student.sample([3, 14], 0, guidance=4.0, **options)
    assert not torch.equal(default, strong)
    assert torch.equal(strong, student.sample([3, 14], 0, guidance=4.0, cfg_channels=4, **options))  # three channels
    half = student.sample([3, 14], 0, precision="bf16", **options)
    assert not torch.equal(default, half) and (default.float() - half.float()).abs().mean() < 10


def save_latents(folder: Path, **about: Any) -> DiTStudent:
    save_dit(folder, calm(channels=4), **{"latent_scale": 0.18215, **about})
    return load_dit_student(folder)


def test_latents_are_decoded_by_the_vae(tmp_path: Path, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion.dit import sampling

    student = save_latents(tmp_path / "student")
    options: dict[str, Any] = {"steps": 4, "guidance": 2.0, "vae": vae}
    decode, seen = DiTStudent.decode, []

    def spy(self: DiTStudent, z: Tensor, vae: Any) -> Tensor:
        seen.append(z)
        return decode(self, z, vae)

    monkeypatch.setattr(DiTStudent, "decode", spy)
    images = student.sample(range(5), 0, **options)
    (z,) = seen
    assert z.shape == (5, 4, 8, 8) and images.shape == (5, 3, 16, 16) and images.float().std() > 1
    with torch.no_grad():
        expected = vae.decode(z / 0.18215).sample
    assert torch.equal(images, (127.5 * expected + 128).clamp(0, 255).to(torch.uint8))
    monkeypatch.setattr(sampling, "DECODED", 2)
    assert (images.int() - student.sample(range(5), 0, **options).int()).abs().max() <= 1
    # The fourth channel is guided or not.
    assert not torch.equal(images, student.sample(range(5), 0, cfg_channels=4, **options))


def test_wrong_vae_is_one_clear_line(tmp_path: Path, vae: Any, student: DiTStudent) -> None:
    latents = save_latents(tmp_path / "student")
    with pytest.raises(InputError, match="samples latents: name the VAE that decodes them by --vae"):
        latents.sample([0], 0)
    with pytest.raises(InputError, match="samples pixels: leave --vae out"):
        student.sample([0], 0, vae=vae)
    save_dit(tmp_path / "three", calm(), latent_scale=0.18215)
    with pytest.raises(InputError, match="latents of 3 channels, --vae of 4"):
        load_dit_student(tmp_path / "three").sample([0], 0, vae=vae)
    other = save_latents(tmp_path / "other", latent_scale=0.5)
    with pytest.warns(UserWarning, match=r"latents times 0\.5, .* --vae says 0\.18215"):
        other.sample([0], 0, vae=vae, steps=2)


def test_diffusers_pipeline_samples_the_same_latents(tmp_path: Path, vae: Any) -> None:
    """DDIM with all channels under guidance, which is what diffusers' pipeline can do."""
    student = save_latents(tmp_path / "student")
    pipeline = load_dit_pipeline(tmp_path / "student", vae)
    pipeline.set_progress_bar_config(disable=True)
    y = [3, 0, 9]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(y, guidance_scale=4.0, generator=generator, num_inference_steps=10, output_type="np").images
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(y)
    with torch.no_grad():
        states = trajectory(
            lambda z, t: guided(student.model, z, t, labels, 4.0, 4),
            student.schedule,
            spaced_times(10, sampler="ddim"),
            z,
        )
        ours = student.decode(list(states)[-1], vae)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)


def test_published_files_are_of_latents(tmp_path: Path) -> None:
    for channels, scale in ((4, 0.18215), (3, None)):
        folder = tmp_path / str(channels)
        save_dit(folder, calm(channels=channels))
        (folder / "adm.json").unlink()
        found = load_dit_student(folder)
        assert found.latent_scale == scale and found.step is None


def test_bad_input_is_one_clear_line(student: DiTStudent, tmp_path: Path) -> None:
    for classes, wrong in (([0, 10], 10), ([-1, 0], -1)):
        with pytest.raises(InputError, match=f"has the classes 0 to 9, not {wrong}"):
            student.sample([0, 1], 0, classes=classes)
    with pytest.raises(InputError, match="1001 sampling steps"):
        student.sample([0], 0, steps=1001)
    save_dit(tmp_path / "without", calm(null_label=False))
    unguided = load_dit_student(tmp_path / "without")
    assert torch.equal(unguided.sample([0], 0, steps=2), student.sample([0], 0, steps=2))
    with pytest.raises(InputError, match=r"without never learned a null label .*; give --guidance 1"):
        unguided.sample([0], 0, steps=2, guidance=4.0)
    broken = DiTStudent(tmp_path, calm(), LinearSchedule(), None, None)
    with torch.no_grad():
        broken.model.final_layer.linear.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"an image among 4\.\.6 of .* is not finite"):
        broken.sample([4, 6], 0, steps=2)
    with pytest.raises(InputError):
        load_dit_student(tmp_path / "absent")
    save_dit(tmp_path / "student", calm())
    for text in ("{", json.dumps([1])):
        (tmp_path / "student/adm.json").write_text(text)
        with pytest.raises(InputError, match=r"adm\.json is damaged") as error:
            load_dit_student(tmp_path / "student")
        assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_images_on_the_gpu_are_those_of_the_cpu(student: DiTStudent) -> None:
    on_gpu = load_dit_student(student.folder, "cuda")
    options: dict[str, Any] = {"steps": 10, "guidance": 2.0}
    images = on_gpu.sample(range(16), 0, **options)
    assert (images.int() - student.sample(range(16), 0, **options).int()).abs().max() <= 2
    assert (images.int() - on_gpu.sample(range(16), 0, batch_size=3, **options).int()).abs().max() <= 1
