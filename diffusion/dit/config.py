"""The distillation of diffusion transformers as a typed config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.errors import InputError
from core.ranges import Count, NonNegative, Positive, Seed, Share, check_ranges
from core.training.fit import FitConfig
from core.weights import split_key
from diffusion.dit.convert import find_transformer
from diffusion.dit.data import LabelledConfig
from diffusion.dit.distiller import ADMConfig, DistillConfig
from diffusion.dit.model import DiTConfig
from diffusion.training import TrainingConfig


@dataclass(frozen=True)
class DiTTrainingConfig(TrainingConfig):
    """Trains a diffusion transformer alone, or distils a teacher into it: Table 7.

    Args:
        data: latents or images, with labels.
        student: the network that is trained.
        method: vanilla (no teacher), mse (the student imitates the teacher's output), or mse+adm with ADM's losses.
        teacher: fixed weights: a run of this command (its last export), a file or a folder (DiT's published .pt,
            diffusers'); or "online": a fresh network of ``teacher_network`` that trains along.
        teacher_network: the size of a teacher that trains along; that of a file is read off its weights.
        distill: what the student learns from its own task and from the teacher's output.
        adm: ADM's losses; they count only with mse+adm.
        label_dropout: share of labels replaced by the null label, for guidance; both networks get the same ones.
        lr: AdamW's learning rate, constant.
        weight_decay: of AdamW.
        ema: decay of the moving average of the weights, constant from the first step; the average is what is exported.
        gradient_checkpointing: recompute each block in the backward pass, which takes a third more time and a fraction
            of the memory.
        tf32: matrix products in TF32 on a GPU that has it.
        fit: length (``steps``), precision, logging; every ``evaluate_every`` steps a checkpoint and an export.
        batch_size: images per optimiser step, over all processes and accumulated parts together.
        seed: of the networks' start, the order of the data, times and noise.
        teacher_sha256: of the teacher's weights, or of their file; filled in when a run is written down, checked when
            it is read back.
        out: the run folder; the same command again resumes.
        progress_bar: show one (only on a terminal).
    """

    data: LabelledConfig = field(default_factory=LabelledConfig)
    student: DiTConfig = field(default_factory=DiTConfig)
    method: Literal["vanilla", "mse", "mse+adm"] = "mse+adm"
    teacher: str | None = None
    teacher_network: DiTConfig = field(default_factory=lambda: DiTConfig("B/2"))
    distill: DistillConfig = field(default_factory=DistillConfig)
    adm: ADMConfig = field(default_factory=ADMConfig)
    label_dropout: Share = 0.1
    lr: Positive = 1e-4
    weight_decay: NonNegative = 0.0
    ema: Share = 0.9999
    gradient_checkpointing: bool = False
    tf32: bool = True
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=400_000, log_every=100, evaluate_every=50_000))
    batch_size: Count = 256
    seed: Seed = 0
    teacher_sha256: str | None = None
    out: Path = Path("runs/dit")
    progress_bar: bool = True

    def __post_init__(self) -> None:
        check_ranges("--", self)
        if self.method == "vanilla" and self.teacher is not None:
            raise InputError(f"--method vanilla trains the student alone: leave --teacher {self.teacher} out")
        if self.method != "vanilla" and self.teacher is None:
            raise InputError(
                f"--method {self.method} needs --teacher: a file or folder of weights, or online; without one it is "
                "--method vanilla"
            )
        if self.method == "mse+adm" and not (self.adm.alpha or self.adm.gamma or (self.online and self.adm.beta)):
            raise InputError("all of ADM's weights that count here are 0: give --adm.alpha, or --method mse")
        if self.online and self.student.resolved()[3] != self.teacher_network.resolved()[3]:
            ours, theirs = (config.resolved()[3] for config in (self.student, self.teacher_network))
            raise InputError(
                f"the student has patches of {ours} pixels, teacher_network of {theirs}: give both the same"
            )
        if self.fit.epochs is not None:
            raise InputError("fit.epochs does not count here: give --fit.steps")

    @property
    def online(self) -> bool:
        """Whether the teacher trains along."""
        return self.teacher == "online"

    def idle(self) -> dict[str, str]:
        needs = {
            "--adm.": (self.method == "mse+adm", "--method mse+adm"),
            "--distill.": (self.method != "vanilla", "a teacher: --method mse or mse+adm"),
            "--teacher_network": (self.online, "--teacher online"),
            "--adm.beta": (self.online, "--teacher online"),
        }
        return {flag: needed for flag, (counts, needed) in needs.items() if not counts}

    def teacher_files(self) -> Iterable[Path]:
        if self.teacher is None or self.online:
            return ()
        path = teacher_path(self.teacher)
        return [path] if not path.is_dir() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])


def teacher_path(given: str) -> Path:
    """The file, or the folder of diffusers' network, that ``--teacher`` names. Raises: InputError where it is none."""
    path = Path(given)
    if not split_key(path)[0].exists():
        raise InputError(f"--teacher {given} does not exist: name a run, a file or folder of weights, or online")
    return find_transformer(path) if path.is_dir() else path
