"""Plug-ins by name: modules of generators/, teachers/ and objectives/.

A plug-in is a public module with a class `Config` and a function `build`, without registration.
Names are listed from the syntax trees of the files, without importing them.
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
    spec = importlib.util.find_spec(folder)
    assert spec is not None and spec.submodule_search_locations, folder
    files = [file for path in spec.submodule_search_locations for file in Path(path).glob("*.py")]
    return sorted({file.stem for file in files if file.name[0] != "_" and _is_plugin(file)})


def load(folder: str, name: str) -> ModuleType:
    """Return a plug-in's module. Raises UserError that lists the folder's plug-ins."""
    plugins = names(folder)
    if name not in plugins:
        near = did_you_mean(name, plugins)
        raise UserError(
            f"{folder}/ has no {name!r}{near or '.'} There are: {', '.join(plugins) or 'none'}"
        )
    return importlib.import_module(f"{folder}.{name}")


def _is_plugin(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return "Config" in classes and "build" in functions
