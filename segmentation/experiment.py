"""A trained model with its data, from a run folder or from a config and a file."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from core.errors import InputError
from core.training.checkpoint import find_checkpoint
from segmentation.config import PAIR, build, check_images, load_config, read_config, ready_loader
from segmentation.distiller import load_weights
from segmentation.export import network_model


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
        folder = Path(run)
        if not (folder / "config.py").is_file():
            raise InputError(f"{run} is no run folder of segmentation: it has no config.py")
        cfg, file = load_config(folder / "config.py"), find_checkpoint(folder, checkpoint or "last")
    else:
        cfg, file = read_config(config or ""), Path(checkpoint or "")
        if cfg.model.get("type") == PAIR:
            cfg = load_config(config or "")
    pair = cfg.model.get("type") == PAIR
    if not pair and role is None:
        role = "student"
    init_default_scope("mmseg")
    if role is not None:
        settings = network_model(cfg, role) if pair else copy.deepcopy(cfg.model)
        settings.pretrained = None
        model = build(settings)
        load_weights(model, file, role)
        networks = {role: model}
    else:
        model = build({**cfg.model, "teacher_weights": cfg.model.get("teacher_weights")})
        load_weights(model, file)
        networks = model.networks
    source = cfg.get("val_dataloader") or cfg.get("test_dataloader")
    if source is None:
        raise InputError(f"{config} has neither val_dataloader nor test_dataloader: what is to be evaluated?")
    loader = ready_loader(source, root or cfg.get("data_root"))
    check_images(loader, next(iter(networks.values())).decode_head.num_classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = revert_sync_batchnorm(model).to(device).eval()
    return Restored(cfg, file, model, networks, Runner.build_dataloader(loader), device)
