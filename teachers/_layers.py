"""The layers of EDM's U-Nets: resampling convolution, embeddings, residual block.

Names of parameters and buffers, initialisation and numbers are the published ones (Karras et al.
2022, arXiv 2206.00364). Resampling with the box filter takes a shorter way to the
same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_ops.conv2d import conv2d
from custom_ops.group_norm import folds_bias
from custom_ops.group_norm import group_norm as normalized

Resample = Literal["up", "down"]
InitLaw = Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"]


@dataclass(frozen=True)
class Init:
    """How the weights of a layer are drawn; biases follow the same law, zero by default."""

    law: InitLaw
    weight_scale: float = 1.0
    bias_scale: float = 0.0

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Draw weight [out, in, *kernel] and bias [out] in place."""
        receptive = math.prod(weight.shape[2:])
        fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] * receptive
        scales = ((weight, self.weight_scale), (bias, self.bias_scale))
        with torch.no_grad():
            for parameter, scale in scales:
                if parameter is None:
                    continue
                elif scale == 0.0:
                    parameter.zero_()
                elif self.law == "kaiming_normal":
                    parameter.normal_(0.0, scale / math.sqrt(fan_in))
                else:
                    xavier = self.law == "xavier_uniform"
                    bound = scale * math.sqrt(6 / (fan_in + fan_out) if xavier else 3 / fan_in)
                    parameter.uniform_(-bound, bound)


def linear(in_features: int, out_features: int, *, init: Init, bias: bool = True) -> nn.Linear:
    """Return a linear layer, initialised."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    init.fill(layer.weight, layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalization, modulation and SiLU in the precision of the input."""

    def forward(
        self,
        input: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_bias: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        return normalized(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=scale,
            shift=shift,
            pre_bias=pre_bias,
            silu=silu,
        )


def group_norm(channels: int, *, eps: float) -> GroupNorm:
    """Return the normalisation over 32 groups, or fewer so that each has at least 4 channels."""
    return GroupNorm(min(32, channels // 4), channels, eps=eps)


class Conv(nn.Module):
    """Resamples by two (or not) with a fixed filter, then convolves (or not: kernel 0).

    In the precision of the images, whatever that of the weights. Called with biased=False, it
    leaves adding its bias to the caller.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        init: Init,
        resample: Resample | None = None,
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.padding = kernel // 2
        self.resample = resample
        self.weight = self.bias = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            init.fill(self.weight, self.bias)
        if resample:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            square = taps.outer(taps) / taps.sum().square()
            self.register_buffer("resample_filter", square[None, None])  # [1, 1, taps, taps]
        self.is_box = tuple(resample_filter) == (1, 1)

    def forward(self, images: Tensor, *, biased: bool = True) -> Tensor:
        if self.resample == "up" and self.is_box and self.weight is not None:
            return self._convolved_finer(images, biased=biased)
        if self.resample == "up":
            images = self._upsampled(images)
        elif self.resample == "down":
            images = self._downsampled(images, padding=(self.resample_filter.shape[-1] - 1) // 2)
        if self.weight is None:
            return images
        return self._convolved(images, padding=self.padding, biased=biased)

    def _convolved(self, images: Tensor, *, padding: int, biased: bool = True) -> Tensor:
        assert self.weight is not None and self.bias is not None
        weight = self.weight.to(images.dtype)
        bias = self.bias.to(images.dtype) if biased else None
        return conv2d(images, weight, bias, padding=padding)

    def _convolved_finer(self, images: Tensor, *, biased: bool) -> Tensor:
        """Return the convolution of the nearest-neighbour upsampled images, without making those.

        Every input pixel stands for 2x2 equal ones, so it spreads the box sum of the kernel: 16
        products where 36 were (3x3), and twice as fast.
        """
        assert self.weight is not None and self.bias is not None
        flipped = self.weight.flip(2, 3).transpose(0, 1)  # [in, out, k, k]
        spread = 4 * F.avg_pool2d(flipped, 2, stride=1, padding=1)  # [in, out, k + 1, k + 1]
        weight = spread.to(images.dtype)
        bias = self.bias.to(images.dtype) if biased else None
        return F.conv_transpose2d(images, weight, bias, stride=2, padding=self.padding)

    def _upsampled(self, images: Tensor) -> Tensor:
        if self.is_box:
            return F.interpolate(images, scale_factor=2, mode="nearest")
        channels, padding = images.shape[1], (self.resample_filter.shape[-1] - 1) // 2
        kernel = (4 * self.resample_filter).to(images.dtype).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(images, kernel, stride=2, padding=padding, groups=channels)

    def _downsampled(self, images: Tensor, *, padding: int) -> Tensor:
        if self.is_box:
            return F.avg_pool2d(images, 2, padding=padding)
        channels = images.shape[1]
        kernel = self.resample_filter.to(images.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(images, kernel, stride=2, padding=padding, groups=channels)


class ConvThenDown(Conv):
    """Convolves first, then halves: NCSN++'s input residual. The same keys as `Conv`."""

    def forward(self, images: Tensor, *, biased: bool = True) -> Tensor:
        # All padding comes before the convolution, as published: the filter sees no border.
        margin = (self.resample_filter.shape[-1] - 1) // 2
        wide = self._convolved(images, padding=self.padding + margin, biased=biased)
        return self._downsampled(wide, padding=0)


class PositionalEmbedding(nn.Module):
    """Cosines and sines of the noise level at frequencies from 1 to about 1/10000 [N, channels]."""

    frequencies: Tensor

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        half = channels // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - (1 if endpoint else 0))
        self.register_buffer("frequencies", (1 / 10000) ** exponents, persistent=False)

    def forward(self, noise_levels: Tensor) -> Tensor:
        angles = noise_levels.outer(self.frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of the noise level at random, stored frequencies [N, channels]."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, noise_levels: Tensor) -> Tensor:
        angles = noise_levels.outer(2 * math.pi * self.freqs)
        return torch.cat((angles.cos(), angles.sin()), dim=1)


def noise_embedding(kind: Literal["positional", "fourier"], channels: int) -> nn.Module:
    """Return SongUNet's embedding of c_noise."""
    if kind == "fourier":
        return FourierEmbedding(channels)
    return PositionalEmbedding(channels, endpoint=True)


class LabelDropout(nn.Module):
    """Zeroes each row of one-hot labels with this probability, in train mode only."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, one_hot_labels: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return one_hot_labels
        return one_hot_labels * (torch.rand_like(one_hot_labels[:, :1]) >= self.probability)


@dataclass(frozen=True)
class BlockStyle:
    """Settings that all residual blocks of one network share."""

    emb_channels: int
    dropout: float
    resample_filter: tuple[int, ...]
    init: Init
    init_zero: Init
    init_attention: Init
    num_heads: int | None
    """None: one head for every 64 channels."""
    skip_scale: float
    norm_eps: float
    project_resampled: bool
    """A resampling block has a 1x1 convolution in its skip even if the channels stay the same."""
    adaptive_scale: bool
    """The embedding scales and shifts the normalised features, instead of being added before."""


class Block(nn.Module):
    """A residual block, with its resampling inside and its attention after."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        style: BlockStyle,
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.dropout = style.dropout
        self.skip_scale = style.skip_scale
        self.adaptive_scale = style.adaptive_scale
        self.num_heads = (style.num_heads or out_channels // 64) if attention else 0
        affine_channels = 2 * out_channels if style.adaptive_scale else out_channels
        resampling = {"resample": resample, "resample_filter": style.resample_filter}

        self.norm0 = group_norm(in_channels, eps=style.norm_eps)
        self.conv0 = Conv(in_channels, out_channels, kernel=3, init=style.init, **resampling)
        self.affine = linear(style.emb_channels, affine_channels, init=style.init)
        self.norm1 = group_norm(out_channels, eps=style.norm_eps)
        self.conv1 = Conv(out_channels, out_channels, kernel=3, init=style.init_zero)
        self.skip = None
        if resample or in_channels != out_channels:
            kernel = 1 if style.project_resampled or in_channels != out_channels else 0
            self.skip = Conv(
                in_channels, out_channels, kernel=kernel, init=style.init, **resampling
            )
        if self.num_heads:
            self.norm2 = group_norm(out_channels, eps=style.norm_eps)
            self.qkv = Conv(out_channels, 3 * out_channels, kernel=1, init=style.init_attention)
            self.proj = Conv(out_channels, out_channels, kernel=1, init=style.init_zero)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        shortcut = features if self.skip is None else self.skip(features)
        is_folded = folds_bias(features)  # conv0's bias is then added by norm1
        hidden = self.conv0(self.norm0(features, silu=True), biased=not is_folded)
        modulation = self.affine(embedding)  # [N, affine_channels] float32, as the embedding
        hidden = self._modulated(hidden, modulation, bias=self.conv0.bias if is_folded else None)
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        features = self._joined(hidden, shortcut)
        if self.num_heads:
            features = self._joined(self.proj(self._attended(features)), features)
        return features

    def _modulated(self, hidden: Tensor, modulation: Tensor, *, bias: Tensor | None) -> Tensor:
        """Return hidden + bias normalized, modulated, activated. bias: [out_channels] or None."""
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            return self.norm1(hidden, scale=scale, shift=shift, pre_bias=bias, silu=True)
        if bias is not None:
            return self.norm1(hidden, pre_bias=modulation + bias, silu=True)
        # In place, as in _joined.
        return self.norm1(hidden.add_(modulation.to(hidden.dtype)[:, :, None, None]), silu=True)

    def _joined(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        # In place: the branch comes from a convolution, whose backward does not need its output.
        joined = branch.add_(shortcut)
        return joined if self.skip_scale == 1.0 else joined.mul_(self.skip_scale)

    def _attended(self, features: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(channels per head)) v over pixels."""
        qkv = self.qkv(self.norm2(features)).flatten(2)
        # Published channel order: head, channel within the head, then which of query, key, value.
        qkv = qkv.unflatten(1, (self.num_heads, -1, 3))
        query, key, value = qkv.permute(3, 0, 1, 4, 2).contiguous()  # [N, heads, H*W, c]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(2, 3).reshape(features.shape)
