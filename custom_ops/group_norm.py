"""Group normalization (Wu & He 2018, arXiv 1803.08494), with the bias before and the modulation and
SiLU after it, in one operation: what a residual block of EDM and ADM does between two convolutions.

Here are its definition and the reference in plain PyTorch, differentiable to any order. The native
kernels are for GPUs and read each image twice, in either memory layout; PyTorch's own group
normalization there knows no channels-last and copies to and fro.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops import _native, backend
from custom_ops._build import Library
from custom_ops._native import GroupNorm, GroupNormTerms
from custom_ops.backend import kernels_for

NATIVE_DEVICES = {"cuda"}
"""Kinds of devices with kernels; on others nothing is compiled for this operation."""
IN_AUTO = False
"""Whether the policy `auto` takes the kernels: not before they have run on a GPU; `native` does."""


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Return act((n * weight + bias) * (1 + scale) + shift), of the shape, dtype and layout of x.

    n = (u - mean) / sqrt(variance + eps) for u = x + pre_bias, with the mean and the (biased)
    variance of u over the pixels and channels of each image and group; act(v) = v sigmoid(v) with
    silu, else v. x: [N, C, *]. weight, bias: [C]. scale, shift: [N, C]. pre_bias: [C] or [N, C].
    Moments are in float32 at least; kernels round to the dtype of x once, at the end.

    Raises ValueError for channels that groups do not divide, and for a wrong shape.
    """
    terms = GroupNormTerms(weight, bias, scale, shift, pre_bias)
    _check(x, groups, terms)
    op = GroupNorm(groups, eps, silu)
    kernels = _kernels(x)
    if kernels is None or not _native.takes_group_norm(kernels, x, op):
        return reference(x, terms, op)
    return _native.group_norm(kernels, x, terms, op)


def folds_bias(x: Tensor) -> bool:
    """Return whether a pre_bias costs `group_norm` of tensors like x nothing: no pass of its own.

    Then a convolution before can leave its bias to it; in plain PyTorch that would be slower.
    """
    return _kernels(x) is not None


def reference(x: Tensor, terms: GroupNormTerms, op: GroupNorm) -> Tensor:
    """Return `group_norm` in plain PyTorch, every step in the dtype of x."""
    weight, bias, scale, shift, pre_bias = (
        None if term is None else term.to(x.dtype) for term in terms
    )
    if pre_bias is not None:
        x = x + _over_pixels(pre_bias, x)
    y = F.group_norm(x, op.groups, weight, bias, op.eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(_over_pixels(shift, x), y, _over_pixels(scale, x) + 1)
    elif scale is not None:
        y = y * (_over_pixels(scale, x) + 1)
    elif shift is not None:
        y = y + _over_pixels(shift, x)
    return F.silu(y) if op.silu else y


def _kernels(x: Tensor) -> Library | None:
    if x.device.type not in NATIVE_DEVICES or (backend.current() == "auto" and not IN_AUTO):
        return None
    return kernels_for(x)


def _over_pixels(term: Tensor, x: Tensor) -> Tensor:
    """Return a term [C] or [N, C] with a dimension for each of x [N, C, *]."""
    return term.reshape(*term.shape, *[1] * (x.ndim - 2))


def _check(x: Tensor, groups: int, terms: GroupNormTerms) -> None:
    per_channel, per_image = [x.shape[1:2]], [x.shape[:2]]
    shapes = (per_channel, per_channel, per_image, per_image, per_channel + per_image)
    if x.shape[1] % groups:
        raise ValueError(f"x has {x.shape[1]} channels, not a multiple of {groups} groups")
    for name, term, allowed in zip(terms._fields, terms, shapes, strict=True):
        if term is not None and term.shape not in allowed:
            expected = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{name} has shape {list(term.shape)}, expected {expected}")
