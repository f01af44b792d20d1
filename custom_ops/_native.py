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


class _Grouped(ctypes.Structure):
    """Grouped of csrc/group_norm.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("count", "channels", "pixels", "groups", "channels_last")
    ]


class _Affine(ctypes.Structure):
    """Affine of csrc/group_norm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "shift", "pre_bias")),
        *((name, ctypes.c_int64) for name in ("scale_step", "shift_step", "pre_bias_step")),
    ]


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


class GroupNorm(NamedTuple):
    """Everything about a group_norm except its tensors."""

    groups: int
    eps: float
    silu: bool


class GroupNormTerms(NamedTuple):
    """Factors and terms of a group_norm, None for those that it does without."""

    weight: Tensor | None
    """[C], like bias."""
    bias: Tensor | None
    scale: Tensor | None
    """[N, C], like shift."""
    shift: Tensor | None
    pre_bias: Tensor | None
    """[C] or [N, C]."""


_MOST_CHANNELS = 4096
"""Channels and groups together: as many as have sums in the shared memory of a block."""


def takes_group_norm(kernels: Library, x: Tensor, op: GroupNorm) -> bool:
    """Return whether there is a kernel for a group_norm: on GPUs, for any usual network."""
    is_there = hasattr(kernels, f"group_norm_{_SUFFIXES[x.dtype]}")
    return is_there and x.shape[1] + op.groups <= _MOST_CHANNELS


def group_norm(kernels: Library, x: Tensor, terms: GroupNormTerms, op: GroupNorm) -> Tensor:
    """Return `group_norm` of x [N, C, *] and its terms, in the memory layout of x."""
    return _GroupNorm.apply(x, *terms, kernels, op)


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *given, ctx.kernels, ctx.op = arguments
        ctx.layout = _layout(x)
        x = x.contiguous(memory_format=ctx.layout)
        ctx.forms = [None if term is None else (term.shape, term.dtype) for term in given]
        terms = GroupNormTerms(*(_numbers(term, x) for term in given))

        # sums of slices, and linear functions of channels
        shape = _grouped(x, ctx.op, ctx.layout)
        partials = _partials(ctx.kernels, x, shape)
        coefficients = _table(x, 5)
        y = torch.empty_like(x)
        tensors = (_pointer(x), _pointer(y), shape, _affine(terms))
        numbers = (_pointer(partials), _pointer(coefficients), ctx.op.eps, ctx.op.silu)
        _call(ctx.kernels, "group_norm", x, *tensors, *numbers)
        ctx.save_for_backward(x, coefficients, *terms)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, coefficients, *terms = ctx.saved_tensors
        arguments = (*terms, ctx.kernels, ctx.op, ctx.layout)
        gradient_x, table = _GroupNormBackward.apply(gradient, x, coefficients, *arguments)
        gradients = _gradients_of_terms(table, ctx.forms, ctx.needs_input_grad[1:6])
        return gradient_x, *gradients, None, None


class _GroupNormBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, coefficients: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        *given, kernels, op, layout = arguments
        terms = GroupNormTerms(*given)
        gradient = gradient.contiguous(memory_format=layout)
        gradient_x, table, slopes = torch.empty_like(x), _table(x, 5), _table(x, 2)
        shape = _grouped(x, op, layout)
        partials = _partials(kernels, x, shape)
        tensors = [_pointer(tensor) for tensor in (x, gradient, gradient_x)]
        numbers = [_pointer(tensor) for tensor in (partials, coefficients, slopes, table)]
        arguments = (*tensors, shape, _affine(terms), *numbers, op.silu)
        _call(kernels, "group_norm_backward", x, *arguments)
        return gradient_x, table

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise _differentiated_twice("group_norm")


def _gradients_of_terms(
    table: Tensor, forms: list[tuple[torch.Size, torch.dtype] | None], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients of a group_norm's terms, in the order of GroupNormTerms.

    table: the gradients of scale, shift, pre_bias, weight and bias for each image [5, N, C].
    """
    scale, shift, pre_bias, *_ = table.unbind(0)
    weight = bias = None
    if needed[0] or needed[1]:
        weight, bias = table[3:].sum(1).unbind(0)
    if needed[4] and forms[4] is not None and len(forms[4][0]) == 1:
        pre_bias = pre_bias.sum(0)
    gradients = (weight, bias, scale, shift, pre_bias)
    return [
        gradient.to(form[1]) if is_needed and form is not None and gradient is not None else None
        for gradient, form, is_needed in zip(gradients, forms, needed, strict=True)
    ]


def _number_type(x: Tensor) -> torch.dtype:
    """Return the type that kernels compute with for samples of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _numbers(term: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a term as a kernel reads it: neighbouring channels are neighbours in memory."""
    if term is None:
        return None
    term = term.to(_number_type(x))
    return term if term.stride(-1) == 1 else term.contiguous()


def _table(x: Tensor, rows: int) -> Tensor:
    """Return room for some numbers of each image and channel [rows, N, C]."""
    return x.new_empty((rows, *x.shape[:2]), dtype=_number_type(x))


def _grouped(x: Tensor, op: GroupNorm, layout: torch.memory_format) -> object:
    sizes = (*x.shape[:2], prod(x.shape[2:]), op.groups, layout == torch.channels_last)
    return ctypes.byref(_Grouped(*sizes))


def _partials(kernels: Library, x: Tensor, shape: object) -> Tensor:
    """Return room for two sums of each image, slice and channel [2, N, slices, C]."""
    slices = kernels.group_norm_slices(shape)
    return x.new_empty((2, x.shape[0], slices, x.shape[1]), dtype=_number_type(x))


def _affine(terms: GroupNormTerms) -> object:
    steps = [
        0 if term is None or term.ndim == 1 else term.stride(0)
        for term in (terms.scale, terms.shift, terms.pre_bias)
    ]
    return ctypes.byref(_Affine(*(_pointer(term) for term in terms), *steps))


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
    filters = [_Filter(*(_pointer(line) for line in one)) for one in taps]
    return (_Filter * len(filters))(*filters)


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
