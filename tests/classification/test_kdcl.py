"""KDCL: its targets against what defines them, who imitates what, its views, and the weights from held-out images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import arguments
from test_methods import START, HostReads, batch_of, distiller_of, images, make_step, reached
from torch import Tensor

from classification.config import TrainConfig, parse_command
from classification.distiller import ClassificationDistiller
from classification.experiment import build
from classification.methods import METHODS
from classification.methods.kdcl import (
    KDCL,
    KDCLOptions,
    combine,
    error_correlation,
    general_weights,
    linear_weights,
    min_logit_target,
    naive_target,
)
from core.adm import ADMConfig
from core.errors import InputError
from core.training.distiller import Progress

VARIANTS: Any = ("minlogit", "naive", "linear", "general", "mean")
GENERAL = KDCLOptions(variant="general")


def logits_of(m: int, count: int = 200, classes: int = 10, scale: float = 3.0, dtype: Any = torch.float64) -> Any:
    """Logits ``[M, B, K]`` of networks that agree in part, and labels that they mostly know."""
    torch.manual_seed(m)
    targets = torch.randint(classes, (count,))
    common = torch.randn(count, classes, dtype=torch.float64)
    common[torch.arange(count), targets] += 2 * torch.rand(count, dtype=torch.float64)
    return (scale * (common + 0.7 * torch.randn(m, count, classes, dtype=torch.float64))).to(dtype), targets


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``[..., B, K]`` -> ``[..., B]``, in float64."""
    log_p = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    return torch.stack([-log_p[..., b, y] for b, y in enumerate(targets.tolist())], dim=-1)


def with_views(count: int = 6, views: int = 2) -> dict[str, Any]:
    return {**batch_of(count), "image": torch.stack([images(count, seed=k + 1) for k in range(views)], dim=1)}


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
def test_min_logit_is_the_least_distance_to_the_label_and_beats_every_network(m: int) -> None:
    logits, targets = logits_of(m)
    target = min_logit_target(logits, targets)
    for b, y in enumerate(targets.tolist()):
        assert target[b, y] == 0
        for k in range(logits.shape[2]):
            assert target[b, k].item() == min((logits[i, b, k] - logits[i, b, y]).item() for i in range(m))
    least = cross_entropy(logits, targets).amin(dim=0)
    assert (cross_entropy(target, targets) <= least + 1e-12).all()
    assert (cross_entropy(target, targets) < least - 0.01).any()


@pytest.mark.parametrize("m", [2, 3])
def test_naive_takes_the_best_network_of_each_sample_and_not_of_the_batch(m: int) -> None:
    logits, targets = logits_of(m)
    target, losses = naive_target(logits, targets), cross_entropy(logits, targets)
    chosen = [min(range(m), key=lambda i: losses[i, b].item()) for b in range(len(targets))]
    assert set(chosen) == set(range(m))  # a choice for the batch would be one network
    for b, i in enumerate(chosen):
        assert torch.equal(target[b], logits[i, b])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("m", "scale", "near"), [(2, 1.0, 0), (2, 10.0, 0), (3, 1.0, 1e-4), (3, 5.0, 2e-2)])
def test_linear_is_the_best_convex_combination_of_each_sample(m: int, scale: float, near: float, dtype: Any) -> None:
    logits, targets = logits_of(m, count=100, scale=scale, dtype=dtype)
    weights = linear_weights(logits, targets)
    assert weights.shape == (m, len(targets)) and weights.dtype == dtype
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(len(targets), dtype=dtype), rtol=0, atol=1e-6)
    found = cross_entropy(combine(weights, logits), targets)
    tiny = 1e-12 if dtype == torch.float64 else 1e-5
    assert (found <= cross_entropy(logits, targets).amin(dim=0) + tiny).all()
    steps = 100 if m == 2 else 20
    corners = itertools.product(range(steps + 1), repeat=m - 1)
    grid = [(*c, steps - sum(c)) for c in corners if sum(c) <= steps]
    points = torch.tensor(grid, dtype=torch.float64) / steps  # [points, M]
    on_grid = cross_entropy(torch.einsum("pm,mbk->pbk", points, logits.double()), targets).amin(dim=0)
    assert (found <= on_grid + near + tiny).all()
    assert (weights.amin(dim=0) > 0.05).any() and (weights.amax(dim=0) > 0.999).any()  # inside, and at a corner


def test_linear_differs_from_sample_to_sample() -> None:
    logits, targets = logits_of(2)
    weights = linear_weights(logits, targets)
    for b in (0, 7, 33):  # each sample as if it were alone
        torch.testing.assert_close(linear_weights(logits[:, b : b + 1], targets[b : b + 1]), weights[:, b : b + 1])
    assert weights[0].std() > 0.1


@pytest.mark.parametrize("m", [2, 3])
def test_general_is_the_combination_of_least_squared_error(m: int) -> None:
    logits, targets = logits_of(m)
    correlation = error_correlation(logits.float(), targets) / len(targets)
    wanted = torch.zeros(m, m, dtype=torch.float64)
    for b, y in enumerate(targets.tolist()):
        errors = [logits[i, b].exp() / logits[i, b].exp().sum() for i in range(m)]
        for own in errors:
            own[y] -= 1
        for i, j in itertools.product(range(m), repeat=2):
            wanted[i, j] += (errors[i] * errors[j]).sum() / len(targets)
    torch.testing.assert_close(correlation, wanted, rtol=1e-6, atol=1e-8)
    weights = general_weights(wanted)
    inverse = torch.linalg.inv(wanted + 1e-6 * torch.eye(m, dtype=torch.float64))
    torch.testing.assert_close(weights, inverse.sum(dim=1) / inverse.sum(), rtol=1e-9, atol=0)
    assert weights.sum().item() == pytest.approx(1)

    def error(w: Tensor) -> float:
        return float(w @ wanted @ w)

    for i, j in itertools.permutations(range(m), 2):  # no better one beside it
        moved = weights.clone()
        moved[i], moved[j] = moved[i] + 0.01, moved[j] - 0.01
        assert error(weights) < error(moved)


def test_general_may_weigh_a_network_negatively() -> None:
    weights = general_weights(torch.tensor([[1.0, 1.5], [1.5, 4.0]], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([1.25, -0.25], dtype=torch.float64), rtol=1e-5, atol=0)


def solved(variant: str, logits: Tensor, targets: Tensor) -> Tensor:
    method = KDCL(KDCLOptions(variant=variant))  # type: ignore[arg-type]
    method.prepare(dict.fromkeys(map(str, range(len(logits))), torch.nn.Identity()), {})
    if variant == "general":
        named = {str(i): z for i, z in enumerate(logits)}
        method.before_epoch(1, [(named, targets)])
    return method.target_logits(list(logits), targets)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m", [2, 3])
def test_extreme_logits_stay_finite(m: int, variant: str) -> None:
    logits = torch.zeros(m, 6, 5)
    logits[0, :, 0], logits[1, :, 1], logits[-1, :3] = 1e4, -1e4, 1e4
    targets = torch.arange(6) % 5
    target = solved(variant, logits, targets)
    assert target.isfinite().all()
    if variant in ("minlogit", "naive", "linear"):
        assert (cross_entropy(target, targets) <= cross_entropy(logits, targets).amin(dim=0) * (1 + 1e-6) + 1e-6).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m", [2, 3])
def test_equal_networks_are_their_own_target(m: int, variant: str) -> None:
    one, targets = logits_of(1, dtype=torch.float32)  # C is singular, and no combination better than another
    target = solved(variant, one.expand(m, -1, -1), targets)
    torch.testing.assert_close(target.softmax(-1), one[0].softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_network_without_errors_stays_finite() -> None:
    torch.testing.assert_close(general_weights(torch.zeros(3, 3).double()), torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_are_at_least_float32_also_under_autocast(variant: str) -> None:
    logits, targets = logits_of(3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        target = solved(variant, logits, targets)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, solved(variant, logits.float(), targets), rtol=1e-5, atol=1e-5)
    logits, targets = logits_of(3)
    assert solved(variant, logits, targets).dtype == torch.float64


# --- losses -----------------------------------------------------------------------------------------------------------


def defined_target(variant: str, logits: Tensor, targets: Tensor) -> Tensor:
    """z_t ``[B, K]`` by loops; linear by a fine grid, general in epoch 0."""
    m = len(logits)
    if variant in ("general", "mean"):
        return sum(logits) / m  # type: ignore[return-value]
    rows = []
    for b, y in enumerate(targets.tolist()):
        z = logits[:, b]
        if variant == "minlogit":
            rows.append(torch.stack([min(z[i, k] - z[i, y] for i in range(m)) for k in range(z.shape[1])]))
        elif variant == "naive":
            rows.append(min(z, key=lambda row: float(cross_entropy(row[None], targets[b : b + 1]))))
        else:
            mixed = [a * z[0] + (1 - a) * z[1] for a in torch.linspace(0, 1, 401).tolist()]
            rows.append(min(mixed, key=lambda row: float(cross_entropy(row[None], targets[b : b + 1]))))
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tau", "weight"), [(1.0, 1.0), (2.0, 0.3)])
def test_every_network_imitates_the_one_target(variant: Any, tau: float, weight: float) -> None:
    roles = ("teacher", "student") if variant == "linear" else ("teacher", "teacher_2", "student")
    method = KDCL(KDCLOptions(variant=variant, tau=tau, weight=weight))
    distiller = distiller_of(method, roles=roles, dtype=torch.float64)
    batch = batch_of(9)
    losses, _ = distiller(batch, START)
    logits = torch.stack([o.logits for o in distiller.outputs(batch["image"]).values()])
    target = defined_target(variant, logits, batch["target"])
    p = (target / tau).softmax(-1)
    assert list(losses) == list(roles)
    for role, z in zip(roles, logits, strict=True):
        assert losses[role].keys() == {"ce", "kd"}
        wanted = tau**2 * (p * (p.log() - (z / tau).log_softmax(-1))).sum() / len(z)
        close = 1e-2 if variant == "linear" else 1e-9
        assert losses[role]["kd"].item() == pytest.approx(weight * wanted.item(), rel=close, abs=close * 1e-2)
        assert losses[role]["ce"].item() == pytest.approx(cross_entropy(z, batch["target"]).mean().item(), rel=1e-9)
    alone = distiller_of(KDCL(KDCLOptions(variant=variant, weight=0.0)), roles=roles)
    assert all(terms.keys() == {"ce"} for terms in alone(batch, START)[0].values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_target_gets_no_gradient(variant: Any) -> None:
    distiller = distiller_of(KDCL(KDCLOptions(variant=variant)))
    losses, _ = distiller(with_views(), START)
    for role, terms in losses.items():
        assert reached(distiller, terms["ce"]) == reached(distiller, terms["kd"]) == {role}
    # The gradient is softmax(z_i) - softmax(z_t), nothing through the target, which z_i is a part of.
    method = distiller.method
    z = {role: torch.randn(4, 5, requires_grad=True) for role in ("teacher", "student")}
    outputs: Any = {role: type("Output", (), {"logits": logits}) for role, logits in z.items()}
    batch = {"target": torch.arange(4)}
    target = method.target_logits(list(z.values()), batch["target"])
    assert not target.requires_grad
    terms = method.losses(outputs, batch, START)
    for role, logits in z.items():
        (gradient,) = torch.autograd.grad(terms[role]["kd"], logits)
        torch.testing.assert_close(gradient, (logits.softmax(-1) - target.softmax(-1)).detach() / 4)


@pytest.mark.parametrize("variant", ["minlogit", "linear", "mean"])
def test_the_best_network_imitates_the_target_too(variant: Any) -> None:
    logits, targets = logits_of(2, count=8, classes=5, dtype=torch.float32)
    logits[0, torch.arange(8), targets] += 10
    logits[1, torch.arange(8), (targets + 1) % 5] -= 30
    assert (cross_entropy(logits[0], targets) < cross_entropy(logits[1], targets)).all()  # better on every image
    outputs: Any = {
        role: type("Output", (), {"logits": z.clone().requires_grad_()})
        for role, z in zip(("teacher", "student"), logits, strict=True)
    }
    losses = KDCL(KDCLOptions(variant=variant)).losses(outputs, {"target": targets}, START)
    best = outputs["teacher"].logits
    gradient = torch.autograd.grad(losses["teacher"]["kd"], best, allow_unused=True)[0]
    assert gradient is not None
    if variant != "linear":  # whose best combination may be that network itself
        assert losses["teacher"]["kd"] > 0 and gradient.abs().max() > 0


def test_options_and_networks_that_make_no_sense_are_refused() -> None:
    for options in ({"tau": 0.0}, {"tau": -1.0}, {"weight": -0.1}):
        with pytest.raises(InputError, match=r"kdcl\.(tau|weight) must"):
            KDCLOptions(**options)
    with pytest.raises(InputError, match="KDCL needs at least 2 networks"):
        KDCL().check(TrainConfig(), ("student",), [])


def test_options_on_the_command_line(tmp_path: Path) -> None:
    command = parse_command(arguments(tmp_path, "--kdcl.variant", "linear", "--kdcl.tau", "2", method="kdcl"))
    assert METHODS["kdcl"] is KDCL and command.options == KDCLOptions(variant="linear", tau=2.0)
    assert parse_command(arguments(tmp_path, method="kdcl")).options == KDCLOptions("minlogit", 1.0, 1.0, None)
    with pytest.raises(InputError, match="min_logit"):
        parse_command(arguments(tmp_path, "--kdcl.variant", "min_logit", method="kdcl"))


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("adm", [None, ADMConfig()])
def test_each_network_runs_once_a_step_and_nothing_is_read_from_the_device(variant: Any, adm: Any) -> None:
    roles = ("teacher", "student", "student_2")
    distiller = distiller_of(KDCL(KDCLOptions(variant=variant), with_adm=adm is not None), adm, roles)
    optim = distiller.optimizer.make(distiller.parameter_groups())
    with HostReads() as mode:
        make_step(distiller, optim)
    assert mode.reads == 0
    assert {network.features_calls for network in distiller.networks.values()} == {1}
    assert distiller.phases == (roles,)  # all step together


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "with_adm", "wanted"),
    [(None, False, "separate"), (None, True, "shared"), ("shared", False, "shared"), ("shared", True, "shared"),
     ("separate", False, "separate")],
)  # fmt: skip
def test_views_are_separate_alone_and_shared_with_adm(views: Any, with_adm: bool, wanted: str) -> None:
    assert KDCL(KDCLOptions(views=views), with_adm=with_adm).views == wanted


def test_adm_refuses_separate_views(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"location \(i, j\).*different content.*kdcl.views shared or --method kdcl"):
        KDCL(KDCLOptions(views="separate"), with_adm=True)
    with pytest.raises(InputError, match="does not go with ADM"):
        build(parse_command(arguments(tmp_path, "--kdcl.views", "separate", method="kdcl+adm")))


def test_the_loader_gives_a_view_to_each_network_alone_and_one_to_all_with_adm(tmp_path: Path) -> None:
    shapes = {}
    for method in ("kdcl", "kdcl+adm"):
        experiment = build(parse_command(arguments(tmp_path, method=method)))
        batch = next(iter(experiment.train_loader(None)))
        shapes[method] = tuple(batch["image"].shape)
        seen = experiment.distiller.views(batch["image"])
        if method == "kdcl":
            assert not torch.equal(seen["teacher"], seen["student"])
            for k, role in enumerate(("teacher", "student")):
                assert torch.equal(seen[role], experiment.distiller.views(batch["image"][:, k])[role])
        else:  # the view that ADM compares: the one that both networks were given
            assert seen["teacher"] is seen["student"]
            losses, _ = experiment.distiller(batch, START)
            assert {"consensus", "feature", "kd"} < losses["student"].keys() and "divergence" in losses["teacher"]
    assert shapes == {"kdcl": (12, 2, 3, 8, 8), "kdcl+adm": (12, 3, 8, 8)}


def test_separate_views_reach_their_network_and_one_target() -> None:
    distiller = distiller_of(KDCL())
    batch = with_views()
    losses, _ = distiller(batch, START)
    own = [distiller.outputs(batch["image"][:, k])[role].logits for k, role in enumerate(("teacher", "student"))]
    target = min_logit_target(torch.stack(own), batch["target"])
    for role, z in zip(("teacher", "student"), own, strict=True):
        wanted = F.kl_div(z.log_softmax(-1), target.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(losses[role]["kd"], wanted)
        torch.testing.assert_close(losses[role]["ce"], F.cross_entropy(z, batch["target"]))


# --- general: held-out images -----------------------------------------------------------------------------------------


class HeldOut:
    """Three batches, and how often they were passed over."""

    passes = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.passes += 1
        for k in range(3):
            yield {"image": images(5, seed=20 + k), "target": torch.arange(5)}


def at(epoch: float) -> Progress:
    return Progress(int(10 * epoch), epoch, 40, 4.0)


def held_out_weights(distiller: ClassificationDistiller) -> Tensor:
    """w from the definition, with all held-out images in one."""
    batches = list(HeldOut())
    said = [distiller.outputs(batch["image"]) for batch in batches]
    probabilities = torch.stack(
        [torch.cat([outputs[role].logits for outputs in said]).double().softmax(-1) for role in distiller.networks]
    )
    errors = (probabilities - torch.eye(5).repeat(3, 1)).flatten(1)  # [M, 15 * 5]
    correlation = errors @ errors.T / 15 + 1e-6 * torch.eye(len(errors))
    inverse = torch.linalg.inv(correlation)
    return inverse.sum(dim=1) / inverse.sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_general_needs_held_out_images(variant: Any) -> None:
    method = KDCL(KDCLOptions(variant=variant))
    distiller = distiller_of(method)
    assert method.needs_held_out is (variant == "general") and KDCL.needs_held_out is False
    assert ("method.weights" in distiller.state_dict()) is (variant == "general")


@pytest.mark.parametrize("adm", [None, ADMConfig()])
def test_general_passes_over_the_held_out_images_once_an_epoch_from_the_second_on(adm: ADMConfig | None) -> None:
    roles = ("teacher", "student", "student_2")
    distiller = distiller_of(KDCL(GENERAL, with_adm=adm is not None), adm, roles)
    optim = distiller.optimizer.make(distiller.parameter_groups())
    held_out = distiller.held_out = HeldOut()
    distiller.train()
    equal = torch.full((3,), 1 / 3)  # the helper casts the module to float32
    calls = 0
    for epoch, passes in ((0, 0), (0.5, 0), (1, 1), (1.5, 1), (2, 2)):
        distiller.before_step(batch_of(), at(epoch))
        assert held_out.passes == passes and distiller.training
        calls += 3 if passes and epoch == int(epoch) else 0  # held-out batches
        assert {network.features_calls for network in distiller.networks.values()} == {calls}
        weights: Any = distiller.method.weights
        if epoch < 1:
            assert torch.equal(weights, equal)
        elif epoch == int(epoch):
            wanted = held_out_weights(distiller)
            calls += 3  # by the line above
            torch.testing.assert_close(weights, wanted.float(), rtol=1e-4, atol=1e-5)
            assert weights.sum().item() == pytest.approx(1, abs=1e-5) and not torch.equal(weights, equal)
        kept = weights.clone()
        make_step(distiller, optim)
        calls += 1
        assert torch.equal(weights, kept)
    held_out_again = distiller.method.weights.clone()  # type: ignore[operator]
    before = distiller.outputs(images(6))
    losses, _ = distiller(batch_of(), START)
    z = torch.stack([output.logits for output in before.values()])
    target = (held_out_again[:, None, None] * z).sum(0)
    for role, own in zip(roles, z, strict=True):
        wanted = F.kl_div(own.log_softmax(-1), target.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(losses[role]["kd"], wanted)


def test_epoch_0_does_not_begin_to_read_the_held_out_images() -> None:
    method = KDCL(GENERAL)
    method.prepare(dict.fromkeys("ab", torch.nn.Identity()), {})

    def never() -> Iterator[Any]:
        raise AssertionError("read")
        yield

    method.before_epoch(0, never())
    assert method.weights.tolist() == [0.5, 0.5]
    with pytest.raises(AssertionError, match="read"):
        method.before_epoch(1, never())


def test_general_goes_on_with_its_weights_after_a_resume() -> None:
    one, other = distiller_of(KDCL(GENERAL)), distiller_of(KDCL(GENERAL))
    one.held_out = HeldOut()
    one.before_step(batch_of(), at(1))
    state = {k: v for k, v in one.state_dict().items() if not k.startswith("networks.")}  # as a checkpoint keeps it
    other.load_state_dict(state, strict=False)
    other.before_step(batch_of(), at(1.5))  # in the middle: no pass, for which there is nothing to pass over
    assert torch.equal(one.method.weights, other.method.weights)  # type: ignore[arg-type]
    assert not torch.equal(other.method.weights, torch.full((2,), 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [7, 0])
def test_general_sums_over_the_processes(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = logits_of(2, count=20)

    def method() -> KDCL:
        made = KDCL(GENERAL)
        made.prepare(dict.fromkeys("ab", torch.nn.Identity()), {})
        return made

    def part(rows: slice) -> list[Any]:
        return [({"a": logits[0, rows], "b": logits[1, rows]}, targets[rows])] if len(targets[rows]) else []

    whole = method()
    whole.before_epoch(1, part(slice(None)))
    sums: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sums.append(x.clone()))
    method().before_epoch(1, part(slice(share, None)))  # what the other process has
    reduced: list[Tensor] = []

    def all_reduce(x: Tensor) -> None:
        reduced.append(x.add_(sums[0]))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    own = method()
    own.before_epoch(1, part(slice(share)))  # a process without an image takes part too
    assert len(reduced) == 1
    torch.testing.assert_close(own.weights, whole.weights)
    assert not math.isclose(whole.weights[0].item(), 0.5, abs_tol=1e-3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["kdcl", "kdcl+adm"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["", "dry"])
def test_general_without_held_out_images_ends_before_training(
    method: str, dry: tuple[str, ...], tmp_path: Path, command: Callable[[list[str]], tuple[int, str, str]]
) -> None:
    code, _, said = command(arguments(tmp_path / "run", "--kdcl.variant", "general", *dry, method=method))
    assert code == 2 and len(said.splitlines()) == 1
    assert "kdcl.variant general" in said and "--data.validation 0.1" in said
    assert not (tmp_path / "run").exists()
