"""The benchmark's rows of diffusion: steps of progressive and of DiT distillation, and sampling, over bare networks."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tools.benchmark.ratios import Settings, Values, bare_step, own_step

STEPS = 4  # of the student: its round is one in which ADM acts


def make_unet(settings: Settings) -> Any:
    """CIFAR-10's U-Net: whole on a GPU, a quarter as wide on the CPU."""
    from diffusion.progressive.network import UNetConfig, build_unet

    tiny = UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4)
    config = tiny if settings.quick else UNetConfig(width=128 if settings.on_gpu else 32, dropout=0.0)
    return build_unet(config, 3, 32).to(settings.device)


def step_ratio(with_adm: bool, settings: Settings) -> Values:
    """A step of a round over two forwards of the teacher and forward, MSE, backward and Adam of the student."""
    from diffusion.progressive.distiller import ADMConfig, ProgressiveDistiller
    from diffusion.schedule import CosineSchedule

    teacher, count = make_unet(settings), settings.pick(2, 8, 128)
    distiller = ProgressiveDistiller(
        teacher, copy.deepcopy(teacher), CosineSchedule(), STEPS, ADMConfig() if with_adm else None, None,
        prediction="x", weighting="snr_trunc", lr=5e-5, weight_decay=0.0,
    ).to(settings.device)  # fmt: skip
    image = torch.randn(count, 3, 32, 32, device=settings.device)
    own = own_step(distiller, {"image": image}, torch.optim.Adam)
    fixed, student = copy.deepcopy(teacher).eval(), copy.deepcopy(teacher).requires_grad_(True).train()
    t = torch.full((count,), 512, device=settings.device)

    bare = bare_step(
        {"student": student},
        lambda: {"student": {"mse": F.mse_loss(student(image, t, return_dict=False)[0], image)}},
        partial(torch.optim.Adam, lr=5e-5),
        teacher=lambda: (fixed(image, t), fixed(image, t)),
    )
    return settings.step_ratio(own, bare, f"batch {count}, 32 px")


def sampling_ratio(settings: Settings) -> Values:
    """Images per second of sampling in 4 steps, noise and uint8 included, over those of 4 bare forwards."""
    from diffusion.sampling import Student
    from diffusion.schedule import CosineSchedule

    network, count = make_unet(settings).eval(), 2 * settings.pick(2, 8, 128)
    student = Student(Path(), network, CosineSchedule().to(settings.device), "x", STEPS)
    z = torch.randn(count, 3, 32, 32, device=settings.device)
    t = torch.full((count,), 512, device=settings.device)

    whole = partial(student.sample, range(count), 0, batch_size=count)
    bare = torch.no_grad()(lambda: [network(z, t) for _ in range(STEPS)])
    on = f"{count} images of 32 px in {STEPS} steps, bare : whole"
    return settings.ratio(settings.timer(bare), settings.timer(whole), on, "ms", 1e3)


def dit_step_ratio(with_adm: bool, settings: Settings) -> Values:
    """A distillation step over the teacher's forward and the student's forward, MSE, backward and AdamW.

    The step's own part: noise and times, task and distillation losses, the moving average; ADM's with phi. DiT-B/2 and
    DiT-S/2 for ImageNet's latents; on the CPU half as wide and a third as deep.
    """
    from diffusion.dit.distiller import ADMConfig, DiTDistiller
    from diffusion.dit.model import DiT, DiTConfig

    quick = (None, 24, 2, 3, 2), (None, 16, 2, 2, 2), 8, 2
    cpu = (None, 384, 4, 6, 2), (None, 192, 4, 3, 2), 32, 8
    *pair, size, count = settings.pick(quick, cpu, (("B/2",), ("S/2",), 32, 128))
    teacher, student = (DiT(DiTConfig(*config), 4, size, 1000).to(settings.device) for config in pair)
    bare_student = copy.deepcopy(student)
    distiller = DiTDistiller(student, teacher, adm=ADMConfig() if with_adm else None).to(settings.device)
    image = torch.randn(count, 4, size, size, device=settings.device)
    t, label = torch.full((count,), 500, device=settings.device), torch.arange(count, device=settings.device)
    own = own_step(distiller, {"image": image, "label": label}, torch.optim.AdamW)
    with torch.no_grad():
        target = teacher(image, t, label)
    bare = bare_step(
        {"student": bare_student},
        lambda: {"student": {"mse": F.mse_loss(bare_student(image, t, label), target)}},
        partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
        teacher=lambda: teacher(image, t, label),
    )
    return settings.step_ratio(own, bare, f"batch {count}, {size} x {size} latents")
