"""Methods and their compositions: who learns from whom, what the losses are worth, and what does not move."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig, build_networks
from classification.methods import METHODS, Method
from classification.methods.base import pairs_of
from classification.methods.dml import DML, DMLOptions
from classification.methods.vanilla import Vanilla
from core.adm import ADMConfig
from core.errors import InputError, parse_label
from core.training.distiller import Losses, Progress

CLASSES, SIZE = 5, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
START = Progress(0, 0.0, 10, 1.0)


class TinyNet(nn.Module):
    """Three stage maps of 4 x 4 locations and a head, smooth, without BatchNorm; counts what is asked of it."""

    def __init__(self, channels: int, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stages = nn.ModuleList(
            [nn.Conv2d(3, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 1)]
        )
        self.fc = nn.Linear(channels, CLASSES)
        self.to(dtype)
        self.features_calls = self.head_calls = 0

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.features_calls += 1
        maps, x = [], x.to(self.fc.weight.dtype)
        for stage in self.stages:
            x = torch.tanh(stage(x))
            maps.append(x)
        return x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x)[0]

    def forward_head(self, x: Tensor) -> Tensor:
        self.head_calls += 1
        return self.fc(x.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


CHANNELS = {"teacher": 6, "teacher_2": 4, "student": 4, "student_2": 5}


def distiller_of(
    method: Method,
    adm: ADMConfig | None = None,
    roles: tuple[str, ...] = ("teacher", "student"),
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
    norms: Mapping[str, Any] | None = None,
    channels: Mapping[str, int] = CHANNELS,
) -> ClassificationDistiller:
    networks = {role: TinyNet(channels[role], seed, dtype) for seed, role in enumerate(roles)}
    return distiller_around(networks, method, adm, optimizer, norms, dtype)


def distiller_around(
    networks: Mapping[str, TinyNet],
    method: Method,
    adm: ADMConfig | None,
    optimizer: OptimizerConfig,
    norms: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> ClassificationDistiller:
    torch.manual_seed(11)
    distiller = ClassificationDistiller(
        networks,
        {role: NetworkConfig("tiny") for role in networks},
        norms or dict.fromkeys(networks, (MEAN, STD)),
        method,
        adm,
        optimizer,
        images(2),
        num_classes=CLASSES,
    )
    for network in networks.values():
        network.features_calls = network.head_calls = 0
    return distiller.to(dtype)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch_of(count: int = 6) -> dict[str, Any]:
    return {
        "image": images(count),
        "target": torch.arange(count) % CLASSES,
        "index": torch.arange(count),
        "weight": 1.0,
    }


def reached(distiller: ClassificationDistiller, loss: Tensor) -> set[str]:
    """The owners (roles, "last" adapters, "stage" adapters) of the parameters to which a loss has a gradient."""
    names, parameters = zip(*distiller.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    owners = set()
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None and gradient.abs().max() > 0:
            part = name.split(".")
            owners.add(part[1] if part[0] == "networks" else {"adm": "last", "stage_adapters": "stage"}[part[1]])
    return owners


# --- who gets which gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consensus", ["ce", "kd"])
@pytest.mark.parametrize("method", [Vanilla, DML])
def test_each_term_reaches_its_network_alone(method: type[Method], consensus: Any) -> None:
    distiller = distiller_of(method(), ADMConfig(0.3, 0.7, 0.5, consensus=consensus))
    losses, _ = distiller(batch_of(), START)
    own = {"ce", "kd"} if method is DML else {"ce"}
    assert losses["teacher"].keys() == {*own, "divergence"}
    assert losses["student"].keys() == {*own, "consensus", "phi", "feature"}
    for term in (*own, "divergence"):
        assert reached(distiller, losses["teacher"][term]) == {"teacher"}, term
    for term in (*own, "consensus"):
        assert reached(distiller, losses["student"][term]) == {"student"}, term
    assert reached(distiller, losses["student"]["phi"]) == {"last"}
    assert reached(distiller, losses["student"]["feature"]) == {"student", "stage"}


def test_the_papers_letter_trains_phi_by_the_feature_loss() -> None:
    distiller = distiller_of(DML(), ADMConfig(phi_loss="feature"))
    losses, _ = distiller(batch_of(), START)
    assert "phi" not in losses["student"]
    assert reached(distiller, losses["student"]["feature"]) == {"student", "stage", "last"}
    # Without a feature loss nothing trains it, and a parameter without gradient stops DistributedDataParallel.
    distiller = distiller_of(DML(), ADMConfig(phi_loss="feature", gamma=0.0))
    total = sum(v for terms in distiller(batch_of(), START)[0].values() for v in terms.values())
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert all(g is not None for g in torch.autograd.grad(total, trained, allow_unused=True))


def test_a_teacher_that_imitates_its_student_moves_itself_alone() -> None:
    losses, _ = distiller_of(DML(), ADMConfig())(batch_of(), START)
    distiller = distiller_of(DML(), ADMConfig(feature_targets="both"))
    both, _ = distiller(batch_of(), START)
    assert set(both["teacher"]) - set(losses["teacher"]) == {"feature"}
    assert both["teacher"]["feature"].item() == pytest.approx(both["student"]["feature"].item())
    assert reached(distiller, both["teacher"]["feature"]) == {"teacher"}
    assert reached(distiller, both["student"]["feature"]) == {"student", "stage"}


def test_equal_channels_need_no_adapter() -> None:
    distiller = distiller_of(DML(), ADMConfig(), channels={"teacher": 4, "student": 4})
    assert distiller.adm is not None and not list(distiller.adm.parameters())
    assert "phi" not in distiller(batch_of(), START)[0]["student"]


@pytest.mark.parametrize(
    ("config", "absent"),
    [
        (ADMConfig(alpha=0.0), ("student", "consensus")),
        (ADMConfig(beta=0.0), ("teacher", "divergence")),
        (ADMConfig(gamma=0.0), ("student", "feature")),
    ],
)
def test_a_weight_of_zero_leaves_its_term_out(config: ADMConfig, absent: tuple[str, str]) -> None:
    losses, _ = distiller_of(Vanilla(), config)(batch_of(), START)
    assert absent[1] not in losses[absent[0]]
    assert len(losses["teacher"]) + len(losses["student"]) == 5  # of ce, divergence; ce, consensus, phi, feature


def test_vanilla_trains_each_network_as_if_alone() -> None:
    both, batch = distiller_of(Vanilla()), batch_of()
    losses, _ = both(batch, START)
    for role in ("teacher", "student"):
        network = both.networks[role]
        x = (batch["image"].float() / 255 - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
        wanted = F.cross_entropy(network(x), batch["target"])
        torch.testing.assert_close(losses[role]["ce"], wanted)
        for a, b in zip(
            torch.autograd.grad(losses[role]["ce"], list(network.parameters())),
            torch.autograd.grad(wanted, list(network.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    alone = distiller_of(Vanilla(), roles=("student",))
    assert alone(batch, START)[0].keys() == {"student"}


# --- Eq. 10 -----------------------------------------------------------------------------------------------------------


def by_hand(
    distiller: ClassificationDistiller, batch: dict[str, Any], config: ADMConfig, tau: float
) -> dict[str, float]:
    """Eq. 1 to 11 written out image by image and location by location in float64, for one teacher and one student."""
    assert distiller.adm is not None
    teacher: Any
    student: Any
    teacher, student = distiller.networks["teacher"], distiller.networks["student"]
    n = len(batch["target"])
    raw = batch["image"].float()
    x = (raw - 255 * torch.tensor(MEAN).view(-1, 1, 1)) / (255 * torch.tensor(STD).view(-1, 1, 1))
    with torch.no_grad():
        maps = {"t": teacher.forward_intermediates(x)[1], "s": student.forward_intermediates(x)[1]}
        phi = {
            name.rsplit(".", 3)[-3] if "stage" in name else "last": p.flatten(1)
            for name, p in distiller.adm.named_parameters()
        }

        def softmax(z: Tensor, tau: float) -> Tensor:
            e = (z / tau - (z / tau).max()).exp()
            return e / e.sum()

        def cross_entropy(z: Tensor, y: int) -> float:
            return -softmax(z, 1.0)[y].log().item()

        def imitation(z: Tensor, goal: Tensor, tau: float) -> float:
            p, q = softmax(goal, tau), softmax(z, tau)
            return tau**2 * (p * (p / q).log()).sum().item()

        def head(network: Any, feature_map: Tensor) -> Tensor:
            pooled = torch.stack([channel.mean() for channel in feature_map])
            return network.fc.weight @ pooled + network.fc.bias

        sums = dict.fromkeys(("ce_t", "ce_s", "kd_t", "kd_s", "consensus", "divergence"), 0.0)
        for i in range(n):
            ft, fs, y = maps["t"][-1][i], maps["s"][-1][i], int(batch["target"][i])
            zt, zs = head(teacher, ft), head(student, fs)
            sums["ce_t"] += cross_entropy(zt, y) / n
            sums["ce_s"] += cross_entropy(zs, y) / n
            sums["kd_t"] += imitation(zt, zs, tau) / n
            sums["kd_s"] += imitation(zs, zt, tau) / n
            projected = torch.einsum("tc,chw->thw", phi["last"], fs)
            s = torch.empty(ft.shape[1:], dtype=torch.float64)
            for h in range(s.shape[0]):
                for w in range(s.shape[1]):
                    a, b = ft[:, h, w], projected[:, h, w]
                    s[h, w] = (a @ b) / (a.norm() * b.norm())
            agree, differ = (1 + s) / (1 + s.mean() + 1e-5), (1 - s) / (1 - s.mean() + 1e-5)
            if config.consensus == "ce":
                sums["consensus"] += cross_entropy(head(student, agree * fs), y) / n
            else:
                sums["consensus"] += imitation(head(student, agree * fs), head(teacher, agree * ft), config.tau) / n
            sums["divergence"] += cross_entropy(head(teacher, differ * ft), y) / n
        feature = 0.0
        for k, key in enumerate(("0", "1", "last")):
            projected = torch.einsum("tc,bchw->bthw", phi[key], maps["s"][k])
            feature += (maps["t"][k] - projected).square().mean().item() / 2 ** (3 - k)
        projected = torch.einsum("tc,bchw->bthw", phi["last"], maps["s"][-1])
        residual = ((maps["t"][-1] - projected).square().sum() / maps["t"][-1].square().sum()).item()
    adm = config.alpha * sums["consensus"] + config.beta * sums["divergence"]
    dml = sums["ce_t"] + sums["ce_s"] + sums["kd_t"] + sums["kd_s"]
    return {"total": dml + config.gamma * feature + adm, "phi": residual, "adm": adm, "feature": feature}


@pytest.mark.parametrize(("consensus", "tau"), [("ce", 1.0), ("kd", 3.0)])
def test_total_loss_is_equation_10(consensus: Any, tau: float) -> None:
    config = ADMConfig(0.3, 0.7, 0.5, consensus=consensus, tau=tau)
    distiller = distiller_of(DML(DMLOptions(tau=tau)), config, dtype=torch.float64)
    batch = batch_of()
    losses, _ = distiller(batch, START)
    wanted = by_hand(distiller, batch, config, tau)
    phi = losses["student"].pop("phi").item()
    total = sum(value.item() for terms in losses.values() for value in terms.values())
    # The images are normalised in float32: no more than that is lost.
    assert total == pytest.approx(wanted["total"], rel=1e-6)
    assert phi == pytest.approx(wanted["phi"], rel=1e-6)
    adm = losses["student"]["consensus"] + losses["teacher"]["divergence"]
    assert adm.item() == pytest.approx(wanted["adm"], rel=1e-6)
    assert losses["student"]["feature"].item() == pytest.approx(0.5 * wanted["feature"], rel=1e-6)


@pytest.mark.parametrize("roles", [("teacher", "student", "student_2"), ("teacher", "teacher_2", "student")])
def test_several_networks_take_the_mean_over_their_pairs(roles: tuple[str, ...]) -> None:
    config = ADMConfig(0.3, 0.7, 0.5)
    distiller, batch = distiller_of(DML(), config, roles), batch_of()
    losses, _ = distiller(batch, START)
    assert distiller.adm is not None
    pairs = pairs_of(roles)
    assert distiller.adm.pairs == pairs and len(pairs) == 2
    maps = {role: output.maps for role, output in distiller.outputs(batch["image"]).items()}
    terms: dict[tuple[str, str], dict[str, Tensor]] = {}
    from core.distillation import feature_loss

    for s, t in pairs:
        loss: Any = distiller.adm.adm[f"{s}:{t}"]
        net_s: Any = distiller.networks[s]
        net_t: Any = distiller.networks[t]
        terms[s, t] = loss.terms(maps[s][-1], maps[t][-1], batch["target"], net_s.forward_head, net_t.forward_head)
        adapters: Any = [*distiller.adm.stage_adapters[f"{s}:{t}"], loss.adapter]  # type: ignore[misc]
        terms[s, t]["feature"] = config.gamma * feature_loss(maps[s], maps[t], adapters)
    for role in roles:
        own = [terms[pair] for pair in pairs if role in pair]
        names = ("divergence",) if role.startswith("teacher") else ("consensus", "feature")
        for name in names:
            torch.testing.assert_close(losses[role][name], sum(t[name] for t in own) / len(own))
        if not role.startswith("teacher"):  # every phi by its own loss, whole
            phi = sum(t["phi"] for t in own if "phi" in t)
            torch.testing.assert_close(losses[role]["phi"], phi)
        for name, value in losses[role].items():
            assert reached(distiller, value) <= {role, "last", "stage"}, (role, name)
    # DML runs among all of them: the mean over the other two.
    logits = {role: output.logits for role, output in distiller.outputs(batch["image"]).items()}
    for role in roles:
        others = [
            F.kl_div(F.log_softmax(logits[role], 1), F.softmax(logits[other], 1), reduction="batchmean")
            for other in roles
            if other != role
        ]
        torch.testing.assert_close(losses[role]["kd"], sum(others) / 2)


def test_per_role_lambda_and_peers() -> None:
    batch = batch_of()
    roles = ("teacher", "student", "student_2")
    plain = distiller_of(DML(), roles=roles)(batch, START)[0]
    lowered = distiller_of(DML(DMLOptions(weight=2.0, weights={"teacher": 0.3})), roles=roles)(batch, START)[0]
    summed = distiller_of(DML(DMLOptions(peers="sum")), roles=roles)(batch, START)[0]
    for role, weight in (("teacher", 0.3), ("student", 2.0), ("student_2", 2.0)):
        torch.testing.assert_close(lowered[role]["kd"], weight * plain[role]["kd"])
        torch.testing.assert_close(summed[role]["kd"], 2 * plain[role]["kd"])
        torch.testing.assert_close(lowered[role]["ce"], plain[role]["ce"])
    silent = distiller_of(DML(DMLOptions(weights={"teacher": 0.0})))(batch, START)[0]
    assert silent["teacher"].keys() == {"ce"} and silent["student"].keys() == {"ce", "kd"}
    with pytest.raises(InputError, match=r"dml.weights names \['techer'\]"):
        distiller_of(DML(DMLOptions(weights={"techer": 0.3})))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DMLOptions(weight=-1.0),
        lambda: DMLOptions(weights={"teacher": -0.1}),
        lambda: DMLOptions(tau=0.0),
        lambda: ADMConfig(alpha=-0.1),
        lambda: ADMConfig(beta=-0.1),
        lambda: ADMConfig(gamma=-0.1),
        lambda: ADMConfig(tau=0.0),
        lambda: OptimizerConfig(lr=-0.1),
        lambda: OptimizerConfig(learning_rates={"a*": -0.1}),
        lambda: OptimizerConfig(momentum=0.0, nesterov=True),
        lambda: NetworkConfig("x", lr=-1.0),
    ],
)
def test_values_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"must|needs"):
        make()


# --- one forward, in turn, paused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "adm"), [(Vanilla, None), (DML, None), (Vanilla, ADMConfig()), (DML, ADMConfig())])
def test_each_network_runs_once_a_step(method: type[Method], adm: ADMConfig | None) -> None:
    distiller = distiller_of(method(), adm)
    distiller(batch_of(), START)
    for network in distiller.networks.values():
        assert network.features_calls == 1
        assert network.head_calls == 1 + (adm is not None)  # its logits, and those of its own attention


def make_step(distiller: ClassificationDistiller, optim: torch.optim.Optimizer, phase: Any = None) -> Losses:
    losses, _ = distiller(batch_of(), START, phase)
    total = sum(value for terms in losses.values() for value in terms.values())

    distiller.backward(losses, total, SimpleNamespace(scaler=None))  # what an Accelerator without fp16 says
    distiller.before_update()
    optim.step()
    optim.zero_grad()
    return losses


def snapshot(distiller: ClassificationDistiller, role: str) -> list[Tensor]:
    return [p.detach().clone() for p in distiller.parameters_of(role)]


def moved(distiller: ClassificationDistiller, role: str, before: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, snapshot(distiller, role), strict=True))


@pytest.mark.parametrize("adm", [None, ADMConfig()])
def test_alternating_updates_move_one_network_at_a_time(adm: ADMConfig | None) -> None:
    distiller = distiller_of(DML(DMLOptions(update="alternate")), adm, optimizer=OptimizerConfig(weight_decay=0.1))
    assert distiller.phases == (("teacher",), ("student",)) and distiller.unused_parameters
    optim = distiller.optimizer.make(distiller.parameter_groups())
    for _ in range(2):  # the second time there is momentum
        for phase in distiller.phases:
            (own,) = phase
            other = "student" if own == "teacher" else "teacher"
            before = {role: snapshot(distiller, role) for role in (own, other)}
            outputs = distiller.method(distiller.networks, distiller.views(images(2)), phase)
            assert outputs[own].logits.requires_grad and not outputs[other].logits.requires_grad  # no wasted graph
            losses = make_step(distiller, optim, phase)
            assert losses.keys() == {own}
            assert moved(distiller, own, before[own]) and not moved(distiller, other, before[other])
    for network in distiller.networks.values():
        assert network.features_calls == 4 + 4  # and the four above


def test_in_turn_the_second_network_sees_the_first_one_moved() -> None:
    alternate = distiller_of(DML(DMLOptions(update="alternate")))
    together = distiller_of(DML())
    optim = alternate.optimizer.make(alternate.parameter_groups())
    first = make_step(alternate, optim, ("teacher",))
    second = make_step(alternate, optim, ("student",))
    both = together(batch_of(), START)[0]
    assert torch.equal(first["teacher"]["kd"], both["teacher"]["kd"])
    assert torch.equal(second["student"]["ce"], both["student"]["ce"])
    assert not torch.equal(second["student"]["kd"], both["student"]["kd"])


class Pausing(DML):
    """Holds a role back in its second and third forward."""

    def __init__(self, role: str) -> None:
        super().__init__(DMLOptions())
        self.role, self.forwards = role, 0

    def losses(self, outputs: Any, batch: Any, progress: Progress) -> Losses:
        self.forwards += 1
        gate = torch.tensor(0.0 if self.forwards in (2, 3) else 1.0)
        self.gates = {self.role: gate}
        losses = super().losses(outputs, batch, progress)
        return {**losses, self.role: {term: value * gate for term, value in losses[self.role].items()}}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_paused_roles_do_not_move_at_all(role: str) -> None:
    distiller = distiller_of(Pausing(role), ADMConfig(), optimizer=OptimizerConfig(lr=0.1, weight_decay=0.1))
    optim = distiller.optimizer.make(distiller.parameter_groups())
    other = "student" if role == "teacher" else "teacher"

    def momenta() -> list[Tensor]:
        return [optim.state[p]["momentum_buffer"].clone() for p in distiller.parameters_of(role)]

    make_step(distiller, optim)
    for _ in range(2):
        before, others, kept = snapshot(distiller, role), snapshot(distiller, other), momenta()
        losses = make_step(distiller, optim)
        assert not moved(distiller, role, before) and moved(distiller, other, others)
        assert all(torch.equal(a, b) for a, b in zip(kept, momenta(), strict=True))
        assert all(value.item() == 0 for value in losses[role].values())
        assert losses[role].keys() >= {"ce", "kd"}
    before = snapshot(distiller, role)
    make_step(distiller, optim)
    assert moved(distiller, role, before)


def test_a_role_pauses_only_where_every_part_of_a_batch_says_so() -> None:
    distiller = distiller_of(Pausing("teacher"), ADMConfig())
    optim = distiller.optimizer.make(distiller.parameter_groups())
    for paused in (False, True):  # forwards 1 and 2, then 3 and ... 3 again
        before = snapshot(distiller, "teacher")
        for part in range(2):
            distiller.method.forwards = part if not paused else 1  # type: ignore[assignment]
            losses, observed = distiller(batch_of(), START)
            assert observed["teacher/paused"] == float(paused or part == 1)
            total = sum(value for terms in losses.values() for value in terms.values())
            distiller.backward(losses, total, SimpleNamespace(scaler=None))
        distiller.before_update()
        optim.step()
        optim.zero_grad()
        assert moved(distiller, "teacher", before) is not paused


class Remembering(Vanilla):
    """Keeps what after_step is given."""

    seen: Any = None

    def after_step(self, batch: Any, logits: Any, progress: Progress) -> None:
        self.seen = (batch["index"], logits, progress)


@pytest.mark.parametrize("parts", [1, 2])
def test_after_step_gets_the_whole_steps_detached_logits(parts: int) -> None:
    method = Remembering()
    distiller = distiller_of(method, ADMConfig())
    batch = batch_of(6)
    for _ in range(2):  # nothing is left over from a step
        batch = distiller.before_step(batch, START)
        for part in range(parts):
            rows = slice(part * 6 // parts, (part + 1) * 6 // parts)
            distiller({name: v[rows] if isinstance(v, Tensor) else v for name, v in batch.items()}, START)
        distiller.after_step(batch, START)
        index, logits, progress = method.seen
        assert torch.equal(index, batch["index"]) and progress is START
        torch.testing.assert_close(logits["student"], distiller.outputs(batch["image"])["student"].logits)
        assert not any(z.requires_grad for z in logits.values())
    assert not distiller._logits


# --- views, groups, metadata ------------------------------------------------------------------------------------------


def test_each_network_sees_its_own_normalisation() -> None:
    norms = {"teacher": (MEAN, STD), "student": ((0.0, 0.1, 0.2), (1.0, 0.9, 0.8))}
    distiller = distiller_of(Vanilla(), norms=norms)
    raw = images(3)
    for role, (mean, std) in norms.items():
        wanted = (raw.double() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        torch.testing.assert_close(distiller.views(raw)[role].double(), wanted, rtol=0, atol=2e-6)
    assert raw.dtype == torch.uint8 and torch.equal(raw, images(3))
    shared = distiller_of(Vanilla()).views(raw)
    assert shared["teacher"] is shared["student"]  # normalised once
    with pytest.raises(InputError, match="student: mean and std need 3 values each"):
        distiller_of(Vanilla(), norms={"teacher": (MEAN, STD), "student": ((0.5, 0.5), (1.0, 1.0))})


def test_separate_views_give_each_network_its_own() -> None:
    distiller = distiller_of(Vanilla())
    views = torch.stack([images(3, seed=1), images(3, seed=2)], dim=1)  # [B, V, C, H, W]
    both = distiller.views(views)
    for k, role in enumerate(("teacher", "student")):
        assert torch.equal(both[role], distiller.views(images(3, seed=k + 1))[role])


def test_parameter_groups_hold_every_trained_parameter_once() -> None:
    optimizer = OptimizerConfig(lr=0.1, learning_rates={"other*": 0.5, "ti*": 0.02}, weight_decay=1e-3)
    distiller = distiller_of(DML(), ADMConfig(), ("teacher", "teacher_2", "student"), optimizer=optimizer)
    distiller.configs["teacher_2"] = NetworkConfig("tiny", lr=0.3)
    groups = distiller.parameter_groups()
    assert [group["lr"] for group in groups] == [0.02, 0.3, 0.02]
    assert {group["weight_decay"] for group in groups} == {1e-3}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in distiller.parameters()}
    assert distiller.adm is not None
    phi = {id(p) for p in distiller.adm.parameters()}
    assert phi and phi <= {id(p) for p in groups[2]["params"]}


def test_metadata_and_trained() -> None:
    distiller = distiller_of(Vanilla())
    data = distiller.metadata("student")
    assert data["role"] == "student" and data["architecture"] == "tiny" and data["num_classes"] == str(CLASSES)
    assert json.loads(data["mean"]) == list(MEAN) and json.loads(data["std"]) == list(STD)
    distiller.networks["teacher"].requires_grad_(False)
    assert list(distiller.trained()) == ["student"] and len(distiller.parameter_groups()) == 1


# --- starts -----------------------------------------------------------------------------------------------------------


def weights(names: dict[str, str], seed: int = 0) -> dict[str, dict[str, Tensor]]:
    networks = build_networks({role: NetworkConfig(name) for role, name in names.items()}, 10, seed)
    return {role: network.state_dict() for role, network in networks.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_students_start_depends_on_its_role_and_the_seed_alone() -> None:
    one = weights({"teacher": "cifar_wrn_10_2", "student": "cifar_resnet8"})
    torch.rand(5)
    other = weights({"student": "cifar_resnet8", "teacher": "cifar_resnet14", "teacher_2": "cifar_resnet8"})
    assert same(one["student"], other["student"])
    assert same(one["student"], weights({"student": "cifar_resnet8"})["student"])
    assert not same(other["student"], other["teacher_2"])  # the same network in another role starts elsewhere
    assert not same(one["student"], weights({"student": "cifar_resnet8"}, seed=1)["student"])


def test_unknown_roles_and_networks_are_refused() -> None:
    with pytest.raises(InputError, match="unknown role 'studnet': networks are teacher"):
        weights({"studnet": "cifar_resnet8"})
    with pytest.raises(InputError, match="did you mean 'cifar_resnet8'"):
        weights({"student": "cifar_resnet9"})


@pytest.mark.parametrize("label", ["vanilla", "dml", "vanilla+adm", "dml+adm"])
def test_labels(label: str) -> None:
    assert parse_label(label, METHODS) == (label.partition("+")[0], label.endswith("+adm"))


@pytest.mark.parametrize(
    ("label", "nearest"), [("dmll", "dml"), ("dml+amd", "dml[+]adm"), ("vanila", "vanilla"), ("dml+", "dml")]
)
def test_unknown_labels_offer_the_nearest(label: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown method .*did you mean '{nearest}'"):
        parse_label(label, METHODS)


def test_adm_needs_a_pair_and_maps_with_locations() -> None:
    with pytest.raises(InputError, match="ADM needs a teacher and a student"):
        distiller_of(DML(), ADMConfig(), ("student", "student_2"))

    class Pooled(TinyNet):
        def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            x, maps = super().forward_intermediates(x)
            return x.mean((2, 3), keepdim=True), maps

    networks = {"teacher": TinyNet(4, 0), "student": Pooled(4, 1)}
    norms = dict.fromkeys(networks, (MEAN, STD))
    configs = {role: NetworkConfig("tiny") for role in networks}
    for adm in (ADMConfig(), None):
        make = lambda adm=adm: ClassificationDistiller(  # noqa: E731
            networks, configs, norms, DML(), adm, OptimizerConfig(), images(2), num_classes=CLASSES
        )
        if adm is None:
            make()  # DML needs no locations
        else:
            with pytest.raises(InputError, match="student: its last map is 1 x 1"):
                make()


# --- host reads -------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the operators by which the host reads a value of the device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("consensus", ["ce", "kd"])
@pytest.mark.parametrize("update", ["simultaneous", "alternate"])
def test_a_step_reads_nothing_from_the_device(consensus: Any, update: Any) -> None:
    distiller = distiller_of(DML(DMLOptions(update=update)), ADMConfig(consensus=consensus, feature_filter="drop"))
    optim = distiller.optimizer.make(distiller.parameter_groups())
    with HostReads() as mode:
        for phase in distiller.phases:
            make_step(distiller, optim, phase)
    assert mode.reads == 0
    with HostReads() as mode:
        float(torch.ones(1))
    assert mode.reads == 1
