"""A run of any task: what its training command does once the command line is read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from classification.config import MAY_CHANGE, Command
from classification.data.noise import save_noise
from classification.evaluation import evaluate
from classification.experiment import Experiment, build, check_batch, images_at
from classification.flops import count_forward
from classification.predictions import check_saves
from core.training.checkpoint import numbered
from core.training.command import DONE
from core.training.distiller import Batch
from core.training.fit import durations, fit, make_accelerator
from core.training.schedule import make_schedule
from core.training.seed import seed_everything
from core.training.step import memory_estimate, seconds_a_step
from core.training.task import dry_run, estimate, exit_code, gigabytes, open_run


def train(command: Command) -> int:
    """Trains, resumes or, with ``--dry-run``, only looks; returns the exit code. Raises: InputError, TrainingError."""
    if command.dry_run:
        return look(command)
    config = command.config
    moved = [f"networks.{role}.weights" for role, c in config.networks.items() if c.weights]  # of the same hash
    run = open_run(config.out, command.resolved(), (*MAY_CHANGE, *moved), keep=config.fit.keep)
    if run is None:
        return DONE
    experiment = build(command)
    distiller = experiment.distiller
    accelerator = make_accelerator(config.fit, run, unused_parameters=distiller.unused_parameters)
    check_batch(experiment, accelerator.num_processes)

    loader = experiment.train_loader(accelerator)
    selected_on = "test" if experiment.datasets.validation is None else "validation"  # on which ``best`` is chosen
    splits = {name: experiment.split(name) for name in (selected_on, "test")}
    evaluated = {name: experiment.evaluation_loader(split, accelerator) for name, split in splits.items()}
    if distiller.method.needs_held_out:
        distiller.held_out = experiment.evaluation_loader(experiment.split("validation"), accelerator)
    if distiller.previous is not None:
        distiller.previous.attach(run.path, experiment.datasets, loader, config.fit, accelerator)
    student = next((r for r in distiller.networks if r.startswith("student")), next(iter(distiller.networks)))

    def scores(roles: Sequence[str]) -> dict[str, Any]:
        result: dict[str, Any] = {"split": selected_on}
        for name, loader in evaluated.items():
            prefix = "" if name == selected_on else f"{name}/"
            values = evaluate(distiller, loader, accelerator, roles).values
            result |= {f"{prefix}{key}": value for key, value in values.items()}
        return result

    epochs = durations(config.fit, len(loader))[0] / len(loader)
    schedule = config.schedule.in_epochs(len(loader))
    fixed = [role for role in distiller.networks if role not in distiller.trained()]
    known: dict[str, Any] = {}  # what the fixed networks score: they are not evaluated again
    fresh = not numbered(run.checkpoints)  # else this was said when the run began
    started = [r for r in distiller.trained() if r in experiment.pretrained and (fresh or fixed)]
    if fixed or started:
        distiller.to(accelerator.device)
        start = scores([*fixed, *started])
        known = {name: value for name, value in start.items() if role_of(name) in fixed}
        run.open()
        for line in remarks(experiment, fixed, start):
            run.log(line)
    lines = schedule.remarks(epochs)
    if config.batch_size > (images := len(experiment.datasets.train)):
        lines.append(
            f"note: batch_size {config.batch_size} is more than the {images} training images: one batch an epoch"
        )
    if lines:
        run.open()
        for line in lines:
            run.log(line)
    if experiment.noise is not None and run.main:
        run.open()
        save_noise(experiment.noise, run.path / "label_noise.safetensors")
    seed_everything(config.seed, "training", accelerator.process_index)
    learning = [role for role in distiller.output_roles if role not in fixed]
    result = fit(
        distiller,
        loader,
        optimizer=config.optimizer.make,
        schedule=make_schedule(schedule, epochs),
        config=config.fit,
        run=run,
        accelerator=accelerator,
        evaluate=lambda: {**known, **scores([*learning, *distiller.moving_averages])},
        select=f"{student}/top1",
        summary={
            "selected_on": selected_on,
            "note": None if selected_on == "validation" else "best was chosen by test accuracy: read last",
            "method": config.method,
            "seed": config.seed,
            "networks": {
                role: {"name": distiller.configs[role].name, "parameters": sum(p.numel() for p in network.parameters())}
                for role, network in distiller.networks.items()
                if role in distiller.configs
            },
            **{
                role: {
                    "split": selected_on,
                    **{n.replace(f"{role}/", ""): known[n] for n in known if role_of(n) == role},
                }
                for role in fixed
            },
        },
        sizes={"training images": images, **{f"{name} images": len(split) for name, split in splits.items()}},
        progress_bar=config.progress_bar,
    )
    accelerator.end_training()
    return exit_code(result)


def role_of(name: str) -> str:
    """Whose value it is: ``"teacher/top1"`` and ``"test/teacher/top1"`` are the teacher's."""
    return name.removeprefix("test/").partition("/")[0]


def remarks(experiment: Experiment, fixed: Sequence[str], start: Mapping[str, Any]) -> list[str]:
    """What to say before training of networks with weights, in a line each: their accuracy, and where it looks wrong.

    ``start``: the values of an evaluation of the fixed networks and of each other that starts from weights.
    """
    classes, split = experiment.datasets.num_classes, start["split"]
    lines = []
    trained = [role for role in experiment.distiller.trained() if f"{role}/top1" in start]
    for role in [*fixed, *trained]:
        top1, name = start[f"{role}/top1"], experiment.distiller.configs[role].name
        how = "fixed" if role in fixed else "before training"
        lines.append(f"{role} ({name}, {how}): top-1 {top1:.2f} % on {split}")
        given, said = experiment.distiller.normalisation[role], experiment.said[role]
        wanted = said.get("mean", given[0]), said.get("std", given[1])
        if any(abs(a - b) > 0.005 for x, y in zip(given, wanted, strict=True) for a, b in zip(x, y, strict=True)):
            lines.append(
                f"warning: {role} was trained with mean and std {_short(wanted)}, and config says {_short(given)}: "
                f"--networks.{role}.mean null --networks.{role}.std null takes its own"
            )
        if top1 < 200 / (classes + 1):  # twice chance for many classes, and 67 % of two
            lines.append(
                f"warning: {role} is hardly better than chance ({100 / classes:.2f} % of {classes} classes): random "
                "weights, another order of classes, or another normalisation than it was trained with?"
            )
        for student in (other for other in trained if role.startswith("teacher") and other.startswith("student")):
            if start[f"{student}/top1"] > top1:
                lines.append(
                    f"warning: {student} starts at {start[f'{student}/top1']:.2f} % on {split}, above its {role}'s "
                    f"{top1:.2f} %: is this the right teacher?"
                )
    return lines


def _short(normalisation: Iterable[Iterable[float]]) -> str:
    return " and ".join(f"[{', '.join(f'{value:.3f}' for value in values)}]" for values in normalisation)


def look(command: Command) -> int:
    """``--dry-run``: prints the resolved config, the networks and the memory they need, in a moment."""
    config = command.config
    experiment = build(command)
    distiller = experiment.distiller
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.fit, folder, unused_parameters=distiller.unused_parameters)
    check_batch(experiment, accelerator.num_processes)
    loader = experiment.train_loader(accelerator)
    steps, _ = durations(config.fit, len(loader))
    if distiller.previous is not None:
        check_saves(config.fit, len(loader))

    def timed() -> list[str]:
        parts, clip = config.fit.accumulate, config.fit.clip
        seconds = seconds_a_step(distiller, loader, config.optimizer.make, accelerator, accumulate=parts, clip=clip)
        return estimate(steps, seconds, accelerator.device)

    lines = chain(describe(experiment, accelerator), [f"{len(loader):,} steps an epoch, {steps:,} in all"])
    return dry_run(command.resolved(), lines, timed if command.dry_run == "time" else None)


def describe(experiment: Experiment, accelerator: Any) -> Iterator[str]:
    """A dry run's lines: of each network its size, maps and cost, what ADM adds, the memory, and noisy labels."""
    config, distiller = experiment.command.config, experiment.distiller
    images = images_at(experiment.datasets.train, 2)
    separate = distiller.method.views == "separate" and len(distiller.networks) > 1
    views = images[:, None].expand(-1, len(distiller.networks), -1, -1, -1) if separate else images
    targets = experiment.datasets.train.targets[: len(images)]
    small: Batch = {"image": views, "target": targets, "index": torch.arange(len(images))}
    networks, added = count_forward(distiller, small)
    for role, output in distiller.outputs(images).items():
        network = {**distiller.networks}.get(role, distiller.method)  # a role that the method adds is its own module
        maps = ", ".join("x".join(map(str, m.shape[1:])) for m in output.maps)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        name = distiller.configs[role].name if role in distiller.configs else type(network).__name__
        yield f"{role}: {name}, {sum(p.numel() for p in network.parameters()):,} parameters ({trained:,} trained)"
        yield f"  stage maps C x H x W: {maps}"
        if role in networks:
            yield f"  forward of an image: {networks[role].macs / 1e6:,.2f} M multiply-accumulates (2 FLOPs each)"
    if distiller.adm is not None:
        yield f"adapters (phi): {sum(p.numel() for p in distiller.adm.parameters()):,} parameters"
    if added is not None:
        share = 100 * added.total / sum(2 * network.macs for network in networks.values())
        yield f"ADM adds {added.total / 1e6:.3g} MFLOPs an image ({share:.3g} % of the networks together)"
        yield f"  {added.macs / 1e6:.3g} M multiply-accumulates (heads, phi), {added.others / 1e6:.3g} MFLOPs besides"
    if experiment.noise is not None:
        changed = int((experiment.noise.given != experiment.noise.true).sum())
        yield f"noisy labels: {len(experiment.noise.index):,} drawn anew, {changed:,} of them are wrong"
    part = config.batch_size // accelerator.num_processes // config.fit.accumulate
    with accelerator.autocast():
        yield gigabytes(memory_estimate(distiller, small, part, moments=config.optimizer.moments))
