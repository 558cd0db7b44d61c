"""The one reader of weight files: safetensors and torch checkpoints of any layout, read as data and never run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, first_line


def read_state_dict(file: str | Path, inside: Sequence[str] = ("model", "state_dict")) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of a torch checkpoint (.pth, .pt, ...), on the CPU.

    A torch checkpoint is the state dict itself or a dict with it under one of the names ``inside``, the first that
    is there, and may hold numpy scalars beside it. It is read as data: one that would run code is refused. The
    prefixes of DistributedDataParallel and torch.compile are taken off the names.

    Raises: InputError where there is no such file, it cannot be read, or there is no state dict in it.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"no weight file {file}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        with _readable(file):
            state: Any = load_file(file)
    else:
        content = read_torch(file)
        if isinstance(content, Mapping):
            content = next((content[name] for name in inside if name in content), content)
        if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
            names = " or ".join(f'"{name}"' for name in inside)
            raise InputError(f"{file} holds no state dict: give names -> tensors, alone or as {names}")
        state = dict(content)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def read_metadata(file: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` file of ours says: ``architecture``, ``role``, ``num_classes``, ``mean``, ``std``, ...

    Empty for a file that says nothing, as any of another format. Raises: InputError for one that is missing or cut off.
    """
    if not Path(file).is_file():
        raise InputError(f"no weight file {file}")
    if Path(file).suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with _readable(file), safe_open(file, "pt") as opened:
        said: dict[str, Any] = opened.metadata() or {}
    return {k: tuple(json.loads(v)) if k in ("mean", "std") else v for k, v in said.items()}


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
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if "unsupported global" in str(error).lower():  # torch spells it in two ways
            raise InputError(
                f"{file} holds more than tensors and numbers, and reading it could run code: "
                "save its state dict alone, best as .safetensors"
            ) from error
        raise InputError(f"cannot read {file} (incomplete, or not a torch file): {first_line(error)}") from error


def _numpy_scalars() -> list[Any]:
    """What unpickling a numpy number needs; its constructor is named differently by numpy 1 and 2."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *dtypes]


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Writes a ``.safetensors`` file. Equal content gives equal bytes: safetensors itself orders metadata at random."""
    from safetensors.torch import save

    content = save(dict(tensors), dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    said = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} if metadata else {}
    ordered = json.dumps({**said, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)
    file.write_bytes(len(ordered).to_bytes(8, "little") + ordered + content[8 + length :])
