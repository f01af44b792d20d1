"""The layers of EDM2 (Karras et al. 2024, arXiv 2312.02696): inputs of unit magnitude,
they put out at unit magnitude.

Numbers of equations are that paper's; names of parameters and buffers and all constants are the
published ones. Products with constants may be taken in another order.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_ops.conv2d import conv2d

Resample = Literal["up", "down"]
_EPS = 1e-4
"""Added to every magnitude that something is divided by."""
_SILU_MAGNITUDE = 0.596
"""Root mean square of silu(x) for unit normal x."""


class MPConv(nn.Module):
    """Convolves, or multiplies (kernel ()), with weights of unit norm for each output (Eq. 47)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, features: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        if self.training:
            self.normalize_weight()
        weight = self.effective_weight(gain).to(features.dtype)
        if weight.ndim == 2:
            return F.linear(features, weight)
        return conv2d(features, weight, padding=weight.shape[-1] // 2)

    def effective_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """Return gain w / |w|, whose outputs for unit normal inputs have variance gain^2."""
        dims = tuple(range(1, self.weight.ndim))
        norm = torch.linalg.vector_norm(self.weight, dim=dims, keepdim=True)
        return self.weight * (gain / (norm + _EPS * math.sqrt(self.weight[0].numel())))

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Set the stored weight to RMS 1 for each output, in place (Eq. 66)."""
        self.weight.copy_(normalized(self.weight, dim=tuple(range(1, self.weight.ndim))))


class MPFourier(nn.Module):
    """Cosines of the noise level at random frequencies and phases [N, channels] (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise_levels: Tensor) -> Tensor:
        return math.sqrt(2) * (noise_levels.outer(self.freqs) + self.phases).cos()


class Kept(nn.Module):
    """A weight that is in the file and that nothing reads.

    No parameter: training on several processes waits for the gradient of every parameter.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


def mp_silu(features: Tensor) -> Tensor:
    """Return silu scaled so that unit normal features keep their mean square (Eq. 81)."""
    return F.silu(features) / _SILU_MAGNITUDE


def mp_sum(first: Tensor, second: Tensor, *, t: float) -> Tensor:
    """Return (1 - t) first + t second, scaled to the magnitude of both (Eq. 88)."""
    return first.lerp(second, t) / math.hypot(1 - t, t)


def mp_cat(first: Tensor, second: Tensor, *, t: float) -> Tensor:
    """Return both along the channels, their sums of squares as (1 - t)^2 to t^2 (Eq. 103)."""
    channels = (first.shape[1], second.shape[1])
    total = math.sqrt(sum(channels)) / math.hypot(1 - t, t)
    scales = (total * (1 - t) / math.sqrt(channels[0]), total * t / math.sqrt(channels[1]))
    return torch.cat((scales[0] * first, scales[1] * second), dim=1)


def normalized(values: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """Return the values at root mean square 1 over the dimensions, less if near 0."""
    precise = torch.promote_types(values.dtype, torch.float32)
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True, dtype=precise)
    return values / (_EPS + norm * math.sqrt(norm.numel() / values.numel())).to(values.dtype)


def resampled(features: Tensor, kind: Resample | None, *, taps: tuple[int, ...]) -> Tensor:
    """Return features at twice or half the resolution, filtered, or as they are."""
    if kind is None:
        return features
    if taps == (1, 1):
        if kind == "down":
            return F.avg_pool2d(features, 2)
        return F.interpolate(features, scale_factor=2, mode="nearest")
    line = features.new_tensor(taps) / sum(taps)
    channels, padding = features.shape[1], (len(taps) - 1) // 2
    kernel = line.outer(line).expand(channels, 1, -1, -1)
    if kind == "down":
        return F.conv2d(features, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(features, 4 * kernel, stride=2, padding=padding, groups=channels)
