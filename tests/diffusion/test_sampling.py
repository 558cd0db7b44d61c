"""Sampling: images depend on (seed, index) alone, the sampler is the formula, and diffusers' own runs the same one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from core.errors import InputError, TrainingError
from core.training.run import read_json, save_signed_json
from diffusion.progressive.network import save_student, scheduler_config
from diffusion.sampling import (
    ImageNoise,
    Student,
    denoise,
    gather_shares,
    load_student,
    own_share,
    to_uint8,
)
from diffusion.schedule import CosineSchedule

SHAPE = (1, 8, 8)


def make_unet(channels: int = 1, size: int = 8) -> Any:
    """90,000 parameters; its last layer enlarged, so that what it predicts leaves [-1, 1] and clipping matters."""
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    model = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=None,
        freq_shift=0,
    )
    with torch.no_grad():
        model.conv_out.weight.mul_(3.0)
    return model.eval()


@pytest.fixture(scope="module")
def unet() -> Any:
    return make_unet()


def last(steps: Any) -> Tensor:
    return list(steps)[-1]


def test_noise_depends_on_seed_and_index_alone() -> None:
    some = ImageNoise(3, [5, 0, 7], SHAPE)()
    assert torch.equal(some[1], ImageNoise(3, range(6), SHAPE)()[0])
    assert torch.equal(some[0], ImageNoise(3, range(6), SHAPE)()[5])
    assert not torch.equal(some[0], ImageNoise(4, [5], SHAPE)()[0])
    assert some.shape == (3, *SHAPE) and some.dtype == torch.float32
    assert ImageNoise(0, [], SHAPE)().shape == (0, *SHAPE)


def test_noise_is_normal_and_independent_between_indices_and_seeds() -> None:
    noise = torch.stack([ImageNoise(seed, range(500), SHAPE)().flatten() for seed in (0, 1)])  # 2 x 32,000
    sd = 1.0 / math.sqrt(noise.shape[1])
    assert noise.mean(1).abs().max() < 4 * sd
    assert (noise.square().mean(1) - 1.0).abs().max() < 4 * math.sqrt(2) * sd
    shifted = noise.view(2, 500, 64)
    assert (shifted[:, 1:] * shifted[:, :-1]).mean((1, 2)).abs().max() < 4 * sd
    assert (noise[0] * noise[1]).mean().abs() < 4 * sd
    assert len(noise.view(1000, 64).unique(dim=0)) == 1000


def reference(model: Any, prediction: str, steps: int, z: Tensor, last_step: str) -> Tensor:
    """The sampler with its own schedule, by plain float64 numbers."""
    betas = [
        min(1 - math.cos(((i + 1) / 1025 + 0.008) / 1.008 * math.pi / 2) ** 2
            / math.cos((i / 1025 + 0.008) / 1.008 * math.pi / 2) ** 2, 0.999)
        for i in range(1025)
    ]  # fmt: skip
    cumulative = [math.prod(1 - b for b in betas[: i + 1]) for i in (k * 1024 // steps for k in range(steps + 1))]
    for k in range(steps, 0, -1):
        a_t, s_t = math.sqrt(cumulative[k]), math.sqrt(1 - cumulative[k])
        a_s, s_s = math.sqrt(cumulative[k - 1]), math.sqrt(1 - cumulative[k - 1])
        output = model(z, torch.full((len(z),), k * 1024 // steps))
        x = output if prediction == "x" else a_t * z - s_t * output
        x = x.clamp(-1, 1)
        noise = (z - a_t * x) / s_t
        z = a_s * x + s_s * noise
    return (x if last_step == "clean" else z).clamp(-1, 1)


class Wave(nn.Module):
    """A smooth "network" in any precision, beyond [-1, 1] in places."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return 1.5 * torch.sin(2.0 * z + t.to(z.dtype).view(-1, 1, 1, 1) / 300.0)


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("last_step", ["noisy", "clean"])
def test_sampler_is_the_formula(prediction: Any, last_step: Any) -> None:
    schedule, model = CosineSchedule(), Wave()
    for steps in (1, 2, 4, 8, 64):
        z = ImageNoise(0, range(3), (2, 4, 4))().double()
        expected = reference(model, prediction, steps, z, last_step)
        found = list(denoise(model, schedule, prediction, steps, z, last_step))
        assert (found[-1] - expected).abs().max() < 1e-9
        assert len(found) == steps
        float32 = last(denoise(model, schedule, prediction, steps, z.float(), last_step))
        assert (float32 - expected).abs().max() < 2e-4


def test_noisy_end_keeps_less_than_a_grey_level() -> None:
    z = ImageNoise(0, range(64), SHAPE)()
    schedule, model = CosineSchedule(), lambda z, t: torch.zeros_like(z)
    noisy = last(denoise(model, schedule, "x", 4, z))
    clean = last(denoise(model, schedule, "x", 4, z, "clean"))
    assert not clean.any()
    assert 127.5 * noisy.std() == pytest.approx(127.5 * 0.00634, rel=0.02)  # 0.8


def test_grey_levels_are_cut_off() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8((levels - 127.5) / 127.5), levels.to(torch.uint8))
    values = torch.tensor([-2.0, -1.0, -0.5 / 127.5, 0.49 / 127.5, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 255, 255]


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_images_do_not_depend_on_batch_or_company(unet: Any, prediction: Any) -> None:
    student = Student(Path(), unet, CosineSchedule(), prediction, 4)
    whole = student.sample(range(12), 7, batch_size=12)
    assert whole.shape == (12, *SHAPE) and whole.dtype == torch.uint8 and whole.float().std() > 20
    for batch_size in (1, 5):
        other = student.sample(range(12), 7, batch_size=batch_size)
        assert (whole.int() - other.int()).abs().max() <= 1
    some = student.sample([9, 2], 7)
    assert (whole[[9, 2]].int() - some.int()).abs().max() <= 1


@pytest.mark.parametrize(("count", "world"), [(7, 3), (6, 2), (1, 2)])
def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch, count: int, world: int) -> None:
    """Each process in turn, with `gather` handing out what all would send."""
    import accelerate

    noise = ImageNoise(0, range(count), SHAPE)()
    drawn: list[list[int]] = []
    sent: list[Tensor] = []

    def draw(indices: Any) -> Tensor:
        drawn.append(list(indices))
        return to_uint8(noise[list(indices)])

    def run(rank: int, gather: Any) -> Tensor:
        state = type("State", (), {"num_processes": world, "process_index": rank, "device": torch.device("cpu")})
        monkeypatch.setattr(accelerate, "PartialState", state)
        monkeypatch.setattr(accelerate.utils, "gather", gather)
        return gather_shares(draw(own_share(count)), count)

    def first(images: Tensor) -> Tensor:
        sent.append(images)
        return torch.cat([images] * world)

    for rank in range(world):
        run(rank, first)
    assert sorted(index for some in drawn for index in some) == list(range(count))
    assert torch.equal(run(0, lambda images: torch.cat(sent)), to_uint8(noise))


def diffusers_scheduler(prediction: Any, steps: int, **other: Any) -> Any:
    """The one that lies in every student's folder."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config({**scheduler_config(prediction, steps, 1024), **other})
    scheduler.set_timesteps(steps)
    return scheduler


def run_diffusers(scheduler: Any, unet: Any, z: Tensor, clipped: bool = True) -> Tensor:
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t).sample, t, z, eta=0.0, use_clipped_model_output=clipped).prev_sample
    return z.clamp(-1, 1)


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_diffusers_scheduler_agrees(unet: Any, prediction: Any, steps: int) -> None:
    z = ImageNoise(0, range(4), SHAPE)()
    ours = last(denoise(unet, CosineSchedule(), prediction, steps, z))
    theirs = run_diffusers(diffusers_scheduler(prediction, steps), unet, z)
    assert (ours - theirs).abs().max() < 5e-5  # 0.006 grey levels


def test_diffusers_pipeline_of_a_student_folder_agrees(unet: Any, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline

    save_student(tmp_path / "student", unet, "x", 4, 1024)
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 4, "eta": 0.0, "output_type": "pt"}
    images = pipeline(batch_size=3, generator=generator, use_clipped_model_output=True, **options).images
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    student = load_student(tmp_path / "student")
    ours = last(denoise(student.model, student.schedule, student.prediction, student.steps, z))
    assert (2.0 * images - 1.0 - ours).abs().max() < 5e-5


def test_what_diffusers_cannot_express(unet: Any) -> None:
    """Noise from the unclipped x is another sampler; a clean end needs a single step, or index 0's noise stays."""
    z = ImageNoise(0, range(4), SHAPE)()
    ours = {n: last(denoise(unet, CosineSchedule(), "x", n, z, "clean")) for n in (1, 4)}
    noisy = last(denoise(unet, CosineSchedule(), "x", 4, z))
    assert (noisy - run_diffusers(diffusers_scheduler("x", 4), unet, z, clipped=False)).abs().max() > 0.05
    gaps = {
        n: (ours[n] - run_diffusers(diffusers_scheduler("x", n, set_alpha_to_one=True), unet, z)).abs().max().item()
        for n in (1, 4)
    }
    assert gaps[1] < 5e-5
    assert 127.5 * gaps[4] > 0.5  # grey levels


def test_student_folder_samples_as_its_network(unet: Any, tmp_path: Path) -> None:
    save_student(tmp_path / "student", unet, "x", 2, 1024)
    student = load_student(tmp_path / "student")
    assert student.shape == SHAPE and student.steps == 2 and not student.model.training
    for steps in (2, 4):
        z = last(denoise(unet, CosineSchedule(), "x", steps, ImageNoise(5, range(3), SHAPE)()))
        assert torch.equal(student.sample(range(3), 5, steps=None if steps == 2 else steps), to_uint8(z))


def test_bad_input_is_one_clear_line(unet: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 sampling steps do not divide"):
        Student(Path(), unet, CosineSchedule(), "x", 3).sample([0], 0)
    with pytest.raises(TrainingError, match="not finite"):
        broken = make_unet()
        with torch.no_grad():
            broken.conv_out.bias.fill_(math.nan)
        Student(Path(), broken, CosineSchedule(), "x", 1).sample([0], 0)
    with pytest.raises(InputError, match="holds no network"):
        load_student(tmp_path)
    folder = tmp_path / "student"
    save_student(folder, unet, "x", 4, 1024)
    said = read_json(folder / "adm.json")
    save_signed_json({**said, "prediction": "eps", "schedule": "linear"}, folder / "adm.json")
    with pytest.raises(InputError, match=r"prediction 'eps' on a 'linear' schedule"):
        load_student(folder)
    (folder / "adm.json").unlink()
    with pytest.raises(InputError, match=r"no adm\.json"):
        load_student(folder)
    said.pop("files")  # as folders of earlier versions are
    save_signed_json(said, folder / "adm.json")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot read the network") as error:
        load_student(folder)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_images_on_the_gpu_do_not_depend_on_the_batch() -> None:
    student = Student(Path(), make_unet(3, 32).cuda(), CosineSchedule().cuda(), "x", 4)
    whole = student.sample(range(64), 0)
    for batch_size in (1, 7):
        other = student.sample(range(64), 0, batch_size=batch_size)
        assert (whole.int() - other.int()).abs().max() <= 1
