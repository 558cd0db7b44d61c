"""A run: what the training command does once the command line is read."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.dist import barrier, get_dist_info, init_dist
from mmengine.optim import build_optim_wrapper
from mmengine.runner import CheckpointLoader, Runner, set_random_seed
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from core.errors import InputError, TrainingError, first_line
from core.files import write_atomically
from core.training.checkpoint import LAST, goal, latest_checkpoint
from core.training.command import DONE, Stop
from core.training.run import IDENTITY, RunFolder, signed
from core.training.step import bytes_needed, shortest
from core.training.task import dry_run, estimate, exit_code, gigabytes, open_run
from segmentation.config import (
    build,
    check_images,
    check_parts,
    check_pretrained,
    complete,
    load_config,
    map_stride,
)
from segmentation.distiller import ROLES
from segmentation.experiment import as_text, read_own
from segmentation.hooks import RunHook
from segmentation.options import READ_BY_RUNNER, say_odd

# In what a resumed run may differ: where it runs, and how much it says and keeps.
MAY_CHANGE = (
    "data_root", "run.keep", "run.log_every", "run.save_every", "run.trackers",
    "train_dataloader.num_workers", "val_dataloader",
    "env_cfg", "visualizer", "log_level", "custom_imports",
)  # fmt: skip
RESUMED = "resumed-run://"
SMALL = 128  # pixels a side of the images that a dry run takes at the most
TINY = 64  # of those that every run tries its networks with: for it nobody should wait


def train(
    config: str | Path,
    options: Mapping[str, Any],
    *,
    amp: str | None = None,
    out: str | None = None,
    launcher: str | None = None,
    dry: Literal["time"] | bool = False,
) -> int:
    """Trains, resumes or, with ``dry``, only looks; returns the exit code.

    Args: as the options of ``tools/train.py``; ``dry``: "time" to look and to time. Raises: InputError, TrainingError.
    """
    cfg = load_config(config, options)
    if amp is not None:
        scale: Any = "dynamic" if amp == "fp16" else {"enabled": False}  # bf16 has float32's range
        dtype = {"fp16": "float16", "bf16": "bfloat16"}[amp]
        cfg.optim_wrapper.update({"type": "AmpOptimWrapper", "dtype": dtype, "loss_scale": scale})
    say_odd(cfg)
    folder = Path(out or f"runs/{Path(config).stem}/{cfg.model.method}-{cfg.seed}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _processes(launcher, device, cfg) as (rank, processes):
        run = None if dry else open_run(folder, resolved(cfg), MAY_CHANGE, keep=cfg.run.keep, main=rank == 0)
        if not dry and run is None:
            return DONE
        ready = complete(cfg, processes, device)
        set_random_seed(cfg.seed)
        model = build(ready.model)
        for loader in (ready.train_dataloader, ready.val_dataloader):
            check_images(loader, model.student.decode_head)
        check_parts(ready, model)
        check_forward(model, ready)
        with _one_line():
            if run is not None:
                return _run(run, cfg, ready, model)
            model = model.to(device)
            wrapper = build_optim_wrapper(model, ready.optim_wrapper)
            timed = (lambda: time_iterations(model, wrapper, ready)) if dry == "time" else None
            return dry_run(resolved(cfg), describe(model, wrapper, ready), timed)


def _run(run: RunFolder, cfg: Config, ready: Config, model: Any) -> int:
    """``cfg``: of the run, as it is kept; ``ready``: for this machine."""
    _, processes = get_dist_info()

    def read(file: Path) -> dict[str, Any]:
        return read_own(file, run.identity)

    found = latest_checkpoint(run.checkpoints, run.log, read) if run.main else None
    barrier()
    if not run.main and (last := goal(run.checkpoints / f"{LAST}.pth")).exists():
        found = read(last)
    if found is None:
        check_pretrained(ready, model.networks)
    else:
        if other := set(model.state_dict()) ^ set(found["state_dict"]):
            raise TrainingError(f"the checkpoint has other weights than this model, as {min(other)}")
        CheckpointLoader.register_scheme(RESUMED, lambda name, map_location: found, force=True)
        model.teacher_weights = None  # what it started from is not needed any more
        for role in ROLES:
            model.networks[role].backbone.init_cfg = None
    run.open()
    if run.main:
        text = signed(f"{as_text(cfg)}{IDENTITY}{run.identity}\n")
        write_atomically(run.path / "config.py", lambda path: path.write_text(text))
    parts = ("train_dataloader", "val_dataloader", "train_cfg", "val_cfg", "optim_wrapper", "param_scheduler")
    others = ("default_hooks", "custom_hooks", "env_cfg", "log_level", "visualizer", "default_scope", "randomness")
    runner = Runner(
        model=model,
        work_dir=str(run.path / "mmengine"),
        val_evaluator=ready.val_evaluator,
        launcher="none" if processes == 1 else "pytorch",
        load_from=None if found is None else RESUMED,
        resume=found is not None,
        cfg=Config({key: ready[key] for key in READ_BY_RUNNER if key in ready}),  # a whole one is formatted each save
        experiment_name=run.path.name,
        **{key: ready.get(key) for key in (*parts, *others)},
    )
    stop = Stop()
    networks = {role: about(cfg, role, network) for role, network in model.networks.items()}
    summary = {"method": cfg.model.method, "seed": cfg.seed, "networks": networks}
    hook = RunHook(run, cfg, stop, loaded=None if found is None else found["run"], summary=summary)
    runner.register_hook(hook)
    with stop.listening():
        runner.train()
    return exit_code(hook.result)


@contextlib.contextmanager
def _processes(launcher: str | None, device: str, cfg: Config) -> Iterator[tuple[int, int]]:
    """(rank, number) of this process among those of torchrun or another launcher; leaves their group at the end."""
    if launcher is None:
        launcher = "pytorch" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "none"
    if launcher == "none":
        yield 0, 1
        return
    try:
        if device == "cpu":
            torch.distributed.init_process_group("gloo")  # mmengine's own would ask for a GPU
        else:
            init_dist(launcher, **cfg.env_cfg.dist_cfg)
    except (ValueError, KeyError) as error:  # what is not in the environment
        raise InputError(
            f"--launcher {launcher} did not start this process ({first_line(error)}): leave it out"
        ) from error
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
    """A config as ``config.yaml`` holds it: without what ADM's options say in the runs of before they were there."""
    values = cfg.to_dict()
    adm = values["model"]["adm"]
    del adm["delta"]  # of the kd form of divergence, which is refused here
    for key, usual in (("control", "none"), ("phi", "needed"), ("feature_targets", "student")):
        if adm[key] == usual:
            del adm[key]
    return {"task": "segmentation", "method": values["model"].pop("method"), **values}


def about(cfg: Config, role: str, network: Any) -> dict[str, Any]:
    """A network's name and size, for summaries."""
    backbone, head = cfg.model[role].backbone, cfg.model[role].decode_head
    name = f"{backbone.type}-{backbone.get('depth', '')} {head.type}"
    return {"name": name, "parameters": sum(p.numel() for p in network.parameters())}


def describe(model: Any, wrapper: Any, ready: Config) -> Iterator[str]:
    """A dry run's lines: of each network its size and map, what ADM adds, and the memory that an iteration needs."""
    for role, network in model.networks.items():
        told = about(ready, role, network)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        yield f"{role}: {told['name']}, {told['parameters']:,} parameters ({trained:,} trained)"
        height, width = (-(-side // map_stride(ready.model[role])) for side in ready.crop_size)
        yield f"  decode head's map C x H x W: {network.decode_head.channels}x{height}x{width}"
    if model.adm is not None:
        yield f"adapter (phi): {sum(p.numel() for p in model.adm.parameters()):,} parameters"
    yield gigabytes(memory(model, wrapper, ready))


def blank(ready: Config, device: Any, most: int = SMALL) -> tuple[torch.Tensor, list[SegDataSample]]:
    """Two small black images, at ``most`` so many pixels a side, and their labels, to take through the networks."""
    height, width = (min(side, most) for side in ready.crop_size)
    channels = 6 if ready.model.data_preprocessor.type == "ViewsDataPreProcessor" else 3
    labels = PixelData(data=torch.zeros(1, height, width, dtype=torch.long, device=device))
    return torch.zeros(2, channels, height, width, device=device), [SegDataSample(gt_sem_seg=labels)] * 2


def check_forward(model: Any, ready: Config) -> None:
    """Takes a small batch through the networks, which changes nothing in them.

    Raises: InputError where they could be built and cannot be run.
    """
    model.eval()
    try:
        with torch.no_grad():
            images, samples = blank(ready, next(model.parameters()).device, TINY)
            model.loss(images, samples)
            model.predict(images)
    except Exception as error:  # what a head that does not fit its backbone raises
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the networks cannot be run: {first_line(error)}; do in_channels, in_index, dilations and strides of "
            "heads and backbones fit?"
        ) from error
    finally:
        model.train()


def memory(model: Any, wrapper: Any, ready: Config) -> int:
    """Bytes that training needs, from one forward of two small images: what is kept grows with their area."""
    images, samples = blank(ready, next(model.parameters()).device)
    count = round(ready.train_dataloader.batch_size * math.prod(ready.crop_size) / math.prod(images.shape[2:]))
    defaults = wrapper.optimizer.defaults
    moments = 2 if "betas" in defaults else int(defaults.get("momentum", 0) > 0)
    with wrapper.optim_context(model):
        return bytes_needed(model, lambda: model.loss(images, samples), count / 2, moments=moments)


def time_iterations(model: Any, wrapper: Any, ready: Config) -> Iterator[str]:
    """Lines on the time of the shortest of three real iterations, after one that warms up."""
    batches = iter(Runner.build_dataloader(ready.train_dataloader, seed=ready.seed))
    model.train()
    seconds = shortest(lambda: model.train_step(next(batches), optim_wrapper=wrapper)["loss"].item())
    iterations = ready.train_cfg.max_iters
    yield f"{iterations:,} iterations of {ready.train_dataloader.batch_size} images a process"
    yield from estimate(iterations, seconds, next(model.parameters()).device)
