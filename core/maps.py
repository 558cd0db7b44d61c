"""Feature maps ``[B, C, *places]`` with one to three trailing dimensions: sequences, images, volumes.

How two of them are brought to one size, and which pairs cannot be compared place by place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

LARGEST_SIDE = 15
"""Of what is taken for an image with its channels last: a lidar of 16 beams makes maps ``[B, 16, 16, 1024]``."""


def full_precision(x: Tensor) -> Tensor:
    """At least float32, also under autocast; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def smaller_size(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The elementwise smaller size of two maps ``[B, C, *places]``, e.g. (H, W): at which they are compared.

    Raises: InputError where one has more dimensions than the other.
    """
    if a.dim() != b.dim():
        raise InputError(f"maps {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: give maps of one kind")
    return tuple(min(m, n) for m, n in zip(a.shape[2:], b.shape[2:], strict=True))


def pool_to(feature_map: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average-pools ``[B, C, *places]`` to ``size``; the same tensor where it has that size already."""
    if feature_map.shape[2:] == size:
        return feature_map
    if len(size) == 1:
        return F.adaptive_avg_pool1d(feature_map, size[0])
    if len(size) == 2:
        return F.adaptive_avg_pool2d(feature_map, (size[0], size[1]))
    return F.adaptive_avg_pool3d(feature_map, (size[0], size[1], size[2]))


def check_maps(map_student: Any, map_teacher: Any, student: str = "student", teacher: str = "teacher") -> None:
    """Refuses two maps that ADM cannot compare, by their shapes alone (no values are read, nothing waits for a device).

    Args: maps ``[B, Cs, *places]`` and ``[B, Ct, *places]`` with 1 to 3 dimensions of places; what the networks are
        called in the message.
    Raises: InputError, a ValueError, for
        anything but two tensors of equally many dimensions, 3 to 5, and one batch size;
        channels in the last dimension, as far as a shape can tell (``_channels_last``);
        a single place, where every attention is 1 and ADM a second cross-entropy;
        sizes that are no even reductions of one image: the ratio of both heights and that of both widths differ by
        more than rounding up or down explains (8 x 8 against 4 x 8, but not 7 x 7 against 4 x 4 or 14 x 14). The
        depth of a volume may have a ratio of its own.
    """
    for name, value in ((student, map_student), (teacher, map_teacher)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name}: one map [B, C, H, W] is needed, a tensor, not a {type(value).__name__}: of several maps give "
                "the last one"
            )
    s, t = tuple(map_student.shape), tuple(map_teacher.shape)
    both = f"a map {s} of {student} and a map {t} of {teacher} cannot be compared: "
    if len(s) != len(t) or not 3 <= len(s) <= 5:
        raise InputError(
            f"{both}both must be [B, C, L], [B, C, H, W] or [B, C, D, H, W], as they are before global pooling"
        )
    if s[0] != t[0]:
        raise InputError(f"{both}give both networks the same batch")
    for name, shape in ((student, s), (teacher, t)):
        if _channels_last(shape):
            mend = {3: "map[:, 1:].transpose(1, 2), without its class token", 4: "map.permute(0, 3, 1, 2)"}
            raise InputError(
                f"{both}that of {name} seems to have its channels last: wrap the network by as_network(model), or give "
                + mend.get(len(shape), "map.permute(0, 4, 1, 2, 3)")
            )
    if all(min(m, n) == 1 for m, n in zip(s[2:], t[2:], strict=True)):
        raise InputError(
            f"{both}at a single place every attention is 1 and ADM does nothing but repeat the cross-entropy: give "
            "larger images, or cut the network earlier, before its pooling"
        )
    if len(s) > 3 and not one_ratio(s[-2:], t[-2:]):
        raise InputError(
            f"{both}they are no even reductions of one image ({s[-2]} x {s[-1]} against {t[-2]} x {t[-1]}): give both "
            "networks images of one aspect ratio"
        )


def one_ratio(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one of two sizes (H, W) is the other's, divided by one number r >= 1 and rounded up or down."""
    h, w, large_h, large_w = min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])
    # h is large_h / r rounded, so that large_h / (h + 1) < r < large_h / (h - 1), and w alike: is there such an r?
    fits = large_h * (w - 1) < large_w * (h + 1) and large_w * (h - 1) < large_h * (w + 1)
    return fits and (a[0] - b[0]) * (a[1] - b[1]) >= 0


def _channels_last(shape: tuple[int, ...]) -> bool:
    """Whether a map is rather ``[B, *places, C]``, by a rule that no map ``[B, C, *places]`` in use is known to meet.

    Images and volumes: the "channels" are one more side of a small image (all at most ``LARGEST_SIDE``, and the longest
    at most twice the shortest), and the last dimension is at least 20 times as long and a multiple of 32, as widths of
    networks are. Sequences: tokens with a class token, k^2 + 1 of them (k >= 7), again before a multiple of 32.
    What it cannot tell: larger images (Swin at 512 pixels makes [B, 16, 16, 1024], as a lidar does), narrow networks,
    and tokens without a class token, [B, 196, 768].
    """
    *sides, last = shape[1:]
    if last % 32 or last == 0:
        return False
    if len(sides) == 1:
        return any(sides[0] == k * k + 1 for k in range(7, 41)) and last >= 192
    longest = max(sides)
    return longest <= LARGEST_SIDE and longest <= 2 * min(sides) and last >= 20 * longest
