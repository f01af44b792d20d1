"""Zero-stuffing, padding, FIR filtering and decimation of images in one operation (Karras et al.,
StyleGAN). All resampling in the StyleGAN family is this operation.

Here are its definition and the reference in plain PyTorch, differentiable to any order, which
multiplies no stuffed zero and computes no dropped pixel: with a separable filter the operation is
one banded matrix along each axis, which is a matrix product. Native kernels do the same if the
policy (backend.py) says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops import _native
from custom_ops._resampling import Resample, Resampling, resampling
from custom_ops.backend import widened

_LONGEST_BLOCK = 256
"""Outputs of one matrix product: the band of a long axis is narrow, so it is cut into blocks."""
_IDENTITY = (1, 1, 1, 0, 0)
"""up, down, taps, before and after of an axis along which nothing moves."""


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
    upsampling. Raises ValueError if nothing would be left of the image.
    """
    along_x, along_y = resampling(x.shape, f, up=up, down=down, padding=padding)
    op = Resample(f, along_x, along_y, flip_filter, gain)
    wide, kernels = widened(x, f)
    result = reference(wide, op) if kernels is None else _native.upfirdn2d(kernels, wide, op)
    return result.to(x.dtype)


def reference(x: Tensor, op: Resample) -> Tensor:
    """Return `upfirdn2d` in plain PyTorch, differentiable to any order in x and f."""
    f, along_x, along_y, flip_filter, gain = op
    if f is None and along_x[1:] == along_y[1:] == _IDENTITY:
        return x if gain == 1 else x * gain
    f = torch.ones(1, device=x.device, dtype=x.dtype) if f is None else f.to(x.dtype)
    if f.ndim == 2:
        return _filter_plane(x, (f if flip_filter else f.flip((0, 1))) * gain, along_x, along_y)
    line_y = f if flip_filter else f.flip(0)
    line_x = line_y * gain
    if along_x.up * along_y.down >= along_y.up * along_x.down:  # shrink first, grow last
        return _filter_lines(_filter_lines(x, line_y, along_y, axis=2), line_x, along_x, axis=3)
    return _filter_lines(_filter_lines(x, line_x, along_x, axis=3), line_y, along_y, axis=2)


def _filter_lines(x: Tensor, taps: Tensor, along: Resampling, *, axis: int) -> Tensor:
    """Return x [N, C, H, W] resampled along one axis, correlated with taps."""
    if along[1:] == _IDENTITY:
        return x * taps
    matrix = _banded_matrix(taps, along)
    if along.out_size <= _LONGEST_BLOCK:
        return _multiply(x, matrix, axis=axis)
    blocks = []
    for first in range(0, along.out_size, _LONGEST_BLOCK):
        rows = matrix[first : first + _LONGEST_BLOCK]
        begin, end = _inputs_of(along, first, first + len(rows))
        part = x.narrow(axis, begin, end - begin)
        blocks.append(_multiply(part, rows[:, begin:end], axis=axis))
    return torch.cat(blocks, dim=axis)


def _inputs_of(along: Resampling, first: int, end: int) -> tuple[int, int]:
    """Return the range of inputs, at least one, on which the outputs first to end - 1 depend."""
    lowest = -((along.before - first * along.down) // along.up)
    highest = ((end - 1) * along.down - along.before + along.taps - 1) // along.up
    lowest = min(max(lowest, 0), along.size - 1)
    return lowest, max(lowest, min(highest, along.size - 1)) + 1


def _banded_matrix(taps: Tensor, along: Resampling) -> Tensor:
    """Return the matrix [out, in] of one axis: element (o, i) is taps[i * up + before - o *
    down].
    """
    outputs = torch.arange(along.out_size, device=taps.device)[:, None]
    inputs = torch.arange(along.size, device=taps.device)
    offset = inputs * along.up + along.before - outputs * along.down
    inside = (offset >= 0) & (offset < along.taps)
    return taps[offset.clamp(0, along.taps - 1)] * inside


def _multiply(x: Tensor, matrix: Tensor, *, axis: int) -> Tensor:
    """Return the product [out, in] @ x along an axis of x [N, C, H, W], in the memory layout of
    x.
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x @ matrix.t() if axis == 3 else matrix @ x
    pixels = x.permute(0, 2, 3, 1)  # [N, H, W, C], contiguous
    if axis == 3:
        return (matrix @ pixels).permute(0, 3, 1, 2)
    rows = matrix @ pixels.flatten(2)  # [N, H', W * C]
    return rows.unflatten(2, pixels.shape[2:]).permute(0, 3, 1, 2)


def _filter_plane(x: Tensor, taps: Tensor, along_x: Resampling, along_y: Resampling) -> Tensor:
    """Return x [N, C, H, W] resampled and correlated with taps [fh, fw].

    A transposed convolution stuffs no zeros, one with a stride computes no pixel that is dropped.
    """
    channels = x.shape[1]
    if along_x.up == along_y.up == 1:
        x = _pad(x, [along_x.before, along_x.after, along_y.before, along_y.after])
        weight = taps.expand(channels, 1, *taps.shape)
        return F.conv2d(x, weight, stride=(along_y.down, along_x.down), groups=channels)
    weight = taps.flip((0, 1)).expand(channels, 1, *taps.shape)
    spread = F.conv_transpose2d(x, weight, stride=(along_y.up, along_x.up), groups=channels)
    sides = [
        side
        for along in (along_x, along_y)
        for side in (along.before - along.taps + 1, along.after + along.up - along.taps)
    ]
    return _pad(spread, sides)[:, :, :: along_y.down, :: along_x.down]


def _pad(x: Tensor, sides: list[int]) -> Tensor:
    """Return x with zeros at its sides, then cropped if a side is negative."""
    if min(sides) >= 0:
        return F.pad(x, sides)
    return F.pad(F.pad(x, [max(side, 0) for side in sides]), [min(side, 0) for side in sides])
