"""Loading weight files: published checkpoints against functional re-implementations, our own keys, wrong files."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from classification.networks import create_network
from classification.networks.pretrained import load_weights
from core.errors import InputError
from core.weights import read_state_dict


class Published:
    """A checkpoint in published keys that comes into being while its network is computed.

    Each layer is created, with random weights and statistics, when the function of the network first calls it by its
    published name: one run gives the checkpoint and the logits that it stands for.
    """

    def __init__(self, seed: int = 0) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def conv(
        self, key: str, x: Tensor, channels: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Tensor:
        fan_in = x.shape[1] // groups * kernel**2
        weight = self._randn(channels, x.shape[1] // groups, kernel, kernel) * (2 / fan_in) ** 0.5
        self.state[f"{key}.weight"] = weight
        if bias:
            self.state[f"{key}.bias"] = self._randn(channels)
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), stride, kernel // 2, 1, groups)

    def bn(self, key: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight, bias = 1 + 0.2 * self._randn(channels), 0.2 * self._randn(channels)
        mean, var = 0.2 * self._randn(channels), 1 + 0.2 * self._randn(channels).abs()
        self.state |= {f"{key}.weight": weight, f"{key}.bias": bias}
        self.state |= {f"{key}.running_mean": mean, f"{key}.running_var": var}
        self.state[f"{key}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, var, weight, bias)

    def linear(self, key: str, x: Tensor, classes: int) -> Tensor:
        self.state[f"{key}.weight"] = self._randn(classes, x.shape[1]) * x.shape[1] ** -0.5
        self.state[f"{key}.bias"] = self._randn(classes)
        return F.linear(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"])


def basic_resnet(net: Published, x: Tensor, classes: int, blocks: int, widths: tuple[int, ...], stem: int) -> Tensor:
    x = F.relu(net.bn("bn1", net.conv("conv1", x, stem, 3)))
    for layer, width in enumerate(widths, start=1):
        for block in range(blocks):
            key = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = F.relu(net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, width, 3, stride)))
            y = net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", y, width, 3))
            if x.shape != y.shape:
                x = net.bn(f"{key}.downsample.1", net.conv(f"{key}.downsample.0", x, width, 1, stride))
            x = F.relu(x + y)
    return net.linear("fc", x.mean((2, 3)), classes)


def resnet20(net: Published, x: Tensor, classes: int) -> Tensor:
    return basic_resnet(net, x, classes, 3, (16, 32, 64), 16)


def resnet8x4(net: Published, x: Tensor, classes: int) -> Tensor:
    return basic_resnet(net, x, classes, 1, (64, 128, 256), 32)


def resnet20_a(net: Published, x: Tensor, classes: int) -> Tensor:
    """akamaster's: every second pixel, a quarter of the new channels as zeros on either side."""
    x = F.relu(net.bn("bn1", net.conv("conv1", x, 16, 3)))
    for layer, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            key = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = F.relu(net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, width, 3, stride)))
            y = net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", y, width, 3))
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros(len(x), width // 4, *x.shape[2:])
                x = torch.cat([zeros, x, zeros], 1)
            x = F.relu(x + y)
    return net.linear("linear", x.mean((2, 3)), classes)


def resnet50(net: Published, x: Tensor, classes: int) -> Tensor:
    x = F.relu(net.bn("bn1", net.conv("conv1", x, 64, 3)))
    for layer, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for block in range(blocks):
            key = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = F.relu(net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, width, 1)))
            y = F.relu(net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", y, width, 3, stride)))
            y = net.bn(f"{key}.bn3", net.conv(f"{key}.conv3", y, 4 * width, 1))
            if block == 0:
                x = net.bn(f"{key}.shortcut.1", net.conv(f"{key}.shortcut.0", x, 4 * width, 1, stride))
            x = F.relu(x + y)
    return net.linear("linear", x.mean((2, 3)), classes)


def wide_resnet(net: Published, x: Tensor, classes: int, blocks: int, widen: int) -> Tensor:
    x = net.conv("conv1", x, 16, 3)
    for group, width in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
        for block in range(blocks):
            key = f"block{group}.layer.{block}"
            stride = 2 if group > 1 and block == 0 else 1
            activated = F.relu(net.bn(f"{key}.bn1", x))
            y = F.relu(net.bn(f"{key}.bn2", net.conv(f"{key}.conv1", activated, width, 3, stride)))
            y = net.conv(f"{key}.conv2", y, width, 3)
            if x.shape[1] != width:
                x = net.conv(f"{key}.convShortcut", activated, width, 1, stride)
            x = x + y
    x = F.relu(net.bn("bn1", x))
    return net.linear("fc", x.mean((2, 3)), classes)


def wrn_10_1(net: Published, x: Tensor, classes: int) -> Tensor:
    return wide_resnet(net, x, classes, 1, 1)


def wrn_16_2(net: Published, x: Tensor, classes: int) -> Tensor:
    return wide_resnet(net, x, classes, 2, 2)


def vgg(net: Published, x: Tensor, classes: int, count: int) -> Tensor:
    for group, width in enumerate((64, 128, 256, 512, 512)):
        for index in range(0, 3 * count, 3):  # convolution, BatchNorm, ReLU
            x = net.conv(f"block{group}.{index}", x, width, 3, bias=True)
            x = F.relu(net.bn(f"block{group}.{index + 1}", x))
        if group < 3:
            x = F.max_pool2d(x, 2)
    return net.linear("classifier", x.mean((2, 3)), classes)


def vgg8(net: Published, x: Tensor, classes: int) -> Tensor:
    return vgg(net, x, classes, 1)


def vgg13(net: Published, x: Tensor, classes: int) -> Tensor:
    return vgg(net, x, classes, 2)


def mobilenetv2_050(net: Published, x: Tensor, classes: int) -> Tensor:
    x = F.relu(net.bn("conv1.1", net.conv("conv1.0", x, 16, 3, 2)))
    rows = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for row, (expansion, channels, count, first_stride) in enumerate(rows):
        for block in range(count):
            key = f"blocks.{row}.{block}.conv"
            stride, hidden = (first_stride if block == 0 else 1), expansion * x.shape[1]
            y = F.relu(net.bn(f"{key}.1", net.conv(f"{key}.0", x, hidden, 1)))
            y = F.relu(net.bn(f"{key}.4", net.conv(f"{key}.3", y, hidden, 3, stride, groups=hidden)))
            y = net.bn(f"{key}.7", net.conv(f"{key}.6", y, channels, 1))
            x = x + y if x.shape == y.shape else y
    x = F.relu(net.bn("conv2.1", net.conv("conv2.0", x, 1280, 1)))
    return net.linear("classifier.0", x.mean((2, 3)), classes)


def interleave(x: Tensor, groups: int) -> Tensor:
    parts = x.chunk(groups, dim=1)
    return torch.stack(parts, dim=2).flatten(1, 2)


def shufflenetv1(net: Published, x: Tensor, classes: int) -> Tensor:
    x = F.relu(net.bn("bn1", net.conv("conv1", x, 24, 1)))
    for layer, (count, out) in enumerate(((4, 240), (8, 480), (4, 960)), start=1):
        for block in range(count):
            key = f"layer{layer}.{block}"
            branch = out - x.shape[1] if block == 0 else out
            groups = 1 if x.shape[1] == 24 else 3
            y = F.relu(net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, branch // 4, 1, groups=groups)))
            y = interleave(y, groups)
            stride = 2 if block == 0 else 1
            y = F.relu(net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", y, branch // 4, 3, stride, groups=branch // 4)))
            y = net.bn(f"{key}.bn3", net.conv(f"{key}.conv3", y, branch, 1, groups=3))
            x = F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if block == 0 else x + y)
    return net.linear("linear", x.mean((2, 3)), classes)


def shufflenetv2(net: Published, x: Tensor, classes: int) -> Tensor:
    def unit(key: str, number: int, x: Tensor, out: int, kernel: int, stride: int = 1) -> Tensor:
        groups = x.shape[1] if kernel == 3 else 1
        return net.bn(f"{key}.bn{number}", net.conv(f"{key}.conv{number}", x, out, kernel, stride, groups))

    x = F.relu(net.bn("bn1", net.conv("conv1", x, 24, 1)))
    for layer, (count, out) in enumerate(((3, 116), (7, 232), (3, 464)), start=1):
        half, key = out // 2, f"layer{layer}.0"
        left = F.relu(unit(key, 2, unit(key, 1, x, x.shape[1], 3, 2), half, 1))
        right = unit(key, 4, F.relu(unit(key, 3, x, half, 1)), half, 3, 2)
        x = interleave(torch.cat([left, F.relu(unit(key, 5, right, half, 1))], 1), 2)
        for block in range(1, count + 1):
            left, right, key = x[:, :half], x[:, half:], f"layer{layer}.{block}"
            right = unit(key, 2, F.relu(unit(key, 1, right, half, 1)), half, 3)
            x = interleave(torch.cat([left, F.relu(unit(key, 3, right, half, 1))], 1), 2)
    x = F.relu(net.bn("bn2", net.conv("conv2", x, 1024, 1)))
    return net.linear("linear", x.mean((2, 3)), classes)


NETWORKS: list[Callable[[Published, Tensor, int], Tensor]] = [
    resnet20,
    resnet8x4,
    resnet20_a,
    resnet50,
    wrn_10_1,
    wrn_16_2,
    vgg8,
    vgg13,
    mobilenetv2_050,
    shufflenetv1,
    shufflenetv2,
]


@torch.inference_mode()
def publish(function: Callable[[Published, Tensor, int], Tensor], classes: int = 10) -> tuple[dict, Tensor, Tensor]:
    """A published state dict, images and the logits that belong to them."""
    net, x = Published(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = function(net, x, classes)
    return net.state, x, logits


@pytest.mark.parametrize("function", NETWORKS, ids=lambda function: function.__name__)
def test_published_checkpoints(function: Callable, tmp_path: Path):
    state, x, logits = publish(function)
    file = tmp_path / "published.pth"
    torch.save({"epoch": 240, "model": state, "best_acc": np.float64(72.5)}, file)
    network = create_network(f"cifar_{function.__name__}", 10)
    load_weights(network, file)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(x), logits, rtol=1e-4, atol=1e-4)
    assert {int(v) for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")} == {7}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["cifar_wrn_10_1", "cifar_vgg13", "cifar_mobilenetv1", "cifar_shufflenetv2"])
def test_own_keys_come_back(name: str, suffix: str, tmp_path: Path):
    from safetensors.torch import save_file

    network, other = create_network(name, 10), create_network(name, 10)
    file = tmp_path / f"own{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), file)
    load_weights(other, file)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


def test_timm_weights_come_back(tmp_path: Path):
    network, other = create_network("mobilenetv2_050", 10), create_network("mobilenetv2_050", 10)
    file = tmp_path / "timm.pt"
    torch.save({"state_dict": network.state_dict()}, file)
    load_weights(other, file)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match="10 classes, but the network has 5"):
        load_weights(create_network("mobilenetv2_050", 5), file)
    with pytest.raises(InputError, match="another architecture"):
        load_weights(create_network("resnet18", 10), file)


def renamed_numpy(file: Path, written: Path) -> Path:
    """The file with the module of numpy's scalars under its other name (numpy 1 against numpy 2)."""
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(written, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
                changed = content.replace(new, old) if new in content else content.replace(old, new)
                assert changed != content
                content = changed
            target.writestr(name, content)
    return written


def test_numpy_numbers_of_either_version_are_read(tmp_path: Path):
    state, _, _ = publish(wrn_10_1)
    numbers = {"a": np.float64(72.5), "b": np.float32(1), "c": np.int64(3), "d": np.bool_(True)}
    file = tmp_path / "numbers.pth"
    torch.save({"model": state, **numbers}, file)
    other = renamed_numpy(file, tmp_path / "other.pth")
    for path in (file, other):
        assert read_state_dict(path).keys() == state.keys()
    with pytest.raises(pickle.UnpicklingError):  # without our allow-list torch refuses them
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "best_prec1": 91.8}])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_taken_off(wrap: Callable, prefix: str, tmp_path: Path):
    state, _, _ = publish(wrn_10_1)
    file = tmp_path / "wrapped.pth"
    torch.save(wrap({prefix + key: tensor for key, tensor in state.items()}), file)
    assert read_state_dict(file).keys() == state.keys()


def test_old_files_without_batch_counts(tmp_path: Path):
    state, x, logits = publish(resnet20_a)
    state = {f"module.{key}": tensor for key, tensor in state.items() if "num_batches_tracked" not in key}
    file = tmp_path / "resnet20.th"
    torch.save({"state_dict": state, "best_prec1": 91.7}, file, _use_new_zipfile_serialization=False)
    network = create_network("cifar_resnet20_a", 10).eval()
    load_weights(network, file)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), logits, rtol=1e-4, atol=1e-4)


def test_another_number_of_classes_names_both(tmp_path: Path):
    file = tmp_path / "hundred.pth"
    torch.save({"model": publish(wrn_10_1, classes=100)[0]}, file)
    network = create_network("cifar_wrn_10_1", 10)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match="100 classes, but the network has 10"):
        load_weights(network, file)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifar_wrn_16_1", ["missing stages.0.1.bn1.weight", " and ", " more"]),
        ("cifar_wrn_10_2", ["other shape stages.0.0.conv1.weight (16, 16, 3, 3) instead of (32, 16, 3, 3)"]),
        ("cifar_resnet8", ["missing stages.0.0.conv1.weight", "unexpected block1.layer.0."]),
        ("cifar_mobilenetv1", ["missing stem.conv.weight", "unexpected conv1.weight"]),
    ],
)
def test_another_architecture_names_keys(name: str, parts: list[str], tmp_path: Path):
    file = tmp_path / "wrn.pth"
    torch.save({"model": publish(wrn_10_1)[0]}, file)
    network = create_network(name, 10)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match="another architecture") as raised:
        load_weights(network, file)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


class RunsCode:
    def __reduce__(self) -> tuple:
        return print, ("this must not run",)


class RunsCommand:
    def __reduce__(self) -> tuple:
        return os.system, ("echo this must not run",)


def test_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    from safetensors.torch import save

    state, _, _ = publish(wrn_10_1)
    network = create_network("cifar_wrn_10_1", 10)
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": state}, zipped)
    torch.save({"model": state}, legacy, _use_new_zipfile_serialization=False)
    whole = {"zip.pth": zipped.getvalue(), "legacy.pth": legacy.getvalue(), "own.safetensors": save(state)}
    for name, content in whole.items():
        for kept in (0, 5, 100, len(content) // 2, len(content) - 5):
            (tmp_path / name).write_bytes(content[:kept])
            with pytest.raises(InputError, match="incomplete") as raised:
                load_weights(network, tmp_path / name)
            assert name in str(raised.value)
            assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="no weight file"):
        load_weights(network, tmp_path / "absent.pth")
    with pytest.raises(InputError, match="no weight file"):
        load_weights(network, tmp_path)

    file = tmp_path / "strange.pth"
    for content in ({"epoch": 3}, [1, 2], {}, {"model": {"a": 1}}, torch.zeros(2)):
        torch.save(content, file)
        with pytest.raises(InputError, match="no state dict"):
            read_state_dict(file)
    for bad in (RunsCode(), RunsCommand()):  # torch refuses the two in different words
        torch.save({"model": state, "arguments": bad}, file)
        with pytest.raises(InputError, match="could run code"):
            read_state_dict(file)
    assert capsys.readouterr().out == ""


def cifar10_test_images(archive: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of each class of the JPEG test set, uint8 [N, 3, 32, 32], and their classes."""
    image = pytest.importorskip("PIL.Image")
    found: dict[tuple[str, str], np.ndarray] = {}
    with tarfile.open(archive) as tar:
        for member in tar:  # cifar10/test/<class>/0000.jpg, ...; the training set comes last
            if member.name == "cifar10/train":
                break
            path = Path(member.name)
            if member.isfile() and int(path.stem) < per_class:
                found[path.parent.name, path.stem] = np.asarray(image.open(tar.extractfile(member)).convert("RGB"))
    classes = sorted({name for name, _ in found})
    targets = torch.tensor([classes.index(name) for name, _ in found])
    return torch.from_numpy(np.stack(list(found.values()))).permute(0, 3, 1, 2), targets


def published_top1(shared_data: Path, depth: int, per_class: int) -> float:
    """Top-1 accuracy (percent) of akamaster's ResNet on JPEG CIFAR-10; normalised with ImageNet's mean and std."""
    network = create_network(f"cifar_resnet{depth}_a", 10).eval()
    load_weights(network, shared_data / f"weights/resnet{depth}-cifar10.safetensors")
    images, targets = cifar10_test_images(shared_data / "cifar10-jpeg.tar.xz", per_class)
    assert len(images) == 10 * per_class
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        predicted = torch.cat([network((part / 255 - mean) / std).argmax(1) for part in images.split(250)])
    return 100 * float((predicted == targets).double().mean())


def test_published_weights_reach_their_accuracy(shared_data: Path):
    assert published_top1(shared_data, 20, per_class=50) == pytest.approx(79.8, abs=0.5)  # 81.03 on all 10,000


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "top1"), [(20, 81.03), (56, 83.20)])
def test_published_weights_on_the_whole_test_set(shared_data: Path, depth: int, top1: float):
    assert published_top1(shared_data, depth, per_class=1000) == pytest.approx(top1, abs=0.1)
