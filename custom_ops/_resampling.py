"""Resampling of upfirdn2d along each axis, and the prepared filter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Resampling(NamedTuple):
    """Resampling along one axis."""

    size: int
    """Pixels before."""
    up: int
    down: int
    taps: int
    before: int
    """Zeros in front, counted after upsampling; negative: cropped."""
    after: int
    """Zeros behind, likewise."""

    @property
    def out_size(self) -> int:
        """Pixels afterwards."""
        return (self.size * self.up + self.before + self.after - self.taps) // self.down + 1

    def transposed(self) -> Resampling:
        """Return the axis of the transpose, which takes gradients back: its filter is reversed."""
        before = self.taps - 1 - self.before
        stretched = (self.size - 1) * self.up + self.taps
        after = stretched - self.out_size * self.down - before
        return Resampling(self.out_size, self.down, self.up, self.taps, before, after)


def resampling(
    shape: Sequence[int],
    f: Tensor | None,
    *,
    up: int | Sequence[int],
    down: int | Sequence[int],
    padding: int | Sequence[int],
) -> tuple[Resampling, Resampling]:
    """Return the resampling along x and along y of images [N, C, H, W] of this shape.

    Raises ValueError if nothing would be left of the image.
    """
    taps_y, taps_x = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    (up_x, up_y), (down_x, down_y) = _pair(up), _pair(down)
    left, right, top, bottom = _four(padding)
    along_x = Resampling(shape[3], up_x, down_x, taps_x, left, right)
    along_y = Resampling(shape[2], up_y, down_y, taps_y, top, bottom)
    if min(along_x.out_size, along_y.out_size) < 1:
        raise ValueError(
            f"nothing is left of images {tuple(shape)} with up {up}, down {down}, "
            f"padding {padding} and a filter of {taps_y} x {taps_x} taps"
        )
    return along_x, along_y


def separated(f: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the filters [fw] along x and [fh] along y whose outer product is f, or None."""
    if f.ndim == 1:
        return f, f
    row, column = divmod(int(f.abs().argmax()), f.shape[1])
    if f[row, column] == 0:
        return f[0], f[:, 0]
    line_x, line_y = f[row], f[:, column] / f[row, column]
    error = (torch.outer(line_y, line_x) - f).abs().max()
    return (line_x, line_y) if error <= 2 * torch.finfo(f.dtype).eps * f.abs().max() else None


class Taps(NamedTuple):
    """A filter as it is multiplied: correlated with the image, gain included."""

    x: Tensor | None
    """[fw], or None if the filter is a plane."""
    y: Tensor | None
    """[fh], likewise."""
    plane: Tensor | None
    """[fh, fw] that is no outer product, else None."""


class Resample(NamedTuple):
    """One upfirdn2d with a filter that is not trained."""

    f: Tensor | None
    along_x: Resampling
    along_y: Resampling
    flip_filter: bool
    gain: float

    def transposed(self) -> Resample:
        """Return the operation that takes gradients back."""
        along_x, along_y = self.along_x.transposed(), self.along_y.transposed()
        return Resample(self.f, along_x, along_y, not self.flip_filter, self.gain)

    def taps(self, like: Tensor) -> Taps:
        """Return the filter in at least float32, on the device of an image.

        Kept as long as the filter is: the same few are asked for in every step.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.f is None:
            return _identity(self.gain, dtype, like.device)
        if self.f.is_inference():  # counts no changes
            return _prepared(self.f.to(like.device, dtype), self.flip_filter, self.gain)
        state = (self.f._version, self.f.data_ptr())
        prepared_from, kept = _kept.get(self.f) or (None, {})
        if prepared_from != state:  # written to since, by a moving average that copies buffers, say
            _kept[self.f] = state, (kept := {})
        key = (self.flip_filter, self.gain, dtype, like.device)
        if key not in kept:
            kept[key] = _prepared(self.f.to(like.device, dtype), self.flip_filter, self.gain)
        return kept[key]


_kept = WeakIdKeyDictionary()


@cache
def _identity(gain: float, dtype: torch.dtype, device: torch.device) -> Taps:
    ones = torch.ones(1, dtype=dtype, device=device)
    return Taps(ones * gain, ones, None)


@torch.no_grad()
def _prepared(f: Tensor, flip_filter: bool, gain: float) -> Taps:
    lines = separated(f)
    if lines is None:
        return Taps(None, None, ((f if flip_filter else f.flip((0, 1))) * gain).contiguous())
    line_x, line_y = (line if flip_filter else line.flip(0) for line in lines)
    return Taps((line_x * gain).contiguous(), line_y.contiguous(), None)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _four(padding: int | Sequence[int]) -> list[int]:
    if isinstance(padding, int):
        return [padding] * 4
    if len(padding) == 2:
        return [padding[0], padding[0], padding[1], padding[1]]
    return [int(side) for side in padding]
