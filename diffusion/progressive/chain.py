"""The whole chain: a base network from noise (or a given teacher), then a round of ``fit`` for each student."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from core.training.checkpoint import LAST, goal, prune, read_checkpoint
from core.training.command import DONE, INTERRUPTED
from core.training.fit import durations, fit, make_accelerator
from core.training.run import RunFolder, is_main_process
from core.training.schedule import ScheduleConfig, make_schedule
from core.training.seed import seed_everything
from core.training.task import dry_run, exit_code, open_run
from diffusion.consensus import load_classifier
from diffusion.data import ImageLoader, load_images
from diffusion.files import ABOUT, read_about
from diffusion.pictures import first_noise, save_samples
from diffusion.progressive.config import BaseConfig, ProgressiveConfig, RoundsConfig
from diffusion.progressive.distiller import BaseDistiller, Denoiser, ProgressiveDistiller
from diffusion.progressive.network import build_unet, check_network, copy_without_dropout, load_teacher, save_student
from diffusion.sampling import Student, denoise, read_unet
from diffusion.schedule import CosineSchedule
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

BASE = "base"
MOST_STEPS = 32
"""Of the sampling that a training shows."""


def round_folder(out: Path, steps: int) -> Path:
    """Where the round of the student with so many steps lies in a chain's run folder; its network is in ``student``."""
    return out / f"round-{steps:04d}"


def train(config: ProgressiveConfig) -> int:
    """Trains the whole chain, or what is left of it; returns the exit code.

    Every round is a run folder of its own, in ``<out>/base`` and ``<out>/round-<steps>``, each with its network as a
    diffusers folder, ``teacher`` or ``student``. A teacher is always read back from there: a resumed chain equals an
    uninterrupted one.
    Raises: InputError, TrainingError.
    """
    resolved = config.resolved()
    run = open_run(config.out, resolved, MAY_CHANGE, keep=config.fit.keep)
    if run is None:
        return DONE
    accelerator = make_accelerator(config.fit, run)
    images, teacher = prepare(config, accelerator)
    run.open()
    run.write_environment(str(accelerator.device))
    started = time.perf_counter()
    labels: list[int | str] = [BASE, *config.students] if teacher is None else [*config.students]
    for number, label in enumerate(labels, 1):
        name = "base network" if label == BASE else f"{label}-step student"
        run.log(f"round {number} of {len(labels)}: {name}")
        folder = _round(config, resolved, images, label, teacher)
        if folder is None:
            return INTERRUPTED
        teacher = load_teacher(folder)
    summary = {
        "status": "finished",
        "method": config.method,
        "seed": config.seed,
        "students": {steps: str(round_folder(config.out, steps) / "student") for steps in config.students},
        "wall_seconds_of_last_start": time.perf_counter() - started,
    }
    run.write_json("summary.json", summary)
    accelerator.end_training()
    return exit_code(summary)


def prepare(config: ProgressiveConfig, accelerator: Any) -> tuple[Tensor, Student | None]:
    """The images, and the teacher that ``--teacher`` names: all that a round needs is looked at before the first.

    Raises: InputError for whatever would stop a round: batch size, lengths, networks or classifier that do not fit.
    """
    images = load_images(config.data)
    loader = round_loader(config, images, accelerator, BASE)
    durations(replace(config.fit, steps=1), len(loader))
    if config.method == "pd+adm" and config.adm.classifier is not None:
        load_classifier(config.adm.classifier)
    if config.teacher is not None:
        return images, given_teacher(config, images)
    if not (config.out / BASE / "teacher").exists():  # else its round is over, and what it started from may be gone
        if config.init is None:
            shape = images.shape[1], images.shape[-1]
            check_size("U-Net", lambda: build_unet(config.network, *shape), accelerator.device)
        check_batch(base_distiller(config, images), loader, config, accelerator)
    return images, None


def given_teacher(config: ProgressiveConfig, images: Tensor) -> Student:
    """The teacher that ``--teacher`` names. Raises: InputError where it does not fit chain, prediction or images."""
    assert config.teacher is not None
    teacher = load_teacher(Path(config.teacher))
    name = f"--teacher {config.teacher}"
    if teacher.prediction != config.predict:
        raise InputError(
            f"{name} predicts {teacher.prediction}, --predict says {config.predict}: both must be the same"
        )
    if teacher.schedule.timesteps != config.timesteps:
        raise InputError(f"{name} has times 0..{teacher.schedule.timesteps}, --timesteps says {config.timesteps}")
    if teacher.steps % config.chain[0]:
        raise InputError(
            f"{name} samples in {teacher.steps} steps, the chain begins at {config.chain[0]}: begin it at "
            f"{teacher.steps}, or at what divides it"
        )
    check_network(teacher.model, name, images.shape[1], images.shape[-1], config.network)
    return teacher


def base_distiller(config: ProgressiveConfig, images: Tensor) -> BaseDistiller:
    """The base network before its first step."""
    channels, size = images.shape[1], images.shape[-1]
    seed_everything(config.seed, "network")
    if config.init is None:
        network = build_unet(config.network, channels, size)
    else:
        network = read_unet(config.init, f"--init {config.init}", dropout=config.network.dropout)
        check_network(network, f"--init {config.init}", channels, size, config.network)
    schedule = CosineSchedule(config.timesteps)
    return BaseDistiller(network, schedule, config.base.ema, **_options(config, config.base))


def round_distiller(config: ProgressiveConfig, teacher: Student, steps: int) -> ProgressiveDistiller:
    """The round of the student that samples in ``steps``, before its first step: the student is its teacher's copy."""
    adm, student = config.adm_of(steps), copy_without_dropout(teacher.model)
    classifier = load_classifier(adm.classifier) if adm is not None and adm.classifier is not None else None
    schedule, options = CosineSchedule(config.timesteps), _options(config, config.rounds)
    return ProgressiveDistiller(teacher.model, student, schedule, steps, adm, classifier, **options)


def _options(config: ProgressiveConfig, part: BaseConfig | RoundsConfig) -> dict[str, Any]:
    return {"prediction": config.predict, "weighting": config.weight, "lr": part.lr, "weight_decay": part.weight_decay}


def _round(
    config: ProgressiveConfig, resolved: Mapping[str, Any], images: Tensor, label: int | str, teacher: Student | None
) -> Path | None:
    """One call of ``fit`` in a folder of its own, unless it is finished: the base network's, or a student's.

    Args: ``resolved``: the chain's config as it is written down; ``label``: "base", or the student's steps.
    Returns: the folder of its network, None where it was interrupted.
    """
    if teacher is None:
        path, role, length, steps = config.out / BASE, "teacher", config.base.steps, config.timesteps
    else:
        steps = int(label)
        path, role, length = round_folder(config.out, steps), "student", config.rounds.length(steps)
    exported = path / role
    run = RunFolder(path, resolved, main=is_main_process(), may_change=MAY_CHANGE)
    settings = replace(config.fit, steps=length)
    accelerator = make_accelerator(settings, run)
    done = run.finished and _is_whole(exported, run)
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    if done:
        if run.main:
            prune(run.checkpoints, config.fit.keep)
        return exported
    distiller = base_distiller(config, images) if teacher is None else round_distiller(config, teacher, steps)
    loader = round_loader(config, images, accelerator, label)
    constant = ScheduleConfig("constant", warmup=config.base.warmup / len(loader))
    schedule = constant if teacher is None else ScheduleConfig(config.rounds.schedule)
    seed_everything(config.seed, "training", label, accelerator.process_index)
    result = fit(  # takes no step where only the network's folder is to be written
        distiller,
        loader,
        optimizer=torch.optim.Adam,
        schedule=make_schedule(schedule, durations(settings, len(loader))[0] / len(loader)),
        config=settings,
        run=run,
        accelerator=accelerator,
        summary={
            "method": config.method,
            "seed": config.seed,
            "round": label,
            "parameters": count(distiller.networks[role]),
        },
        sizes={"training images": len(images)},
        pictures=lambda step: sample_pictures(distiller, role, steps, run.path, step),
        progress_bar=config.progress_bar,
    )
    if result["status"] != "finished":
        return None
    if run.main:
        # From the checkpoint: a run that was killed between its end and this line then writes the same.
        saved, state = read_checkpoint(goal(run.checkpoints / LAST))
        distiller.networks[role].load_state_dict(saved[role])
        distiller.load_state_dict(state["extra"], strict=False)
        network = distiller.export(role)
        save_student(exported, network, config.predict, steps, config.timesteps, run=run.identity)
        run.log(f"{'base network' if teacher is None else f'{label}-step student'}: {exported}")
    accelerator.wait_for_everyone()
    return exported


@torch.no_grad()
def sample_pictures(distiller: Denoiser, role: str, steps: int, folder: Path, step: int) -> dict[str, Tensor]:
    """What the round's network samples now, in its own steps where those are few (see ``save_samples``)."""
    network: Any = distiller.export(role)
    size = network.config.sample_size
    z = first_noise((network.config.in_channels, size, size), distiller.schedule.alpha.device)
    count = math.gcd(steps, MOST_STEPS)
    states = [z, *denoise(network, distiller.schedule, distiller.prediction, count, z)]
    return {f"{role}/samples": save_samples(states, folder, role, step)}


def _is_whole(exported: Path, run: RunFolder) -> bool:
    """Whether a round's network lies there as the run wrote it. Of a spoiled one it says so: it is written anew."""
    if not exported.exists():
        return False
    try:
        about = read_about(exported)
        if about.get("run", run.identity if about else None) != run.identity:
            raise InputError(f"{exported / ABOUT} is missing, or another run's")
    except InputError as error:
        run.say(f"{error}: it is written anew")
        return False
    return True


def round_loader(config: ProgressiveConfig, images: Tensor, accelerator: Any, label: int | str) -> ImageLoader:
    """This process's batches, in an order of the round's own. Raises: InputError for an unfitting batch size."""
    seed = config.seed * 8192 + (0 if label == BASE else int(label))
    return make_loader(ImageLoader, images, config, accelerator, seed)


def look(config: ProgressiveConfig, wanted: DryRun) -> int:
    """``--dry-run``: prints the resolved config, the rounds and the memory; with "time" how long their steps take."""
    accelerator = make_accelerator(config.fit, str(config.out))
    images, teacher = prepare(config, accelerator)
    loader = round_loader(config, images, accelerator, BASE)
    rounds = plan(config, images, teacher)

    def lines() -> Iterator[str]:
        size = "x".join(map(str, images.shape[1:]))
        yield f"{len(images):,} images C x H x W: {size}"
        network: Any = rounds[0][2].networks["teacher"]
        yield f"{'teacher' if teacher else 'base network'}: {count(network):,} parameters"
        yield f"  map C x H x W: {network.config.block_out_channels[0]}x{size.partition('x')[2]}"
        costs: dict[Denoiser, str] = {}
        for label, length, distiller in rounds:
            costs.setdefault(distiller, label)
            yield f"{label}: {length:,} steps"
        for distiller, label in costs.items():
            yield f"{label}: {describe_memory(distiller, loader, config, accelerator)}"

    @cache
    def seconds(distiller: Denoiser) -> float:
        return time_step(distiller, loader, torch.optim.Adam, config, accelerator)

    def timed() -> Iterator[str]:
        for label, length, distiller in rounds:
            yield f"{label}: {length:,} steps of {seconds(distiller):.3f} s on {accelerator.device}"
        yield f"estimate: {sum(length * seconds(one) for _, length, one in rounds) / 3600:.2f} hours"

    return dry_run(config.resolved(), lines(), timed if wanted == "time" else None)


def plan(config: ProgressiveConfig, images: Tensor, teacher: Student | None) -> list[tuple[str, int, Denoiser]]:
    """The rounds of a chain from fresh networks: name, optimiser steps, a distiller for all that cost the same."""
    rounds: list[tuple[str, int, Denoiser]] = []
    if teacher is None:
        base = base_distiller(config, images)
        rounds.append((BASE, config.base.steps, base))
        teacher = Student(config.out, base.average, base.schedule, config.predict, config.timesteps)
    known: dict[bool, Denoiser] = {}  # by whether ADM acts
    for steps in config.students:
        acts = config.adm_of(steps) is not None
        known[acts] = known.get(acts) or round_distiller(config, teacher, steps)
        rounds.append((f"{steps}-step student{', ADM' if acts else ''}", config.rounds.length(steps), known[acts]))
    return rounds
