"""The training-free score: its formulas against matrices, what the weights are, real runs on digits and files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from classification.data import DataConfig
from classification.networks import create_network
from core.split import Split
from offline_kd.methods.diswot import relation_loss
from offline_kd.tools import score as tool
from offline_kd.tools.score import draw_weights, gradient_distance, main, read_batch, score, traits

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ["--data.name", "digits", "--data.image_size", "8", "--batch_size", "16", "--device", "cpu"]
STUDENTS = ["cifar_resnet8", "cifar_mobilenetv2_050"]

Command = Callable[[Sequence[str]], tuple[int, str, str]]


@pytest.fixture
def command(shell: Callable[..., tuple[int, str, str]]) -> Command:
    return lambda argv: shell(main, list(argv))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, int]:
    return read_batch(DataConfig(name="digits", image_size=8), 16)


# --- formulas ---------------------------------------------------------------------------------------------------------


def distance_by_matrices(s: Tensor, t: Tensor) -> float:
    """1/(K C) sum_k || rn(g_t g_t^T) - rn(g_s g_s^T) ||_F^2, with the matrices written out."""

    def rows(g: list[float]) -> list[list[float]]:
        result = []
        for a in g:
            row = [a * b for b in g]
            length = sum(x * x for x in row) ** 0.5
            result.append([x / length if length else 0.0 for x in row])
        return result

    total = 0.0
    for g_s, g_t in zip(s.tolist(), t.tolist(), strict=True):
        pairs = zip(rows(g_s), rows(g_t), strict=True)
        total += sum((x - y) ** 2 for a, b in pairs for x, y in zip(a, b, strict=True))
    return total / s.numel()


def test_gradient_distance_is_that_of_the_matrices() -> None:
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    wanted = distance_by_matrices(s, t)
    assert gradient_distance(s, t).item() == pytest.approx(wanted, rel=1e-12)
    # The identity: mean_k [2 - 2/C cos(g_t, g_s) sum_i sign sign].
    by_sign = [
        2 - 2 / 7 * F.cosine_similarity(a, b, dim=0).item() * (a.sign() @ b.sign()).item()
        for a, b in zip(s, t, strict=True)
    ]
    assert sum(by_sign) / 5 == pytest.approx(wanted, rel=1e-12)


def test_gradient_distance_with_zeros() -> None:
    """Dead channels and classes whose gradient is nothing: their rows are 0 and not of length 1."""
    s, t = torch.randn(2, 4, 6, dtype=torch.float64)
    s[:, 2] = 0
    t[1, 4:] = 0
    s[3] = 0
    assert gradient_distance(s, t).item() == pytest.approx(distance_by_matrices(s, t), rel=1e-12)
    s[3], t[3] = 0, 0
    assert gradient_distance(s, t).item() == pytest.approx(distance_by_matrices(s, t), rel=1e-12)


def test_gradient_distance_does_not_see_scale_or_sign() -> None:
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    factor = torch.tensor([1e-9, -3.0, 1e12, -1.0, 0.5], dtype=torch.float64)[:, None]
    assert gradient_distance(factor * t, t).item() < 1e-12  # g g^T is that of -g
    assert gradient_distance(factor * s, t).item() == pytest.approx(gradient_distance(s, t).item(), rel=1e-9)


def test_of_unequal_widths_the_first_channels_are_compared() -> None:
    s, t = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    wanted = distance_by_matrices(s[:, :4], t)
    assert gradient_distance(s, t).item() == pytest.approx(wanted) == gradient_distance(t, s).item()


# --- networks ---------------------------------------------------------------------------------------------------------


def test_weights_are_standard_normal_biases_0_norms_1() -> None:
    network = create_network("cifar_mobilenetv2_050", 10)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.3)
    draw_weights(network)
    weights = 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weights += module.weight.numel()
            if module.weight.numel() > 10_000:
                assert module.weight.mean().abs() < 0.05 and module.weight.std().item() == pytest.approx(1, abs=0.05)
            assert module.bias is None or module.bias.abs().max() == 0
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert weights > 100_000


def test_traits_are_the_map_and_the_gradient(batch: tuple[Tensor, Tensor, int]) -> None:
    images, target, classes = batch
    torch.manual_seed(5)
    found = traits("cifar_resnet8", images, target, classes)
    torch.manual_seed(5)
    network: Any = create_network("cifar_resnet8", classes)
    draw_weights(network)
    features = network.train().forward_features(images)
    torch.testing.assert_close(found.feature_map, features.clamp_min(0).double())
    pooled = features.clamp_min(0).mean(dim=(2, 3))
    error = F.softmax(network.fc(pooled), dim=1) - F.one_hot(target, classes)
    torch.testing.assert_close(found.gradient, (error.T @ pooled / len(images)).double(), rtol=1e-4, atol=1e-6)
    assert found.parameters == sum(p.numel() for p in network.parameters())
    assert found.feature_map.dtype == found.gradient.dtype == torch.float64


@pytest.mark.parametrize("name", ["cifar_resnet110", "cifar_wrn_40_1", "cifar_shufflenetv1", "regnetx_002"])
def test_deep_networks_do_not_overflow(name: str, batch: tuple[Tensor, Tensor, int]) -> None:
    """Batch statistics keep the scale: with those of a new network, 110 layers would multiply it far past float32."""
    images, target, classes = batch
    found = traits(name, F.interpolate(images[:4], size=32), target[:4], classes)
    assert 0.1 < found.feature_map.max() < 1e4
    again = traits("cifar_resnet8", images[:4], target[:4], classes)
    assert torch.isfinite(relation_loss(again.feature_map, found.feature_map))
    assert torch.isfinite(gradient_distance(again.gradient, found.gradient))


def test_a_network_that_overflows_is_refused(
    batch: tuple[Tensor, Tensor, int], monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def plain(name: str, classes: int, in_chans: int) -> nn.Module:
        if name != "plain":
            return create_network(name, classes, in_chans=in_chans)
        layers = [layer for _ in range(45) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
        network = Split(nn.Sequential(nn.Conv2d(in_chans, 16, 1), *layers), nn.Identity())
        network.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))
        network.get_classifier = lambda: network.head[-1]  # type: ignore[assignment]
        return network

    monkeypatch.setattr(tool, "create_network", plain)
    code, _, said = command(["--teacher", "cifar_resnet8", "--students", "plain", *DIGITS, "--seeds", "2"])
    assert code == 2 and said.count("\n") == 1
    assert "plain overflows with N(0, 1) weights" in said


def test_the_score_is_minus_both_terms_over_draws_of_both_networks(batch: tuple[Tensor, Tensor, int]) -> None:
    rows = score("cifar_resnet14", STUDENTS, *batch, seeds=3)
    assert [row["rank"] for row in rows] == [1, 2] and {row["network"] for row in rows} == set(STUDENTS)
    assert rows[0]["score"] > rows[1]["score"]
    for row in rows:
        draws = row["draws"]
        assert len({draw["score"] for draw in draws}) == 3
        for draw in draws:
            assert draw["score"] == -(draw["relation"] + draw["semantic"])
            assert 0 < draw["relation"] < 1 and 0 < draw["semantic"] < 4
        values = [draw["score"] for draw in draws]
        mean = sum(values) / 3
        assert row["score"] == pytest.approx(mean)
        assert row["std"] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
        assert row["parameters"] == sum(p.numel() for p in create_network(row["network"], 10).parameters())
    assert score("cifar_resnet14", STUDENTS, *batch, seeds=3) == rows
    alone = score("cifar_resnet14", STUDENTS[1:], *batch, seeds=3)[0]  # whatever else is scored beside it
    assert alone["draws"] == next(row for row in rows if row["network"] == STUDENTS[1])["draws"]
    # The teacher as its own student has weights of its own, and a distance.
    assert score("cifar_resnet8", ["cifar_resnet8"], *batch, seeds=2)[0]["score"] < -1e-3


# --- command ----------------------------------------------------------------------------------------------------------


def test_a_run_writes_table_numbers_and_figure(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "new" / "score"
    argv = ["--teacher", "cifar_resnet14", "--students", *STUDENTS, "--seeds", "2", *DIGITS, "--out", str(out)]
    code, printed, said = command(argv)
    assert code == 0, said
    report = json.loads((out / "score.json").read_text())
    assert report["teacher"] == "cifar_resnet14" and report["batch_size"] == 16 and report["seeds"] == 2
    assert report["data"]["name"] == "digits" and "commit" in report["environment"]
    rows = report["students"]
    lines = printed.splitlines()
    assert lines[0] == "teacher cifar_resnet14, 16 images of digits, 2 draws of all weights"
    for line, row in zip(lines[2:4], rows, strict=True):
        cells = line.split()
        assert cells[:4] == [str(row["rank"]), row["network"], f"{row['parameters']:,}", f"{row['score']:.4f}"]
    with Image.open(out / "score.png") as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    assert colors is not None and len(colors) > 50
    assert {path.name for path in out.iterdir()} == {"score.json", "score.png"}


def test_images_from_files_are_read_one_batch_at_a_time(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for name in ("train", "val"):
        for label in range(3):
            (tmp_path / name / f"n{label}").mkdir(parents=True)
            for number in (digits.target == label).nonzero()[0][:8]:
                pixels = Image.fromarray((digits.images[number] * 15.9).astype("uint8"))
                pixels.convert("RGB").save(tmp_path / name / f"n{label}" / f"{number}.png")
    config = DataConfig(name="folder", root=str(tmp_path))
    images, target, classes = read_batch(config, 10)
    assert images.shape == (10, 3, 8, 8) and classes == 3 and set(target.tolist()) <= {0, 1, 2}
    assert images.dtype == torch.float32 and -3 < images.min() < 0 < images.max() < 3  # normalised
    again = read_batch(config, 10)
    assert torch.equal(again[0], images) and torch.equal(again[1], target)
    whole = read_batch(DataConfig(name="folder", root=str(tmp_path), in_memory=True), 10)
    assert torch.equal(whole[0], images) and torch.equal(whole[1], target)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--students", "cifar_resnet8"], "teacher"),
        (["--teacher", "cifar_resnet8"], "students"),
        (["--teacher", "cifar_resnet21", "--students", "cifar_resnet8"], "did you mean 'cifar_resnet"),
        (["--teacher", "cifar_resnet8", "--students", "cifar_resnet2O"], "did you mean 'cifar_resnet"),
        (["--teacher", "cifar_resnet8", "--students", "cifar_vgg8", "cifar_vgg8"], "--students names cifar_vgg8 twice"),
        (["--teacher", "cifar_resnet8", "--students", "cifar_resnet8", "--seeds", "1"], "--seeds must be at least 2"),
        (["--teacher", "cifar_resnet8", "--students", "cifar_resnet8", "--batch_size", "9999"], "1438 images"),
        (["--teacher", "cifar_resnet8", "--students", "cifar_resnet8", "--sed", "3"], "did you mean seed"),
        (["--teacher", "cifar_resnet8", "--students", "resnetv2_50"], "one linear layer"),
    ],
)
def test_wrong_input_is_one_line(argv: list[str], said: str, command: Command, tmp_path: Path) -> None:
    small = ["--batch_size", "8", "--seeds", "2"]
    code, _, error = command(["--data.name", "digits", "--device", "cpu", *small, *argv, "--out", str(tmp_path / "no")])
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "no").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    argv = ["--teacher", "cifar_resnet8", "--students", "cifar_resnet8", "--seeds", "2", *DIGITS]
    code, _, error = command([*argv, "--out", str(tmp_path / "file" / "score")])
    assert code == 2 and f"cannot make the folder {tmp_path / 'file' / 'score'}" in error


def test_the_file_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "offline_kd/tools/score.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--students" in done.stdout and "--data.name" in done.stdout
