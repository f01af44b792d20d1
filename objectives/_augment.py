"""EDM's augmentation of training images, told to the network (Karras et al. 2022, Appendix F.2).

Each image is mirrored, and with some probability flipped, scaled, rotated, squeezed and moved; nine
numbers say how, and are 0 for an image as it is. Differs from the published program in
resampling: one bicubic interpolation here, twice as fine a grid in between there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.randomness import Draws

LABELS = 9
"""Mirror, flip, scale, two of rotation, two of squeezing, two of translation."""
_LOG2_SCALE = 0.2
_SHIFT = 0.125
"""Standard deviations: of log2 of scale and squeezing, and of translation in image widths."""


class Augmented(NamedTuple):
    """Augmented images, and their transformations."""

    images: Tensor
    """[N, C, H, W]"""
    labels: Tensor
    """[N, 9]"""


def augment(images: Tensor, draws: Draws, *, probability: float) -> Augmented:
    """Return images [N, C, H, W], H = W, after random geometric changes (EDM, Table 6).

    Half of them are mirrored; each other change comes with this probability. Pixels that enter at a
    border is the image reflected.
    """
    used = draws.uniform("augment", (5,)) < probability  # [N, 5]
    uniform, normal = draws.uniform("change", (4,)), draws.normal("change", (4,))

    # parameters of each transformation, 0 where unused
    mirror = (uniform[:, 0] < 0.5).float()
    flip = (uniform[:, 1] < 0.5).float() * used[:, 0]
    scale = normal[:, 0] * used[:, 1]
    angle = (uniform[:, 2] * 2 - 1) * math.pi * used[:, 2]
    squeeze, direction = normal[:, 1] * used[:, 3], (uniform[:, 3] * 2 - 1) * math.pi
    shift = normal[:, 2:] * used[:, 4:]  # [N, 2]

    # one affine map an image, and its description for the network
    change = (
        _translation(shift * (2 * _SHIFT))
        @ _rotation(direction)
        @ _scaling((squeeze * _LOG2_SCALE).exp2(), (-squeeze * _LOG2_SCALE).exp2())
        @ _rotation(-direction)
        @ _rotation(angle)
        @ _scaling((scale * _LOG2_SCALE).exp2(), (scale * _LOG2_SCALE).exp2())
        @ _scaling(1 - 2 * mirror, 1 - 2 * flip)
    )
    labels = [mirror, flip, scale, angle.cos() - 1, angle.sin()]
    labels += [squeeze * direction.cos(), squeeze * direction.sin(), shift[:, 0], shift[:, 1]]
    return Augmented(transformed(images, change), torch.stack(labels, 1))


def transformed(images: Tensor, change: Tensor) -> Tensor:
    """Return images moved by maps [N, 3, 3] of the square [-1, 1]^2: x to the right, y down."""
    back = torch.linalg.inv(change)[:, :2]
    grid = F.affine_grid(back, list(images.shape), align_corners=False)
    return F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )


def _rotation(angle: Tensor) -> Tensor:
    """Return maps [N, 3, 3] that turn the x axis towards the y axis."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _maps(cos, -sin, zero, sin, cos, zero)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _maps(x, zero, zero, zero, y, zero)


def _translation(shift: Tensor) -> Tensor:
    one, zero = torch.ones_like(shift[:, 0]), torch.zeros_like(shift[:, 0])
    return _maps(one, zero, shift[:, 0], zero, one, shift[:, 1])


def _maps(*entries: Tensor) -> Tensor:
    """Return [N, 3, 3] from the six entries [N] of the upper rows."""
    zero, one = torch.zeros_like(entries[0]), torch.ones_like(entries[0])
    return torch.stack([*entries, zero, zero, one], 1).unflatten(1, (3, 3))
