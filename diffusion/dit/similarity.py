"""Figure 4 of diffusion transformers: where a DiT's map agrees with its teacher's, at each time and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.adapter import Adapter
from core.errors import InputError
from core.training.checkpoint import numbered, read_state, step_of
from diffusion.consensus import similarity
from diffusion.data import scaled
from diffusion.dit.config import teacher_path
from diffusion.dit.convert import exports, load_dit
from diffusion.dit.data import LabelledData, Latents
from diffusion.dit.gaussian import LinearSchedule
from diffusion.dit.model import DiT
from diffusion.sampling import ImageNoise


@dataclass(frozen=True)
class Pair:
    """Student and teacher in evaluation mode, phi where their widths differ, and which maps ADM compares."""

    student: DiT
    teacher: DiT
    phi: Adapter
    schedule: LinearSchedule
    final_norm: bool
    centre: bool


def find_pair(run: Path, config: Mapping[str, Any], step: int | None, teacher: str | None) -> tuple[Path, Path]:
    """The folders of a run's student, the last unless ``step`` says which, and of its teacher unless that is given.

    ``config``: of the run. Raises: InputError where there is no such student, or no teacher.
    """
    students = {step_of(path.parent): path for path in exports(run) if path.name == "student"}
    if not students or step not in (None, *students):
        raise InputError(f"{run} has no student of iteration {step}, only of {sorted(students)}")
    student = students[max(students) if step is None else step]
    beside, given = student.with_name("teacher"), teacher or config.get("teacher")
    if teacher is None and beside.is_dir():
        return student, beside
    if given is None:
        raise InputError(f"{run} was trained without a teacher: name one by --teacher")
    return student, teacher_path(given)


def load_pair(
    student_path: Path, teacher_path: Path, run: Path | None, config: Mapping[str, Any], device: torch.device | str
) -> Pair:
    """Reads both. Networks of different widths need the run's phi as it was after the student's last step.

    Raises: InputError where they do not fit each other, or there is no phi.
    """
    student, teacher = (load_dit(path).to(device).eval().requires_grad_(False) for path in (student_path, teacher_path))
    for what in ("channels", "input_size", "patch", "classes"):
        ours, theirs = getattr(student, what), getattr(teacher, what)
        if ours != theirs:
            raise InputError(f"{student_path} has {what} {ours}, {teacher_path} {theirs}: they cannot be compared")
    phi = Adapter(student.width, teacher.width)
    if phi.conv is not None:
        phi.load_state_dict(_phi(student_path, run))
    adm = config.get("adm") or {}
    schedule = LinearSchedule().to(device)
    return Pair(student, teacher, phi.to(device), schedule, adm.get("map") == "final_norm", bool(adm.get("centre")))


def _phi(student: Path, run: Path | None) -> dict[str, Tensor]:
    why = "their maps have different channels"
    if run is None:
        raise InputError(f"{why}, and a folder of a network holds no adapter (phi): name the run")
    step = step_of(student.parent)
    folder = next((path for path in numbered(run / "checkpoints") if step_of(path) == step), None)
    if folder is None:
        raise InputError(f"{why}, and {run} keeps no checkpoint of iteration {step} with its adapter (phi)")
    extra = read_state(folder)["extra"]
    phi = {name.removeprefix("adapter."): value for name, value in extra.items() if name.startswith("adapter.")}
    if not phi:
        raise InputError(f"{why}, and {run} was trained without ADM, so that it has no adapter (phi)")
    return phi


def chosen(data: LabelledData, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many images spread evenly: what the networks see ``[N, C, H, W]``, their labels, and what to show of them.

    The last is uint8 ``[N, 1 or 3, H, W]``, of latents three channels by a third of their size.
    """
    positions = torch.tensor([i * len(data.labels) // count for i in range(count)])
    labels = data.labels[positions]
    if not isinstance(data, Latents):
        pixels = data.pixels[positions]
        return scaled(pixels), labels, pixels
    moments = data.read(positions, torch.zeros(count, dtype=torch.bool))
    x = moments[:, 0].float() * data.index.scale
    return x, labels, (127.5 * x[:, : 3 if x.shape[1] >= 3 else 1] / 3 + 128).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def similarities(pair: Pair, x: Tensor, labels: Tensor, times: Sequence[int], seed: int, batch_size: int) -> Tensor:
    """S (Eq. 6) of both networks on the same noisy images, ``[times, N, h, w]`` on the CPU.

    Args: images or latents ``[N, C, H, W]``, each of which keeps its noise over all times.
    """
    device = pair.student.pos_embed.device
    batches = []
    for first in range(0, len(x), batch_size):
        some, y = x[first : first + batch_size].to(device), labels[first : first + batch_size].to(device)
        noise = ImageNoise(seed, range(first, first + len(some)), some.shape[1:])().to(device)
        maps = []
        for time in times:
            t = torch.full((len(some),), time, device=device)
            z = pair.schedule.noisy(some, noise, t)
            ours, theirs = (_map(network, z, t, y, pair.final_norm) for network in (pair.student, pair.teacher))
            maps.append(similarity(pair.phi(ours), theirs, pair.centre).cpu())
        batches.append(torch.stack(maps))
    return torch.cat(batches, dim=1)


def _map(network: DiT, z: Tensor, t: Tensor, y: Tensor, final_norm: bool) -> Tensor:
    tokens, c = network.forward_map(z, t, y)
    return network.final_norm(tokens, c) if final_norm else tokens
