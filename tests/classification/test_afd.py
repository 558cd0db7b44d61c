"""AFD: the adversarial losses against a written-out float64 reference, who is trained by which, and Adam's own step."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_methods import START, TinyNet, batch_of, distiller_around, images
from torch import Tensor, nn

from classification.config import TrainConfig
from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig, build_networks
from classification.experiment import load_checkpoint
from classification.methods import METHODS, Method
from classification.methods.afd import AFD, AFDOptions, discriminator, discriminator_loss, generator_loss
from classification.methods.dml import DML
from core.adm import ADMConfig
from core.errors import InputError
from core.parts import as_network
from core.training.checkpoint import save_checkpoint
from core.training.distiller import Losses, Progress
from core.training.fit import FitConfig

FAST = AFDOptions(lr=1e-2)  # Adam's steps as large as the SGD's, so that a wrong one shows
SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.01)
MEMBERS = {"teacher": (6, 2), "student": (4, 1)}  # channels and stride: maps of 4 x 4 and 8 x 8


class Net(TinyNet):
    """TinyNet with a choice of its map's size."""

    def __init__(self, channels: int, stride: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(channels, seed, dtype)
        self.stages[0].stride = (stride, stride)


def distiller_of(
    method: Method,
    adm: ADMConfig | None = None,
    members: Mapping[str, tuple[int, int]] = MEMBERS,
    dtype: torch.dtype = torch.float64,
) -> ClassificationDistiller:
    networks = {role: Net(*member, seed, dtype) for seed, (role, member) in enumerate(members.items())}
    return distiller_around(networks, method, adm, SGD, None, dtype)


def parts_of(batch: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    size = len(batch["target"]) // count
    rows = [slice(k * size, (k + 1) * size) for k in range(count)]
    return [{n: v[r] if isinstance(v, Tensor) else v for n, v in batch.items()} for r in rows]


def go_back(distiller: ClassificationDistiller, batch: Mapping[str, Any], share: float = 1.0) -> Losses:
    losses = {
        role: {term: value * share for term, value in terms.items()}
        for role, terms in distiller(batch, START)[0].items()
    }
    total = sum(value for terms in losses.values() for value in terms.values())
    distiller.backward(losses, total, SimpleNamespace(scaler=None))  # type: ignore[arg-type]
    return losses


def step(
    distiller: ClassificationDistiller,
    optim: torch.optim.Optimizer,
    batch: dict[str, Any],
    rate: float = 1.0,
    parts: int = 1,
) -> None:
    """What fit does in a step."""
    progress = Progress(0, 0.0, 10, 1.0, rate)
    for group in optim.param_groups:
        group["lr"] = SGD.lr * rate
    distiller.before_step(batch, progress)
    for part in parts_of(batch, parts):
        go_back(distiller, part, 1 / parts)
    distiller.before_update()
    optim.step()
    optim.zero_grad()
    distiller.after_step(batch, progress)


def ready(distiller: ClassificationDistiller) -> tuple[ClassificationDistiller, torch.optim.Optimizer]:
    return distiller.train(), distiller.optimizer.make(distiller.parameter_groups())


def weights(distiller: ClassificationDistiller) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in distiller.named_parameters()}


# --- the losses -------------------------------------------------------------------------------------------------------


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """BatchNorm by the statistics of the batch."""
    columns = []
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.mean()
        columns.append((values - mean) / ((values - mean) ** 2).mean().add(1e-5).sqrt() * weight[c] + bias[c])
    return torch.stack(columns, dim=1)


def judged(d: Any, x: Tensor) -> Tensor:
    """D's probabilities ``[B, 1, H, W]``, location by location."""
    b, c, h, w = x.shape
    padded = x.new_zeros(b, c, h + 2, w + 2)
    padded[:, :, 1:-1, 1:-1] = x
    kernel = d[0].weight  # [C, C, 3, 3]
    hidden = torch.stack(
        [
            torch.stack(
                [torch.einsum("bcij,ocij->bo", padded[:, :, i : i + 3, j : j + 3], kernel) for j in range(w)], 2
            )
            for i in range(h)
        ],
        dim=2,
    )  # [B, C, H, W]
    hidden = normalised(hidden, d[1].weight, d[1].bias)
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    score = (hidden * d[3].weight[0]).sum(dim=1, keepdim=True) + d[3].bias
    return 1 / (1 + torch.exp(-score))


def transferred(t: Any, x: Tensor, side: int) -> Tensor:
    """T's map ``[B, C, side, side]``."""
    if isinstance(t, nn.Identity):
        return x
    b, c, h, w = x.shape
    x = x.reshape(b, c, side, h // side, side, w // side).mean(dim=(3, 5))
    conv, bn, _ = t.layers
    x = torch.einsum("bchw,oc->bohw", x, conv.weight[:, :, 0, 0])
    return normalised(x, bn.weight, bn.bias).clamp_min(0)


def squared(probabilities: Tensor, wanted: float) -> Tensor:
    values = [(p - wanted) ** 2 for p in probabilities.flatten()]
    return torch.stack(values).sum() / len(values)


def game(
    distiller: ClassificationDistiller, views: Mapping[str, Tensor], role: str, peer: str, side: int
) -> tuple[Tensor, Tensor]:
    """(L_G, L_D) of one network, each from forwards of its own."""
    transfers: Any = distiller.method.transfers
    networks: Any = distiller.networks
    d: Any = distiller.method.discriminators[role]  # type: ignore[index]

    def map_of(role: str) -> Tensor:
        return transferred(transfers[role], networks[role].forward_features(views[role]), side)

    loss_g = squared(judged(d, map_of(role)), 1.0)
    with torch.no_grad():
        real, fake = map_of(peer), map_of(role)
    return loss_g, squared(judged(d, real), 1.0) + squared(judged(d, fake), 0.0)


def logit_loss(logits: Mapping[str, Tensor], role: str, target: Tensor, options: AFDOptions) -> tuple[Tensor, Tensor]:
    """(cross-entropy, imitation) of one network, image by image."""
    own, others, n = logits[role], [z.detach() for r, z in logits.items() if r != role], len(target)
    ce = torch.stack([-own[i].log_softmax(0)[target[i]] for i in range(n)]).mean()
    kd = own.new_zeros(())
    for other in others:
        for i in range(n):
            p, q = (other[i] / options.tau).softmax(0), (own[i] / options.tau).softmax(0)
            kd = kd + (p * (p.log() - q.log())).sum() * options.tau**2 / n / len(others)
    return ce, options.weight * kd


SAME = {"teacher": (4, 2), "student": (4, 2)}
SIZES = {"teacher": (4, 2), "student": (4, 1)}
THREE = {"teacher": (6, 2), "teacher_2": (5, 1), "student": (4, 2)}


@pytest.mark.parametrize(
    ("members", "options"),
    [
        (MEMBERS, AFDOptions()),
        (SAME, AFDOptions(tau=3.0, weight=0.7, adversarial=0.3)),
        (SIZES, AFDOptions()),
        (THREE, AFDOptions(tau=2.0)),
    ],
    ids=["unequal", "equal", "sizes", "three"],
)
def test_losses_are_those_written_out(members: dict[str, tuple[int, int]], options: AFDOptions) -> None:
    distiller = distiller_of(AFD(options), members=members).train()
    batch, roles = batch_of(4), list(members)
    losses, _ = distiller(batch, START)
    views = distiller.views(batch["image"])
    logits = {role: distiller.networks[role](views[role]) for role in roles}
    for k, role in enumerate(roles):
        assert list(losses[role]) == ["ce", "kd", "generator", "discriminator"]
        wanted_g, wanted_d = game(distiller, views, role, roles[k - 1], side=4)
        ce, kd = logit_loss(logits, role, batch["target"], options)
        wanted = {
            "ce": ce,
            "kd": kd,
            "generator": options.adversarial * wanted_g,
            "discriminator": options.adversarial * wanted_d,
        }
        for term, value in wanted.items():
            torch.testing.assert_close(losses[role][term], value, rtol=1e-10, atol=1e-12, msg=f"{role} {term}")


def test_an_undecided_discriminator_costs_a_quarter_and_a_half() -> None:
    half, one = torch.full((2, 1, 3, 3), 0.5), torch.ones(2, 1, 3, 3)
    assert generator_loss(half) == 0.25 and discriminator_loss(half, half) == 0.5
    assert generator_loss(one) == 0 and discriminator_loss(one, 0 * one) == 0
    assert generator_loss(0 * one) == 1 and discriminator_loss(0 * one, one) == 2
    # A mean over locations, not over images of sums.
    mixed = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert generator_loss(mixed) == 0.75 and discriminator_loss(mixed, mixed) == 0.75 + 0.25


def test_gradients_of_the_game_are_those_of_finite_differences() -> None:
    d = discriminator(3).double()
    maps = [torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x: generator_loss(d(x)), maps[:1])
    assert torch.autograd.gradcheck(lambda x, y: discriminator_loss(d(x), d(y)), maps)


def test_a_discriminator_gives_a_probability_for_each_location() -> None:
    d = discriminator(7)
    for scale in (0.0, 1.0, 1e4):
        probability = d(torch.randn(5, 7, 4, 3) * scale)
        assert probability.shape == (5, 1, 4, 3)
        assert probability.min() > 0 and probability.max() < 1


@pytest.mark.parametrize(
    ("members", "widths"), [(SAME, None), (SIZES, (4, 4)), (MEMBERS, (6, 4)), (THREE, (6, 5, 4))], ids=str
)
def test_maps_of_one_shape_alone_need_no_transfer_layer(
    members: dict[str, tuple[int, int]], widths: tuple[int, ...] | None
) -> None:
    method: Any = AFD()
    distiller = distiller_of(method, members=members)
    views = distiller.views(images(2))
    made = [method.transfers[r](n.forward_features(views[r])).shape for r, n in distiller.networks.items()]  # type: ignore[operator]
    assert set(made) == {(2, max(channels for channels, _ in members.values()), 4, 4)}
    if widths is None:
        assert not list(method.transfers.parameters())
    else:
        kernels = [t.layers[0].weight.shape for t in method.transfers.values()]
        assert kernels == [(max(widths), width, 1, 1) for width in widths]


# --- who is trained by what -------------------------------------------------------------------------------------------


def owners(distiller: ClassificationDistiller, gradients: Mapping[nn.Parameter, Tensor | None]) -> set[str]:
    """The parts of the distiller in which a gradient is not zero, as "teacher.stages", "T.student", "D.teacher"."""
    names = {p: name for name, p in distiller.named_parameters()}
    found = set()
    for parameter, gradient in gradients.items():
        if gradient is not None and gradient.abs().max() > 0:
            part = names[parameter].split(".")
            if part[0] == "networks":
                found.add(f"{part[1]}.{part[2]}")
            elif part[0] == "adm":
                found.add({"adm": "phi", "stage_adapters": "stage phi"}[part[1]])
            else:
                found.add(f"{part[1][0].upper()}.{part[2]}")
    return found


def trained_by(distiller: ClassificationDistiller, role: str, term: str) -> tuple[set[str], set[str]]:
    """Who gets a gradient for the SGD and who for Adam where all other losses are zero."""
    distiller.zero_grad()
    distiller.method._gradients = []  # type: ignore[assignment]
    losses, _ = distiller(batch_of(), START)
    losses = {r: {t: v if (r, t) == (role, term) else v * 0 for t, v in terms.items()} for r, terms in losses.items()}
    total = sum(value for terms in losses.values() for value in terms.values())
    distiller.backward(losses, total, SimpleNamespace(scaler=None))  # type: ignore[arg-type]
    method: Any = distiller.method
    adams = [p for group in method.adam.param_groups for p in group["params"]]
    assert all(p.grad is None for p in method.parameters())  # so neither clipping nor the SGD sees D and T
    return (
        owners(distiller, {p: p.grad for p in distiller.parameters()}),
        owners(distiller, dict(zip(adams, method._gradients, strict=True))),
    )


@pytest.mark.parametrize("members", [MEMBERS, THREE], ids=["two", "three"])
def test_each_term_trains_its_own_and_nothing_else(members: dict[str, tuple[int, int]]) -> None:
    distiller = distiller_of(AFD(), members=members).train()
    for role in members:
        whole = {f"{role}.stages", f"{role}.fc"}
        assert trained_by(distiller, role, "ce") == (whole, set())
        assert trained_by(distiller, role, "kd") == (whole, set())
        assert trained_by(distiller, role, "generator") == (set(), {f"{role}.stages", f"T.{role}"})
        assert trained_by(distiller, role, "discriminator") == (set(), {f"D.{role}"})
        loss_d = distiller(batch_of(), START)[0][role]["discriminator"]
        found = torch.autograd.grad(loss_d, list(distiller.parameters()), allow_unused=True)
        reached = dict(zip(distiller.parameters(), found, strict=True))
        assert owners(distiller, reached) == {f"D.{role}"}  # its maps are detached


def test_with_adm_its_terms_and_adapters_belong_to_the_sgd() -> None:
    distiller = distiller_of(AFD(), ADMConfig(0.3, 0.7, 0.5)).train()
    assert trained_by(distiller, "student", "consensus")[0] >= {"student.stages"}
    assert trained_by(distiller, "student", "feature") == ({"student.stages", "stage phi"}, set())
    assert trained_by(distiller, "student", "phi") == ({"phi"}, set())
    assert trained_by(distiller, "teacher", "divergence") == ({"teacher.stages", "teacher.fc"}, set())
    assert trained_by(distiller, "student", "generator") == (set(), {"student.stages", "T.student"})
    adapters = set(distiller.adm.parameters())  # type: ignore[union-attr]
    listed = {p for group in distiller.parameter_groups() for p in group["params"]}
    assert adapters and listed == adapters | set(distiller.networks.parameters())


def test_the_networks_gradient_is_dmls_and_the_games_stays_out_of_it() -> None:
    for adm in (None, ADMConfig()):
        pair = [distiller_of(method, adm).train() for method in (AFD(), DML())]
        for distiller in pair:
            go_back(distiller, batch_of())
        afd, dml = pair
        wanted = {name: p.grad for name, p in dml.named_parameters()}
        for name, parameter in afd.named_parameters():
            if not name.startswith("method."):
                assert parameter.grad is not None and torch.allclose(parameter.grad, wanted[name], rtol=1e-12), name


def test_a_classifier_is_whatever_the_map_does_not_depend_on() -> None:
    names = {"teacher": "cifar_wrn_10_2", "student": "cifar_resnet8"}
    networks = build_networks({role: NetworkConfig(name) for role, name in names.items()}, 10, 0)
    sample = torch.randn(2, 3, 16, 16)
    networks = {role: as_network(network, sample) for role, network in networks.items()}
    networks["student"].train()
    networks["teacher"].eval()
    next(networks["student"].parameters()).requires_grad = False
    before = {role: copy.deepcopy(network.state_dict()) for role, network in networks.items()}
    state = torch.get_rng_state()
    method = AFD()
    assert method.prepare(networks, dict.fromkeys(networks, sample)) is networks
    assert torch.equal(state, torch.get_rng_state())
    for role, network in networks.items():
        assert all(torch.equal(v, before[role][k]) for k, v in network.state_dict().items()), role
        assert {m.training for m in network.modules()} == {role == "student"}
        assert all(p.grad is None for p in network.parameters())
    listed = {id(p) for p in method.extractors}
    left_out = [f"{r}.{k}" for r, n in networks.items() for k, p in n.named_parameters() if id(p) not in listed]
    frozen = f"student.{next(networks['student'].named_parameters())[0]}"
    classifiers = ["teacher.fc.weight", "teacher.fc.bias", "student.fc.weight", "student.fc.bias"]
    assert set(classifiers) <= set(left_out)
    for name in set(left_out) - {frozen, *classifiers}:  # the map is taken before the WRN's last BatchNorm
        assert name.startswith("teacher."), name
        network, (c, h, w) = networks["teacher"], (128, 4, 4)
        x = torch.randn(2, c, h, w)
        logits = network.forward_head(x)  # type: ignore[operator]
        parameter = dict(network.named_parameters())[name.removeprefix("teacher.")]
        assert torch.autograd.grad(logits.sum(), parameter)[0].abs().max() > 0, name


def test_adms_adapters_start_as_under_dml() -> None:
    one, other = (distiller_of(method, ADMConfig()) for method in (AFD(), DML()))
    assert one.adm is not None and other.adm is not None
    pairs = list(zip(one.adm.parameters(), other.adm.parameters(), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


def test_a_step_runs_each_network_once_and_evaluation_no_discriminator() -> None:
    distiller, optim = ready(distiller_of(AFD(), ADMConfig()))
    calls: dict[str, list[bool]] = {}
    for name, module in distiller.method.named_modules():
        if name.count(".") == 1:
            module.register_forward_hook(lambda m, *_, name=name: calls.setdefault(name, []).append(m.training))
    step(distiller, optim, batch_of())
    for network in distiller.networks.values():
        assert network.features_calls == 1 and network.head_calls == 2  # type: ignore[union-attr]  # ADM's is the second
    assert calls == {
        **{f"transfers.{role}": [True] for role in MEMBERS},
        **{f"discriminators.{role}": [True] * 3 for role in MEMBERS},
    }
    calls.clear()
    distiller.eval()
    assert distiller.outputs(images(3)).keys() == MEMBERS.keys() and not calls


# --- the step ---------------------------------------------------------------------------------------------------------


class Reference:
    """AFD with a forward and a backward pass for each loss, SGD and Adam written out, on copies of all modules."""

    def __init__(self, distiller: ClassificationDistiller, options: AFDOptions) -> None:
        self.distiller, self.options = copy.deepcopy(distiller), options
        self.steps = 0
        self.momentum: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def step(self, batch: Mapping[str, Any], rate: float) -> None:
        distiller, options = self.distiller, self.options
        parameters = dict(distiller.named_parameters())
        views = distiller.views(batch["image"])
        roles = list(distiller.networks)
        slow: dict[str, Tensor] = {}
        fast: dict[str, Tensor] = {}

        def take(into: dict[str, Tensor], loss: Tensor, *prefixes: str) -> None:
            names = [name for name in parameters if name.startswith(prefixes)]
            found = torch.autograd.grad(loss, [parameters[name] for name in names])
            into.update(zip(names, found, strict=True))

        for k, role in enumerate(roles):
            logits = {r: distiller.networks[r](views[r]) for r in roles}
            take(fast, sum(logit_loss(logits, role, batch["target"], options)), f"networks.{role}.")  # type: ignore[arg-type]
            loss_g, loss_d = game(distiller, views, role, roles[k - 1], side=4)
            take(slow, loss_g, f"networks.{role}.stages.", f"method.transfers.{role}.")
            take(slow, loss_d, f"method.discriminators.{role}.")

        self.steps += 1
        with torch.no_grad():
            for name, gradient in fast.items():
                gradient = gradient + SGD.weight_decay * parameters[name]
                if name in self.momentum:
                    gradient = SGD.momentum * self.momentum[name] + gradient
                self.momentum[name] = gradient
                parameters[name] -= SGD.lr * rate * gradient
            for name, gradient in slow.items():
                if name.startswith("method."):
                    gradient = gradient + options.weight_decay * parameters[name]
                self.first[name] = 0.9 * self.first.get(name, 0 * gradient) + 0.1 * gradient
                self.second[name] = 0.999 * self.second.get(name, 0 * gradient) + 0.001 * gradient**2
                mean = self.first[name] / (1 - 0.9**self.steps)
                square = self.second[name] / (1 - 0.999**self.steps)
                parameters[name] -= options.lr * rate * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize("members", [MEMBERS, SAME, THREE], ids=["unequal", "equal", "three"])
def test_steps_are_those_of_separate_backward_passes(members: dict[str, tuple[int, int]]) -> None:
    distiller, optim = ready(distiller_of(AFD(FAST), members=members))
    reference = Reference(distiller, FAST)
    start = weights(distiller)
    for seed, rate in enumerate((1.0, 1.0, 0.1)):  # a milestone before the third
        batch = {**batch_of(4), "image": images(4, seed + 5)}
        step(distiller, optim, batch, rate)
        reference.step(batch, rate)
        assert all(p.grad is None for p in distiller.parameters())
    for name, parameter in distiller.named_parameters():
        wanted = reference.distiller.get_parameter(name)
        torch.testing.assert_close(parameter, wanted, rtol=1e-9, atol=1e-11, msg=name)
        assert not torch.allclose(parameter, start[name], atol=1e-6), name


def test_adams_learning_rate_follows_the_schedule() -> None:
    moves = []
    for rate in (1.0, 0.1, 0.0):
        distiller, optim = ready(distiller_of(AFD()))
        before = weights(distiller)
        step(distiller, optim, batch_of(), rate)
        moves.append({n: p - before[n] for n, p in weights(distiller).items() if n.startswith("method.")})
    for name, move in moves[0].items():
        assert move.abs().max() <= 2e-5 * 1.001 and move.abs().max() > 1e-5, name
        torch.testing.assert_close(moves[1][name], 0.1 * move, rtol=1e-7, atol=1e-15)
        assert not moves[2][name].any()


def test_adam_decays_the_games_layers_and_leaves_the_networks_to_the_sgd() -> None:
    method = AFD()
    distiller = distiller_of(method)
    networks, layers = method.adam.param_groups
    assert networks["weight_decay"] == 0.0 and layers["weight_decay"] == 0.1
    assert networks["lr"] == layers["lr"] == 2e-5
    stages = [p for n in distiller.networks.values() for p in n.stages.parameters()]  # type: ignore[union-attr]
    assert {id(p) for p in networks["params"]} == {id(p) for p in stages}
    assert {id(p) for p in layers["params"]} == {id(p) for p in method.parameters()}


def test_parts_of_a_batch_add_up() -> None:
    distiller, _ = ready(distiller_of(AFD(), ADMConfig()))
    method: Any = distiller.method
    batch = batch_of(6)
    sums: list[Tensor] = []
    for part in parts_of(batch, 2):
        go_back(distiller, part, 0.5)
        sums = [a + b for a, b in zip(sums, method._gradients, strict=True)] if sums else list(method._gradients)
        method._gradients = []
    halves = {name: p.grad for name, p in distiller.named_parameters() if "adm.adm" not in name}
    distiller.zero_grad()
    for part in parts_of(batch, 2):
        go_back(distiller, part, 0.5)
    for a, b in zip(method._gradients, sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    distiller.zero_grad()
    method._gradients = []
    go_back(distiller, batch)
    for name, half in halves.items():  # without BatchNorm, halves give the whole batch's gradient
        if half is not None:
            torch.testing.assert_close(half, distiller.get_parameter(name).grad, rtol=1e-9, atol=1e-12, msg=name)


def test_processes_average_all_three_gradients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(6)
    whole, optim = ready(distiller_of(AFD(FAST), ADMConfig()))
    processes = [ready(copy.deepcopy(whole)) for _ in range(2)]
    step(whole, optim, batch, parts=2)  # a half in turn is what a process of two would see

    assert AFD.manual_grad_sync
    sent: list[Tensor] = []
    everyone = threading.Barrier(2, timeout=60)

    def all_reduce(flat: Tensor) -> None:
        sent.append(flat.clone())
        everyone.wait()
        flat.copy_(sum(sent))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for (distiller, _), half in zip(processes, parts_of(batch, 2), strict=True):
        go_back(distiller, half)
    with ThreadPoolExecutor(2) as threads:  # a thread plays a process
        list(threads.map(lambda process: process[0].before_update(), processes))
    assert len(sent) == 2 and not torch.equal(*sent)
    for distiller, optim in processes:
        optim.step()
        optim.zero_grad()
        distiller.after_step(batch, START)
        for name, parameter in weights(distiller).items():
            torch.testing.assert_close(parameter, weights(whole)[name], rtol=1e-9, atol=1e-11, msg=name)


def test_the_game_is_played_in_float32_under_autocast() -> None:
    distiller, optim = ready(distiller_of(AFD(FAST), dtype=torch.float32))
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for d in distiller.method.discriminators.values():  # type: ignore[union-attr,operator]
        d.register_forward_hook(lambda _, given, made: seen.append((given[0].dtype, made.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = distiller.method(distiller.networks, distiller.views(batch_of()["image"]))
        assert {output.maps[0].dtype for output in outputs.values()} == {torch.bfloat16}
        losses = distiller.method.losses(outputs, batch_of(), START)
    assert set(seen) == {(torch.float32, torch.float32)} and len(seen) == 6
    assert {value.dtype for terms in losses.values() for value in terms.values()} == {torch.float32}
    before = weights(distiller)
    with torch.autocast("cpu", torch.bfloat16):
        step(distiller, optim, batch_of())
    for name, parameter in weights(distiller).items():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepped", [False, True], ids=["before_a_step", "after_a_step"])
def test_a_restored_run_goes_on_bit_by_bit(stepped: bool) -> None:
    def run(distiller: ClassificationDistiller, optim: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            step(distiller, optim, {**batch_of(), "image": images(6, seed)}, rate=0.1 if seed >= 3 else 1.0)

    whole, optim = ready(distiller_of(AFD(FAST), ADMConfig()))
    run(whole, optim, range(2))
    file = io.BytesIO()
    torch.save({"modules": whole.state_dict(), "optimizer": optim.state_dict()}, file)
    run(whole, optim, range(2, 5))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optim = ready(distiller_of(AFD(FAST), ADMConfig()))
    if stepped:
        run(resumed, optim, range(7, 8))
    resumed.load_state_dict(saved["modules"])
    optim.load_state_dict(saved["optimizer"])
    kept = copy.deepcopy(saved["modules"]["method._extra_state"])
    run(resumed, optim, range(2, 5))
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, weights(whole)[name]), name
    for name, buffer in resumed.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name
    for k, state in kept["state"].items():  # what was loaded is not moved by further steps
        assert all(torch.equal(v, saved["modules"]["method._extra_state"]["state"][k][n]) for n, v in state.items())


def test_a_checkpoint_restores_for_evaluation_and_without_adams_state_is_refused(tmp_path: Path) -> None:
    trained, optim = ready(distiller_of(AFD(FAST), ADMConfig()))
    step(trained, optim, batch_of())
    networks = {role: (network.state_dict(), trained.metadata(role)) for role, network in trained.networks.items()}
    extra = {k: v for k, v in trained.state_dict().items() if not k.startswith("networks.")}
    fresh = distiller_of(AFD(FAST), ADMConfig())
    load_checkpoint(fresh, save_checkpoint(tmp_path / "whole", 1, networks, {"extra": extra}))
    for name, parameter in weights(fresh).items():
        assert torch.equal(parameter, weights(trained)[name]), name
    wanted, found = (distiller.outputs(images(3)) for distiller in (trained, fresh))
    assert all(torch.equal(wanted[role].logits, found[role].logits) for role in MEMBERS)
    del extra["method._extra_state"]
    with pytest.raises(InputError, match=r"lacks method\._extra_state: it is of another run"):
        load_checkpoint(fresh, save_checkpoint(tmp_path / "less", 1, networks, {"extra": extra}))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 0.0}, "afd.tau must be positive"),
        ({"weight": -1.0}, "afd.weight must not be negative"),
        ({"adversarial": 0.0}, "afd.adversarial must be positive: 0.0 .*--method dml"),
        ({"lr": -1e-5}, "afd.lr must not be negative"),
        ({"weight_decay": -0.1}, "afd.weight_decay must not be negative"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AFDOptions(**options)


def test_what_it_cannot_train_is_refused() -> None:
    assert METHODS["afd"] is AFD
    with pytest.raises(InputError, match="AFD needs at least 2 networks"):
        AFD().check(TrainConfig(), ["student"], [])
    with pytest.raises(InputError, match=r"fp16.*--fit.precision bf16"):
        AFD().check(TrainConfig(fit=FitConfig(precision="fp16")), ["teacher", "student"], [])
    with pytest.raises(InputError, match=r"leave fit\.compile off"):
        AFD().check(TrainConfig(fit=FitConfig(compile=True)), ["teacher", "student"], [])
    AFD().check(TrainConfig(fit=FitConfig(precision="bf16", accumulate=2, clip=1.0)), ["teacher", "student"], [])


def test_a_weight_of_zero_leaves_the_imitation_out() -> None:
    losses, _ = distiller_of(AFD(AFDOptions(weight=0.0))).train()(batch_of(), START)
    assert {tuple(terms) for terms in losses.values()} == {("ce", "generator", "discriminator")}
    torch.testing.assert_close(
        losses["student"]["ce"],
        F.cross_entropy(distiller_of(AFD()).outputs(batch_of()["image"])["student"].logits, batch_of()["target"]),
    )
