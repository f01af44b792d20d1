"""Bias, activation, gain and clamp in one operation (Karras et al., StyleGAN2-ADA).

Here are its definition and the reference in plain PyTorch; native kernels do the same if the
policy (backend.py) says so.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops import _native
from custom_ops._native import BiasAct
from custom_ops.backend import widened


class Activation(NamedTuple):
    """An activation function, and the slope and gain it has if the caller names none."""

    function: Callable[[Tensor, float], Tensor]
    alpha: float
    gain: float


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x, _: x, 0.0, 1.0),
    "relu": Activation(lambda x, _: F.relu(x), 0.0, sqrt(2)),
    "lrelu": Activation(F.leaky_relu, 0.2, sqrt(2)),
    "tanh": Activation(lambda x, _: torch.tanh(x), 0.0, 1.0),
    "sigmoid": Activation(lambda x, _: torch.sigmoid(x), 0.0, 1.0),
    "elu": Activation(lambda x, _: F.elu(x), 0.0, 1.0),
    "selu": Activation(lambda x, _: F.selu(x), 0.0, 1.0),
    "softplus": Activation(lambda x, _: F.softplus(x), 0.0, 1.0),
    "swish": Activation(lambda x, _: F.silu(x), 0.0, sqrt(2)),
}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Return clip(gain * act(x + b; alpha), -clamp, clamp), of the shape and dtype of x.

    b: [x.shape[dim]], added along `dim`. `alpha` (the slope of `lrelu`) and `gain` default to the
    activation's own: gain keeps unit variance, sqrt(2) for relu, lrelu and swish, else 1.
    `clamp=None` clips nothing. Raises KeyError for an unknown activation and ValueError for a bias
    of the wrong length.
    """
    activation = ACTIVATIONS[act]
    alpha = activation.alpha if alpha is None else alpha
    gain = activation.gain if gain is None else gain
    if b is not None and b.shape != (x.shape[dim],):
        raise ValueError(
            f"bias has shape {tuple(b.shape)}, dimension {dim} of x has {x.shape[dim]}"
        )
    op = BiasAct(dim % x.ndim, act, alpha, gain, inf if clamp is None else clamp)
    wide, kernels = widened(x)
    if kernels is None or not _native.takes(kernels, op):
        return reference(wide, b, op).to(x.dtype)
    return _native.bias_act(kernels, wide, b, op).to(x.dtype)


def reference(x: Tensor, b: Tensor | None, op: BiasAct) -> Tensor:
    """Return `bias_act` in plain PyTorch, differentiable to any order."""
    if b is not None:
        x = x + b.reshape([-1 if axis == op.dim else 1 for axis in range(x.ndim)])
    x = ACTIVATIONS[op.act].function(x, op.alpha)
    if op.gain != 1:
        x = x * op.gain
    return x if op.clamp == inf else x.clamp(-op.clamp, op.clamp)
