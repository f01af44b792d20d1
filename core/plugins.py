"""Plug-ins by name: modules of generators/, teachers/ and objectives/.

A plug-in is a public module with a class `Config` and a function `build`, without registration.
Names are listed from the syntax trees of the files, without importing them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from core._config_errors import did_you_mean
from core.errors import UserError

PLUGIN = ("Config", "build")
"""Definitions of a plug-in of generators/, teachers/ or objectives/."""


def names(folder: str, *, defines: Sequence[str] = PLUGIN) -> list[str]:
    """Return the names of a folder's plug-ins, sorted: public modules with these definitions."""
    spec = importlib.util.find_spec(folder)
    assert spec is not None and spec.submodule_search_locations, folder
    files = [file for place in spec.submodule_search_locations for file in Path(place).glob("*.py")]
    return sorted({file.stem for file in files if file.name[0] != "_" and _defines(file, defines)})


def load(folder: str, name: str, *, defines: Sequence[str] = PLUGIN) -> ModuleType:
    """Return the module of a folder's plug-in. Raises UserError listing them if it has no such."""
    known = names(folder, defines=defines)
    if name not in known:
        near = did_you_mean(name, known)
        raise UserError(
            f"{folder}/ has no {name!r}{near or '.'} There are: {', '.join(known) or 'none'}"
        )
    return importlib.import_module(f"{folder}.{name}")


def _defines(file: Path, wanted: Sequence[str]) -> bool:
    """Return whether a file has these classes, functions and constants at its top level."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    defined = {getattr(node, "name", "") for node in tree.body}
    assignments = (node for node in tree.body if isinstance(node, ast.Assign))
    targets = (target for node in assignments for target in node.targets)
    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return set(wanted) <= defined
