"""Training as timm's users do it: optimisers by name, weight decay and rates by layer, warm-up, smoothed labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import arguments, assert_same_runs, cut_at, lines, read
from torch import Tensor

from classification.config import parse_command
from classification.experiment import Experiment, build, command_of, restore
from classification.networks import create_network
from classification.optimizer import network_groups
from classification.options import OptimizerConfig
from core.errors import InputError
from core.training.distiller import Progress

pytestmark = pytest.mark.usefixtures("quick")

Command = Callable[[list[str]], tuple[int, str, str]]
START = Progress(0, 0.0, 100, 10.0)
ADAMW = ["--optimizer.name", "adamw", "--optimizer.lr", "0.01", "--optimizer.weight_decay", "0.05"]
LAYERS = [*ADAMW, "--optimizer.filter_bias_and_bn", "true", "--optimizer.layer_decay", "0.5"]


def experiment_of(tmp_path: Path, *more: str, method: str = "dml+adm") -> Experiment:
    return build(parse_command(arguments(tmp_path / "run", *more, method=method)))


def settings_of(experiment: Experiment) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each parameter of a run, by its name; each must be in one group alone."""
    distiller = experiment.distiller
    groups = distiller.optimizer.make(distiller.parameter_groups()).param_groups
    found = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    named = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    assert set(named.values()) == found.keys()
    return {name: found[p] for name, p in named.items()}


# --- optimisers -------------------------------------------------------------------------------------------------------


def test_without_a_word_of_it_a_run_is_what_it_was(tmp_path: Path) -> None:
    """An earlier run's config.yaml has none of these options, and the same command must resume it."""
    command = parse_command(arguments(tmp_path / "run"))
    values = command.resolved()
    assert values["optimizer"].keys() == {"lr", "learning_rates", "momentum", "weight_decay", "nesterov"}
    assert values["schedule"].keys() == {"name", "milestones", "factor", "warmup"}
    assert "label_smoothing" not in values and "backbone_lr_factor" not in values["networks"]["student"]
    distiller = build(command).distiller
    optimizer = distiller.optimizer.make(distiller.parameter_groups())
    assert type(optimizer) is torch.optim.SGD
    assert [group["params"] for group in optimizer.param_groups] == [
        distiller.parameters_of("teacher"),
        distiller.parameters_of("student"),
    ]


def test_what_was_given_is_written_down_and_read_back(tmp_path: Path) -> None:
    given = [*LAYERS, "--optimizer.options", "{betas: [0.8, 0.9]}", "--schedule.warmup_steps", "3"]
    values = parse_command(arguments(tmp_path / "run", *given, "--label_smoothing", "0.1", method="dml")).resolved()
    assert values["optimizer"]["options"] == {"betas": [0.8, 0.9]} and values["optimizer"]["layer_decay"] == 0.5
    assert values["schedule"]["warmup_steps"] == 3 and values["label_smoothing"] == 0.1
    optimizer = OptimizerConfig(**values["optimizer"])
    made = optimizer.make([{"params": [torch.nn.Parameter(torch.zeros(2))]}])
    assert type(made) is torch.optim.AdamW and list(made.defaults["betas"]) == [0.8, 0.9]


def test_a_step_of_adamw_is_torchs_with_each_networks_rate(tmp_path: Path) -> None:
    more = [*ADAMW, "--networks.teacher.lr", "0.003"]
    ours, bare = (experiment_of(tmp_path, *more).distiller for _ in range(2))
    optimizer = ours.optimizer.make(ours.parameter_groups())
    reference = torch.optim.AdamW(
        [
            {"params": bare.parameters_of("teacher"), "lr": 0.003},
            {"params": bare.parameters_of("student"), "lr": 0.01},
        ],
        weight_decay=0.05,
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for p, q in zip(ours.parameters(), bare.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_layers_have_falling_rates_and_vectors_no_decay(tmp_path: Path) -> None:
    found = settings_of(experiment_of(tmp_path, *LAYERS, "--networks.teacher.lr", "0.004"))
    # cifar_resnet8: the stem, three stages of one block, the head.
    layers = {"stem": 4, "stages.0": 3, "stages.1": 2, "stages.2": 1, "fc": 0}
    seen = set()
    for name, (rate, decay) in found.items():
        if name.startswith("networks.student."):
            own = name.removeprefix("networks.student.")
            (layer,) = [layer for layer in layers if own.startswith(layer)]
            seen.add(layer)
            assert rate == pytest.approx(0.01 * 0.5 ** layers[layer]), name
            assert decay == (0.0 if own.endswith(".bias") or ".bn" in own else 0.05), name
    assert seen == layers.keys()
    assert found["networks.teacher.fc.weight"] == (0.004, 0.05)
    assert found["networks.teacher.neck.weight"] == (pytest.approx(0.002), 0.0)  # with the last block: (99999,)
    (adapter,) = [values for name, values in found.items() if name.startswith("adm.adm.")]
    assert adapter == (0.01, 0.05)


def test_timms_transformers_name_what_must_not_decay() -> None:
    network = create_network("vit_tiny_patch16_224", 3)
    names = {p: name for name, p in network.named_parameters()}
    groups = network_groups(network, "student", lr=0.1, weight_decay=0.05, filter_bias_and_bn=True)
    free = {names[p] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= free and "head.weight" not in free
    assert len(names) == sum(len(group["params"]) for group in groups)
    groups = network_groups(network, "student", lr=0.1, weight_decay=0.05, layer_decay=0.75)
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates["head.weight"] == 0.1 and groups[0]["lr"] == 0.1
    assert rates["blocks.11.attn.qkv.weight"] == pytest.approx(0.1 * 0.75)
    assert rates["blocks.0.attn.qkv.weight"] == pytest.approx(0.1 * 0.75**12)
    assert rates["patch_embed.proj.weight"] == pytest.approx(0.1 * 0.75**13)
    assert all(group["weight_decay"] == 0.05 for group in groups)


def test_a_pretrained_backbone_is_slower_than_its_new_head(tmp_path: Path, command: Command) -> None:
    assert command(arguments(tmp_path / "before", "--fit.epochs", "1", method="vanilla"))[0] == 0
    weights = ["--networks.student.weights", str(tmp_path / "before"), "--networks.student.backbone_lr_factor", "0.1"]
    found = settings_of(experiment_of(tmp_path, *weights, "--optimizer.lr", "0.2"))
    for name, (rate, decay) in found.items():
        slow = name.startswith("networks.student.") and ".fc." not in name
        assert (rate, decay) == (pytest.approx(0.02) if slow else 0.2, 5e-4), name
    argv = arguments(tmp_path / "run", *weights)
    assert command(argv)[0] == 0  # and such a run is written down and read back
    restore(command_of(tmp_path / "run"), tmp_path / "run/checkpoints/last")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, 1), ({"momentum": 0.0}, 0), ({"name": "adamw"}, 2), ({"name": "lamb"}, 2), ({"name": "lion"}, 1)],
    ids=str,
)
def test_the_memory_of_an_optimiser(settings: dict[str, Any], kept: int) -> None:
    before = torch.get_rng_state()
    assert OptimizerConfig(**settings).moments == kept
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer.name", "adamww"], "unknown optimizer.name 'adamww': did you mean 'adamw'?"),
        (["--optimizer.name", "adahessian"], "adahessian needs second derivatives, which are not computed"),
        (["--optimizer.name", "bnbadam"], "optimizer.name bnbadam: "),
        (["--optimizer.name", "adamw", "--optimizer.nesterov", "true"], "optimizer.nesterov is sgd's"),
        ([*ADAMW, "--optimizer.options", "{betas: [0.9, 2.0]}"], "Invalid beta parameter"),
        ([*ADAMW, "--optimizer.options", "{beta: 0.9}"], "unexpected keyword argument 'beta'"),
        (["--optimizer.options", "{dampen: 0.5}"], "unexpected keyword argument 'dampen'"),
        (["--optimizer.layer_decay", "0"], "optimizer.layer_decay must be in (0, 1]: 0"),
        (["--networks.student.backbone_lr_factor", "0.1"], "of what starts from weights, and student starts at random"),
        (["--networks.student.backbone_lr_factor", "-1"], "backbone_lr_factor must be positive: -1"),
        (["--schedule.warmup", "1", "--schedule.warmup_steps", "3"], "give one of them"),
        (["--schedule.warmup_from", "0.1"], "schedule.warmup_from needs a warm-up"),
        (["--label_smoothing", "1"], "label_smoothing must be in [0, 1): 1"),
        (
            ["--label_smoothing", "0.1", "--adm.consensus", "kd"],
            "adm.consensus kd imitates the teacher and has no label",
        ),
        (["--label_smoothing", "0.1", "--method", "kdcl"], "KDCL goes by the label itself"),
        (["--label_smoothing", "0.1", "--method", "switokd"], "SwitOKD goes by the label itself"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, command: Command, more: list[str], message: str
) -> None:
    code, _, said = command(arguments(tmp_path / "run", *more))
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_a_network_without_an_order_of_layers_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    for options in ({"layer_decay": 0.5}, {"backbone_lr_factor": 0.5}):
        with pytest.raises(InputError, match=r"^\S+: .*does not say which .*: leave it out"):
            network_groups(network, "networks.student", lr=0.1, weight_decay=0.1, **options)


# --- warm-up ----------------------------------------------------------------------------------------------------------


def test_warm_up_in_steps_from_a_share_of_the_rate(tmp_path: Path, command: Command) -> None:
    warm = ["--schedule.name", "constant", "--schedule.warmup_steps", "4", "--schedule.warmup_from", "0.2"]
    argv = arguments(tmp_path / "run", *warm, "--optimizer.lr", "0.1", "--fit.log_every", "1", "--fit.epochs", "2")
    assert command(argv)[0] == 0
    rates = [line["lr"] for line in lines(tmp_path / "run", "train")]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


# --- smoothed labels --------------------------------------------------------------------------------------------------


def smoothed(logits: Tensor, target: Tensor, share: float) -> Tensor:
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    wanted = F.one_hot(target, logits.shape[1]) * (1 - share) + share / logits.shape[1]
    return -(wanted * log_p).sum(dim=1).mean()


@pytest.mark.parametrize("method", ["vanilla", "dml", "afd", "afid"])
def test_cross_entropy_is_with_smoothed_labels_and_imitation_is_not(tmp_path: Path, method: str) -> None:
    losses = {}
    for share in (0.0, 0.3):
        experiment = experiment_of(tmp_path, "--label_smoothing", str(share), method=method)
        distiller, train = experiment.distiller.train(), experiment.datasets.train
        batch = {"image": train.images[:6], "target": train.targets[:6], "index": torch.arange(6)}
        outputs = distiller.method(distiller.networks, distiller.views(batch["image"]))
        losses[share] = distiller.method.losses(outputs, batch, START)
        for role, output in outputs.items():
            wanted = smoothed(output.logits.double(), batch["target"], share)
            assert float(losses[share][role]["ce"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for role, terms in losses[0.0].items():
        assert terms.keys() == losses[0.3][role].keys()
        for name, value in terms.items():
            if name != "ce" and name not in ("generator", "discriminator"):
                assert torch.equal(value, losses[0.3][role][name])


def test_consensus_and_divergence_are_with_smoothed_labels(tmp_path: Path) -> None:
    weights = ["--adm.alpha", "0.5", "--adm.beta", "2", "--adm.control", "uniform"]
    experiment = experiment_of(tmp_path, *weights, "--label_smoothing", "0.3")
    distiller, train = experiment.distiller.train(), experiment.datasets.train
    batch = {"image": train.images[:6], "target": train.targets[:6], "index": torch.arange(6)}
    with torch.no_grad():
        losses, _ = distiller(batch, START)
        outputs = distiller.method(distiller.networks, distiller.views(batch["image"]))
    # Under uniform attention both are the network's own cross-entropy.
    for role, term, weight in (("student", "consensus", 0.5), ("teacher", "divergence", 2.0)):
        wanted = weight * float(smoothed(outputs[role].logits.double(), batch["target"], 0.3))
        assert float(losses[role][term]) == pytest.approx(wanted, rel=1e-4), role


# --- all of it --------------------------------------------------------------------------------------------------------

ALL = [
    *LAYERS, "--networks.teacher.lr", "0.004", "--schedule.name", "cosine", "--schedule.warmup_steps", "5",
    "--schedule.warmup_from", "0.1", "--fit.clip", "0.5", "--label_smoothing", "0.1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "stops"),
    [([], (4, 8)), (["--optimizer.name", "lamb", "--adm.divergence", "kd", "--fit.accumulate", "2"], (3, 7))],
    ids=["adamw", "lamb"],
)
def test_resumed_with_all_of_it_equals_uninterrupted(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, more: list[str], stops: tuple[int, ...]
) -> None:
    assert command(arguments(tmp_path / "whole", *ALL, *more))[0] == 0
    argv = arguments(tmp_path / "cut", *ALL, *more)
    for stop in stops:
        cut_at(stop, argv, command, monkeypatch)
    assert command(argv)[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert read(tmp_path / "cut/summary.json")["status"] == "finished"
    code, _, said = command([*argv, "--optimizer.layer_decay", "0.6"])
    assert code == 2 and "optimizer.layer_decay = 0.5" in said
