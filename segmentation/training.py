"""A run: what the training command does once the command line is read."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, get_dist_info, init_dist
from mmengine.optim import build_optim_wrapper
from mmengine.runner import CheckpointLoader, Runner, set_random_seed

from core.errors import InputError
from core.files import write_atomically
from core.training.command import DONE, INTERRUPTED, Stop
from core.training.run import RunFolder
from segmentation.checkpoint import LAST, latest_checkpoint, read_checkpoint
from segmentation.config import build, check_data, check_pretrained, complete, load_config
from segmentation.distiller import ROLES
from segmentation.export import as_text
from segmentation.hooks import RunHook

# In what a resumed run may differ: where it runs, and how much it says and keeps.
MAY_CHANGE = (
    "data_root", "run.keep", "run.log_every", "run.save_every", "train_dataloader.num_workers", "val_dataloader",
    "env_cfg", "visualizer", "log_level", "custom_imports",
)  # fmt: skip
READ_BY_RUNNER = ("model_wrapper_cfg", "find_unused_parameters", "sync_bn", "activation_checkpointing", "compile")
RESUMED = "resumed-run://"


def train(
    config: str | Path,
    options: Mapping[str, Any],
    *,
    amp: str | None = None,
    out: str | None = None,
    launcher: str | None = None,
    dry_run: bool = False,
) -> int:
    """Trains, resumes or, with ``dry_run``, only looks; returns the exit code.

    Args: the config; its changed options; bf16, fp16 or None; the run folder; mmengine's launcher, "none" for one
        process (torchrun is recognised unless given).
    Raises: InputError, TrainingError.
    """
    cfg = load_config(config, options)
    if amp is not None:
        scale: Any = "dynamic" if amp == "fp16" else {"enabled": False}  # bf16 has float32's range
        dtype = {"fp16": "float16", "bf16": "bfloat16"}[amp]
        cfg.optim_wrapper.update({"type": "AmpOptimWrapper", "dtype": dtype, "loss_scale": scale})
    folder = Path(out or f"runs/{Path(config).stem}/{cfg.model.method}-{cfg.seed}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _processes(launcher, device, cfg) as (rank, processes):
        run = RunFolder(folder, resolved(cfg), main=rank == 0, may_change=MAY_CHANGE)
        if run.finished and not dry_run:
            run.log(f"{run.path} is finished; its results are in {run.path / 'summary.json'}")
            return DONE
        ready = complete(cfg, processes, device)
        set_random_seed(cfg.seed)
        model = build(ready.model)
        check_data(ready)
        if dry_run:
            return look(cfg, ready, model.to(device))
        with _one_line():
            return _run(run, cfg, ready, model)


def _run(run: RunFolder, cfg: Config, ready: Config, model: Any) -> int:
    """``cfg``: of the run, as it is kept; ``ready``: for this machine."""
    _, processes = get_dist_info()
    found = latest_checkpoint(run.path, run.log) if run.main else None
    barrier()
    if not run.main and (last := run.checkpoints / LAST).exists():
        found = read_checkpoint(last)
    if found is None:
        check_pretrained(ready, model.networks)
    else:
        CheckpointLoader.register_scheme(RESUMED, lambda name, map_location: found, force=True)
        model.teacher_weights = None  # what it started from is not needed any more
        for role in ROLES:
            model.networks[role].backbone.init_cfg = None
    text = as_text(cfg)
    run.open()
    if run.main:
        write_atomically(run.path / "config.py", lambda path: path.write_text(text))
    launcher = "none" if processes == 1 else "pytorch"
    parts = ("train_dataloader", "val_dataloader", "train_cfg", "val_cfg", "optim_wrapper", "param_scheduler")
    others = ("default_hooks", "custom_hooks", "env_cfg", "log_level", "visualizer", "default_scope", "randomness")
    runner = Runner(
        model=model,
        work_dir=str(run.path / "mmengine"),
        val_evaluator=ready.val_evaluator,
        launcher=launcher,
        load_from=None if found is None else RESUMED,
        resume=found is not None,
        cfg=Config({key: ready[key] for key in READ_BY_RUNNER if key in ready}),  # a whole one is formatted each save
        experiment_name=run.path.name,
        **{key: ready.get(key) for key in (*parts, *others)},
    )
    stop = Stop()
    networks = {role: describe(cfg, role, network) for role, network in model.networks.items()}
    summary = {"method": cfg.model.method, "seed": cfg.seed, "networks": networks}
    hook = RunHook(run, cfg, text, stop, resuming=found is not None, summary=summary, **cfg.run)
    runner.register_hook(hook)
    with stop.listening():
        runner.train()
    return DONE if hook.result["status"] == "finished" else INTERRUPTED


@contextlib.contextmanager
def _processes(launcher: str | None, device: str, cfg: Config) -> Iterator[tuple[int, int]]:
    """(rank, number) of this process among those of torchrun or another launcher; leaves their group at the end."""
    if launcher is None:
        launcher = "pytorch" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "none"
    if launcher == "none":
        yield 0, 1
        return
    if device == "cpu":
        torch.distributed.init_process_group("gloo")  # mmengine's own would ask for a GPU
    else:
        init_dist(launcher, **cfg.env_cfg.dist_cfg)
    try:
        yield get_dist_info()
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What a data worker says is wrong with the input comes with its traceback: this leaves the line."""
    try:
        yield
    except InputError as error:
        message = str(error).strip().rpartition("InputError: ")[2]
        raise InputError(message) from error


def resolved(cfg: Config) -> dict[str, Any]:
    """A config as ``config.yaml`` holds it."""
    values = cfg.to_dict()
    return {"task": "segmentation", "method": values["model"].pop("method"), **values}


def describe(cfg: Config, role: str, network: Any) -> dict[str, Any]:
    """A network's name and size, for summaries."""
    backbone, head = cfg.model[role].backbone, cfg.model[role].decode_head
    name = f"{backbone.type}-{backbone.get('depth', '')} {head.type}"
    return {"name": name, "parameters": sum(p.numel() for p in network.parameters())}


def look(cfg: Config, ready: Config, model: Any) -> int:
    """Prints the config, the networks and a time estimate from a few real iterations."""
    print(as_text(cfg))
    for role, network in model.networks.items():
        told = describe(cfg, role, network)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        print(f"{role}: {told['name']}, {told['parameters']:,} parameters ({trained:,} trained)")
    if model.adm is not None:
        print(f"adapter (phi): {sum(p.numel() for p in model.adm.parameters()):,} parameters")
    with _one_line():
        batches = iter(Runner.build_dataloader(ready.train_dataloader, seed=cfg.seed))
        wrapper = build_optim_wrapper(model, ready.optim_wrapper)
        model.train()
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            log = model.train_step(next(batches), optim_wrapper=wrapper)
            log["loss"].item()
            seconds.append(time.perf_counter() - started)
    step, iterations = min(seconds[1:]), cfg.train_cfg.max_iters
    print(f"{step:.3f} s an iteration of {ready.train_dataloader.batch_size} images, {iterations} in all")
    print(f"estimate: {iterations * step / 3600:.2f} hours, evaluation not counted")
    return DONE
