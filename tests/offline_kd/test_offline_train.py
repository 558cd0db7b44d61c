"""Offline distillation through its commands: what it learns, what never moves, what is refused, what a run leaves."""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import CPU, ROOT, STUDENT, TEACHER, assert_same, assert_same_runs, check_log, stop_at
from runs import metrics as lines
from runs import offline_arguments as arguments
from torch import Tensor, nn

import classification.training
from classification.config import parse_command
from classification.distiller import ClassificationDistiller
from classification.evaluation import evaluate
from classification.experiment import Experiment, build, command_of, restore
from classification.networks import create_network
from classification.tools import evaluate as online_evaluate
from classification.tools import train as online_train
from classification.tools import visualize as online_visualize
from core.adm import ADMConfig
from core.errors import InputError
from core.training.checkpoint import find_checkpoint, read_checkpoint
from core.training.distiller import Progress
from offline_kd.config import OFFLINE
from offline_kd.tools import evaluate as offline_evaluate
from offline_kd.tools import visualize as offline_visualize
from tools import compare

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
RECIPES = ROOT / "offline_kd/recipes"
LABELS = [f"{method}{adm}" for method in OFFLINE.methods for adm in ("", "+adm")]
START = Progress(0, 0.0, 100, 10.0)


def experiment_of(tmp_path: Path, teacher: Path, *more: str, method: str = "kd", student: str = STUDENT) -> Experiment:
    return build(
        parse_command(arguments(tmp_path / "run", teacher, *more, method=method, student=student), task=OFFLINE)
    )


def batch_of(experiment: Experiment, count: int = 6) -> dict[str, Any]:
    train = experiment.datasets.train
    return {"image": train.images[:count], "target": train.targets[:count], "index": torch.arange(count)}


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        build(parse_command(list(argv), task=OFFLINE))
    assert "\n" not in str(error.value)
    return str(error.value)


class Watched:
    """The experiments that the command builds, and how many images each of their networks was shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: Counter[str] = Counter()
        self.groups: list[list[nn.Parameter]] = []
        monkeypatch.setattr(classification.training, "build", self._build)
        real = ClassificationDistiller.parameter_groups

        def parameter_groups(distiller: ClassificationDistiller) -> list[dict[str, Any]]:
            groups = real(distiller)
            self.groups.append([p for group in groups for p in group["params"]])
            return groups

        monkeypatch.setattr(ClassificationDistiller, "parameter_groups", parameter_groups)

    def _build(self, command: Any) -> Experiment:
        self.experiment = build(command)
        for role, network in self.experiment.distiller.networks.items():
            network.stem.register_forward_hook(
                lambda module, inputs, output, role=role: self.images.update({role: len(output)})
            )
        return self.experiment


# --- it learns, resumes, and its teacher stays as it was --------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd", "kd+adm"])
def test_learns_from_a_fixed_teacher(
    method: str, tmp_path: Path, command: Command, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    more = ["--data.per_class", "120", "--batch_size", "50", "--fit.epochs", "6", "--schedule.milestones", "[5]"]
    code, _, said = command(arguments(tmp_path / "run", teacher, *more, method=method))
    assert code == 0, said
    distiller = watched.experiment.distiller
    check_log(tmp_path / "run", f"teacher {TEACHER} (fixed, ", "600 training images", stderr=said)
    last = json.loads((tmp_path / "run/summary.json").read_text())["last"]
    assert last["student/top1"] > 60, last  # 20 is chance, 3 its standard deviation

    own = read_checkpoint(teacher / "checkpoints/last")[0]["teacher"]
    assert_same(dict(distiller.networks["teacher"].state_dict()), own)  # BatchNorm's statistics and counts too
    assert not any(module.training for module in distiller.train().networks["teacher"].modules())
    assert all(p.grad is None and not p.requires_grad for p in distiller.networks["teacher"].parameters())
    (optimised,) = watched.groups
    fixed = {id(p) for p in distiller.networks["teacher"].parameters()}
    assert optimised and not fixed & {id(p) for p in optimised}
    saved, state = read_checkpoint(tmp_path / "run/checkpoints/last")
    assert saved.keys() == {"student"}
    assert not any("networks.teacher" in name for name in state["extra"])
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert recorded["task"] == "offline_kd" and recorded["networks"]["teacher"]["weights"] == str(teacher)
    assert len(recorded["networks"]["teacher"]["sha256"]) == 64


@pytest.mark.parametrize("method", ["vanilla", *(label for label in LABELS if "+adm" in label and "van" not in label)])
def test_interrupted_and_resumed_equals_uninterrupted(
    method: str, tmp_path: Path, command: Command, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(arguments(tmp_path / "whole", teacher, method=method))[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # in the middle of the second epoch
        assert command(arguments(tmp_path / "cut", teacher, method=method))[0] == 130
    code, _, said = command(arguments(tmp_path / "cut", teacher, method=method))
    assert code == 0 and "resuming from step 4" in said
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert "teacher" in json.loads((tmp_path / "cut/summary.json").read_text())


@pytest.mark.parametrize("method", LABELS)
def test_gradients_reach_the_student_alone(method: str, tmp_path: Path, teacher: Path) -> None:
    distiller = experiment_of(tmp_path, teacher, method=method).distiller.train()
    assert not any(module.training for module in distiller.networks["teacher"].modules())
    before = {name: value.clone() for name, value in distiller.networks["teacher"].state_dict().items()}
    losses, _ = distiller(batch_of(experiment_of(tmp_path, teacher)), START)
    assert losses.keys() == {"student"}
    sum(losses["student"].values(), start=torch.zeros(())).backward()
    assert all(p.grad is None for p in distiller.networks["teacher"].parameters())
    trained = {id(p) for group in distiller.parameter_groups() for p in group["params"]}
    with_gradient = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == with_gradient
    assert_same(dict(distiller.networks["teacher"].state_dict()), before)


# --- how often the teacher runs, and what it scores -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "epochs_seen", "evaluations"), [("vanilla", 0, 1), ("vanilla+adm", 2, 3), ("kd", 2, 1), ("kd+adm", 2, 3)]
)
def test_the_teacher_runs_where_it_is_needed(
    method: str,
    epochs_seen: int,
    evaluations: int,
    tmp_path: Path,
    command: Command,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once before training, in each step of a method that asks it, and in evaluation where ADM compares the maps."""
    watched = Watched(monkeypatch)
    code, _, said = command(arguments(tmp_path / "run", teacher, method=method))
    assert code == 0, said
    assert watched.images["teacher"] == 60 * epochs_seen + 180 * evaluations
    assert watched.images["student"] == 60 * 2 + 180 * (3 if "adm" in method else 2)
    assert ("attention/similarity" in lines(tmp_path / "run", "evaluation")[0]) == ("adm" in method)


@pytest.mark.parametrize("method", LABELS)
def test_either_network_is_evaluated_alone_as_beside_the_other(method: str, tmp_path: Path, teacher: Path) -> None:
    experiment = experiment_of(tmp_path, teacher, method=method)
    distiller, images = experiment.distiller, experiment.datasets.test.images[:5]
    both = distiller.outputs(images)
    for role, other in (("teacher", "student"), ("student", "teacher")):
        alone = distiller.outputs(images, without=[other])
        assert alone.keys() == {role} and torch.equal(alone[role].logits, both[role].logits)
        assert torch.equal(alone[role].maps[-1], both[role].maps[-1])


def test_the_teacher_is_scored_before_training_and_never_again(tmp_path: Path, command: Command, teacher: Path) -> None:
    out = tmp_path / "run"
    code, _, said = command(arguments(out, teacher, "--data.validation", "0.3"))
    assert code == 0, said
    experiment = restore(command_of(out, OFFLINE), find_checkpoint(out, "last"))
    summary = json.loads((out / "summary.json").read_text())
    for prefix, split in (("", "validation"), ("test/", "test")):
        values = evaluate(experiment.distiller, experiment.evaluation_loader(experiment.split(split))).values
        assert values["teacher/top1"] > 60
        for name in ("top1", "top5", "nll", "ece"):
            assert summary["teacher"][f"{prefix}{name}"] == pytest.approx(values[f"teacher/{name}"], rel=1e-5)
            assert summary["last"][f"{prefix}student/{name}"] == pytest.approx(values[f"student/{name}"], rel=1e-5)
            for line in lines(out, "evaluation"):
                assert line[f"{prefix}teacher/{name}"] == summary["teacher"][f"{prefix}{name}"]
    first = f"teacher ({TEACHER}, fixed): top-1 {summary['teacher']['top1']:.2f} % on validation"
    assert summary["teacher"]["split"] == "validation"
    assert said.splitlines()[0] == first and "warning" not in said
    assert (out / "log.txt").read_text().splitlines()[0].endswith(first)


def weights(folder: Path, name: str, seed: int) -> Path:
    """A file with the weights that a network is created with."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    save_file(create_network(name, 5).state_dict(), folder / f"{name}.safetensors", {"architecture": name})
    return folder / f"{name}.safetensors"


def test_a_teacher_of_random_weights_is_doubted(tmp_path: Path, command: Command, teacher: Path) -> None:
    random = weights(tmp_path, TEACHER, 0)
    code, _, said = command(arguments(tmp_path / "run", random, method="kd"))
    assert code == 0
    (warning,) = (line for line in said.splitlines() if line.startswith("warning"))
    assert warning.startswith("warning: teacher is hardly better than chance (20.00 % of 5 classes): random weights,")
    assert sum(warning in line for line in (tmp_path / "run/log.txt").read_text().splitlines()) == 1


def test_a_teacher_with_another_normalisation_than_its_own_is_doubted(
    tmp_path: Path, command: Command, teacher: Path
) -> None:
    mean, std = ["--networks.teacher.mean", "[0.485, 0.456, 0.406]"], ["--networks.teacher.std", "[0.2, 0.2, 0.2]"]
    code, _, said = command(arguments(tmp_path / "other", teacher, *mean, *std))
    assert code == 0
    (warning,) = (line for line in said.splitlines() if line.startswith("warning"))
    assert re.match(r"warning: teacher was trained with mean and std \[[\d., ]+\] and \[[\d., ]+\], ", warning)
    assert "config says [0.485, 0.456, 0.406] and [0.200, 0.200, 0.200]: --networks.teacher.mean null" in warning
    code, _, said = command(arguments(tmp_path / "own", teacher))
    assert code == 0 and "warning" not in said


def test_a_teacher_below_its_students_start_is_doubted(tmp_path: Path, command: Command, teacher: Path) -> None:
    start = ["--networks.student.weights", str(teacher)]
    code, _, said = command(arguments(tmp_path / "bad", weights(tmp_path, TEACHER, 0), *start, student=TEACHER))
    assert code == 0
    found = [line for line in said.splitlines() if line.startswith("warning")]
    assert len(found) == 2 and "hardly better" in found[0]
    assert found[1].startswith("warning: student starts at 9") and "above its teacher's" in found[1]
    code, _, said = command(arguments(tmp_path / "same", teacher, *start, student=TEACHER))
    assert code == 0 and "warning" not in said  # no better is not worse


# --- losses -----------------------------------------------------------------------------------------------------------


def softmax(row: list[float], tau: float) -> list[float]:
    exponentials = [math.exp(value / tau) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_kd_is_its_plain_definition_in_float64(tmp_path: Path, teacher: Path) -> None:
    flags = ["--kd.ce", "0.3", "--kd.kd", "0.8", "--kd.tau", "2.5"]
    experiment = experiment_of(tmp_path, teacher, *flags)
    distiller, batch = experiment.distiller, batch_of(experiment)
    losses, _ = distiller.eval()(batch, START)
    outputs = distiller.outputs(batch["image"])
    rows = {role: output.logits.double().tolist() for role, output in outputs.items()}
    ce = kl = 0.0
    for s, t, y in zip(rows["student"], rows["teacher"], batch["target"].tolist(), strict=True):
        ce -= math.log(softmax(s, 1.0)[y]) / 6
        p_s, p_t = softmax(s, 2.5), softmax(t, 2.5)
        kl += sum(a * math.log(a / b) for a, b in zip(p_t, p_s, strict=True)) / 6
    assert losses["student"]["ce"].item() == pytest.approx(0.3 * ce, rel=1e-5)
    assert losses["student"]["kd"].item() == pytest.approx(0.8 * 2.5**2 * kl, rel=1e-4)


@pytest.mark.parametrize("student", ["cifar_shufflenetv2", "cifar_mobilenetv2_050"])
def test_phi_learns_and_leaves_both_networks_gradients_alone(student: str, tmp_path: Path, teacher: Path) -> None:
    """A pair of different channels: phi's loss trains phi, and no gradient of either network differs by a bit."""
    flags = ["--data.image_size", "32"]
    experiment = experiment_of(tmp_path, teacher, *flags, method="kd+adm", student=student)
    distiller, batch = experiment.distiller.train(), batch_of(experiment)
    adapter = distiller.adm.adm["student:teacher"].adapter
    assert adapter.conv.weight.shape[:2] == (128, distiller.outputs(batch["image"])["student"].maps[-1].shape[1])

    def gradients(terms: list[str]) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        distiller.zero_grad()
        losses, _ = distiller(batch, START)
        assert losses["student"].keys() == {"ce", "kd", "consensus", "phi"}
        sum((losses["student"][term] for term in terms), start=torch.zeros(())).backward()
        return {name: p.grad for name, p in distiller.named_parameters()}

    state = {name: value.clone() for name, value in distiller.state_dict().items()}
    without = gradients(["ce", "kd", "consensus"])
    distiller.load_state_dict(state)
    everything = gradients(["ce", "kd", "consensus", "phi"])
    (phi,) = (name for name in everything if name.startswith("adm."))
    assert without.pop(phi) is None
    gradient = everything.pop(phi)
    assert gradient is not None and gradient.abs().sum() > 0
    assert all(value is None for name, value in everything.items() if name.startswith("networks.teacher"))
    assert all(value is not None for name, value in everything.items() if name.startswith("networks.student"))
    assert_same(everything, without)

    optim = distiller.optimizer.make(distiller.parameter_groups())
    residuals = []
    for _ in range(15):
        losses, _ = distiller(batch, START)
        optim.zero_grad()
        sum(losses["student"].values(), start=torch.zeros(())).backward()
        optim.step()
        residuals.append(losses["student"]["phi"].item())
    assert residuals[-1] < 0.95 * residuals[0]


# --- teachers ---------------------------------------------------------------------------------------------------------


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of a CIFAR ResNet as RepDistiller and mdistiller write them."""
    result = {}
    for key, tensor in state.items():
        for ours, theirs in (
            ("stem.conv.", "conv1."),
            ("stem.bn.", "bn1."),
            *((f"stages.{k}.", f"layer{k + 1}.") for k in range(3)),
            (".shortcut.conv.", ".downsample.0."),
            (".shortcut.bn.", ".downsample.1."),
        ):
            key = key.replace(ours, theirs)
        result[key] = tensor
    return result


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_files_are_teachers(prefix: str, tmp_path: Path) -> None:
    teacher = create_network("cifar_resnet8x4", 5)
    for value in teacher.state_dict().values():
        value.copy_(torch.randn_like(value.float()).abs())
    state = {prefix + key: value for key, value in published(teacher.state_dict()).items()}
    assert f"{prefix}layer2.0.downsample.0.weight" in state and f"{prefix}conv1.weight" in state
    torch.save({"epoch": 240, "model": state, "best_acc": 79.4}, tmp_path / "ckpt_epoch_240.pth")
    flags = ["--networks.teacher.name", "cifar_resnet8x4"]
    built = experiment_of(tmp_path, tmp_path / "ckpt_epoch_240.pth", *flags).distiller.networks["teacher"]
    assert_same(dict(built.state_dict()), dict(teacher.state_dict()))


def test_torchvisions_resnet34_is_a_teacher(tmp_path: Path) -> None:
    import torchvision

    theirs = torchvision.models.resnet34(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet34-b627a593.pth")
    flags = ["--data.image_size", "64", "--networks.teacher.name", "resnet34", "--networks.student.name", "resnet18"]
    distiller = experiment_of(tmp_path, tmp_path / "resnet34-b627a593.pth", *flags).distiller
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(distiller.views(images)["teacher"])
    torch.testing.assert_close(distiller.outputs(images)["teacher"].logits, expected, rtol=1e-4, atol=1e-4)


def test_wrong_teachers_are_refused_in_a_line(tmp_path: Path, teacher: Path) -> None:
    absent = tmp_path / "absent.pth"
    assert refusal(*arguments(tmp_path, absent)) == f"no weight file {absent}"
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no weights" in refusal(*arguments(tmp_path, tmp_path / "empty"))
    other = [*arguments(tmp_path, teacher), "--networks.teacher.name", "cifar_resnet14"]
    assert "another architecture" in refusal(*other)
    torch.save(create_network("cifar_resnet14", 5).state_dict(), tmp_path / "plain.pth")
    assert "another architecture than WideResNet" in refusal(*arguments(tmp_path, tmp_path / "plain.pth"))
    assert "for 5 classes, but the network has 4" in refusal(*arguments(tmp_path, teacher, "--data.classes", "4"))
    torch.save(create_network(TEACHER, 7).state_dict(), tmp_path / "seven.pth")
    assert "for 7 classes, but the network has 5" in refusal(*arguments(tmp_path, tmp_path / "seven.pth"))
    untrained = [
        flag for flag in arguments(tmp_path, teacher) if flag not in ("--networks.teacher.weights", str(teacher))
    ]
    assert refusal(*untrained).startswith("offline distillation needs a pre-trained teacher: give --networks.teacher.w")


def test_options_that_do_not_apply_are_refused(tmp_path: Path, teacher: Path) -> None:
    base = arguments(tmp_path / "run", teacher)
    assert refusal(*base, "--adm.feature_targets", "both").startswith("the teacher is fixed, and adm.feature_targets")
    said = refusal(*base, "--adm.beta", "0.5")
    assert said == "the teacher is fixed, and adm.beta is the weight of a loss that trains it: 0.5; set it to 0"
    assert refusal(*base, "--dkd.beta", "2") == "dkd.beta does not apply to kd: its options are kd.ce, kd.kd, kd.tau"
    assert refusal(*base, "--method", "kd", "--adm.alpha", "1").startswith("adm.alpha counts only with +adm")
    said = refusal(*base, "--method", "0123456789")
    assert all(f" {label}," in f"{said}," for label in LABELS) and "dml" not in said
    assert "kd.tau must be positive" in refusal(*base, "--kd.tau", "0")
    assert "kd.ce must not be negative" in refusal(*base, "--kd.ce", "-1")
    for more in (["--networks.student_2.name", STUDENT], ["--networks.teacher_2.name", STUDENT]):
        assert "offline distillation needs the two networks teacher and student" in refusal(*base, *more)
    refusal(*base, "--networks", "{student: {name: cifar_resnet8}}")
    assert "unknown option kd.tua: did you mean kd.tau?" in refusal(*base, "--kd.tua", "2")


# --- tools and recipes ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, command: Command, teacher: Path) -> Iterator[Path]:
    code, _, said = command(arguments(tmp_path / "run", teacher))
    assert code == 0, said
    yield tmp_path / "run"


def test_tools_read_runs_of_their_own_task(
    run: Path, teacher: Path, tmp_path: Path, shell: Any, command: Command
) -> None:
    code, printed, said = shell(offline_evaluate.main, [str(run), "--device", "cpu"])
    assert code == 0, said
    assert [row.split()[0] for row in printed.splitlines()[2:4]] == ["teacher", "student"]
    assert shell(offline_visualize.main, [str(run), "--device", "cpu", "--images", "2"])[0] == 0
    assert (run / "figures/maps.png").is_file()
    for tool in (online_evaluate, online_visualize):
        expected = f"error: {run} is a run of offline_kd: use the tools in offline_kd/tools\n"
        assert shell(tool.main, [str(run)]) == (2, "", expected)
    for tool in (offline_evaluate, offline_visualize):
        expected = f"error: {teacher} is a run of classification: use the tools in classification/tools\n"
        assert shell(tool.main, [str(teacher)]) == (2, "", expected)
    config = run / "config.yaml"
    expected = f"error: {config} is of offline_kd, and this is classification: use offline_kd/tools/train.py\n"
    for flags in (["--config", str(config)], [f"--config={config}"]):
        assert shell(online_train.main, flags) == (2, "", expected)

    again = ["--config", str(config), "--out", str(tmp_path / "again"), "--fit.device", "cpu"]
    assert command(again)[0] == 0
    assert_same(*(read_checkpoint(folder / "checkpoints/last") for folder in (run, tmp_path / "again")))
    code, printed, _ = shell(compare.main, [str(run), str(teacher)])
    assert code == 0 and "kd+adm" in printed and "vanilla" in printed


def test_dry_run_trains_nothing(tmp_path: Path, command: Command, teacher: Path) -> None:
    code, printed, said = command(arguments(tmp_path / "run", teacher, "--dry-run"))
    assert code == 0, said
    assert "task: offline_kd" in printed and "(0 trained)" in printed and "adapters (phi): 8,192" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [path.name for path in sorted(RECIPES.glob("*.yaml"))])
def test_recipes_serve_every_method(name: str) -> None:
    given = yaml.safe_load((RECIPES / name).read_text())
    for label in LABELS:
        command = parse_command(["--config", str(RECIPES / name), "--method", label], task=OFFLINE)
        method = label.removesuffix("+adm")
        for key, value in given.get(method, {}).items():
            assert getattr(command.options, key) == value
        assert [key for key in command.resolved() if key in OFFLINE.methods] == [method] * (method != "vanilla")
        assert (command.config.adm.beta, command.config.adm.gamma) == (0.0, 0.0)
    with pytest.raises(InputError, match=r"is of offline_kd, and this is classification: use offline_kd/tools/train"):
        parse_command(["--config", str(RECIPES / name)])


def test_without_a_recipe_it_is_the_one_of_cifar100() -> None:
    networks = ["--networks", "{teacher: {name: cifar_resnet32x4}, student: {name: cifar_resnet8x4}}"]
    bare = parse_command(networks, task=OFFLINE)
    recipe = parse_command(["--config", str(RECIPES / "cifar100.yaml")], task=OFFLINE)
    assert bare.config == recipe.config and bare.options == recipe.options
    assert bare.config.method == "kd+adm" and bare.config.adm == ADMConfig(alpha=1.0, beta=0.0, gamma=0.0)
    assert str(bare.config.out) == "runs/offline_kd"


# --- real images ------------------------------------------------------------------------------------------------------


def test_a_published_teacher_on_cifar10_jpeg(tmp_path: Path, command: Command, shared_data: Path) -> None:
    """The recipe for CIFAR-10, with akamaster's ResNet-56, on few images: of each class 4 to train and 8 to test."""
    with tarfile.open(shared_data / "cifar10-jpeg.tar.xz") as tar:
        for member in tar:  # cifar10/test/<class>/0000.jpg, ...; the training set comes last and is not unpacked
            path = Path(member.name)
            if path.parts[1:2] == ("train",):
                break
            if member.isfile() and int(path.stem) < 12:
                file = tmp_path / "data" / ("train" if int(path.stem) < 4 else "val") / path.parent.name / path.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    file = shared_data / "weights/resnet56-cifar10.safetensors"
    argv = ["--config", str(RECIPES / "cifar10.yaml"), "--data.name", "folder", "--data.root", str(tmp_path / "data")]
    argv += ["--networks.teacher.weights", str(file), "--networks.student.name", "cifar_resnet8", "--method", "kd+adm"]
    argv += ["--batch_size", "20", "--fit.epochs", "3", "--fit.log_every", "1", *CPU]
    code, _, said = command([*argv, "--out", str(tmp_path / "run")])
    assert code == 0 and "warning" not in said, said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["teacher"]["top1"] > 70  # 83.20 on all 10,000
    losses = [line["student/kd"] for line in lines(tmp_path / "run", "train")]
    assert len(losses) == 6 and sum(losses[4:]) < sum(losses[:2])


# --- optimiser, warm-up, clipping, smoothed labels --------------------------------------------------------------------


def test_resumed_with_layer_decay_warm_up_clipping_and_smoothed_labels_equals_uninterrupted(
    tmp_path: Path, teacher: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--optimizer.name", "adamw", "--optimizer.lr", "0.01", "--optimizer.filter_bias_and_bn", "true"]
    more += ["--optimizer.layer_decay", "0.7", "--schedule.warmup_steps", "3", "--fit.clip", "0.5"]
    more += ["--label_smoothing", "0.1"]
    assert command(arguments(tmp_path / "whole", teacher, *more))[0] == 0
    argv = arguments(tmp_path / "cut", teacher, *more)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert command(argv)[0] == 130
    assert command(argv)[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_smoothed_labels_reach_the_cross_entropy_and_dkd_refuses_them(tmp_path: Path, teacher: Path) -> None:
    smooth = ["--label_smoothing", "0.3"]
    for method in ("kd", "norm", "diswot", "vanilla"):
        experiment = experiment_of(tmp_path, teacher, *smooth, method=method)
        distiller, batch = experiment.distiller.train(), batch_of(experiment)
        with torch.no_grad():
            outputs = distiller.method(distiller.networks, distiller.views(batch["image"]))
            ce = distiller.method.losses(outputs, batch, START)["student"]["ce"]
        log_p = outputs["student"].logits.double().log_softmax(dim=1)
        plain = -log_p.gather(1, batch["target"][:, None]).mean()
        wanted = getattr(distiller.method.options, "ce", 1.0) * (0.7 * plain - 0.3 * log_p.mean())
        assert float(ce) == pytest.approx(float(wanted), rel=1e-5), method
    assert "DKD goes by the label itself" in refusal(*arguments(tmp_path / "run", teacher, *smooth, method="dkd"))
