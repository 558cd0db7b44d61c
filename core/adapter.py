"""phi: makes a student map comparable with a teacher map (channels by a 1x1 convolution, size by average pooling)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .maps import pool_to


class Adapter(nn.Module):
    """phi of Eq. 5: ``[B, Cs, H, W] -> [B, Ct, h, w]``, a 1x1 convolution without bias.

    Where the channels agree it has no parameters at all, unless it is ``always`` to project. It belongs to no network:
    hand its parameters to the optimiser with the student's, and drop it after training.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, always: bool = False) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.conv: nn.Conv2d | None = None
        if always or student_channels != teacher_channels:
            self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)

    def forward(self, map_student: Tensor, size: tuple[int, int] | None = None, *, frozen: bool = False) -> Tensor:
        """phi(F_s), pooled to ``size`` first (pooling and a 1x1 convolution commute, and this order is cheaper).

        ``frozen``: the gradient reaches the map and not phi's weight, whatever trains that.
        """
        if size is not None:
            map_student = pool_to(map_student, size)
        if self.conv is None:
            return map_student
        return F.conv2d(map_student, self.conv.weight.detach()) if frozen else self.conv(map_student)

    def extra_repr(self) -> str:
        return f"{self.student_channels} -> {self.teacher_channels}"
