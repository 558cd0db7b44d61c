"""KDCL, collaborative learning (Guo et al., CVPR 2020): all networks imitate one target made of all their logits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.methods.base import Method, MethodOptions, Outputs, mean_over_all
from classification.options import TrainConfig
from core.distillation import full_precision, kd_loss, min_logit_target, relative_logits
from core.errors import InputError
from core.ranges import NonNegative, Positive
from core.training.distiller import Batch, Losses, Progress

RIDGE = 1e-6
"""Added to C's diagonal: networks that make the same errors have a singular C."""


@dataclass(frozen=True)
class KDCLOptions(MethodOptions):
    """Options of KDCL.

    Args:
        variant: how the target is made of the networks' logits. minlogit: each logit's distance to the label's, the
            least over the networks; naive: the logits of the network with the least cross-entropy; linear: the convex
            combination with the least cross-entropy, solved for each image; general: one combination for all images,
            estimated anew each epoch on held-out images (needs data.validation); mean: the mean of the logits, which
            is not in the paper but in common re-implementations of it (their 0.5 CE + 0.5 KL at tau 4 is not taken).
        tau: temperature (original: --kdcl.tau 2).
        weight: lambda, the weight of the imitation loss of every network.
        views: whether all networks see one augmented view of an image (shared), or each its own (separate, the
            original). Unless given, separate, and shared with ADM, which cannot compare separate views.
    """

    variant: Literal["minlogit", "naive", "linear", "general", "mean"] = "minlogit"
    tau: Positive = 1.0
    weight: NonNegative = 1.0
    views: Literal["separate", "shared"] | None = None


def naive_target(logits: Tensor, targets: Tensor) -> Tensor:
    """KDCL-Naive: for each sample the logits of the network with the least cross-entropy.

    Args: logits ``[M, B, K]``; class indices ``[B]``. Returns: ``[B, K]``.
    """
    best = _cross_entropy(relative_logits(logits, targets)).argmin(dim=0)  # [B]
    return logits.gather(0, best[None, :, None].expand(1, *logits.shape[1:])).squeeze(0)


def linear_weights(logits: Tensor, targets: Tensor) -> Tensor:
    """KDCL-Linear: for each sample the ``a`` on the simplex that minimises ``CE(sum_i a_i z_i, y)``, which is convex.

    Two networks: 30 bisections of the derivative; more: 50 steps of exponentiated gradient, near the minimum only.

    Args: logits ``[M, B, K]``; class indices ``[B]``.
    Returns: ``[M, B]``, not negative, of sum 1 for each sample; never worse than the best single network.
    """
    relative = relative_logits(logits, targets)
    weights = _bisect(relative) if len(relative) == 2 else _exponentiated_gradient(relative)
    least, best = _cross_entropy(relative).min(dim=0)  # [B]
    single = torch.arange(len(relative), device=best.device)[:, None] == best  # [M, B]
    solved = _cross_entropy(combine(weights, relative)) < least
    return torch.where(solved, weights, single.to(weights.dtype))


def error_correlation(logits: Tensor, targets: Tensor) -> Tensor:
    """KDCL-General's C as a sum: ``C_ij = sum_x <f_i(x) - onehot(y), f_j(x) - onehot(y)>``, ``f`` the softmax.

    Args: logits ``[M, B, K]``; class indices ``[B]``. Returns: ``[M, M]`` in float64.
    """
    errors = F.softmax(logits.double(), dim=-1) - F.one_hot(targets, logits.shape[-1])  # [M, B, K]
    return torch.einsum("ibk,jbk->ij", errors, errors)


def general_weights(correlation: Tensor) -> Tensor:
    """KDCL-General: ``w = C^-1 1 / (1^T C^-1 1)``, the combination of least squared error; a w_i may be negative.

    Args: the mean C over the held-out images, ``[M, M]`` in float64. Returns: ``[M]``, of sum 1.
    """
    ones = torch.ones_like(correlation[0])
    solution = torch.linalg.solve_ex(correlation + RIDGE * torch.diag(ones), ones).result
    return solution / solution.sum()


def combine(weights: Tensor, logits: Tensor) -> Tensor:
    """``sum_i w_i z_i``: weights ``[M, B]`` or ``[M, 1]``, logits ``[M, B, K]`` -> ``[B, K]``."""
    return (weights.unsqueeze(-1) * logits).sum(dim=0)  # no einsum: autocast would round it to bf16


class KDCL(Method):
    """Any number of networks, from two on; the best one imitates the target too.

    To compare KDCL with KDCL+ADM, run KDCL with ``--kdcl.views shared``: the views differ otherwise too.

    Raises: InputError for separate views together with ADM.
    """

    Options = KDCLOptions
    takes_smooth_labels = False
    min_networks = 2

    weights: Tensor
    """``[M]``, the general variant's w; in the state dict, so that a resumed epoch goes on with it."""

    def __init__(self, options: Any = None, *, with_adm: bool = False) -> None:
        super().__init__(options, with_adm=with_adm)
        self.views = self.options.views or ("shared" if with_adm else "separate")
        self.needs_held_out = self.options.variant == "general"
        if self.options.variant not in ("general", "mean"):
            self.class_index = f"kdcl.variant {self.options.variant}"
        # Compiled, its loops would be unrolled: minutes of compilation.
        self.linear_weights = torch.compiler.disable(linear_weights)
        if with_adm and self.views == "separate":
            raise InputError(
                "kdcl.views separate does not go with ADM: under separate crops and flips, location (i, j) of the two "
                "maps that ADM compares would show different content; choose --kdcl.views shared or --method kdcl"
            )

    def check(self, run: TrainConfig, roles: Sequence[str], pretrained: Collection[str]) -> None:
        super().check(run, roles, pretrained)
        if self.needs_held_out and not run.data.validation:
            raise InputError(
                "kdcl.variant general weighs the networks by their errors on images held out of training, and none "
                "are: give --data.validation 0.1, or choose another --kdcl.variant"
            )

    def prepare(self, networks: dict[str, nn.Module], samples: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        if self.options.variant == "general":
            m = len(networks)
            self.register_buffer("weights", torch.full((m,), 1 / m, dtype=torch.float64))  # epoch 0's
        return networks

    @torch.no_grad()
    def before_epoch(self, epoch: int, held_out: Iterable[tuple[dict[str, Tensor], Tensor]]) -> None:
        """From epoch 1 on, w from all processes' held-out images; epoch 0 does not look at them."""
        if epoch == 0:
            return
        correlation, count = torch.zeros_like(self.weights).diag(), 0
        for logits, targets in held_out:
            correlation += error_correlation(torch.stack(list(logits.values())), targets)
            count += len(targets)
        self.weights.copy_(general_weights(mean_over_all(correlation, count)))

    @torch.no_grad()
    def target_logits(self, logits: Sequence[Tensor], targets: Tensor) -> Tensor:
        """z_t ``[B, K]`` of the networks' logits ``[B, K]`` each, detached, at least in float32."""
        z = full_precision(torch.stack(list(logits)))  # [M, B, K]
        variant = self.options.variant
        if variant == "minlogit":
            return min_logit_target(z, targets)
        if variant == "naive":
            return naive_target(z, targets)
        if variant == "linear":
            return combine(self.linear_weights(z, targets), z)
        if variant == "general":
            return combine(self.weights[:, None].to(z.dtype), z)
        return z.mean(dim=0)

    def losses(self, outputs: Outputs, batch: Batch, progress: Progress) -> Losses:
        """``L_i = CE(z_i, y) + lambda tau^2 KL(z_t || z_i)``."""
        options: KDCLOptions = self.options
        z_t = self.target_logits([output.logits for output in outputs.values()], batch["target"])
        losses: Losses = {}
        for role, output in outputs.items():
            losses[role] = {"ce": F.cross_entropy(full_precision(output.logits), batch["target"])}
            if options.weight:
                losses[role]["kd"] = options.weight * kd_loss(output.logits, z_t, options.tau)
        return losses


def _cross_entropy(relative: Tensor) -> Tensor:
    return relative.logsumexp(dim=-1)


def _bisect(relative: Tensor) -> Tensor:
    """Relative logits ``[2, B, K]`` -> weights ``[2, B]``: where ``d CE / d a`` changes its sign, else an end."""
    second, difference = relative[1], relative[0] - relative[1]
    low = torch.zeros_like(second[:, 0])
    high = torch.ones_like(low)
    for _ in range(30):
        a = (low + high) / 2
        p = F.softmax(second + a.unsqueeze(-1) * difference, dim=-1)
        rising = (p * difference).sum(dim=-1) > 0
        low, high = torch.where(rising, low, a), torch.where(rising, a, high)
    a = (low + high) / 2
    return torch.stack([a, 1 - a])


def _exponentiated_gradient(relative: Tensor) -> Tensor:
    """Relative logits ``[M, B, K]`` -> weights ``[M, B]``: ``a_i <- a_i exp(-rate * dCE/da_i)``, then of sum 1.

    Each sample has its own rate, as useful ones span decades: a step that does not lower the cross-entropy is taken
    back and the rate quartered, else it grows by half.
    """

    def look(log_weights: Tensor) -> tuple[Tensor, Tensor]:
        mixed = combine(log_weights.exp(), relative)
        return _cross_entropy(mixed), (F.softmax(mixed, dim=-1) * relative).sum(dim=-1)  # [B], [M, B]

    log_weights = F.log_softmax(torch.zeros_like(relative[..., 0]), dim=0)
    value, gradient = look(log_weights)
    rate = 1 / (gradient.amax(dim=0) - gradient.amin(dim=0))  # infinite for equal networks: no step is then taken
    for _ in range(50):
        tried = F.log_softmax(log_weights - rate * gradient, dim=0)
        tried_value, tried_gradient = look(tried)
        better = tried_value <= value
        log_weights, value = torch.where(better, tried, log_weights), torch.where(better, tried_value, value)
        gradient, rate = torch.where(better, tried_gradient, gradient), rate * torch.where(better, 1.5, 0.25)
    return log_weights.exp()
