"""Reader of the network pickles that NVIDIA publishes, as data: no code in them ever runs.

StyleGAN2-ADA (PyTorch), StyleGAN3 and EDM save `{"G_ema": network, …}` with `pickle.dump`. Each
network is a call of `torch_utils.persistence._reconstruct_persistent_obj` on its source code and
its `__dict__`; the published loader runs that source. Here the call gives an inert `NetworkRecord`:
class name, constructor arguments and tensors, from which the families rebuild classes of ours.
Globals are never imported: each is replaced from one allow-list, and any other is refused by name.
StyleGAN2's TensorFlow networks, a tuple of three, are returned under the same record names, with
the tensor names and layouts of the PyTorch ones.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from pretrained import _allowed_globals, _tensorflow
from pretrained._allowed_globals import (
    Global,
    NotAllowed,
    PositionedBytes,
    Storage,
    check_dtype_state,
    expect_type,
    fill_array,
    tensor_view,
)
from pretrained._tensorflow import TensorflowNetwork

_PERSISTENCE = "torch_utils.persistence._reconstruct_persistent_obj"
_PERSISTENCE_VERSION = 6
_NAME_CHARACTERS_LIMIT = 20_000_000
"""Limit for all tensor names of one file: real files need 5 %, exponential nesting exceeds it."""
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
"""Exceptions of reading a truncated or damaged pickle."""


@dataclass(frozen=True, eq=False)
class NetworkRecord:
    """A pickled object as data, without code that could run."""

    class_name: str
    """Published class name, such as "Generator"; with the module for torch's own classes."""
    module_source: str = field(default="", repr=False)
    """Embedded source code. It was not run, and must not be."""
    positional: tuple[object, ...] = ()
    """Positional constructor arguments."""
    arguments: dict[str, object] = field(default_factory=dict)
    """Keyword arguments of the constructor."""
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The state dict with published names: contiguous, on the CPU, dtypes as in the file."""
    attributes: dict[str, object] = field(default_factory=dict, repr=False)
    """Other public attributes: numbers, strings, arrays."""

    def named_arguments(self, *positional: str) -> dict[str, object]:
        """Return all constructor arguments by name, given the names of the positional ones.

        Raises UserError if the record has more positional ones.
        """
        if len(self.positional) > len(positional):
            raise UserError(
                f"the {self.class_name} was made with {len(self.positional)} arguments without a "
                f"name, expected at most {len(positional)}: {', '.join(positional)}"
            )
        return {**dict(zip(positional, self.positional, strict=False)), **self.arguments}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file, and its view of a storage there."""

    tensor: Tensor
    """The same object as in the records."""
    storage: Storage
    offset: int
    """In elements, like size and stride."""
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Content:
    """All of a network pickle."""

    top: dict[str, object]
    """Top-level objects by name: networks and losses as records, all others as plain data."""
    stored: list[StoredTensor]
    """Every tensor in the order of the file, inside and outside of networks."""

    @property
    def networks(self) -> dict[str, NetworkRecord]:
        """Return the records that hold tensors, by their names: "G_ema", "ema", …"""
        items = self.top.items()
        return {k: v for k, v in items if isinstance(v, NetworkRecord) and v.tensors}


def networks(path: str | Path) -> dict[str, NetworkRecord]:
    """Return the records that hold tensors, by their names in the pickle: "G_ema", "ema", …

    Raises UserError as `read` does.
    """
    return read(path).networks


def read(path: str | Path) -> Content:
    """Return all of a network pickle.

    Raises UserError if the file is missing, damaged or no network pickle, or if it needs a global
    that is not allowed.
    """
    # parse
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            reader = _Reader(content)
            top = _from_tensorflow(reader.load())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except NotAllowed as refusal:
        raise UserError(_refusal_sentence(path, str(refusal))) from refusal
    except _DAMAGE as error:
        raise UserError(
            f"{path} is truncated or damaged: it is not a whole network pickle. Get it again."
        ) from error

    # check the top level
    if type(top) is not dict or not all(isinstance(name, str) for name in top):
        raise UserError(
            f"{path} is a pickle, but not of networks by name: expected a dict with G_ema or ema, "
            f"found {type(top).__name__}. Give a network-snapshot .pkl as StyleGAN or EDM write it."
        )
    return Content(top, reader.stored)


def read_plain(content: bytes, *, what: str) -> object:
    """Return the content of a Python 2 pickle of numbers, text, arrays and collections of them.

    Byte strings are returned as text. what: the file's name, for errors. Raises UserError if the
    pickle is damaged or holds any other object.
    """
    try:
        return _Python2Reader(content).load()
    except NotAllowed as refusal:
        refused = "".join(c if c.isprintable() else "?" for c in str(refusal)[:200])
        raise UserError(
            f"{what} asks for {refused!r}, which a pickle of numbers does not need; it was "
            "refused, and nothing from the file was run"
        ) from refusal
    except _DAMAGE as error:
        raise UserError(f"{what} is cut off or damaged: it is no whole pickle") from error


def _from_tensorflow(top: object) -> object:
    """Return (G, D, Gs) as records under their PyTorch names; any other content unchanged."""
    # recognize the tuple
    if isinstance(top, TensorflowNetwork):
        raise UserError("it holds one TensorFlow network: expected three, (G, D, Gs) of StyleGAN2")
    if not (isinstance(top, tuple) and [*map(type, top)] == [TensorflowNetwork] * 3):
        return top

    # convert it
    trained, discriminator, average = top
    return {
        "G": _tensorflow_generator(trained),
        "D": NetworkRecord(
            discriminator.function,
            discriminator.module_source,
            arguments=discriminator.arguments,
            tensors={k: torch.from_numpy(v) for k, v in discriminator.variables().items()},
        ),
        "G_ema": _tensorflow_generator(average),
    }


def _tensorflow_generator(network: TensorflowNetwork) -> NetworkRecord:
    arguments, tensors = _tensorflow.generator(network)
    return NetworkRecord("Generator", network.module_source, (), arguments, tensors)


def _refusal_sentence(path: str | Path, refused: str) -> str:
    refused = "".join(c if c.isprintable() else "?" for c in refused[:200])  # the file chose it
    if refused.startswith("dnnlib.tflib."):
        return (
            f"{path} asks for {refused}: it holds TensorFlow objects other than StyleGAN2's "
            "networks. Give a network-snapshot .pkl as StyleGAN2 writes it."
        )
    return (
        f"{path} asks for {refused}, which StyleGAN and EDM network pickles do not need. It was "
        "refused, and nothing from the file was run. Use the file as its authors publish it; "
        "if this is that file, please report the name."
    )


class _Reader(pickle._Unpickler):
    """An unpickler that calls, and sets the state of, allowed replacements only.

    It extends the Python implementation, in which every opcode can be overridden. The C
    implementation calls any object on its stack, and sets the state of any object.
    """

    stack: list[object]
    append: Callable[[object], None]
    read: Callable[[int], bytes]

    def __init__(self, file: mmap.mmap | io.BytesIO) -> None:
        super().__init__(file)
        self.stored: list[StoredTensor] = []
        self._file = file
        self._name_characters = 0
        self._own_globals = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): self._record,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
        }

    def find_class(self, module: str, name: str) -> object:
        """Return the replacement of a global; dotted names are never resolved."""
        full_name = f"{module}.{name}"
        if (module, name) in self._own_globals:
            return Global(full_name, self._own_globals[module, name])
        if (module, name) not in _GLOBALS:
            raise NotAllowed(full_name)
        return _GLOBALS[module, name]

    def persistent_load(self, pid: object) -> object:
        raise NotAllowed(f"the persistent id {pid!r}")

    def get_extension(self, code: int) -> None:
        raise NotAllowed(f"the extension code {code}")

    def _instantiate(self, klass: object, args: Iterable[object]) -> None:
        self.append(_call(klass, tuple(args)))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        raise NotAllowed("an object made with keyword arguments (opcode NEWOBJ_EX)")

    def load_short_binbytes(self) -> None:
        self._append_bytes(self.read(1)[0])

    def load_binbytes(self) -> None:
        self._append_bytes(*struct.unpack("<I", self.read(4)))

    def load_binbytes8(self) -> None:
        self._append_bytes(*struct.unpack("<Q", self.read(8)))

    def _append_bytes(self, length: int) -> None:
        content = PositionedBytes(self.read(length))  # limited by the file, for any claimed length
        frame = self._unframer.current_frame  # pyright: ignore[reportAttributeAccessIssue]
        ahead = len(frame.getbuffer()) - frame.tell() if frame else 0  # read, not yet used
        content.position = self._file.tell() - ahead - len(content)
        self.append(content)

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        content = self.read(length)  # limited by the file, for any claimed length
        self.append(bytearray(content))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is NetworkRecord:
            target.tensors.update(self._tensors(expect_type(state, dict)))
            target.attributes.update(_attributes(expect_type(state, dict)))
        elif type(target) is TensorflowNetwork:
            target.state.update(expect_type(state, dict))
        elif type(target) is np.ndarray:
            fill_array(target, expect_type(state, tuple))
        elif isinstance(target, np.dtype):
            check_dtype_state(expect_type(state, tuple))
        else:
            name = target.name if isinstance(target, Global) else f"a {type(target).__name__}"
            raise NotAllowed(f"a new state for {name}")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,  # a class is called like a function
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.SHORT_BINBYTES[0]: load_short_binbytes,
        pickle.BINBYTES[0]: load_binbytes,
        pickle.BINBYTES8[0]: load_binbytes8,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def _tensor(
        self,
        storage: Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        hooks: object,
        metadata: object = None,
    ) -> Tensor:
        """Return a tensor without gradient flag and hooks; record its view of the storage."""
        tensor = tensor_view(storage, offset, size, stride, metadata)
        self.stored.append(StoredTensor(tensor, storage, offset, tuple(size), tuple(stride)))
        return tensor

    def _record(self, meta: Mapping[str, object]) -> NetworkRecord:
        """Return the record of a persistent object, whose children are complete records already."""
        kind, version, state = meta["type"], meta["version"], expect_type(meta["state"], dict)
        class_name, module_source = meta["class_name"], meta["module_src"]
        if (kind, version) != ("class", _PERSISTENCE_VERSION):
            raise NotAllowed(f"{_PERSISTENCE} of type {kind!r}, version {version!r}")
        if not (isinstance(class_name, str) and isinstance(module_source, str)):
            raise NotAllowed(f"{_PERSISTENCE} without a class name or source")
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
        # own parameters and buffers
        parameters, buffers = state.get("_parameters", {}), state.get("_buffers", {})
        transient = state.get("_non_persistent_buffers_set", ())
        own = {**parameters, **{k: v for k, v in buffers.items() if k not in transient}}
        tensors = {
            expect_type(k, str): expect_type(v, Tensor) for k, v in own.items() if v is not None
        }

        # children, with a limit against exponential nesting
        children = state.get("_modules", {}).items()
        for name, child in (
            (k, expect_type(v, NetworkRecord)) for k, v in children if v is not None
        ):
            lengths = sum(map(len, child.tensors)) + len(child.tensors) * len(name)
            self._name_characters += lengths
            if self._name_characters > _NAME_CHARACTERS_LIMIT:
                raise NotAllowed("more tensor names than any network has")
            tensors.update({f"{name}.{k}": v for k, v in child.tensors.items()})
        return tensors


class _Python2Reader(_Reader):
    """A reader for pickles of Python 2, whose strings are both bytes and text."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.encoding = "latin1"

    def load_build(self) -> None:
        state = self.stack[-1]
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[4], str):
            self.stack[-1] = (*state[:4], state[4].encode("latin1"))  # an array's values
        super().load_build()

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **_Reader.dispatch,
        pickle.BUILD[0]: load_build,
    }


def _call(target: object, args: object) -> object:
    if not isinstance(target, Global):
        raise NotAllowed(f"a call of a {type(target).__name__}")
    return target.call(*expect_type(args, tuple))


def _attributes(state: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in state.items() if not k.startswith("_")}


# The table --------------------------------------------------------------------------------------


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
_R3GAN_MODULES = {
    "Networks": (
        *("Generator", "GeneratorStage", "GenerativeBasis", "UpsampleLayer", "ResidualBlock"),
        *("Discriminator", "DiscriminatorStage", "DiscriminativeBasis", "DownsampleLayer"),
        "Convolution",
    ),
    "Resamplers": tuple(
        f"{kind}{way}sampler{by}"
        for kind in ("Interpolative", "Inplace")
        for way in ("Up", "Down")
        for by in ("CUDA", "Reference")
    ),
    "FusedOperators": ("BiasedActivationCUDA", "BiasedActivationReference"),
}
"""R3GAN pickles modules by reference: neither source nor constructor arguments are in the file."""
_CALLS: dict[tuple[str, str], Callable[..., object]] = {
    **_allowed_globals.CALLS,
    **{
        (f"{package}.{file}", name): _module_class(f"{package}.{file}.{name}")
        for package in ("R3GAN", "BaselineGAN")
        for file, names in _R3GAN_MODULES.items()
        for name in names
    },
    **{
        (f"training.{file}", name): _module_class(f"training.{file}.{name}")
        for file in ("networks", "networks_baseline")
        for name in ("Generator", "Discriminator")
    },
    ("dnnlib.tflib.network", "Network"): lambda: TensorflowNetwork(),
    **{
        (f"torch.nn.modules.{file}", name): _module_class(f"torch.nn.modules.{file}.{name}")
        for file, names in _TORCH_MODULES.items()
        for name in names
    },
}
_GLOBALS: dict[tuple[str, str], object] = {
    **{(module, name): Global(f"{module}.{name}", call) for (module, name), call in _CALLS.items()},
    **_allowed_globals.DTYPES,
}
"""(module, name) of every allowed global -> its replacement, except those that need the reader."""
