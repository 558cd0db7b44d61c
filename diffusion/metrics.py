"""FID and IS (Tables 6 and 7), computed by torch-fidelity's own functions: on images in memory or in a folder.

Heusel et al. 2017 (FID), Salimans et al. 2016 (IS). With Inception's features the scores equal those of the command
``fidelity --fid --isc`` on the same images. With other features (``proxies``) they are no FID and IS and are named so.
"""

from __future__ import annotations

import functools
import hashlib
import os
import urllib.error
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import InputError, first_line, notice
from core.files import how_to_make, make_folder
from core.images import image_files, open_image
from core.progress import progress_bar
from core.training.run import is_main_process
from core.weights import read_torch
from diffusion import proxies

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


@dataclass(frozen=True)
class Features:
    """An extractor registered with torch-fidelity, and what its scores are called."""

    extractor: str
    """Its name there: the argument ``feature_extractor`` of ``torch_fidelity.calculate_metrics``."""
    weights: str | None
    """Its file: the argument ``feature_extractor_weights_path``."""
    distance: str = "FID"
    score: str = "IS"
    note: str = ""


def features_of(name: str, inception: str | Path | None = None) -> Features:
    """What ``--features`` names: ``inception``, ``resnet56:FILE`` (any CIFAR ResNet of 6n+2 layers) or ``digits``.

    ``inception``: the local file of Inception's weights; torch-fidelity downloads them unless given.
    Registers an extractor of ours with torch-fidelity, so that its own functions can be called with it too.
    Raises: InputError for an unknown name, and a missing file.
    """
    kind, _, file = name.partition(":")
    if kind == "inception":
        if file:
            raise InputError("--features inception takes its weights from --inception FILE")
        if inception is not None and not Path(inception).is_file():
            raise InputError(f"no Inception weights {inception}: get {INCEPTION_FILE} from {INCEPTION_URL}")
        return Features(INCEPTION, None if inception is None else str(inception))
    if kind == "digits" and not file:
        _register("adm-digits", lambda weights: proxies.train_digits()[0])
        accuracy = proxies.train_digits()[1]
        note = f"a small digits classifier, accuracy {accuracy:.1f} % on held-out digits"
        return Features("adm-digits", None, "FD-digits", "CS-digits", note)
    if depth := proxies.resnet_depth(kind):
        if not file:
            raise InputError(f"--features {kind} needs its weight file: {kind}:FILE")
        proxies.load_resnet(depth, file)  # says what is wrong with it
        _register(f"adm-{kind}", lambda weights: proxies.load_resnet(depth, weights))
        return Features(f"adm-{kind}", file, f"FD-R{depth}", f"CS-R{depth}", f"CIFAR ResNet-{depth} {file}")
    raise InputError(f"unknown features {name!r}: known are inception, resnet56:FILE and digits")


def _register(name: str, build: Any) -> None:
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Proxy(FeatureExtractorBase):
        """Gives the layers "features" and "logits" of a network uint8 ``[B, 3, H, W]`` -> (features, logits)."""

        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list)
            self.network = build(options.get("feature_extractor_weights_path"))

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs = dict(zip(self.get_provided_features_list(), self.network(images), strict=True))
            return tuple(outputs[layer] for layer in self.features_list)

    if name not in FEATURE_EXTRACTORS_REGISTRY:  # a second registration is an error there
        register_feature_extractor(name, Proxy)


class Extractor:
    """A feature extractor on a device, ready for any number of image sets.

    Args: what ``features_of`` says; a device; images a batch (of torch-fidelity's command: 64).
    Raises: InputError where Inception's weights are missing, cannot be had, or are of another network.
    """

    def __init__(self, features: Features, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
        from torch_fidelity.utils import create_feature_extractor

        self.features, self.batch_size, self.device = features, batch_size, torch.device(device)
        layer = FEATURE_EXTRACTORS_REGISTRY[features.extractor].get_default_feature_layer_for_metric
        self.distance_layer, self.score_layer = layer("fid"), layer("isc")
        if features.extractor == INCEPTION and features.weights is not None:
            try:
                read_torch(features.weights)  # as data: torch-fidelity unpickles whatever is in it
            except InputError as error:
                raise InputError(f"{features.weights} is not {INCEPTION_FILE} of {INCEPTION_URL}: {error}") from error
        try:
            self.module = create_feature_extractor(
                features.extractor,
                [self.distance_layer, self.score_layer],
                cuda=self.device.type == "cuda",
                feature_extractor_weights_path=features.weights,
                verbose=False,
            )
        except RuntimeError as error:
            raise InputError(f"{features.weights} does not fit {features.extractor}: {first_line(error)}") from error
        except (urllib.error.URLError, OSError) as error:
            raise InputError(
                f"cannot download Inception's weights ({first_line(error)}): get {INCEPTION_FILE} from "
                f"{INCEPTION_URL} and name it by --inception, or put it into {torch.hub.get_dir()}/checkpoints"
            ) from error

    @functools.cached_property
    def identity(self) -> str:
        """Name and hash of its weights: what decides its features."""
        digest = hashlib.sha256(self.features.extractor.encode())
        for key, tensor in sorted(self.module.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, source: Tensor | str | Path | Images, *, shown: bool = True) -> dict[str, Tensor]:
        """Features ``[N, C]`` on the CPU, by layer, of images in memory or in a folder. Raises: as ``as_images``.

        ``shown``: whether to say how far it is.
        """
        from torch_fidelity.utils import get_featuresdict_from_dataset

        images, cuda = as_images(source), self.device.type == "cuda"
        with (
            warnings.catch_warnings(),
            progress_bar(
                len(images), f"features of {self.features.extractor}", shown=shown and is_main_process()
            ) as bar,
        ):
            warnings.filterwarnings("ignore", message=".*pin.?memory.*")
            watched = Watched(images, bar)
            # True: no worker processes, which take longer to start than they save
            return get_featuresdict_from_dataset(watched, self.module, self.batch_size, cuda, True, False)


class Watched(Dataset):
    """Images that move a bar when they are read."""

    def __init__(self, images: Images, bar: Any) -> None:
        self.images, self.bar = images, bar

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.bar.update()
        return self.images[index]


class InMemory(Dataset):
    """uint8 ``[N, 1 or 3, H, W]`` as torch-fidelity takes it: one ``[3, H, W]`` an item, grey repeated."""

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [N, 1 or 3, H, W]: {images.dtype} {tuple(images.shape)}")
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)

    def content(self) -> Iterable[bytes]:
        """What the statistics depend on."""
        yield repr(tuple(self.images.shape)).encode()
        for some in self.images.split(4096):
            yield some.contiguous().numpy().tobytes()


class InFolder(Dataset):
    """The .png, .jpg and .jpeg files below a folder, in RGB, as torch-fidelity finds them with --samples-find-deep.

    Raises: InputError for no such folder, one without images, and (as it is read) a file that is no image.
    """

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise InputError(f"no folder of images {folder}{how_to_make(folder)}")
        found = (f for f in image_files(folder) if f.lower().endswith((".png", ".jpg", ".jpeg")))
        self.files = [os.path.join(os.path.realpath(folder), file) for file in found]
        if not self.files:
            raise InputError(f"no .png, .jpg or .jpeg file in {folder}")
        self.size: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = torch.from_numpy(np.array(open_image(self.files[index]))).permute(2, 0, 1)
        self.size = self.size or tuple(image.shape)
        if tuple(image.shape) != self.size:
            width, height = self.size[2], self.size[1]
            raise InputError(f"{self.files[index]} is not of {width} x {height} pixels like {self.files[0]}: resize it")
        return image

    def content(self) -> Iterable[bytes]:
        """What the statistics depend on."""
        for file in self.files:
            yield Path(file).read_bytes()


Images = InMemory | InFolder


def as_images(source: Tensor | str | Path | Images) -> Images:
    """uint8 ``[N, 1 or 3, H, W]``, or a folder. Raises: as ``InMemory`` and ``InFolder``."""
    if isinstance(source, Tensor):
        return InMemory(source)
    return source if isinstance(source, (InMemory, InFolder)) else InFolder(source)


@dataclass(frozen=True)
class Statistics:
    """Mean ``[C]`` and covariance ``[C, C]`` (numpy arrays) of the features of an image set."""

    mu: Any
    sigma: Any
    count: int | None
    """Images; None where the file does not say."""
    source: str
    """Where they come from."""


def statistics(features: Tensor, source: str) -> Statistics:
    """Of features ``[N, C]``, by torch-fidelity. Raises: InputError for fewer than two images, and for NaN."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise InputError(f"{source}: a covariance needs at least two images, there are {len(features)}")
    if not features.isfinite().all():
        raise InputError(f"{source}: its features are not finite: is the extractor's weight file whole?")
    found = fid_features_to_statistics(features)
    return Statistics(found["mu"], found["sigma"], len(features), source)


def read_statistics(file: str | Path) -> Statistics:
    """``mu`` and ``sigma`` of an .npz file, as ours and those of the reference sets on the web.

    So also of guided-diffusion's evaluator (``arr_0``, ``mu``, ``sigma``, ``mu_s``, ``sigma_s``), of whose images
    nothing is read. Raises: InputError for a missing or unreadable file, or one without them.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"no file of statistics {file}")
    try:
        with np.load(file) as held:
            count = int(held["count"]) if "count" in held else None
            mu, sigma = held["mu"], held["sigma"]
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{file} is no .npz file with mu and sigma: {first_line(error)}") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"{file}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are no mean and covariance")
    return Statistics(mu, sigma, count, str(file))


def real_statistics(
    source: Tensor | str | Path | Images, extractor: Extractor, cache: str | Path | None = None
) -> Statistics:
    """Statistics of the real images: an .npz file's, or those of images, kept in the folder ``cache`` for next time.

    The name there is a hash of the images' content and of the extractor's weights: other images or weights never meet
    statistics that are not theirs. Raises: InputError as ``InFolder``, ``read_statistics``, ``statistics``.
    """
    if isinstance(source, (str, Path)) and str(source).endswith(".npz"):
        return read_statistics(source)
    images = as_images(source)
    name = str(source) if isinstance(source, (str, Path)) else f"{len(images)} images in memory"
    digest = hashlib.sha256(extractor.identity.encode())
    for part in images.content():
        digest.update(hashlib.sha256(part).digest())
    # Unless given, beside torch-fidelity's own caches.
    cache = Path(torch.hub.get_dir()).parent / "adm_statistics" if cache is None else Path(cache)
    file = cache / f"{extractor.features.extractor}-{digest.hexdigest()[:32]}.npz"
    key = digest.hexdigest()
    if file.is_file() and (kept := _kept_statistics(file, key)) is not None:
        return kept
    found = statistics(extractor(images)[extractor.distance_layer], name)
    make_folder(cache, "--cache")
    beside = file.with_suffix(f".{os.getpid()}.npz")  # several commands may find it missing at once
    try:
        np.savez(beside, mu=found.mu, sigma=found.sigma, count=np.array(found.count), key=np.array(key))
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    return found


def _kept_statistics(file: Path, key: str) -> Statistics | None:
    """What was kept for images and extractor of this ``key``; None, with a line, where the file is damaged."""
    try:
        found = read_statistics(file)
        with np.load(file) as held:  # of an earlier version without its key
            if found.count is None or str(held.get("key", key)) != key:
                raise InputError(f"{file} holds statistics of other images")
    except InputError as error:
        notice(f"{error}: they are computed anew")
        return None
    return found


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """``|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2)``, by torch-fidelity.

    Raises: InputError where the features are of different numbers.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if first.mu.shape != second.mu.shape:
        raise InputError(
            f"{first.source} has statistics of {first.mu.shape[0]} features, {second.source} of {second.mu.shape[0]}: "
            "they come from other extractors"
        )
    pair = [{"mu": s.mu, "sigma": s.sigma} for s in (first, second)]
    if first.mu.dtype != second.mu.dtype or first.sigma.dtype != second.sigma.dtype:  # a file of the web in float64
        pair = [{key: values.astype("float64") for key, values in one.items()} for one in pair]
    return fid_statistics_to_metric(*pair, False)[KEY_METRIC_FID]


def scores(found: Mapping[str, Tensor], real: Statistics, extractor: Extractor, splits: int = 10) -> dict[str, float]:
    """Distance, score, and the score's standard deviation over the splits, by the extractor's names: FID, IS, IS std.

    Warns where there are too few images for the extractor's features.
    Args: ``found``: the features ``[N, C]`` of N images, as ``extractor`` gives them.
    Raises: InputError for fewer images than splits, or than two, and for features that do not fit ``real``.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    features, names = found[extractor.distance_layer], extractor.features
    if len(features) < splits:
        raise InputError(f"{len(features)} images cannot be cut into the {splits} splits of {names.score}")
    ours = statistics(features, "the samples")
    for s, what in ((ours, "samples"), (real, "real images")):
        if s.count is not None and s.count <= features.shape[1]:  # the covariance is singular
            usual = " (FID is given for 50,000)" if names.distance == "FID" else ""
            warnings.warn(
                f"{names.distance} of {s.count:,} {what} with {features.shape[1]:,} features: their covariance has "
                f"rank {s.count - 1:,} at most and the distance is far too large; take at least "
                f"{features.shape[1] + 1:,}{usual}",
                stacklevel=2,
            )
    score = isc_features_to_metric(found[extractor.score_layer], splits)
    return {
        names.distance: frechet_distance(ours, real),
        names.score: score[KEY_METRIC_ISC_MEAN],
        f"{names.score} std": score[KEY_METRIC_ISC_STD],
    }
