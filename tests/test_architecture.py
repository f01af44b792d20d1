"""Which way imports point, and the other rules that hold for every file: read from the source."""

import ast
import graphlib
import importlib.metadata
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from repository import ROOT

MAY_IMPORT = {
    "core": set(),
    "pretrained": {"core"},
    "custom_ops": {"core"},
    "teachers": {"core", "custom_ops", "pretrained"},
    "objectives": {"core"},
    "training": {"core"},
    "data": {"core", "pretrained"},
    "eval": {"core", "data", "pretrained"},
    "reports": {"core", "eval"},
    "generators": {"core", "custom_ops", "pretrained"},
    "refinement": {
        "core",
        "custom_ops",
        "data",
        "eval",
        "generators",
        "pretrained",
        "reports",
        "teachers",
        "training",
    },
}
"""Folder -> the other folders it may import."""
EXCEPTIONS = {
    "generators.one_step_edm": {"core", "pretrained", "teachers"},
    "objectives._real_images": {"core", "data"},
    "objectives.denoising": {"core", "data"},
    "objectives.real_uid": {"core", "data"},
    "generators.__main__": {"core", "eval", "pretrained"},
    "generators._images": {"core", "eval", "pretrained"},
    "eval.__main__": {"core", "data", "generators", "pretrained", "teachers"},
}
COMMANDS = {"refine", "assets", "benchmarks", "tests"}
"""What may import everything, and is imported by tests alone."""
OURS = MAY_IMPORT.keys() | COMMANDS
PICKLE_MODULES = {"pickle", "_pickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve"}
NOT_PLUGINS = {"eval.edm_sampler"}


class Import(NamedTuple):
    module: str
    line: int
    is_typing_only: bool
    name: str = ""
    """What a `from` import takes from the module, where that is no module itself."""


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _trees() -> dict[str, ast.Module]:
    """Return every module of ours, by its dotted name."""
    files = sorted(ROOT.glob("*.py"))
    for folder in sorted(OURS):
        files += sorted((ROOT / folder).rglob("*.py"))
    trees = {_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    assert len(trees) > 100, f"{ROOT} is not the project's root"
    return trees


def _imports(tree: ast.AST, modules: frozenset[str], typing_only: bool = False) -> Iterator[Import]:
    """Yield each module that is imported anywhere below a node; `from core import x` is core.x."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if below in modules:
                    yield Import(below, node.lineno, typing_only)
                else:
                    yield Import(str(node.module), node.lineno, typing_only, alias.name)
        else:
            is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from _imports(node, modules, typing_only or is_guard)


def _all_imports() -> Iterator[tuple[str, Import]]:
    trees = _trees()
    for name, tree in trees.items():
        yield from ((name, found) for found in _imports(tree, frozenset(trees)))


def _folder(module: str) -> str:
    return module.partition(".")[0]


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _forbidden(name: str, module: str) -> bool:
    """Return whether a module of ours may not import another, by the picture in docs."""
    folder, target = _folder(name), _folder(module)
    if target not in OURS or target == folder or folder == "tests":
        return False
    if target in COMMANDS:
        return True
    return folder not in COMMANDS and target not in EXCEPTIONS.get(name, MAY_IMPORT[folder])


def test_imports_point_only_downwards() -> None:
    """Each folder imports only those below it; core imports none of ours."""
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for name, found in _all_imports()
        if _forbidden(name, found.module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("core.config", "training.trainer"),
        ("training.trainer", "generators"),
        ("training.trainer", "reports.data"),
        ("objectives.diff_instruct", "teachers.edm"),
        ("reports.data", "training.state"),
        ("eval.evaluator", "reports.data"),
        ("eval.__main__", "training.state"),
        ("generators.stylegan2", "teachers.edm"),
        ("training.trainer", "tests.test_loop"),
        ("eval.features", "assets.mnist32.make"),
        ("assets.mnist32.make", "refine"),
    ],
)
def test_the_import_rule_can_fail(name: str, module: str) -> None:
    """The imports that the architecture forbids by name are caught."""
    assert _forbidden(name, module)


def test_imports_are_found_wherever_they_stand() -> None:
    """A late import inside a function counts; one under TYPE_CHECKING is marked as such."""
    source = (
        "def f():\n    from core import config\nif TYPE_CHECKING:\n    import core.errors as e\n"
    )
    found = list(_imports(ast.parse(source), frozenset({"core", "core.config"})))
    assert found == [Import("core.config", 2, False), Import("core.errors", 4, True)]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    graph: dict[str, set[str]] = {name: set() for name in _trees()}
    for name, found in _all_imports():
        if found.module in graph and not found.is_typing_only:
            graph[name].add(found.module)
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_private_modules_stay_in_their_folder() -> None:
    """`_name.py` is imported only by its neighbours and by tests."""
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for name, found in _all_imports()
        if _folder(found.module) in OURS - {"tests", _folder(name)}
        and re.search(r"\._[a-z]", found.module)
        and _folder(name) != "tests"
    ]
    assert wrong == []


def test_no_test_imports_another() -> None:
    """Tests share the modules of tests/support alone."""
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for name, found in _all_imports()
        if re.search(r"(^|\.)test_", found.module) and _folder(name) == "tests"
    ]
    assert wrong == []


def test_modules_of_tests_have_one_name_each() -> None:
    """Pytest imports them by name; those of support neither hide a library nor a folder of ours."""
    names = [name.rpartition(".")[2] for name in _trees() if _folder(name) == "tests"]
    assert sorted(set(names)) == sorted(names)
    support = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    assert (
        support
        & (sys.stdlib_module_names | OURS | importlib.metadata.packages_distributions().keys())
        == set()
    )


def test_only_the_pickle_reader_imports_pickle() -> None:
    """Nothing else can unpickle by a pickle module; catching its error unpickles nothing."""
    importers = {
        name
        for name, found in _all_imports()
        if _folder(found.module) in PICKLE_MODULES
        and found.name not in {"UnpicklingError", "dumps"}
        and _folder(name) != "tests"
    }
    assert importers <= {"pretrained.nvidia_pickle"}


def test_no_library_is_asked_to_unpickle() -> None:
    """torch.load always has weights_only=True, numpy never allow_pickle=True."""
    wrong = []
    for name, tree in _trees().items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            options = {word.arg: ast.unparse(word.value) for word in call.keywords}
            is_load = ast.unparse(call.func) == "torch.load"
            if is_load and options.get("weights_only") != "True":
                wrong.append(f"{name}:{call.lineno} torch.load without weights_only=True")
            if options.get("allow_pickle", "False") != "False":
                wrong.append(f"{name}:{call.lineno} allow_pickle")
    assert [line for line in wrong if not line.startswith("tests.")] == []


def test_no_star_imports() -> None:
    """Every name can be traced to where it comes from."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in _trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert wrong == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    """No utils, helpers, misc, manager or common, alone or as a part."""
    empty = {"util", "utils", "helper", "helpers", "misc", "manager", "common"}
    assert [name for name in _trees() if empty & set(re.split(r"[._]", name))] == []


def test_nothing_at_the_top_hides_the_standard_library() -> None:
    """The root is first on sys.path: a types.py, logging.py or random.py there breaks Python."""
    top = {_folder(name) for name in _trees()}
    assert top & sys.stdlib_module_names == set()


def test_every_module_says_what_is_in_it() -> None:
    """Each file opens with a docstring."""
    assert [name for name, tree in _trees().items() if not ast.get_docstring(tree)] == []


def test_no_function_is_longer_than_60_lines() -> None:
    """From its name to its last line: arguments and docstring count too."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    wrong = [
        f"{name}:{node.lineno} {node.name} has {lines} lines"
        for name, tree in _trees().items()
        for node in ast.walk(tree)
        if isinstance(node, functions) and (lines := _last_line(node) - node.lineno + 1) > 60
    ]
    assert wrong == []


def test_no_folder_has_more_than_16_modules() -> None:
    """A larger one is two rooms; an __init__ that only opens the folder does not count."""
    files = (file for name in MAY_IMPORT for file in (ROOT / name).rglob("*.py"))
    folders = Counter(str(file.parent) for file in files if file.name != "__init__.py")
    assert len(folders) > 10
    assert {name: count for name, count in folders.items() if count > 16} == {}


def test_every_public_module_of_a_plugin_folder_is_a_plugin() -> None:
    """A file in generators/, teachers/ or objectives/ has a Config and a build, or a leading _."""
    wrong = []
    for name, tree in _trees().items():
        folder, _, module = name.partition(".")
        if folder not in {"generators", "teachers", "objectives"} or not module:
            continue
        defined = {getattr(node, "name", "") for node in tree.body}
        is_public = not module.startswith("_")
        if is_public and not {"Config", "build"} <= defined:
            wrong.append(name)
    assert wrong == []
