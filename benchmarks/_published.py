"""Import published code from a checkout of it, unmodified, beside ours.

Today's surroundings differ from those it was written for, so it is helped on its way. It imports by
name what `cpp_extension.load` has just loaded; that is found only if the library registers
itself in `sys.modules`, as those of multi-phase initialisation (newer pybind11) do not, so `load`
does it for them. And `requests` (for downloads) and `pkg_resources` (for version numbers) may not
be installed, in whose place it finds stand-ins.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from torch.torch_version import TorchVersion
from torch.utils import cpp_extension

from core.errors import UserError


@contextlib.contextmanager
def on_path(checkout: Path) -> Iterator[None]:
    """Let the checkout's packages be imported in the body.

    One of them is named `training`, as one of ours: ours steps aside meanwhile. Raises UserError
    if an import fails.
    """
    register_plugins()
    hidden = _taken_out()
    sys.path.insert(0, str(checkout.resolve()))
    try:
        with _stand_ins():
            yield
    except ImportError as error:
        raise UserError(f"--published {checkout}: {error}") from error
    finally:
        sys.path.pop(0)
        _taken_out()
        sys.modules.update(hidden)


def register_plugins() -> None:
    """Let `cpp_extension.load` put the modules that it returns into `sys.modules`, from now on.

    It stays so: the published code compiles its plug-ins at first use, long after its import.
    """
    if not getattr(cpp_extension.load, "registers_modules", False):
        cpp_extension.load = _registering(cpp_extension.load)


def _registering(load: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(load)
    def registered(name: str, *arguments: object, **options: object) -> object:
        module = load(name, *arguments, **options)
        if isinstance(module, ModuleType):
            sys.modules.setdefault(name, module)
        return module

    registered.registers_modules = True  # pyright: ignore[reportAttributeAccessIssue]
    return registered


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Offer a module for each of `requests` and `pkg_resources` that is not installed."""
    versions = ModuleType("pkg_resources")
    versions.parse_version = TorchVersion  # pyright: ignore[reportAttributeAccessIssue]
    offered = {"requests": ModuleType("requests"), "pkg_resources": versions}
    missing = [
        name for name in offered if name not in sys.modules and not importlib.util.find_spec(name)
    ]
    sys.modules.update({name: offered[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "training"]
    return {name: sys.modules.pop(name) for name in names}
