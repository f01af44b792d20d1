"""Zero-stuffing, padding, FIR filtering and decimation of images in one operation (Karras et al.,
StyleGAN).

Plain PyTorch, differentiable to any order. All resampling in the StyleGAN family is this operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fir_filter(taps: Sequence[float]) -> Tensor:
    """Return the 2-D filter [n, n] float32 with unit sum that is the outer product of `taps` with
    itself.
    """
    line = torch.as_tensor(taps, dtype=torch.float32)
    plane = torch.outer(line, line)
    return plane / plane.sum()


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Return x upsampled, filtered and downsampled: [N, C, H, W] -> [N, C, H', W'].

    Each pixel is followed by up - 1 zeros per axis; the image is padded with zeros (negative:
    cropped); it is convolved with gain * f (correlated, if flip_filter); every down-th pixel is
    kept. Along an axis H' = (H * up + before + after - taps) // down + 1.

    f: [fh, fw], or [taps] for a separable filter, or None for the identity. up, down: one number or
    (x, y). padding: one number, (x, y) or (x before, x after, y before, y after), counted after
    upsampling.
    """
    up_x, up_y = _pair(up)
    down_x, down_y = _pair(down)
    x = F.pad(_zero_stuff(x, up_x, up_y), _four(padding))
    return _filter(x, f, gain=gain, flip_filter=flip_filter)[:, :, ::down_y, ::down_x]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _four(padding: int | Sequence[int]) -> list[int]:
    if isinstance(padding, int):
        return [padding] * 4
    if len(padding) == 2:
        return [padding[0], padding[0], padding[1], padding[1]]
    return [int(side) for side in padding]


def _zero_stuff(x: Tensor, up_x: int, up_y: int) -> Tensor:
    if up_x == up_y == 1:
        return x
    count, channels, height, width = x.shape
    stuffed = x.reshape(count, channels, height, 1, width, 1)
    stuffed = F.pad(stuffed, (0, up_x - 1, 0, 0, 0, up_y - 1))
    return stuffed.reshape(count, channels, height * up_y, width * up_x)


def _filter(x: Tensor, f: Tensor | None, *, gain: float, flip_filter: bool) -> Tensor:
    if f is None:
        return x * gain
    if f.ndim == 1:
        root = gain**0.5
        x = _filter(x, f[None, :], gain=root, flip_filter=flip_filter)
        return _filter(x, f[:, None], gain=root, flip_filter=flip_filter)
    channels = x.shape[1]
    taps = (f if flip_filter else f.flip((0, 1))).to(x.dtype) * gain
    return F.conv2d(x, taps.expand(channels, 1, *taps.shape), groups=channels)
