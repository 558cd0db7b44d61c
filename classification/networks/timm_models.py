"""Importing this module makes timm know the CIFAR networks: ``timm.create_model("cifar_resnet20", num_classes=10)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import register_model
from torch import nn

from classification.networks import CIFAR_NETWORKS, create_network


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(
        num_classes: int = 100,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        """timm's own keywords say where its pretrained weights lie: there are none, so they are dropped."""
        return create_network(name, num_classes, pretrained=pretrained, **options)

    create.__name__ = name  # the name that timm registers
    return create


for _name in CIFAR_NETWORKS:
    register_model(_entrypoint(_name))
