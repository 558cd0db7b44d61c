"""What image classification and segmentation share of KDCL and SwitOKD: a target, and when a teacher pauses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distillation import full_precision


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
