"""The benchmark's rows: every measure by its name; those of classification, of the loop and of the loader are here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods import METHODS, Method
from core.adm import ADMConfig
from core.training.distiller import Batch, Distiller, Losses, Progress
from offline_kd.methods import METHODS as OFFLINE_METHODS
from tools.benchmark import dense_rows, diffusion_rows
from tools.benchmark.ratios import PROGRESS, Measure, Settings, Step, Values, bare_step, own_step, paired, ratios, sgd

EPOCH = 391  # steps of a CIFAR epoch at batch 128, after which fit() saves a checkpoint and draws the curves
MEAN_STD = ((0.5,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class Pair:
    """Teacher and student, the ADM weights and forms of their recipe, and the sizes to measure at."""

    networks: dict[str, str]
    adm: ADMConfig
    classes: int
    size: int
    batch: int

    def batch_for(self, settings: Settings) -> dict[str, Any]:
        """One random batch as a loader yields it."""
        count, size = settings.pick(2, self.batch, 128), settings.pick(32, self.size, self.size)
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=settings.device)
        target = torch.randint(0, self.classes, (count,), device=settings.device)
        index = torch.arange(count, device=settings.device)
        return {"image": images, "target": target, "index": index, "weight": 1.0}

    def sizes(self, settings: Settings) -> str:
        count, _, size, _ = self.batch_for(settings)["image"].shape
        return f"batch {count}, {size} px"


CIFAR = Pair({"teacher": "cifar_resnet32x4", "student": "cifar_resnet8x4"}, ADMConfig(), classes=100, size=32, batch=32)
IMAGENET_ADM = ADMConfig(alpha=0.2, beta=0.6, gamma=0.01, consensus="kd")
IMAGENET = Pair({"teacher": "resnet34", "student": "resnet18"}, IMAGENET_ADM, classes=1000, size=224, batch=8)
DML = METHODS["dml"]
TINY = {"teacher": "cifar_resnet14", "student": "cifar_resnet8"}
PAIRS = {"resnet34_18": IMAGENET, "resnet32x4_8x4": CIFAR}


# --- steps ------------------------------------------------------------------------------------------------------------


def make_distiller(
    pair: Pair,
    settings: Settings,
    adm: ADMConfig | None = None,
    channels_last: bool = False,
    method: type[Method] = DML,
) -> Any:
    """A method with ADM (its config) or without (None)."""
    from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig, build_networks

    configs = {role: NetworkConfig(name) for role, name in (TINY if settings.quick else pair.networks).items()}
    networks = build_networks(configs, pair.classes, seed=0)
    images = pair.batch_for(settings)["image"][:2].cpu()
    made = ClassificationDistiller(
        networks, configs, dict.fromkeys(configs, MEAN_STD), method(with_adm=adm is not None), adm, OptimizerConfig(),
        images, num_classes=pair.classes, channels_last=channels_last,
    )  # fmt: skip
    return made.to(settings.device).train()


def make_step(
    pair: Pair, settings: Settings, adm: ADMConfig | None = None, variant: str = "", method: type[Method] = DML
) -> Step:
    """Training's own step of a method on one batch. ``variant``: "bf16", "channels_last" or "compile"."""
    distiller = make_distiller(pair, settings, adm, variant == "channels_last", method)
    if variant == "compile":
        distiller.compile()
    batch = pair.batch_for(settings)
    if distiller.method.views == "separate":
        batch["image"] = torch.stack([batch["image"]] * len(distiller.networks), dim=1)  # [B, V, C, H, W]
    return own_step(distiller, batch, bf16=variant == "bf16")


def make_bare_step(pair: Pair, settings: Settings, student_of: type[Method] | None = None) -> Step:
    """The bare cross-entropy step of both networks, or of this method's student with the teacher's forward."""
    networks, batch = make_distiller(pair, settings, method=student_of or DML).networks, pair.batch_for(settings)
    trained = {"student": networks["student"]} if student_of else dict(networks.items())
    view, target = batch["image"].float() / 255.0, batch["target"]
    return bare_step(
        trained,
        lambda: {role: {"ce": F.cross_entropy(network(view), target)} for role, network in trained.items()},
        teacher=(lambda: networks["teacher"](view)) if student_of else None,
    )


def step_ratio(make_other: Callable[[Pair, Settings], Step], pair: Pair, settings: Settings, **options: Any) -> Values:
    """``make_step`` with these options over another step on the same sizes."""
    other = make_other(pair, settings)
    return settings.step_ratio(make_step(pair, settings, **options), other, pair.sizes(settings))


def memory_ratio(pair: Pair, settings: Settings, **changes: Any) -> Values:
    """Peak bytes of DML + ADM over DML."""
    ours, other = (partial(make_step, pair, settings, adm) for adm in (replace(pair.adm, **changes), None))
    return settings.memory_ratio(ours, other, pair.sizes(settings))


# --- the loop and the loader ------------------------------------------------------------------------------------------


def fit_seconds(distiller: Distiller, data: Iterable[Batch], steps: int, settings: Settings) -> tuple[float, float]:
    """Durations within one run of ``fit``: its steps with their log points; one checkpoint and one drawing."""
    from accelerate.state import AcceleratorState

    from core.training.fit import FitConfig, fit, make_accelerator
    from core.training.run import RunFolder

    times: list[float] = []  # when ``fit`` takes the first batch, when it saves, when it has drawn

    class Marked:
        def __iter__(self) -> Iterator[Batch]:
            times.append(settings.now())
            yield from data

        def state_dict(self) -> dict[str, Any]:
            times.append(settings.now())
            return {}

    class Folder(RunFolder):
        def draw(self) -> None:
            super().draw()
            times.append(settings.now())

    AcceleratorState._reset_state(reset_partial_state=True)  # or it refuses another device in the same process
    config = FitConfig(steps=steps, device="auto" if settings.on_gpu else "cpu")
    with tempfile.TemporaryDirectory() as path, contextlib.redirect_stderr(io.StringIO()):
        run = Folder(Path(path, "run"), {})
        accelerator = make_accelerator(config, run)
        fit(distiller, cast(Any, Marked()), sgd, lambda epochs: 1.0, config, run, accelerator, progress_bar=False)
    start, saving, drawn, *_ = times
    return saving - start, drawn - saving


def fit_ratio(settings: Settings) -> Values:
    """Images per second of ``fit`` with the in-memory loader over the bare loop's, for an epoch of CIFAR."""
    from classification.data import Arrays, InMemoryLoader
    from core.distillation import mutual_loss

    steps = settings.pick(2, 4, 100)
    batch = CIFAR.batch_for(settings)
    target, size = batch["target"], len(batch["target"])
    images = torch.randint(0, 256, (EPOCH * size, 3, 32, 32), dtype=torch.uint8)
    arrays = Arrays(images, target.cpu().repeat(EPOCH), torch.arange(len(images)), "crop_flip", 4)
    loader = InMemoryLoader(arrays, size, train=True, device=settings.device)
    fitted, other = (make_distiller(CIFAR, settings) for _ in range(2))
    view, networks = other.views(batch["image"])["teacher"], other.networks
    forward = lambda: mutual_loss({r: n(view) for r, n in networks.items()}, target)  # noqa: E731
    bare = settings.timer(bare_step(networks, forward), steps)
    saving: list[float] = []

    def fit_epoch() -> float:
        loop, rest = fit_seconds(fitted, loader, steps, settings)
        saving.append(rest)
        return loop / steps * EPOCH + rest

    times = paired(lambda: bare() / steps * EPOCH, fit_epoch, settings.pairs)
    values, on = ratios(times, f"s an epoch, {statistics.median(saving):.2g} s of it for checkpoint and curves")
    return values, f"{CIFAR.sizes(settings)}, {steps} steps at a time, bare : fit {on}"


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
    fitted, other = TwoLinear(), TwoLinear()
    bare = bare_step(dict(other.networks.items()), lambda: other(batch, PROGRESS)[0])
    fit_loop = lambda: fit_seconds(fitted, [batch] * steps, steps, settings)[0]  # noqa: E731
    times = paired(fit_loop, settings.timer(bare, steps), settings.pairs)
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
    epochs_of_ours = settings.timer(lambda: [None for _ in ours], epochs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    on = "batch 128, one thread, torchvision : ours"
    measured = settings.ratio(epoch_of_theirs, lambda: epochs_of_ours() / epochs, on, "us an image", 1e6 / count)
    torch.set_num_threads(threads)
    return measured


# --- all of them ------------------------------------------------------------------------------------------------------

ADM_DML = "DML + ADM / DML"
ROWS: dict[str, Measure] = {}
for _name, _pair in PAIRS.items():
    _of = partial(step_ratio, make_step, _pair, adm=_pair.adm)
    ROWS[f"step_{_name}"] = Measure(f"time of a step, {ADM_DML}", _of, 1.02)
_of = partial(memory_ratio, CIFAR, gamma=0.0)
ROWS |= {
    "memory_resnet34_18": Measure(f"peak memory, {ADM_DML}", partial(memory_ratio, IMAGENET), 1.02),
    "memory_resnet32x4_8x4_adm": Measure(f"peak memory, {ADM_DML}, gamma 0", _of, 1.02),
    "memory_resnet32x4_8x4_feature": Measure(f"peak memory, {ADM_DML}, gamma 1", partial(memory_ratio, CIFAR), 1.09),
    "fit_cifar": Measure("images/s, fit() / bare loop", fit_ratio, 0.97, at_least=True),
    "fit_overhead_ms": Measure("time of a step, fit() - bare loop", fit_overhead, 0.10, unit="ms"),
    "loader": Measure("images/s, in-memory loader / torchvision's transforms", loader_ratio, 30.0, at_least=True),
}
for _name, _method in METHODS.items():
    for _row, _than, _make in (("method", "DML", make_step), ("bare", "bare cross-entropy", make_bare_step)):
        _of = partial(step_ratio, _make, replace(CIFAR, batch=16), method=_method)
        if _row == "bare" or _name != "dml":
            ROWS[f"{_row}_{_name}"] = Measure(f"time of a step, {_name} / {_than}", _of)
_what = "time of a step, {} / teacher's forward and the student's bare step"
for _name in ("kd", "dkd", "diswot", "norm"):
    _method = OFFLINE_METHODS[_name]
    _of = partial(step_ratio, partial(make_bare_step, student_of=_method), CIFAR, method=_method)
    ROWS[f"offline_{_name}"] = Measure(_what.format(_name), _of)
_over = partial(make_bare_step, student_of=OFFLINE_METHODS["kd"])
_of = partial(step_ratio, _over, CIFAR, method=OFFLINE_METHODS["kd"], adm=ADMConfig(alpha=1.0, beta=0.0, gamma=0.0))
ROWS["offline_kd+adm"] = Measure(_what.format("kd + ADM"), _of, 1.03)
for _name in ("deeplabv3", "pspnet") if importlib.util.find_spec("mmseg") else ():  # its extra is installed
    _what = f"{_name}, R101 + R18, {ADM_DML}"
    ROWS[f"step_{_name}"] = Measure(f"time of a step, {_what}", partial(dense_rows.step_ratio, _name), 1.03)
    ROWS[f"memory_{_name}"] = Measure(f"peak memory, {_what}", partial(dense_rows.memory_ratio, _name), 1.05)
    _loop = f"images/s, training command / bare loop, {_name}, R101 + R18"
    ROWS[f"loop_{_name}"] = Measure(_loop, partial(dense_rows.loop_ratio, _name), 0.95, at_least=True)
if importlib.util.find_spec("diffusers"):
    _what = "/ two forwards of the teacher and the student's bare step"
    ROWS["step_pd"] = Measure(f"time of a step, PD {_what}", partial(diffusion_rows.step_ratio, False), 1.03)
    ROWS["step_pd+adm"] = Measure(f"time of a step, PD + ADM {_what}", partial(diffusion_rows.step_ratio, True), 1.05)
    _what = "time of a step, DiT {} / the teacher's forward and the student's bare step"
    ROWS["step_dit_mse"] = Measure(_what.format("MSE"), partial(diffusion_rows.dit_step_ratio, False), 1.03)
    ROWS["step_dit_adm"] = Measure(_what.format("MSE + ADM"), partial(diffusion_rows.dit_step_ratio, True), 1.05)
    ROWS["sampling"] = Measure("images/s, sampling / bare forwards", diffusion_rows.sampling_ratio, 0.97, at_least=True)
GPU_ROWS = {}
for (_name, _pair), _variant in itertools.product(PAIRS.items(), ("bf16", "channels_last", "compile")):
    _what = f"time of a step in {_variant}, DML + ADM"
    _own: dict[str, Any] = {"adm": _pair.adm, "variant": _variant}
    for _row, _than, _other in (("step", "DML", "variant"), ("speed", "the same in fp32", "adm")):
        _of = partial(step_ratio, partial(make_step, **{_other: _own[_other]}), _pair, **_own)
        GPU_ROWS[f"{_row}_{_name}_{_variant}"] = Measure(f"{_what} / {_than}", _of)
