"""Allow-list of globals in network pickles: each is replaced by a plain function that builds
tensors, NumPy numbers or containers. Any other global is refused by name.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Kind = TypeVar("_Kind")
_NUMBER_CODE = re.compile(r"[<=|]?[biufc]\d{1,2}")


class NotAllowed(Exception):
    """A global or an operation of the pickle is not allowed; the text names it."""


@dataclass(frozen=True)
class Global:
    """Replacement of a global: its name in the file, and the function to call."""

    name: str
    call: Callable[..., object]


class PositionedBytes(bytes):
    """Bytes with their position in the file."""

    position: int


@dataclass(frozen=True, eq=False)
class Storage:
    """The values of one or more tensors."""

    values: Tensor
    """All values, flat."""
    position: int | None
    """Offset of the values in the file; None if the file encodes them differently from memory."""


def expect_type(value: object, kind: type[_Kind]) -> _Kind:
    """Return the value. Raises TypeError if it is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


# Replacements of constructors of tensors --------------------------------------------------------


def storage(content: bytes) -> Storage:
    """Return a storage from a torch.save inside the pickle; its values are the last bytes."""
    # read by torch's own restricted unpickler
    if expect_type(content, bytes).startswith(
        b"PK"
    ):  # never written by torch here; a zip could inflate
        raise NotAllowed("a zip archive inside a storage")
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if match is None:
            raise
        raise NotAllowed(f"{match[1]} inside a storage") from error

    # flat values, and their position in the file
    if not isinstance(loaded, torch.TypedStorage):
        raise NotAllowed(f"a {type(loaded).__name__} inside a storage")
    values = torch.empty(0, dtype=loaded.dtype).set_(loaded)  # pyright: ignore[reportArgumentType]
    if not isinstance(content, PositionedBytes):
        return Storage(values, None)
    return Storage(values, content.position + len(content) - values.nbytes)


def tensor_view(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    metadata: object = None,
) -> Tensor:
    """Return a part of a storage as a contiguous tensor."""
    if metadata:
        raise NotAllowed("a tensor with conjugate or negative bits")
    values = expect_type(storage, Storage).values
    if math.prod(size) > values.numel():
        raise NotAllowed("a tensor that is larger than its storage")
    view = values.as_strided(size, stride, offset)  # checks the bounds; set_ would grow the storage
    is_whole_storage = view.numel() == values.numel()
    return (
        view.contiguous() if is_whole_storage else view.clone(memory_format=torch.contiguous_format)
    )


def _parameter(data: Tensor, requires_grad: bool, hooks: object) -> Tensor:
    return expect_type(data, Tensor)


# Replacements of constructors of NumPy numbers and arrays ---------------------------------------


def _dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype:
    if not _NUMBER_CODE.fullmatch(code):
        raise NotAllowed(f"numpy.dtype {code!r}")
    return np.dtype(code)


def check_dtype_state(state: tuple[object, ...]) -> None:
    """Raise Refused unless the dtype is of little-endian numbers; its state is set already."""
    _version, order, *structure = state[:5]
    if order not in ("<", "|", "=") or structure != [None, None, None]:
        raise NotAllowed("a numpy.dtype of other than little-endian numbers")


def _scalar(dtype: np.dtype, raw: bytes) -> int | float | complex | bool:
    (number,) = np.frombuffer(raw, expect_type(dtype, np.dtype)).tolist()
    return number


def _empty_array(kind: Global, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    if not (isinstance(kind, Global) and kind.name == "numpy.ndarray"):
        raise NotAllowed("a numpy array of another class")
    return np.empty(0)


def fill_array(array: np.ndarray, state: tuple[object, ...]) -> None:
    _version, _shape, dtype, _fortran, raw = state
    if not (isinstance(dtype, np.dtype) and isinstance(raw, bytes)):
        raise NotAllowed("a numpy array of other than numbers")
    array.__setstate__(state)  # pyright: ignore[reportArgumentType]  # checks the shape against the length


def _array_from_buffer(
    buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, axis_order: object = None
) -> np.ndarray:
    if axis_order is not None or order not in ("C", "F"):
        raise NotAllowed("a numpy array with permuted axes")
    return np.frombuffer(buffer, expect_type(dtype, np.dtype)).reshape(shape, order=order).copy()


# The table --------------------------------------------------------------------------------------


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise NotAllowed(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _uncallable(*args: object) -> object:
    raise NotAllowed("numpy.ndarray called by itself")


CALLS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): lambda items=(): dict(items),
    ("dnnlib.util", "EasyDict"): lambda items=(): dict(items),
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): storage,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *place: ":".join(map(str, place)),
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _uncallable,
    ("_codecs", "encode"): _latin1,
    **{(b, "set"): lambda items=(): set(items) for b in ("builtins", "__builtin__")},
    **{(b, "frozenset"): lambda items=(): frozenset(items) for b in ("builtins", "__builtin__")},
    **{(b, "bytes"): lambda: b"" for b in ("builtins", "__builtin__")},  # empty, in protocol 2
    **{(f"numpy.{c}.multiarray", "scalar"): _scalar for c in ("core", "_core")},
    **{(f"numpy.{c}.multiarray", "_reconstruct"): _empty_array for c in ("core", "_core")},
    **{(f"numpy.{c}.numeric", "_frombuffer"): _array_from_buffer for c in ("core", "_core")},
}
"""(module, name) of a function or class -> the function called in its place."""
DTYPES: dict[tuple[str, str], object] = {
    ("torch", name): getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "bool"),
        *("uint8", "int8", "int16", "int32", "int64"),
    )
}
"""(module, name) of a constant -> its value."""
