"""Counted operations against figures worked out by hand, and that nothing of ADM goes uncounted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments
from test_methods import START, batch_of, distiller_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from classification.config import parse_command
from classification.experiment import build
from classification.flops import OF_INPUT, OF_OUTPUT, Flops, count, count_forward
from classification.methods.vanilla import Vanilla
from core.adm import ADMConfig

pytestmark = pytest.mark.usefixtures("quick")

# The tiny networks: 3 stages at 4 x 4 locations of 8 x 8 images, a linear layer of 5 classes.
LOCATIONS, CLASSES = 16, 5


def network_macs(channels: int) -> int:
    return LOCATIONS * channels * (3 * 9 + channels * 9 + channels) + channels * CLASSES


def similarity(channels: int) -> int:
    values = channels * LOCATIONS
    norms = 2 * (2 * values + LOCATIONS)  # squares and sums, clamped from below
    dot = values + values
    return norms + dot + 3 * LOCATIONS  # product of the norms, quotient, clamp


def head(channels: int) -> Flops:
    attention = 3 * LOCATIONS + 1  # 1 +- S, its mean plus epsilon, quotient
    return Flops(channels * CLASSES, attention + 2 * channels * LOCATIONS)  # weighted, averaged


SOFTMAX, WEIGHTS = 3 * CLASSES, 2  # alpha, and one over the number of pairs


def feature(channels: int, maps: int) -> int:
    return maps * 4 * channels * LOCATIONS  # difference; its difference to zero, square and sum


def test_networks_and_adm_by_hand() -> None:
    equal = {"teacher": 4, "student": 4}
    networks, added = count_forward(distiller_of(Vanilla(), channels=equal), batch_of())
    assert {role: n.macs for role, n in networks.items()} == dict.fromkeys(equal, network_macs(4)) and added is None
    networks, added = count_forward(distiller_of(Vanilla(), ADMConfig(gamma=0.0), channels=equal), batch_of())
    assert networks["teacher"].macs == network_macs(4) == 4308
    assert added == Flops(2 * head(4).macs, similarity(4) + 2 * (head(4).others + SOFTMAX + WEIGHTS))
    assert added.total == 2 * 40 + 852


@pytest.mark.parametrize(
    ("config", "macs", "others"),
    [
        (ADMConfig(beta=0.0, gamma=0.0), head(4).macs, head(4).others + SOFTMAX + WEIGHTS),
        (ADMConfig(alpha=0.0, gamma=0.0), head(4).macs, head(4).others + SOFTMAX + WEIGHTS),
        # kd: both heads under consensus; each z / tau; p_t, log p_t - log p_s, their product; sum, mean, tau^2;
        # which targets count: their number, its share of the batch, and that as a factor of each distribution
        (
            ADMConfig(beta=0.0, gamma=0.0, consensus="kd"),
            2 * head(4).macs,
            2 * (head(4).others + CLASSES + SOFTMAX) + 3 * CLASSES + CLASSES + 1 + 1 + 4 + WEIGHTS,
        ),
        # three pairs of maps weighed 1/8, 1/4, 1/2, their sum, gamma
        (ADMConfig(alpha=0.0, beta=0.0), 0, feature(4, maps=3) + 3 + 2 + 1),
    ],
    ids=["consensus", "divergence", "consensus_kd", "feature"],
)
def test_each_part_by_hand(config: ADMConfig, macs: int, others: int) -> None:
    distiller = distiller_of(Vanilla(), config, channels={"teacher": 4, "student": 4})
    assert count_forward(distiller, batch_of())[1] == Flops(macs, similarity(4) + others)


def test_phi_by_hand() -> None:
    config = ADMConfig(alpha=0.0, beta=0.0, gamma=0.0)
    distiller = distiller_of(Vanilla(), config, channels={"teacher": 6, "student": 4})
    # its own loss: both energies, their quarter and maximum; difference, square and sum; clamp, quotient
    own = 2 * 6 * LOCATIONS + 2 * 4 * LOCATIONS + 2 + 3 * 6 * LOCATIONS + 2
    assert count_forward(distiller, batch_of())[1] == Flops(4 * 6 * LOCATIONS, similarity(6) + own)


def test_counting_leaves_the_distiller_as_it_was() -> None:
    distiller = distiller_of(Vanilla(), ADMConfig()).train()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    batch = batch_of()
    first = count_forward(distiller, batch)
    assert distiller.training and all(torch.equal(before[k], v) for k, v in distiller.state_dict().items())
    assert count_forward(distiller, {**batch, "image": batch["image"][:1], "target": batch["target"][:1]}) == first
    views = {**batch, "image": torch.stack([batch["image"], batch["image"]], dim=1)}
    assert count_forward(distiller, views) == first


class Seen(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [{"teacher": 4, "student": 4}, {"teacher": 6, "student": 4}], ids=["equal", "phi"])
@pytest.mark.parametrize("noise_filter", ["none", "norm", "relu", "drop"])
@pytest.mark.parametrize("consensus", ["ce", "kd"])
def test_no_arithmetic_of_adm_goes_uncounted(consensus: Any, noise_filter: Any, channels: dict[str, int]) -> None:
    aten = torch.ops.aten
    counted = {*OF_INPUT, *OF_OUTPUT, aten.addmm, aten.convolution}
    moves = {
        aten.detach, aten.expand, aten.view, aten.t, aten.unsqueeze, aten.squeeze, aten.new_zeros, aten.promote_types,
        aten._to_copy,
    }  # fmt: skip
    picks = {aten.topk, aten.nll_loss_forward}  # comparisons, and one value of each row
    picks |= {aten.ne, aten.gt, aten.where, aten.full_like, aten.scalar_tensor}  # which targets count
    distiller = distiller_of(Vanilla(), ADMConfig(consensus=consensus, feature_filter=noise_filter), channels=channels)
    assert distiller.adm is not None
    batch = batch_of()
    with torch.no_grad():
        for larger in (None, "teacher", "student"):
            outputs = distiller.outputs(batch["image"])
            if larger is not None:
                output = outputs[larger]
                output.maps = [nn.functional.interpolate(m, scale_factor=2) for m in output.maps]
            with Seen() as seen:
                distiller.adm.losses(outputs, batch, START, list(outputs))
            names = {getattr(name, "__name__", str(name)) for name in seen.names - counted - moves - picks}
            assert not names
            assert larger is None or {aten.upsample_bilinear2d, aten._adaptive_avg_pool2d} <= seen.names


def test_attention_is_counted_on_every_device() -> None:
    attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    x = torch.randn(1, 5, 8)
    expected = 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8  # four projections; scores and their use
    assert count(lambda: attention(x, x, x, need_weights=False)).macs == expected
    attention, x = attention.to("meta"), x.to("meta")
    assert count(lambda: attention(x, x, x, need_weights=False)).macs == expected


def test_resnets_are_the_papers() -> None:
    """The paper's 3.67 G and 1.82 G FLOPs are multiply-accumulates."""
    from classification.networks import create_network

    images = torch.zeros(1, 3, 224, 224, device="meta")
    for name, expected in (("resnet34", 3.67e9), ("resnet18", 1.82e9)):
        network = create_network(name, 1000).to("meta").eval()
        assert count(lambda network=network: network(images)).macs == pytest.approx(expected, rel=0.005)


def test_a_dry_run_says_what_a_forward_costs(
    tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    code, printed, _ = command(arguments(tmp_path / "run", "--dry-run"))
    assert code == 0
    experiment = build(parse_command(arguments(tmp_path / "run")))
    networks, added = count_forward(experiment.distiller, next(iter(experiment.train_loader(None))))
    assert added is not None and networks.keys() == {"teacher", "student"}
    for network in networks.values():
        assert f"forward of an image: {network.macs / 1e6:,.2f} M multiply-accumulates (2 FLOPs each)" in printed
    share = 100 * added.total / (2 * networks["teacher"].macs + 2 * networks["student"].macs)
    assert f"ADM adds {added.total / 1e6:.3g} MFLOPs an image ({share:.3g} % of the networks together)" in printed
    assert f"{added.macs / 1e6:.3g} M multiply-accumulates (heads, phi)" in printed
    code, printed, _ = command(arguments(tmp_path / "run", "--dry-run", method="dml"))
    assert code == 0 and "multiply-accumulates" in printed and "ADM adds" not in printed
