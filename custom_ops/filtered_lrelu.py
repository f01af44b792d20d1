"""Leaky ReLU at a higher sampling rate, so that what it adds beyond the band limit is filtered away
(Karras et al., Alias-Free Generative Adversarial Networks, NeurIPS 2021, Fig. 4b and appendix D).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from torch import Tensor

from custom_ops.bias_act import bias_act
from custom_ops.upfirdn2d import upfirdn2d


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Return down(clip(gain * lrelu(up(x + b); slope), -clamp, clamp)): [N, C, H, W] -> [N, C, H',
    W'].

    up(.) is `upfirdn2d` with fu, `padding` and gain up^2, which keeps the signal's level; down(.)
    is `upfirdn2d` with fd. Along an axis H' = (H * up + before + after - taps_u - taps_d + 1
    + down) // down.

    b: [C], added to x, not to the padding. fu, fd: [fh, fw], or [taps] for a separable filter, or
    None for the identity. padding: one number, (x, y) or (x before, x after, y before, y after),
    counted after upsampling; negative crops. `clamp=None` clips nothing. Raises ValueError for a
    bias of the wrong length.
    """
    x = bias_act(x, b)
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)
