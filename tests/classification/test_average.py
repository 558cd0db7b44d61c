"""The moving average of a student: its arithmetic, its figures, its file, and what is done with it after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STUDENT, TEACHER, arguments, assert_same, assert_same_runs, in_two_processes, lines, metrics, read
from runs import stop_at as stopping
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from classification.config import parse_command
from classification.distiller import ClassificationDistiller
from classification.experiment import build, images_at
from classification.networks import create_network
from classification.networks.pretrained import find_weights
from classification.tools.evaluate import main as evaluate
from classification.tools.predict import main as predict
from classification.tools.train import main as train
from core.training.average import Averages
from core.training.fit import FitConfig
from core.weights import read_metadata

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
EMA = ["--fit.ema_decay", "0.7"]


def weights(run: Path, role: str) -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/last/{role}.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with an average of its student, of three digits."""
    from runs import train_whole

    out = tmp_path_factory.mktemp("average") / "run"
    train_whole(train, arguments(out, *EMA, "--data.validation", "0.2"))
    return out


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_the_average_of_the_students_weights_and_statistics(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: bool
) -> None:
    seen: list[dict[str, Tensor]] = []
    real = ClassificationDistiller.after_step

    def after_step(self: Any, batch: Any, progress: Any) -> None:
        real(self, batch, progress)
        seen.append({name: tensor.clone() for name, tensor in self.networks["student"].state_dict().items()})

    monkeypatch.setattr(ClassificationDistiller, "after_step", after_step)
    more = [*EMA, "--fit.ema_warmup", str(warmup).lower(), "--fit.epochs", "2"]
    assert command([*arguments(tmp_path / "run"), *more])[0] == 0
    expected = {name: tensor.double() for name, tensor in seen[0].items()}
    for step, state in enumerate(seen[1:], start=2):
        decay = min(0.7, 1 - step ** (-2 / 3)) if warmup else 0.7
        for name, tensor in state.items():
            whole = tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double() if whole else tensor.double()
    found = weights(tmp_path / "run", "student_ema")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(found[name], seen[-1][name]) for name in found)


def test_the_run_beside_it_is_the_run_without_it(command: Command, tmp_path: Path) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    assert command(arguments(plain))[0] == 0
    code, _, error = command(arguments(averaged, *EMA))
    assert code == 0 and "student_ema " in error
    for role in ("teacher", "student"):
        assert_same(weights(plain, role), weights(averaged, role))
    assert not (averaged / "checkpoints/last/teacher_ema.safetensors").exists()
    for a, b in zip(metrics(plain), metrics(averaged), strict=True):
        assert a == {name: value for name, value in b.items() if not name.startswith("student_ema/")}
    assert all("student_ema/top1" in line for line in lines(averaged, "evaluation"))
    assert parse_command(arguments(plain)).resolved()["fit"].keys().isdisjoint({"ema_decay", "ema_warmup"})


def test_interrupted_and_resumed_it_is_bit_for_bit_the_same(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [*EMA, "--fit.ema_warmup", "true", "--data.validation", "0.2"]
    assert command(arguments(whole, *more))[0] == 0
    stopping(monkeypatch, 2, 7)
    assert [command(arguments(cut, *more))[0] for _ in range(3)] == [130, 130, 0]
    assert_same_runs(whole, cut)


def test_a_step_of_it_reads_no_value_from_the_device(tmp_path: Path) -> None:
    read_values: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                read_values.append(func)
            return func(*args, **(kwargs or {}))

    distiller = build(parse_command(arguments(tmp_path / "run"))).distiller
    averages = Averages(distiller, FitConfig(ema_decay=0.9, ema_warmup=True))
    with Watch():
        averages.update(1)
        averages.update(2)
    assert list(distiller.moving_averages) == ["student_ema"] and not read_values


def test_its_file_says_what_it_is(run: Path) -> None:
    said = read_metadata(run / "checkpoints/last/student_ema.safetensors")
    own = read_metadata(run / "checkpoints/last/student.safetensors")
    assert said == {**own, "role": "student_ema"}


def test_evaluate_and_predict_know_it(run: Path, shell: Any, tmp_path: Path) -> None:
    code, said, _ = shell(evaluate, [str(run), "--device", "cpu"])
    assert code == 0 and "student_ema" in said
    report = read(run / "evaluation-last-test.json")
    last = lines(run, "evaluation")[-1]
    for role in ("teacher", "student", "student_ema"):
        assert report["values"][f"{role}/top1"] == last[f"test/{role}/top1"]
    assert report["values"]["student_ema/nll"] != report["values"]["student/nll"]
    file = run / "checkpoints/last/student_ema.safetensors"
    data = ["--data.name", "digits", "--data.classes", "3", "--data.image_size", "8", "--device", "cpu"]
    code, said, _ = shell(evaluate, ["--weights", str(file), *data, "--out", str(tmp_path / "file.json")])
    assert code == 0 and read(tmp_path / "file.json")["values"]["student_ema/top1"] == last["test/student_ema/top1"]

    from PIL import Image
    from torchvision.transforms.functional import to_pil_image

    (tmp_path / "images").mkdir()
    split = build(parse_command(arguments(tmp_path / "none")), check=False).datasets.test
    for place, image in enumerate(images_at(split, 40)):
        picture: Image.Image = to_pil_image(image)
        picture.save(tmp_path / f"images/{place:03}.png")
    predicted = {}
    for name, more in (("student", []), ("student_ema", ["--role", "student_ema"])):
        code, said, _ = shell(predict, [str(run), str(tmp_path / "images"), "--device", "cpu", *more])
        assert code == 0
        predicted[name] = said
    code, said, _ = shell(predict, [str(file), str(tmp_path / "images"), "--device", "cpu", *data[:-2]])
    assert code == 0 and said == predicted["student_ema"] != predicted["student"]
    code, _, error = shell(predict, [str(run), str(tmp_path / "images"), "--role", "teacher_ema"])
    assert code == 2 and "did you mean" in error


def test_it_is_exported(run: Path, shell: Any, tmp_path: Path) -> None:
    folder, more = tmp_path / "export", ["--format", "torch", "--export_role", "student_ema"]
    code, said, error = shell(evaluate, [str(run), "--device", "cpu", "--export", str(folder), *more])
    assert code == 0, error
    assert "student_ema exported" in said and "| student_ema |" in (folder / "README.md").read_text()
    network = create_network(STUDENT, 3)
    network.load_state_dict(weights(run, "student_ema"))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = torch.export.load(folder / "model.pt2").module()(images)
    torch.testing.assert_close(logits, network.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_run_may_start_from_it(run: Path, command: Command, tmp_path: Path) -> None:
    assert find_weights(run, "student", STUDENT).name == "student.safetensors"
    assert find_weights(f"{run}#student_ema", "teacher", STUDENT).name == "student_ema.safetensors"
    assert find_weights(run, "teacher_2", STUDENT).name == "student.safetensors"  # the average only where it is named
    more = ["--networks.student.weights", f"{run}#student_ema", "--fit.epochs", "1"]
    code, _, error = command([*arguments(tmp_path / "run"), *more])
    assert code == 0, error
    top1 = lines(run, "evaluation")[-1]["test/student_ema/top1"]
    assert f"before training): top-1 {top1:.2f} % on test" in error
    code, _, error = command([*arguments(tmp_path / "other"), "--networks.student.weights", f"{run}#student_eam"])
    assert code == 2 and "holds no weights of student_eam" in error and "student_ema" in error


@pytest.mark.parametrize("method", ["dml", "kdcl", "switokd", "afd"])
def test_other_methods_have_it_too(command: Command, tmp_path: Path, method: str) -> None:
    more = [*EMA, "--fit.epochs", "1"]
    assert command(arguments(tmp_path / "run", *more, method=method))[0] == 0
    assert "student_ema/top1" in lines(tmp_path / "run", "evaluation")[-1]


def test_what_cannot_be_averaged_says_so(command: Command, tmp_path: Path) -> None:
    for more, words in (
        (["--fit.ema_warmup", "true"], "fit.ema_decay"),
        (["--fit.ema_decay", "1"], "fit.ema_decay must be in [0, 1)"),
        ([*EMA, "--method", "afid"], "fit.ema_decay averages a network alone"),
    ):
        code, _, error = command([*arguments(tmp_path / "run", *more)])
        assert code == 2 and len(error.splitlines()) == 1 and words in error
    assert not (tmp_path / "run").exists()


def test_a_single_network_of_any_role_is_averaged(command: Command, tmp_path: Path) -> None:
    out, networks = tmp_path / "run", ["--networks", "{teacher: {name: " + TEACHER + "}}"]
    assert command([*arguments(out, method="vanilla"), *networks, *EMA, "--fit.epochs", "1"])[0] == 0
    assert {file.stem for file in (out / "checkpoints/last").glob("*.safetensors")} == {"teacher", "teacher_ema"}
    assert "teacher_ema/top1" in lines(out, "evaluation")[-1]


@pytest.mark.slow
def test_two_processes_save_the_average_that_they_scored(tmp_path: Path, shell: Any) -> None:
    """BatchNorm's statistics, and so their averages, differ between processes until an evaluation."""
    out = tmp_path / "run"
    in_two_processes("classification/tools/train.py", *arguments(out, *EMA, "--fit.epochs", "2", method="vanilla"))
    assert shell(evaluate, [str(out), "--device", "cpu"])[0] == 0
    values, last = read(out / "evaluation-last-test.json")["values"], lines(out, "evaluation")[-1]
    for name in ("student_ema/nll", "student/nll"):
        assert values[name] == pytest.approx(last[name], rel=1e-6)
