"""Configs: mmengine's, with a network named by the stock config it comes from, and options checked before they count.

Our configs add to mmengine's keys: ``stock`` in a network (a file of mmseg's own configs), and at the top
``data_root``, ``crop_size`` (height, width), ``batch_size`` (over all processes), ``seed`` and ``run``
(``configs/_base_/runtime.py``), which are put where mmengine reads them.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mmseg
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import get_external_models
from mmseg.registry import MODELS

from core.errors import InputError, first_line, unknown
from core.files import how_to_make
from core.images import image_files
from core.training.command import LineParser
from core.weights import check_finite, read_state_dict, read_torch, split_key, state_dict_of
from segmentation.data import NumberedDataset, check_label_map, check_listing, check_truth
from segmentation.distiller import ROLES, load_weights
from segmentation.losses import adm_config, parse_method
from segmentation.options import check_option, check_settings

NEEDED = (
    "model", "train_dataloader", "val_dataloader", "val_evaluator", "train_cfg", "optim_wrapper", "param_scheduler",
    "default_hooks", "env_cfg", "data_root", "crop_size", "batch_size", "seed", "run",
)  # fmt: skip
PAIR = "DistillationSegmentor"
STOCK_CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"


def read_config(file: str | Path) -> Config:
    """A config as it stands. Raises: InputError for a file that is none."""
    if not Path(file).is_file():
        raise InputError(f"no config {file}")
    try:
        cfg = Config.fromfile(str(file))
    except (Exception, SystemExit) as error:  # a config is Python and can raise anything
        raise InputError(f"{file} is no config: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if "model" not in cfg:
        raise InputError(f"{file} lacks model: start from one of segmentation/configs")
    return cfg


def load_config(file: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """A config with its networks in full, ``--cfg-options`` merged in, and our own keys put where mmengine reads them.

    Raises: InputError for a file that is no config and options that do not fit.
    """
    cfg = read_config(file)
    if missing := [key for key in NEEDED if key not in cfg]:
        raise InputError(f"{file} lacks {missing[0]}: start from one of segmentation/configs")
    if lacks := [part for part in (*ROLES, "method", "data_preprocessor") if part not in cfg.model]:
        raise InputError(f"{file} lacks model.{lacks[0]}: start from one of segmentation/configs, or a run's config.py")
    init_default_scope("mmseg")
    for role in ROLES:
        if "stock" in cfg.model[role]:
            cfg.model[role] = stock_network(cfg.model[role])
    for name in ("train_pipeline", "test_pipeline"):  # the loaders hold them
        cfg.pop(name, None)
    for key, value in (options or {}).items():
        check_option(cfg, key, value)
        try:
            cfg.merge_from_dict({key: value})
        except (TypeError, KeyError) as error:
            raise InputError(f"the option {key} does not fit the config: {' '.join(str(error).split())}") from error
    check_settings(cfg)
    method, with_adm = parse_method(cfg.model.method)
    if not with_adm and (idle := next((key for key in options or {} if key.startswith("model.adm.")), None)):
        raise InputError(f"{idle} does nothing without ADM: give the method {method}+adm, or leave it out")
    cfg.model.adm = asdict(adm_config(cfg.model.get("adm") or {}, method, used=with_adm))
    crop = tuple(cfg.crop_size) if isinstance(cfg.crop_size, (list, tuple)) else ()
    if len(crop) != 2:
        raise InputError(f"crop_size {cfg.crop_size}: two numbers, height and width in pixels, as crop_size=512,1024")
    for step in _datasets(cfg.train_dataloader.dataset)[-1].pipeline:
        if step.type == "RandomCrop":
            step.crop_size = crop
    cfg.model.data_preprocessor.size = crop
    for scheduler in cfg.param_scheduler:
        if scheduler.type == "PolyLR" and not scheduler.by_epoch:
            scheduler.setdefault("end", cfg.train_cfg.max_iters)
    return cfg


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["train_cfg.max_iters=100"] -> {"train_cfg.max_iters": 100}``, values as mmengine reads them.

    Raises: InputError for one without a value.
    """
    if not pairs:
        return {}
    if wrong := next((pair for pair in pairs if "=" not in pair), None):
        raise InputError(f"--cfg-options {wrong}: give KEY=VALUE")
    parser = LineParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    return parser.parse_args(["--cfg-options", *pairs]).cfg_options


def stock_network(network: Mapping[str, Any]) -> ConfigDict:
    """The network of a stock config with our changes. Raises: InputError where mmseg ships no such file."""
    file = STOCK_CONFIGS / network["stock"]
    if not file.is_file():
        known = [str(path.relative_to(STOCK_CONFIGS)) for path in STOCK_CONFIGS.glob("*/*.py")]
        raise unknown("stock config", network["stock"], known)
    changes = {key: value for key, value in network.items() if key != "stock"}
    whole = Config({"network": Config.fromfile(str(file)).model})
    whole.merge_from_dict({"network": changes})
    whole.network.pop("data_preprocessor", None)  # the pair has one
    return whole.network


def complete(cfg: Config, processes: int, device: str) -> Config:
    """A copy to train with: each process's share of the batch, KDCL's two views, what the CPU cannot do replaced.

    Raises: InputError where batch, crop or networks do not fit each other.
    """
    cfg = copy.deepcopy(cfg)
    cfg.randomness = {**cfg.get("randomness", {}), "seed": cfg.seed}
    if cfg.batch_size < 1 or cfg.batch_size % processes:
        raise InputError(f"batch_size {cfg.batch_size} cannot be shared by {processes} process(es)")
    cfg.train_dataloader.batch_size = cfg.batch_size // processes
    for name in ("train_dataloader", "val_dataloader"):
        cfg[name] = ready_loader(cfg[name], cfg.data_root)
    if (data := cfg.train_dataloader.dataset).type == "NumberedDataset":
        data.seed = cfg.seed
    if parse_method(cfg.model.method)[0] == "kdcl":
        for step in _datasets(cfg.train_dataloader.dataset)[-1].pipeline:
            if step.type == "PhotoMetricDistortion":
                step.type = "PhotoMetricDistortionPerNetwork"
                cfg.model.data_preprocessor.type = "ViewsDataPreProcessor"
    if device == "cpu":
        _without_gpu(cfg)
    check_networks(cfg, processes)
    return cfg


def ready_loader(loader: Any, root: str | None) -> Any:
    """A loader's config with the folder of the data set (unless None), and without what no worker can have."""
    loader = copy.deepcopy(loader)
    if loader.get("num_workers", 0) == 0:
        loader.persistent_workers = False
    data = _datasets(loader.dataset)[-1]
    if root is not None:
        data.data_root = root
    for step in data.get("pipeline", ()):
        if step.get("type") == "LoadImageFromFile":  # an EXIF orientation would turn the image, and not its labels
            step.setdefault("color_type", "color_ignore_orientation")
    return loader


def _datasets(dataset: Any) -> list[Any]:
    """A data set's config and those it wraps, outermost first."""
    return [dataset, *(_datasets(dataset.dataset) if "dataset" in dataset else [])]


def _without_gpu(cfg: Config) -> None:
    if cfg.optim_wrapper.get("type", "OptimWrapper") == "AmpOptimWrapper":
        raise InputError("mixed precision needs a GPU: leave out --amp")
    cfg.env_cfg.dist_cfg.backend = "gloo"

    def replace(section: Any) -> None:
        if isinstance(section, dict) and section.get("type") == "SyncBN":
            section["type"] = "BN"
        for value in section.values() if isinstance(section, dict) else section:
            if isinstance(value, (dict, list)):
                replace(value)

    replace(cfg.model)
    cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}


def check_networks(cfg: Config, processes: int) -> None:
    """Raises: InputError for a batch of one, or a crop too small for a head."""
    networks = {role: cfg.model[role] for role in ROLES}
    per_process = cfg.train_dataloader.batch_size
    together = any("SyncBN" in str(network) for network in networks.values())
    if per_process * (processes if together else 1) < 2:
        raise InputError(
            f"batch_size {cfg.batch_size} over {processes} process(es) gives BatchNorm one image at a time, and the "
            f"heads pool it to one value: choose batch_size {2 * processes} or more"
        )
    crop = tuple(cfg.crop_size)
    for role, network in networks.items():
        head, stride = network.decode_head, map_stride(network)
        cells = max(head.get("pool_scales", (2,)))
        height, width = (-(-side // stride) for side in crop)
        if min(height, width) < cells:
            raise InputError(
                f"crop_size {crop} gives the {role}'s {head.type} a map of {height} x {width} cells, it needs {cells} "
                f"x {cells}: choose at least {(cells - 1) * stride + 1} pixels a side"
            )


def map_stride(network: Mapping[str, Any]) -> int:
    """Pixels a side of a crop for each cell of the map that a network makes of it."""
    return 4 * math.prod(network["backbone"].get("strides", ()))


def check_images(loader: Any, head: Any) -> None:
    """Raises: InputError where images or labels are damaged or not where a loader's config says, or a network's decode
    ``head`` does not fit them."""
    config = _datasets(loader.dataset)[-1]
    root = Path(config.get("data_root") or ".")
    images, labels = built(
        "data_prefix", lambda: [root / config.data_prefix[key] for key in ("img_path", "seg_map_path")]
    )
    where = f"--data-root {root} must hold {config.data_prefix.img_path}/ and {config.data_prefix.seg_map_path}/"
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"no folder {folder}: {where}{how_to_make(folder)}")
    image_files(images)  # which refuses what no data set should meet: pipes, links in a circle
    maps = image_files(labels)
    steps = [step for step in config.get("pipeline", ()) if step.type == "LoadAnnotations"]
    pipeline = [*steps, {"type": "PackSegInputs"}]
    settings = {**config, "pipeline": pipeline, "serialize_data": False}
    truth = built(f"the data set {config.type}", lambda: NumberedDataset(settings))
    dataset: Any = truth.dataset
    if not len(dataset):
        raise InputError(f"no image *{dataset.img_suffix} in {images}: {where}{how_to_make(images)}")
    files = [Path(dataset.get_data_info(i)["seg_map_path"]) for i in range(len(dataset))]
    check_listing(dataset, images, files, [labels / file for file in maps])
    if missing := next((file for file in files if not file.exists()), None):
        made = " (made by cityscapesscripts' createTrainIdLabelImgs)" if "TrainIds" in missing.name else ""
        raise InputError(f"no label map {missing}{made}: every image needs one")
    for i, file in enumerate(files):
        check_label_map(Path(dataset.get_data_info(i)["img_path"]), file)
    if len(dataset.metainfo["classes"]) != head.num_classes:
        raise InputError(
            f"{config.type} has {len(dataset.metainfo['classes'])} classes, the networks' heads have "
            f"{head.num_classes}: set num_classes of all heads"
        )
    if dataset.ignore_index != head.ignore_index:
        raise InputError(
            f"{config.type} ignores the label {dataset.ignore_index}, the networks' heads {head.ignore_index}: set "
            "ignore_index of all heads"
        )
    if steps:
        check_truth(truth, labels)


def built(section: str, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of a section of a config. Raises: InputError, naming it, whatever that raises."""
    try:
        return make()
    except InputError:
        raise
    except Exception as error:  # what stands there may raise anything
        raise InputError(f"{section} cannot be built: {first_line(error)}") from error


def check_parts(cfg: Config, model: Any) -> None:
    """Builds once, for nothing, what mmengine builds only after a run has begun.

    Raises: InputError naming the section that cannot be built, or ``run.select`` where it is not evaluated.
    """
    wrapper = built("optim_wrapper", lambda: build_optim_wrapper(model, cfg.optim_wrapper))
    for number, scheduler in enumerate(cfg.param_scheduler):
        name = f"param_scheduler.{number}"
        built(name, partial(PARAM_SCHEDULERS.build, {**scheduler, "optimizer": wrapper}))
    for hook in [*filter(None, cfg.default_hooks.values()), *(cfg.get("custom_hooks") or ())]:
        built("hooks", partial(HOOKS.build, hook))
    for name in ("train_dataloader", "val_dataloader"):
        loader = built(name, partial(Runner.build_dataloader, cfg[name], seed=cfg.seed))
        data = loader.dataset
        built(name, partial(data.__getitem__, (0, 0) if isinstance(data, NumberedDataset) else 0))
    names = cfg.get("activation_checkpointing") or ()
    for name in [names] if isinstance(names, str) else names:
        built("activation_checkpointing", partial(model.get_submodule, name))
    if isinstance(how := cfg.get("compile"), Mapping):
        built("compile", lambda: torch.compile(model.train_step, **how))
    metrics = built("val_evaluator", lambda: Evaluator(cfg.val_evaluator)).metrics
    if any(getattr(metric, "format_only", False) for metric in metrics):
        raise InputError("val_evaluator: with format_only nothing is evaluated, leave it out")
    evaluated = {metric.prefix for metric in metrics}
    role, _, value = cfg.run.select.partition("/")
    if role not in evaluated:
        raise InputError(f"run.select {cfg.run.select}: val_evaluator evaluates {', '.join(map(str, evaluated))} alone")
    if value.startswith("IoU."):
        asked, classes = value.removeprefix("IoU."), loader.dataset.metainfo["classes"]
        if asked not in classes:
            raise unknown("class in run.select", asked, classes)
        labels = (loader.dataset[i]["data_samples"].gt_sem_seg.data for i in range(len(loader.dataset)))
        if not any((label == classes.index(asked)).any() for label in labels):
            raise InputError(f"run.select {cfg.run.select}: no evaluated pixel is labelled {asked}")


def check_pretrained(cfg: Config, networks: Mapping[str, Any]) -> None:
    """Finds, downloading as mmseg does, what the networks start from. Raises: InputError naming what is wrong."""
    if file := cfg.model.get("teacher_weights"):
        load_weights(networks["teacher"], Path(file), "teacher")
    for role, network in networks.items():
        for option, name in _pretrained(role, cfg.model[role]):
            what, give = f"the {role}'s backbone starts from {name}", f"--cfg-options {option}=FILE"
            try:
                state = CheckpointLoader.load_checkpoint(name, map_location="cpu", logger="silent")
            except InputError as error:
                raise InputError(f"{what}: {error}") from error
            except FileNotFoundError as error:
                raise InputError(f"{what}, and there is no such file: {give} names one, {option}=None none") from error
            except Exception as error:  # no network, a cut off file, an unknown name
                reason = first_line(error)
                address = get_external_models().get(name.partition("://")[2], name)
                cache = os.path.join(torch.hub.get_dir(), "checkpoints")
                raise InputError(
                    f"{what}, which cannot be had ({reason}): get {address} and put it into {cache}, or name it by "
                    f"{give}; {option}=None starts from random weights"
                ) from error
            state = state.get("state_dict", state)
            own = {k: v.shape for k, v in network.backbone.state_dict().items() if "num_batches" not in k}
            wrong = [k for k, shape in own.items() if k not in state or state[k].shape != shape]
            if wrong:
                raise InputError(f"{what}, which is of another network: {len(wrong)} weights do not fit, as {wrong[0]}")
            check_finite(name, {key: state[key] for key in own}, training=True)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def _read_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """In place of mmengine's own, which runs what it cannot read as data."""
    named = os.path.expanduser(filename)
    file = split_key(named)[0]
    if not file.is_file():
        raise FileNotFoundError(f"no weight file {filename}")
    if file.suffix == ".safetensors":
        return {"state_dict": read_state_dict(named)}
    content = read_torch(file)
    beside = content if isinstance(content, Mapping) and "meta" in content else {}
    return {**beside, "state_dict": state_dict_of(named, content)}


def _pretrained(role: str, network: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if name := network.get("pretrained"):
        yield f"model.{role}.pretrained", name
    init = network["backbone"].get("init_cfg")
    if isinstance(init, Mapping) and init.get("type") == "Pretrained":
        yield f"model.{role}.backbone.init_cfg.checkpoint", init["checkpoint"]


def build(model: Mapping[str, Any]) -> Any:
    """A model from its section of a config. Raises: InputError where its networks do not fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False")  # `normalise` says it
        warnings.filterwarnings("ignore", message="DeprecationWarning: pretrained is a deprecated")  # stock configs
        return built("the networks", lambda: MODELS.build(model))
