"""What ``diffusion/tools/train.py dit`` does once the command line is read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from core.training.command import DONE
from core.training.fit import durations, fit, make_accelerator
from core.training.run import RunFolder
from core.training.schedule import ScheduleConfig, make_schedule
from core.training.seed import seed_everything
from core.training.task import dry_run, estimate, exit_code, open_run
from diffusion.dit.config import DiTTrainingConfig, teacher_path
from diffusion.dit.convert import load_dit, save_dit
from diffusion.dit.data import LabelledData, labelled_loader, load_labelled
from diffusion.dit.distiller import DiTDistiller
from diffusion.dit.gaussian import spaced_times, trajectory
from diffusion.dit.model import DiT
from diffusion.files import read_json
from diffusion.pictures import SHOWN, first_noise, save_samples
from diffusion.training import (
    MAY_CHANGE,
    DryRun,
    check_batch,
    check_size,
    count,
    describe_memory,
    make_loader,
    time_step,
)

SAMPLING_STEPS = 25
"""Of the pictures that a training shows."""


def train(config: DiTTrainingConfig) -> int:
    """Trains, or resumes a run that was cut off; returns the exit code.

    Every ``fit.evaluate_every`` steps and at the end, the moving average of each network that learns is exported to
    ``<out>/export/step-<steps>/<role>``.
    Raises: InputError, TrainingError.
    """
    run = open_run(config.out, config.resolved(), MAY_CHANGE, keep=config.fit.keep)
    if run is None:
        return DONE
    data, distiller, accelerator, loader, steps = prepare(config, run)
    seed_everything(config.seed, "training", accelerator.process_index)
    result = fit(
        distiller,
        loader,
        optimizer=torch.optim.AdamW,
        schedule=make_schedule(ScheduleConfig("constant"), steps / len(loader)),
        config=config.fit,
        run=run,
        accelerator=accelerator,
        evaluate=lambda: export(distiller, data, run),
        summary={
            "method": config.method,
            "seed": config.seed,
            "networks": {role: {"parameters": count(network)} for role, network in distiller.networks.items()},
        },
        pictures=lambda step: sample_pictures(distiller, run.path, step),
        sizes={"training images": len(data.labels), "classes": data.classes},
        progress_bar=config.progress_bar,
    )
    accelerator.end_training()
    return exit_code(result)


def prepare(config: DiTTrainingConfig, run: RunFolder | str) -> tuple[LabelledData, DiTDistiller, Any, Any, int]:
    """Data, networks, accelerator, batches and the number of steps. Raises: InputError for what does not fit."""
    data = load_labelled(config.data)
    accelerator = make_accelerator(config.fit, run)
    for network in (config.student, config.teacher_network)[: 1 + config.online]:
        check_size("DiT", partial(DiT, network, data.channels, data.size, data.classes), accelerator.device)
    distiller = make_distiller(config, data)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    check_batch(distiller, make_loader(labelled_loader, data, config, accelerator, 0), config, accelerator)
    loader = make_loader(labelled_loader, data, config, accelerator, config.seed)
    return data, distiller, accelerator, loader, durations(config.fit, len(loader))[0]


def make_distiller(config: DiTTrainingConfig, data: LabelledData) -> DiTDistiller:
    """All networks before the first step. Raises: InputError where the teacher does not fit student or data."""
    seed_everything(config.seed, "student")
    student = DiT(config.student, data.channels, data.size, data.classes)
    student.gradient_checkpointing = config.gradient_checkpointing
    teacher = None
    if config.online:
        seed_everything(config.seed, "teacher")
        teacher = DiT(config.teacher_network, data.channels, data.size, data.classes)
        teacher.gradient_checkpointing = config.gradient_checkpointing
    elif config.teacher is not None:
        teacher = load_teacher(config.teacher, data, student.patch)
        if config.label_dropout > 0 and not teacher.null_label:
            raise InputError(f"--teacher {config.teacher} never learned a null label: give --label_dropout 0")
    for network in (student, teacher if config.online else None):
        if network is not None:
            network.null_label = config.label_dropout > 0
    return DiTDistiller(
        student,
        teacher,
        online=config.online,
        distill=config.distill,
        adm=config.adm if config.method == "mse+adm" else None,
        label_dropout=config.label_dropout,
        ema=config.ema,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def load_teacher(given: str, data: LabelledData, patch: int) -> DiT:
    """The fixed teacher. Raises: InputError where it is for other latents, classes, or patches than the student's."""
    path, name = teacher_path(given), f"--teacher {given}"
    teacher = load_dit(path)
    cure = "name a network that was trained on such data"
    for what, theirs, wanted, mend in (
        ("channels", teacher.channels, data.channels, cure),
        ("input size", teacher.input_size, data.size, cure),
        ("classes", teacher.classes, data.classes, cure),
        ("patch size", teacher.patch, patch, "teacher and student must cut an image into the same tokens"),
    ):
        if theirs != wanted:
            raise InputError(f"{name} has {what} {theirs}, wanted is {wanted}: {mend}")
    if not teacher.learn_sigma:
        raise InputError(f"{name} predicts no variance (learn_sigma), which the student's loss compares")
    about = path.parent / "adm.json"  # beside diffusers' own folder, in what this command exports
    if about.is_file() and (scale := read_json(about).get("latent_scale")) != data.latent_scale:
        raise InputError(f"{name} was trained on latents of scale {scale}, the data have {data.latent_scale}")
    return teacher


def export(distiller: DiTDistiller, data: LabelledData, run: RunFolder) -> dict[str, float]:
    """Writes the moving averages as folders of this step; nothing to log."""
    averages = {role: distiller.export(role) for role in distiller.trained()}
    # Diverged: fit stops at the checkpoint that follows, and names the loss.
    finite = all(bool(p.isfinite().all()) for network in averages.values() for p in network.parameters())
    if run.main and finite:
        for role, network in averages.items():
            folder = run.path / "export" / f"step-{distiller.step:08d}" / role
            save_dit(folder, network, step=distiller.step, latent_scale=data.latent_scale)
            run.log(f"step {distiller.step}: {role}'s average is in {folder}")
    return {}


@torch.no_grad()
def sample_pictures(distiller: DiTDistiller, folder: Path, step: int) -> dict[str, Tensor]:
    """What the averages sample now by DDIM, without guidance: classes spread evenly (see ``save_samples``).

    Latents are shown as they are, for there is no VAE here: three channels, by a third of their size.
    """
    found = {}
    for role in distiller.trained():
        network = distiller.export(role)
        z = first_noise((network.channels, network.input_size, network.input_size), network.pos_embed.device)
        labels = torch.arange(SHOWN, device=z.device) * network.classes // SHOWN
        times = spaced_times(SAMPLING_STEPS, distiller.schedule.timesteps, "ddim")
        predict = partial(_predict, network, labels)
        states = [z, *trajectory(predict, distiller.schedule, times, z)]
        scale = 1.0 if network.channels <= 3 else 1 / 3
        found[f"{role}/samples"] = save_samples([scale * state for state in states], folder, role, step)
    return found


def _predict(network: DiT, labels: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return network(z, t, labels)


def look(config: DiTTrainingConfig, wanted: DryRun) -> int:
    """``--dry-run``: prints the resolved config, the networks and the memory; with "time" how long a step takes."""
    data, distiller, accelerator, loader, steps = prepare(config, str(config.out))

    def lines() -> Iterator[str]:
        for role, network in distiller.networks.items():
            width, depth, heads, patch = network.config.resolved()  # type: ignore[operator, union-attr]
            yield (
                f"{role}: {count(network):,} parameters{'' if role in distiller.trained() else ', fixed'}; {depth} "
                f"blocks of width {width} with {heads} heads, patches of {patch} x {patch}"
            )
            yield f"  map C x H x W: {width}x{data.size // patch}x{data.size // patch}"
        if distiller.adapter is not None:
            yield f"adapter (phi): {count(distiller.adapter):,} parameters"
        yield describe_memory(distiller, loader, config, accelerator)
        yield f"{len(loader):,} steps an epoch, {steps:,} in all"

    def timed() -> list[str]:
        return estimate(steps, time_step(distiller, loader, torch.optim.AdamW, config, accelerator), accelerator.device)

    return dry_run(config.resolved(), lines(), timed if wanted == "time" else None)
