"""SHAKE: its formulas against loops, who learns from whom, the teacher that stays as it is, and what a run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import arguments, train_whole
from torch import Tensor, nn

from classification.config import TrainConfig, parse_command
from classification.distiller import ClassificationDistiller, NetworkConfig, OptimizerConfig
from classification.evaluation import evaluate
from classification.experiment import build, command_of, restore
from classification.methods.base import Output
from classification.methods.shake import SHAKE, ShadowHead, SHAKEOptions, classify
from classification.networks import create_network
from classification.networks.base import classifier_of
from classification.tools import evaluate as evaluate_tool
from core.adm import ADMConfig
from core.distillation import standardise
from core.errors import InputError
from core.parts import as_network
from core.training.checkpoint import find_checkpoint, read_checkpoint
from core.training.distiller import Progress

Command = Callable[[list[str]], tuple[int, str, str]]
CLASSES, SIZE, C = 5, 16, 3.1415
START = Progress(0, 0.0, 10, 1.0)
ONLINE = SHAKEOptions(online_teacher=True)


def distiller_of(
    options: SHAKEOptions | None = None,
    adm: ADMConfig | None = None,
    teacher: nn.Module | str = "cifar_wrn_10_2",
    student: nn.Module | str = "cifar_resnet8",
    **more: Any,
) -> ClassificationDistiller:
    torch.manual_seed(3)
    given = {"teacher": teacher, "student": student}
    networks = {r: create_network(n, CLASSES) if isinstance(n, str) else n for r, n in given.items()}
    return ClassificationDistiller(
        networks,
        {role: NetworkConfig(role) for role in networks},
        dict.fromkeys(networks, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))),
        SHAKE(options, with_adm=adm is not None),
        adm,
        OptimizerConfig(lr=0.05, weight_decay=0.1),
        images(2),
        num_classes=CLASSES,
        **more,
    ).train()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch_of(count: int = 6) -> dict[str, Any]:
    return {"image": images(count), "target": torch.arange(count) % CLASSES, "index": torch.arange(count)}


def make_step(distiller: ClassificationDistiller, optim: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    losses, _ = distiller(batch_of(), START)
    total = sum(value for terms in losses.values() for value in terms.values())
    distiller.backward(losses, total, SimpleNamespace(scaler=None))
    distiller.before_update()
    optim.step()
    optim.zero_grad()
    return losses


def reached(distiller: ClassificationDistiller, loss: Tensor) -> set[str]:
    """teacher, student, shadow, phi: whose parameters a loss has a gradient to."""
    owners = {"method.shadow": "shadow", "adm.": "phi", "networks.teacher": "teacher", "networks.student": "student"}
    found = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(found.values()), retain_graph=True, allow_unused=True)
    names = [n for n, g in zip(found, gradients, strict=True) if g is not None and g.abs().max() > 0]
    return {next(owner for start, owner in owners.items() if n.startswith(start)) for n in names}


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_classify_pools_and_leaves_the_classifier_alone() -> None:
    layer, w = nn.Linear(4, 3).double(), torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    z = classify(w, layer)
    for b in range(2):
        pooled = [w[b, c].sum().item() / 6 for c in range(4)]
        for k in range(3):
            wanted = sum(layer.weight[k, c].item() * pooled[c] for c in range(4)) + layer.bias[k].item()
            assert z[b, k].item() == pytest.approx(wanted, rel=1e-12)
    z.square().sum().backward()
    assert w.grad is not None and w.grad.abs().max() > 0 and layer.weight.grad is None and layer.bias.grad is None
    bare = nn.Linear(4, 3, bias=False).double()
    torch.testing.assert_close(classify(w, bare), w.mean((2, 3)) @ bare.weight.T)


def convolved(x: Tensor, part: Any, stride: int) -> Tensor:
    """ReLU(BN(conv(x))) location by location, with the batch's own statistics."""
    weight = part.conv.weight
    k = weight.shape[2]
    padded = F.pad(x, (k // 2,) * 4)
    height, width = (-(-side // stride) for side in x.shape[2:])
    y = torch.empty(len(x), len(weight), height, width, dtype=x.dtype)
    for b in range(len(x)):
        for c in range(len(weight)):
            for i in range(height):
                for j in range(width):
                    patch = padded[b, :, i * stride : i * stride + k, j * stride : j * stride + k]
                    y[b, c, i, j] = (patch * weight[c]).sum()
    for c in range(len(weight)):
        values = y[:, c].flatten()
        variance = ((values - values.mean()) ** 2).mean()
        y[:, c] = (y[:, c] - values.mean()) / (variance + 1e-5).sqrt() * part.bn.weight[c] + part.bn.bias[c]
    return y.clamp_min(0)


def test_shadow_head_is_its_five_convolutions() -> None:
    torch.manual_seed(1)
    maps = [torch.randn(2, c, h, h, dtype=torch.float64) for c, h in ((2, 8), (3, 4), (4, 2))]
    head = ShadowHead(maps).double().train()
    assert not any(name.endswith("conv.bias") for name, _ in head.named_parameters())
    for part in (head.a1, head.b2, head.a3, head.b4, head.a5):
        nn.init.normal_(part.bn.weight)
        nn.init.normal_(part.bn.bias)
    w = head(*maps)
    with torch.no_grad():
        u = convolved(maps[0], head.a1, 2) + convolved(maps[1], head.b2, 1)
        v = convolved(u, head.a3, 2) + convolved(maps[2], head.b4, 1)
        torch.testing.assert_close(w, convolved(v, head.a5, 1))
    assert [part.conv.kernel_size[0] for part in (head.a1, head.b2, head.a3, head.b4, head.a5)] == [3, 1, 3, 1, 3]


def test_shadow_head_starts_with_kaiming_fan_out() -> None:
    head = ShadowHead([torch.zeros(1, c, h, h) for c, h in ((64, 4), (128, 2), (256, 1))])
    for part in (head.a1, head.b2, head.a3, head.b4, head.a5):
        channels, _, k, _ = part.conv.weight.shape
        assert part.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (k * k * channels)), rel=0.05)


@pytest.mark.parametrize(
    ("sides", "strides"),
    [
        ((28, 14, 7), (2, 2)),  # ResNet-34 at 224 pixels
        ((8, 4, 4), (2, 1)),  # a VGG at 32 pixels
        ((7, 7, 7), (1, 1)),  # a transformer
        ((16, 4, 1), (4, 4)),
        ((15, 7, 3), (2, 2)),  # poolings that round down
        ((7, 4, 2), (2, 2)),  # convolutions that round up
    ],
)
def test_shadow_head_adapts_its_strides(sides: tuple[int, ...], strides: tuple[int, ...]) -> None:
    maps = [torch.randn(2, c, h, h) for c, h in zip((3, 4, 5), sides, strict=True)]
    head = ShadowHead(maps)
    assert (head.a1.conv.stride[0], head.a3.conv.stride[0]) == strides
    w = head(*maps)
    assert w.shape == (2, 5, sides[2], sides[2]) and w.min() >= 0
    w.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("online", [False, True])
def test_losses_are_those_of_the_paper(tau: float, online: bool) -> None:
    torch.manual_seed(2)
    z = {role: torch.randn(4, CLASSES, dtype=torch.float64) * 2 for role in ("teacher", "shadow", "student")}
    target = torch.tensor([0, 4, 2, 2])
    outputs = {role: Output(values, [], lambda x: x) for role, values in z.items()}
    losses = SHAKE(SHAKEOptions(tau=tau, online_teacher=online)).losses(outputs, {"target": target}, START)

    def softmax(row: Tensor, tau: float) -> list[float]:
        powers = [math.exp(x / tau) for x in row.tolist()]
        return [p / sum(powers) for p in powers]

    def ce(role: str) -> float:
        return sum(-math.log(softmax(z[role][i], 1.0)[y]) for i, y in enumerate(target.tolist())) / 4

    def kl(learner: str, imitated: str) -> float:
        rows = [(softmax(z[learner][i], tau), softmax(z[imitated][i], tau)) for i in range(4)]
        return tau**2 * sum(b * math.log(b / a) for p, q in rows for a, b in zip(p, q, strict=True)) / 4

    mse = sum(
        (a - b) ** 2 for a, b in zip(z["shadow"].flatten().tolist(), z["teacher"].flatten().tolist(), strict=True)
    )
    wanted = {
        "student": {"ce": ce("student"), "kd": kl("student", "shadow")},
        "shadow": {"ce": ce("shadow"), "kd": kl("shadow", "student"), "mse": mse / (4 * CLASSES)},
    }
    if online:
        wanted["teacher"] = {"ce": ce("teacher")}
    assert {role: terms.keys() for role, terms in losses.items()} == {r: t.keys() for r, t in wanted.items()}
    for role, terms in wanted.items():
        for term, value in terms.items():
            assert losses[role][term].item() == pytest.approx(value, rel=1e-10), (role, term)


# --- who learns from what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adm", [None, ADMConfig(0.3, 0.7, 0.5), ADMConfig(0.3, 0.7, 0.5, consensus="kd")])
def test_a_frozen_teacher_gets_nothing(adm: ADMConfig | None) -> None:
    distiller = distiller_of(adm=adm)
    losses, _ = distiller(batch_of(), START)
    assert losses.keys() == {"student", "shadow"}
    for term in {"ce", "kd", "consensus", "feature"} & losses["student"].keys():
        assert reached(distiller, losses["student"][term]) == {"student"}, term
    for term in {"ce", "kd", "mse", "divergence"} & losses["shadow"].keys():
        assert reached(distiller, losses["shadow"][term]) == {"shadow"}, term
    if adm is not None:
        assert losses["student"].keys() == {"ce", "kd", "consensus", "phi", "feature"}
        assert losses["shadow"].keys() == {"ce", "kd", "mse", "divergence"}
        assert reached(distiller, losses["student"]["phi"]) == {"phi"}
    sum(value for terms in losses.values() for value in terms.values()).backward()
    assert all(p.grad is None for p in distiller.networks["teacher"].parameters())
    learners = [p for name, p in distiller.named_parameters() if "networks.teacher" not in name]
    assert all(p.grad is not None for p in learners)


@pytest.mark.parametrize("adm", [None, ADMConfig(0.3, 0.7, 0.5)])
def test_an_online_teacher_learns_by_its_own_loss(adm: ADMConfig | None) -> None:
    distiller = distiller_of(ONLINE, adm)
    assert distiller.phases == (("teacher", "shadow", "student"),) and distiller.pairs == [("student", "teacher")]
    losses, _ = distiller(batch_of(), START)
    assert losses["teacher"].keys() == ({"ce"} if adm is None else {"ce", "divergence"})
    for value in losses["teacher"].values():
        assert reached(distiller, value) == {"teacher"}
    for value in losses["shadow"].values():  # not the teacher, and not its W_t either
        assert reached(distiller, value) == {"shadow"}
    for term, value in losses["student"].items():
        assert reached(distiller, value) <= ({"student", "phi"} if term in ("phi", "feature") else {"student"}), term


@pytest.mark.parametrize("adm", [None, ADMConfig()])
def test_a_step_moves_student_and_shadow_and_nothing_of_the_teacher(adm: ADMConfig | None) -> None:
    distiller = distiller_of(adm=adm)
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    optim = distiller.optimizer.make(distiller.parameter_groups())
    for _ in range(2):
        make_step(distiller, optim)
    moved = {name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("networks.teacher") for name in moved)
    for part in ("networks.student.", "method.shadow."):  # weights and BatchNorm's statistics
        assert {name for name in before if name.startswith(part)} <= moved
    assert not distiller.networks["teacher"].training and distiller.networks["student"].training
    assert list(distiller.trained()) == ["student"]


def test_an_online_teacher_moves_too() -> None:
    distiller = distiller_of(ONLINE)
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    make_step(distiller, distiller.optimizer.make(distiller.parameter_groups()))
    assert not [name for name, value in distiller.state_dict().items() if torch.equal(value, before[name])]
    assert list(distiller.trained()) == ["teacher", "student"] and distiller.networks["teacher"].training


def test_one_optimiser_moves_student_and_shadow_at_the_students_rate() -> None:
    distiller = distiller_of(adm=ADMConfig())
    distiller.configs["teacher"] = NetworkConfig("a", lr=7.0)
    distiller.configs["student"] = NetworkConfig("b", lr=0.01)
    groups = distiller.parameter_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.1)] * 2
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in distiller.parameters())
    shadow: Any = distiller.method.shadow
    assert {id(p) for p in shadow.parameters()} == {id(p) for p in groups[1]["params"]}


@pytest.mark.parametrize("options", [SHAKEOptions(), ONLINE])
@pytest.mark.parametrize("adm", [None, ADMConfig()])
def test_each_network_runs_once_a_step(
    options: SHAKEOptions, adm: ADMConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = distiller_of(options, adm)
    calls: dict[str, int] = {}
    parts = {**distiller.networks, "shadow": distiller.method.shadow}
    for role, module in parts.items():
        first: Any = next(m for m in module.modules() if isinstance(m, nn.Conv2d))  # type: ignore[union-attr]
        first.register_forward_hook(lambda *_, role=role: calls.update({role: calls.get(role, 0) + 1}))
    distiller(batch_of(), START)
    assert calls == {"teacher": 1, "student": 1, "shadow": 1}
    distiller.outputs(images(3))
    assert calls == {"teacher": 2, "student": 2, "shadow": 2}


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SHAKEOptions(), SHAKEOptions(scale=2.0), ONLINE])
def test_every_logit_is_standardised_and_every_head_says_it(options: SHAKEOptions) -> None:
    distiller = distiller_of(options)
    x = images(4)
    outputs, views = distiller.outputs(x), distiller.views(x)
    assert list(outputs) == distiller.output_roles == ["teacher", "shadow", "student"]
    distiller.eval()
    for role, output in outputs.items():
        z = output.logits
        torch.testing.assert_close(z.mean(1), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(z.var(1, unbiased=False).sqrt(), torch.full((4,), options.scale), rtol=1e-3, atol=0)
        torch.testing.assert_close(output.head(output.maps[-1]), z)
        weighted = output.head(output.maps[-1] * torch.rand(4, 1, *output.maps[-1].shape[2:]))
        torch.testing.assert_close(
            weighted.var(1, unbiased=False).sqrt(), torch.full((4,), options.scale), rtol=1e-3, atol=0
        )
        if role in distiller.networks:
            with torch.no_grad():
                raw = distiller.networks[role](views[role])
            torch.testing.assert_close(z, standardise(raw, options.scale))
            assert torch.equal(z.argmax(1), raw.argmax(1))


@pytest.mark.parametrize("name", ["cifar_wrn_10_2", "cifar_vgg8"])  # three stages, four stages
def test_the_shadow_stands_on_the_teachers_last_three_maps_activated(name: str) -> None:
    distiller = distiller_of(teacher=name)
    x = images(4)
    shadow = distiller.outputs(x)["shadow"]
    network: Any = distiller.networks["teacher"]
    head: Any = distiller.method.shadow
    distiller.eval()
    with torch.no_grad():
        final, maps = network.forward_intermediates(distiller.views(x)["teacher"])
        w = head(*(f.clamp_min(0) for f in (maps[-3], maps[-2], final)))
        raw = w.mean((2, 3)) @ network.fc.weight.T + network.fc.bias
    assert min(f.min() for f in maps[-3:]) < 0  # they were not
    assert len(shadow.maps) == 1
    torch.testing.assert_close(shadow.maps[0], w)
    torch.testing.assert_close(shadow.logits, standardise(raw, C))


def test_adm_compares_student_and_shadow_at_that_map_alone() -> None:
    config = ADMConfig(0.0, 0.7, 0.5)
    distiller = distiller_of(adm=config, student="cifar_wrn_10_2")  # equal channels: no phi
    assert distiller.pairs == [("student", "shadow")]
    assert distiller.adm is not None and not list(distiller.adm.parameters())
    outputs = distiller.method(distiller.networks, distiller.views(images(6)), distiller.phases[0])
    terms = distiller.adm.losses(outputs, batch_of(), START, distiller.phases[0])
    w, f = outputs["shadow"].maps[0].detach().double(), outputs["student"].maps[-1].detach().double()
    assert terms["student"]["feature"].item() == pytest.approx(0.5 * (w - f).square().mean().item() / 2, rel=1e-5)
    classifier: Any = classifier_of(distiller.networks["teacher"])
    total = 0.0
    for i in range(6):
        s = torch.stack([torch.stack([cosine(w[i, :, a, b], f[i, :, a, b]) for b in range(4)]) for a in range(4)])
        attention = (1 - s) / (1 - s.mean() + 1e-5)
        z = classifier.weight.double() @ (attention * w[i]).mean((1, 2)) + classifier.bias.double()
        z = C * (z - z.mean()) / (z.var(unbiased=False) + 1e-7).sqrt()
        total -= z.log_softmax(0)[i % CLASSES].item() / 6
    assert terms["shadow"]["divergence"].item() == pytest.approx(0.7 * total, rel=1e-5)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def test_evaluation_reports_all_three() -> None:
    distiller = distiller_of(adm=ADMConfig())
    values = evaluate(distiller, [batch_of(), batch_of(4)]).values
    for role in ("teacher", "shadow", "student"):
        assert {f"{role}/{score}" for score in ("top1", "top5", "nll", "ece")} <= values.keys()
    logits = distiller.outputs(images(6))[
        "shadow"
    ].logits  # calibration and likelihood are those of standardised logits
    nll = F.cross_entropy(logits.double(), batch_of()["target"]).item()
    assert evaluate(distiller, [batch_of()]).values["shadow/nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("options", [SHAKEOptions(), ONLINE])
def test_mixed_precision_keeps_losses_in_float32(options: SHAKEOptions) -> None:
    distiller = distiller_of(options, ADMConfig())
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = distiller(batch_of(), START)
    for role, terms in losses.items():
        for term, value in terms.items():
            assert value.dtype == torch.float32 and value.isfinite(), (role, term)
    sum(value for terms in losses.values() for value in terms.values()).backward()


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_timms_networks_can_have_a_shadow(name: str) -> None:
    more = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24} if "swin" in name else {}
    teacher = as_network(create_network(name, CLASSES, **more).eval())
    networks = {"teacher": teacher, "student": create_network("cifar_resnet8", CLASSES)}
    method, x = SHAKE(), torch.randn(2, 3, 64, 64)
    assert method.prepare(networks, dict.fromkeys(networks, x)) is networks
    outputs = method(networks, dict.fromkeys(networks, x), ("shadow", "student"))
    assert outputs["shadow"].maps[0].shape == outputs["teacher"].maps[-1].shape
    assert method.shadow.a1.conv.stride == (2, 2)


# --- what it refuses --------------------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_networks_are_refused() -> None:
    for roles in (("student",), ("teacher", "student", "student_2"), ("teacher", "teacher_2"), ()):
        assert "teacher and student" in refusal(lambda roles=roles: SHAKE().check(TrainConfig(), roles, ["teacher"]))
    SHAKE().check(TrainConfig(), ("student", "teacher"), ["teacher"])
    two = create_network("cifar_wrn_10_1", 2)
    assert "3 classes" in refusal(lambda: distiller_of(teacher=two))
    headless = create_network("cifar_wrn_10_1", CLASSES)
    headless.fc = nn.Sequential(nn.Linear(64, CLASSES))
    assert "one linear layer" in refusal(lambda: distiller_of(teacher=headless))
    wide = create_network("cifar_wrn_10_1", CLASSES)
    wide.fc = nn.Linear(128, CLASSES)
    assert "128 features, and the map has 64" in refusal(
        lambda: SHAKE().prepare({"teacher": wide}, {"teacher": torch.randn(2, 3, 16, 16)})
    )

    class TwoMaps(type(two)):  # type: ignore[misc]
        def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
            final, maps = super().forward_intermediates(x)
            return final, maps[-2:]

    short = create_network("cifar_wrn_10_1", CLASSES)
    short.__class__ = TwoMaps
    assert "last three stage maps of its teacher, which hands out 2" in refusal(lambda: distiller_of(teacher=short))


@pytest.mark.parametrize("values", [{"tau": 0.0}, {"tau": -1.0}, {"scale": 0.0}])
def test_wrong_options_are_refused(values: Any) -> None:
    assert f"shake.{next(iter(values))} must be positive" in refusal(lambda: SHAKEOptions(**values))


def test_a_teacher_without_weights_is_refused(tmp_path: Path) -> None:
    command = parse_command(arguments(tmp_path / "run", method="shake"))
    said = refusal(lambda: build(command))
    assert "shake needs a pre-trained teacher: give --networks.teacher.weights" in said
    assert said.endswith("or --shake.online_teacher true")
    build(parse_command(arguments(tmp_path / "run", "--shake.online_teacher", "true", method="shake")))
    SHAKE().check(TrainConfig(), ["teacher", "student"], ["teacher"])
    SHAKE(ONLINE).check(TrainConfig(), ["teacher", "student"], [])


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a teacher that was trained alone, for an epoch."""
    from classification.tools.train import main

    out = tmp_path_factory.mktemp("teacher") / "run"
    train_whole(main, arguments(out, "--fit.epochs", "1", method="vanilla"))
    return out


@pytest.mark.usefixtures("quick")
def test_a_run_leaves_a_plain_student_and_can_be_read_back(
    tmp_path: Path, command: Command, teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    weights = ["--networks.teacher.weights", str(teacher)]
    code, _, said = command(arguments(out, *weights, "--fit.epochs", "2", method="shake+adm"))
    assert code == 0, said
    saved, state = read_checkpoint(out / "checkpoints/last")
    assert saved.keys() == {"student"}
    assert saved["student"].keys() == create_network("cifar_resnet8", 3).state_dict().keys()
    assert "method.shadow.a5.conv.weight" in state["extra"] and "method.shadow.a1.bn.running_mean" in state["extra"]
    assert not any("teacher" in name for name in state["extra"] if not name.startswith("adm."))
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert {"shadow/ce", "shadow/kd", "shadow/mse", "shadow/divergence", "student/kd"} <= line.keys()

    experiment = restore(command_of(out), find_checkpoint(out, "last"))
    distiller = experiment.distiller
    own = read_checkpoint(teacher / "checkpoints/last")[0]["teacher"]
    assert all(torch.equal(value, own[name]) for name, value in distiller.networks["teacher"].state_dict().items())
    for name, value in distiller.method.shadow.state_dict().items():
        assert torch.equal(value, state["extra"][f"method.shadow.{name}"]), name
    values = evaluate(distiller, experiment.evaluation_loader(experiment.datasets.test)).values
    last = json.loads((out / "summary.json").read_text())["last"]
    assert all(last[name] == pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in values.items())
    exported = distiller.export("student")
    assert (
        type(exported) is type(create_network("cifar_resnet8", 3))
        and exported.state_dict().keys() == saved["student"].keys()
    )

    capfd.readouterr()
    assert evaluate_tool.main([str(out), "--device", "cpu"]) == 0
    rows = [row.split()[0] for row in capfd.readouterr().out.splitlines()[2:5]]
    assert rows == ["teacher", "shadow", "student"]
    report = json.loads((out / "evaluation-last-test.json").read_text())
    assert report["values"]["shadow/top1"] == last["shadow/top1"]


@pytest.mark.usefixtures("quick")
def test_dry_run_names_the_shadow(tmp_path: Path, command: Command, teacher: Path) -> None:
    weights = ["--networks.teacher.weights", str(teacher)]
    code, printed, said = command(arguments(tmp_path / "run", *weights, "--dry-run", method="shake+adm"))
    assert code == 0, said
    assert "shadow: " in printed and "(0 trained)" in printed and not (tmp_path / "run").exists()
