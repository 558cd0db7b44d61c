"""Importing this module makes timm know the CIFAR networks: ``timm.create_model("cifar_resnet20", num_classes=10)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model

from classification.networks import CIFAR_NETWORKS, CifarNetwork
from core.errors import InputError


def _entrypoint(name: str) -> Callable[..., CifarNetwork]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> CifarNetwork:
        """timm's own keywords say where its pretrained weights lie: there are none, so they are dropped."""
        if pretrained:
            raise InputError(f"{name} has no downloadable weights: leave pretrained out and give a weight file")
        return CIFAR_NETWORKS[name](**options)

    create.__name__ = name  # the name that timm registers
    return create


for _name in CIFAR_NETWORKS:
    register_model(_entrypoint(_name))
