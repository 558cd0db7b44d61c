"""What ADM is added to: distillation (Eq. 2), mutual learning (Eq. 4) and the feature loss (Eq. 5, Table 18).

Towards the end what classification and segmentation share of KDCL (a target) and SwitOKD (when a teacher pauses).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter
from .errors import InputError, unknown
from .maps import full_precision, pool_to, smaller_size
from .targets import Criterion, imitation_loss, label_loss, read_criterion
from .targets import kd_loss as kd_loss

NoiseFilter = Literal["none", "norm", "relu", "drop"]


def standardise(logits: Tensor, scale: float) -> Tensor:
    """``c (z - mean_K) / sqrt(var_K + 1e-7)``, biased variance, of each row of ``[B, K]``; in float32 at least.

    SHAKE's and NORM's logits: each row gets mean 0 and standard deviation c.
    """
    z = full_precision(logits)
    z = z - z.mean(dim=1, keepdim=True)
    return scale * z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-7)


def mutual_loss(
    logits: Mapping[str, Tensor],
    target: Tensor,
    weights: Mapping[str, float] | float = 1.0,
    tau: float = 1.0,
    peers: Literal["mean", "sum"] = "mean",
    criterion: Criterion = F.cross_entropy,
) -> dict[str, dict[str, Tensor]]:
    """Eq. 4, deep mutual learning among any number of networks: the sum of everything returned is L_dml.

    Args:
        logits: ``{role: [B, K]}``, or ``[B, K, H, W]`` with dense targets; the roles are names of your own.
        target: class indices ``[B]``, or whatever fits the criterion (module ``targets``).
        weights: lambda, 1 in the paper, one for all or per role (1 for a role left out; Table 19 lowers the teacher's).
        tau: temperature of the imitation.
        peers: the mean over the other networks (Eq. 4) or their sum.
        criterion: ``nn.CrossEntropyLoss(...)`` or ``nn.BCEWithLogitsLoss(...)``. What it ignores has no gradient, and
            its class weights hold, in the imitation too (``imitation_loss``); label smoothing smooths the labels alone.
    Returns: ``{role: {"ce": scalar, "kd": lambda_i L_kd_i}}``; a lone network, or lambda 0, has no "kd".
    Raises: InputError, a ValueError, for an unknown role in ``weights``, a weight that is negative or not finite, a tau
        that is not positive, targets that do not fit, or another criterion where there is a "kd".
    """
    criterion = read_criterion(criterion)
    given = weights if isinstance(weights, Mapping) else dict.fromkeys(logits, weights)
    for role, weight in given.items():
        if role not in logits:
            raise unknown("network in weights", str(role), logits)
        if not 0 <= weight < math.inf:
            raise InputError(f"the weight of {role} must be a number of at least 0: {weight}")
    losses: dict[str, dict[str, Tensor]] = {}
    for role, own in logits.items():
        losses[role] = {"ce": label_loss(own, target, criterion)}
        others = [other for name, other in logits.items() if name != role]
        if others and (weight := given.get(role, 1.0)):
            terms = [imitation_loss(own, other, tau, target, criterion) for other in others]
            scale = weight / len(others) if peers == "mean" else weight
            losses[role]["kd"] = scale * sum(terms[1:], start=terms[0])
    return losses


def feature_loss(
    map_student: Tensor | Sequence[Tensor],
    map_teacher: Tensor | Sequence[Tensor],
    adapter: Adapter | Sequence[Adapter | None] | None = None,
    noise_filter: NoiseFilter = "none",
    *,
    frozen_last: bool = True,
    learner: Literal["student", "teacher"] = "student",
) -> Tensor:
    """Eq. 5: the mean squared difference of two maps, for the student alone (the teacher's map is detached).

    Its weight gamma is the caller's: 1 in the paper on CIFAR-100, 0.01 on ImageNet.

    Args:
        map_student, map_teacher: one map ``[B, C, H, W]`` each (weight 1; or ``[B, C, L]``, ``[B, C, D, H, W]``), or
            the lists of stage maps without the stem's, paired from the last backwards; the n pairs weigh
            1/2^n, ..., 1/4, 1/2 (Algorithm 1). The larger map of a pair is average-pooled to the smaller's size.
        adapter: phi, one per pair (None where the channels agree).
        noise_filter: Table 18. "norm": each channel's vector of places divided by its L2 norm; "relu": of both maps;
            "drop": without the third (rounded down) of the places of each image that differ most.
        frozen_last: the last pair's phi gets no gradient from here: it has its own loss (``phi_loss``).
        learner: whose maps have a gradient. ``teacher`` is what Section 3.2 warns of, a teacher that imitates its
            student: the student's maps and phi are then detached. Both calls together are the loss without any detach,
            but for phi, which the student's alone moves.
    Returns: a scalar, float32 at least.
    Raises: InputError, a ValueError, where channels differ and no adapter is given, where one argument is a map and the
        other a list, for adapters that do not fit the maps, or for an unknown filter.
    """
    if learner not in ("student", "teacher"):
        raise InputError(f"unknown learner {learner!r} of feature_loss: 'student' or 'teacher'")
    if isinstance(map_student, Tensor) and isinstance(map_teacher, Tensor):
        if adapter is not None and not isinstance(adapter, Adapter):
            raise InputError(f"feature_loss of one pair of maps takes one Adapter, not a {type(adapter).__name__}")
        return _feature_loss(map_student, map_teacher, adapter, noise_filter, frozen_last, learner)
    if isinstance(map_student, Tensor) or isinstance(map_teacher, Tensor):
        raise InputError("feature_loss takes one map of each network, or a list of maps of each: not a map and a list")
    n = min(len(map_student), len(map_teacher))
    if n == 0:
        raise InputError("feature_loss needs at least one map of each network")
    if isinstance(adapter, Adapter):
        raise InputError("feature_loss of lists of maps takes a list of adapters, one per pair (None: not needed)")
    adapters = [None] * n if adapter is None else list(adapter)
    if len(adapters) != n:
        raise InputError(f"feature_loss got {len(adapters)} adapters for {n} pairs of maps")
    pairs = list(zip(list(map_student)[-n:], list(map_teacher)[-n:], adapters, strict=True))
    losses = [
        _feature_loss(s, t, phi, noise_filter, frozen_last and k == n, learner) / 2 ** (n + 1 - k)
        for k, (s, t, phi) in enumerate(pairs, start=1)
    ]
    return sum(losses[1:], start=losses[0])


def _feature_loss(
    s: Tensor, t: Tensor, phi: Adapter | None, noise_filter: NoiseFilter, frozen: bool, learner: str
) -> Tensor:
    size = smaller_size(s, t)
    if learner == "student":
        t = t.detach()
    else:
        s, frozen = s.detach(), True
    s = pool_to(s, size) if phi is None else phi(s, size, frozen=frozen)
    t = pool_to(t, size)
    if (cs := s.shape[1]) != (ct := t.shape[1]):
        raise InputError(f"feature_loss needs an adapter from {cs} to {ct} channels: Adapter({cs}, {ct})")
    if s.shape != t.shape:
        raise InputError(f"feature_loss got maps of {len(s)} and {len(t)} samples: give both networks the same batch")
    s, t = full_precision(s), full_precision(t)  # [B, C, *places]
    if noise_filter == "norm":
        s, t = F.normalize(s.flatten(2), dim=2), F.normalize(t.flatten(2), dim=2)  # [B, C, P]
    elif noise_filter == "relu":
        s, t = F.relu(s), F.relu(t)
    elif noise_filter == "drop":
        error = (s - t).square().mean(dim=1).flatten(1)  # [B, P]
        kept = error.shape[1] - error.shape[1] // 3
        return error.topk(kept, dim=1, largest=False, sorted=False).values.mean()
    elif noise_filter != "none":
        raise InputError(f"unknown noise filter {noise_filter!r}: 'none', 'norm', 'relu' or 'drop'")
    # Against zero, not s against t: that would keep both maps for the backward pass, this keeps their difference alone.
    difference = s - t
    return F.mse_loss(difference, difference.new_zeros(()).expand_as(difference))


def relative_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """``z - z[y]``: the same softmax, and the cross-entropy is its log-sum-exp.

    Args: logits ``[M, B, K, ...]``; class indices ``[B, ...]``. Returns: ``[M, B, K, ...]``.
    """
    index = targets[None, :, None].expand(len(logits), *[-1] * (logits.dim() - 1))
    return logits - logits.gather(2, index)


def min_logit_target(logits: Tensor, targets: Tensor) -> Tensor:
    """KDCL-MinLogit (Guo et al., CVPR 2020): ``z_t[k] = min_i (z_i[k] - z_i[y])``.

    So ``z_t[y] = 0``, and CE(z_t) is at most every CE(z_i).

    Args: logits ``[M, B, K, ...]`` of M networks; class indices ``[B, ...]``. Returns: ``[B, K, ...]``.
    """
    return relative_logits(logits, targets).amin(dim=0)


@torch.no_grad()
def distances(student: Tensor, teacher: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The L1 distances that decide in SwitOKD (Qian et al., ECCV 2022), each summed over the images (and locations).

    Args: logits ``[B, K, ...]`` of a student and a teacher; class indices ``[B, ...]``; a factor for each of these,
        0 where it does not count (its index must be a class all the same).
    Returns: ``[3]``: ``|p_s - onehot|``, ``|p_t - onehot|`` and the distillation gap ``|p_s - p_t|``, all at tau 1.
    """
    p_s, p_t = F.softmax(full_precision(student), dim=1), F.softmax(full_precision(teacher), dim=1)  # [B, K, ...]
    index = target.unsqueeze(1)
    wrong_s, wrong_t = (2.0 * (1.0 - p.gather(1, index).squeeze(1)) for p in (p_s, p_t))  # |p - onehot| = 2 (1 - p[y])
    parts = torch.stack([wrong_s, wrong_t, (p_s - p_t).abs().sum(dim=1)])  # [3, B, ...]
    return (parts if mask is None else parts * mask).flatten(1).sum(dim=1)


def epsilon(r_s: Tensor, r_t: Tensor) -> Tensor:
    """SwitOKD's ``exp(-r_t / (r_s + r_t))``, in [1/e, 1]; 1 where both networks are perfect."""
    return torch.exp(-r_t / (r_s + r_t).clamp_min(torch.finfo(r_s.dtype).tiny))


def learning(r_s: Tensor, r_t: Tensor, gap: Tensor, eps: Tensor) -> Tensor:
    """1 in SwitOKD's learning mode, 0 in expert mode: the gap exceeds ``r_s - eps r_t`` and the teacher is ahead.

    The second condition stands in the authors' code, not in the paper's formula.
    """
    return 1.0 - ((gap > r_s - eps * r_t) & (r_t < r_s)).to(gap.dtype)
