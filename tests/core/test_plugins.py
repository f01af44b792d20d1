"""core/plugins.py: which modules are plug-ins, and what an unknown name is met with."""

import itertools
import sys
from pathlib import Path

import pytest

from core import plugins
from core.errors import UserError

PLUGIN = "class Config: ...\ndef build(config): return 'built'\n"


_fresh = itertools.count()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of an importable folder with two plug-ins and some that are none."""
    package = tmp_path / f"students{next(_fresh)}"
    package.mkdir()
    sources = {
        "__init__": "",
        "big": PLUGIN,
        "small": PLUGIN,
        "_layers": PLUGIN,
        "sampling": "def build(): ...\n",
        "settings": "class Config: ...\n",
        "broken": PLUGIN + "import no_such_module\nraise SystemExit\n",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return package.name


def test_plugins_are_the_public_modules_with_config_and_build(folder: str) -> None:
    """A private module and one that lacks Config or build is none."""
    assert plugins.names(folder) == ["big", "broken", "small"]


def test_listing_imports_no_plugin(folder: str) -> None:
    """Names come without running what the modules hold."""
    plugins.names(folder)
    assert not any(name.startswith(f"{folder}.") for name in sys.modules)


def test_a_plugin_is_loaded_by_name(folder: str) -> None:
    """The module comes back, ready to build."""
    assert plugins.load(folder, "small").build(None) == "built"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal", r"has no 'smal'; did you mean 'small'\? There are: big, broken, small"),
        ("sampling", "has no 'sampling'. There are: big"),
        ("_layers", "has no '_layers'"),
        ("../small", "has no"),
    ],
)
def test_an_unknown_name_lists_those_that_exist(folder: str, name: str, message: str) -> None:
    """Nothing but a plug-in's name is accepted, and the nearest is suggested."""
    with pytest.raises(UserError, match=message):
        plugins.load(folder, name)
