"""Networks of torchvision, transformers and timm's folders: trained, resumed, read again, and given a new head."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from runs import CPU, RECIPE, assert_same_runs, read, stop_at
from safetensors.torch import load_file

from classification.distiller import NetworkConfig, build_networks
from classification.networks import create_network
from classification.networks.libraries import said_of
from classification.networks.pretrained import load_weights
from classification.networks.state import load_state
from classification.tools import evaluate, visualize
from core.errors import InputError
from core.weights import read_metadata
from offline_kd.tools.train import main as train_offline

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def small(out: Path, *more: str, method: str = "dml+adm", size: int = 16) -> list[str]:
    """30 images of three digits: two epochs of two steps."""
    data = ["--data.classes", "3", "--data.per_class", "10", "--data.image_size", str(size), "--batch_size", "15"]
    fit = ["--fit.epochs", "2", "--fit.log_every", "1", *CPU]
    return ["--config", str(RECIPE), "--method", method, "--out", str(out), *data, *fit, *more]


def named(role: str, name: str, **options: object) -> list[str]:
    flags = [f"--networks.{role}.name", name]
    return flags + [part for key, value in options.items() for part in (f"--networks.{role}.{key}", str(value))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each library that saves folders, for 3 classes and for 7."""
    made = {}
    for classes in (3, 7):
        torch.manual_seed(classes)
        config = transformers.ResNetConfig(**TINY, num_labels=classes)
        made[f"transformers {classes}"] = folder = tmp_path_factory.mktemp("models") / f"resnet.v{classes}"
        transformers.ResNetForImageClassification(config).save_pretrained(folder)
        processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        made[f"timm {classes}"] = folder = tmp_path_factory.mktemp("models") / "timm"
        timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=classes), folder, safe_serialization=True)
    return made


@pytest.fixture(scope="module")
def name_of(folders: dict[str, Path]) -> Callable[[str], str]:
    def name(what: str) -> str:
        prefix = "transformers/" if what.startswith("transformers") else "local-dir:"
        return f"{prefix}{folders[what]}"

    return name


def test_networks_of_two_libraries_train_resume_and_are_read_again(
    command: Command, shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name_of: Callable[[str], str]
) -> None:
    networks = [
        *named("teacher", name_of("transformers 3"), pretrained=True),
        *named("student", "torchvision/squeezenet1_1"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(small(whole, *networks, size=32))[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert command(small(parts, *networks, size=32))[0] == 130
    assert command(small(parts, *networks, size=32))[0] == 0
    assert_same_runs(whole, parts)
    said = (whole / "log.txt").read_text()
    assert said.count("before training): top-1") == 1
    assert (parts / "log.txt").read_text().count("before training): top-1") == 1

    student = whole / "checkpoints/last/student.safetensors"
    assert read_metadata(student)["architecture"] == "torchvision/squeezenet1_1"
    import torchvision

    torchvision.models.squeezenet1_1(num_classes=3).load_state_dict(load_file(student))  # the library's own names
    said_mean = read_metadata(whole / "checkpoints/last/teacher.safetensors")["mean"]
    assert said_mean == (0.1, 0.2, 0.3)  # preprocessor_config.json's

    assert shell(evaluate.main, [str(whole)])[0] == 0
    values = read(whole / "evaluation-last-test.json")["values"]
    assert values["student/top1"] == read(whole / "summary.json")["last"]["student/top1"]
    alone = [str(student), "--data.name", "digits", "--data.classes", "3", "--data.per_class", "10"]
    alone += ["--data.image_size", "32", "--out", str(tmp_path / "alone.json")]
    assert shell(evaluate.main, ["--weights", *alone])[0] == 0
    assert read(tmp_path / "alone.json")["values"]["student/top1"] == values["student/top1"]
    assert shell(visualize.main, [str(whole), "--images", "2"])[0] == 0
    assert (whole / "figures/maps.png").is_file()

    later = [*named("teacher", "torchvision/squeezenet1_1", weights=whole), *named("student", "cifar_resnet8")]
    code, _, error = command(small(tmp_path / "later", *later, size=32, method="dml"))
    assert code == 2 and "another architecture" in error  # the run's own teacher is another network
    later[3] = str(student)
    assert command(small(tmp_path / "later", *later, size=32, method="dml"))[0] == 0


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_fixed_teacher_from_a_folder_is_scored_first_and_its_weights_are_on_record(
    shell: Any, tmp_path: Path, library: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[f"{library} 3"], folder)
    name = f"{'transformers/' if library == 'transformers' else 'local-dir:'}{folder}"
    run = tmp_path / "run"
    data = ["--data.name", "digits", "--data.classes", "3", "--data.per_class", "10", "--data.image_size", "32"]
    argv = [*data, "--batch_size", "15", "--fit.epochs", "2", *CPU, "--method", "kd", "--out", str(run)]
    argv += [*named("teacher", name, pretrained=True), *named("student", "cifar_resnet8")]
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert shell(train_offline, argv)[0] == 130
    said = (run / "log.txt").read_text()
    assert f"teacher ({name}, fixed): top-1" in said
    assert yaml.safe_load((run / "config.yaml").read_text())["networks"]["teacher"]["sha256"]
    kept = create_network(name, 3)
    file = folder / "model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if key.endswith("weight"))
    original = file.read_bytes()
    from safetensors.torch import save_file

    save_file({**weights, key: weights[key] + 1}, file, {"format": "pt"})
    code, _, error = shell(train_offline, argv)
    assert code == 2 and "is not the weight file on record" in error
    file.write_bytes(original)
    assert shell(train_offline, argv)[0] == 0
    top1 = read(run / "summary.json")["teacher"]["top1"]
    assert f"fixed): top-1 {top1:.2f} %" in said
    load_weights(kept, file)
    alone = ["--network", name, "--pretrained", "true", *data, "--out", str(tmp_path / "alone.json")]
    assert shell(evaluate.main, alone)[0] == 0
    assert read(tmp_path / "alone.json")["values"]["student/top1"] == top1


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_head_is_made_anew_for_other_classes_and_only_where_it_can_learn(
    command: Command, shell: Any, tmp_path: Path, library: str, name_of: Callable[[str], str], folders: dict[str, Path]
) -> None:
    name, file = name_of(f"{library} 7"), folders[f"{library} 7"] / "model.safetensors"
    for place in ({"pretrained": True}, {"weights": file}):
        networks = [*named("teacher", name, **place), *named("student", name, **place)]
        run = tmp_path / next(iter(place))
        rate = ["--optimizer.lr", "0", "--optimizer.weight_decay", "0"]
        assert command(small(run, *networks, *rate, method="dml", size=32))[0] == 0
        said = (run / "log.txt").read_text()
        assert f"warning: teacher ({name}): its head is made anew for 3 classes, since its weights are for 7" in said
        assert f"note: student ({name}): its head is made anew for 3 classes, since its weights are for 7" in said
        assert "before training" not in said  # there is nothing to score yet
        trained, began = load_file(run / "checkpoints/last/student.safetensors"), load_file(file)
        other = [key for key in began if "running" not in key and "num_batches" not in key]
        differ = {k for k in other if trained[k].shape != began[k].shape or not torch.equal(trained[k], began[k])}
        heads = {"transformers": {"classifier.1.weight", "classifier.1.bias"}, "timm": {"fc.weight", "fc.bias"}}
        assert differ == heads[library]
        data = ["--data.name", "digits", "--data.classes", "3", "--data.image_size", "32", *CPU]
        fixed = [
            *data,
            *named("teacher", name, **place),
            *named("student", "cifar_resnet8"),
            "--out",
            str(tmp_path / "no"),
        ]
        code, _, error = shell(train_offline, fixed)
        assert code == 2 and len(error.strip().splitlines()) == 1 and not (tmp_path / "no/checkpoints").exists()
        assert "teacher" in error and ("7 classes" in error or "these very classes" in error)


def test_a_checkpoint_of_timms_trainer_starts_a_network(command: Command, tmp_path: Path) -> None:
    from timm.utils import CheckpointSaver, ModelEmaV3

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    ema = ModelEmaV3(model)
    with torch.no_grad():
        for parameter in ema.module.parameters():
            parameter.add_(0.01)
    args = argparse.Namespace(model="test_resnet", lr=0.1)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 50.0)
    file = tmp_path / "last.pth.tar"
    run = tmp_path / "run"
    networks = [
        *named("teacher", "test_resnet", weights=file),
        *named("student", "test_resnet", weights=f"{file}#state_dict"),
    ]
    assert (
        command(small(run, *networks, "--optimizer.lr", "0", "--optimizer.weight_decay", "0", method="dml", size=32))[0]
        == 0
    )
    said = (run / "log.txt").read_text()
    assert "state_dict_ema was taken" in said and "teacher (test_resnet): its head is made anew" in said
    for role, source in (("teacher", ema.module), ("student", model)):
        trained = load_file(run / f"checkpoints/last/{role}.safetensors")
        key, parameter = next(source.named_parameters())
        assert torch.equal(trained[key], parameter)


def test_more_than_another_head_is_refused_and_nothing_changes() -> None:
    network = create_network("torchvision/squeezenet1_1", 3)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = dict(create_network("torchvision/squeezenet1_1", 7).state_dict())
    assert load_state(network, state, "it", new_head=True) == 7
    network.load_state_dict(before)
    state["features.0.weight"] = torch.zeros(7, 3, 3, 3)
    with pytest.raises(InputError, match=r"another architecture.*features\.0\.weight"):
        load_state(network, state, "it", new_head=True)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_pretrained_torchvision_weights_keep_all_but_the_head(
    monkeypatch: pytest.MonkeyPatch, shell: Any, tmp_path: Path
) -> None:
    import torchvision

    state = torchvision.models.squeezenet1_1().state_dict()
    kind = torchvision.models.SqueezeNet1_1_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, *args, **options: state)
    network = create_network("torchvision/squeezenet1_1", 3, pretrained=True)
    assert torch.equal(network.state_dict()["features.0.weight"], state["features.0.weight"])
    assert network.state_dict()["classifier.1.weight"].shape[0] == 3
    assert said_of("torchvision/squeezenet1_1")["num_classes"] == 1000
    assert said_of("torchvision/squeezenet1_1")["mean"] == (0.485, 0.456, 0.406)
    data = ["--data.name", "digits", "--data.classes", "3", "--data.image_size", "32", *CPU, "--out", str(tmp_path)]
    fixed = named("teacher", "torchvision/squeezenet1_1", pretrained=True)
    code, _, error = shell(train_offline, [*data, *fixed, *named("student", "cifar_resnet8")])
    assert code == 2 and "needs a pre-trained teacher" in error
    configs = {"teacher": NetworkConfig("torchvision/squeezenet1_1", pretrained=True)}
    new_heads: dict[str, int] = {}
    build_networks(configs, 3, 0, learning=["teacher"], new_heads=new_heads)
    assert new_heads == {"teacher": 1000}
    with pytest.raises(InputError, match="1000 classes, but teacher has 3; teacher is fixed"):
        build_networks(configs, 3, 0)


@pytest.mark.parametrize(
    ("name", "pretrained", "words"),
    [
        ("torchvision/squeezenet1_2", False, "did you mean 'torchvision/squeezenet1_1'?"),
        ("torchvison/resnet18", False, "did you mean 'torchvision/resnet18'?"),
        ("torchvision/resnet18", False, "student (torchvision/resnet18): ResNet: its last map is 1 x 1"),
        ("transformers/EMPTY", False, "is no folder of a saved model"),
        ("transformers/MISSING", False, "there is no folder"),
        ("local-dir:MISSING", False, "there is no folder"),
        ("local-dir:TRANSFORMERS", False, "holds no model of timm"),
        ("transformers/TIMM", False, "holds no model of transformers"),
        ("transformers/NOWEIGHTS", True, "holds no weights (model.safetensors or pytorch_model.bin)"),
        ("transformers/TEXT", False, "Unrecognized configuration class"),
        ("transformers/VIT", False, "ViTForImageClassification"),
        ("transformers/", False, "name a folder"),
    ],
)
def test_what_is_no_such_network_is_refused_in_a_line(
    command: Command, tmp_path: Path, folders: dict[str, Path], name: str, pretrained: bool, words: str
) -> None:
    places = {"MISSING": tmp_path / "missing", "TRANSFORMERS": folders["transformers 3"], "TIMM": folders["timm 3"]}
    for place in ("EMPTY", "NOWEIGHTS", "TEXT", "VIT"):
        places[place] = tmp_path / place
        places[place].mkdir()
    shutil.copy(folders["transformers 3"] / "config.json", places["NOWEIGHTS"])
    (places["TEXT"] / "config.json").write_text('{"model_type": "t5"}')
    tiny = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (places["VIT"] / "config.json").write_text(json.dumps({**tiny, "image_size": 32, "intermediate_size": 8}))
    for place, folder in places.items():
        name = name.replace(place, str(folder))
    networks = [*named("teacher", "cifar_resnet8"), *named("student", name, pretrained=pretrained)]
    code, _, error = command(small(tmp_path / "run", *networks, size=32))
    assert code == 2, error
    assert words in error and len(error.strip().splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs the package transformers: pip install transformers"):
        create_network(f"transformers/{folders['transformers 3']}", 3)
