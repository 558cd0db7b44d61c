"""Weight files that people have, and hostile ones: what is read, what is refused in one line, and that nothing runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import InputError, notices
from core.training.run import RunFolder
from core.weights import check_finite, read_metadata, read_state_dict, read_torch, weights_hash


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"conv.weight": torch.full((2, 3), value), "bn.num_batches_tracked": torch.tensor(3)}


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "file.pth", **options)
    return folder / "file.pth"


def prefixed(prefix: str, **more: Any) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in weights().items()} | more


def averaged() -> dict[str, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("conv.weight".replace(".", "_"), torch.ones(2, 3))

    return torch.optim.swa_utils.AveragedModel(Net()).state_dict()


ARGUMENTS = argparse.Namespace(
    lr=0.1, out=pathlib.Path("x"), when=datetime.datetime(2020, 1, 1), more=argparse.Namespace(a=[1, {"b": (2, None)}])
)
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}

READ: dict[str, Callable[[], Any]] = {
    "alone": weights,
    "ordered": lambda: collections.OrderedDict(weights()),
    "RepDistiller": lambda: {"opt": ARGUMENTS, "model": weights(), "optimizer": OPTIMIZER, "accuracy": np.float64(7)},
    "NORM": lambda: {"epoch": 240, "args": ARGUMENTS, "state_dict": weights(), "best_acc": torch.tensor(7.0)},
    "kuangliu": lambda: {"net": weights(), "acc": 95.1, "epoch": 199},
    "timm": lambda: {"arch": "resnet18", "state_dict": weights(), "optimizer": OPTIMIZER, "args": ARGUMENTS},
    "numpy": lambda: {"model": weights(), "history": np.arange(5.0), "rng": np.random.get_state(), "n": np.int64(3)},
    "deep": lambda: {"model": weights(), "paths": [pathlib.Path("a/b")], "kinds": collections.defaultdict(list)},
    **{key: (lambda key=key: {key: weights(), "epoch": 3}) for key in (
        "model", "state_dict", "model_state_dict", "net", "network", "params", "params_ema", "ema", "weights",
        "model_ema", "state_dict_ema", "backbone_weights",
    )},
    **{prefix: (lambda prefix=prefix: {"model": prefixed(prefix)}) for prefix in (
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.",
        "_orig_mod.module._orig_mod.",
    )},
    "average of torch": lambda: {"model": prefixed("module.", n_averaged=torch.tensor(3))},
    "average of mmengine": lambda: {"ema_state_dict": prefixed("module.", steps=torch.tensor(3))},
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_that_people_have_are_read(kind: str, zipped: bool, tmp_path: Path) -> None:
    state = read_state_dict(saved(tmp_path, READ[kind](), _use_new_zipfile_serialization=zipped))
    assert state.keys() == weights().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights().items())
    assert not notices()


def test_an_average_that_torch_makes_loses_its_counter_and_prefix(tmp_path: Path) -> None:
    assert read_state_dict(saved(tmp_path, averaged())).keys() == {"conv_weight"}


def test_mmengines_training_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("mmengine")
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    hub = {"log_scalars": collections.OrderedDict(loss=HistoryBuffer([1.0, 2.0], [1, 1])), "resumed_keys": {"a": True}}
    meta = {"iter": np.int64(3), "cfg": "text", "dataset_meta": ConfigDict(classes=("a",), palette=[[1, 2, 3]])}
    content = {"meta": meta, "message_hub": hub, "optimizer": OPTIMIZER}
    assert read_state_dict(saved(tmp_path, {**content, "state_dict": weights()})).keys() == weights().keys()
    trained = {f"module.{name}": tensor for name, tensor in weights(2).items()} | {"steps": torch.tensor(1)}
    file = saved(tmp_path, {**content, "state_dict": weights(1), "ema_state_dict": trained})
    assert read_state_dict(file)["conv.weight"][0, 0] == 1  # mmengine puts the average where the weights were
    assert "state_dict was taken, the moving average" in (said := notices()[0]) and "#ema_state_dict takes" in said
    assert read_state_dict(f"{file}#ema_state_dict")["conv.weight"][0, 0] == 2


@pytest.mark.parametrize(
    ("trained", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("params", "params_ema"),
     ("model_state_dict", "ema"), ("net", "net_ema")],
)  # fmt: skip
def test_the_average_is_taken_said_and_logged_and_the_key_takes_the_other(
    trained: str, average: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = saved(tmp_path, {trained: weights(1), average: weights(2), "args": ARGUMENTS})
    notices()
    for _ in range(2):  # said once
        assert read_state_dict(file)["conv.weight"][0, 0] == 2
    said = f"{file}: {average} was taken, the moving average of the weights; {file}#{trained} takes the others"
    assert capsys.readouterr().err == f"{said}\n"
    run = RunFolder(tmp_path / "run", {"a": 1})
    run.open()
    assert said in (tmp_path / "run/log.txt").read_text() and not notices()
    assert read_state_dict(f"{file}#{trained}")["conv.weight"][0, 0] == 1
    assert read_state_dict(f"{file}#{average}")["conv.weight"][0, 0] == 2
    assert not notices()


def test_a_name_may_have_a_number_sign(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a#model")
    torch.save({"model": weights(2)}, tmp_path / "a")
    assert read_state_dict(tmp_path / "a#model")["conv.weight"][0, 0] == 1
    with pytest.raises(InputError, match=r"no weight file .*b#model"):
        read_state_dict(tmp_path / "b#model")


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


HOSTILE: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda mark: {"model": weights(), "x": Runs(os.system, f"touch {mark}")}, "could run code"),
    "eval": (
        lambda mark: {"model": weights(), "x": Runs(eval, f"open({mark!r}, 'w')")},
        "holds a eval.*could run code",
    ),
    "open": (lambda mark: {"x": Runs(open, mark, "w")}, "could run code"),
    "setattr": (
        lambda mark: {"model": weights(), "x": Runs(setattr, ARGUMENTS, "a", 1)},
        "holds a setattr.*could run code",
    ),
    "a class": (
        lambda mark: {"model": weights(), "x": Runs(collections.UserDict, {})},
        "collections.UserDict.*run code",
    ),
    "a module": (lambda mark: nn.Linear(2, 2), "torch.nn.modules.linear.Linear.*could run code"),
    "a number": (lambda mark: 3, "it is a int"),
    "a list": (lambda mark: [weights()], "it is a list"),
    "nothing": (lambda mark: {}, "it is empty"),
    "a tensor": (lambda mark: torch.ones(3), "it is a Tensor"),
    "numbers": (lambda mark: {"epoch": 3, "best\nof": 4}, "its keys are epoch, best of"),
    "many keys": (lambda mark: {f"key{n}" * 30: n for n in range(50)}, "no state dict"),
    "two of a kind": (lambda mark: {"student": weights(), "teacher": weights()}, "#KEY, KEY one of student, teacher"),
    "numbers for names": (lambda mark: {"model": {1: torch.ones(2)}}, "no state dict"),
    "left out": (lambda mark: {"a": torch.ones(2, device="meta")}, "no state dict"),
    "sparse": (lambda mark: {"a": torch.ones(2, 2).to_sparse()}, "no state dict"),
    "arrays": (lambda mark: {"model": {"a": np.ones(3)}}, "no state dict"),
    "only arguments": (lambda mark: {"args": ARGUMENTS}, "its keys are args"),
    "an optimizer": (lambda mark: OPTIMIZER, "its keys are state, param_groups"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_weight_file_is_refused_in_one_line_and_never_run(kind: str, tmp_path: Path) -> None:
    make, said = HOSTILE[kind]
    mark = tmp_path / "ran"
    for zipped in (True, False) if kind != "left out" else (True,):
        file = saved(tmp_path, make(str(mark)), _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=said) as raised:
            read_state_dict(file)
        text = str(raised.value)
        assert str(file) in text and "\n" not in text and "\x1b" not in text and len(text) < 900
        assert "weights_only" not in text and not mark.exists()


def test_a_key_that_a_file_lacks_is_answered_by_those_it_has(tmp_path: Path) -> None:
    file = saved(tmp_path, {"student": weights(), "teacher": weights(), "epoch": 3})
    with pytest.raises(InputError, match=r"no state dict techer .*KEY one of student, teacher"):
        read_state_dict(f"{file}#techer")
    with pytest.raises(InputError, match="no state dict epoch"):
        read_state_dict(f"{file}#epoch")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files_end_in_one_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    save_file(weights(), file) if name.endswith("safetensors") else torch.save(weights(), file)
    whole = file.read_bytes()
    for damaged in (
        b"", b"\0" * 100, b"\0" * len(whole), b"garbage", whole[: len(whole) // 2], whole[:-1], whole[1:], b"\x80\x02.",
        b"\x80\x02" + b"(" * 1000, b"\xff" * 64, b"PK\x03\x04" + whole[4:50], b"\x80\x02cnumpy\nndarray\n.",
    ):  # fmt: skip
        file.write_bytes(damaged)
        with pytest.raises(InputError) as raised:
            read_state_dict(file)
        text = str(raised.value)
        assert name in text and "\n" not in text and "\x1b" not in text and not text.rstrip().endswith((":", ","))


METADATA: list[tuple[dict[str, str], str]] = [
    *(({key: text}, f"says {key}") for key in ("mean", "std") for text in (
        "", "no json", "3", "{}", "[]", '["a", "b", "c"]', "[1, 2]", "[1, null, 2]", "[NaN, 1, 1]", "[1, Infinity, 1]",
        "[[1], [1], [1]]", "[" * 100_000, '{"a":' * 5000, "[1e999, 1, 1]", "null", "[1,\n2,\n", "[" + "9" * 5000 + "]",
        f"[{'1,' * 5000}1]",
    )),
    ({"std": "[0, 1, 1]"}, "above 0"), ({"std": "[-1, 1, 1]"}, "above 0"),
    *(({"num_classes": text}, "says num_classes") for text in ("", "ten", "-1", "0", "1e3", "1.5", "9" * 5000)),
    *(({"heads": text}, "says heads") for text in ("", "x", "0", "-2", "9" * 400)),
]  # fmt: skip


@pytest.mark.parametrize("position", range(len(METADATA)))
def test_hostile_metadata_ends_in_one_line(position: int, tmp_path: Path) -> None:
    metadata, said = METADATA[position]
    save_file(weights(), tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError, match=said) as raised:
        read_metadata(tmp_path / "a.safetensors")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_metadata_of_ours_and_with_newlines(tmp_path: Path) -> None:
    said = {"architecture": "cifar\nresnet20\n", "mean": json.dumps([0.5, 0.4, 0.3]), "std": "[1]", "num_classes": "10"}
    save_file(weights(), tmp_path / "a.safetensors", said)
    assert read_metadata(tmp_path / "a.safetensors") == {
        "architecture": "cifar resnet20", "mean": (0.5, 0.4, 0.3), "std": (1,), "num_classes": "10",
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype, capsys: pytest.CaptureFixture) -> None:
    state = {"fine": torch.ones(2), "count": torch.tensor(3), "bad": torch.tensor([1.0, value], dtype=dtype)}
    with pytest.raises(InputError, match=r"a.pth: the weight bad is not finite"):
        check_finite("a.pth", state, training=True)
    notices()
    check_finite("a.pth", state, training=False)
    assert len(capsys.readouterr().err.splitlines()) == 1 and len(notices()) == 1
    check_finite("a.pth", {"fine": torch.ones(2)}, training=True)


def test_the_hash_is_of_the_weights_however_they_are_saved(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file(weights(), plain, {"role": "teacher"})
    found = weights_hash([plain])
    same = {
        "other metadata": lambda file: save_file(weights(), file, {"by": "hand"}),
        "other order.pth": lambda file: torch.save(dict(reversed(weights().items())), file),
        "wrapped.pth": lambda file: torch.save({"epoch": 3, "state_dict": prefixed("module.")}, file),
        "key.pth": lambda file: torch.save({"a": weights(2.0), "b": weights()}, file),
    }
    for name, save in same.items():
        file = tmp_path / (name if "." in name else f"{name}.safetensors")
        save(file)
        place = f"{file}#b" if name.startswith("key") else file
        assert weights_hash([place]) == weights_hash([place], found) == weights_hash([place], None, found) == found
    halves = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, (key, tensor) in zip(halves, weights().items(), strict=True):
        save_file({key: tensor}, file)
    assert weights_hash(halves) == found


def test_the_hash_of_a_file_is_known_too_and_others_are_refused(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "value", "name", "type", "shape", "std")}
    save_file(weights(), files["plain"])
    by_file, found = hashlib.sha256(files["plain"].read_bytes()).hexdigest(), weights_hash([files["plain"]])
    assert weights_hash([files["plain"]], by_file) == weights_hash([files["plain"]], by_file, found) == by_file
    save_file(weights(2.0), files["value"])
    save_file(prefixed("x."), files["name"])
    save_file({k: v.to(torch.float16) for k, v in weights().items()}, files["type"])
    save_file({k: v.reshape(-1) for k, v in weights().items()}, files["shape"])
    save_file(weights(), files["std"], {"std": "[0.5]"})  # which the images would be divided by
    for file in list(files.values())[1:]:
        for known in (found, by_file):
            with pytest.raises(InputError, match=f"{file} is not the weight file on record"):
                weights_hash([file], known)
    with pytest.raises(InputError, match="and not 00000"):
        weights_hash([files["plain"]], found, "0" * 64)


def test_one_changed_byte_of_a_torch_file_is_seen(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.arange(400.0), "b": {"c": [1, "two"]}})
    whole, wrong = file.read_bytes(), 0
    before = torch.load(file, weights_only=True)
    for place in range(7, len(whole), 29):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = read_torch(file)
        except InputError as error:
            wrong += 1
            assert str(file) in str(error) and "\n" not in str(error)
            continue
        assert torch.equal(found["a"], before["a"]) and found["b"] == before["b"], place
    assert wrong > 50
