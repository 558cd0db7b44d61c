"""A trained model with its data, and one network of it as plain mmsegmentation takes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from core.errors import InputError
from core.files import write_atomically
from core.training.checkpoint import find_checkpoint
from core.training.kept import refuse_kept
from core.training.run import identity_of
from core.weights import read_torch
from segmentation.config import PAIR, build, check_images, load_config, read_config, ready_loader
from segmentation.distiller import load_weights


@dataclass(frozen=True)
class Restored:
    """A model in evaluation mode, its networks by role, and the images it is evaluated on."""

    cfg: Config
    checkpoint: Path
    model: Any
    networks: dict[str, Any]
    loader: Any
    device: str


def restore(
    run: str | None, config: str | None, checkpoint: str | None, role: str | None, root: str | None
) -> Restored:
    """The pair, or the network of one role, as it stood at a checkpoint (see the options of ``tools/evaluate.py``).

    Raises: InputError where something is missing, damaged or of another network.
    """
    if run is not None:
        config = f"{run}/config.py"
        if not Path(config).is_file():
            refuse_kept(run)
            raise InputError(f"{run} is no run folder of segmentation: it has no config.py")
        identity = identity_of(Path(config))  # which says it where the file is not whole
    cfg = read_config(config or "")
    if pair := cfg.model.get("type") == PAIR:
        cfg = load_config(config or "")
    elif role is None:
        role = "student"
    file = Path(checkpoint or "") if run is None else find_checkpoint(Path(run), checkpoint or "last")
    if run is not None:
        read_own(file, identity)
    init_default_scope("mmseg")
    settings = network_model(cfg, role) if pair and role else copy.deepcopy(cfg.model)
    model = build(settings if role is None else {**settings, "pretrained": None})
    load_weights(model, file, role, training=False)
    networks = model.networks if role is None else {role: model}
    source = cfg.get("val_dataloader") or cfg.get("test_dataloader")
    if source is None:
        raise InputError(f"{config} has neither val_dataloader nor test_dataloader: what is to be evaluated?")
    loader = ready_loader(source, root or cfg.get("data_root"))
    check_images(loader, next(iter(networks.values())).decode_head)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = revert_sync_batchnorm(model).to(device).eval()
    return Restored(cfg, file, model, networks, Runner.build_dataloader(loader), device)


def read_own(file: Path, identity: str) -> dict[str, Any]:
    """What a checkpoint holds. Raises: InputError for a damaged one, and one of a run of another ``identity``."""
    content = read_torch(file)
    if not isinstance(content, Mapping) or not {"state_dict", "meta", "run"} <= content.keys():
        raise InputError(f"{file} is damaged: it is no checkpoint of a run")
    if (owner := content["run"].get("run", identity)) != identity and identity:
        raise InputError(f"{file} is another run's (its identity begins with {owner[:8]}, not {identity[:8]})")
    return dict(content)


def export_network(cfg: Config, network: nn.Module, role: str, metainfo: Mapping[str, Any], folder: Path) -> None:
    """Writes ``<role>.pth`` (for ``mmseg.apis.init_model``), ``<role>.safetensors`` and ``<role>_config.py``.

    Args: the config of the pair, or of this network; the network; its role; the data set's classes and palette.
    """
    from safetensors.torch import save_file

    # Its data preprocessor's buffers are none of the weights; a stock checkpoint has none either.
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    meta = {"classes": tuple(metainfo["classes"]), "palette": [list(map(int, c)) for c in metainfo["palette"]]}
    checkpoint = {"meta": {"dataset_meta": meta}, "state_dict": weights}
    write_atomically(folder / f"{role}.pth", lambda path: torch.save(checkpoint, path))
    write_atomically(folder / f"{role}.safetensors", lambda path: save_file(weights, path, {"role": role}))
    text = as_text(network_config(cfg, role) if role in cfg.model else cfg)
    write_atomically(folder / f"{role}_config.py", lambda path: path.write_text(text))


def as_text(cfg: Config) -> str:
    """A config as Python, for ``Config.fromfile``; mmengine's own ``pretty_text`` takes seconds."""
    return "".join(f"{k} = {pformat(v, width=120, sort_dicts=False)}\n" for k, v in cfg.to_dict().items())


def network_model(cfg: Config, role: str) -> Any:
    """The model section of one network of a pair, with the data preprocessor."""
    model = copy.deepcopy(cfg.model[role])
    model["data_preprocessor"] = copy.deepcopy(cfg.model.data_preprocessor)
    model["pretrained"] = None
    return model


def network_config(cfg: Config, role: str) -> Config:
    """A config of one network alone with its data and evaluation: what mmseg's own tools and ``init_model`` take."""
    loader = copy.deepcopy(cfg.val_dataloader)
    loader["dataset"] = loader["dataset"].get("dataset", loader["dataset"])  # without our wrapper
    loader["dataset"]["data_root"] = cfg.data_root
    return Config(
        {
            "default_scope": "mmseg",
            "model": network_model(cfg, role),
            "test_pipeline": copy.deepcopy(loader["dataset"]["pipeline"]),
            "test_dataloader": loader,
            "test_cfg": {"type": "TestLoop"},
            "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        }
    )
