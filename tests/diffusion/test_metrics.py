"""FID and IS are torch-fidelity's, of images in memory or in folders; proxies have names of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("torch_fidelity")

import torch_fidelity

from core.errors import InputError
from diffusion import metrics, proxies
from diffusion.metrics import (
    INCEPTION_FILE,
    INCEPTION_URL,
    Extractor,
    InFolder,
    InMemory,
    features_of,
    frechet_distance,
    real_statistics,
    scores,
    statistics,
)

FIDELITY = {"cuda": False, "save_cpu_ram": True, "cache": False, "verbose": False, "fid": True, "isc": True}
KEYS = ("frechet_inception_distance", "inception_score_mean", "inception_score_std")


def write_images(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    return folder


def random_images(count: int, seed: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def digits_images(count: int, first: int = 0) -> Tensor:
    from sklearn.datasets import load_digits

    pixels = load_digits().images[first : first + count]
    return torch.from_numpy(pixels * (255 / 16)).round().to(torch.uint8).unsqueeze(1)


@pytest.fixture(scope="module")
def digits() -> Extractor:
    return Extractor(features_of("digits"))


def published(key: str) -> str:
    """akamaster's name of a weight."""
    key = re.sub(r"^stages\.(\d)", lambda found: f"layer{int(found[1]) + 1}", key)
    return re.sub(r"^fc\.", "linear.", re.sub(r"^stem\.(conv|bn)", r"\g<1>1", key))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file as akamaster's: ResNet-8 with random weights."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet8.th"
    state = {f"module.{published(key)}": w for key, w in proxies.CifarResNet(8).network.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 10.0}, file)
    return str(file)


@pytest.mark.parametrize("name", ["digits", "resnet8"])
def test_proxy_equals_torch_fidelity_on_the_folders(tmp_path: Path, resnet: str, name: str) -> None:
    name = f"resnet8:{resnet}" if name == "resnet8" else name
    features = features_of(name)
    samples, real = random_images(30, 1), random_images(25, 2) // 2
    folders = write_images(tmp_path / "a", samples), write_images(tmp_path / "b", real)
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        batch_size=8,
        feature_extractor=features.extractor,
        feature_extractor_weights_path=features.weights,
        **FIDELITY,
    )
    extractor = Extractor(features, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few images
        of_folders = scores(
            extractor(folders[0]), real_statistics(folders[1], extractor, tmp_path / "cache"), extractor
        )
        in_memory = scores(extractor(samples), real_statistics(real, extractor, tmp_path / "cache"), extractor)
    kind = "digits" if name == "digits" else "R8"
    assert list(of_folders) == [f"FD-{kind}", f"CS-{kind}", f"CS-{kind} std"]
    assert list(of_folders.values()) == [expected[key] for key in KEYS]
    assert in_memory == of_folders


def test_distance_and_score_are_their_definitions(digits: Extractor) -> None:
    """Float64 references: symmetric matrix roots, and KL by loops over the splits of torch-fidelity's permutation."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    samples, real = random_images(60, 3), digits_images(90)
    with torch.no_grad():
        network = proxies.train_digits()[0]
        (f1, logits), (f2, _) = network(samples), network(real.expand(-1, 3, -1, -1))
    f1, f2 = f1.double().numpy(), f2.double().numpy()
    s1, s2 = np.cov(f1, rowvar=False), np.cov(f2, rowvar=False)
    distance = ((f1.mean(0) - f2.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root(root(s1) @ s2 @ root(s1)))
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(60)]
    parts = []
    for split in range(10):
        rows = p[6 * split : 6 * split + 6]
        mean = rows.mean(0)
        parts.append(np.exp(np.mean([sum(r * np.log(r / mean)) for r in rows])))

    found = scores(digits(samples), statistics(digits(InMemory(real))["features"], "real"), digits)
    assert found["FD-digits"] == pytest.approx(distance, rel=1e-4)
    assert found["CS-digits"] == pytest.approx(np.mean(parts), rel=1e-6)
    assert found["CS-digits std"] == pytest.approx(np.std(parts), rel=1e-4)


def test_digits_proxy_tells_good_from_bad(digits: Extractor) -> None:
    """Real digits against real ones, blurred ones, and noise; as a classifier it is right."""
    assert "accuracy" in digits.features.note and proxies.train_digits()[1] > 95
    real = statistics(digits(InMemory(digits_images(800)))["features"], "real")
    good = digits_images(400, 800)
    blurred = torch.nn.functional.avg_pool2d(good.float(), 3, 1, 1).to(torch.uint8)
    found = [scores(digits(images), real, digits) for images in (good, blurred, random_images(400, 0))]
    distances, score = [f["FD-digits"] for f in found], [f["CS-digits"] for f in found]
    assert 10 * distances[0] < distances[1] < distances[2]
    assert score[0] > 7 > score[2]


def test_resnet56_has_the_published_network(shared_data: Path) -> None:
    """On CIFAR-10's published weights: every block counts, and real images are classified."""
    file = shared_data / "weights/resnet56-cifar10.safetensors"
    network = proxies.load_resnet(56, file).eval()
    assert sum(p.numel() for p in network.parameters()) == 853_018
    from classification.networks import create_network
    from classification.networks.pretrained import load_weights

    other = create_network("cifar_resnet56_a", num_classes=10)
    load_weights(other, file)
    images = random_images(4, 0, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images / 255.0 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(images)[1], other.eval()(normalised), rtol=1e-4, atol=1e-4)
    features = features_of(f"resnet56:{file}")
    assert (features.distance, features.score) == ("FD-R56", "CS-R56")


def test_the_identity_of_published_weights_is_kept(tmp_path: Path) -> None:
    """Evaluations and statistics of earlier versions know the features by this value."""
    state = proxies.CifarResNet(8).state_dict()
    fixed = {k: torch.linspace(-1, 1, w.numel()).view(w.shape) if w.numel() > 1 else w + 3 for k, w in state.items()}
    torch.save(fixed, tmp_path / "resnet8.th")
    identity = Extractor(features_of(f"resnet8:{tmp_path / 'resnet8.th'}")).identity
    assert identity == "16edb140a1f8f53b886d50a5b9e0cff8c69e6cf902b93278a895b4a5afb9c187"


def test_statistics_of_the_real_set_are_kept(tmp_path: Path, resnet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = Extractor(features_of(f"resnet8:{resnet}"))
    real, cache = random_images(20, 0), tmp_path / "cache"
    folder = write_images(tmp_path / "real", real)
    first = real_statistics(folder, extractor, cache)
    (file,) = cache.iterdir()
    calls: list[int] = []
    monkeypatch.setattr(Extractor, "__call__", lambda self, images: calls.append(len(images)) or 1 / 0)
    for source in (folder, str(file)):
        again = real_statistics(source, Extractor(features_of(f"resnet8:{resnet}")), cache)
        assert np.array_equal(again.mu, first.mu) and np.array_equal(again.sigma, first.sigma)
        assert again.mu.dtype == first.mu.dtype and again.count == 20
    # One other image, or other weights: not these statistics.
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "0000.png")
    with pytest.raises(ZeroDivisionError):
        real_statistics(folder, extractor, cache)
    torch.manual_seed(1)
    other = tmp_path / "other.th"
    torch.save(proxies.CifarResNet(8).network.state_dict(), other)
    write_images(folder, real[:1])
    with pytest.raises(ZeroDivisionError):
        real_statistics(folder, Extractor(features_of(f"resnet8:{other}")), cache)
    real_statistics(folder, extractor, cache)
    assert calls == [20, 20]


def test_statistics_of_an_npz_file_in_float64(tmp_path: Path, digits: Extractor) -> None:
    ours = statistics(digits(InMemory(digits_images(50)))["features"], "ours")
    np.savez(tmp_path / "ref.npz", mu=ours.mu.astype("float64"), sigma=ours.sigma)
    reference = real_statistics(tmp_path / "ref.npz", digits)
    assert reference.count is None
    assert frechet_distance(ours, reference) == pytest.approx(0.0, abs=1e-4)
    np.savez(tmp_path / "short.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match=r"short\.npz of 3: they come from other extractors"):
        frechet_distance(ours, real_statistics(tmp_path / "short.npz", digits))
    np.savez(tmp_path / "none.npz", mean=np.zeros(3))
    for name in ("none.npz", "damaged.npz"):
        (tmp_path / "damaged.npz").write_bytes(b"PK\3\4 no archive")
        with pytest.raises(InputError, match=r"is no \.npz file with mu and sigma"):
            real_statistics(tmp_path / name, digits)
    with pytest.raises(InputError, match="no file of statistics"):
        real_statistics(tmp_path / "absent.npz", digits)


def test_too_few_samples_are_told_with_numbers(digits: Extractor) -> None:
    real = statistics(digits(InMemory(digits_images(200)))["features"], "real")
    with pytest.warns(UserWarning, match=r"FD-digits of 30 samples with 32 features.* rank 29 at most.* at least 33"):
        scores(digits(random_images(30, 0)), real, digits)
    few = statistics(digits(InMemory(digits_images(32)))["features"], "real")
    with pytest.warns(UserWarning, match=r"FD-digits of 32 real images with 32 features"):
        scores(digits(random_images(33, 0)), few, digits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(digits(random_images(33, 0)), real, digits)
    with pytest.raises(InputError, match="9 images cannot be cut into the 10 splits of CS-digits"):
        scores(digits(random_images(9, 0)), real, digits)
    with pytest.raises(InputError, match="at least two images, there are 1"):
        scores(digits(random_images(1, 0)), real, digits, splits=1)


def test_bad_images_are_one_clear_line(tmp_path: Path, digits: Extractor) -> None:
    with pytest.raises(InputError, match="no folder of images"):
        InFolder(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no \.png"):
        InFolder(tmp_path)
    folder = write_images(tmp_path / "a", random_images(3, 0))
    Image.new("RGB", (9, 8)).save(folder / "9.png")
    with pytest.raises(InputError, match=r"9\.png is not of 8 x 8 pixels"):
        digits(InFolder(folder))
    (folder / "9.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot decode .*9\.png"):
        digits(InFolder(folder))
    with pytest.raises(InputError, match=r"8x8 pixels, these have \(16, 16\)"):
        digits(InMemory(random_images(2, 0, 16)))
    with pytest.raises(ValueError, match="uint8"):
        InMemory(torch.zeros(2, 3, 8, 8))


def test_bad_features_are_one_clear_line(tmp_path: Path, resnet: str) -> None:
    for name, message in (
        ("inceptions", "unknown features 'inceptions': known are inception"),
        ("resnet55:x", "unknown features"),
        ("resnet56", "resnet56:FILE"),
        (f"resnet56:{tmp_path / 'x.th'}", r"no weight file .*x\.th .*akamaster"),
        (f"resnet14:{resnet}", "does not hold a CIFAR ResNet-14"),
        ("inception:x", "--inception"),
    ):
        with pytest.raises(InputError, match=message) as error:
            features_of(name)
        assert "\n" not in str(error.value)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trap-was-sprung",)


def test_missing_inception_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.error

    import torch_fidelity.feature_extractor_inceptionv3 as module

    where = f"{INCEPTION_FILE} from {INCEPTION_URL}"
    assert metrics.INCEPTION_URL == module.URL_INCEPTION_V3
    with pytest.raises(InputError, match=re.escape(where)):
        features_of("inception", tmp_path / "absent.pth")

    def offline(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match=re.escape(where)) as error:
        Extractor(features_of("inception"))
    assert "--inception" in str(error.value) and "no route to host" in str(error.value)

    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(InputError, match="is not weights-inception"):
        Extractor(features_of("inception", tmp_path / "trap.pth"))
    assert not (tmp_path / "trap-was-sprung").exists()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not fit inception-v3-compat"):
        Extractor(features_of("inception", tmp_path / "other.pth"))


@pytest.mark.slow
def test_inception_equals_torch_fidelitys_command_in_every_digit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity.feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *arguments, **options: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        random = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    weights = tmp_path / INCEPTION_FILE
    assert len(random.state_dict()) == 566
    torch.save(random.state_dict(), weights)
    samples, real = random_images(12, 0, 32), random_images(11, 1, 32) // 2
    folders = write_images(tmp_path / "samples", samples), write_images(tmp_path / "real", real)

    said = subprocess.run(
        [
            *(sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--fid", "--isc", "--no-cache", "--silent"),
            *("--input1", folders[0], "--input2", folders[1], "--feature-extractor-weights-path", weights),
            *("--save-cpu-ram", "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    ).stdout
    expected = json.loads(said[said.index("{") :])
    extractor = Extractor(features_of("inception", weights))
    with pytest.warns(UserWarning, match=r"FID of 12 samples with 2,048 features.*50,000"):
        found = scores(extractor(folders[0]), real_statistics(folders[1], extractor, tmp_path / "cache"), extractor)
        in_memory = scores(extractor(samples), real_statistics(real, extractor, tmp_path / "cache"), extractor)
    printed = [f"{expected[key]:.7g}" for key in KEYS]
    assert [f"{value:.7g}" for value in found.values()] == printed
    assert [f"{value:.7g}" for value in in_memory.values()] == printed
    assert list(found) == ["FID", "IS", "IS std"]
    assert found["FID"] > 0 and len(set(printed)) == 3
