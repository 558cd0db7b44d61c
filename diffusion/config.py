"""What the configs of ``train.py progressive`` and ``train.py dit`` share: their files, their flags, their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from core.errors import InputError
from core.files import files_hash
from core.training.command import dry_run_wanted, parse, train_parser

# What a resumed run may change: where and on what it runs, not what it computes.
MAY_CHANGE = ("data.root", "data.download", "teacher", "fit.device", "fit.keep", "fit.trackers", "progress_bar")

DryRun = Literal["time"] | bool
Config = TypeVar("Config")


def parse_config(kind: Callable[..., Config], argv: Sequence[str], prog: str | None = None) -> tuple[Config, DryRun]:
    """(a config of this dataclass, the dry run that is wanted). Raises: InputError for a wrong command line."""
    try:
        values = parse(train_parser(kind, prog), argv).as_dict()  # type: ignore[arg-type]
    except InputError as error:
        if "adm.attention" in str(error):  # in the recipes and run folders of earlier versions
            raise InputError("adm.attention is adm.control now: none (was consensus), uniform or shuffled") from error
        raise
    dry_run = dry_run_wanted(values.pop("dry_run"), values.pop("time"))
    values.pop("config", None)
    return kind(**values), dry_run


def refuse_idle(argv: Sequence[str], idle: Iterable[tuple[str, bool, str]]) -> None:
    """Raises: InputError for a flag that would do nothing.

    Args: ``idle``: (how such a flag begins, whether it does nothing, with what it counts).
    """
    for begin, does_nothing, with_what in idle:
        for flag in (word.partition("=")[0] for word in argv):
            if does_nothing and flag.startswith(begin):
                raise InputError(f"{flag} counts only with {with_what}")


def hash_weights(files: Sequence[Path], before: str | None, name: str) -> str:
    """SHA-256 of a teacher's weights. Raises: InputError where a run began (``before``) with others."""
    found = files_hash(files)
    if before not in (None, found):
        raise InputError(f"the weights in {name} are not those that the run began with")
    return found
