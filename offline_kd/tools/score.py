"""DisWOT's training-free score (Dong, Li and Wei, CVPR 2023): which student suits a teacher, before either is trained.

    python offline_kd/tools/score.py --teacher cifar_resnet56 --students cifar_resnet20 cifar_resnet8x4 \
        --data.name digits --out runs/score

Teacher and students get N(0, 1) weights and see one batch of real images. The score is -(L_rel + L_sem), the larger the
better: L_rel compares how the last maps tell the images apart, L_sem (some hundred times the larger) the gradients of
the cross-entropy with respect to the classifiers' rows. All is repeated with other weights. Writes `score.json` and
`score.png` into the folder `--out`.

The paper hands this score to an evolutionary search over architectures; here the candidates are named.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from classification.data import DataConfig, load_datasets
from classification.data.datasets import IN_MEMORY_NAMES
from classification.experiment import images_at
from classification.networks import create_network
from classification.networks.base import classifier_of
from core.analysis.colors import series_color
from core.analysis.looks import MARKERS
from core.errors import InputError
from core.files import make_folder, save_figure, save_json
from core.parts import as_network
from core.training.command import DONE, add_device, align, device_of, parse, run_command, tool_parser
from core.training.run import environment
from core.training.seed import seed_everything
from offline_kd.methods.diswot import relation_loss


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    options = parse_options(argv)
    device = device_of(options)
    images, target, classes = read_batch(options.data, options.batch_size)
    images, target = images.to(device), target.to(device)
    rows = score(options.teacher, options.students, images, target, classes, options.seeds)
    said = f"{options.batch_size} images of {options.data.name}, {options.seeds} draws of all weights"
    print(f"teacher {options.teacher}, {said}")
    print("\n".join(table(rows)))
    if options.out is not None:
        out = Path(options.out)
        make_folder(out)
        about = {"teacher": options.teacher, "data": asdict(options.data), "batch_size": options.batch_size}
        about |= {"seeds": options.seeds, "environment": environment(device)}
        save_json({**about, "students": rows}, out / "score.json")
        draw(rows, f"teacher {options.teacher}\n{said}", out / "score.png")
        print(f"written to {out}")
    return DONE


def parse_options(argv: Sequence[str] | None) -> Any:
    """The command line. Raises: InputError for anything wrong with it."""
    parser = tool_parser("Scores students for a teacher without training (DisWOT): the larger, the better.")
    add = parser.add_argument
    add("--teacher", type=str, required=True, help="a CIFAR network of this package or a timm name")
    add("--students", type=str, nargs="+", required=True, help="the candidates, likewise")
    add("--seeds", type=int, default=10, help="how often all weights are drawn")
    add("--batch_size", type=int, default=64, help="images, drawn once from the training split")
    add_device(parser)
    add("--out", type=str, default=None, help="folder for score.json and score.png")
    add("--data", type=DataConfig, default=DataConfig())
    options = parse(parser, argv)
    for name in ("seeds", "batch_size"):
        if getattr(options, name) < 2:
            raise InputError(f"--{name} must be at least 2: {getattr(options, name)}")
    if twice := [name for name in options.students if options.students.count(name) > 1]:
        raise InputError(f"--students names {twice[0]} twice")
    return options


def read_batch(config: DataConfig, size: int) -> tuple[Tensor, Tensor, int]:
    """Normalised images ``[B, C, H, W]``, class indices ``[B]`` and the number of classes; always the same images.

    Raises: InputError where there are not so many images.
    """
    if config.name not in IN_MEMORY_NAMES and config.in_memory is None:
        config = replace(config, in_memory=False)  # a batch is all that is needed of them
    datasets = load_datasets(config)
    split = datasets.train
    if len(split) < size:
        raise InputError(f"--batch_size {size}: the training split has {len(split)} images")
    positions = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:size].tolist()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (datasets.mean, datasets.std))
    return (images_at(split, positions) / 255.0 - mean) / std, split.targets[positions], datasets.num_classes


@torch.no_grad()
def draw_weights(network: nn.Module) -> None:
    """N(0, 1) for every weight; norm layers' (and layer scales') 1 and all biases 0."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_()
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class Traits(NamedTuple):
    """What the score compares of an untrained network, in float64: both terms are free of its scale."""

    parameters: int
    feature_map: Tensor  # the last map behind its ReLU, [B, C, H, W]
    gradient: Tensor  # of the cross-entropy with respect to the classifier's weight, [K, C]


def traits(name: str, images: Tensor, target: Tensor, classes: int) -> Traits:
    """Builds a network with N(0, 1) weights and shows it the batch.

    BatchNorm uses the batch's statistics: with those of a new network (0 and 1) each layer would multiply the scale, by
    12 for 16 channels, and a deep network overflow. All other layers are as in evaluation.
    Args: normalised images ``[B, C, H, W]``; class indices ``[B]``; the number of classes.
    Raises: InputError for an unknown network, one without a linear classifier, or one that overflows all the same.
    """
    network: Any = create_network(name, classes, in_chans=images.shape[1]).to(images.device)
    network = as_network(network, images[:2])
    draw_weights(network)
    for module in network.modules():
        module.training = isinstance(module, _BatchNorm)
    with torch.no_grad():
        features = network.forward_features(images)
    with torch.enable_grad():
        loss = F.cross_entropy(network.forward_head(features), target)
        (gradient,) = torch.autograd.grad(loss, classifier_of(network).weight)
    if not (features.isfinite().all() and gradient.isfinite().all()):
        raise InputError(f"{name} overflows with N(0, 1) weights: the score needs a network with norm layers")
    parameters = sum(p.numel() for p in network.parameters())
    return Traits(parameters, F.relu(features).double(), gradient.double())


def gradient_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L_sem of the search: ``1/(K C) sum_k || rn(g_k^t g_k^t^T) - rn(g_k^s g_k^s^T) ||_F^2``, rn: rows of length 1.

    Row i of ``rn(g g^T)`` is ``sign(g_i) g / |g|``, so that the matrices C x C need not be made:
    ``mean_k [2 - 2/C cos(g_k^t, g_k^s) sum_i sign(g_ki^t) sign(g_ki^s)]`` where no entry is 0.

    Args: ``[K, C]`` each. Where the widths differ, the first channels of the wider one are taken: with independent
        weights of one distribution they are as good as any others.
    Returns: a scalar.
    """
    channels = min(student.shape[1], teacher.shape[1])
    s, t = student[:, :channels], teacher[:, :channels]
    both = (s.sign() * t.sign()).mean(dim=1) * (F.normalize(s) * F.normalize(t)).sum(dim=1)
    return (s.sign().square().mean(dim=1) + t.sign().square().mean(dim=1) - 2.0 * both).mean()


def score(
    teacher: str, students: Sequence[str], images: Tensor, target: Tensor, classes: int, seeds: int
) -> list[dict[str, Any]]:
    """A row for each student, the best first: its rank, and over the seeds mean and standard deviation of its score."""
    parameters: dict[str, int] = {}
    values: dict[str, list[dict[str, float]]] = {name: [] for name in students}
    for seed in range(seeds):
        seed_everything(seed, "teacher", teacher)
        t = traits(teacher, images, target, classes)
        for name in students:
            seed_everything(seed, "student", name)
            s = traits(name, images, target, classes)
            relation = relation_loss(s.feature_map, t.feature_map).item()
            semantic = gradient_distance(s.gradient, t.gradient).item()
            parameters[name] = s.parameters
            values[name].append({"score": -(relation + semantic), "relation": relation, "semantic": semantic})
    rows: list[dict[str, Any]] = []
    for name, draws in values.items():
        mean = {key: statistics.fmean(draw[key] for draw in draws) for key in draws[0]}
        std = statistics.stdev(draw["score"] for draw in draws)
        rows.append({"network": name, "parameters": parameters[name], **mean, "std": std, "draws": draws})
    rows.sort(key=lambda row: -row["score"])
    return [{"rank": rank, **row} for rank, row in enumerate(rows, start=1)]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of ``score`` as text; relation and semantic are the two terms' means."""
    lines = [["rank", "student", "parameters", "score", "std", "L_rel", "L_sem"]]
    for row in rows:
        numbers = [f"{row[key]:.4f}" for key in ("score", "std")] + [f"{row[k]:.5f}" for k in ("relation", "semantic")]
        lines.append([str(row["rank"]), row["network"], f"{row['parameters']:,}", *numbers])
    return align(lines)


def draw(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Score against parameters, with the standard deviation over the draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, row in enumerate(rows):
        look: dict[str, Any] = {"color": series_color(number), "fmt": MARKERS[number % len(MARKERS)], "capsize": 3}
        axis.errorbar(row["parameters"], row["score"], row["std"], label=row["network"], **look)
    axis.set_xscale("log")
    axis.set_xlabel("parameters of the student")
    axis.set_ylabel("score: $-(L_{rel} + L_{sem})$, mean and std")
    axis.set_title(title)
    axis.grid(alpha=0.3, linewidth=0.6)
    figure.legend(fontsize="small", loc="outside right upper", frameon=False)
    save_figure(figure, file)


if __name__ == "__main__":
    run_command(main)
