"""Weight files through the commands: hostile ones end in one line, those with an average take the named part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU
from safetensors.torch import save_file

from classification.networks import create_network
from classification.tools import evaluate, train
from core.weights import read_state_dict
from offline_kd.tools import train as offline

DIGITS = ["--data.name", "digits", "--data.image_size", "8", "--data.classes", "4"]
NETWORK = "cifar_resnet8"


def state(seed: int = 0, **changed: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    values = create_network(NETWORK, 4).state_dict()
    for name, value in changed.items():
        values[name.replace("_", ".", 1)].fill_(value)
    return {name: tensor.clone() for name, tensor in values.items()}


def teacher(file: Path | str, out: Path) -> list[str]:
    networks = ["--networks.teacher.name", NETWORK, "--networks.student.name", NETWORK]
    short = ["--fit.steps", "1", "--batch_size", "32", "--out", str(out), "--progress_bar", "false"]
    return [*DIGITS, *CPU, *networks, *short, "--networks.teacher.weights", str(file)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_not_finite_is_refused_in_training_and_said_in_evaluation(
    value: float, suffix: str, tmp_path: Path, shell: Any
) -> None:
    file = tmp_path / f"bad{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state(fc_bias=value), file)
    for main, method in ((train.main, "dml"), (offline.main, "kd")):
        code, _, err = shell(main, [*teacher(file, tmp_path / "run"), "--method", method])
        assert code == 2 and "the weight fc.bias is not finite" in err and str(file) in err, err
        assert err.count("\n") == 1 and not (tmp_path / "run").exists()
    code, _, err = shell(evaluate.main, ["--weights", str(file), "--network", NETWORK, *DIGITS])
    assert code == 0 and err.count("\n") == 1 and "not finite" in err, err


METADATA = [
    {"mean": "no json"}, {"std": "[0, 0, 0]"}, {"mean": "[" * 9999}, {"mean": "[1, 2]"}, {"num_classes": "many"},
    {"architecture": "cifar_\nvgg8"}, {"architecture": ""}, {"role": "nobody\nat all"}, {"num_classes": "7"},
    {"mean": "{}", "std": "3"},
]  # fmt: skip


@pytest.mark.parametrize("metadata", METADATA)
def test_hostile_metadata_end_in_one_line(metadata: dict[str, str], tmp_path: Path, shell: Any) -> None:
    said = {"architecture": NETWORK, "num_classes": "4", "role": "teacher", **metadata}
    save_file(state(), tmp_path / "t.safetensors", said)
    code, _, err = shell(evaluate.main, ["--weights", str(tmp_path / "t.safetensors"), *DIGITS])
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    if "role" not in metadata:  # which training does not ask for
        code, _, err = shell(offline.main, [*teacher(tmp_path / "t.safetensors", tmp_path / "run"), "--method", "kd"])
        assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists(), err


def test_the_average_is_logged_and_its_key_takes_the_other(tmp_path: Path, shell: Any) -> None:
    both, logits = tmp_path / "checkpoint-9.pth.tar", {}
    torch.save({"state_dict": state(1), "state_dict_ema": state(2), "epoch": 9}, both)
    for key, taken in (("", "state_dict_ema"), ("#state_dict", "state_dict"), ("#state_dict_ema", "state_dict_ema")):
        torch.save(torch.load(both)[taken], tmp_path / "alone.pth")
        for name, file in (("given", f"{both}{key}"), ("alone", str(tmp_path / "alone.pth"))):
            out = tmp_path / f"{name}.json"
            argv = ["--weights", file, "--network", NETWORK, *DIGITS, "--out", str(out)]
            assert shell(evaluate.main, argv)[0] == 0
            logits[name] = json.loads(out.read_text())["values"]
        assert logits["given"] == logits["alone"]
    out = tmp_path / "run"
    code, _, err = shell(offline.main, [*teacher(both, out), "--method", "kd"])
    assert code == 0 and "state_dict_ema was taken" in (out / "log.txt").read_text(), err
    code, _, err = shell(offline.main, [*teacher(f"{both}#state_dict", tmp_path / "other"), "--method", "kd"])
    assert code == 0 and "was taken" not in (tmp_path / "other/log.txt").read_text(), err
    assert read_state_dict(f"{both}#state_dict").keys() == state().keys()


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(kind: torch.dtype, tmp_path: Path, shell: Any) -> None:
    torch.save({name: tensor.to(kind) for name, tensor in state().items()}, tmp_path / "a.pth")
    code, _, err = shell(evaluate.main, ["--weights", str(tmp_path / "a.pth"), "--network", NETWORK, *DIGITS])
    assert code == 2 and err.count("\n") == 1 and "no numbers with a fraction" in err, err


def test_a_scalar_where_a_bias_should_be_is_of_another_shape(tmp_path: Path, shell: Any) -> None:
    torch.save({**state(), "fc.bias": torch.tensor(1.0)}, tmp_path / "a.pth")
    code, _, err = shell(evaluate.main, ["--weights", str(tmp_path / "a.pth"), "--network", NETWORK, *DIGITS])
    assert code == 2 and err.count("\n") == 1 and "other shape fc.bias () instead of (4,)" in err, err
