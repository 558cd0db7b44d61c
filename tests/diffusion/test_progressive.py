"""Progressive distillation: its two modules in float64, the network's folder, and the data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same
from torch import Tensor, nn

pytest.importorskip("diffusers")

from small_unet import SMALL, diffusers_folder, unet

from core.adm import consensus_attention
from core.errors import InputError
from core.training.distiller import Progress
from diffusion.consensus import similarity
from diffusion.data import DataConfig, ImageLoader, load_images
from diffusion.progressive.chain import base_distiller
from diffusion.progressive.config import ProgressiveConfig
from diffusion.progressive.distiller import ADMConfig, BaseDistiller, ProgressiveDistiller
from diffusion.progressive.network import (
    UNetConfig,
    build_unet,
    copy_without_dropout,
    load_teacher,
    save_student,
)
from diffusion.schedule import CosineSchedule, cosine_betas

START = Progress(0, 0.0, 100, 10.0)
OPTIONS: dict[str, Any] = {"prediction": "x", "weighting": "snr_trunc", "lr": 1e-3, "weight_decay": 0.0}


def a_round(steps: int, adm: ADMConfig | None = None, *, copy: bool = False, **options: Any) -> ProgressiveDistiller:
    """A round in float64; the student is another network unless it is to be the teacher's copy."""
    teacher = unet()
    student = copy_without_dropout(teacher) if copy else unet(seed=1)
    return ProgressiveDistiller(teacher, student, CosineSchedule(), steps, adm, **{**OPTIONS, **options}).double()


def a_batch(steps: int, k: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    image, noise = (torch.rand(len(k), 1, 8, 8, dtype=dtype, generator=generator) * 2 - 1 for _ in range(2))
    return {"image": image, "noise": 2 * noise, "t": torch.tensor(k) * (1024 // steps)}


def explicit(round_: ProgressiveDistiller, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Image by image, from the formulas: the student's x, where two teacher steps land, the times, a, s."""
    schedule, result = round_.schedule, []
    a, s = schedule.alpha.tolist(), schedule.sigma.tolist()

    def see(role: str, z: Tensor, t: int) -> Tensor:
        output = round_.networks[role](z[None], torch.tensor([t])).sample[0]
        return output if round_.prediction == "x" else a[t] * z - s[t] * output

    def step(x: Tensor, z: Tensor, t: int, to: int) -> Tensor:
        return a[to] * x + s[to] * (z - a[t] * x) / s[t]

    for image, noise, t in zip(batch["image"], batch["noise"], batch["t"].tolist(), strict=True):
        d = 1024 // round_.steps
        z = a[t] * image + s[t] * noise
        z_m = step(see("teacher", z, t), z, t, t - d // 2)
        z_s = step(see("teacher", z_m, t - d // 2), z_m, t - d // 2, t - d)
        o = see("student", z, t)
        y = (z_s - s[t - d] / s[t] * z) / (a[t - d] - s[t - d] / s[t] * a[t])
        result.append({"o": o, "y": y, "z": z, "z_s": z_s, "landed": step(y, z, t, t - d), "a": a, "s": s, "t": t})
    return result


# --- one round --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "k"), [(1, [1, 1]), (2, [1, 2, 2]), (8, [1, 3, 8]), (512, [1, 200, 512])])
@pytest.mark.parametrize("prediction", ["x", "v"])
@torch.no_grad()
def test_target_equals_two_explicit_ddim_steps(steps: int, k: list[int], prediction: str) -> None:
    round_ = a_round(steps, prediction=prediction)
    batch = a_batch(steps, k)
    z = round_.schedule.noisy(batch["image"], batch["noise"], batch["t"])
    y, _ = round_.target(z, batch["t"])
    for n, expected in enumerate(explicit(round_, batch)):
        torch.testing.assert_close(z[n], expected["z"], rtol=0, atol=1e-12)
        torch.testing.assert_close(y[n], expected["y"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(expected["landed"], expected["z_s"], rtol=0, atol=1e-12)
    landed = round_.schedule.ddim(y, z, batch["t"], batch["t"] - round_.stride)
    torch.testing.assert_close(landed, torch.stack([e["z_s"] for e in explicit(round_, batch)]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", ["snr_trunc", "snr_plus_1", "none"])
@pytest.mark.parametrize("prediction", ["x", "v"])
@torch.no_grad()
def test_loss_equals_its_definition(weighting: str, prediction: str) -> None:
    round_ = a_round(4, ADMConfig(alpha=0.5), weighting=weighting, prediction=prediction)
    batch = a_batch(4, [1, 2, 3, 4, 1])  # landing at 0, 256, 512, 768, 0
    losses, observed = round_(batch, START)
    rows = explicit(round_, batch)
    map_student, map_teacher = maps_of(round_, batch)
    a = consensus_attention(similarity(map_student, map_teacher))
    plain = consensus = 0.0
    for n, row in enumerate(rows):
        snr = (row["a"][row["t"]] / row["s"][row["t"]]) ** 2
        w = {"snr_trunc": max(1.0, snr), "snr_plus_1": snr + 1, "none": 1.0}[weighting]
        error = (row["o"] - row["y"]).square()
        plain += w * error.mean().item() / 5
        consensus += (row["t"] - 256 < 409.6) * w * (a[n] * error).mean().item() / 5
    assert losses.keys() == {"student"} and losses["student"].keys() == {"mse", "consensus"}
    assert losses["student"]["mse"].item() == pytest.approx(plain, rel=1e-9)
    assert losses["student"]["consensus"].item() == pytest.approx(0.5 * consensus, rel=1e-9)
    assert observed["adm/active"].item() == pytest.approx(3 / 5)


def maps_of(round_: ProgressiveDistiller, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """F_s and the mix of the teacher's two maps, from networks whose last convolution is taken out."""
    schedule, t = round_.schedule, batch["t"]
    z = schedule.noisy(batch["image"], batch["noise"], t)
    m = t - round_.stride // 2
    x1 = round_.see("teacher", z, t)
    round_._hooks["teacher"].take()
    z_m = schedule.ddim(x1, z, t, m)
    found = []
    for role, inputs in (("student", [(z, t)]), ("teacher", [(z, t), (z_m, m)])):
        network: Any = round_.networks[role]
        head, network.conv_out = network.conv_out, nn.Identity()
        found.append([network(*pair).sample for pair in inputs])
        network.conv_out = head
    c = schedule.mix(t, m, t - round_.stride).view(-1, 1, 1, 1)
    return found[0][0], c * found[1][1] + (1 - c) * found[1][0]


@torch.no_grad()
def test_the_teachers_head_makes_the_target_from_the_mixed_map() -> None:
    for steps, k in ((1, [1, 1]), (4, [1, 3, 4])):
        round_ = a_round(steps, ADMConfig())
        batch = a_batch(steps, k)
        z = round_.schedule.noisy(batch["image"], batch["noise"], batch["t"])
        y, mixed = round_.target(z, batch["t"])
        teacher: Any = round_.networks["teacher"]
        torch.testing.assert_close(teacher.conv_out(mixed), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(mixed, maps_of(round_, batch)[1], rtol=0, atol=1e-12)


def test_only_the_student_learns() -> None:
    for adm in (None, ADMConfig(), ADMConfig(form="head"), ADMConfig(form="feature")):
        round_ = a_round(2, adm)
        assert set(round_.trained()) == {"student"}
        assert not any(m.training for m in round_.networks["teacher"].modules())
        calls: list[tuple[str, bool]] = []
        for role, network in round_.networks.items():
            network.register_forward_hook(lambda *_, r=role, c=calls: c.append((r, torch.is_grad_enabled())))
        losses, _ = round_(round_.before_step(a_batch(2, [1, 2]), START), START)
        assert calls == [("teacher", False), ("teacher", False), ("student", True)]
        sum(losses["student"].values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is None and not p.requires_grad for p in round_.networks["teacher"].parameters())
        assert all(p.grad is not None for p in round_.networks["student"].parameters())
        (group,) = round_.parameter_groups()
        assert {id(p) for p in group["params"]} == {id(p) for p in round_.networks["student"].parameters()}


def test_similarity_is_detached() -> None:
    """The gradient of the consensus loss is that of the same error under a constant attention."""
    round_, batch = a_round(1, ADMConfig()), a_batch(1, [1, 1])
    network: Any = round_.networks["student"]
    losses, _ = round_(batch, START)
    losses["student"]["consensus"].backward()
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with torch.no_grad():
        a = consensus_attention(similarity(*maps_of(round_, batch)))
    z = round_.schedule.noisy(batch["image"], batch["noise"], batch["t"])
    y, _ = round_.target(z, batch["t"])
    (a * (network(z, batch["t"]).sample - y).square()).mean().backward()
    for one, other in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("gate_time", "fractions"),
    [  # N = 512, 64, 16, 8, 4, 2, 1
        ("start", [0.398, 0.391, 0.375, 0.375, 0.25, 0, 0]),
        ("mid", [0.400, 0.406, 0.375, 0.375, 0.5, 0.5, 0]),
        ("end", [0.400, 0.406, 0.438, 0.5, 0.5, 0.5, 1]),
        ("none", [1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_share_of_gated_times(gate_time: Any, fractions: list[float]) -> None:
    for steps, fraction in zip((512, 64, 16, 8, 4, 2, 1), fractions, strict=True):
        round_ = a_round(steps, ADMConfig(gate_time=gate_time))
        opened = round_._gate(torch.arange(1, steps + 1) * (1024 // steps))
        assert opened.mean().item() == pytest.approx(fraction, abs=6e-4)


@torch.no_grad()
def test_no_gated_image_leaves_a_consensus_of_zero() -> None:
    round_ = a_round(4, ADMConfig())
    losses, observed = round_(a_batch(4, [3, 4]), START)
    assert losses["student"]["consensus"] == 0 and losses["student"]["mse"] > 0 and observed["adm/active"] == 0


@torch.no_grad()
def test_teacher_maps() -> None:
    """first: at the start the student is the teacher's copy, so its map at the same input is the same."""
    batch = a_batch(2, [1, 2])
    _, observed = a_round(2, ADMConfig(teacher_map="first"), copy=True)(batch, START)
    assert observed["adm/similarity_min"].item() == pytest.approx(1, abs=1e-9) and observed["adm/attention_std"] < 1e-6
    means = {}
    for kind in ("target", "second", "first"):
        _, observed = a_round(2, ADMConfig(teacher_map=kind), copy=True)(batch, START)  # type: ignore[arg-type]
        means[kind] = observed["adm/similarity"].item()
    assert means["second"] < means["target"] < means["first"]


GUARD: dict[str, Any] = {"rtol": 3e-5, "atol": 1e-9}  # Algorithm 1's 1e-5 in a uniform attention


@torch.no_grad()
def test_forms_agree_where_the_attention_is_uniform() -> None:
    """Both heads make o and y* of the plain maps, so that "head" is "output" there; in v, in units of x."""
    batch = a_batch(2, [1, 2, 1])
    uniform: dict[str, Any] = {"control": "uniform", "gate_time": "none"}
    for weighting in ("snr_trunc", "none"):
        losses = {
            form: a_round(2, ADMConfig(form=form, **uniform), weighting=weighting)(batch, START)[0]["student"]  # type: ignore[arg-type]
            for form in ("output", "head")
        }
        torch.testing.assert_close(losses["output"]["consensus"], losses["output"]["mse"], **GUARD)  # plain reweighting
        torch.testing.assert_close(losses["head"]["consensus"], losses["output"]["mse"], **GUARD)
    round_ = a_round(2, ADMConfig(form="head", teacher_map="first", **uniform), prediction="v", weighting="none")
    z = round_.schedule.noisy(batch["image"], batch["noise"], batch["t"])
    found = round_(batch, START)[0]["student"]["consensus"]
    expected = (round_.see("student", z, batch["t"]) - round_.see("teacher", z, batch["t"])).square().mean()
    torch.testing.assert_close(found, expected, **GUARD)


def test_shuffled_control_keeps_the_weights_and_moves_them() -> None:
    batch = a_batch(1, [1, 1])
    with torch.no_grad():
        values = {
            kind: a_round(1, ADMConfig(control=kind))(batch, START)[0]["student"]["consensus"].item()  # type: ignore[arg-type]
            for kind in ("none", "uniform", "shuffled")
        }
    assert len(set(values.values())) == 3
    assert max(values.values()) < 2 * min(values.values())


def test_classifier_form() -> None:
    from core.split import Split

    conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
    classifier = Split(conv, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear, nn.Dropout(0.5)))
    adm = ADMConfig(form="classifier", classifier="resnet56:given")
    round_ = ProgressiveDistiller(unet(), unet(seed=1), CosineSchedule(), 1, adm, classifier, **OPTIONS).double()
    losses, observed = round_(a_batch(1, [1, 1]), START)
    losses["student"]["consensus"].backward()
    assert losses["student"]["consensus"] > 0 and observed["adm/similarity"] < 1
    assert all(p.grad is None for p in classifier.parameters()) and not any(m.training for m in classifier.modules())
    assert set(round_.trained()) == {"student"}


def test_times_cover_the_students_steps_and_the_bases_whole_range() -> None:
    image = torch.zeros(4000, 1, 1, 1)
    round_ = a_round(4)
    drawn = round_.before_step({"image": image}, START)
    assert sorted(set(drawn["t"].tolist())) == [256, 512, 768, 1024]
    assert drawn["noise"].mean().abs() < 0.1 and drawn["noise"].std() == pytest.approx(1, abs=0.1)
    t = BaseDistiller(unet(), CosineSchedule(4), 0.5, **OPTIONS).before_step({"image": image}, START)["t"]
    counts = torch.bincount(t)
    assert len(counts) == 5 and counts.min() > 4000 / 5 * 0.8


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    round_ = a_round(4, ADMConfig())
    batch = a_batch(4, [1, 2, 3, 4])
    with torch.no_grad():
        whole = round_(batch, START)[0]["student"]
        halves = [round_({k: v[i : i + 2] for k, v in batch.items()}, START)[0]["student"] for i in (0, 2)]
    for term in whole:
        torch.testing.assert_close(whole[term], (halves[0][term] + halves[1][term]) / 2)


def test_losses_are_float32_under_autocast() -> None:
    round_ = a_round(2, ADMConfig()).float()
    with torch.autocast("cpu", torch.bfloat16):
        losses, observed = round_(a_batch(2, [1, 2], torch.float32), START)
    assert {v.dtype for v in [*losses["student"].values(), *observed.values()]} == {torch.float32}
    sum(losses["student"].values()).backward()  # type: ignore[union-attr]


def test_no_step_waits_for_the_device() -> None:
    """On torch's meta device, whose tensors have no values, whatever a GPU would have to be waited for is an error."""
    image = torch.empty(4, 1, 8, 8, device="meta")
    kinds: list[Any] = ["none", "uniform", "shuffled"]
    options = [
        None,
        *(ADMConfig(form=f) for f in ("output", "head", "feature")),
        *(ADMConfig(control=k) for k in kinds),
    ]
    for adm in options:
        round_ = a_round(2, adm).float().to("meta")
        losses, _ = round_(round_.before_step({"image": image}, START), START)
        sum(losses["student"].values()).backward()  # type: ignore[union-attr]
    base = BaseDistiller(unet(), CosineSchedule(), 0.9, **OPTIONS).to("meta")
    losses, _ = base(base.before_step({"image": image}, START), START)
    losses["teacher"]["mse"].backward()
    base.after_step({}, START)
    with pytest.raises((RuntimeError, NotImplementedError)):
        image.sum().item()


def test_steps_that_do_not_fit_the_schedule() -> None:
    for steps in (0, 3, 1024):
        with pytest.raises(InputError, match="1024 times cannot be cut"):
            a_round(steps)


# --- the base network -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_base_loss_equals_its_definition() -> None:
    for prediction in ("x", "v"):
        base = BaseDistiller(unet(), CosineSchedule(), 0.9, **{**OPTIONS, "prediction": prediction}).double()
        batch = {**a_batch(1, [1, 1, 1]), "t": torch.tensor([3, 400, 1024])}
        expected = 0.0
        for image, noise, t in zip(*batch.values(), strict=True):
            a, s = base.schedule.alpha[t], base.schedule.sigma[t]
            z = a * image + s * noise
            output = base.networks["teacher"](z[None], t).sample[0]
            x = output if prediction == "x" else a * z - s * output
            implied = (z - a * x) / s
            expected += max((x - image).square().mean().item(), (implied - noise).square().mean().item()) / 3
        assert base(batch, START)[0]["teacher"]["mse"].item() == pytest.approx(expected, rel=1e-8)


def test_moving_average_has_a_constant_decay_from_the_first_step() -> None:
    base = BaseDistiller(unet(), CosineSchedule(), 0.75, **OPTIONS)
    expected = {k: v.clone() for k, v in base.networks["teacher"].state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for p in base.networks["teacher"].parameters():
                p.add_(torch.randn_like(p))
        base.after_step({}, START)
        for k, v in base.networks["teacher"].state_dict().items():
            expected[k] = 0.75 * expected[k] + 0.25 * v
    for k, v in base.export("teacher").state_dict().items():
        torch.testing.assert_close(v, expected[k])
    assert not any(m.training for m in base.train().average.modules())
    assert set(base.trained()) == {"teacher"} and not any(p.requires_grad for p in base.average.parameters())


# --- the network and its folder ---------------------------------------------------------------------------------------


def test_cifar_network_has_cfds_size_and_start() -> None:
    network = build_unet(UNetConfig(multipliers=(1, 2), attention=(16,)), 3, 32)
    last = [m.weight for n, m in network.named_modules() if n.endswith(("conv2", "to_out.0", "conv_out"))]
    assert len(last) == 12 + 6 + 1  # residual blocks, attentions, the network's own
    assert all(0 < w.abs().max() < 1e-5 for w in last)
    first: Any = network.down_blocks[0].resnets[0].conv1.weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.05)
    with torch.device("meta"):
        full = build_unet(UNetConfig(), 3, 32)
    assert sum(p.numel() for p in full.parameters()) == 35_746_307
    assert [type(b).__name__ for b in full.down_blocks] == ["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2]
    assert [type(b).__name__ for b in full.up_blocks] == [*["UpBlock2D"] * 2, "AttnUpBlock2D", "UpBlock2D"]
    assert full.mid_block.attentions[0].heads == 1 and full.time_proj.downscale_freq_shift == 0


def test_a_copy_has_no_dropout_and_says_so() -> None:
    teacher = unet(UNetConfig(8, (1, 2), 1, (), 0.5, 4))
    copy = copy_without_dropout(teacher)
    assert copy.config.dropout == 0 and not any(m.p for m in copy.modules() if isinstance(m, nn.Dropout))
    assert_same(dict(copy.state_dict()), dict(teacher.state_dict()))
    z, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 1024])
    assert torch.equal(copy.train()(z, t).sample, teacher.eval()(z, t).sample)
    assert not torch.equal(teacher.train()(z, t).sample, copy(z, t).sample)


def test_folder_loads_in_diffusers_and_comes_back_as_a_teacher(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, UNet2DModel

    network = unet()
    save_student(tmp_path / "s", network, "v", 4, 1024)
    assert_same(dict(UNet2DModel.from_pretrained(tmp_path / "s").state_dict()), dict(network.state_dict()))
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "s")
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [1024, 768, 512, 256]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    ours = load_teacher(tmp_path / "s")
    assert (ours.prediction, ours.steps, ours.schedule.timesteps) == ("v", 4, 1024)
    (tmp_path / "s/adm.json").unlink()  # what diffusers alone says is enough
    theirs = load_teacher(tmp_path / "s")
    assert (theirs.prediction, theirs.schedule.timesteps) == ("v", 1024)
    assert not any(p.requires_grad for p in theirs.model.parameters())


def test_a_noise_predicting_folder_is_a_start_but_no_teacher(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "ddpm")
    with pytest.raises(InputError, match=r"'epsilon' on the schedule 'linear' of 1000 times.*--init"):
        load_teacher(folder)
    images = load_images(DataConfig("digits"))
    base_distiller(ProgressiveConfig(network=SMALL, init=str(folder)), images)
    betas = cosine_betas().tolist()
    with pytest.raises(InputError, match="'epsilon' on the schedule 1025 betas of its own"):
        load_teacher(diffusers_folder(tmp_path / "eps", trained_betas=betas, num_train_timesteps=1025))
    with pytest.raises(InputError, match="'sample' on the schedule 'squaredcos_cap_v2'"):
        load_teacher(diffusers_folder(tmp_path / "other", prediction_type="sample", beta_schedule="squaredcos_cap_v2"))
    for wrong in (3, "x", ["x"], [[]], {"a": 1}):
        (folder / "scheduler_config.json").write_text(json.dumps({"trained_betas": wrong}))
        with pytest.raises(InputError, match=r"scheduler_config\.json is wrong|betas of its own"):
            load_teacher(folder)
    for name, said in (("nowhere", "no config.json"), ("bare", "neither what it predicts")):
        if name == "bare":
            unet().save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=said):
            load_teacher(tmp_path / name)
    config = folder / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "num_class_embeds": 3})
    )  # weights that are not there
    for name in ("nowhere", folder.name):
        with pytest.raises(InputError, match="cannot read the network of --init"):
            base_distiller(ProgressiveConfig(network=SMALL, init=str(tmp_path / name)), images)


def test_init_starts_the_base_network_and_its_dropout_is_ours(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "ddpm")
    network = UNetConfig(8, (1, 2), 1, (), 0.3, 4)
    base = base_distiller(ProgressiveConfig(network=network, init=str(folder)), load_images(DataConfig("digits")))
    for start in (base.networks["teacher"], base.average):
        assert_same(dict(start.state_dict()), dict(unet().state_dict()))
        assert {m.p for m in start.modules() if isinstance(m, nn.Dropout)} >= {0.3}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 30}, "no multiple of network.groups 4"),
        ({"dropout": 1.0}, "must be in"),
        ({"multipliers": (1, 2, 2, 2, 2)}, "cannot be halved 4 times"),
        ({"attention": (16,)}, r"have sizes \[8, 4\]"),
        ({"blocks": 0}, "blocks must be in"),
    ],
)
def test_networks_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_unet(UNetConfig(**{"width": 8, "multipliers": (1, 2), "attention": (), "groups": 4, **options}), 1, 8)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_loader_covers_an_epoch_once_over_all_processes() -> None:
    images = torch.arange(22, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    def epoch(**kwargs: Any) -> list[list[int]]:
        loader = ImageLoader(images, 8, flip=False, seed=3, **kwargs)
        return [((b["image"] + 1) * 127.5).round()[:, 0, 0, 0].int().tolist() for b in loader]

    whole = epoch()
    assert [len(b) for b in whole] == [8, 8] and len({i for b in whole for i in b}) == 16
    shares = [epoch(rank=rank, world=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert batch[0::2] == shares[0][step] and batch[1::2] == shares[1][step]
    loader = ImageLoader(images, 8, flip=False, seed=3)
    assert [b["image"].flatten().tolist() for b in loader] != [b["image"].flatten().tolist() for b in loader]


def test_loader_resumes_anywhere_and_flips_half() -> None:
    images = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8)

    def endless(loader: ImageLoader, count: int) -> list[Tensor]:
        found: list[Tensor] = []
        while len(found) < count:
            for batch in loader:
                found.append(batch["image"])
                if len(found) == count:
                    break
        return found

    whole = endless(ImageLoader(images, 8, flip=True, seed=0), 12)
    for cut in (3, 5, 7):
        first = ImageLoader(images, 8, flip=True, seed=0)
        endless(first, cut)
        second = ImageLoader(images, 8, flip=True, seed=0)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(torch.equal(a, b) for a, b in zip(endless(second, 12 - cut), whole[cut:], strict=True))
    assert whole[0].dtype == torch.float32 and whole[0].min() >= -1 and whole[0].max() <= 1
    scaled = images.float() / 127.5 - 1
    flipped = sum(bool((x == scaled.flip(3)).flatten(1).all(1).any()) for batch in whole for x in batch)
    plain = sum(bool((x == scaled).flatten(1).all(1).any()) for batch in whole for x in batch)
    assert flipped + plain == 96 and 25 < flipped < 71
    with pytest.raises(InputError, match="resume with the same data"):
        second.load_state_dict({"epoch": 0, "position": 9})
    for size, world in ((41, 1), (8, 3), (0, 1)):
        with pytest.raises(InputError, match="batch"):
            ImageLoader(images, size, flip=True, seed=0, world=world)


def test_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour, size in (("a/1.png", (255, 0, 0), (6, 6)), ("b/c/2.png", (0, 0, 9), (6, 6))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(tmp_path / name)
    config = DataConfig("folder", str(tmp_path))
    images = load_images(config)
    assert images.shape == (2, 3, 6, 6) and images.dtype == torch.uint8 and images.is_contiguous()
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 9]] and config.flips
    assert len(load_images(DataConfig("folder", str(tmp_path), limit=1))) == 1
    Image.new("L", (12, 8), 7).save(tmp_path / "b/grey.png")
    with pytest.raises(InputError, match=r"grey.png is 12 x 8 pixels, .*image_size"):
        load_images(config)
    resized = load_images(DataConfig("folder", str(tmp_path), image_size=4))
    assert resized.shape == (3, 3, 4, 4) and resized[2].unique().tolist() == [7]
    (tmp_path / "z.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot decode .*z.jpg"):
        load_images(DataConfig("folder", str(tmp_path), image_size=4))
    (tmp_path / "empty").mkdir()
    for root, said in ((tmp_path / "empty", "no image"), (tmp_path / "none", "does not exist")):
        with pytest.raises(InputError, match=said):
            load_images(DataConfig("folder", str(root)))


def test_digits_and_cifar10(tmp_path: Path) -> None:
    digits = DataConfig("digits")
    images = load_images(digits)
    assert images.shape == (1797, 1, 8, 8) and images.min() == 0 and images.max() == 255 and not digits.flips
    with pytest.raises(InputError, match=r"cifar10 is missing .*--data.download true"):
        load_images(DataConfig("cifar10", str(tmp_path)))
    for options, said in (({"limit": 0}, "limit"), ({"name": "digits", "image_size": 16}, "a size of its own")):
        with pytest.raises(InputError, match=said):
            DataConfig(**options)  # type: ignore[arg-type]
