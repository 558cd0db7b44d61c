"""No number that an option has no use for is taken: of every option of every training command, and by --help."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

from classification.config import make_parser, parse_command
from classification.options import TrainConfig
from core.errors import InputError
from core.ranges import HUGE, Count, Range, check_ranges, ranges
from core.training.command import train_parser
from diffusion.dit.config import DiTTrainingConfig
from diffusion.progressive.config import ProgressiveConfig
from diffusion.training import parse_config
from offline_kd.config import OFFLINE

BASE = ["--networks", "{student: {name: cifar_resnet8}, teacher: {name: cifar_resnet8}}"]
COMMANDS: dict[str, tuple[Any, Any, list[str]]] = {
    "classification": (parse_command, make_parser(), BASE),
    "offline_kd": (partial(parse_command, task=OFFLINE), make_parser(task=OFFLINE), BASE),
    "dit": (partial(parse_config, DiTTrainingConfig), train_parser(DiTTrainingConfig), ["--teacher", "online"]),
    "progressive": (partial(parse_config, ProgressiveConfig), train_parser(ProgressiveConfig), []),
}


def numbers(parser: Any) -> Iterator[tuple[str, str]]:
    """(flag, how its values are written) of every option that takes numbers."""
    for action in parser._actions:
        kind = str(getattr(action, "_typehint", ""))
        if "float" in kind or "int" in kind.replace("print", ""):
            form = "[{}]" if "uple" in kind else '{{"a": {}}}' if "Mapping" in kind else "{}"
            yield action.option_strings[0], form


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_takes_a_number_that_is_not_finite(command: str) -> None:
    parse, parser, base = COMMANDS[command]
    options = list(numbers(parser))
    assert len(options) > 15
    for position, (flag, form) in enumerate(options):
        owner = flag.strip("-").partition(".")[0]
        methods = ["--method", owner] if f"--{owner}.tau" in parser._option_string_actions and owner != "adm" else []
        for value in (".nan", (".inf", "-.inf", "1e400", "1e30")[position % 4]):
            with pytest.raises(InputError) as error:
                parse([*base, *methods, flag, form.format(value)])
            assert "\n" not in str(error.value) and flag.rpartition(".")[2].strip("-") in str(error.value)


def test_a_range_says_what_is_wrong_with_a_number() -> None:
    for value, said in ((math.nan, "must be a number"), (math.inf, f"at most {HUGE}"), (-1, "must not be negative")):
        assert value not in Range(0) and said in Range(0).says(value)
    assert 0 not in Range(0, ends="(]") and "must be positive" in Range(0, ends="(]").says(0)
    assert 1 not in Range(0, 1, "[)") and "must be in [0, 1)" in Range(0, 1, "[)").says(1)
    assert "must be at least 1" in Range(1).says(0)
    assert ranges(TrainConfig)["batch_size"] == Count.__metadata__[0] and ranges(TrainConfig)["method"] == Range()
    check_ranges("", TrainConfig())


def test_help_says_which_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(make_parser().format_help().split())
    for said in ("momentum; in [0, 1) (type: float", "accumulated parts together; at least 1 (type: int"):
        assert said in text


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("progressive", ["--timesteps", "1000000000"], "--timesteps must be in [1, 65536]: 1000000000"),
        ("progressive", ["--teacher_sha256", "00"], "--teacher_sha256 is that of a teacher's weights"),
        ("dit", ["--teacher_sha256", "00"], "--teacher_sha256 is that of a teacher's weights"),
        ("dit", ["--data.image_size", "1"], "data.image_size must be in [4, 4096]: 1"),
        ("dit", ["--adm.alpha", "0", "--adm.beta", "0"], "all of ADM's weights that count here are 0"),
        ("dit", ["--student", "{size: null, width: 16384, depth: 99, heads: 4, patch: 2}"], "billion parameters"),
        ("progressive", ["--adm.alpha", "0"], "adm.alpha is 0"),
        ("offline_kd", ["--seed", "-1"], "seed must be in [0, 4294967295]: -1"),
    ],
)
def test_numbers_beyond_any_use_are_refused(command: str, words: list[str], said: str) -> None:
    parse, _, base = COMMANDS[command]
    with pytest.raises(InputError) as error:
        parse([*base, *words])
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["seed: 1\nfit: {epochs: 1}\nseed: 2\n", "fit: {epochs: 1, steps: 2, epochs: 3}\n"])
def test_a_key_that_stands_twice_in_a_recipe_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(InputError, match=r"twice\.yaml: (seed|epochs) stands twice in the mapping that begins in line"):
        parse_command(["--config", str(tmp_path / "twice.yaml"), *BASE])
    with pytest.raises(InputError, match="name stands twice"):
        parse_command(["--networks", "{student: {name: cifar_resnet8, name: cifar_resnet14}}"])


@pytest.mark.parametrize("words", [["--help"], ["--config", "classification/recipes/digits.yaml", "--dry-run"]])
def test_a_closed_pipe_ends_a_command_without_a_traceback(words: list[str]) -> None:
    command = [sys.executable, "classification/tools/train.py", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == (0 if words == ["--help"] else 141)  # argparse lets a failed print of help pass
    assert "Error" not in said and "Exception" not in said, said
