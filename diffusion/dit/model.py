"""The diffusion transformer with adaLN-Zero: Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023.

The weights have the names of the published files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.errors import InputError, unknown
from core.ranges import Layers, Size, check_ranges

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, blocks and heads (Table 1 of DiT)."""


@dataclass(frozen=True)
class DiTConfig:
    """A published size, or with ``size: null`` one of its own.

    Args:
        size: S, B, L or XL with the patch size, as "S/2".
        width: channels of a token, a multiple of 4 and of ``heads``.
        depth: blocks.
        heads: of the attention.
        patch: pixels along the side of a token.
    """

    size: str | None = "S/2"
    width: Size | None = None
    depth: Layers | None = None
    heads: Size | None = None
    patch: Size | None = None

    def __post_init__(self) -> None:
        check_ranges("a DiT's ", self)
        width, depth, heads, _ = self.resolved()
        if (billions := 18e-9 * depth * width**2) > 10:
            raise InputError(
                f"a DiT of width {width} and depth {depth} has {billions:,.0f} billion parameters: at most 10"
            )
        if width % 4 or width % heads:
            raise InputError(f"a DiT's width must be a multiple of 4 and of its {heads} heads: {width}")

    def resolved(self) -> tuple[int, int, int, int]:
        """Width, depth, heads and patch. Raises: InputError where they are unknown, or given twice or in part."""
        own = (self.width, self.depth, self.heads, self.patch)
        if self.size is None:
            if None in own:
                raise InputError("a DiT without size needs all of width, depth, heads and patch")
            return own  # type: ignore[return-value]
        if own != (None,) * 4:
            raise InputError(f"a DiT of size {self.size!r} has its width, depth, heads and patch: set size to null")
        sizes = {f"{name}/{patch}": (*numbers, patch) for name, numbers in SIZES.items() for patch in (2, 4, 8)}
        if self.size not in sizes:
            raise unknown("DiT size", self.size, sizes)
        return sizes[self.size]


def sincos_table(width: int, side: int) -> Tensor:
    """Fixed positions of a ``side`` x ``side`` grid, row-major, ``[1, side^2, width]``.

    The first half of the channels tells the column, the second the row, each as [sin, cos] at frequencies
    10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1)[None].float()


def time_features(t: Tensor, width: int = 256) -> Tensor:
    """[cos, sin] of ``t`` ``[B]`` at frequencies 10000^(-i / (width / 2)), float32 ``[B, width]``."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """All ``[B, N or 1, D]``."""
    return x * (1 + scale) + shift


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulation(width: int, count: int) -> nn.Sequential:
    """``c`` ``[B, D]`` -> ``[B, count * D]``."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


class Block(nn.Module):
    """timm's attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        from timm.models.vision_transformer import Attention, Mlp

        super().__init__()
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, "tanh"))  # type: ignore[arg-type]
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``, condition ``[B, D]`` -> tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts the noise of ``z`` at time ``t`` and, with ``learn_sigma``, in as many channels more its variance.

    It drops no labels itself: whoever trains it puts ``classes``, the id that stands for no label, in their place.

    Args:
        channels, input_size: of the latents (or images) ``[B, channels, input_size, input_size]``.
        classes: labels are 0 .. classes - 1.
    Attributes: ``gradient_checkpointing``: recompute each block in the backward pass instead of keeping its insides;
        ``null_label``: whether it has learned the id that stands for no label, without which nothing can be guided.
    Raises: InputError where the input cannot be cut into patches.
    """

    def __init__(
        self, config: DiTConfig, channels: int, input_size: int, classes: int, learn_sigma: bool = True
    ) -> None:
        super().__init__()
        width, depth, heads, patch = config.resolved()
        if input_size % patch:
            raise InputError(f"an input of {input_size} x {input_size} cannot be cut into patches of {patch} x {patch}")
        self.config, self.channels, self.input_size, self.classes = config, channels, input_size, classes
        self.learn_sigma, self.patch, self.side = learn_sigma, patch, input_size // patch
        self.width, self.heads = width, heads
        self.out_channels = 2 * channels if learn_sigma else channels
        self.gradient_checkpointing, self.null_label = False, True
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        hidden, last, table = nn.Linear(256, width), nn.Linear(width, width), nn.Embedding(classes + 1, width)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(hidden, nn.SiLU(), last)})
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.pos_embed = nn.Parameter(sincos_table(width, self.side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "norm_final": layer_norm(width),
                "linear": nn.Linear(width, patch * patch * self.out_channels),
                "adaLN_modulation": modulation(width, 2),
            }
        )
        self.apply(_xavier)
        for layer in (hidden, last, table):
            nn.init.normal_(layer.weight, std=0.02)
        for name, weight in self.named_parameters():
            if "adaLN" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(weight)  # each block is the identity and the output 0

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``z`` ``[B, C, H, W]``, ``t`` ``[B]``, labels ``y`` int64 ``[B]`` -> ``[B, 2C or C, H, W]``."""
        return self.forward_linear(self.final_norm(*self.forward_map(z, t, y)))

    def forward_map(self, z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens after the last block as a map ``[B, D, h, w]``, and the condition ``[B, D]``.

        Raises: ValueError for a ``z`` of another shape than the network's.
        """
        if z.shape[1:] != (self.channels, self.input_size, self.input_size):
            raise ValueError(
                f"z is {tuple(z.shape)}, the network takes [B, {self.channels}, {self.input_size} squared]"
            )
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.pos_embed  # [B, h w, D], row by row
        features = time_features(t).to(self.pos_embed.dtype)
        c = self.t_embedder["mlp"](features) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c)
        return self._to_map(x), c

    def forward_linear(self, map: Tensor) -> Tensor:
        """What ``final_norm`` gives -> ``[B, 2C or C, H, W]``."""
        x = self.final_layer["linear"](_to_tokens(map))
        x = x.unflatten(1, (self.side, self.side)).unflatten(3, (self.patch, self.patch, -1))  # [B, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, self.input_size, self.input_size)

    def final_norm(self, map: Tensor, c: Tensor) -> Tensor:
        """The map ``[B, D, h, w]`` after the last norm and its modulation: what the last linear map reads."""
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        return self._to_map(modulate(self.final_layer["norm_final"](_to_tokens(map)), shift, scale))

    def _to_map(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))


def _to_tokens(map: Tensor) -> Tensor:
    return map.flatten(2).transpose(1, 2)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # the patch convolution as the linear map that it is
        if module.bias is not None:
            nn.init.zeros_(module.bias)
