"""Pre-trained networks: which file a path means, what is refused, whose normalisation counts, what a run records."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import RECIPE, SMALL, arguments, stop_at
from safetensors.torch import save_file

import classification.distiller
from classification.config import parse_command
from classification.experiment import build, command_of, restore
from classification.networks import create_network
from classification.networks.pretrained import (
    check_weights,
    find_weights,
    keeps_head,
    same_architecture,
)
from classification.tools import evaluate
from core.errors import InputError
from core.training.checkpoint import find_checkpoint
from core.training.command import run_command
from core.weights import read_metadata, read_state_dict, weights_hash

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
NORM = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


def write(file: Path, architecture: str | None = "cifar_resnet8", classes: int = 3, norm: Any = NORM) -> Path:
    """A weight file as our checkpoints have it (without metadata for no architecture)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    said = {"architecture": architecture, "num_classes": str(classes), **{k: json.dumps(v) for k, v in norm.items()}}
    known = architecture in classification.networks.CIFAR_NETWORKS
    network = create_network(architecture if known else "cifar_resnet8", classes)  # type: ignore[arg-type]
    save_file(network.state_dict(), file, said if architecture is not None else {"format": "pt"})  # type: ignore[arg-type]
    return file


def run_of(folder: Path, **networks: str) -> Path:
    """A run folder with two checkpoints: last (step 2) and best (step 1), a network per role."""
    for step in ("step-00000001", "step-00000002"):
        for role, name in networks.items():
            write(folder / "checkpoints" / step / f"{role}.safetensors", name)
    (folder / "checkpoints/last").symlink_to("step-00000002")
    (folder / "checkpoints/best").symlink_to("step-00000001")
    return folder


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- which file -------------------------------------------------------------------------------------------------------


def test_a_file_a_run_and_a_checkpoint_folder(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", teacher="cifar_resnet8", student="cifar_resnet8")
    checkpoints = run / "checkpoints"
    file = write(tmp_path / "any.safetensors")
    for place, role, wanted in (
        (file, "teacher", file),
        (run, "teacher", checkpoints / "step-00000002/teacher.safetensors"),
        (run, "student", checkpoints / "step-00000002/student.safetensors"),
        (checkpoints / "best", "teacher", checkpoints / "step-00000001/teacher.safetensors"),
        (checkpoints / "step-00000001", "student", checkpoints / "step-00000001/student.safetensors"),
    ):
        for given in (place, str(place)):
            assert find_weights(given, role, "cifar_resnet8").resolve() == wanted.resolve()


def test_without_that_role_the_only_network_that_fits(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", teacher="cifar_resnet14", student="cifar_resnet8")
    assert find_weights(run, "teacher_2", "cifar_resnet14").name == "teacher.safetensors"
    assert find_weights(run, "teacher_2", "cifar_resnet8").name == "student.safetensors"
    alone = run_of(tmp_path / "b", student="cifar_resnet8")
    assert find_weights(alone, "teacher", "cifar_resnet8").name == "student.safetensors"
    alike = run_of(tmp_path / "c", teacher="cifar_resnet8", student="cifar_resnet8")
    assert find_weights(alike, "teacher_2", "cifar_resnet8").name == "teacher.safetensors"
    assert find_weights(alike, "student_2", "cifar_resnet8").name == "student.safetensors"
    # The same role is meant even where only another network fits: what it holds is then refused.
    own = find_weights(run, "teacher", "cifar_resnet8")
    assert own.name == "teacher.safetensors"
    said = refusal(lambda: check_weights(own, "teacher", "cifar_resnet8", 3))
    assert "cifar_resnet14" in said and "cifar_resnet8" in said


def test_what_names_no_file_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", teacher="cifar_resnet8", teacher_3="cifar_resnet8", student="cifar_resnet14")
    said = refusal(lambda: find_weights(run, "teacher_2", "cifar_resnet8"))
    assert "several" in said and "teacher_3 (cifar_resnet8)" in said and "name the file" in said
    said = refusal(lambda: find_weights(run, "teacher_2", "cifar_vgg8"))
    assert "none" in said and "cifar_vgg8" in said and "student (cifar_resnet14)" in said
    assert f"no weight file {tmp_path / 'x'}" in refusal(lambda: find_weights(tmp_path / "x", "teacher", "cifar_vgg8"))
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert "holds no weights" in refusal(lambda: find_weights(tmp_path / "empty", "teacher", "cifar_vgg8"))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("resnet34", "resnet34", True),
        ("resnet34.a1_in1k", "resnet34", True),
        ("resnet34.a1_in1k", "resnet34.tv_in1k", True),
        ("resnet34", "resnet18", False),
        ("resnet34.a1_in1k", "resnet18.a1_in1k", False),
        ("local-dir:./a", "local-dir:./b", True),  # places: what they hold is told by the shapes
        ("transformers/a.b", "resnet34", True),
        ("torchvision/resnet34", "resnet34", False),
        ("local-dir:./a", "local-dir:./a", True),
    ],
)
def test_the_tag_of_timms_weights_does_not_count(a: str, b: str, same: bool) -> None:
    assert same_architecture(a, b) is same and same_architecture(b, a) is same


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.safetensors", "cifar_resnet8", 3)
    digest = weights_hash([file])
    for known in (digest, hashlib.sha256(file.read_bytes()).hexdigest()):  # of the weights, or of the file
        check_weights(file, "teacher", "cifar_resnet8", 3, known)
    said = refusal(lambda: check_weights(file, "teacher", "cifar_resnet14", 3))
    assert "cifar_resnet8" in said and "cifar_resnet14" in said and str(file) in said
    said = refusal(lambda: check_weights(file, "teacher", "cifar_resnet8", 10))
    assert "3 classes" in said and "10" in said
    said = refusal(lambda: check_weights(file, "teacher", "cifar_resnet8", 3, "0" * 64))
    assert str(file) in said and digest[:12] in said and "0" * 12 in said

    # What says nothing passes here, and loading it compares shapes.
    bare = write(tmp_path / "bare.safetensors", None)
    torch.save({"a": torch.zeros(1)}, tmp_path / "published.pth")
    for quiet in (bare, tmp_path / "published.pth"):
        check_weights(quiet, "teacher", "cifar_resnet14", 10, weights_hash([quiet]))
        assert not read_metadata(quiet).keys() - {"format"}
    file.write_bytes(file.read_bytes()[:3000])
    assert "incomplete" in refusal(lambda: check_weights(file, "teacher", "cifar_resnet8", 3))


# --- in a run ---------------------------------------------------------------------------------------------------------


def weights(place: Path, *more: str, role: str = "teacher") -> list[str]:
    return [f"--networks.{role}.name", "cifar_resnet8", f"--networks.{role}.weights", str(place), *more]


def test_one_key_of_a_recipes_network_can_be_given_alone(tmp_path: Path) -> None:
    place = str(tmp_path / "nowhere")  # nothing is looked up before the run is built
    config = parse_command(["--config", str(RECIPE), "--networks.teacher.weights", place]).config
    assert config.networks["teacher"].name == "cifar_wrn_10_2" and config.networks["teacher"].weights == place
    assert config.networks["student"].weights is None and config.networks["student"].name == "cifar_resnet8"


def test_weights_arrive_with_their_normalisation(tmp_path: Path) -> None:
    file = write(tmp_path / "t.safetensors")
    plain = build(parse_command(arguments(tmp_path / "run", method="vanilla"))).datasets
    own = (plain.mean, plain.std)
    mean = ["--networks.teacher.mean", "[0.4, 0.4, 0.4]"]
    for more, wanted in (
        (weights(file), (NORM["mean"], NORM["std"])),
        (weights(file, *mean), ((0.4, 0.4, 0.4), NORM["std"])),
        (weights(file, *mean, "--networks.teacher.std", "[1, 1, 1]"), ((0.4, 0.4, 0.4), (1.0, 1.0, 1.0))),
        (weights(write(tmp_path / "bare.safetensors", None)), own),
    ):
        distiller = build(parse_command(arguments(tmp_path / "run", *more, method="vanilla"))).distiller
        assert distiller.normalisation == {"teacher": wanted, "student": own}
        state = distiller.networks["teacher"].state_dict()
        torch.manual_seed(5)
        saved = create_network("cifar_resnet8", 3).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in saved.items())
        assert json.loads(distiller.metadata("teacher")["mean"]) == list(wanted[0])


def test_timms_weights_bring_theirs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_download(name: str, num_classes: int, *, pretrained: bool) -> Any:
        assert pretrained is name.startswith("inception")
        return create_network("cifar_resnet8", num_classes)

    monkeypatch.setattr(classification.distiller, "create_network", without_download)
    more = ["--networks.teacher.name", "inception_v3.tf_in1k", "--networks.teacher.pretrained", "true"]
    experiment = build(parse_command(arguments(tmp_path / "run", *more, method="vanilla")))
    half = (0.5, 0.5, 0.5)
    assert experiment.distiller.normalisation["teacher"] == (half, half)
    assert experiment.distiller.normalisation["student"][0] == experiment.datasets.mean


def test_timms_weights_count_as_trained_where_their_classifier_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keeps_head("resnet18", 1000) and not keeps_head("resnet18", 3)
    assert keeps_head("hf-hub:someone/network", 3)  # it does not say before it is fetched
    monkeypatch.setattr(
        classification.distiller, "create_network", lambda name, n, **_: create_network("cifar_resnet8", n)
    )
    more = ["--networks.teacher.name", "resnet18", "--networks.teacher.pretrained", "true"]
    command = parse_command(arguments(tmp_path / "run", *more, method="shake"))
    assert "needs a pre-trained teacher" in refusal(lambda: build(command))  # 3 digits: a random classifier
    monkeypatch.setattr("classification.experiment.keeps_head", lambda name, classes: True)
    monkeypatch.setattr("classification.distiller.said_of", lambda name: {"num_classes": 3})
    assert list(build(command).distiller.trained()) == ["student"]


def test_a_network_that_does_not_fit_ends_in_one_line(tmp_path: Path, command: Command) -> None:
    run = run_of(tmp_path / "t", teacher="cifar_resnet8")
    out = tmp_path / "run"
    for more, words in (
        (weights(tmp_path / "none"), ("no weight file",)),
        (weights(tmp_path), ("holds no weights",)),
        (weights(run, "--networks.teacher.name", "cifar_resnet14"), ("cifar_resnet8", "cifar_resnet14")),
        (weights(run, "--networks.teacher.sha256", "ab" * 32), ("not the weight file on record",)),
    ):
        code, _, said = command(arguments(out, *more, method="vanilla"))
        assert code == 2 and said.count("\n") == 1 and all(word in said for word in words), said
        assert not out.exists()


def tool(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: evaluate.main([str(a) for a in argv]))
    return int(end.value.code or 0), capfd.readouterr().err


def test_a_frozen_teacher_is_recorded_by_its_hash(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = run_of(tmp_path / "t", teacher="cifar_resnet8")
    file = place / "checkpoints/last/teacher.safetensors"
    digest = weights_hash([file])
    argv = arguments(tmp_path / "run", *weights(place), "--fit.epochs", "2", method="shake")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert command(argv)[0] == 130
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["networks"]
    assert recorded["teacher"]["sha256"] == digest and recorded["teacher"]["weights"] == str(place)
    assert recorded["student"]["sha256"] is None
    assert not (tmp_path / "run/checkpoints/last/teacher.safetensors").exists()

    # It comes back from its weights, with their normalisation.
    experiment = restore(command_of(tmp_path / "run"), find_checkpoint(tmp_path / "run", "last"))
    network = experiment.distiller.networks["teacher"].state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(v, network[k]) for k, v in create_network("cifar_resnet8", 3).state_dict().items())
    assert experiment.distiller.normalisation["teacher"] == (NORM["mean"], NORM["std"])

    # Changed or gone, by the same command, by config.yaml, and in an evaluation: one line, and nothing is touched.
    whole = file.read_bytes()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = ["--config", str(tmp_path / "run/config.yaml"), "--out", str(tmp_path / "run")]
    other = create_network("cifar_resnet8", 3)
    for change, words in (
        (lambda: write_other(file, other), "not the weight file on record"),
        (file.unlink, "holds no weights"),
    ):
        change()
        for code, said in (command(argv)[::2], command(again)[::2], tool(capfd, tmp_path / "run")):
            assert code == 2 and words in said and said.count("\n") == 1, said
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}

    # The same weights at another place are the same teacher, however they are saved.
    (tmp_path / "whole.safetensors").write_bytes(whole)
    state = dict(reversed(read_state_dict(tmp_path / "whole.safetensors").items()))
    moved = arguments(tmp_path / "run", *weights(tmp_path / "moved.safetensors"), "--fit.epochs", "2", method="shake")
    save_file(state, tmp_path / "moved.safetensors")  # which would be normalised otherwise
    code, _, said = command(moved)
    assert code == 2 and "not the weight file on record: the SHA-256 of its weights, mean and std" in said
    save_file(state, tmp_path / "moved.safetensors", {"by": "hand", **{k: json.dumps(v) for k, v in NORM.items()}})
    code, _, said = command(moved)
    assert code == 0 and "resuming from step 4" in said
    assert tool(capfd, tmp_path / "run")[0] == 0
    # Another teacher, or none, is another run.
    code, _, said = command(
        arguments(tmp_path / "run", "--fit.epochs", "2", "--networks.teacher.name", "cifar_resnet8", method="shake")
    )
    assert code == 2 and "networks.teacher.sha256" in said and said.count("\n") == 1


def write_other(file: Path, network: torch.nn.Module) -> None:
    said = {"architecture": "cifar_resnet8", "num_classes": "3", **{k: json.dumps(v) for k, v in NORM.items()}}
    save_file(network.state_dict(), file, said)


def test_what_a_trained_network_started_from_is_not_needed_any_more(
    tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    place = run_of(tmp_path / "t", student="cifar_resnet8")
    out = tmp_path / "run"
    code, _, said = command(arguments(out, *weights(place, role="student"), "--fit.epochs", "1", method="dml"))
    assert code == 0, said
    assert yaml.safe_load((out / "config.yaml").read_text())["networks"]["student"]["sha256"]
    shutil.rmtree(place)
    assert tool(capfd, out)[0] == 0
    last = json.loads((out / "summary.json").read_text())["last"]
    report = json.loads((out / "evaluation-last-test.json").read_text())
    assert report["values"]["student/top1"] == last["student/top1"]
    assert tuple(report["networks"]["student"]["mean"]) == NORM["mean"]


def test_a_run_folder_can_be_evaluated_as_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = run_of(tmp_path / "t", student="cifar_resnet8")
    digits = [*SMALL[:-2], "--out", str(tmp_path / "x.json")]
    assert tool(capfd, "--weights", place, "--network", "cifar_resnet8", *digits)[0] == 0
    assert json.loads((tmp_path / "x.json").read_text())["networks"]["student"]["mean"] == list(NORM["mean"])
