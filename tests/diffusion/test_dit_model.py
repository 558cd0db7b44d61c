"""The diffusion transformer: its sizes and start, and each rearrangement of tokens and channels against a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_dit import SMALL, dit
from torch import Tensor
from torch.nn import functional as F

from core.errors import InputError
from diffusion.dit.model import DiT, DiTConfig, sincos_table, time_features


def an_input(count: int = 3, channels: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(count, channels, size, size, dtype=dtype, generator=generator)
    return z, torch.tensor([0, 400, 999])[:count], torch.tensor([0, 7, 10])[:count]


# --- sizes and start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parameters", "positions"), [("S/2", 32_963_360, 98_304), ("B/2", 130_512_416, 196_608)]
)
def test_the_published_sizes_have_their_number_of_parameters(size: str, parameters: int, positions: int) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(size), 4, 32, 1000)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert sum(weight.numel() for weight in network.parameters() if not weight.requires_grad) == positions


def test_all_published_sizes_build_and_the_own_one_is_the_same_network() -> None:
    with torch.device("meta"):
        for size, numbers in {"L/4": (1024, 24, 16, 4), "XL/2": (1152, 28, 16, 2), "B/8": (768, 12, 12, 8)}.items():
            own = DiT(DiTConfig(None, *numbers), 4, 32, 1000)
            published = DiT(DiTConfig(size), 4, 32, 1000)
            shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (own, published)]
            assert shapes[0] == shapes[1] and (own.heads, own.patch) == numbers[2:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "S/3"}, "did you mean 'S/"),
        ({"size": "S"}, "did you mean"),
        ({"size": None, "width": 16, "depth": 2, "heads": 4}, "needs all of width, depth, heads and patch"),
        ({"size": "S/2", "width": 16}, "set size to null"),
        ({"size": None, "width": 16, "depth": 0, "heads": 4, "patch": 2}, r"depth must be in \[1, 1024\]: 0"),
        ({"size": None, "width": 18, "depth": 1, "heads": 3, "patch": 2}, "multiple of 4 and of its 3 heads: 18"),
        ({"size": None, "width": 16, "depth": 1, "heads": 3, "patch": 2}, "multiple of 4 and of its 3 heads: 16"),
    ],
)
def test_a_wrong_size_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DiTConfig(**options)


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="9 x 9 cannot be cut into patches of 2 x 2"):
        DiT(SMALL, 3, 9, 10)
    z, t, y = an_input(size=16)
    with pytest.raises(ValueError, match=r"\[B, 3, 8 squared\]"):
        dit()(z, t, y)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_fresh_network_puts_out_exactly_0(learn_sigma: bool) -> None:
    torch.manual_seed(0)
    network = DiT(SMALL, 3, 8, 10, learn_sigma=learn_sigma)
    output = network(*an_input())
    assert output.shape == (3, 6 if learn_sigma else 3, 8, 8)
    assert output.count_nonzero() == 0
    output.sum().backward()  # and yet it can learn
    gradient = network.final_layer.linear.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_the_initial_weights_are_those_of_dit() -> None:
    torch.manual_seed(0)
    network = DiT(DiTConfig(size=None, width=64, depth=2, heads=4, patch=4), 3, 8, 200)
    state = network.state_dict()
    for name, weight in state.items():
        if name == "pos_embed":
            continue
        if "adaLN" in name or name.startswith("final_layer") or name.endswith("bias"):
            assert weight.count_nonzero() == 0, name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
        else:  # Xavier uniform; of the patch convolution the fan is that of the linear map it is
            bound = math.sqrt(6.0 / (weight.flatten(1).shape[1] + weight.shape[0]))
            assert 0.97 * bound < weight.abs().max().item() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3.0), rel=0.1), name


def test_the_positions_do_not_learn() -> None:
    network = dit()
    network(*an_input()).sum().backward()
    without = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert without == ["pos_embed"]


# --- against loops ----------------------------------------------------------------------------------------------------


def test_the_position_table_is_its_formula() -> None:
    width, side = 16, 3
    table = sincos_table(width, side)
    for row in range(side):
        for column in range(side):
            wanted = []
            for place in (column, row):
                angles = [place * 10000.0 ** (-i / (width / 4)) for i in range(width // 4)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[0, row * side + column].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_time_features_are_their_formula() -> None:
    times = [0, 1, 250, 999]
    for t, row in zip(times, time_features(torch.tensor(times)).tolist(), strict=True):
        angles = [t * 10000.0 ** (-i / 128) for i in range(128)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=2e-4)


def test_an_image_becomes_tokens_and_a_map_row_by_row() -> None:
    """With blocks that are the identity the map is the patch convolution: place by place, in a loop."""
    torch.manual_seed(1)
    network = DiT(SMALL, 3, 8, 10).double()
    z, t, y = an_input(dtype=torch.float64)
    map_, _ = network.forward_map(z, t, y)
    assert map_.shape == (3, 16, 4, 4)
    projection: Any = network.x_embedder["proj"]
    for row in range(4):
        for column in range(4):
            patch = z[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            token = patch @ projection.weight.flatten(1).T + projection.bias + network.pos_embed[0, 4 * row + column]
            torch.testing.assert_close(map_[:, :, row, column], token)


def test_the_map_holds_the_tokens_after_the_last_block() -> None:
    network = dit()
    seen: list[Tensor] = []
    network.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    map_, c = network.forward_map(*an_input())
    assert c.shape == (3, 16)
    for row in range(4):
        for column in range(4):
            assert torch.equal(map_[:, :, row, column], seen[0][:, 4 * row + column])


def test_the_head_puts_each_token_where_its_patch_was() -> None:
    network, generator = dit().double(), torch.Generator().manual_seed(2)
    map_ = torch.randn(2, 16, 4, 4, dtype=torch.float64, generator=generator)
    c = torch.randn(2, 16, dtype=torch.float64, generator=generator)
    output, final = network.forward_linear(network.final_norm(map_, c)), network.final_layer
    modulation: Any = final.adaLN_modulation[1]
    numbers = F.silu(c) @ modulation.weight.T + modulation.bias
    shift, scale = numbers[:, :16], numbers[:, 16:]
    for row in range(4):
        for column in range(4):
            x = map_[:, :, row, column]
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
            x = x * (1 + scale) + shift
            torch.testing.assert_close(network.final_norm(map_, c)[:, :, row, column], x)
            values = x @ final.linear.weight.T + final.linear.bias  # [2, 2 * 2 * 6]
            for p in range(2):
                for q in range(2):
                    for channel in range(6):
                        pixel = output[:, channel, 2 * row + p, 2 * column + q]
                        torch.testing.assert_close(pixel, values[:, (2 * p + q) * 6 + channel])


def test_forward_is_the_head_of_the_map() -> None:
    network, (z, t, y) = dit(), an_input()
    map_, c = network.forward_map(z, t, y)
    assert torch.equal(network(z, t, y), network.forward_linear(network.final_norm(map_, c)))


def block_by_loop(network: DiT, index: int, x: Tensor, c: Tensor) -> Tensor:
    """One image: tokens ``[N, D]``, condition ``[D]``; attention head by head and query by query."""
    weights = {
        k.removeprefix(f"blocks.{index}."): v for k, v in network.state_dict().items() if f"blocks.{index}." in k
    }

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        return (value - value.mean(1, keepdim=True)) / (value.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    width, per_head = x.shape[1], x.shape[1] // network.heads
    six = linear("adaLN_modulation.1", c * torch.sigmoid(c)).view(6, width)
    qkv = linear("attn.qkv", norm(x) * (1 + six[1]) + six[0])
    mixed = torch.zeros_like(x)
    for head in range(network.heads):
        q, k, v = (qkv[:, part * width + head * per_head :][:, :per_head] for part in range(3))
        for i in range(len(x)):
            attention = torch.softmax((k @ q[i]) / math.sqrt(per_head), 0)
            mixed[i, head * per_head : (head + 1) * per_head] = attention @ v
    x = x + six[2] * linear("attn.proj", mixed)
    hidden = linear("mlp.fc1", norm(x) * (1 + six[4]) + six[3])
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return x + six[5] * linear("mlp.fc2", hidden)


@torch.no_grad()
def test_the_blocks_and_the_condition_are_their_formulas() -> None:
    network, (z, t, y) = dit().double(), an_input(dtype=torch.float64)
    map_, condition = network.forward_map(z, t, y)
    state, projection = network.state_dict(), network.x_embedder["proj"]
    for i in range(3):
        hidden = time_features(t)[i].double() @ state["t_embedder.mlp.0.weight"].T + state["t_embedder.mlp.0.bias"]
        c = hidden * torch.sigmoid(hidden) @ state["t_embedder.mlp.2.weight"].T + state["t_embedder.mlp.2.bias"]
        c = c + state["y_embedder.embedding_table.weight"][y[i]]
        torch.testing.assert_close(condition[i], c)
        x = projection(z[i : i + 1])[0].flatten(1).T + network.pos_embed[0]
        for index in range(2):
            x = block_by_loop(network, index, x, c)
        torch.testing.assert_close(map_[i].flatten(1).T, x)


# --- how it computes --------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_neither_output_nor_gradients() -> None:
    outputs, gradients, calls = [], [], []
    for on in (False, True):
        network = dit()
        seen: list[int] = []
        network.gradient_checkpointing = on
        network.blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        output = network.train()(*an_input())
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append([w.grad for w in network.parameters() if w.grad is not None])
        calls.append(len(seen))
    assert calls == [1, 2]  # the second time in the backward pass
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_labels_are_never_dropped_inside() -> None:
    network, (z, t, y) = dit().train(), an_input()
    outputs = [network(z, t, y) for _ in range(20)]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert not torch.equal(outputs[0], network(z, t, torch.full_like(y, 10)))


def test_under_autocast_it_is_close_to_float32() -> None:
    network, (z, t, y) = dit(), an_input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        map_, _ = network.forward_map(z, t, y)
        low = network(z, t, y)
    assert map_.dtype == torch.float32  # what the blocks add up stays in full precision
    full = network(z, t, y)
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max()
