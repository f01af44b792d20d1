"""Leaky ReLU at a higher sampling rate, so that frequencies beyond the band limit are filtered away
(Karras et al., Alias-Free Generative Adversarial Networks, NeurIPS 2021, Fig. 4b and appendix D).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt

from torch import Tensor

from custom_ops import _native, bias_act, upfirdn2d
from custom_ops._native import BiasAct, FilteredLrelu, LeakyRelu
from custom_ops._resampling import Resample, resampling
from custom_ops.backend import widened


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
    bias of the wrong length, and if nothing would be left of the image.
    """
    if b is not None and b.shape != (x.shape[1],):
        raise ValueError(f"bias has shape {tuple(b.shape)}, x has {x.shape[1]} channels")
    along_up = resampling(x.shape, fu, up=up, down=1, padding=padding)
    middle = (*x.shape[:2], along_up[1].out_size, along_up[0].out_size)
    along_down = resampling(middle, fd, up=1, down=down, padding=0)
    op = FilteredLrelu(
        Resample(fu, *along_up, flip_filter, float(up**2)),
        Resample(fd, *along_down, flip_filter, 1.0),
        LeakyRelu(gain, slope, inf if clamp is None else clamp),
    )
    wide, kernels = widened(x, fu, fd)
    if kernels is None:
        return reference(wide, b, op).to(x.dtype)
    return _native.filtered_lrelu(kernels, wide, b, op).to(x.dtype)


def reference(x: Tensor, b: Tensor | None, op: FilteredLrelu) -> Tensor:
    """Return `filtered_lrelu` in plain PyTorch, differentiable to any order."""
    gain, slope, clamp = op.lrelu
    x = x if b is None else x + b[:, None, None]
    x = upfirdn2d.reference(x, op.up)
    x = bias_act.reference(x, None, BiasAct(1, "lrelu", slope, gain, clamp))
    return upfirdn2d.reference(x, op.down)
