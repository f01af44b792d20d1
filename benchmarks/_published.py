"""Import published code from a checkout of it, unmodified, beside ours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from core.errors import UserError


@contextlib.contextmanager
def on_path(checkout: Path) -> Iterator[None]:
    """Let the checkout's packages be imported in the body.

    One of them is named `training`, as one of ours: ours steps aside meanwhile. Raises UserError
    if an import fails.
    """
    hidden = _taken_out()
    sys.path.insert(0, str(checkout.resolve()))
    try:
        yield
    except ImportError as error:
        raise UserError(f"--published {checkout}: {error}") from error
    finally:
        sys.path.pop(0)
        _taken_out()
        sys.modules.update(hidden)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "training"]
    return {name: sys.modules.pop(name) for name in names}
