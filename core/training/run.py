"""The run folder: what a run leaves for people and tools to read. Needs neither accelerate nor ``fit``.

``config.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (a line per log point and per evaluation, full
precision), ``log.txt``, ``curves.png``, ``summary.json``, ``checkpoints/``; ``run.lock`` while and after it trains.

``config.yaml`` ends in two comments: the run's identity, a hash of all that decides its results, which its other files
repeat, and a hash of the lines above. A file that a crash or a person has spoiled is thus known everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, TrainingError, first_line, notice, notices
from ..files import files_hash, leftover, make_folder, plain, save_json, write_atomically
from . import lock

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "onedl-mmengine", "onedl-mmcv",
    "onedl-mmsegmentation", "mmengine", "mmcv", "mmsegmentation", "diffusers", "torch-fidelity",
)  # fmt: skip
"""Whose versions ``environment.json`` names, where they are installed."""
IDENTITY, DIGEST = "# run: ", "# sha256 of the lines above: "


class RunFolder:
    """One run's folder. Only the main process writes; the others hold it with ``main=False`` and write nothing.

    Args: the folder; the resolved config; the keys (dotted prefixes) in which a resumed run may differ.
    Nothing is written before ``open``, so that a command that turns out wrong leaves no folder behind.
    Raises: InputError where the folder holds a run of another config (names the key) or something else altogether.
    """

    def __init__(
        self, path: Path | str, config: Mapping[str, Any], *, main: bool = True, may_change: Sequence[str] = ()
    ) -> None:
        self.path, self.config, self.main = Path(path), plain(config), main
        self.checkpoints = self.path / "checkpoints"
        self.metrics_file = self.path / "metrics.jsonl"
        self.may_change = tuple(may_change)
        decides = {key: value for key, value in flatten(self.config).items() if not self._may_change(key)}
        self.identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        self._check()

    def _may_change(self, key: str) -> bool:
        return any(key == free or key.startswith(f"{free}.") for free in self.may_change)

    def _check(self) -> None:
        file = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: --out names the folder of a run")
        if self.main:
            lock.check_free(self.path)
        if not file.exists():
            others = [p for p in self.path.glob("*") if not leftover(p) and p.name != lock.NAME]
            if others and not self._own("environment.json"):  # else it is this run, and its config.yaml was lost
                raise InputError(f"{self.path} is not empty and holds no run (no config.yaml): choose another --out")
            return
        before, now = flatten(read_config(file)), flatten(self.config)
        first = ("task", "method")  # of another task or method everything differs
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key not in first, key)):
            if before.get(key) != now.get(key) and not self._may_change(key):
                then = f"with {key} = {before[key]!r}" if key in before else f"without {key}"
                says = repr(now[key]) if key in now else "nothing of it"
                raise InputError(
                    f"{self.path} holds a run {then}, this command says {says}: "
                    "choose another --out, or give that value to resume"
                )

    def open(self) -> None:
        """Makes the folder, takes its lock and writes ``config.yaml``.

        Raises: InputError where there can be no such folder, or another process trains in it.
        """
        import yaml

        if not self.main:
            return
        make_folder(self.path, "--out")
        lock.hold(self.path)
        if (self.path / "config.yaml").exists():
            self._check()  # again: nobody else can change it now; other ranks may have begun to write beside it
        text = signed(yaml.safe_dump(self.config, sort_keys=False) + f"{IDENTITY}{self.identity}\n")
        write_atomically(self.path / "config.yaml", lambda p: p.write_text(text))
        for message in notices():
            self._log(message)

    @property
    def finished(self) -> bool:
        """Whether the run reached its end. A spoiled ``summary.json`` says nothing: it is written anew."""
        return self._own("summary.json").get("status") == "finished"

    def _own(self, name: str) -> dict[str, Any]:
        """What one of the run's JSON files says; nothing where it is not there, damaged or another run's."""
        file = self.path / name
        try:
            values = read_json(file) if file.exists() else {}
        except InputError as error:
            self.say(f"{error}: it is written anew")
            return {}
        if values.get("run", self.identity) != self.identity:
            self.say(f"{file} is another run's: it is written anew")
            return {}
        return values

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        if self.main:
            save_signed_json({"run": self.identity, **values}, self.path / name)

    def write_environment(self, device: str) -> None:
        """``environment.json``: appended to on each start, so that a resumed run names every machine it ran on."""
        if self.main:
            starts = self._own("environment.json").get("starts", [])
            self.write_json("environment.json", {"starts": [*starts, environment(device)]})

    def metric(self, values: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        if self.main:
            _append(self.metrics_file, json.dumps(plain(values, finite=True)))

    def shown(self, key: str) -> str:
        """What people see for a key of ``metrics.jsonl``: DML's own term stands there as "kd", as any imitation's."""
        role, slash, term = key.rpartition("/")
        dml = str(self.config.get("method", "")).partition("+")[0] == "dml"
        return f"{role}{slash}dml" if dml and slash and term == "kd" else key

    def metrics_size(self) -> int:
        """Bytes of ``metrics.jsonl``, which are on the disk then: a checkpoint remembers them."""
        if not self.metrics_file.exists():
            return 0
        with open(self.metrics_file, "rb") as opened:
            os.fsync(opened.fileno())
        return self.metrics_file.stat().st_size

    def metrics_hash(self) -> dict[str, str]:
        """By what ``metrics.jsonl`` as it is now is known again."""
        return {"sha256": files_hash([self.metrics_file])} if self.main and self.metrics_file.exists() else {}

    def cut_metrics(self, size: int, sha256: str | None = None) -> None:
        """Cuts ``metrics.jsonl`` back to a checkpoint's size; lines that a crash spoiled go too, which is said.

        ``sha256``: of what is kept, where that is known.
        """
        if not self.main or not (self.metrics_file.exists() or size):
            return
        content = self.metrics_file.read_bytes() if self.metrics_file.exists() else b""
        good = b"".join(line for line in content[:size].splitlines(keepends=True) if _whole(line) is not None)
        if len(good) < size or (sha256 and hashlib.sha256(good).hexdigest() != sha256):
            self.log(
                f"{self.metrics_file} lacks {size - len(good)} of {size} bytes, or they are damaged: it goes on so"
            )
        if good != content:
            write_atomically(self.metrics_file, lambda file: file.write_bytes(good))

    def say(self, message: str) -> None:
        """A line on the terminal alone: a command that may still be refused writes nothing."""
        if self.main:
            print(message, file=sys.stderr)

    def log(self, message: str, *, shown: bool = True) -> None:
        """A line in ``log.txt`` and, unless it is not ``shown``, on the terminal (clear of the progress bar)."""
        if self.main:
            from tqdm import tqdm

            if shown:
                tqdm.write(message, file=sys.stderr)
            self._log(message)

    def _log(self, message: str) -> None:
        _append(self.path / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def draw(self) -> None:
        """``curves.png`` from ``metrics.jsonl``."""
        if self.main:
            from ..analysis.curves import draw_curves

            if lines := read_metrics(self.metrics_file):
                metrics = [{self.shown(key): value for key, value in line.items()} for line in lines]
                try:
                    draw_curves(metrics, self.path / "curves.png")
                except (InputError, TrainingError) as error:  # no picture ends a run
                    self.log(f"{error}; the training goes on")


def _append(file: Path, line: str) -> None:
    try:
        with open(file, "a") as opened:
            opened.write(f"{line}\n")
    except OSError as error:
        raise TrainingError(f"cannot write {file}: {error.strerror}") from error


def _whole(line: bytes) -> dict[str, Any] | None:
    """What a line of ``metrics.jsonl`` says; None where it is cut off or spoiled."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_metrics(file: Path, summary: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """All lines of a ``metrics.jsonl``, none where there is no file; one that is not whole is left out, which is said.

    ``summary``: of the run; where it knows the file, or its beginning if the run goes on, as another, that is said too.
    """
    content, summary = file.read_bytes() if file.exists() else b"", summary or {}
    lines, known = content.splitlines(keepends=True), summary.get("metrics", {}).get("sha256")
    rows, finished = [_whole(line) for line in lines], summary.get("status") == "finished"
    if known and known not in (_digests(lines)[-1:] if finished else _digests(lines)):
        notice(f"{file} is damaged: it is not what it was when the run ended, and neither may be what is read of it")
    elif None in rows:
        notice(f"{file}, line {rows.index(None) + 1}, is damaged and left out")
    return [row for row in rows if row is not None]


def _digests(lines: Sequence[bytes]) -> list[str]:
    """Of no line, of the first, of the first two, ..."""
    running = hashlib.sha256()
    digests = [running.hexdigest()]
    for line in lines:
        running.update(line)
        digests.append(running.hexdigest())
    return digests


def signed(text: str) -> str:
    """A text of whole lines and below it a comment by which ``read_signed`` knows that nothing was lost."""
    return f"{text}{DIGEST}{hashlib.sha256(text.encode()).hexdigest()}\n"


def read_signed(file: Path) -> str:
    """What was ``signed``. Raises: InputError where it is not whole: cut off, spoiled, or changed by hand."""
    try:
        text, mark, digest = file.read_text().rpartition(DIGEST)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}") from error
    if not mark and _of_earlier_version(file.parent):
        return digest
    if not mark or digest.strip() != hashlib.sha256(text.encode()).hexdigest():
        raise InputError(f"{file} is damaged, or was changed by hand: delete it, and the run's command writes it again")
    return text


def _of_earlier_version(folder: Path) -> bool:
    """Whether a run was begun before its files repeated its identity; nothing was signed then."""
    try:
        return "run" not in read_json(folder / "environment.json")
    except InputError:
        return False


def load_yaml(text: str) -> Any:
    """What a YAML text says. Raises: yaml.YAMLError."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C's is ten times as fast, where it was built
    return yaml.load(text, loader)


def read_config(file: Path) -> dict[str, Any]:
    """A run's ``config.yaml``. Raises: InputError where it is not whole."""
    return load_yaml(read_signed(file)) or {}


def identity_of(file: Path) -> str:
    """The run's identity, which the end of its ``config.yaml`` says."""
    return said_identity(read_signed(file))


def said_identity(text: str) -> str:
    """The run's identity, of the text of its ``config.yaml``; "" in one of an earlier version."""
    _, mark, identity = text.rpartition(IDENTITY)
    return identity.strip() if mark else ""


def digest_of(values: Mapping[str, Any]) -> str:
    """By what JSON is known to be as it was written."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def save_signed_json(values: Mapping[str, Any], file: Path) -> None:
    """As ``save_json``, with a digest by which ``read_json`` knows that nothing was lost."""
    values = plain(values, finite=True)
    save_json({**values, "sha256": digest_of(values)}, file)


def identity_in(values: Any) -> str | None:
    """The identity of the run whose JSON file says this; None where it says none."""
    run = values.get("run") if isinstance(values, Mapping) else None
    return run if isinstance(run, str) and re.fullmatch("[0-9a-f]{64}", run) else None


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file of a run says, signed or not. Raises: InputError where it is damaged."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is damaged (it holds a {type(values).__name__})")
    digest = values.pop("sha256", None)
    if (digest is not None or identity_in(values)) and digest != digest_of(values):
        raise InputError(f"{file} is damaged, or was changed by hand")
    return values


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
