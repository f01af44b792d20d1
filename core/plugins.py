"""A name in a recipe -> the module behind it: one file of generators/, teachers/ or objectives/.

A plug-in is a public module with a class `Config` and a function `build`; nothing registers it. The
files are looked at, not imported, so that listing the names costs nothing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from core._config_errors import did_you_mean
from core.errors import UserError


def names(folder: str) -> list[str]:
    """Return the names of a folder's plug-ins, sorted."""
    found = importlib.util.find_spec(folder)
    assert found is not None and found.submodule_search_locations, folder
    files = [
        file for place in found.submodule_search_locations for file in Path(place).glob("*.py")
    ]
    return sorted({file.stem for file in files if file.name[0] != "_" and _is_plugin(file)})


def load(folder: str, name: str) -> ModuleType:
    """Return the module of a folder's plug-in. Raises UserError listing them if it has no such."""
    known = names(folder)
    if name not in known:
        near = did_you_mean(name, known)
        raise UserError(
            f"{folder}/ has no {name!r}{near or '.'} There are: {', '.join(known) or 'none'}"
        )
    return importlib.import_module(f"{folder}.{name}")


def _is_plugin(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return "Config" in classes and "build" in functions
