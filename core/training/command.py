"""What every command shares: exit codes, one-line errors, stopping on Ctrl-C and SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, cast, get_type_hints

from ..errors import InputError, TrainingError
from ..ranges import Range, check_numbers, ranges

DONE, FAILED, WRONG_INPUT, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # full, over quota, read-only, broken
_PLACE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)  # a wrong path


class Stop:
    """Set by the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal): the loop finishes its step, saves, leaves.

    A second Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catches these signals inside the block (in the main thread; elsewhere it does nothing)."""
        caught = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        try:
            before = {number: signal.signal(number, self._handle) for number in caught}
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class LineParser(argparse.ArgumentParser):
    """argparse for what is no dataclass: says what is wrong in one line, as an InputError."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--[\w.-]+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        if found and (nearest := difflib.get_close_matches(found[1], known, n=1, cutoff=0.5)):
            raise InputError(f"unknown option {found[1]}: did you mean {nearest[0]}?")
        raise InputError(f"{message} (see --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; an empty value, as of a shell's variable that is not set, is no way to leave an option out."""
        found = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.option_strings and getattr(found[0], action.dest, None) == "":
                self.error(f"{action.option_strings[0]} is empty: give a value, or leave it out")
        return found


def missing_extra(error: ImportError, extra: str) -> InputError:
    """What to say where a package of one of our extras is not installed."""
    return InputError(f"{(error.name or str(error)).partition('.')[0]} is not installed: pip install -e '.[{extra}]'")


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: 0 done, 2 wrong input, 1 anything else that can be said in a line, 130 interrupted.

    141, as a shell has it, where whoever read the output has closed it (``| head -1``).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (it stays open)
    try:
        try:
            code = _run(main)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be written fails no more
        code = CLOSED
    sys.exit(code)


def _run(main: Callable[[], int | None]) -> int:
    try:
        return main() or DONE
    except (InputError, TrainingError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)  # names may have newlines
        return WRONG_INPUT if isinstance(error, InputError) else FAILED
    except OSError as error:
        if error.errno not in _DISK and not (error.errno in _PLACE and error.filename):
            raise
        use = "write" if error.errno in _DISK else "use"
        print(f"error: cannot {use} {error.filename or 'to the disk'}: {error.strerror}", file=sys.stderr)
        return FAILED if error.errno in _DISK else WRONG_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print("error: the memory is full: give a smaller batch or network, or fewer images at once", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a GPU or CPU, found no room for something."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "can't allocate memory" in str(error)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first with the columns' names; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [any(cell.lstrip("-")[:1].isdigit() for cell in column[1:]) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def tool_parser(description: str, **options: Any) -> Any:
    """The jsonargparse parser of a tool, for ``parse``."""
    from jsonargparse import ArgumentParser

    _refuse_duplicates()
    return ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, **options)


_NODES = 20_000
"""Of what a YAML text says, its references followed; a config has a few hundred."""


@cache
def _refuse_duplicates() -> None:
    """Makes jsonargparse refuse YAML that says a key twice, of which it would take the last."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def checked(stream: str, path: str = "") -> Any:
        _check_yaml(stream, path)
        return load(stream)

    set_loader("yaml", checked, (yaml.YAMLError,))


def _check_yaml(text: str, file: object = "") -> None:
    """Raises: InputError for a key that stands twice, and for what would never end; yaml.YAMLError for no YAML."""
    import yaml

    where = f"{file}: " if file else ""
    try:
        nodes = [yaml.compose(text, yaml.SafeLoader)]
    except RecursionError as error:
        raise InputError(f"{where}the YAML is nested too deep to be read") from error
    seen = 0
    while nodes and (node := nodes.pop()) is not None:
        if (seen := seen + 1) > _NODES:
            raise InputError(f"{where}the YAML says too much, or refers to itself (by & and *): write it out")
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                line = node.start_mark.line + 1
                raise InputError(f"{where}{twice} stands twice in the mapping that begins in line {line}: leave one")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def add_device(parser: Any) -> None:
    """``--device`` of every tool that runs networks."""
    about = "auto takes a GPU where there is one"
    parser.add_argument("--device", type=Literal["auto", "cpu"], default="auto", help=about)


def device_of(options: Any) -> str:
    """What ``--device`` means here."""
    import torch

    return "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"


def train_parser(config: type, prog: str | None = None, description: str | None = None, epilog: str = "") -> Any:
    """The jsonargparse parser of a ``train.py``: all of a typed config, ``--config`` with a recipe, ``--dry-run``.

    ``description``: the first line of the config's docstring unless given.
    """
    parser = tool_parser(description or (config.__doc__ or "").partition("\n")[0], prog=prog, epilog=epilog)
    parser.add_argument("--config", action="config", help="a recipe or a run's config.yaml; later flags override it")
    parser.add_class_arguments(config)
    say_ranges(parser, config)
    add_dry_run(parser.add_argument)
    return parser


def say_ranges(parser: Any, config: type, prefix: str = "--") -> None:
    """Adds to the help of a dataclass's options which numbers they may be (see ``core.ranges``)."""
    kinds = get_type_hints(config)
    for name, bounds in ranges(config).items():
        if is_dataclass(kinds[name]):
            say_ranges(parser, cast(type, kinds[name]), f"{prefix}{name}.")
        elif bounds != Range() and (action := parser._option_string_actions.get(f"{prefix}{name}")):
            action.help = f"{(action.help or name).rstrip('.')}; {bounds}"


def add_dry_run(add: Callable[..., Any]) -> None:
    """``--dry-run`` and ``--time`` of every training command, by the ``add_argument`` of its parser."""
    about = "print the resolved config, the networks, their maps and the memory they need; train nothing"
    add("--dry-run", "--dry_run", dest="dry_run", action="store_true", help=about)
    add("--time", action="store_true", help="with --dry-run: take a few real steps, and say how long training takes")


def dry_run_wanted(dry_run: bool, time: bool) -> Literal["time"] | bool:
    """What those two flags say: False to train, True to look, "time" to look and to time. Raises: InputError."""
    if time and not dry_run:
        raise InputError("--time belongs to a dry run: give --dry-run --time")
    return "time" if time else dry_run


def parse(parser: Any, argv: Sequence[str] | None = None, nested: Sequence[str] = ()) -> Any:
    """Parses and instantiates with a jsonargparse parser made with ``exit_on_error=False``.

    ``nested``: keys inside mappings, which the parser does not list, as ``networks.<role>.lr``.
    Raises: InputError, one line, offering the nearest known key for an unknown one.
    """
    from jsonargparse import ArgumentError, Namespace

    argv = sys.argv[1:] if argv is None else argv
    given = [key for file in config_files(argv) for key in _keys_of(file)]
    try:
        parsed = parser.parse_args(argv)
        for name in parser.groups:
            if name in parsed and not isinstance(parsed[name], Namespace):
                raise InputError(f"{name} is a group of options, as {name}: {{...}}, not {parsed[name]!r}")
        options = parser.instantiate(parsed)
        check_numbers(vars(options))
        return options
    except ArgumentError as error:
        keys = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        flags = [word.lstrip("-").partition("=")[0] for word in argv]
        raise InputError(_one_line(str(error), [*keys, *nested], [*flags, *given])) from error


def config_files(argv: Sequence[str]) -> list[Path]:
    """The files that a command line names by ``--config``."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    words = (word.partition("=") if "=" in word else (word, "", following) for word, following in pairs)
    return [Path(value) for flag, _, value in words if flag == "--config"]


def _keys_of(file: Path) -> list[str]:
    """The dotted keys of a config. Raises: InputError where it holds none; what else is wrong the parser says."""
    import yaml

    from .run import flatten, load_yaml

    if file.exists() and not file.is_file():
        raise InputError(f"--config {file} is no file")
    try:
        text = file.read_text() if file.exists() else "{}"
        _check_yaml(text, file)
        said = load_yaml(text)
    except UnicodeDecodeError as error:
        raise InputError(f"--config {file} is no text: {error.reason}") from error
    except (OSError, yaml.YAMLError):
        return []
    if not isinstance(said, dict):
        raise InputError(f"--config {file} names no options, as a recipe does")
    return list(flatten(said))


def _one_line(message: str, keys: list[str], flags: list[str]) -> str:
    message = " ".join(line.strip() for line in message.splitlines() if line.strip())
    found = re.search(r"[Uu]nrecognized arguments?:? --([\w.]+)", message)
    found = found or re.search(r"[Gg]roup '([\w.]+)' does not accept option '([\w.]+)'", message)
    found = found or re.search(r"(?:Parser key \"(\w+)\": .*)?[Oo]ption '([\w.]+)' is not accepted", message)
    if not found:
        return message.replace("Unexpected config:", "--config names no options:")
    given = ".".join(part for part in found.groups() if part)
    known = {re.sub(r"<\w+>\.", "", key): key for key in keys if not key.endswith(".help")}  # as the message names them
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"did you mean {known[nearest[0]]}?" if nearest else "see --help"
    within = given.replace(".", r"\.(?:.+\.)?")  # the message leaves out what it is in: networks.<role>.nme
    return f"unknown option {next((f for f in flags if re.fullmatch(within, f)), given)}: {hint}"
