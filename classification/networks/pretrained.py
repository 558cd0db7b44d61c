"""Pre-trained networks: which file a config's ``weights`` names, what that file says of itself, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import files_hash
from core.training.checkpoint import LAST
from core.weights import read_metadata


def find_weights(place: str | Path, role: str, architecture: str) -> Path:
    """The weight file of a network: ``place`` itself, or the one in a run folder or in one of its checkpoint folders.

    Args:
        place: a weight file; a run folder of ours (its last checkpoint counts); a checkpoint folder (last, best,
            step-00000123).
        role: the role asked for. A folder's file of that role is taken; without one, the folder's only file of that
            architecture (its only teacher's, where a teacher is asked for and others fit too).
        architecture: the network's name.
    Raises: InputError where there is no such file, or several.
    """
    place = Path(place)
    if place.is_file():
        return place
    if not place.is_dir():
        raise InputError(f"no weight file {place}")
    last = place / "checkpoints" / LAST
    folder = last if last.is_dir() else place
    if (own := folder / f"{role}.safetensors").is_file():
        return own
    said = {file: read_metadata(file).get("architecture", "unknown") for file in sorted(folder.glob("*.safetensors"))}
    if not said:
        raise InputError(
            f"{place} holds no weights: give a weight file, a run folder with a checkpoint, or a checkpoint folder"
        )
    fitting = [file for file, name in said.items() if same_architecture(name, architecture)]
    alike = [file for file in fitting if file.stem.partition("_")[0] == role.partition("_")[0]]
    for found in (alike, fitting):
        if len(found) == 1:
            return found[0]
    files = ", ".join(f"{file.stem} ({name})" for file, name in said.items())
    which = "several of its networks are" if fitting else "none of its networks is"
    raise InputError(f"{folder}: {which} {architecture}, which {role} is: it holds {files}; name the file")


def same_architecture(a: str, b: str) -> bool:
    """Whether two names mean one architecture: the tag of timm's weights (resnet34.a1_in1k) does not count."""
    return a == b or (":" not in a + b and a.partition(".")[0] == b.partition(".")[0])


def check_weights(file: Path, role: str, architecture: str, num_classes: int, sha256: str | None = None) -> None:
    """Refuses a file that says it is of another network, or whose hash is not ``sha256`` (where one is given).

    A file that says nothing passes: loading it compares its shapes with the network's.
    Raises: InputError, also for a file that cannot be read.
    """
    if sha256 is not None:
        file_hash(file, sha256)
    said = read_metadata(file)
    if not same_architecture(said.get("architecture", architecture), architecture):
        raise InputError(
            f"{file} is of another architecture: it holds {said['architecture']}, and {role} is {architecture}"
        )
    if (classes := said.get("num_classes", str(num_classes))) != str(num_classes):
        raise InputError(f"{file} holds weights for {classes} classes, but the network has {num_classes} ({role})")


def file_hash(file: Path, expected: str | None = None) -> str:
    """The SHA-256 of a file. Raises: InputError where it is not the ``expected`` one (the file has changed)."""
    found = files_hash([file])
    if expected is not None and found != expected:
        raise InputError(
            f"{file} is not the weight file on record: its SHA-256 is {found[:12]}..., and not "
            f"{expected[:12]}...: put that file back, or start a new run"
        )
    return found


def timm_normalisation(name: str) -> dict[str, Any]:
    """``mean`` and ``std`` with which timm's weights of that name were trained; empty for a network not timm's."""
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name) and not name.startswith("cifar_") else None
    return {"mean": tuple(found.mean), "std": tuple(found.std)} if found is not None else {}


def timm_keeps_head(name: str, num_classes: int) -> bool:
    """Whether timm's weights of that name come with a classifier for so many classes; else it is drawn at random."""
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return found is None or found.num_classes == num_classes
