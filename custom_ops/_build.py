"""Compile csrc/ into a library of kernels, once for each kind of machine, and load it.

The library is plain C called through ctypes, so no header of PyTorch is compiled: seconds, not a
minute. It is kept in the download cache, under a name made of everything that it depends on:
sources, torch, and the CPU's instruction set or CUDA version and GPU architecture.

Any number of processes may start at once. One holds a POSIX lock, which the kernel releases when
its holder dies, builds in a folder of its own, and renames the library into place when it is whole;
so whoever finds the name finds a whole library.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from core.downloads import cache_path

Library = ctypes.CDLL

_SOURCES = Path(__file__).parent / "csrc"
_CXX_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_WIDE_VECTORS = "-mprefer-vector-width=512"
_NVCC_FLAGS = ("-O3", "--extra-device-vectorization")
_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why there are no kernels, as the end of a sentence."""


def library(device: torch.device) -> Library:
    """Return the kernels for a device. Raises Unavailable, with the same reason each time."""
    loaded = _library(_gpu_architecture(device) if device.type != "cpu" else None)
    if isinstance(loaded, str):
        raise Unavailable(loaded)
    return loaded


@cache
def _library(architecture: str | None) -> Library | str:
    """Return the kernels for a GPU architecture (None: this CPU), or why there are none."""
    path = library_path(architecture)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")) as is_alone:
                if not path.exists():  # another process may have been first
                    _build(path, architecture, is_alone=is_alone)
        return declared(ctypes.CDLL(str(path)))
    except Unavailable as reason:
        return str(reason)
    except OSError as error:
        return f"the compiled kernels cannot be kept or loaded ({error}); set GAN_REFINE_CACHE"


def library_path(architecture: str | None) -> Path:
    """Return the path of the library for a GPU architecture (None: this CPU)."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    made_for = (
        (torch.version.cuda, architecture, _NVCC_FLAGS)
        if architecture
        else (_instruction_set(), _CXX_FLAGS, _WIDE_VECTORS)
    )
    digest.update(repr((torch.__version__, sys.platform, made_for)).encode())
    name = f"{'cuda' if architecture else 'cpu'}-{digest.hexdigest()[:16]}.so"
    return cache_path("kernels").parent / "kernels" / name


def _gpu_architecture(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip:
        raise Unavailable(f"there are none for {'ROCm' if torch.version.hip else device.type}")
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device here")
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@cache
def _instruction_set() -> str:
    """Return a text that differs between CPUs which -march=native tells apart."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if re.match(r"(vendor_id|cpu family|model|flags)\b", line)]
        if kept:
            return "\n".join(sorted(set(kept)))
    return f"{platform.machine()} {platform.processor()}"


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yield whether there is no other process inside: not every file system has locks. Without
    them several processes build, and the last rename wins.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _build(path: Path, architecture: str | None, *, is_alone: bool) -> None:
    """Compile into a folder beside path, then rename. Raises Unavailable with the reason."""
    for left_behind in path.parent.glob(f"{path.stem}-*") if is_alone else ():
        shutil.rmtree(left_behind, ignore_errors=True)  # by a builder that was killed
    kind = f"CUDA {architecture}" if architecture else "this CPU"
    _log.info("kernels: compiling for %s, once; kept in %s", kind, path.parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=path.parent))
    try:
        os.replace(_compiled(folder, architecture), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compiled(folder: Path, architecture: str | None) -> Path:
    """Return the library that torch's extension loader builds in an empty folder."""
    try:
        with (
            _without_warnings(logging.getLogger("torch.utils.cpp_extension")),
            _environment("PATH", _path_with_ninja()),
            _environment("TORCH_CUDA_ARCH_LIST", architecture or ""),  # the GPU at hand only
        ):
            from torch.utils import cpp_extension  # slow to import, and only needed here

            cpp_extension.load(
                f"custom_ops_{'cuda' if architecture else 'cpu'}",
                [str(_SOURCES / ("cuda.cu" if architecture else "cpu.cpp"))],
                extra_cflags=[*_CXX_FLAGS, *_cpu_flags()],
                extra_cuda_cflags=list(_NVCC_FLAGS),
                extra_ldflags=_linker_flags(folder, architecture),
                build_directory=str(folder),
                with_cuda=architecture is not None,
                is_python_module=False,
            )
    except Exception as error:  # a missing compiler, header, ninja or nvcc raises its own kind
        raise Unavailable(f"compiling them failed: {_first_complaint(error)}") from error
    return next(folder.glob("custom_ops_*.so"))


@contextmanager
def _without_warnings(log: logging.Logger) -> Iterator[None]:
    """Keep a logger to errors: torch warns of unknown compilers and of a missing GPU, which matters
    to those who compile its headers.
    """
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _cpu_flags() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [*_openmp_flags(), *([_WIDE_VECTORS] if x86 else [])]


def _openmp_flags() -> list[str]:
    return ["-fopenmp"] if sys.platform == "linux" else []


def _path_with_ninja() -> str:
    """Return PATH with the installed ninja: a virtual environment that is not activated is not on
    it.
    """
    path = os.environ.get("PATH", "")
    try:
        import ninja
    except ImportError:
        return path
    return f"{ninja.BIN_DIR}{os.pathsep}{path}"


def _linker_flags(folder: Path, architecture: str | None) -> list[str]:
    """Return the libraries to link with: for a GPU the CUDA runtime that torch has loaded.

    pip installs that one under its versioned name only, which no linker looks for.
    """
    if architecture is None:
        return _openmp_flags()
    maps = Path("/proc/self/maps")
    loaded = re.search(r"/\S*/libcudart\.so\S*", maps.read_text()) if maps.exists() else None
    if loaded:
        (folder / "libcudart.so").symlink_to(loaded[0])
    return [f"-L{folder}"]


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _first_complaint(error: Exception) -> str:
    """Return the line of a compiler's output that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaint = re.compile(r"\berror\b.*:|not found|cannot find|no such file", re.I)
    complaints = [line for line in lines if complaint.search(line) and "Error building" not in line]
    return (complaints or lines[-1:] or [type(error).__name__])[0][:300]


def declared(library: Library) -> Library:
    """Return the library with the types of its functions, which return a message or null."""
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    arguments = {
        "bias_act": [pointer] * 4 + [integer] * 4 + [number] * 3 + [integer],
        "upfirdn2d": [pointer] * 5 + [integer],
        "filtered_lrelu": [pointer] * 4 + [integer] + [pointer] * 3 + [number] * 3 + [integer],
        "group_norm": [pointer] * 6 + [number] + [integer] * 2,
        "group_norm_backward": [pointer] * 9 + [integer] * 2,
    }
    for operation, types in arguments.items():
        for suffix in ("f32", "f64", "f16", "bf16"):
            with suppress(AttributeError):  # half precision and group_norm are for GPUs
                function = getattr(library, f"{operation}_{suffix}")
                function.argtypes, function.restype = types, ctypes.c_char_p
    library.slopes_size.argtypes, library.slopes_size.restype = [pointer] * 2, integer
    with suppress(AttributeError):
        library.group_norm_slices.argtypes, library.group_norm_slices.restype = [pointer], integer
    library.takes_activation.argtypes, library.takes_activation.restype = [integer], integer
    return library
