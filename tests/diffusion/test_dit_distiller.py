"""The distillation of diffusion transformers: losses in float64, who learns from what, gate, labels, averages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_dit import dit
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from core.errors import InputError
from core.training.distiller import Progress
from diffusion.dit.distiller import ADMConfig, DistillConfig, DiTDistiller
from diffusion.dit.model import DiT, DiTConfig

STUDENT = DiTConfig(None, width=16, depth=2, heads=2, patch=2)
TEACHER = DiTConfig(None, width=24, depth=2, heads=3, patch=2)
START = Progress(0, 0.0, 100, 10.0)
TIMES = [0, 1, 399, 400, 999, 250]


def network(config: DiTConfig, seed: int, channels: int = 1) -> DiT:
    """8 x 8 pixels in 4 x 4 tokens, five classes."""
    return dit(config, channels, 8, 5, seed)


def a_run(adm: ADMConfig | None = None, *, online: bool = False, channels: int = 1, **options: Any) -> DiTDistiller:
    """A pair of other widths in float64."""
    networks = network(STUDENT, 1, channels), network(TEACHER, 2, channels)
    torch.manual_seed(3)  # phi
    return DiTDistiller(*networks, online=online, adm=adm, **options).double()


def a_batch(times: list[int], channels: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (len(times), channels, 8, 8)
    image = (torch.rand(shape, dtype=dtype, generator=generator) * 256).floor() / 127.5 - 1
    noise = torch.randn(shape, dtype=dtype, generator=generator)
    label = torch.arange(len(times)) % 6  # 5 is the null label
    return {"image": image.clamp(-1, 1), "label": label, "noise": noise, "t": torch.tensor(times)}


def total(losses: dict[str, dict[str, Tensor]]) -> Tensor:
    return torch.stack([value for terms in losses.values() for value in terms.values()]).sum()


def see(model: DiT, z: Tensor, t: int, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image: output ``[2C, H, W]``, tokens after the last block ``[N, D]``, and after the last norm."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.update(tokens=out[0])),
        model.final_layer.linear.register_forward_pre_hook(lambda _m, inputs: seen.update(normed=inputs[0][0])),
    ]
    output = model(z[None], torch.tensor([t]), torch.tensor([label]))[0]
    for hook in hooks:
        hook.remove()
    return output, seen["tokens"], seen["normed"]


def bound(eps: Tensor, v: Tensor, x: Tensor, z: Tensor, t: int) -> float:
    """The variational bound of one image by the textbook: means of x and z, torch's divergence, normal cdf."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cat((torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)))  # bar[t + 1] is that of time t

    def posterior(k: int) -> Tensor:
        return beta[k] * (1 - bar[k]) / (1 - bar[k + 1])

    log_small = posterior(max(t, 1)).log()
    log_sigma = (v + 1) / 2 * beta[t].log() + (1 - v) / 2 * log_small
    seen_x = (z - (1 - bar[t + 1]).sqrt() * eps) / bar[t + 1].sqrt()

    def mean(clean: Tensor) -> Tensor:
        share = beta[t] * bar[t].sqrt() / (1 - bar[t + 1])
        return share * clean + (1 - bar[t]) * (1 - beta[t]).sqrt() / (1 - bar[t + 1]) * z

    guess = Normal(mean(seen_x), (log_sigma / 2).exp())
    if t > 0:
        nats = kl_divergence(Normal(mean(x), posterior(t).sqrt()), guess)
    else:
        below = torch.where(x < -0.999, 0.0, guess.cdf(x - 1 / 255))
        above = torch.where(x > 0.999, 1.0, guess.cdf(x + 1 / 255))
        nats = -(above - below).clamp(min=1e-12).log()
    return nats.mean().item() / math.log(2)


def expected(run: DiTDistiller, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """All losses image by image, token by token, pixel by pixel."""
    adm, distill, count = run.adm, run.distill, len(batch["t"])
    student, teacher = (run.networks[role] for role in ("student", "teacher"))
    channels = batch["image"].shape[1]
    used = 2 * channels if distill.sigma else channels
    found = {role: dict.fromkeys(("mse", "vlb"), 0.0) for role in ("teacher", "student")}
    for name in ("distill", "consensus", "feature", "phi"):
        found["student"][name] = 0.0
    found["teacher"]["divergence"] = 0.0
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    for x, label, eps, t in zip(*(batch[k] for k in ("image", "label", "noise", "t")), strict=True):
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        z = a * x + s * eps
        o, tokens_s, normed_s = see(student, z, int(t), int(label))  # type: ignore[arg-type]
        y, tokens_t, normed_t = see(teacher, z, int(t), int(label))  # type: ignore[arg-type]
        for role, output in (("student", o), ("teacher", y)):
            found[role]["mse"] += (output[:channels] - eps).square().mean().item() / count
            found[role]["vlb"] += bound(output[:channels], output[channels:], x, z, int(t)) / count
        found["student"]["distill"] += (o - y)[:used].square().mean().item() / count
        if adm is None:
            continue
        maps = (normed_s, normed_t) if adm.map == "final_norm" else (tokens_s, tokens_t)
        phi = run.adapter.conv.weight[:, :, 0, 0]  # type: ignore[union-attr]
        projected = maps[0] @ phi.T
        similar = [float(torch.cosine_similarity(projected[n], maps[1][n], dim=0)) for n in range(16)]
        mean = sum(similar) / 16
        opened = 1.0 if t < 400 else 0.0
        consensus = divergence = 0.0
        for row in range(8):
            for column in range(8):
                n = (row // 2) * 4 + column // 2  # tokens lie row by row
                error = (o - y)[:used, row, column].square().sum().item()
                consensus += (1 + similar[n]) / (1 + mean + 1e-5) * error / (used * 64)
                error = (y[:channels] - eps)[:, row, column].square().sum().item()
                divergence += (1 - similar[n]) / (1 - mean + 1e-5) * error / (channels * 64)
        found["student"]["consensus"] += adm.alpha * opened * consensus / count
        found["teacher"]["divergence"] += adm.beta * opened * divergence / count
        residual = (projected - maps[1]).square().mean().item() / count
        found["student"]["phi"] += residual
        found["student"]["feature"] += adm.gamma * residual
    for name in ("mse", "vlb"):
        found["student"][name] *= distill.task_weight
    found["student"]["distill"] *= distill.weight
    return found


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    ("adm", "distill", "channels"),
    [
        (None, DistillConfig(weight=0.3), 1),
        (ADMConfig(alpha=0.5, beta=0.7), DistillConfig(task_weight=0.25), 2),
        (ADMConfig(map="final_norm", gamma=0.2), DistillConfig(sigma=True), 1),
    ],
)
@torch.no_grad()
def test_losses_equal_their_definition(
    adm: ADMConfig | None, distill: DistillConfig, channels: int, online: bool
) -> None:
    run = a_run(adm, online=online, distill=distill, channels=channels)
    batch = a_batch(TIMES, channels)
    losses, observed = run(batch, START)
    names = ["mse", "vlb", "distill"]
    if adm is not None:
        names += ["consensus", "phi", *(["feature"] if adm.gamma else [])]
        assert observed["adm/active"].item() == pytest.approx(4 / 6)
    wanted = {"student": names}
    if online:
        wanted["teacher"] = ["mse", "vlb", *(["divergence"] if adm is not None else [])]
    assert {role: set(terms) for role, terms in losses.items()} == {role: set(v) for role, v in wanted.items()}
    reference = expected(run, batch)
    for role, terms in losses.items():
        for name, value in terms.items():
            assert value.item() == pytest.approx(reference[role][name], rel=1e-8), (role, name)


@torch.no_grad()
def test_alone_it_learns_the_task() -> None:
    run, batch = a_run(), a_batch(TIMES)
    alone = DiTDistiller(network(STUDENT, 1)).double()
    losses, observed = alone(batch, START)
    assert losses.keys() == {"student"} and not observed and alone.adapter is None
    both, _ = run(batch, START)
    assert {k: v.item() for k, v in losses["student"].items()} == pytest.approx(
        {k: both["student"][k].item() for k in ("mse", "vlb")}
    )


def gradients(run: DiTDistiller) -> dict[str, bool]:
    """Of each parameter that may have one: whether it has."""
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in run.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", ["output", "head", "feature"])
def test_a_fixed_teacher_does_not_learn(form: Any) -> None:
    run = a_run(ADMConfig(form=form, map="final_norm", gamma=0.1))
    teacher = run.networks["teacher"]
    calls: list[bool] = []
    teacher.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))  # type: ignore[operator,union-attr,index]
    losses, _ = run(a_batch(TIMES), START)
    total(losses).backward()
    assert calls == [False] and not teacher.training and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert set(run.trained()) == {"student"} == set(run.averages)
    found = gradients(run)
    assert all(found.values()), found
    (group,) = run.parameter_groups()
    learning = [p for p in run.networks["student"].parameters() if p.requires_grad]
    assert {id(p) for p in group["params"]} == {id(p) for p in [*learning, *run.adapter.parameters()]}  # type: ignore[union-attr]
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.0)


def test_a_teacher_that_trains_along_learns_from_its_own_losses_alone() -> None:
    run, batch = a_run(ADMConfig(gamma=0.3), online=True), a_batch(TIMES)
    assert set(run.trained()) == {"teacher", "student"} == set(run.averages)
    losses, _ = run(batch, START)
    student, teacher, phi = (
        [p for p in module.parameters() if p.requires_grad]
        for module in (run.networks["student"], run.networks["teacher"], run.adapter)
        if module is not None
    )
    for role, own, others in (("student", [*student, *phi], teacher), ("teacher", teacher, [*student, *phi])):
        run.zero_grad()
        total({role: losses[role]}).backward(retain_graph=True)
        assert all(p.grad is not None for p in own) and all(p.grad is None for p in others)
    groups = run.parameter_groups()
    assert [{id(p) for p in g["params"]} for g in groups] == [
        {id(p) for p in part} for part in (teacher, student + phi)
    ]
    run.zero_grad()
    losses["teacher"]["divergence"].backward()
    assert any(p.grad is not None and p.grad.any() for p in teacher)


def test_phi_learns_by_its_own_loss_and_sends_the_student_none() -> None:
    """Also where no image is gated, and where the consensus loss itself compares the maps."""
    for times, form in ((TIMES, "output"), ([400, 999], "output"), (TIMES, "feature")):
        run = a_run(ADMConfig(gamma=0.3, form=form))  # type: ignore[arg-type]
        losses, _ = run(a_batch(times), START)
        weight = run.adapter.conv.weight  # type: ignore[union-attr]
        losses["student"]["phi"].backward(retain_graph=True)
        assert weight.grad.any() and all(p.grad is None for p in run.networks["student"].parameters())
        run.zero_grad()
        total({"student": {k: v for k, v in losses["student"].items() if k != "phi"}}).backward()
        assert weight.grad is None


def test_attention_is_detached() -> None:
    """The gradient of the consensus loss is that of the same errors under constant weights."""
    run, batch = a_run(ADMConfig()), a_batch([0, 100, 399])
    student, teacher = (run.networks[role] for role in ("student", "teacher"))
    losses, _ = run(batch, START)
    losses["student"]["consensus"].backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    z = run.schedule.noisy(batch["image"], batch["noise"], batch["t"])
    outputs = [model(z, batch["t"], batch["label"])[:, :1] for model in (student, teacher)]
    loss: Any = 0.0
    for i in range(3):
        tokens = [see(n, z[i], int(batch["t"][i]), int(batch["label"][i]))[1] for n in (student, teacher)]  # type: ignore[arg-type]
        with torch.no_grad():
            projected = tokens[0] @ run.adapter.conv.weight[:, :, 0, 0].T  # type: ignore[union-attr]
            s = torch.cosine_similarity(projected, tokens[1], dim=1).view(4, 4)
            a = ((1 + s) / (1 + s.mean() + 1e-5)).repeat_interleave(2, 0).repeat_interleave(2, 1)
        loss = loss + (a * (outputs[0][i, 0] - outputs[1][i, 0].detach()).square()).mean() / 3
    loss.backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("t", "opened"), [(399, True), (400, False)])
def test_gate(t: int, opened: bool) -> None:
    run = a_run(ADMConfig(), online=True)
    losses, observed = run(a_batch([t]), START)
    assert (losses["student"]["consensus"] > 0) == (losses["teacher"]["divergence"] > 0) == opened
    assert observed["adm/active"] == float(opened)


@pytest.mark.parametrize("form", ["output", "head", "feature"])
def test_no_gated_image_leaves_zero_and_finite_gradients(form: Any) -> None:
    run = a_run(ADMConfig(form=form, map="final_norm"), online=True)
    losses, observed = run(a_batch([400, 700, 999]), START)
    consensus, divergence = losses["student"]["consensus"], losses["teacher"]["divergence"]
    assert consensus == 0 and divergence == 0 and observed["adm/active"] == 0
    (consensus + divergence).backward(retain_graph=True)
    assert all(not p.grad.any() for p in run.parameters() if p.grad is not None)
    run.zero_grad()
    total(losses).backward()
    found = [p.grad for p in run.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in found)


@torch.no_grad()
def test_divided_by_the_batch_not_by_the_gated() -> None:
    """Parts of a batch, and shares of processes, have a mean that is the whole's."""
    run, batch = a_run(ADMConfig(), online=True), a_batch(TIMES)
    whole, _ = run(batch, START)
    halves = [run({k: v[i : i + 3] for k, v in batch.items()}, START)[0] for i in (0, 3)]
    for role, terms in whole.items():
        for name, value in terms.items():
            torch.testing.assert_close(value, (halves[0][role][name] + halves[1][role][name]) / 2)


@torch.no_grad()
def test_uniform_attention_is_plain_reweighting() -> None:
    for adm in (
        ADMConfig(control="uniform"),
        ADMConfig(control="uniform", form="head", map="final_norm"),
    ):
        run, batch = a_run(adm, online=True), a_batch([0, 100, 399])
        losses, _ = run(batch, START)
        torch.testing.assert_close(losses["student"]["consensus"], losses["student"]["distill"], rtol=3e-5, atol=0)
        torch.testing.assert_close(losses["teacher"]["divergence"], losses["teacher"]["mse"], rtol=3e-5, atol=0)


@torch.no_grad()
def test_shuffled_attention_keeps_the_weights_and_moves_them() -> None:
    batch = a_batch([0, 100, 399])
    kinds: tuple[Any, ...] = ("none", "uniform", "shuffled")
    values = [a_run(ADMConfig(control=kind))(batch, START)[0]["student"]["consensus"].item() for kind in kinds]
    assert len(set(values)) == 3 and max(values) < 2 * min(values)


@torch.no_grad()
def test_equal_widths_need_no_phi() -> None:
    run = DiTDistiller(network(STUDENT, 1), network(STUDENT, 1), adm=ADMConfig()).double()
    losses, observed = run(a_batch(TIMES), START)
    assert "phi" not in losses["student"] and not list(run.adapter.parameters())  # type: ignore[union-attr]
    assert observed["adm/similarity_min"].item() == pytest.approx(1) and losses["student"]["distill"] == 0


def test_a_fresh_student_learns() -> None:
    """It puts out exactly 0, and its last linear map alone gets a gradient; also through ADM."""
    run = DiTDistiller(DiT(STUDENT, 1, 8, 5), network(TEACHER, 2), adm=ADMConfig()).double()
    student = run.networks["student"]
    batch = a_batch(TIMES)
    assert not student(batch["image"], batch["t"], batch["label"]).any()
    losses, _ = run(batch, START)
    assert losses["student"]["mse"].item() == pytest.approx(batch["noise"].square().mean().item())
    total(losses).backward()
    learning = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"final_layer.linear.weight", "final_layer.linear.bias"}


def test_labels_are_dropped_once_for_both_networks() -> None:
    run = a_run(ADMConfig(), label_dropout=0.25)
    seen: dict[str, Tensor] = {}
    for role, model in run.networks.items():
        table: Any = model.y_embedder["embedding_table"]  # type: ignore[index]
        table.register_forward_pre_hook(lambda _m, inputs, role=role: seen.update({role: inputs[0]}))
    count = 4000
    batch = {"image": torch.zeros(count, 1, 8, 8, dtype=torch.float64), "label": torch.arange(count) % 5}
    drawn = run.before_step(batch, START)
    dropped = drawn["label"] == 5
    assert dropped.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drawn["label"][~dropped], batch["label"][~dropped])
    assert torch.equal(batch["label"], torch.arange(count) % 5)  # the loader's own stay
    run({k: v[:32] for k, v in drawn.items()}, START)
    assert torch.equal(seen["student"], seen["teacher"]) and torch.equal(seen["student"], drawn["label"][:32])
    assert bool((seen["student"] == 5).any())
    none = DiTDistiller(network(STUDENT, 1), label_dropout=0.0).before_step(batch, START)["label"]
    assert torch.equal(none, batch["label"])


def test_times_and_noise() -> None:
    batch = {"image": torch.zeros(20_000, 1, 1, 1), "label": torch.zeros(20_000, dtype=torch.int64)}
    drawn = a_run().before_step(batch, START)
    counts = torch.bincount(drawn["t"])
    assert len(counts) == 1000 and counts.min() > 2 and counts.max() < 50
    assert (drawn["t"] < 400).double().mean() == pytest.approx(0.4, abs=0.02)
    assert drawn["noise"].mean().abs() < 0.03 and drawn["noise"].std() == pytest.approx(1, abs=0.03)


def test_averages_have_a_constant_decay_from_the_first_step() -> None:
    run = a_run(online=True, ema=0.75).float()
    assert not any(m.training for m in run.train().averages.modules())
    assert not any(p.requires_grad for p in run.averages.parameters())
    wanted = {role: {k: v.clone() for k, v in m.state_dict().items()} for role, m in run.networks.items()}
    for step in range(3):
        with torch.no_grad():
            for p in run.networks.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        run.after_step({}, Progress(step, 0.0, 3, 1.0))
        for role, model in run.networks.items():
            for k, v in model.state_dict().items():
                wanted[role][k] = 0.75 * wanted[role][k] + 0.25 * v
    for role in ("teacher", "student"):
        for k, v in run.export(role).state_dict().items():
            torch.testing.assert_close(v, wanted[role][k])
            assert v.dtype == torch.float32
    assert run.step == 3


def test_losses_are_float32_under_autocast() -> None:
    for adm in (None, ADMConfig(gamma=0.1), ADMConfig(map="final_norm", form="head")):
        run = a_run(adm, online=True).float()
        with torch.autocast("cpu", torch.bfloat16):
            losses, observed = run(a_batch(TIMES, dtype=torch.float32), START)
        dtypes = {v.dtype for terms in [*losses.values(), observed] for v in terms.values()}
        assert dtypes == {torch.float32}
        total(losses).backward()
        exact, _ = run(a_batch(TIMES, dtype=torch.float32), START)
        for role, terms in losses.items():
            for name, value in terms.items():
                assert value.item() == pytest.approx(exact[role][name].item(), rel=0.1), (role, name)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for kept in (False, True):
        run = a_run(ADMConfig(), online=True)
        for model in run.networks.values():
            model.gradient_checkpointing = kept  # type: ignore[assignment]
        losses, _ = run(a_batch(TIMES), START)
        total(losses).backward()
        found.append([p.grad for p in run.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_step_waits_for_the_device() -> None:
    """On torch's meta device, whose tensors have no values, whatever a GPU would have to be waited for is an error."""
    batch = {"image": torch.empty(4, 1, 8, 8, device="meta"), "label": torch.empty(4, dtype=torch.int64, device="meta")}
    kinds: list[Any] = ["uniform", "shuffled"]
    options = [None, ADMConfig(gamma=0.1), *(ADMConfig(control=k) for k in kinds)]
    options += [ADMConfig(form=f, map="final_norm") for f in ("head", "feature")]  # type: ignore[arg-type]
    for adm in options:
        run = a_run(adm, online=adm is not None).float().to("meta")
        losses, _ = run(run.before_step(batch, START), START)
        total(losses).backward()
        run.after_step({}, START)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ADMConfig(form="classifier", classifier="resnet56:FILE"), "a DiT sees none"),
        (lambda: ADMConfig(form="head"), "needs --adm.map final_norm"),
        (lambda: ADMConfig(beta=-1.0), "adm.beta must not be negative"),
        (lambda: ADMConfig(gate=0.0), "adm.gate must be in"),
        (lambda: DistillConfig(weight=-0.5), "distill.weight must not be negative"),
        (lambda: DistillConfig(0.0, 0.0), "nothing to learn"),
    ],
)
def test_options_that_make_no_sense(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
