"""Lower precision inside networks while they train; what they take and give stays float32.

A module that can compute in lower precision has a `compute_dtype`, float32 unless it is set here:
its parameters stay float32 and are cast where they are used. So a network is measured, published
and averaged in float32 whatever it was trained in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, cast

import torch
from torch import nn

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""tf32: float32 whose products tensor cores round to 10 bits, in all networks; a CPU has none.
float16: for GPUs that have no bfloat16; small gradients vanish in it, so losses are to be scaled.
"""
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Lowerable(Protocol):
    """A module that can compute in lower precision."""

    compute_dtype: torch.dtype


@contextmanager
def computing_in(precision: Precision, networks: Iterable[nn.Module]) -> Iterator[None]:
    """Run the body with every module of the networks that can do so computing in a precision.

    Around it float32 is float32, also on a GPU, where PyTorch by itself rounds convolutions.
    """
    modules = (module for network in networks for module in network.modules())
    able = [cast(Lowerable, module) for module in modules if hasattr(module, "compute_dtype")]
    before = [module.compute_dtype for module in able]
    for module in able:
        module.compute_dtype = DTYPES[precision]
    try:
        with rounding_products(precision == "tf32"):
            yield
    finally:
        for module, dtype in zip(able, before, strict=True):
            module.compute_dtype = dtype


@contextmanager
def rounding_products(wanted: bool) -> Iterator[None]:
    """Run the body with or without tensor cores rounding the products of float32 (TF32)."""
    before = bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32
    _let_round(wanted, wanted)
    try:
        yield
    finally:
        _let_round(*before)


def _let_round(matrix_products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matrix_products
    torch.backends.cudnn.allow_tf32 = convolutions
