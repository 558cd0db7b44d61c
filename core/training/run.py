"""The run folder: what a run leaves for people and tools to read. Needs neither accelerate nor ``fit``.

``config.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (a line per log point and per evaluation, full
precision), ``log.txt``, ``curves.png``, ``summary.json``, ``checkpoints/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, TrainingError, notices
from ..files import leftover, make_folder, plain, save_json, write_atomically

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "onedl-mmengine", "onedl-mmcv",
    "onedl-mmsegmentation", "mmengine", "mmcv", "mmsegmentation", "diffusers", "torch-fidelity",
)  # fmt: skip
"""Whose versions ``environment.json`` names, where they are installed."""


class RunFolder:
    """One run's folder. Only the main process writes; the others hold it with ``main=False`` and write nothing.

    Args: the folder; the resolved config; the keys (dotted prefixes) in which a resumed run may differ.
    Nothing is written before ``open``, so that a command that turns out wrong leaves no folder behind.
    Raises: InputError where the folder holds a run of another config (names the key) or something else altogether.
    """

    def __init__(
        self, path: Path | str, config: Mapping[str, Any], *, main: bool = True, may_change: Sequence[str] = ()
    ) -> None:
        self.path, self.config, self.main = Path(path), dict(config), main
        self.checkpoints = self.path / "checkpoints"
        self.metrics_file = self.path / "metrics.jsonl"
        self._check(may_change)

    def _check(self, may_change: Sequence[str]) -> None:
        import yaml

        file = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: --out names the folder of a run")
        if not file.exists():
            if self.path.exists() and any(not leftover(file) for file in self.path.iterdir()):
                raise InputError(f"{self.path} is not empty and holds no run (no config.yaml): choose another --out")
            return
        before = flatten(yaml.safe_load(file.read_text()) or {})
        now = flatten(plain(self.config))
        first = ("task", "method")  # of another task or method everything differs
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key not in first, key)):
            if before.get(key) != now.get(key) and not any(key == f or key.startswith(f"{f}.") for f in may_change):
                then = f"with {key} = {before[key]!r}" if key in before else f"without {key}"
                says = repr(now[key]) if key in now else "nothing of it"
                raise InputError(
                    f"{self.path} holds a run {then}, this command says {says}: "
                    "choose another --out, or give that value to resume"
                )

    def open(self) -> None:
        """Makes the folder and writes ``config.yaml``. Raises: InputError where there can be no such folder."""
        import yaml

        if not self.main:
            return
        make_folder(self.path, "--out")
        text = yaml.safe_dump(plain(self.config), sort_keys=False)
        write_atomically(self.path / "config.yaml", lambda p: p.write_text(text))
        for message in notices():
            self._log(message)

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        file = self.path / "summary.json"
        return file.exists() and json.loads(file.read_text()).get("status") == "finished"

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        if self.main:
            save_json(values, self.path / name)

    def write_environment(self, device: str) -> None:
        """``environment.json``: appended to on each start, so that a resumed run names every machine it ran on."""
        file = self.path / "environment.json"
        starts = json.loads(file.read_text())["starts"] if self.main and file.exists() else []
        self.write_json("environment.json", {"starts": [*starts, environment(device)]})

    def metric(self, values: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        if self.main:
            _append(self.metrics_file, json.dumps(plain(values, finite=True)))

    def metrics_size(self) -> int:
        """Bytes of ``metrics.jsonl``: a checkpoint remembers it, a resume cuts the file back to it."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def cut_metrics(self, size: int) -> None:
        if self.main and self.metrics_size() > size:
            os.truncate(self.metrics_file, size)

    def log(self, message: str) -> None:
        """A line on the terminal (clear of the progress bar) and in ``log.txt``."""
        if self.main:
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)
            self._log(message)

    def _log(self, message: str) -> None:
        _append(self.path / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def draw(self) -> None:
        """``curves.png`` from ``metrics.jsonl``."""
        if self.main:
            from ..analysis.curves import draw_curves

            if metrics := read_metrics(self.metrics_file):
                draw_curves(metrics, self.path / "curves.png")


def _append(file: Path, line: str) -> None:
    try:
        with open(file, "a") as opened:
            opened.write(f"{line}\n")
    except OSError as error:
        raise TrainingError(f"cannot write {file}: {error.strerror}") from error


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All lines of a ``metrics.jsonl``, none where there is no file; a last one that is not whole is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in (lines if not lines or lines[-1].endswith("}") else lines[:-1])]


def is_main_process() -> bool:
    """Before any process group exists: whether this is the process that writes (torchrun's and accelerate's RANK)."""
    return os.environ.get("RANK", "0") == "0"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def environment(device: str) -> dict[str, Any]:
    """Commit, versions, device and command of this process."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def git(*arguments: str) -> str | None:
        root = Path(__file__).resolve().parents[2]
        command = ["git", "-C", str(root), *arguments]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return None

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": [Path(sys.argv[0]).name if sys.argv[0].startswith("-") else sys.argv[0], *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "cpu": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _cpu_model() -> str:
    """What Linux calls the processor, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
