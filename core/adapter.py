"""phi: makes a student map comparable with a teacher map (channels by a 1x1 convolution, size by average pooling)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .maps import pool_to


class Adapter(nn.Module):
    """phi of Eq. 5: ``[B, Cs, *places] -> [B, Ct, *places]``, a 1x1 convolution without bias; 1 to 3 dims of places.

    Where the channels agree it has no parameters at all, unless it is ``always`` to project. It belongs to no network:
    hand its parameters to the optimiser with the student's, and drop it after training. Its one weight ``conv.weight``
    is ``[Ct, Cs, 1, 1]`` whatever the maps' dimensions.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, always: bool = False) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.conv: nn.Conv2d | None = None
        if always or student_channels != teacher_channels:
            self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)

    def forward(self, map_student: Tensor, size: tuple[int, ...] | None = None, *, frozen: bool = False) -> Tensor:
        """phi(F_s), pooled to ``size`` first (pooling and a 1x1 convolution commute, and this order is cheaper).

        Outside autocast a map and a weight of different precision meet at the higher one (bfloat16 maps under a float32
        phi: float32).

        Args: the map ``[B, Cs, *places]``; a size with one number for each dimension of places, None: the map's own;
            ``frozen``: the gradient reaches the map and not phi's weight, whatever trains that.
        Raises: InputError for a map of another number of channels.
        """
        if map_student.shape[1] != self.student_channels:
            cs, ct, given = self.student_channels, self.teacher_channels, tuple(map_student.shape)
            raise InputError(f"Adapter({cs}, {ct}) got a map {given} of {given[1]} channels in place of {cs}")
        if size is not None:
            map_student = pool_to(map_student, size)
        if self.conv is None:
            return map_student
        weight = self.conv.weight.detach() if frozen else self.conv.weight
        if map_student.dtype != weight.dtype and not torch.is_autocast_enabled(map_student.device.type):
            dtype = torch.promote_types(map_student.dtype, weight.dtype)
            map_student, weight = map_student.to(dtype), weight.to(dtype)
        if map_student.dim() == 4:
            return F.conv2d(map_student, weight)
        places = map_student.flatten(2).unsqueeze(3)  # [B, Cs, P, 1]
        return F.conv2d(places, weight).squeeze(3).unflatten(2, map_student.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.student_channels} -> {self.teacher_channels}"
