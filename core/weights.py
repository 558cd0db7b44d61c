"""The one reader of weight files: safetensors and torch checkpoints of any layout, read as data and never run.

``FILE#KEY`` names one of several state dicts of a checkpoint, wherever a weight file is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, first_line, notice
from .files import files_hash, how_to_make

# What people call the moving average of the weights and the weights themselves, the first that is there counts.
_AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "ema_model", "net_ema")
_TRAINED = ("model", "state_dict", "model_state_dict", "net", "network", "params", "weights")
_COUNTERS = ("n_averaged", "steps")  # of torch's AveragedModel and mmengine's, beside "module."
# What checkpoints hold beside the weights. None of it is needed: something that does nothing takes its place.
_BESIDE = (
    "argparse.Namespace", "types.SimpleNamespace", "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.Config", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "datetime.datetime", "datetime.date", "datetime.timedelta", "builtins.list",
    "builtins.dict", "builtins.getattr",
)  # fmt: skip
_MAPPINGS = (
    "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "mmengine.config.config.ConfigDict",
    "yacs.config.CfgNode",
)  # fmt: skip


class _Inert:
    def __init__(self, *content: Any, **more: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _InertMapping:
    def __new__(cls, *content: Any) -> Any:
        return OrderedDict()  # which torch fills


def split_key(file: str | Path) -> tuple[Path, str]:
    """``FILE#KEY`` as the file and the key in it, "" where none is named. A name may have a # of its own."""
    name, mark, key = str(file).rpartition("#")
    return (Path(name), key) if mark and not Path(file).exists() and Path(name).is_file() else (Path(file), "")


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of a torch checkpoint (.pth, .pt, ...), on the CPU.

    A torch checkpoint is the state dict itself or a dict that holds it, with whatever inert beside it: by the key that
    ``FILE#KEY`` names, else a usual one, else as the only one. Of weights and their moving average the average is
    taken, and a line says so. It is read as data: a file that would run code is refused. The prefixes of
    DistributedDataParallel, averaged models and torch.compile are taken off the names.

    Raises: InputError where there is no such file, it cannot be read, or there is no state dict in it.
    """
    path = split_key(file)[0]
    if not path.is_file():
        raise InputError(f"no weight file {path}{how_to_make(path)}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with _readable(path):
            return state_dict_of(file, load_file(path))
    return state_dict_of(file, read_torch(path))


def state_dict_of(file: str | Path, content: Any) -> dict[str, Tensor]:
    """``read_state_dict`` of a file whose content was read already. Raises: InputError where there is none in it."""
    path, key = split_key(file)
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in _choose(path, key, content).items()}
    while (names := [n for n in state if n not in _COUNTERS]) and all(n.startswith("module.") for n in names):
        state = {name.removeprefix("module."): state[name] for name in names}
    return state


def _choose(file: Path, key: str, content: Any) -> Mapping[str, Tensor]:
    """The state dict in what a file holds. Raises: InputError naming what it holds instead."""
    if not key and _is_state_dict(content):
        return content
    held = content if isinstance(content, Mapping) else {}
    states = {name: value for name, value in held.items() if isinstance(name, str) and _is_state_dict(value)}
    averages, trained = ([name for name in known if name in states] for known in (_AVERAGES, _TRAINED))
    if "meta" in held and "ema_state_dict" in averages and "state_dict" in trained:
        averages, trained = ["state_dict"], ["ema_state_dict"]  # mmengine swaps the two when it saves
    usual = averages or trained or list(states)
    if not key and (averages or trained or len(states) == 1):
        key = usual[0]
        if averages and trained:
            notice(f"{file}: {key} was taken, the moving average of the weights; {file}#{trained[0]} takes the others")
    if key in states:
        return states[key]
    keys = ", ".join(str(name)[:40] for name in list(held)[:8]) + (", ..." if len(held) > 8 else "")
    found = f"its keys are {keys}" if held else f"it is {'empty' if content == {} else f'a {type(content).__name__}'}"
    what = f"no state dict {key}" if key else f"{'several state dicts' if states else 'no state dict'}"
    mend = (
        f"name one by {file}#KEY, KEY one of {', '.join(states)}"
        if states
        else ("give names -> tensors, alone or under a key such as model or state_dict")
    )
    raise InputError(" ".join(f"{file} holds {what} ({found}): {mend}".split()))


def _is_state_dict(content: Any) -> bool:
    """Whether these are names -> tensors with values: dense, and not left out (as on the device "meta")."""
    return isinstance(content, Mapping) and bool(content) and all(
        isinstance(name, str) and torch.is_tensor(v) and v.layout == torch.strided and v.device.type == "cpu"
        and not v.is_quantized
        for name, v in content.items()
    )  # fmt: skip


def weights_hash(files: Iterable[str | Path], *known: str | None) -> str:
    """SHA-256 of the weights in files: of names, types, shapes and values, in whatever order and format they are saved.

    What a file says of ``mean``, ``std`` and ``size`` counts too, since results follow from it, but no other metadata.

    ``known``: hashes on record, each of the weights or, as published files are known, of the files' bytes; the first
    is then returned instead. Raises: InputError where the weights are others.
    """
    state: dict[str, Tensor] = {}
    files, digest = list(files), hashlib.sha256()
    for file in files:
        state |= read_state_dict(file)
        if before := {k: v for k, v in sorted(read_metadata(file).items()) if k in ("mean", "std", "size")}:
            digest.update(f"{before}\n".encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    on_record, found = list(filter(None, known)), digest.hexdigest()
    if set(on_record) - {found} and (others := set(on_record) - {found, files_hash(split_key(f)[0] for f in files)}):
        raise InputError(
            f"{files[0]} is not the weight file on record: the SHA-256 of its weights, mean and std is {found[:12]}..."
            f", and not {others.pop()[:12]}...: put that file back, or start a new run"
        )
    return on_record[0] if on_record else found


def check_finite(file: str | Path, state: Mapping[str, Tensor], *, training: bool) -> None:
    """Says which weight of a file is NaN or infinite. Raises: InputError, where it is to be trained with."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            said = f"{file}: the weight {name} is not finite (NaN or infinite)"
            if training:
                raise InputError(f"{said}: start from another file")
            notice(f"{said}, and so is what the network says")
            return


def read_metadata(file: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` file of ours says: ``architecture``, ``role``, ``num_classes``, ``mean``, ``std``,
    ``size``, ...

    Empty for a file that says nothing, as any of another format.
    Raises: InputError for one that is missing or cut off, or whose numbers are none.
    """
    file = split_key(file)[0]
    if not file.is_file():
        raise InputError(f"no weight file {file}")
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with _readable(file), safe_open(file, "pt") as opened:
        said: dict[str, Any] = {key: " ".join(value.split()) for key, value in (opened.metadata() or {}).items()}
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        if key in said:
            said[key] = _channels(file, key, said[key], least)
    for key in ("num_classes", "heads", "size"):
        if key in said and not re.fullmatch(r"[1-9][0-9]{0,8}", said[key]):
            raise InputError(f"{file}: its metadata says {key} {said[key][:40]!r}, which is no number above 0")
    return said


def _channels(file: Path, key: str, text: str, least: float) -> tuple[float, ...]:
    """Numbers above ``least``, one for each channel (1 or 3). Raises: InputError."""
    try:
        values = json.loads(text)
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        if not isinstance(values, list) or len(values) not in (1, 3) or len(numbers) != len(values):
            raise ValueError
        if not all(math.isfinite(value) and value > least for value in numbers):
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        above = " above 0" if least == 0 else ""
        raise InputError(
            f"{file}: its metadata says {key} {text[:40]!r}, which is no list of 1 or 3 numbers{above}: give the "
            "weights in another file"
        ) from error
    return tuple(values)


@contextmanager
def _readable(file: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {file} (incomplete, or not a safetensors file): {first_line(error)}") from error


def read_torch(file: str | Path) -> Any:
    """Whatever a torch file holds, on the CPU. Raises: InputError for a damaged file and one that could run code."""
    try:
        beside: list[Any] = [(_Inert, name) for name in _BESIDE] + [(_InertMapping, name) for name in _MAPPINGS]
        if zipfile.is_zipfile(file):  # torch does not look at its checksums
            with zipfile.ZipFile(file) as archive:
                if changed := archive.testzip():
                    raise ValueError(f"{changed} in it is not what was saved")
        with torch.serialization.safe_globals(_numpy_scalars() + beside):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition("WeightsUnpickler error: ")[2].strip()
        if refused := re.search(
            r"^Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)|^Can only.* <class '(\S+)'", text
        ):
            raise InputError(
                f"{file} holds a {next(filter(None, refused.groups()))}, which is no tensor or number, and reading it "
                "could run code: save its state dict alone, best as .safetensors"
            ) from error
        reason = (text or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {file} (incomplete, or not a torch file): {reason}") from error


def _numpy_scalars() -> list[Any]:
    """What unpickling a numpy number needs; its constructor is named differently by numpy 1 and 2."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *dtypes]


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> str:
    """Writes a ``.safetensors`` file; returns its SHA-256.

    Equal content gives equal bytes: safetensors itself orders metadata at random.
    """
    from safetensors.torch import save

    content = memoryview(save(dict(tensors), dict(metadata)))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:end]))
    said = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} if metadata else {}
    ordered = json.dumps({**said, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)
    digest = hashlib.sha256()
    with open(file, "wb") as opened:
        for part in (len(ordered).to_bytes(8, "little"), ordered, content[end:]):
            opened.write(part)
            digest.update(part)
    return digest.hexdigest()
