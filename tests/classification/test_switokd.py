"""SwitOKD: which mode a batch is in, what each network then minimises, and that a paused teacher does not move."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_methods import CLASSES, START, HostReads, batch_of, distiller_of, images, moved, snapshot
from torch import Tensor, nn

from classification.config import TrainConfig, parse_command
from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig, build_networks
from classification.methods import Output
from classification.methods.base import mean_over_all
from classification.methods.switokd import SwitOKD, SwitOKDOptions, distances, epsilon, learning
from classification.methods.vanilla import Vanilla
from core.adm import ADMConfig
from core.errors import InputError
from core.training.distiller import Losses

ONE = ("teacher", "student")
TWO_STUDENTS = ("teacher", "student", "student_2")
TWO_TEACHERS = ("teacher", "teacher_2", "student")
Table = dict[str, list[list[float]]]


def logits_of(roles: Sequence[str], seed: int, count: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Random float64 logits ``[count, CLASSES]`` of each role, which want a gradient, and labels."""
    draw = torch.Generator().manual_seed(seed)
    logits = {role: torch.randn(count, CLASSES, generator=draw, dtype=torch.float64) for role in roles}
    target = torch.randint(CLASSES, (count,), generator=draw)
    for role in logits:  # so unequal that all modes come up
        logits[role][torch.arange(count), target] += {"teacher": 2.0, "student_2": 0.0}.get(role, 1.0)
    return {role: z.requires_grad_() for role, z in logits.items()}, target


def losses_of(method: SwitOKD, logits: Mapping[str, Tensor], target: Tensor) -> Losses:
    outputs = {role: Output(z, [], nn.Identity()) for role, z in logits.items()}
    return method.losses(outputs, {"target": target, "weight": 1.0}, START)


# --- the definition, number by number ---------------------------------------------------------------------------------


def softmax(z: list[float], tau: float = 1.0) -> list[float]:
    e = [math.exp(v / tau) for v in z]
    return [v / sum(e) for v in e]


def cross_entropy(z: list[list[float]], y: list[int]) -> float:
    return sum(-math.log(softmax(row)[c]) for row, c in zip(z, y, strict=True)) / len(y)


def imitation(own: list[list[float]], goal: list[list[float]], tau: float) -> float:
    total = 0.0
    for a, b in zip(own, goal, strict=True):
        total += sum(q * (math.log(q) - math.log(p)) for p, q in zip(softmax(a, tau), softmax(b, tau), strict=True))
    return tau**2 * total / len(own)


def label_gap(z: list[list[float]], y: list[int]) -> float:
    return sum(abs(p - (k == c)) for row, c in zip(z, y, strict=True) for k, p in enumerate(softmax(row))) / len(y)


def ratio(s: list[list[float]], t: list[list[float]], y: list[int]) -> float:
    return math.exp(-label_gap(t, y) / (label_gap(s, y) + label_gap(t, y)))


def gate(s: list[list[float]], t: list[list[float]], y: list[int], eps: float | None = None) -> int:
    r_s, r_t = label_gap(s, y), label_gap(t, y)
    rows = zip(s, t, strict=True)
    gap = sum(abs(p - q) for a, b in rows for p, q in zip(softmax(a), softmax(b), strict=True)) / len(y)
    delta = r_s - (ratio(s, t, y) if eps is None else eps) * r_t
    return 0 if gap > delta and r_t < r_s else 1


def by_hand(z: Table, y: list[int], tau: float, w: float, quirks: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    """({role: (ce, kd)}, the pairs' gates) for each of the three forms."""
    ce = {role: cross_entropy(z[role], y) for role in z}

    def kl(a: str, b: str) -> float:
        return w * imitation(z[a], z[b], tau)

    if "student_2" in z:
        eps = ratio(z["student_2"], z["teacher"], y) if quirks else None
        a, b = gate(z["student"], z["teacher"], y, eps), gate(z["student_2"], z["teacher"], y, eps)
        return {
            "teacher": (max(a, b) * ce["teacher"], a * kl("teacher", "student") + b * kl("teacher", "student_2")),
            "student": (ce["student"], kl("student", "student_2") + kl("student", "teacher")),
            "student_2": (ce["student_2"], kl("student_2", "student") + kl("student_2", "teacher")),
        }, (a, b)
    if "teacher_2" in z:
        eps = ratio(z["student"], z["teacher_2"], y) if quirks else None
        a, b = gate(z["student"], z["teacher"], y, eps), gate(z["student"], z["teacher_2"], y, eps)
        return {
            "teacher": (a * ce["teacher"], a * (kl("teacher", "student") + kl("teacher", "teacher_2"))),
            "teacher_2": (b * ce["teacher_2"], b * (kl("teacher_2", "student") + kl("teacher_2", "teacher"))),
            "student": (ce["student"], kl("student", "teacher") + kl("student", "teacher_2")),
        }, (a, b)
    g = gate(z["student"], z["teacher"], y)
    return {
        "teacher": (g * ce["teacher"], g * kl("teacher", "student")),
        "student": (ce["student"], kl("student", "teacher")),
    }, (g,)


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize(("tau", "weight"), [(1.0, 1.0), (2.0, 0.7)])
@pytest.mark.parametrize("roles", [ONE, TWO_STUDENTS, TWO_TEACHERS])
def test_losses_and_gates_are_the_definition(roles: tuple[str, ...], tau: float, weight: float, quirks: bool) -> None:
    method = SwitOKD(SwitOKDOptions(tau, weight, official_quirks=quirks))
    seen: Counter[tuple[int, ...]] = Counter()
    otherwise = 0
    for seed in range(60):
        logits, target = logits_of(roles, seed)
        losses = losses_of(method, logits, target)
        table = {role: z.tolist() for role, z in logits.items()}
        wanted, modes = by_hand(table, target.tolist(), tau, weight, quirks)
        seen[modes] += 1
        otherwise += modes != by_hand(table, target.tolist(), tau, weight, not quirks)[1]
        assert losses.keys() == wanted.keys() == set(roles)
        for role, (ce, kd) in wanted.items():
            assert losses[role]["ce"].item() == pytest.approx(ce, abs=1e-12)
            assert losses[role]["kd"].item() == pytest.approx(kd, abs=1e-12)
        if roles == TWO_TEACHERS:
            assert {role: g.item() for role, g in method.gates.items()} == {"teacher": modes[0], "teacher_2": modes[1]}
        elif roles == TWO_STUDENTS and quirks:
            assert not method.gates  # its optimiser steps in any case
        else:
            assert {role: g.item() for role, g in method.gates.items()} == {"teacher": max(modes)}
    assert len(seen) == 2 ** (len(roles) - 1) and min(seen.values()) > 1, seen
    assert (otherwise > 0) is (len(roles) > 2)  # one pair's epsilon for both does make a difference


# --- limits -----------------------------------------------------------------------------------------------------------


def test_epsilon_lies_between_one_over_e_and_one() -> None:
    r = torch.linspace(1e-6, 2.0, 200, dtype=torch.float64)
    eps = epsilon(r[:, None], r[None, :])
    assert eps.min() > math.exp(-1) and eps.max() < 1
    assert eps[0, -1] == pytest.approx(math.exp(-1), rel=1e-6) and eps[-1, 0] == pytest.approx(1, rel=1e-6)
    assert (eps.diff(dim=1) < 0).all()  # the worse the teacher, the smaller
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros((), dtype=dtype)
        assert epsilon(zero, zero) == 1  # and not 0 / 0


def test_a_teacher_that_is_not_ahead_learns() -> None:
    r_s, r_t = torch.rand(2, 1000, dtype=torch.float64) * 2
    widest = torch.full_like(r_s, 2.0)
    learns = learning(r_s, r_t, widest, epsilon(r_s, r_t))
    assert (learns[r_t >= r_s] == 1).all() and (r_t < r_s).any()
    assert (learns[r_t < r_s] == 0).all()  # no threshold reaches 2
    r = torch.tensor([0.0, 0.3, 2.0])
    assert (learning(r, r, torch.full((3,), 2.0), epsilon(r, r)) == 1).all()


def test_the_narrowest_gap_that_two_distances_allow_is_learning_mode() -> None:
    """``G >= r_s - r_t`` always; there, where only one class's mass has moved, the student still learns from it all."""
    for seed in range(50):
        logits, target = logits_of(ONE, seed, count=4)
        r_s, r_t, gap = mean_over_all(distances(logits["student"], logits["teacher"], target), 4)
        assert gap >= r_s - r_t - 1e-12 and 0 <= r_s <= 2 and 0 <= r_t <= 2 and 0 <= gap <= 2
        if r_t < r_s:
            assert learning(r_s, r_t, r_s - r_t, epsilon(r_s, r_t)) == 1
        assert not (r_s.requires_grad or gap.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_and_hopeless_networks_give_finite_losses_and_learn(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 1, 2])
    right = 200.0 * torch.eye(CLASSES, dtype=dtype)[target]  # the softmax is one-hot to the last bit
    rng = torch.randn(3, CLASSES, dtype=dtype)
    cases = {"perfect": (right, right), "wrong": (-right, -right), "equal": (rng, rng), "teacher alone": (right, rng)}
    for name, (teacher, student) in cases.items():
        method = SwitOKD()
        logits = {"teacher": teacher.clone().requires_grad_(), "student": student.clone().requires_grad_()}
        losses = losses_of(method, logits, target)
        assert method.gates["teacher"] == 1, name
        total = sum(value for terms in losses.values() for value in terms.values())
        gradients = torch.autograd.grad(total, list(logits.values()))
        assert total.isfinite() and all(g.isfinite().all() for g in gradients), name


def test_under_autocast_it_decides_and_adds_up_in_float32() -> None:
    for seed in range(20):
        logits, target = logits_of(ONE, seed)
        halves = {role: z.detach().bfloat16() for role, z in logits.items()}
        method, exact = SwitOKD(), SwitOKD()
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(method, halves, target)
        wanted = losses_of(exact, {role: z.double() for role, z in halves.items()}, target)
        assert method.gates["teacher"] == exact.gates["teacher"]
        for role, terms in wanted.items():
            for term, value in terms.items():
                assert losses[role][term].dtype == torch.float32
                assert losses[role][term].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


# --- who gets which gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [ONE, TWO_STUDENTS, TWO_TEACHERS])
def test_each_loss_has_the_gradient_of_its_mode_and_reaches_its_network_alone(roles: tuple[str, ...]) -> None:
    tau, weight = 2.0, 0.7
    method = SwitOKD(SwitOKDOptions(tau, weight))
    for seed in range(20):
        logits, target = logits_of(roles, seed)
        losses = losses_of(method, logits, target)
        onehot = torch.eye(CLASSES, dtype=torch.float64)[target]
        soft = {role: (z.detach() / tau).softmax(1) for role, z in logits.items()}
        table = {role: z.tolist() for role, z in logits.items()}
        for role, terms in losses.items():
            others = [other for other in roles if other != role]
            for value in terms.values():
                for other in others:
                    assert torch.autograd.grad(value, logits[other], retain_graph=True, allow_unused=True) == (None,)
            pull = {other: weight * tau * (soft[role] - soft[other]) for other in others}
            rest = 1
            if role.startswith("teacher"):
                own = {s: gate(table[s], table[role], target.tolist()) for s in others if s.startswith("student")}
                rest = max(own.values())
                pull = {other: own.get(other, rest) * value for other, value in pull.items()}
            wanted = (rest * (logits[role].detach().softmax(1) - onehot) + sum(pull.values())) / len(target)
            got = torch.autograd.grad(terms["ce"] + terms["kd"], logits[role])[0]  # times 0, but there: hooks must fire
            torch.testing.assert_close(got, wanted)
            assert rest or not got.any()


# --- whole networks ---------------------------------------------------------------------------------------------------

# Where class 0 is right the teacher is ahead and puts its doubt elsewhere: expert mode. Where class 2 is, it is behind.
BELIEFS = {"teacher": (0.8, 0.2, 0, 0, 0), "student": (0.3, 0, 0.7, 0, 0)}
EXPERT, LEARNING = torch.zeros(6, dtype=torch.long), torch.full((6,), 2)


def believing(distiller: ClassificationDistiller, beliefs: Mapping[str, Sequence[float]]) -> ClassificationDistiller:
    """Makes the networks predict about this, whatever they see."""
    with torch.no_grad():
        for role, probabilities in beliefs.items():
            fc: Any = distiller.networks[role].fc
            fc.weight.mul_(0.01)
            fc.bias.copy_((torch.tensor(probabilities) + 1e-3).log())
    return distiller


def real(adm: ADMConfig | None) -> ClassificationDistiller:
    """Two networks with BatchNorm."""
    configs = {role: NetworkConfig("cifar_resnet8") for role in ONE}
    distiller = ClassificationDistiller(
        build_networks(configs, CLASSES, 0),
        configs,
        dict.fromkeys(ONE, ((0.5,) * 3, (0.25,) * 3)),
        SwitOKD(with_adm=adm is not None),
        adm,
        OptimizerConfig(lr=0.001, weight_decay=0.1),
        images(2),
        num_classes=CLASSES,
    )
    return believing(distiller, BELIEFS).train()


def step(
    module: nn.Module,
    distiller: ClassificationDistiller,
    optim: torch.optim.Optimizer,
    *parts: Tensor,
    share: float = 1.0,
) -> tuple[Losses, dict[str, Tensor]]:
    """One optimiser step on as many parts as there are labels; what the last one returned."""
    for target in parts:
        losses, observed = module({**batch_of(len(target)), "target": target}, START)
        total = sum(value for terms in losses.values() for value in terms.values())
        distiller.backward(losses, share * total / len(parts), SimpleNamespace(scaler=None))
    distiller.before_update()
    optim.step()
    optim.zero_grad()
    return losses, observed


@pytest.mark.parametrize("adm", [None, ADMConfig()])
def test_a_paused_teacher_does_not_move_but_its_batchnorm_statistics_do(adm: ADMConfig | None) -> None:
    distiller = real(adm)
    optim = distiller.optimizer.make(distiller.parameter_groups())

    def momenta() -> list[Tensor]:
        return [optim.state[p]["momentum_buffer"].clone() for p in distiller.parameters_of("teacher")]

    def statistics() -> list[Tensor]:
        return [b.clone() for name, b in distiller.networks["teacher"].named_buffers() if "running" in name]

    for _ in range(2):
        before = snapshot(distiller, "teacher")
        losses, observed = step(distiller, distiller, optim, LEARNING)
        assert observed["teacher/paused"] == 0 and moved(distiller, "teacher", before)
        assert all(value.item() > 0 for value in losses["teacher"].values())
    assert all(m.any() for m in momenta())
    teacher, kept = snapshot(distiller, "teacher"), momenta()
    for _ in range(3):
        student, seen = snapshot(distiller, "student"), statistics()
        losses, observed = step(distiller, distiller, optim, EXPERT)
        assert observed.keys() == {"teacher/paused"} and observed["teacher/paused"] == 1
        assert losses["teacher"].keys() >= {"ce", "kd"} and not any(v.item() for v in losses["teacher"].values())
        assert not moved(distiller, "teacher", teacher) and moved(distiller, "student", student)
        assert all(torch.equal(a, b) for a, b in zip(kept, momenta(), strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(seen, statistics(), strict=True))
    step(distiller, distiller, optim, LEARNING)
    assert moved(distiller, "teacher", teacher)


def test_with_adm_a_paused_teacher_gets_no_divergence_and_the_student_all_of_its_own() -> None:
    config = ADMConfig(0.3, 0.7, 0.5)
    distiller = believing(distiller_of(SwitOKD(with_adm=True), config), BELIEFS)
    alone = believing(distiller_of(Vanilla(with_adm=True), config), BELIEFS)
    for target, learns in ((EXPERT, 0.0), (LEARNING, 1.0)):
        batch = {**batch_of(), "target": target}
        losses, wanted = distiller(batch, START)[0], alone(batch, START)[0]
        assert distiller.method.gates["teacher"] == learns
        assert losses["teacher"].keys() == {"ce", "kd", "divergence"}
        assert losses["student"].keys() == {"ce", "kd", "consensus", "phi", "feature"}
        for term in ("consensus", "phi", "feature"):
            assert torch.equal(losses["student"][term], wanted["student"][term])
        assert torch.equal(losses["teacher"]["divergence"], learns * wanted["teacher"]["divergence"])
        teacher, student = (list(distiller.networks[role].parameters()) for role in ONE)
        for gradient in torch.autograd.grad(sum(losses["teacher"].values()), teacher):
            assert gradient.any() if learns else not gradient.any()
        ours = losses["student"]["consensus"] + losses["student"]["feature"]
        assert all(gradient.any() for gradient in torch.autograd.grad(ours, student))


def test_one_of_two_teachers_pauses() -> None:
    distiller = distiller_of(SwitOKD(), roles=TWO_TEACHERS, optimizer=OptimizerConfig(weight_decay=0.1))
    believing(distiller, {**BELIEFS, "teacher_2": (0, 0, 0, 1, 0)})
    optim = distiller.optimizer.make(distiller.parameter_groups())
    before = {role: snapshot(distiller, role) for role in TWO_TEACHERS}
    _, observed = step(distiller, distiller, optim, EXPERT)
    assert {name: value.item() for name, value in observed.items()} == {"teacher/paused": 1, "teacher_2/paused": 0}
    assert [role for role in TWO_TEACHERS if moved(distiller, role, before[role])] == ["teacher_2", "student"]


def test_a_teacher_of_two_students_pauses_only_if_it_is_ahead_of_both() -> None:
    for belief, learns in (((0.95, 0.05, 0, 0, 0), True), (BELIEFS["student"], False)):
        distiller = distiller_of(SwitOKD(), roles=TWO_STUDENTS)
        believing(distiller, {**BELIEFS, "student_2": belief})
        optim = distiller.optimizer.make(distiller.parameter_groups())
        before = snapshot(distiller, "teacher")
        losses, _ = step(distiller, distiller, optim, EXPERT)
        assert moved(distiller, "teacher", before) is learns
        assert (losses["teacher"]["ce"].item() > 0) is (losses["teacher"]["kd"].item() > 0) is learns


def test_in_the_authors_code_momentum_and_weight_decay_move_a_paused_teacher() -> None:
    lr, momentum, decay = 0.01, 0.9, 0.1
    optimizer = OptimizerConfig(lr=lr, momentum=momentum, weight_decay=decay)
    beliefs = {**BELIEFS, "student_2": BELIEFS["student"]}
    method = SwitOKD(SwitOKDOptions(official_quirks=True))
    distiller = believing(distiller_of(method, roles=TWO_STUDENTS, optimizer=optimizer), beliefs)
    optim = distiller.optimizer.make(distiller.parameter_groups())
    step(distiller, distiller, optim, LEARNING)
    parameters = distiller.parameters_of("teacher")
    wanted = []
    for p in parameters:
        velocity = momentum * optim.state[p]["momentum_buffer"] + decay * p.detach()
        wanted.append(p.detach() - lr * velocity)
    losses, observed = step(distiller, distiller, optim, EXPERT)
    assert not observed and not any(value.item() for value in losses["teacher"].values())
    for p, w in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w)


def test_accumulated_parts_decide_each_for_itself() -> None:
    for parts, pauses in (((EXPERT, LEARNING), False), ((LEARNING, EXPERT), False), ((EXPERT, EXPERT), True)):
        distiller = believing(distiller_of(SwitOKD()), BELIEFS)
        optim = distiller.optimizer.make(distiller.parameter_groups())
        before = snapshot(distiller, "teacher")
        step(distiller, distiller, optim, *parts)
        assert moved(distiller, "teacher", before) is not pauses
        if pauses:
            continue
        alone = believing(distiller_of(SwitOKD()), BELIEFS)  # half the step of the part that learns, and no more
        other = alone.optimizer.make(alone.parameter_groups())
        step(alone, alone, other, LEARNING, share=0.5)
        for p, q in zip(distiller.parameters_of("teacher"), alone.parameters_of("teacher"), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("target", [EXPERT, LEARNING])
@pytest.mark.parametrize("roles", [ONE, TWO_STUDENTS, TWO_TEACHERS])
def test_each_network_runs_once_and_the_host_reads_nothing_in_a_forward(roles: tuple[str, ...], target: Tensor) -> None:
    distiller = believing(distiller_of(SwitOKD(with_adm=True), ADMConfig(), roles), BELIEFS)
    with HostReads() as mode:
        losses, _ = distiller({**batch_of(), "target": target}, START)
        sum(value for terms in losses.values() for value in terms.values()).backward()
    assert mode.reads == 0
    for network in distiller.networks.values():
        assert network.features_calls == 1


# --- two processes ----------------------------------------------------------------------------------------------------

# All labels, then those of the first process (3 images) against the second's (2): in the third step the first alone
# would learn and in the second the second; there, means that do not count the images would let the teacher learn too.
STEPS = ([2, 2, 2, 2, 2], [0, 2, 0, 2, 0], [2, 0, 2, 0, 2], [0, 0, 0, 0, 0])
PAUSED = [0.0, 1.0, 0.0, 1.0]


def train(rank: int | None, world: int) -> tuple[list[float], list[Tensor]]:
    """Four steps on this process's share: which of them paused the teacher, and all parameters after each."""
    optimizer = OptimizerConfig(lr=0.01, weight_decay=0.1)
    distiller = believing(distiller_of(SwitOKD(), optimizer=optimizer), BELIEFS)
    optim = optimizer.make(distiller.parameter_groups())
    module = distiller if rank is None else nn.parallel.DistributedDataParallel(distiller)
    real_batch = images(5)
    paused, parameters = [], []
    for labels in STEPS:
        own = slice(rank or 0, None, world)
        target = torch.tensor(labels)[own]
        share = len(target) * world / len(labels)
        losses, observed = module({"image": real_batch[own], "target": target, "weight": share}, START)
        total = sum(value for terms in losses.values() for value in terms.values())
        distiller.backward(losses, share * total, SimpleNamespace(scaler=None))
        distiller.before_update()
        optim.step()
        optim.zero_grad()
        paused.append(observed["teacher/paused"].item())
        parameters.append(nn.utils.parameters_to_vector(distiller.parameters()).detach())
    return paused, parameters


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(train(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_decide_and_move_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
    paused, parameters = train(None, 1)
    assert paused == PAUSED
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for their_paused, their_parameters in both:
        assert their_paused == PAUSED
        for a, b in zip(their_parameters, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(both[0][1], both[1][1], strict=True))


# --- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [ONE, TWO_STUDENTS, TWO_TEACHERS, ("student", "teacher")])
def test_the_three_forms_are_taken(roles: tuple[str, ...]) -> None:
    SwitOKD().check(TrainConfig(), roles, [])


@pytest.mark.parametrize(
    "roles",
    [
        (),
        ("student",),
        ("teacher",),
        ("student", "student_2"),
        ("teacher", "teacher_2"),
        ("teacher", "student_2"),
        ("teacher", "teacher_2", "student", "student_2"),
        ("teacher", "student", "student_2", "student_3"),
    ],
)
def test_other_networks_are_refused(roles: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"SwitOKD trains teacher \+ student, or teacher \+ student \+ student_2, or "):
        SwitOKD().check(TrainConfig(), roles, [])


def test_wrong_options_are_refused() -> None:
    for options in ({"tau": 0.0}, {"tau": -1.0}, {"weight": -0.1}):
        with pytest.raises(InputError, match=r"switokd\.(tau|weight) must"):
            SwitOKDOptions(**options)
    with pytest.raises(InputError, match=r"switokd.official_quirks .* no ADM"):
        quirks = SwitOKD(SwitOKDOptions(official_quirks=True), with_adm=True)
        quirks.check(TrainConfig(), ["teacher", "student"], [])


def test_the_command_line_knows_it() -> None:
    networks = ["--networks.teacher.name", "cifar_resnet14", "--networks.student.name", "cifar_resnet8"]
    command = parse_command(["--method", "switokd+adm", "--switokd.tau", "2", *networks])
    assert command.options == SwitOKDOptions(tau=2.0)
    assert command.resolved()["switokd"] == {"tau": 2.0, "weight": 1.0, "official_quirks": False}
