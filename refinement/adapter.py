"""How a teacher sees the images of a student that makes larger ones, or others in colour.

The student's images are shrunk, antialiased, and turned grey or grey into colour; the gradient goes
back the same way. Details lost in shrinking can neither be judged nor improved by the teacher.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError

_LUMINANCE = (0.299, 0.587, 0.114)
"""Grey of red, green and blue (ITU-R BT.601), as Pillow has it."""


class Downsample(nn.Module):
    """Images of one shape to images of another, no larger: [N, c, h, w] -> [N, C, H, W]."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape

    def forward(self, images: Tensor) -> Tensor:
        channels, *size = self.image_shape
        if list(images.shape[2:]) != size:
            images = F.interpolate(
                images, size=size, mode="bicubic", antialias=True, align_corners=False
            )
        return _in_colours(images, channels)


def _in_colours(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return (images * images.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)
    return images.expand(-1, channels, -1, -1)


def downsample(
    student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int]
) -> Downsample:
    """Return the adapter from a student's images to a teacher's, shapes (C, H, W).

    Raises UserError if the student's images are smaller, or have another aspect.
    """
    (few, height, width), (many, low, narrow) = student_shape, teacher_shape
    if height < low or width < narrow:
        raise UserError(
            f"teacher.adapter downsample: the student's images are {width}x{height}, smaller than "
            f"the teacher's {narrow}x{low}; choose a teacher of that size or smaller"
        )
    if height * narrow != width * low:
        raise UserError(
            f"teacher.adapter downsample: the student's images are {width}x{height}, the teacher's "
            f"{narrow}x{low}, of another aspect: they would be distorted"
        )
    if {few, many} - {1, 3} and few != many:
        raise UserError(
            f"teacher.adapter downsample: no way from {few} channels to {many}; "
            "only grey (1) and RGB (3) are turned into each other"
        )
    return Downsample(teacher_shape)
