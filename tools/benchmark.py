"""Measures what ADM and the training loop cost, as ratios: both sides in one process and in turn (A B, B A, A B, ...).

    python tools/benchmark.py --rows step_resnet32x4_8x4 loader --out runs/benchmark
    python tools/benchmark.py --compare runs/benchmark-before/benchmark.json

Writes ``benchmark.json`` and ``benchmark.png`` into the folder and prints the table. Seconds of different machines or
runs do not compare, the median of paired ratios does. A step is forward, backward and SGD. Memory is the largest sum of
live tensor bytes from building the networks to the end of their second step: on a GPU what the allocator reports, on
the CPU the same from torch.profiler's record of every allocation and release (temporaries inside operators too).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods import METHODS, Method
from core.errors import InputError, unknown
from core.training.command import run_command
from core.training.distiller import Batch, Distiller, Losses, Progress
from offline_kd.methods import METHODS as OFFLINE_METHODS
from tools import dense_rows, diffusion_rows
from tools.ratios import (
    HEADER,
    Row,
    Values,
    changes,
    cuda_seconds,
    draw,
    line,
    paired,
    peak_bytes,
    ratios,
    seconds,
    summary,
)

EPOCH = 391  # steps of a CIFAR epoch at batch 128, after which fit() saves a checkpoint and draws the curves
MEAN_STD = ((0.5,) * 3, (0.25,) * 3)
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Pair:
    """Teacher and student, the ADM weights and forms of their recipe, and the sizes to measure at."""

    networks: dict[str, str]
    adm: dict[str, Any]
    classes: int
    size: int
    batch: int


CIFAR = Pair({"teacher": "cifar_resnet32x4", "student": "cifar_resnet8x4"}, {}, classes=100, size=32, batch=32)
IMAGENET_ADM = {"alpha": 0.2, "beta": 0.6, "gamma": 0.01, "consensus": "kd"}
IMAGENET = Pair({"teacher": "resnet34", "student": "resnet18"}, IMAGENET_ADM, classes=1000, size=224, batch=8)
TINY = {"teacher": "cifar_resnet14", "student": "cifar_resnet8"}
PAIRS = {"resnet34_18": IMAGENET, "resnet32x4_8x4": CIFAR}


@dataclass(frozen=True)
class Settings:
    """How all rows are measured. ``now``: wall or processor time, the latter for a machine that others use too."""

    device: torch.device
    pairs: int
    quick: bool
    now: Callable[[], float] = time.perf_counter

    def batch(self, pair: Pair) -> dict[str, Any]:
        """One random batch as a loader yields it."""
        count = 2 if self.quick else 128 if self.device.type == "cuda" else pair.batch
        size = 32 if self.quick else pair.size
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=self.device)
        target = torch.randint(0, pair.classes, (count,), device=self.device)
        return {"image": images, "target": target, "index": torch.arange(count, device=self.device), "weight": 1.0}

    def sizes(self, pair: Pair) -> str:
        count, _, size, _ = self.batch(pair)["image"].shape
        return f"batch {count}, {size} px"

    def timer(self, work: Callable[[], object]) -> Callable[[], float]:
        """How long ``work`` takes, by CUDA events on a GPU."""
        return partial(cuda_seconds, work) if self.device.type == "cuda" else partial(seconds, work, self.now)


def make_distiller(
    pair: Pair,
    settings: Settings,
    adm: dict[str, Any] | None,
    channels_last: bool = False,
    made_by: type[Method] = METHODS["dml"],
) -> Any:
    """A method with ADM (its config) or without (None)."""
    from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig, build_networks
    from classification.methods import ADMConfig

    configs = {role: NetworkConfig(name) for role, name in (TINY if settings.quick else pair.networks).items()}
    networks, images = build_networks(configs, pair.classes, seed=0), settings.batch(pair)["image"][:2].cpu()
    method, config = made_by(with_adm=adm is not None), None if adm is None else ADMConfig(**adm)
    normalisation, optimizer, classes = dict.fromkeys(configs, MEAN_STD), OptimizerConfig(), pair.classes
    made = ClassificationDistiller(
        networks,
        configs,
        normalisation,
        method,
        config,
        optimizer,
        images,
        num_classes=classes,
        channels_last=channels_last,
    )
    return made.to(settings.device).train()


def total_of(losses: Losses) -> Tensor:
    first, *others = (value for terms in losses.values() for value in terms.values())
    return sum(others, start=first)


def apply(losses: Losses, optimizer: torch.optim.Optimizer) -> None:
    """What is left of a bare step after the forward."""
    total_of(losses).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_step(
    pair: Pair,
    settings: Settings,
    adm: dict[str, Any] | None,
    variant: str = "",
    repeat: int = 1,
    made_by: type[Method] = METHODS["dml"],
) -> Callable[[], None]:
    """Optimiser steps on one batch as ``fit`` makes them: with the method's own views, backward and optimiser."""
    distiller = make_distiller(pair, settings, adm, variant == "channels_last", made_by)
    if variant == "compile":
        distiller.compile()
    optimizer = sgd(distiller.parameter_groups())
    progress, unscaled = Progress(1, 0.5, 4, 2.0), SimpleNamespace(scaler=None)
    drawn = settings.batch(pair)
    if distiller.method.views == "separate":
        drawn["image"] = torch.stack([drawn["image"]] * len(distiller.networks), dim=1)  # [B, V, C, H, W]

    def step() -> None:
        for _ in range(repeat):
            batch = distiller.before_step(drawn, progress)
            with torch.autocast(settings.device.type, torch.bfloat16, enabled=variant == "bf16"):
                losses, _ = distiller(batch, progress)
            distiller.backward(losses, total_of(losses), unscaled)
            distiller.before_update()
            optimizer.step()
            optimizer.zero_grad()
            distiller.after_step(batch, progress)

    return step


def method_ratio(made_by: type[Method], pair: Pair, settings: Settings, bare: bool = False) -> Values:
    """A step of a method over one of DML, or over the bare cross-entropy step of the same networks."""
    repeat = 5 if settings.device.type == "cuda" else 1
    if bare:
        networks = make_distiller(pair, settings, None).networks
        batch = settings.batch(pair)
        view, target = batch["image"].float() / 255.0, batch["target"]
        forward = lambda: {r: {"ce": F.cross_entropy(n(view), target)} for r, n in networks.items()}  # noqa: E731
        other = bare_loop(networks, forward, repeat)
    else:
        other = make_step(pair, settings, None, repeat=repeat)
    step = make_step(pair, settings, None, repeat=repeat, made_by=made_by)
    times = paired(settings.timer(step), settings.timer(other), settings.pairs)
    values, on = ratios(times, "ms a step", 1e3 / repeat)
    return values, f"{settings.sizes(pair)}, {on}"


def offline_ratio(made_by: type[Method], adm: dict[str, Any] | None, pair: Pair, settings: Settings) -> Values:
    """A step of an offline method over the teacher's forward and the student's bare cross-entropy step."""
    repeat = 5 if settings.device.type == "cuda" else 1
    networks = make_distiller(pair, settings, None, made_by=made_by).networks
    teacher, student, batch = networks["teacher"], networks["student"], settings.batch(pair)
    view, target = batch["image"].float() / 255.0, batch["target"]

    def forward() -> Losses:
        with torch.no_grad():
            teacher(view)
        return {"student": {"ce": F.cross_entropy(student(view), target)}}

    step = make_step(pair, settings, adm, repeat=repeat, made_by=made_by)
    other = bare_loop({"student": student}, forward, repeat)
    times = paired(settings.timer(step), settings.timer(other), settings.pairs)
    values, on = ratios(times, "ms a step", 1e3 / repeat)
    return values, f"{settings.sizes(pair)}, {on}"


def step_ratio(pair: Pair, settings: Settings, variant: str = "", against_fp32: bool = False) -> Values:
    """A step of DML + ADM over one of DML, or over one of DML + ADM in fp32."""
    repeat = 5 if settings.device.type == "cuda" else 1  # so that the host is ahead of the GPU
    a = make_step(pair, settings, pair.adm, variant, repeat)
    b = make_step(pair, settings, pair.adm if against_fp32 else None, "" if against_fp32 else variant, repeat)
    times = paired(settings.timer(a), settings.timer(b), settings.pairs)
    values, on = ratios(times, "ms a step", 1e3 / repeat)
    return values, f"{settings.sizes(pair)}, {on}"


def memory_ratio(pair: Pair, settings: Settings, **changes: Any) -> Values:
    """Peak bytes of DML + ADM over DML; one measurement on the CPU, where it is the same each time."""

    def two_steps(adm: dict[str, Any] | None) -> Callable[[], None]:
        step = make_step(pair, settings, adm, repeat=2)
        step()
        return step

    peaks, configs = [], ({**pair.adm, **changes}, None)
    for _ in range(settings.pairs if settings.device.type == "cuda" else 1):
        (a, kept_a), (b, kept_b) = (peak_bytes(partial(two_steps, adm), settings.device) for adm in configs)
        peaks.append((a, b))
    values, on = ratios(peaks, "MiB", 2**-20)
    return values, f"{settings.sizes(pair)}, {on}; {(a - kept_a) / (b - kept_b):.4f} without weights and momentum"


class Marked:
    """Data that notes when ``fit`` takes the first batch and when it saves."""

    def __init__(self, data: Any, now: Callable[[], float]) -> None:
        self.data, self.now = data, now
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        self.times.append(self.now())
        yield from self.data

    def state_dict(self) -> dict[str, Any]:
        self.times.append(self.now())
        return {}


def fit_seconds(distiller: Distiller, data: Any, steps: int, settings: Settings) -> tuple[float, float]:
    """Durations within one run of ``fit``: its steps with their log points; one checkpoint and one drawing."""
    from accelerate.state import AcceleratorState

    from core.training.fit import FitConfig, fit, make_accelerator
    from core.training.run import RunFolder

    marked: Any = Marked(data, settings.now)

    class Folder(RunFolder):
        def draw(self) -> None:
            super().draw()
            marked.times.append(settings.now())

    AcceleratorState._reset_state(reset_partial_state=True)  # or it refuses another device in the same process
    config = FitConfig(steps=steps, device="cpu" if settings.device.type == "cpu" else "auto")
    with tempfile.TemporaryDirectory() as path, contextlib.redirect_stderr(io.StringIO()):
        run = Folder(Path(path, "run"), {})
        accelerator = make_accelerator(config, run)
        fit(distiller, marked, sgd, lambda epochs: 1.0, config, run, accelerator, progress_bar=False)
    start, saving, drawn, *_ = marked.times
    return saving - start, drawn - saving


def bare_loop(networks: Any, forward: Callable[[], Losses], steps: int) -> Callable[[], None]:
    """Forward, backward and step of the networks, and nothing else."""
    optimizer = sgd([{"params": list(network.parameters())} for network in networks.values()])

    def loop() -> None:
        for _ in range(steps):
            apply(forward(), optimizer)

    return loop


def fit_ratio(settings: Settings) -> Values:
    """Images per second of ``fit`` with the in-memory loader over the bare loop's, for an epoch of CIFAR."""
    from classification.data import Arrays, InMemoryLoader
    from core.distillation import mutual_loss

    steps = 2 if settings.quick else 100 if settings.device.type == "cuda" else 4
    batch = settings.batch(CIFAR)
    target, size = batch["target"], len(batch["target"])
    images = torch.randint(0, 256, (EPOCH * size, 3, 32, 32), dtype=torch.uint8)
    arrays = Arrays(images, target.cpu().repeat(EPOCH), torch.arange(len(images)), "crop_flip", 4)
    loader = InMemoryLoader(arrays, size, train=True, device=settings.device)
    fitted, other = (make_distiller(CIFAR, settings, adm=None) for _ in range(2))
    view, networks = other.views(batch["image"])["teacher"], other.networks
    forward = lambda: mutual_loss({r: n(view) for r, n in networks.items()}, target)  # noqa: E731
    bare = settings.timer(bare_loop(networks, forward, steps))
    saving: list[float] = []

    def fit_epoch() -> float:
        loop, rest = fit_seconds(fitted, loader, steps, settings)
        saving.append(rest)
        return loop / steps * EPOCH + rest

    times = paired(lambda: bare() / steps * EPOCH, fit_epoch, settings.pairs)
    values, on = ratios(times, f"s an epoch, {statistics.median(saving):.2g} s of it for checkpoint and curves")
    return values, f"{settings.sizes(CIFAR)}, {steps} steps at a time, bare : fit {on}"


class TwoLinear(Distiller):
    """The smallest thing that ``fit`` can train: what is left of a step is the loop's own."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({role: nn.Linear(64, 10) for role in ("teacher", "student")})

    def forward(self, batch: Batch, progress: Progress, phase: Any = None) -> tuple[Losses, dict[str, Tensor]]:
        return {r: {"ce": F.cross_entropy(n(batch["image"]), batch["target"])} for r, n in self.networks.items()}, {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(network.parameters())} for network in self.networks.values()]


def fit_overhead(settings: Settings) -> Values:
    """Milliseconds that ``fit`` adds to each step of a bare loop on the CPU: log points count, the checkpoint not."""
    settings = replace(settings, device=torch.device("cpu"))
    steps = 20 if settings.quick else 500
    batch = {"image": torch.randn(64, 64), "target": torch.arange(64) % 10, "index": torch.arange(64), "weight": 1.0}
    fitted, other, progress = TwoLinear(), TwoLinear(), Progress(0, 0.0, 1, 1.0)
    bare = bare_loop(other.networks, lambda: other(batch, progress)[0], steps)
    fit_loop = lambda: fit_seconds(fitted, [batch] * steps, steps, settings)[0]  # noqa: E731
    times = paired(fit_loop, settings.timer(bare), settings.pairs)
    _, on = ratios(times, "ms a step", 1e3 / steps)
    return [1e3 * (a - b) / steps for a, b in times], f"two linear layers, batch 64, {on}"


def loader_ratio(settings: Settings) -> Values:
    """Images per second of the in-memory loader over those of torchvision's transforms in one worker process."""
    from torchvision.datasets import CIFAR100
    from torchvision.transforms import Compose, PILToTensor, RandomCrop, RandomHorizontalFlip

    from classification.data import Arrays, InMemoryLoader

    settings = Settings(torch.device("cpu"), settings.pairs, settings.quick)  # wall time: a worker is another process
    count, epochs = (256, 2) if settings.quick else (5120, 10)
    images, target = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 100
    ours = InMemoryLoader(Arrays(images, target, torch.arange(count), "crop_flip", 4), 128, train=True)
    cifar = CIFAR100.__new__(CIFAR100)  # its way of handing out images, without its files
    cifar.data, cifar.targets, cifar.target_transform = images.permute(0, 2, 3, 1).numpy(), target.tolist(), None
    cifar.transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), PILToTensor()])
    theirs = torch.utils.data.DataLoader(cifar, 128, shuffle=True, num_workers=1, persistent_workers=True)

    epoch_of_theirs = settings.timer(lambda: [None for _ in theirs])
    epochs_of_ours = settings.timer(lambda: [None for _ in range(epochs) for _ in ours])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = paired(epoch_of_theirs, lambda: epochs_of_ours() / epochs, settings.pairs)
    torch.set_num_threads(threads)
    values, on = ratios(times, "us an image", 1e6 / count)
    return values, f"batch 128, one thread, torchvision : ours {on}"


ADM_DML = "DML + ADM / DML"
ROWS = {
    "step_resnet34_18": Row(f"time of a step, {ADM_DML}", partial(step_ratio, IMAGENET), 1.02),
    "step_resnet32x4_8x4": Row(f"time of a step, {ADM_DML}", partial(step_ratio, CIFAR), 1.02),
    "memory_resnet34_18": Row(f"peak memory, {ADM_DML}", partial(memory_ratio, IMAGENET), 1.02),
    "memory_resnet32x4_8x4_adm": Row(f"peak memory, {ADM_DML}, gamma 0", partial(memory_ratio, CIFAR, gamma=0.0), 1.02),
    "memory_resnet32x4_8x4_feature": Row(f"peak memory, {ADM_DML}, gamma 1", partial(memory_ratio, CIFAR), 1.09),
    "fit_cifar": Row("images/s, fit() / bare loop", fit_ratio, 0.97, at_least=True),
    "fit_overhead_ms": Row("time of a step, fit() - bare loop", fit_overhead, 0.10, unit="ms"),
    "loader": Row("images/s, in-memory loader / torchvision's transforms", loader_ratio, 30.0, at_least=True),
}
for _name, _method in METHODS.items():
    _of = partial(method_ratio, _method, replace(CIFAR, batch=16))
    if _name != "dml":
        ROWS[f"method_{_name}"] = Row(f"time of a step, {_name} / DML", _of)
    ROWS[f"bare_{_name}"] = Row(f"time of a step, {_name} / bare cross-entropy", partial(_of, bare=True))
_what = "time of a step, {} / teacher's forward and the student's bare step"
for _name in ("kd", "dkd", "diswot", "norm"):
    ROWS[f"offline_{_name}"] = Row(_what.format(_name), partial(offline_ratio, OFFLINE_METHODS[_name], None, CIFAR))
_of = partial(offline_ratio, OFFLINE_METHODS["kd"], {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}, CIFAR)
ROWS["offline_kd+adm"] = Row(_what.format("kd + ADM"), _of, 1.03)
for _name in ("deeplabv3", "pspnet") if importlib.util.find_spec("mmseg") else ():  # its extra is installed
    _what = f"{_name}, R101 + R18, {ADM_DML}"
    ROWS[f"step_{_name}"] = Row(f"time of a step, {_what}", partial(dense_rows.step_ratio, _name), 1.03)
    ROWS[f"memory_{_name}"] = Row(f"peak memory, {_what}", partial(dense_rows.memory_ratio, _name), 1.05)
    _loop = f"images/s, training command / bare loop, {_name}, R101 + R18"
    ROWS[f"loop_{_name}"] = Row(_loop, partial(dense_rows.loop_ratio, _name), 0.95, at_least=True)
if importlib.util.find_spec("diffusers"):
    _what = "/ two forwards of the teacher and the student's bare step"
    ROWS["step_pd"] = Row(f"time of a step, PD {_what}", partial(diffusion_rows.step_ratio, False), 1.03)
    ROWS["step_pd+adm"] = Row(f"time of a step, PD + ADM {_what}", partial(diffusion_rows.step_ratio, True), 1.05)
    _what = "time of a step, DiT {} / the teacher's forward and the student's bare step"
    ROWS["step_dit_mse"] = Row(_what.format("MSE"), partial(diffusion_rows.dit_step_ratio, False), 1.03)
    ROWS["step_dit_adm"] = Row(_what.format("MSE + ADM"), partial(diffusion_rows.dit_step_ratio, True), 1.05)
    ROWS["sampling"] = Row("images/s, sampling / bare forwards", diffusion_rows.sampling_ratio, 0.97, at_least=True)
GPU_ROWS = {}
for (_name, _pair), _variant in itertools.product(PAIRS.items(), ("bf16", "channels_last", "compile")):
    _what = f"time of a step in {_variant}, DML + ADM"
    _of = partial(step_ratio, _pair, variant=_variant)
    GPU_ROWS[f"step_{_name}_{_variant}"] = Row(f"{_what} / DML", _of)
    GPU_ROWS[f"speed_{_name}_{_variant}"] = Row(f"{_what} / the same in fp32", partial(_of, against_fp32=True))


def make_parser() -> argparse.ArgumentParser:
    epilog = f"rows: {' '.join(ROWS)}\n\non a GPU also: {' '.join(GPU_ROWS)}"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="measure these alone (default: all, see below)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of measurements for each row (20)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder to write to (runs/benchmark)")
    parser.add_argument("--quick", action="store_true", help="tiny networks: shows that all runs, measures nothing")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    clock = "cpu counts processor time, for a machine that others use too (loader, loop_...: always wall)"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier benchmark.json: says what got slower")
    return parser


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier benchmark.json. Raises: InputError where it is none."""
    try:
        rows = json.loads(file.read_text())["rows"]
        if all({"row", "median", "interval", "on"} <= row.keys() for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"--compare {file} is no benchmark.json of an earlier run")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError for an unknown row, a count below 1, or nothing to compare with."""
    args = make_parser().parse_args(argv)
    before = None if args.compare is None else read_rows(args.compare)
    rows = {**ROWS, **GPU_ROWS}
    for name in args.rows or ():
        if name not in rows:
            raise unknown("row", name, rows)
    if min(args.pairs, args.threads) < 1:
        raise InputError("--pairs and --threads must be at least 1")
    from core.analysis.figures import save_json
    from core.training.run import environment

    torch.set_num_threads(args.threads)
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    settings = Settings(torch.device("cuda" if on_gpu else "cpu"), args.pairs, args.quick, now)
    said = {"environment": environment(str(settings.device)), "clock": args.clock, "quick": args.quick}
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for name in args.rows or [*ROWS, *(GPU_ROWS if on_gpu else ())]:
        torch.backends.cudnn.benchmark = True
        results.append(summary(name, rows[name], *rows[name].measure(settings)))
        print(line(results[-1]), flush=True)
        save_json({**said, "rows": results}, args.out / "benchmark.json")
    draw(results, args.out / "benchmark.png")
    if before is not None:
        print(f"\nagainst {args.compare}:", *changes(results, before), sep="\n")
    return 0


if __name__ == "__main__":
    run_command(main)
