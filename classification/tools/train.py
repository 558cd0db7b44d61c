"""Trains teacher and student together on one data set, with one method of the paper.

    python classification/tools/train.py --config classification/recipes/cifar100.yaml --method dml+adm --out runs/x

The same command again resumes where the run stopped. Several processes: `accelerate launch` or `torchrun` before it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from core.training.command import DONE, INTERRUPTED, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    from classification.config import FREE_KEYS, parse_command

    command = parse_command(argv)
    config = command.config

    from classification.data.noise import save_noise
    from classification.evaluation import evaluate
    from classification.experiment import build, check_batch
    from core.training.fit import durations, fit, make_accelerator
    from core.training.run import RunFolder, is_main_process
    from core.training.schedule import make_schedule
    from core.training.seed import seed_everything

    if command.dry_run:
        return dry_run(command)
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
    seed_everything(config.seed, "training", accelerator.process_index)

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

    def look() -> dict[str, Any]:
        values = evaluate(distiller, looks[selected_on], accelerator).values
        result: dict[str, Any] = {"split": selected_on, **values}
        if selected_on != "test":
            test = evaluate(distiller, looks["test"], accelerator).values
            result |= {f"test/{name}": value for name, value in test.items()}
        return result

    epochs = durations(config.fit, len(loader))[0] / len(loader)
    schedule = make_schedule(config.schedule, epochs)
    if experiment.noise is not None and run.main:
        run.open()
        save_noise(experiment.noise, run.path / "label_noise.safetensors")
    result = fit(
        distiller,
        loader,
        optimizer=config.optimizer.make,
        schedule=schedule,
        config=config.fit,
        run=run,
        accelerator=accelerator,
        evaluate=look,
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
        },
        progress_bar=config.progress_bar,
    )
    accelerator.end_training()
    return DONE if result["status"] == "finished" else INTERRUPTED


def dry_run(command: Any) -> int:
    """Prints the resolved config, the networks and a time estimate from a few real steps."""
    import tempfile

    import yaml

    from classification.experiment import build, check_batch
    from classification.flops import count_forward
    from classification.predictions import check_saves
    from core.training.distiller import Batch, Progress
    from core.training.fit import durations, make_accelerator

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
    import json

    return json.loads(json.dumps(value, default=str))


if __name__ == "__main__":
    run_command(main)
