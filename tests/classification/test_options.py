"""Which options a method takes: what would have no effect is refused, and messages and help name what there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from runs import RECIPE, ROOT, arguments

from classification.config import ONLINE, Task, make_parser, parse_command
from classification.experiment import build
from classification.methods import METHODS
from classification.methods.base import MethodOptions
from core.errors import InputError
from core.files import plain
from core.training.run import flatten
from offline_kd.config import OFFLINE

pytestmark = pytest.mark.usefixtures("quick")
OTHERS = [name for name in METHODS if name != "dml"]


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        parse_command(["--config", str(RECIPE), *argv])
    return str(error.value)


@pytest.mark.parametrize("adm", ["", "+adm"])
@pytest.mark.parametrize("method", OTHERS)
def test_options_of_another_method_are_refused_with_the_methods_own(method: str, adm: str) -> None:
    own = ", ".join(f"{method}.{f.name}" for f in fields(METHODS[method].Options))
    known = f"its options are {own}" if own else "it has no options"
    assert refusal("--method", method + adm, "--dml.tau", "2") == f"dml.tau does not apply to {method}: {known}"


@pytest.mark.parametrize("method", [name for name in OTHERS if METHODS[name].Options is not MethodOptions])
def test_every_methods_options_are_its_own(method: str) -> None:
    field = next(f for f in fields(METHODS[method].Options) if f.type in ("Positive", "NonNegative"))
    value = METHODS[method].Options()
    changed = getattr(value, field.name) / 2 or 0.5
    said = refusal("--method", "dml+adm", f"--{method}.{field.name}", str(changed))
    assert said.startswith(f"{method}.{field.name} does not apply to dml: its options are dml.tau, dml.weight, ")
    command = parse_command(["--config", str(RECIPE), "--method", method, f"--{method}.{field.name}", str(changed)])
    assert getattr(command.options, field.name) == changed


def test_options_of_several_methods_in_a_recipe_serve_each_its_own(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("networks: {student: {name: cifar_resnet8}}\ndml: {weights: {teacher: 0.3}}\nkdcl: {tau: 2.0}\n")
    for method, options in (("dml", METHODS["dml"].Options(weights={"teacher": 0.3})), ("vanilla", MethodOptions())):
        for label in (method, f"{method}+adm"):
            command = parse_command(["--config", str(recipe), "--method", label])
            assert command.options == options
            assert [key for key in command.resolved() if key in METHODS] == (["dml"] if method == "dml" else [])
    assert parse_command(["--config", str(recipe), "--method", "kdcl", "--kdcl.tau", "3"]).options.tau == 3.0
    argv = ["--config", str(recipe), "--method", "dml"]
    with pytest.raises(InputError, match=r"^kdcl\.tau does not apply to dml: its options are dml\.tau, "):
        parse_command([*argv, "--kdcl.tau", "2.0"])  # also where it says the same again
    with pytest.raises(InputError, match=r"bogus"):
        recipe.write_text("networks: {student: {name: cifar_resnet8}}\nkdcl: {bogus: 2.0}\n")
        parse_command(argv)


@pytest.mark.parametrize("flags", [["--dml", "{tau: 2}"], ["--dml.tau=1.0"], ["--dml.weights", "{}"]])
def test_options_of_another_method_are_refused_in_every_spelling(flags: list[str]) -> None:
    name = flags[0].removeprefix("--").partition("=")[0]
    assert refusal("--method", "vanilla", *flags) == f"{name} does not apply to vanilla: it has no options"


@pytest.mark.parametrize("flags", [["--adm.alpha", "0.02"], ["--adm.gamma=1.0"], ["--adm", "{alpha: 0.02}"]])
def test_adms_options_on_the_command_line_need_adm(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = flags[0].lstrip("-").partition("=")[0]
    expected = f"{name} counts only with +adm: choose --method dml+adm, or leave it out"
    assert refusal("--method", "dml", *flags) == expected
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", str(RECIPE), "--method", "dml", *flags])
        with pytest.raises(InputError, match="counts only with"):
            parse_command()
    assert parse_command(["--config", str(RECIPE), "--method", "dml+adm", *flags]).config.adm.alpha in (0.01, 0.02)


def test_adms_options_in_a_recipe_serve_its_runs_without_adm() -> None:
    recipe = RECIPE.with_name("imagenet.yaml")
    assert "adm" in yaml.safe_load(recipe.read_text())
    command = parse_command(["--config", str(recipe), "--method", "dml", "--out", "adm"])
    assert "adm" not in command.resolved()


@pytest.mark.parametrize("task", [ONLINE, OFFLINE], ids=lambda task: task.name)
def test_recipes_hold_only_what_differs_from_the_defaults_of_their_task(task: Task) -> None:
    defaults = flatten(
        {"task": "", **asdict(task.config()), **{n: asdict(m.Options()) for n, m in task.methods.items()}}
    )
    for recipe in sorted((ROOT / task.name / "recipes").glob("*.yaml")):
        said = flatten(yaml.safe_load(recipe.read_text()))
        same = {key for key, value in said.items() if key in defaults and plain(defaults[key]) == value}
        assert same <= {"data.name"}, recipe  # a recipe names its data in any case


def test_messages_and_help_name_every_method() -> None:
    said = refusal("--method", "0123456789")
    text = " ".join(make_parser().format_help().split())
    listed = text.partition("Methods: ")[2].partition(";")[0].split(", ")
    assert listed == list(METHODS)
    for name in METHODS:
        assert f" {name}," in f"{said},".replace(":", ",") and f"{name}+adm" in said
        if METHODS[name].Options is not MethodOptions:
            assert f"--{name}." in text


def test_dml_needs_two_networks(tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]) -> None:
    argv = arguments(tmp_path / "run", "--networks", "{student: {name: cifar_resnet8}}", method="dml")
    code, _, said = command(argv)
    assert code == 2 and said == "error: DML needs at least 2 networks, and there is student\n"
    assert not (tmp_path / "run").exists()
    alone = arguments(tmp_path / "run", "--networks", "{student: {name: cifar_resnet8}}", method="vanilla")
    assert list(build(parse_command(alone)).distiller.networks) == ["student"]


def test_options_without_effect_are_not_recorded() -> None:
    argv = ["--config", str(RECIPE), "--method", "vanilla", "--data.noise_exclude_true", "true"]
    resolved = parse_command(argv).resolved()
    assert not any(key.startswith("noise") for key in resolved["data"])
    data = parse_command([*argv, "--data.noise", "0.1"]).resolved()["data"]
    assert data["noise"] == 0.1 and data["noise_exclude_true"] is True and data["noise_seed"] is None
