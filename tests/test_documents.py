"""The Python blocks of README.md and CONTRIBUTING.md run as they stand, each document's from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), flags=re.M | re.S)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from safetensors.torch import save_file

    from classification.networks import create_network

    three_lines, split, load = blocks("README.md")
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    student, teacher = (timm.create_model(name, num_classes=4) for name in ("resnet18", "resnet34"))
    scope = {"student": student, "teacher": teacher, "x": x, "target": target, "loss": torch.zeros(())}
    exec(three_lines, scope)
    scope["loss"].backward()
    for network in (student, teacher):
        assert network.conv1.weight.grad is not None and network.fc.weight.grad is not None

    exec(split, scope)
    assert scope["student"](x).shape == (2, 1000)

    monkeypatch.chdir(tmp_path)
    file = Path(re.search(r'load_file\("(.*)"\)', load).group(1))
    file.parent.mkdir(parents=True)
    trained = create_network("cifar_resnet8", num_classes=10)
    save_file(trained.state_dict(), file)
    exec(load, scope)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(scope["student"].eval()(images), trained.eval()(images))


def test_contributing(tmp_path: Path) -> None:
    from classification.methods import METHODS
    from classification.networks import CIFAR_NETWORKS
    from classification.tools import train

    method, network, data = blocks("CONTRIBUTING.md")
    scope: dict = {}
    try:
        exec(method, scope)
        recipe = ROOT / "classification/recipes/digits.yaml"
        arguments = f"--config {recipe} --method oneway+adm --oneway.tau 2 --data.per_class 4 --fit.epochs 1"
        assert train.main([*arguments.split(), "--out", str(tmp_path / "run"), "--fit.device", "cpu"]) == 0
        exec(network, scope)
        assert scope["network"](torch.randn(2, 3, 32, 32)).shape == (2, 10)
    finally:
        METHODS.pop("oneway", None)
        CIFAR_NETWORKS.pop("cifar_resnet26", None)
    exec(data, scope)
    assert scope["batch"]["image"].shape == (16, 3, 32, 32) and scope["batch"]["image"].dtype == torch.uint8
