"""The custom operations on native kernels: their arguments and gradients.

The transpose of a resampling is a resampling with up and down exchanged and the filter reversed, so
upfirdn2d is its own backward pass, as often as it is differentiated. filtered_lrelu backward is the
same kernel with both resamplings transposed, and the slopes that the forward pass noted in place of
the activation.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from core.errors import UserError
from custom_ops._build import Library
from custom_ops._resampling import Resample, Resampling, Taps

_SUFFIXES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}

_ACTIVATIONS = ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
"""In the order of Activation in csrc/activations.h."""


class _Axis(ctypes.Structure):
    """Axis of csrc/geometry.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("size", "out", "up", "down", "taps", "before")]


class _Batch(ctypes.Structure):
    """Batch of csrc/geometry.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("count", "channels", "channels_last")]


class _Filter(ctypes.Structure):
    """Filter of csrc/geometry.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y", "plane")]


def upfirdn2d(kernels: Library, x: Tensor, op: Resample) -> Tensor:
    """Return x [N, C, H, W] resampled, in the memory layout of x, differentiable to any order."""
    return _Upfirdn2d.apply(x, kernels, op)


class _Upfirdn2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Library, op: Resample) -> Tensor:
        ctx.kernels, ctx.op = kernels, op
        layout = _layout(x)
        x = x.contiguous(memory_format=layout)
        y = _empty(x, op.along_x, op.along_y, layout)
        axes, filters = _axes(op), _filters(op.taps(x))
        _call(kernels, "upfirdn2d", x, _pointer(x), _pointer(y), _batch(x, layout), axes, filters)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Upfirdn2d.apply(gradient, ctx.kernels, ctx.op.transposed()), None, None


class LeakyRelu(NamedTuple):
    """clip(gain * lrelu(u; slope), -clamp, clamp)."""

    gain: float
    slope: float
    clamp: float


class FilteredLrelu(NamedTuple):
    """Everything about a filtered_lrelu except its tensors."""

    up: Resample
    down: Resample
    lrelu: LeakyRelu

    def transposed(self) -> FilteredLrelu:
        """Return the operation that takes gradients back, given the slopes."""
        return FilteredLrelu(self.down.transposed(), self.up.transposed(), self.lrelu)


def filtered_lrelu(kernels: Library, x: Tensor, b: Tensor | None, op: FilteredLrelu) -> Tensor:
    """Return `filtered_lrelu` of x [N, C, H, W] and b [C], in the memory layout of x."""
    return _FilteredLrelu.apply(x, b, kernels, op)


class _FilteredLrelu(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, kernels: Library, op: FilteredLrelu
    ) -> Tensor:
        ctx.kernels, ctx.op, ctx.layout = kernels, op, _layout(x)
        x = x.contiguous(memory_format=ctx.layout)
        slopes = None
        if any(ctx.needs_input_grad[:2]):
            size = kernels.slopes_size(_batch(x, ctx.layout), _axes(op.up, op.down))
            slopes = torch.empty(size, dtype=torch.uint8, device=x.device)
            ctx.save_for_backward(slopes)
        b = None if b is None else b.to(x.dtype).contiguous()
        return _run_filtered_lrelu(kernels, x, b, slopes, op, ctx.layout, backward=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        arguments = (ctx.saved_tensors[0], ctx.kernels, ctx.op, ctx.layout)
        gradient_x = _FilteredLreluBackward.apply(gradient, *arguments)
        gradient_b = gradient_x.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None
        return gradient_x, gradient_b, None, None


class _FilteredLreluBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        slopes: Tensor,
        kernels: Library,
        op: FilteredLrelu,
        layout: torch.memory_format,
    ) -> Tensor:
        gradient = gradient.contiguous(memory_format=layout)
        transposed = op.transposed()
        return _run_filtered_lrelu(
            kernels, gradient, None, slopes, transposed, layout, backward=True
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise _differentiated_twice("filtered_lrelu")


def _run_filtered_lrelu(
    kernels: Library,
    x: Tensor,
    b: Tensor | None,
    slopes: Tensor | None,
    op: FilteredLrelu,
    layout: torch.memory_format,
    *,
    backward: bool,
) -> Tensor:
    y = _empty(x, op.down.along_x, op.down.along_y, layout)
    tensors = [_pointer(tensor) for tensor in (x, b, y, slopes)]
    axes, filters = _axes(op.up, op.down), _filters(op.up.taps(x), op.down.taps(x))
    numbers = (op.lrelu.gain, op.lrelu.slope, op.lrelu.clamp)
    batch = _batch(x, layout)
    _call(kernels, "filtered_lrelu", x, *tensors, backward, batch, axes, filters, *numbers)
    return y


class BiasAct(NamedTuple):
    """Everything about a bias_act except its tensors."""

    dim: int
    act: str
    """A key of ACTIVATIONS."""
    alpha: float
    gain: float
    clamp: float


def takes(kernels: Library, op: BiasAct) -> bool:
    """Return whether there is a kernel for a bias_act, faster than plain PyTorch."""
    tells_by_output = op.alpha >= 0 and op.gain > 0  # else its sign is not that of the input
    return tells_by_output and bool(kernels.takes_activation(_ACTIVATIONS.index(op.act)))


def bias_act(kernels: Library, x: Tensor, b: Tensor | None, op: BiasAct) -> Tensor:
    """Return `bias_act` of x and b [x.shape[dim]], in the memory layout of x."""
    return _BiasAct.apply(x, b, kernels, op)


class _BiasAct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, kernels: Library, op: BiasAct) -> Tensor:
        ctx.kernels, ctx.op = kernels, op
        ctx.layout = _layout(x) if op.dim == 1 else torch.contiguous_format
        x = x.contiguous(memory_format=ctx.layout)
        bias = None if b is None else b.to(x.dtype).contiguous()
        y = _run_bias_act(kernels, x, None, bias, op)
        ctx.save_for_backward(*((x, bias) if op.act == "swish" else (y, None)))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        seen, bias = ctx.saved_tensors
        gradient_x = _BiasActBackward.apply(gradient, seen, bias, ctx.kernels, ctx.op, ctx.layout)
        gradient_b = None
        if ctx.needs_input_grad[1]:
            others = [axis for axis in range(gradient_x.ndim) if axis != ctx.op.dim]
            gradient_b = gradient_x.sum(others) if others else gradient_x
        return gradient_x, gradient_b, None, None


class _BiasActBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        seen: Tensor,
        bias: Tensor | None,
        kernels: Library,
        op: BiasAct,
        layout: torch.memory_format,
    ) -> Tensor:
        return _run_bias_act(kernels, gradient.contiguous(memory_format=layout), seen, bias, op)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise _differentiated_twice("bias_act")


def _run_bias_act(
    kernels: Library, x: Tensor, seen: Tensor | None, bias: Tensor | None, op: BiasAct
) -> Tensor:
    y = torch.empty_like(x)
    sizes = (prod(x.shape[: op.dim]), x.shape[op.dim], prod(x.shape[op.dim + 1 :]))
    if not x.is_contiguous():  # channels last, which is kept for dim 1 only
        sizes = (x.numel() // x.shape[1], x.shape[1], 1)
    tensors = [_pointer(tensor) for tensor in (x, seen, bias, y)]
    numbers = (_ACTIVATIONS.index(op.act), op.alpha, op.gain, op.clamp)
    _call(kernels, "bias_act", x, *tensors, *sizes, *numbers)
    return y


def _differentiated_twice(operation: str) -> UserError:
    return UserError(
        f"the native kernel of {operation} is differentiated once only; "
        "set kernels: reference (plain PyTorch) for higher derivatives"
    )


def _layout(x: Tensor) -> torch.memory_format:
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _empty(
    x: Tensor, along_x: Resampling, along_y: Resampling, layout: torch.memory_format
) -> Tensor:
    shape = (*x.shape[:2], along_y.out_size, along_x.out_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _batch(x: Tensor, layout: torch.memory_format) -> object:
    return ctypes.byref(_Batch(x.shape[0], x.shape[1], layout == torch.channels_last))


def _axes(*ops: Resample) -> ctypes.Array[_Axis]:
    along = [axis for op in ops for axis in (op.along_x, op.along_y)]
    fields = [(a.size, a.out_size, a.up, a.down, a.taps, a.before) for a in along]
    return (_Axis * len(fields))(*(_Axis(*field) for field in fields))


def _filters(*taps: Taps) -> ctypes.Array[_Filter]:
    found = [_Filter(*(_pointer(line) for line in one)) for one in taps]
    return (_Filter * len(found))(*found)


def _call(kernels: Library, operation: str, x: Tensor, *arguments: object) -> None:
    """Run a kernel if x is: on the CPU's threads, or on the current stream of its GPU."""
    function = getattr(kernels, f"{operation}_{_SUFFIXES[x.dtype]}")
    is_cuda = x.device.type == "cuda"
    with torch.cuda.device(x.device) if is_cuda else nullcontext():
        where = (
            torch.cuda.current_stream(x.device).cuda_stream if is_cuda else torch.get_num_threads()
        )
        message = function(*arguments, where)
    if message is not None:
        raise RuntimeError(f"{operation}: {message.decode()}")
