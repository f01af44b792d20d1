"""Which implementation of the custom operations runs: the kernel policy `auto | native |
reference`.

Native kernels are compiled from csrc/ at first use (see _build.py). They cover float32 and float64
on a CPU (not group_norm), these and float16 and bfloat16 on CUDA, and one differentiation of
bias_act, filtered_lrelu and group_norm (of upfirdn2d: any number). Under `auto` and `native`, calls
beyond that (another device, a filter that is trained, a call that is being traced or exported) take
the reference: plain PyTorch on any device, differentiable to any order. Lower precision without a
kernel is computed in float32 (by group_norm's reference in its own dtype, as PyTorch does).

If they cannot be built, `auto` logs the reason once and takes the reference; `native` raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn

from core.errors import UserError
from custom_ops import _build

KernelPolicy = Literal["auto", "native", "reference"]

VARIABLE = "GAN_REFINE_KERNELS"
"""Environment variable with the policy of programs that do not choose one; unset: auto."""

_log = logging.getLogger(__name__)
_COVERED = {
    "cpu": {torch.float32, torch.float64},
    "cuda": {torch.float32, torch.float64, torch.float16, torch.bfloat16},
}
_chosen: KernelPolicy | None = None
_reported: set[str] = set()


def choose(policy: KernelPolicy, device: torch.device | str = "cpu") -> str:
    """Set the policy of this process; return the implementation that it means on this device.

    That is native or reference, for the report. Compiles the kernels if that has not been done.
    Raises UserError under `native` if they cannot be built, with the reason.
    """
    global _chosen
    _chosen = _checked(policy)
    return "native" if _library(torch.device(device)) is not None else "reference"


@contextmanager
def using(policy: KernelPolicy) -> Iterator[None]:
    """Run the operations inside under another policy."""
    global _chosen
    before, _chosen = _chosen, _checked(policy)
    try:
        yield
    finally:
        _chosen = before


def kernels_for(x: Tensor, *others: Tensor | None) -> _build.Library | None:
    """Return the native kernels that take x, or None if the reference does.

    others: tensors that must not need gradients of their own. Raises UserError as `choose` does.
    """
    if x.dtype not in _COVERED.get(x.device.type, ()) or x.numel() == 0:
        return None
    if type(x) not in (Tensor, nn.Parameter) or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return None
    if torch.compiler.is_compiling() or any(t is not None and t.requires_grad for t in others):
        return None
    return _library(x.device)


def widened(x: Tensor, *others: Tensor | None) -> tuple[Tensor, _build.Library | None]:
    """Return x and `kernels_for` it; where none take x in lower precision, those for it in float32.

    So filters keep their digits in plain PyTorch too, and only its result is to be rounded.
    """
    kernels = kernels_for(x, *others)
    is_low = x.is_floating_point() and x.dtype.itemsize < torch.float32.itemsize
    if kernels is not None or not is_low:
        return x, kernels
    wide = x.float()
    return wide, kernels_for(wide, *others)


def current() -> KernelPolicy:
    """Return the policy in force: chosen, or else of the environment, or else auto."""
    return _chosen or _checked(os.environ.get(VARIABLE) or "auto")


def _checked(policy: str) -> KernelPolicy:
    if policy not in ("auto", "native", "reference"):
        raise UserError(f"kernels: {policy!r} is none of auto, native, reference")
    return cast(KernelPolicy, policy)


def _library(device: torch.device) -> _build.Library | None:
    policy = current()
    if policy == "reference":
        return None
    try:
        return _build.library(device)
    except _build.Unavailable as reason:
        if policy == "native":
            raise UserError(
                f"kernels: native was asked for, but {reason}; use auto or reference"
            ) from reason
        if device.type not in _reported:
            _reported.add(device.type)
            _log.warning("kernels: plain PyTorch on %s, slower: %s", device.type, reason)
        return None
