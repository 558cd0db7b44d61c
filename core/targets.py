"""What a network's logits are compared with: labels of any kind, and what another network says about the same places.

PyTorch's own criteria say what the labels are, and every loss keeps to them:

- ``nn.CrossEntropyLoss(weight, ignore_index, label_smoothing)`` (the default, without options): class indices ``[B]``,
  dense ones ``[B, H, W]`` (or ``[B, *places]``), or probabilities of the logits' own shape ``[B, K, ...]`` (mixup,
  smoothed labels);
- ``nn.BCEWithLogitsLoss(weight, pos_weight)``: each class for itself, targets in [0, 1] of the logits' shape;
- any other callable ``criterion(logits, target)``, a scalar: for losses against labels alone, since nobody can know
  what it leaves out or weighs.

``F.cross_entropy``, ``F.binary_cross_entropy_with_logits`` and a ``functools.partial`` of them are read as these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .maps import full_precision

Criterion = Callable[[Any, Any], Tensor]

_CROSS_ENTROPY = nn.CrossEntropyLoss()


def kd_loss(logits: Tensor, target_logits: Tensor, tau: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Eq. 2: ``tau^2 KL(p_target || p)``, ``p = softmax(logits / tau)``, in float32 also under autocast.

    Args: logits ``[B, K]`` (or ``[B, K, ...]``: one distribution per location); those of the imitated network are
        detached; tau > 0; a factor for each distribution ``[B, ...]`` (0: it does not count, but for the mean).
    Returns: a scalar, the mean over all but the class dimension.
    Raises: ValueError where the shapes differ, or for a tau that is not positive.
    """
    if logits.shape != target_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target logits {tuple(target_logits.shape)} differ in shape")
    if isinstance(tau, (int, float)) and not 0 < tau < math.inf:
        raise InputError(f"tau must be positive: {tau}")
    log_p = F.log_softmax(full_precision(logits) / tau, dim=1)
    log_target = F.log_softmax(full_precision(target_logits.detach()) / tau, dim=1)
    divergence = F.kl_div(log_p, log_target, reduction="none", log_target=True).sum(dim=1)  # [B, ...]
    if weight is None:
        return tau**2 * divergence.mean()
    if weight.shape != divergence.shape:
        raise InputError(f"weights {tuple(weight.shape)} do not fit logits {tuple(logits.shape)}: one a distribution")
    return tau**2 * (weight * divergence).mean()


def read_criterion(criterion: Criterion) -> Criterion:
    """PyTorch's function, or a partial of it, as the module that does the same; anything else as it is.

    Raises: InputError for one of PyTorch's two criteria whose reduction is not the mean.
    """
    if criterion is F.cross_entropy:
        return _CROSS_ENTROPY
    bare = isinstance(criterion, partial) and not criterion.args
    function, options = (criterion.func, criterion.keywords) if bare else (criterion, {})  # type: ignore[attr-defined]
    if function is F.cross_entropy:
        criterion = nn.CrossEntropyLoss(**options)
    elif function is F.binary_cross_entropy_with_logits:
        criterion = nn.BCEWithLogitsLoss(**options)
    if _is_known(criterion) and criterion.reduction != "mean":  # type: ignore[attr-defined]
        raise InputError(f"{criterion}: the reduction must be 'mean', on which the losses' weights rest")
    return criterion


def _is_known(criterion: Criterion) -> bool:
    # Not a subclass: it may compute anything.
    return type(criterion) in (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)


def check_imitation(criterion: Criterion, form: str, *, labelled: bool = True) -> None:
    """Raises: InputError where a form against another network's logits cannot honour a criterion.

    ``form``: its name in the message; ``labelled``: it has a label somewhere, to which label smoothing applies.
    """
    if not _is_known(criterion):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise InputError(
            f"{form} cannot honour the criterion {name}, of which nobody knows what it ignores or weighs: give "
            "nn.CrossEntropyLoss(...) or nn.BCEWithLogitsLoss(...)"
        )
    if not labelled and getattr(criterion, "label_smoothing", 0.0) > 0:
        raise InputError(
            f"{form} has no label that label_smoothing could smooth: leave it out of the criterion, or compute the "
            "other side by an ADMLoss of its own (a weight of 0 leaves a side out)"
        )


def check_target(criterion: Criterion, logits: Tensor, target: Tensor) -> None:
    """Raises: InputError where a known criterion's targets do not fit the logits ``[B, K, ...]``, by their shapes."""
    shape, wanted, probabilities = tuple(target.shape), tuple(logits.shape), target.is_floating_point()
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        if shape == wanted and probabilities:
            return
        what = f"BCEWithLogitsLoss takes floating point numbers {wanted} in [0, 1]"
    elif probabilities and criterion.ignore_index >= 0:  # type: ignore[attr-defined]
        what = "ignore_index means class indices, and these are probabilities: leave it out of the criterion"
    else:
        indices = (*wanted[:1], *wanted[2:])
        if shape == (wanted if probabilities else indices):
            return
        what = f"cross-entropy takes class indices {indices} (integers) or probabilities {wanted} (floating point)"
    raise InputError(f"targets {shape} of type {target.dtype} do not fit logits {wanted}: {what}")


def label_loss(logits: Tensor, target: Any, criterion: Criterion = F.cross_entropy) -> Tensor:
    """``criterion(logits, target)``, a scalar, but 0 without a gradient where cross-entropy has nothing to count.

    PyTorch's own is NaN where all targets are ignored (or of classes that weigh 0), and one such batch would end a run.
    ``F.cross_entropy`` itself, the default, where nobody asked to ignore anything, is left as it is, at no cost.
    Raises: InputError where a known criterion's targets do not fit the logits.
    """
    criterion = read_criterion(criterion)
    if not _is_known(criterion):
        return criterion(logits, target)
    check_target(criterion, logits, target)
    if criterion is _CROSS_ENTROPY:
        return F.cross_entropy(logits, target)
    if not isinstance(criterion, nn.CrossEntropyLoss) or target.is_floating_point():
        return criterion(logits, target)
    if criterion.weight is not None and criterion.label_smoothing == 0:  # a class of weight 0 is an ignored one
        weights, _ = _weights(criterion, target, torch.float32)
        target = target.masked_fill(weights == 0, criterion.ignore_index)
    return torch.where((target != criterion.ignore_index).any(), criterion(logits, target), 0.0)


def imitation_loss(
    logits: Tensor,
    target_logits: Tensor,
    tau: float = 1.0,
    target: Tensor | None = None,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Eq. 2 between two networks' logits, in the sense of a criterion and over the places that it counts.

    Cross-entropy: ``kd_loss``, averaged as cross-entropy averages: ignored targets count nowhere (0 where all are), a
    class weight w is a factor w[y] of the distribution, and the sum is divided by that of all w[y]; with probabilities
    q the factor is sum_k w_k q_k and the mean is over all, as in PyTorch.
    BCEWithLogits: ``tau^2 sum_k KL(Bernoulli(sigmoid(t_k / tau)) || Bernoulli(sigmoid(z_k / tau)))``, summed over the
    K classes as softmax's is, K times the scale of a mean over them; the mean is over samples and places. A class
    counts pos_weight times where its target is 1 (1 + (pos_weight - 1) y times at y), and ``weight`` times.

    Args: logits ``[B, K, ...]`` of both, the imitated network's are detached; tau > 0; the targets (None: all count
        alike); the criterion, one of the two.
    Returns: a scalar. Raises: InputError for another criterion, or targets that do not fit.
    """
    criterion = read_criterion(criterion)
    check_imitation(criterion, "imitation")
    if target is not None:
        check_target(criterion, logits, target)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        pairs = [torch.stack([z, torch.zeros_like(z)], dim=1) for z in (logits, target_logits)]  # [B, 2, K, ...]
        return logits.shape[1] * kd_loss(pairs[0], pairs[1], tau, _bernoulli_weights(criterion, target))
    if target is None:
        return kd_loss(logits, target_logits, tau)
    weights, scale = _weights(criterion, target, torch.promote_types(logits.dtype, torch.float32))
    return kd_loss(logits, target_logits, tau, None if weights is None else weights * scale)


def blended_loss(
    logits: Tensor,
    target: Tensor,
    previous: Tensor,
    delta: float | Tensor,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Eq. 12's loss: the criterion towards ``(1 - delta) target + delta previous``; ``label_loss`` at delta 0.

    Ignored targets, class weights and the mean are as in ``imitation_loss``; label smoothing smooths the target alone.

    Args: logits ``[B, K, ...]``, float32 or float64; the targets; probabilities of the logits' shape (of each class for
        itself under BCEWithLogits), which are detached; a number or one for each sample ``[B]``.
    Returns: a scalar. Raises: InputError for another criterion, or targets or probabilities that do not fit.
    """
    criterion = read_criterion(criterion)
    check_imitation(criterion, "divergence='kd'")
    check_target(criterion, logits, target)
    if previous.shape != logits.shape:
        raise InputError(f"previous {tuple(previous.shape)} must have the logits' shape {tuple(logits.shape)}")
    previous = previous.detach().to(logits.dtype)

    def of_sample(dims: int) -> float | Tensor:
        each = isinstance(delta, Tensor) and delta.dim() == 1
        return delta.view(-1, *[1] * (dims - 1)) if each else delta  # type: ignore[union-attr]

    if isinstance(criterion, nn.BCEWithLogitsLoss):
        share = of_sample(logits.dim())
        return criterion(logits, ((1.0 - share) * target + share * previous).to(logits.dtype))
    hard = F.cross_entropy(
        logits,
        target,
        criterion.weight,  # type: ignore[attr-defined]
        ignore_index=criterion.ignore_index,  # type: ignore[attr-defined]
        label_smoothing=criterion.label_smoothing,  # type: ignore[attr-defined]
        reduction="none",
    )  # [B, ...]
    soft = F.cross_entropy(logits, previous, reduction="none")  # [B, ...]
    weights, scale = _weights(criterion, target, logits.dtype)
    soft = soft if weights is None else weights * soft
    share = of_sample(hard.dim())
    return (((1.0 - share) * hard + share * soft) * scale).mean()


def _weights(criterion: Any, target: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | float]:
    """What each distribution weighs ``[B, ...]`` in cross-entropy, and the factor that makes a mean over all its own.

    Both are exactly 1 where nothing is ignored or weighed.
    """
    weight = None if criterion.weight is None else criterion.weight.to(dtype)  # [K]
    if target.is_floating_point():
        return None if weight is None else torch.einsum("bk...,k->b...", target.to(dtype), weight), 1.0
    valid = target != criterion.ignore_index
    if weight is None:
        weights, total = valid, valid.sum().to(dtype)
    else:
        weights = weight[target.masked_fill(~valid, 0)] * valid
        total = weights.sum()
    # A tensor: `number / tensor` is a product with 1 / tensor, not exact.
    every = torch.full_like(total, target.numel())
    return weights, torch.where(total > 0, every / total, 0.0)


def _bernoulli_weights(criterion: nn.BCEWithLogitsLoss, target: Tensor | None) -> Tensor | None:
    """What each class of each sample weighs, ``[B, K, ...]``; None where all weigh 1."""
    if target is None or (criterion.weight is None and criterion.pos_weight is None):
        return None
    weights = torch.ones_like(target)
    if criterion.pos_weight is not None:
        weights = weights + (criterion.pos_weight - 1.0) * target
    return weights if criterion.weight is None else weights * criterion.weight
