"""Asymmetric Decision-Making (ADM) for knowledge distillation. Importing it takes in torch and nothing heavier."""

from core.adapter import Adapter
from core.adm import (
    ADMLoss,
    consensus_attention,
    consensus_kd_loss,
    consensus_loss,
    divergence_attention,
    divergence_kd_loss,
    divergence_loss,
    phi_loss,
    spatial_similarity,
)
from core.distillation import feature_loss, kd_loss, mutual_loss
from core.errors import InputError, TrainingError
from core.network import Network, Split, as_network, check_network, stage_maps

__all__ = [
    "ADMLoss",
    "Adapter",
    "InputError",
    "Network",
    "Split",
    "TrainingError",
    "as_network",
    "check_network",
    "consensus_attention",
    "consensus_kd_loss",
    "consensus_loss",
    "divergence_attention",
    "divergence_kd_loss",
    "divergence_loss",
    "feature_loss",
    "kd_loss",
    "mutual_loss",
    "phi_loss",
    "spatial_similarity",
    "stage_maps",
]
