"""Mixed precision of networks in training; their inputs, outputs and parameters stay float32.

A module that supports it has an attribute `compute_dtype`, float32 unless set here, and casts its
parameters at each use. Evaluation, export and the moving average are float32 for every precision.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""tf32: float32 with products rounded to 10 bits by tensor cores; no effect on a CPU.
float16: for GPUs without bfloat16; small gradients underflow, so it needs loss scaling.
"""
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class SupportsPrecision(Protocol):
    """A module with selectable precision."""

    compute_dtype: torch.dtype


@contextmanager
def compute_precision(precision: Precision, networks: Iterable[nn.Module]) -> Iterator[None]:
    """Set the compute precision of all supporting modules of the networks in the body.

    TF32, PyTorch's default for convolutions, is off in the body unless the precision is tf32.
    """
    modules = (module for network in networks for module in network.modules())
    supporting = [cast(SupportsPrecision, m) for m in modules if hasattr(m, "compute_dtype")]
    before = [module.compute_dtype for module in supporting]
    for module in supporting:
        module.compute_dtype = DTYPES[precision]
    try:
        with allow_tf32(precision == "tf32"):
            yield
    finally:
        for module, dtype in zip(supporting, before, strict=True):
            module.compute_dtype = dtype


def slowdown(precision: Precision, device: torch.device) -> float:
    """Return how many times longer a convolution takes than in float32, forward and backward.

    Above 1 where the processor has no arithmetic for the precision and computes it by conversion.
    Measured on 8 feature maps of 64x32x32, in well under a second.
    """
    seconds = {}
    for dtype in (torch.float32, DTYPES[precision]):
        features = torch.randn(8, 64, 32, 32, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype, requires_grad=True)
        seconds[dtype] = min(_seconds(features, weight) for _ in range(5))
    return seconds[DTYPES[precision]] / seconds[torch.float32]


def _seconds(features: Tensor, weight: Tensor) -> float:
    """Return the seconds of a convolution and its gradients."""
    started = time.perf_counter()
    result = torch.nn.functional.conv2d(features, weight, padding=1)
    result.float().sum().backward()
    if features.device.type == "cuda":
        torch.cuda.synchronize(features.device)
    return time.perf_counter() - started


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32, tensor cores' rounded products of float32, in the body."""
    before = bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32
    _set_tf32(allowed, allowed)
    try:
        yield
    finally:
        _set_tf32(*before)


def _set_tf32(matrix_products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matrix_products
    torch.backends.cudnn.allow_tf32 = convolutions
