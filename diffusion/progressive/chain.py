"""The whole chain: a base network from noise (or a given teacher), then a round of ``fit`` for each student."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import InputError
from core.training.checkpoint import LAST, read_checkpoint
from core.training.command import DONE, INTERRUPTED
from core.training.fit import durations, fit, make_accelerator
from core.training.run import RunFolder, is_main_process
from core.training.schedule import Schedule, ScheduleConfig, make_schedule
from core.training.seed import seed_everything
from diffusion.consensus import load_classifier
from diffusion.data import ImageLoader, check_parts, load_images
from diffusion.progressive.config import MAY_CHANGE, ProgressiveConfig
from diffusion.progressive.distiller import BaseDistiller, Denoiser, ProgressiveDistiller
from diffusion.progressive.network import (
    build_unet,
    check_network,
    copy_without_dropout,
    load_start,
    load_teacher,
    save_student,
)
from diffusion.sampling import Student
from diffusion.schedule import CosineSchedule
from diffusion.timing import seconds_a_step

BASE = "base"


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
    run = RunFolder(config.out, resolved, main=is_main_process(), may_change=MAY_CHANGE)
    if run.finished:
        run.log(f"{run.path} is finished; its results are in {run.path / 'summary.json'}")
        return DONE
    images = load_images(config.data)
    teacher = None if config.teacher is None else given_teacher(config, images)
    run.open()
    accelerator = make_accelerator(config.fit, run)
    run.write_environment(str(accelerator.device))
    started = time.perf_counter()
    if teacher is None:
        base = _round(config, images, BASE, partial(base_distiller, config, images))
        if base is None:
            return INTERRUPTED
        teacher = load_teacher(base)
    for steps in config.students:
        student = _round(config, images, steps, partial(round_distiller, config, teacher, steps))
        if student is None:
            return INTERRUPTED
        teacher = load_teacher(student)
    summary = {
        "status": "finished",
        "method": config.method,
        "seed": config.seed,
        "students": {steps: str(round_folder(config.out, steps) / "student") for steps in config.students},
        "wall_seconds_of_last_start": time.perf_counter() - started,
    }
    run.write_json("summary.json", summary)
    accelerator.end_training()
    return DONE


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
        network = load_start(config.init, config.network, channels, size)
    return BaseDistiller(
        network,
        CosineSchedule(config.timesteps),
        config.base.ema,
        prediction=config.predict,
        weighting=config.weight,
        lr=config.base.lr,
        weight_decay=config.base.weight_decay,
    )


def round_distiller(config: ProgressiveConfig, teacher: Student, steps: int) -> ProgressiveDistiller:
    """The round of the student that samples in ``steps``, before its first step: the student is its teacher's copy."""
    adm = config.adm_of(steps)
    return ProgressiveDistiller(
        teacher.model,
        copy_without_dropout(teacher.model),
        CosineSchedule(config.timesteps),
        steps,
        adm,
        load_classifier(adm.classifier) if adm is not None and adm.classifier is not None else None,
        prediction=config.predict,
        weighting=config.weight,
        lr=config.rounds.lr,
        weight_decay=config.rounds.weight_decay,
    )


def _round(config: ProgressiveConfig, images: Tensor, label: int | str, make: Callable[[], Denoiser]) -> Path | None:
    """One call of ``fit`` in a folder of its own, unless it is finished: the base network's, or a student's.

    ``label``: "base", or the student's steps. Returns: the folder of its network, None where it was interrupted.
    """
    base = label == BASE
    path = config.out / BASE if base else round_folder(config.out, int(label))
    exported = path / ("teacher" if base else "student")
    run = RunFolder(path, config.resolved(), main=is_main_process(), may_change=MAY_CHANGE)
    settings = replace(config.fit, steps=config.base.steps if base else config.rounds.length(int(label)))
    accelerator = make_accelerator(settings, run)
    trained, written = run.finished, exported.exists()
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    if trained and written:
        return exported
    distiller = make()
    (role,) = distiller.trained()
    if not trained:
        loader = make_loader(config, images, accelerator, label)
        seed_everything(config.seed, "training", label, accelerator.process_index)
        result = fit(
            distiller,
            loader,
            optimizer=torch.optim.Adam,
            schedule=_schedule(config, base, durations(settings, len(loader))[0], len(loader)),
            config=settings,
            run=run,
            accelerator=accelerator,
            summary={
                "method": config.method,
                "seed": config.seed,
                "round": label,
                "parameters": sum(p.numel() for p in distiller.networks[role].parameters()),
            },
            progress_bar=config.progress_bar,
        )
        if result["status"] != "finished":
            return None
    if run.main:
        # From the checkpoint: a run that was killed between its end and this line then writes the same.
        saved, state = read_checkpoint(run.checkpoints / LAST)
        distiller.networks[role].load_state_dict(saved[role])
        distiller.load_state_dict(state["extra"], strict=False)
        steps = config.timesteps if base else int(label)
        save_student(exported, distiller.export(role), config.predict, steps, config.timesteps)
        run.log(f"{'base network' if base else f'{label}-step student'}: {exported}")
    accelerator.wait_for_everyone()
    return exported


def make_loader(config: ProgressiveConfig, images: Tensor, accelerator: Any, label: int | str) -> ImageLoader:
    """This process's batches, in an order of the round's own. Raises: InputError for an unfitting batch size."""
    check_parts(config.batch_size, accelerator.num_processes, config.fit.accumulate)
    return ImageLoader(
        images,
        config.batch_size,
        flip=config.data.flips,
        seed=config.seed * 8192 + (0 if label == BASE else int(label)),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )


def _schedule(config: ProgressiveConfig, base: bool, steps: int, epoch: int) -> Schedule:
    if base:
        return make_schedule(ScheduleConfig("constant", warmup=config.base.warmup / epoch), steps / epoch)
    return make_schedule(ScheduleConfig(config.rounds.schedule), steps / epoch)


def dry_run(config: ProgressiveConfig) -> int:
    """Prints the resolved config, the network and a time estimate from a few real steps. Raises: InputError."""
    import yaml

    print(yaml.safe_dump(json.loads(json.dumps(config.resolved(), default=str)), sort_keys=False))
    images = load_images(config.data)
    print(f"{len(images):,} images of {images.shape[1]} x {images.shape[2]} x {images.shape[3]}")
    hours = 0.0
    if config.teacher is None:
        base = base_distiller(config, images)
        teacher = Student(config.out, base.average, base.schedule, config.predict, config.timesteps)
        print(f"base network: {sum(p.numel() for p in base.average.parameters()):,} parameters")
        seconds = _seconds_a_step(config, base, images)
        hours += config.base.steps * seconds / 3600
        print(f"base: {config.base.steps:,} steps of {seconds:.3f} s")
    else:
        teacher = given_teacher(config, images)
        print(f"teacher: {sum(p.numel() for p in teacher.model.parameters()):,} parameters")
    known: dict[bool, float] = {}
    for steps in config.students:
        with_adm = config.adm_of(steps) is not None
        if with_adm not in known:
            known[with_adm] = _seconds_a_step(config, round_distiller(config, teacher, steps), images)
        length = config.rounds.length(steps)
        hours += length * known[with_adm] / 3600
        print(f"{steps}-step student{', ADM' if with_adm else ''}: {length:,} steps of {known[with_adm]:.3f} s")
    print(f"estimate: {hours:.2f} hours")
    return DONE


def _seconds_a_step(config: ProgressiveConfig, distiller: Denoiser, images: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.fit, folder)
    loader = make_loader(config, images, accelerator, BASE)
    durations(replace(config.fit, steps=1), len(loader))
    return seconds_a_step(distiller, loader, torch.optim.Adam, accelerator)
