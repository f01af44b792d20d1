"""Read the network pickles that NVIDIA publishes as data, never running what they carry.

StyleGAN2-ADA (PyTorch), StyleGAN3 and EDM save `{"G_ema": network, …}` with `pickle.dump`. Each
network is a call of `torch_utils.persistence._reconstruct_persistent_obj` on its source code and
its `__dict__`; the published loader runs that source. Here the call gives an inert `NetworkRecord`:
class name, constructor arguments and tensors, from which the families rebuild classes of ours.
Every global that a file asks for is looked up in one table of stand-ins and never imported;
whatever is not in the table is refused by name. TensorFlow pickles are left out.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

_Kind = TypeVar("_Kind")
_PERSISTENCE = "torch_utils.persistence._reconstruct_persistent_obj"
_PERSISTENCE_VERSION = 6
_NAME_CHARACTERS_LIMIT = 20_000_000
"""Of all names built in one read: real files need 5 % of it, modules nested to explode, more."""
_NUMBER_CODE = re.compile(r"[<=|]?[biufc]\d{1,2}")
_DAMAGE = (
    EOFError,
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,  # torch.load raises it
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What reading bytes that are no whole pickle can raise."""


@dataclass(frozen=True, eq=False)
class NetworkRecord:
    """A pickled object as data. Nothing in it can run."""

    class_name: str
    """As its authors named it, such as "Generator"; with its module for torch's own classes."""
    module_source: str = field(default="", repr=False)
    """The source code that came with it. It was not run, and must not be."""
    positional: tuple[object, ...] = ()
    """Constructor arguments without a name."""
    arguments: dict[str, object] = field(default_factory=dict)
    """Constructor arguments by name."""
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The state dict under its published names: contiguous, on the CPU, dtypes as in the file."""
    attributes: dict[str, object] = field(default_factory=dict, repr=False)
    """Its other public attributes: numbers, strings, arrays."""

    def named_arguments(self, *positional: str) -> dict[str, object]:
        """Return all constructor arguments by name, given the names of the positional ones.

        Raises UserError where more came without a name.
        """
        if len(self.positional) > len(positional):
            raise UserError(
                f"the {self.class_name} was made with {len(self.positional)} arguments without a "
                f"name, expected at most {len(positional)}: {', '.join(positional)}"
            )
        return {**dict(zip(positional, self.positional, strict=False)), **self.arguments}


def networks(path: str | Path) -> dict[str, NetworkRecord]:
    """Return the records that hold tensors, by their names in the pickle: "G_ema", "ema", …

    Raises UserError as `read` does.
    """
    content = read(path).items()
    return {k: v for k, v in content if isinstance(v, NetworkRecord) and v.tensors}


def read(path: str | Path) -> dict[str, object]:
    """Return all of a network pickle by name: networks and losses as records, the rest plain.

    Raises UserError where the file is missing, damaged or no network pickle, and where it asks for
    anything that network pickles do not need.
    """
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            top = _Reader(content).load()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except _Refused as refusal:
        raise UserError(_refusal_sentence(path, str(refusal))) from refusal
    except _DAMAGE as error:
        raise UserError(
            f"{path} is truncated or damaged: it is not a whole network pickle. Get it again."
        ) from error
    if type(top) is not dict or not all(isinstance(name, str) for name in top):
        raise UserError(
            f"{path} is a pickle, but not of networks by name: expected a dict with G_ema or ema, "
            f"found {type(top).__name__}. Give a network-snapshot .pkl as StyleGAN or EDM write it."
        )
    return top


def _refusal_sentence(path: str | Path, refused: str) -> str:
    refused = "".join(c if c.isprintable() else "?" for c in refused[:200])  # the file chose it
    if refused.startswith("dnnlib.tflib."):
        return (
            f"{path} asks for {refused}: it holds TensorFlow networks. "
            "Convert it with legacy.py of NVlabs/stylegan3 and give the result."
        )
    return (
        f"{path} asks for {refused}, which StyleGAN and EDM network pickles do not need. It was "
        "refused, and nothing from the file was run. Use the file as its authors publish it; "
        "if this is that file, please report the name."
    )


class _Refused(Exception):
    """The name of what a file asked for and does not get."""


@dataclass(frozen=True)
class _Global:
    """What stands in for a global: the name that the file used, and what a call of it gives."""

    name: str
    call: Callable[..., object]


class _Reader(pickle._Unpickler):
    """An unpickler that calls and fills nothing but stand-ins.

    It extends the implementation in Python, whose every opcode can be replaced: the one in C calls
    anything on its stack and sets a state on anything.
    """

    stack: list[object]
    append: Callable[[object], None]
    read: Callable[[int], bytes]

    def __init__(self, file: mmap.mmap) -> None:
        super().__init__(file)
        self._name_characters = 0

    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a global from the table; dotted names are never followed."""
        asked = f"{module}.{name}"
        if (module, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            return _Global(asked, self._record)
        if (module, name) not in _GLOBALS:
            raise _Refused(asked)
        return _GLOBALS[module, name]

    def persistent_load(self, pid: object) -> object:
        raise _Refused(f"the persistent id {pid!r}")

    def get_extension(self, code: int) -> None:
        raise _Refused(f"the extension code {code}")

    def _instantiate(self, klass: object, args: Iterable[object]) -> None:
        self.append(_called(klass, tuple(args)))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        raise _Refused("an object made with keyword arguments (opcode NEWOBJ_EX)")

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        content = self.read(length)  # as long as the file is, whatever it claims
        self.append(bytearray(content))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is NetworkRecord:
            target.tensors.update(self._tensors(_typed(state, dict)))
            target.attributes.update(_attributes(_typed(state, dict)))
        elif type(target) is np.ndarray:
            _fill_array(target, _typed(state, tuple))
        elif isinstance(target, np.dtype):
            _check_dtype_state(_typed(state, tuple))
        else:
            name = target.name if isinstance(target, _Global) else f"a {type(target).__name__}"
            raise _Refused(f"a new state for {name}")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,  # a class is called like a function
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def _record(self, meta: Mapping[str, object]) -> NetworkRecord:
        """Return the record of one persistent object. Its children are whole records by now."""
        kind, version, state = meta["type"], meta["version"], _typed(meta["state"], dict)
        class_name, module_source = meta["class_name"], meta["module_src"]
        if (kind, version) != ("class", _PERSISTENCE_VERSION):
            raise _Refused(f"{_PERSISTENCE} of type {kind!r}, version {version!r}")
        if not (isinstance(class_name, str) and isinstance(module_source, str)):
            raise _Refused(f"{_PERSISTENCE} without a class name or source")
        return NetworkRecord(
            class_name=class_name,
            module_source=module_source,
            positional=tuple(state.get("_init_args") or ()),
            arguments=dict(state.get("_init_kwargs") or {}),
            tensors=self._tensors(state),
            attributes=_attributes(state),
        )

    def _tensors(self, state: Mapping[str, Mapping[str, object]]) -> dict[str, Tensor]:
        """Return the state dict of a module: its parameters, its buffers, then its children's."""
        parameters, buffers = state.get("_parameters", {}), state.get("_buffers", {})
        transient = state.get("_non_persistent_buffers_set", ())
        own = {**parameters, **{k: v for k, v in buffers.items() if k not in transient}}
        tensors = {_typed(k, str): _typed(v, Tensor) for k, v in own.items() if v is not None}
        children = state.get("_modules", {}).items()
        for name, child in ((k, _typed(v, NetworkRecord)) for k, v in children if v is not None):
            lengths = sum(map(len, child.tensors)) + len(child.tensors) * len(name)
            self._name_characters += lengths
            if self._name_characters > _NAME_CHARACTERS_LIMIT:
                raise _Refused("more tensor names than any network has")
            tensors.update({f"{name}.{k}": v for k, v in child.tensors.items()})
        return tensors


def _called(target: object, args: object) -> object:
    if not isinstance(target, _Global):
        raise _Refused(f"a call of a {type(target).__name__}")
    return target.call(*_typed(args, tuple))


def _typed(value: object, kind: type[_Kind]) -> _Kind:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _attributes(state: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in state.items() if not k.startswith("_")}


# Stand-ins for what builds tensors --------------------------------------------------------------


def _storage(content: bytes) -> Tensor:
    """Return a storage as a flat tensor, from the bytes of a torch.save inside the pickle."""
    if _typed(content, bytes).startswith(b"PK"):  # torch writes none here, and a zip may inflate
        raise _Refused("a zip archive inside a storage")
    try:
        storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if named is None:
            raise
        raise _Refused(f"{named[1]} inside a storage") from error
    if not isinstance(storage, torch.TypedStorage):
        raise _Refused(f"a {type(storage).__name__} inside a storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage)  # pyright: ignore[reportArgumentType]


def _tensor(
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    metadata: object = None,
) -> Tensor:
    """Return a part of a storage as a contiguous tensor, without gradient flag and hooks."""
    if metadata:
        raise _Refused("a tensor with conjugate or negative bits")
    if math.prod(size) > storage.numel():
        raise _Refused("a tensor that is larger than its storage")
    view = storage.as_strided(
        size, stride, offset
    )  # checks the bounds; set_ would grow the storage
    whole = view.numel() == storage.numel()
    return view.contiguous() if whole else view.clone(memory_format=torch.contiguous_format)


def _parameter(data: Tensor, requires_grad: bool, hooks: object) -> Tensor:
    return _typed(data, Tensor)


# Stand-ins for what builds NumPy numbers and arrays ---------------------------------------------


def _dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype:
    if not _NUMBER_CODE.fullmatch(code):
        raise _Refused(f"numpy.dtype {code!r}")
    return np.dtype(code)


def _check_dtype_state(state: tuple[object, ...]) -> None:
    """Refuse all but little-endian numbers; the constructor has set all that there is to set."""
    _version, order, *structure = state[:5]
    if order not in ("<", "|", "=") or structure != [None, None, None]:
        raise _Refused("a numpy.dtype of other than little-endian numbers")


def _scalar(dtype: np.dtype, raw: bytes) -> int | float | complex | bool:
    (number,) = np.frombuffer(raw, _typed(dtype, np.dtype)).tolist()
    return number


def _empty_array(kind: _Global, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    if not (isinstance(kind, _Global) and kind.name == "numpy.ndarray"):
        raise _Refused("a numpy array of another class")
    return np.empty(0)


def _fill_array(array: np.ndarray, state: tuple[object, ...]) -> None:
    _version, _shape, dtype, _fortran, raw = state
    if not (isinstance(dtype, np.dtype) and isinstance(raw, bytes)):
        raise _Refused("a numpy array of other than numbers")
    array.__setstate__(state)  # pyright: ignore[reportArgumentType]  # checks the shape against the length


def _array_from_buffer(
    buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, axis_order: object = None
) -> np.ndarray:
    if axis_order is not None or order not in ("C", "F"):
        raise _Refused("a numpy array with permuted axes")
    return np.frombuffer(buffer, _typed(dtype, np.dtype)).reshape(shape, order=order).copy()


# The table --------------------------------------------------------------------------------------


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _uncallable(*args: object) -> object:
    raise _Refused("numpy.ndarray called by itself")


def _module_class(name: str) -> Callable[[], NetworkRecord]:
    return lambda: NetworkRecord(class_name=name)


_TORCH_MODULES = {
    "container": ("ModuleDict", "ModuleList", "Sequential"),
    "linear": ("Identity", "Linear"),
    "conv": ("Conv2d",),
    "activation": ("GELU", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Tanh"),
    "normalization": ("GroupNorm", "LayerNorm"),
    "dropout": ("Dropout",),
    "sparse": ("Embedding",),
}
_TORCH_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "bool"),
    *("uint8", "int8", "int16", "int32", "int64"),
)
_CALLS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): lambda items=(): dict(items),
    ("dnnlib.util", "EasyDict"): lambda items=(): dict(items),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
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
    **{
        (f"torch.nn.modules.{file}", name): _module_class(f"torch.nn.modules.{file}.{name}")
        for file, names in _TORCH_MODULES.items()
        for name in names
    },
}
_GLOBALS: dict[tuple[str, str], object] = {
    **{
        (module, name): _Global(f"{module}.{name}", call) for (module, name), call in _CALLS.items()
    },
    **{("torch", name): getattr(torch, name) for name in _TORCH_DTYPES},
}
"""Every global that a network pickle may ask for, with what stands in for it."""
