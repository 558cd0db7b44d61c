"""A run of any task: what its training command does once the command line is read."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from classification.config import FREE_KEYS, Command
from classification.data.noise import save_noise
from classification.evaluation import evaluate
from classification.experiment import Experiment, build, check_batch
from classification.flops import count_forward
from classification.predictions import check_saves
from core.training.command import DONE, INTERRUPTED
from core.training.distiller import Batch, Progress
from core.training.fit import durations, fit, make_accelerator
from core.training.run import RunFolder, is_main_process
from core.training.schedule import make_schedule
from core.training.seed import seed_everything


def train(command: Command) -> int:
    """Trains, resumes or, with ``--dry-run``, only looks; returns the exit code. Raises: InputError, TrainingError."""
    if command.dry_run:
        return dry_run(command)
    config = command.config
    moved = [f"networks.{role}.weights" for role, c in config.networks.items() if c.weights]  # of the same hash
    run = RunFolder(config.out, command.resolved(), main=is_main_process(), free=(*FREE_KEYS, *moved))
    if run.finished:
        run.log(f"{run.path} is finished; its results are in {run.path / 'summary.json'}")
        return DONE
    experiment = build(command)
    distiller = experiment.distiller
    accelerator = make_accelerator(config.fit, run, unused_parameters=distiller.unused_parameters)
    check_batch(experiment, accelerator.num_processes)
    distiller.method.check_data(config.data)

    loader = experiment.train_loader(accelerator)
    selected_on, split = experiment.selection
    looks = {selected_on: experiment.evaluation_loader(split, accelerator)}
    if selected_on != "test":
        looks["test"] = experiment.evaluation_loader(experiment.datasets.test, accelerator)
    if distiller.method.needs_held_out:
        distiller.held_out = experiment.evaluation_loader(experiment.split("validation"), accelerator)
    if distiller.previous is not None:
        distiller.previous.attach(run.path, experiment.datasets, loader, config.fit, accelerator)
    student = next((r for r in distiller.networks if r.startswith("student")), next(iter(distiller.networks)))

    def look(roles: Sequence[str]) -> dict[str, Any]:
        values = evaluate(distiller, looks[selected_on], accelerator, roles).values
        result: dict[str, Any] = {"split": selected_on, **values}
        if selected_on != "test":
            test = evaluate(distiller, looks["test"], accelerator, roles).values
            result |= {f"test/{name}": value for name, value in test.items()}
        return result

    epochs = durations(config.fit, len(loader))[0] / len(loader)
    schedule = make_schedule(config.schedule, epochs)
    fixed = [role for role in distiller.networks if role not in distiller.trained()]
    known: dict[str, Any] = {}  # what the fixed networks score: they are not evaluated again
    if fixed:
        distiller.to(accelerator.device)
        start = look([*fixed, *(r for r in distiller.trained() if experiment.starts_trained(r))])
        known = {name: value for name, value in start.items() if role_of(name) in fixed}
        run.open()
        for line in remarks(experiment, fixed, start):
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
        schedule=schedule,
        config=config.fit,
        run=run,
        accelerator=accelerator,
        evaluate=lambda: {**known, **look(learning)},
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
        progress_bar=config.progress_bar,
    )
    accelerator.end_training()
    return DONE if result["status"] == "finished" else INTERRUPTED


def role_of(name: str) -> str:
    """Whose value it is: ``"teacher/top1"`` and ``"test/teacher/top1"`` are the teacher's."""
    return name.removeprefix("test/").partition("/")[0]


def remarks(experiment: Experiment, fixed: Sequence[str], start: Mapping[str, Any]) -> list[str]:
    """What to say of the fixed networks before training, in a line each: their accuracy, and where it looks wrong.

    ``start``: the values of an evaluation, with those of each student that starts from weights.
    """
    classes, split = experiment.datasets.num_classes, start["split"]
    lines = []
    for role in fixed:
        top1, name = start[f"{role}/top1"], experiment.distiller.configs[role].name
        lines.append(f"{role} ({name}, fixed): top-1 {top1:.2f} % on {split}")
        given, trained = experiment.distiller.normalisation[role], experiment.trained_normalisation(role)
        if any(abs(a - b) > 0.005 for x, y in zip(given, trained, strict=True) for a, b in zip(x, y, strict=True)):
            lines.append(
                f"warning: {role} was trained with mean and std {_short(trained)}, and config says {_short(given)}: "
                f"--networks.{role}.mean null --networks.{role}.std null takes its own"
            )
        if top1 < 200 / (classes + 1):  # twice chance for many classes, and 67 % of two
            lines.append(
                f"warning: {role} is hardly better than chance ({100 / classes:.2f} % of {classes} classes): random "
                "weights, another order of classes, or another normalisation than it was trained with?"
            )
        for student in (other for other in experiment.distiller.trained() if f"{other}/top1" in start):
            if start[f"{student}/top1"] > top1:
                lines.append(
                    f"warning: {student} starts at {start[f'{student}/top1']:.2f} % on {split}, above its {role}'s "
                    f"{top1:.2f} %: is this the right teacher?"
                )
    return lines


def _short(normalisation: Iterable[Iterable[float]]) -> str:
    return " and ".join(f"[{', '.join(f'{value:.3f}' for value in values)}]" for values in normalisation)


def dry_run(command: Command) -> int:
    """Prints the resolved config, the networks and a time estimate from a few real steps."""
    import yaml

    config = command.config
    print(yaml.safe_dump(_plain(command.resolved()), sort_keys=False))
    experiment = build(command)
    distiller = experiment.distiller
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(config.fit, folder, unused_parameters=distiller.unused_parameters)
    check_batch(experiment, accelerator.num_processes)
    distiller.method.check_data(config.data)
    loader = experiment.train_loader(accelerator)
    steps, _ = durations(config.fit, len(loader))
    if distiller.previous is not None:
        check_saves(config.fit, len(loader))
    module = accelerator.prepare(distiller)
    batches = iter(loader)
    batch: Batch = {k: v.to(accelerator.device) if hasattr(v, "to") else v for k, v in next(batches).items()}
    networks, added = count_forward(distiller, batch)
    for role, output in distiller.outputs(batch["image"][:2]).items():
        network = {**distiller.networks}.get(role, distiller.method)  # a role that the method adds is its own module
        maps = ", ".join("x".join(map(str, m.shape[1:])) for m in output.maps)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        name = distiller.configs[role].name if role in distiller.configs else type(network).__name__
        print(f"{role}: {name}, {sum(p.numel() for p in network.parameters()):,} parameters ({trained:,} trained)")
        print(f"  stage maps C x H x W: {maps}")
        if role in networks:
            print(f"  forward of an image: {networks[role].macs / 1e6:,.2f} M multiply-accumulates (2 FLOPs each)")
    if distiller.adm is not None:
        print(f"adapters (phi): {sum(p.numel() for p in distiller.adm.parameters()):,} parameters")
    if added is not None:
        share = 100 * added.total / sum(2 * network.macs for network in networks.values())
        print(f"ADM adds {added.total / 1e6:.3g} MFLOPs an image ({share:.3g} % of the networks together)")
        print(f"  {added.macs / 1e6:.3g} M multiply-accumulates (heads, phi), {added.others / 1e6:.3g} MFLOPs besides")
    if experiment.noise is not None:
        changed = int((experiment.noise.given != experiment.noise.true).sum())
        print(f"noisy labels: {len(experiment.noise.index):,} drawn anew, {changed:,} of them are wrong")
    optim = config.optimizer.make(distiller.parameter_groups())
    progress = Progress(1, 1 / max(len(loader), 2), steps, steps / len(loader))  # no start of an epoch
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        batch = distiller.before_step(batch, progress)
        for phase in distiller.phases:
            with accelerator.no_sync(module) if distiller.reduces_itself else contextlib.nullcontext():
                losses, _ = module(batch, progress, phase)
                total = sum(value for terms in losses.values() for value in terms.values())
                distiller.backward(losses, total, accelerator)
            distiller.before_update()
            optim.step()
            optim.zero_grad()
        distiller.after_step(batch, progress)
        total.item()
        seconds.append(time.perf_counter() - started)
    step = min(seconds[1:])
    print(f"{len(loader)} steps an epoch, {steps} in all; {step:.3f} s a step on {accelerator.device}")
    print(f"estimate: {steps * step / 3600:.2f} hours, evaluation not counted")
    return DONE


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
