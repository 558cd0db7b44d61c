"""One run folder, one process: a lock that the kernel lets go of when its process dies, however it dies."""

from __future__ import annotations

import errno
import os
import platform
import sys
import time
from pathlib import Path
from typing import IO

from ..errors import InputError, TrainingError

try:
    import fcntl
except ImportError:  # not on Windows: its runs are not protected
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
_held: dict[Path, IO[str]] = {}
"""The lock files of this process, open as long as it lives: closing one lets go of its lock."""


def check_free(folder: Path) -> None:
    """Raises: InputError where another process, also on another machine, trains in this folder."""
    file = _file_in(folder)
    if fcntl is None or file in _held or not file.is_file():
        return
    try:
        with open(file, "r+") as opened:  # closing it lets go of what is taken here
            _take(opened, file)
    except PermissionError:  # a run of somebody else: writing will say so
        return


def hold(folder: Path) -> None:
    """Takes the lock of an existing folder for as long as this process lives. One that it holds stays held.

    A lock of ``fcntl`` (POSIX): other processes of the same machine see it, on NFS those of other machines too, where
    the server has locking. A file system without locks is not protected, which is said in a line.
    Raises: InputError where another process holds it, naming that; TrainingError where nothing can be written.
    """
    file = _file_in(folder)
    if fcntl is None or file in _held:
        return
    try:
        opened = open(file, "a+")  # noqa: SIM115  (it stays open)
    except OSError as error:
        raise TrainingError(f"cannot write {file}: {error.strerror}") from error
    try:
        _take(opened, file)
    except BaseException:
        opened.close()
        raise
    opened.truncate(0)
    opened.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    opened.flush()
    _held[file] = opened


def _file_in(folder: Path) -> Path:
    return Path(os.path.realpath(folder)) / NAME  # Path.resolve would raise at a link in a circle


def _take(opened: IO[str], file: Path) -> None:
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            opened.seek(0)
            holder = opened.readline().strip() or "another process"
            raise InputError(
                f"{file.parent} is being trained by {holder}: wait, stop it, or choose another --out"
            ) from error
        print(f"{file.parent} is not protected from a second process: {error.strerror}", file=sys.stderr)
