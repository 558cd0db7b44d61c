"""One network of a run as plain mmsegmentation takes it: weights, and a config that stands alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from core.files import write_atomically


def export_network(cfg: Config, network: nn.Module, role: str, metainfo: Mapping[str, Any], folder: Path) -> None:
    """Writes ``<role>.pth`` (for ``mmseg.apis.init_model``), ``<role>.safetensors`` and ``<role>_config.py``.

    Args: the config of the pair, or of this network; the network; its role; the data set's classes and palette.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
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
