"""What ADM is added to: distillation (Eq. 2), mutual learning (Eq. 4) and the feature loss (Eq. 5, Table 18).

Towards the end what classification and segmentation share of KDCL (a target) and SwitOKD (when a teacher pauses).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter
from .maps import full_precision, pool_to, smaller_size

NoiseFilter = Literal["none", "norm", "relu", "drop"]


def kd_loss(logits: Tensor, target_logits: Tensor, tau: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Eq. 2: ``tau^2 KL(p_target || p)``, ``p = softmax(logits / tau)``, in float32 also under autocast.

    Args: logits ``[B, K]`` (or ``[B, K, ...]``: one distribution per location); those of the imitated network are
        detached; tau > 0; a factor for each distribution ``[B, ...]`` (0: it does not count, but for the mean).
    Returns: a scalar, the mean over all but the class dimension.
    Raises: ValueError where the shapes differ.
    """
    if logits.shape != target_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target logits {tuple(target_logits.shape)} differ in shape")
    log_p = F.log_softmax(full_precision(logits) / tau, dim=1)
    log_target = F.log_softmax(full_precision(target_logits.detach()) / tau, dim=1)
    divergence = F.kl_div(log_p, log_target, reduction="none", log_target=True).sum(dim=1)  # [B, ...]
    return tau**2 * (divergence if weight is None else weight * divergence).mean()


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
) -> dict[str, dict[str, Tensor]]:
    """Eq. 4, deep mutual learning among any number of networks: the sum of everything returned is L_dml.

    Args: ``{role: logits [B, K]}``; class indices ``[B]``; lambda, one for all or per role (Table 19 lowers the
        teacher's); the temperature; the mean over the other networks (Eq. 4) or their sum.
    Returns: ``{role: {"ce": scalar, "kd": lambda_i L_kd_i}}``; a lone network has no "kd".
    """
    losses: dict[str, dict[str, Tensor]] = {}
    for role, own in logits.items():
        losses[role] = {"ce": F.cross_entropy(own, target)}
        others = [kd_loss(own, other, tau) for name, other in logits.items() if name != role]
        weight = weights if isinstance(weights, (int, float)) else weights.get(role, 1.0)
        if others and weight:
            scale = weight / len(others) if peers == "mean" else weight
            losses[role]["kd"] = scale * sum(others[1:], start=others[0])
    return losses


def feature_loss(
    map_student: Tensor | Sequence[Tensor],
    map_teacher: Tensor | Sequence[Tensor],
    adapter: Adapter | Sequence[Adapter | None] | None = None,
    noise_filter: NoiseFilter = "none",
    *,
    frozen_last: bool = True,
) -> Tensor:
    """Eq. 5: the mean squared difference of two maps, for the student alone (the teacher's map is detached).

    Args:
        map_student, map_teacher: one map ``[B, C, H, W]`` each (weight 1), or the lists of stage maps without the
            stem's, paired from the last backwards; the n pairs weigh 1/2^n, ..., 1/4, 1/2 (Algorithm 1).
            The larger map of a pair is average-pooled to the smaller's size.
        adapter: phi, one per pair (None where the channels agree).
        noise_filter: Table 18. "norm": each channel's HW vector divided by its L2 norm; "relu": of both maps;
            "drop": without the floor(HW / 3) locations of each image that differ most.
        frozen_last: the last pair's phi gets no gradient from here: it has its own loss (``core.adm.phi_loss``).
    Returns: a scalar. Raises: ValueError where channels differ and no adapter is given, or for an unknown filter.
    """
    if isinstance(map_student, Tensor) and isinstance(map_teacher, Tensor):
        assert adapter is None or isinstance(adapter, Adapter)
        return _feature_loss(map_student, map_teacher, adapter, noise_filter, frozen_last)
    n = min(len(map_student), len(map_teacher))
    if n == 0:
        raise ValueError("feature_loss needs at least one map of each network")
    adapters = [None] * n if adapter is None else list(adapter)  # type: ignore[arg-type]
    if len(adapters) != n:
        raise ValueError(f"feature_loss got {len(adapters)} adapters for {n} pairs of maps")
    pairs = list(zip(list(map_student)[-n:], list(map_teacher)[-n:], adapters, strict=True))
    losses = [
        _feature_loss(s, t, phi, noise_filter, frozen_last and k == n) / 2 ** (n + 1 - k)
        for k, (s, t, phi) in enumerate(pairs, start=1)
    ]
    return sum(losses[1:], start=losses[0])


def _feature_loss(s: Tensor, t: Tensor, phi: Adapter | None, noise_filter: NoiseFilter, frozen: bool) -> Tensor:
    size = smaller_size(s, t)
    s = pool_to(s, size) if phi is None else phi(s, size, frozen=frozen)
    t = pool_to(t.detach(), size)
    if s.shape != t.shape:
        cs, ct = s.shape[1], t.shape[1]
        raise ValueError(f"feature_loss needs an adapter from {cs} to {ct} channels: Adapter({cs}, {ct})")
    s, t = full_precision(s), full_precision(t)  # [B, C, H, W]
    if noise_filter == "norm":
        s, t = F.normalize(s.flatten(2), dim=2), F.normalize(t.flatten(2), dim=2)  # [B, C, HW]
    elif noise_filter == "relu":
        s, t = F.relu(s), F.relu(t)
    elif noise_filter == "drop":
        error = (s - t).square().mean(dim=1).flatten(1)  # [B, HW]
        kept = error.shape[1] - error.shape[1] // 3
        return error.topk(kept, dim=1, largest=False, sorted=False).values.mean()
    elif noise_filter != "none":
        raise ValueError(f"unknown noise filter {noise_filter!r}: 'none', 'norm', 'relu' or 'drop'")
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
