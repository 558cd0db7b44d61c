"""Small models of every class that transformers lists for image classification."""

from __future__ import annotations

from typing import Any

from torch import nn

# What makes each configuration small; transformers' own defaults for the rest. Images of 32 pixels unless told.
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
_STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
_VISION = {"vision_config": {**_VIT, "image_size": 32}}
TINY: dict[str, dict[str, Any]] = {
    "beit": _VIT,
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "num_groups": 4, "depths": [1, 1, 1, 1]},
    "clip": _VISION,
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "data2vec-vision": _VIT,
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": _VIT,
    "donut-swin": _STAGES,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "initializer_range": 0.5},
    "focalnet": {
        "embed_dim": 8,
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "hidden_sizes": [8, 16],
    },
    "hgnet_v2": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 24],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1, 1, 1, 1],
    },
    "hiera": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": [32, 32], "num_query_pool": 1},
    "ijepa": _VIT,
    "imagegpt": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 64},
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 1, 1],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "metaclip_2": _VISION,
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40]},
    "mobilevitv2": {"width_multiplier": 0.25},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 16,
        "d_model": 16,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "pvt": {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "sequence_reduction_ratios": [4, 2, 1, 1],
    },
    "pvt_v2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "siglip": _VISION,
    "siglip2": _VISION,
    "swiftformer": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "swin": _STAGES,
    "swinv2": _STAGES,
    "van": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "vit": _VIT,
    "vit_msn": _VIT,
}
SIZES = {"levit": 128}
SMALL = (
    "beit",
    "clip",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "donut-swin",
    "focalnet",
    "hiera",
    "ijepa",
    "metaclip_2",
    "siglip",
    "siglip2",
    "swin",
    "swinv2",
    "vit",
    "vit_msn",
)
UNFIT = ("shieldgemma2",)  # takes texts too, and cannot be made small


def classes() -> list[tuple[str, str]]:
    """(model type, class name) of all that transformers lists."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as names

    return [(kind, n) for kind, known in names.items() for n in ([known] if isinstance(known, str) else known)]


def build(kind: str, name: str, labels: int) -> tuple[nn.Module, int]:
    """A small model and the size of its images."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    size = 32 if kind in SMALL else SIZES.get(kind, 64)
    options = {"image_size": size, **TINY.get(kind, {})}
    config = CONFIG_MAPPING[kind](num_labels=labels, **options)
    return getattr(transformers, name)(config), size
