"""Networks that want images of different size: what each sees, how ADM compares them, and what knows the size later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import arguments, assert_same_runs, lines, read, stop_at, train_whole
from torchvision.transforms.functional import to_pil_image

from classification.config import parse_command
from classification.experiment import build, command_of, images_at, restore
from classification.tools.evaluate import main as evaluate
from classification.tools.predict import main as predict
from classification.tools.train import main as train
from core.errors import InputError
from core.training.checkpoint import find_checkpoint
from core.weights import read_metadata, weights_hash

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
# One view of 16 pixels: the teacher sees it whole, the student at 8.
SIZES = ["--data.image_size", "16", "--networks.student.size", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sizes") / "run"
    train_whole(train, arguments(out, *SIZES, "--fit.epochs", "2"))
    return out


def test_each_network_resizes_the_one_view_and_normalises_it(tmp_path: Path) -> None:
    own = ["--networks.student.mean", "[0.1, 0.2, 0.3]", "--networks.student.std", "[0.5, 0.6, 0.7]"]
    experiment = build(parse_command(arguments(tmp_path / "run", *SIZES, *own)))
    distiller, batch = experiment.distiller, next(iter(experiment.train_loader()))
    views = distiller.views(batch["image"])
    small = F.interpolate(batch["image"].float() / 255, (8, 8), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    torch.testing.assert_close(views["student"], (small - mean) / std, rtol=1e-5, atol=1e-5)
    assert views["teacher"].shape[-2:] == (16, 16) and views["student"].shape[-2:] == (8, 8)
    # A size that the images have already changes nothing, to the last bit.
    same = build(parse_command(arguments(tmp_path / "run", "--networks.student.size", "8"))).distiller
    plain = build(parse_command(arguments(tmp_path / "run"))).distiller
    images = images_at(experiment.datasets.test, 2)[..., ::2, ::2]
    assert torch.equal(same.views(images)["student"], plain.views(images)["student"])


def test_adm_compares_their_maps_at_the_smaller_size(tmp_path: Path) -> None:
    experiment = build(parse_command(arguments(tmp_path / "run", *SIZES)))
    distiller = experiment.distiller
    outputs = distiller.outputs(images_at(experiment.datasets.test, 2))
    teacher, student = (outputs[role].maps[-1].shape[-2:] for role in ("teacher", "student"))
    assert teacher == (4, 4) and student == (2, 2)
    assert distiller.adm is not None
    (similarity,) = distiller.adm.similarities({role: o.maps[-1] for role, o in outputs.items()}).values()
    assert similarity.shape[1:] == student


def test_such_a_run_trains_and_resumes_bit_for_bit(
    run: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 4)
    again = arguments(tmp_path / "cut", *SIZES, "--fit.epochs", "2")
    assert [command(again)[0] for _ in range(2)] == [130, 0]
    assert_same_runs(run, tmp_path / "cut")


@pytest.mark.parametrize("method", ["kdcl+adm", "kdcl", "switokd", "afd+adm"])
def test_every_method_that_can_takes_them(command: Command, tmp_path: Path, method: str) -> None:
    more = [*SIZES, "--fit.epochs", "1"]
    assert command(arguments(tmp_path / "run", *more, method=method))[0] == 0


def test_shakes_shadow_is_built_for_the_teachers_size_in_whatever_order(run: Path, tmp_path: Path) -> None:
    given = [*SIZES, "--networks.teacher.weights", str(run)]
    command = parse_command(arguments(tmp_path / "run", *given, method="shake"))
    experiment = build(command)
    maps = {role: o.maps[-1].shape[-2:] for role, o in experiment.distiller.outputs(torch.zeros(2, 3, 16, 16)).items()}
    assert maps == {"teacher": (4, 4), "shadow": (4, 4), "student": (2, 2)}


def test_without_a_word_of_it_the_config_says_nothing(tmp_path: Path) -> None:
    networks = parse_command(arguments(tmp_path / "run", *SIZES)).resolved()["networks"]
    assert networks["student"]["size"] == 8 and "size" not in networks["teacher"]


def test_the_weights_say_the_size_and_a_network_that_starts_from_them_takes_it(run: Path, tmp_path: Path) -> None:
    folder = find_checkpoint(run, "last")
    assert read_metadata(folder / "student.safetensors")["size"] == "8"
    assert "size" not in read_metadata(folder / "teacher.safetensors")
    assert restore(command_of(run), folder).distiller.configs["student"].size == 8
    start = ["--data.image_size", "16", "--networks.student.weights", str(run)]
    assert build(parse_command(arguments(tmp_path / "a", *start))).distiller.configs["student"].size == 8
    other = [*start, "--networks.student.size", "12"]
    assert build(parse_command(arguments(tmp_path / "b", *other))).distiller.configs["student"].size == 12


def test_the_hash_of_weights_knows_their_size(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = find_checkpoint(run, "last") / "student.safetensors"
    said = {name: "[0.5, 0.5, 0.5]" if name in ("mean", "std") else str(v) for name, v in read_metadata(file).items()}
    for size in ("8", "16"):
        save_file(load_file(file), tmp_path / f"{size}.safetensors", {**said, "size": size})
    assert weights_hash([tmp_path / "8.safetensors"]) != weights_hash([tmp_path / "16.safetensors"])


def test_evaluate_and_predict_say_the_same(run: Path, shell: Any, tmp_path: Path) -> None:
    assert shell(evaluate, [str(run), "--device", "cpu"])[0] == 0
    report, last = read(run / "evaluation-last-test.json"), lines(run, "evaluation")[-1]
    assert report["values"]["student/top1"] == last["student/top1"]
    assert report["networks"]["student"]["size"] == 8 and "size" not in report["networks"]["teacher"]
    (tmp_path / "images").mkdir()
    test = build(command_of(run), check=False).datasets.test
    for place, image in enumerate(images_at(test, len(test))):
        to_pil_image(image).save(tmp_path / f"images/{place:03}.png")
    argv = [str(tmp_path / "images"), "--device", "cpu"]
    code, said, _ = shell(predict, [str(run), *argv])
    rows = said.splitlines()[1:]
    right = sum(int(row.split(",")[1]) == int(target) for row, target in zip(rows, test.targets, strict=True))
    assert code == 0 and 100 * right / len(rows) == pytest.approx(report["values"]["student/top1"])
    file = str(find_checkpoint(run, "last") / "student.safetensors")
    code, alone, error = shell(predict, [file, *argv, "--data.image_size", "16"])
    assert code == 0 and alone.splitlines()[1:] == rows
    code, alone, error = shell(predict, [file, *argv])  # straight to 8 pixels
    assert code == 0 and len(alone.splitlines()) == len(rows) + 1, error


def test_exports_take_images_of_that_size(shell: Any, command: Command, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "export"
    more = ["--networks", "{student: {name: resnet10t, size: 32}}", "--data.image_size", "64", "--fit.epochs", "1"]
    assert command(arguments(run, *more, method="vanilla"))[0] == 0
    argv = [str(run), "--device", "cpu", "--export", str(folder), "--format", "timm,onnx"]
    code, _, error = shell(evaluate, argv)  # each is reopened, and its logits compared
    assert code == 0, error
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 32]
    import onnx

    model = onnx.load(folder / "model.onnx")
    (shape,) = ([d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input)
    assert shape[1:] == [3, 32, 32]
    assert "for images 3 x 32 x 32" in (folder / "README.md").read_text()


def test_what_cannot_be_says_so(command: Command, tmp_path: Path) -> None:
    for more, words in (
        ([*SIZES[2:3], "2"], "size must be in [4, 4096]"),
        ([*SIZES, "--method", "afid"], "networks.<role>.size"),
    ):
        code, _, error = command(arguments(tmp_path / "run", *more))
        assert code == 2 and len(error.splitlines()) == 1 and words in error
    assert not (tmp_path / "run").exists()


def test_enlarged_images_are_remarked_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(parse_command(arguments(tmp_path / "run", "--networks.teacher.size", "24")))
    assert "networks.teacher.size 24 is more than data.image_size 8" in capfd.readouterr().err
    with pytest.raises(InputError, match="size must be in"):
        parse_command(arguments(tmp_path / "run", "--networks.teacher.size", "5000"))


def test_a_ratio_that_is_no_whole_number_is_compared_too(command: Command, tmp_path: Path) -> None:
    sizes = ["--data.image_size", "24", "--networks.teacher.size", "24", "--networks.student.size", "16"]
    assert command(arguments(tmp_path / "run", *sizes, "--fit.epochs", "1"))[0] == 0
