"""benchmarks/step.py: its networks are the published ones, and its table is what it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch.utils import cpp_extension

from benchmarks import step
from benchmarks._published import on_path
from core.errors import UserError
from teachers import edm
from training import trainer

TINY = {"img_channels": 3, "img_resolution": 8, "model_type": "SongUNet", "augment_dim": 9}
TINY |= {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1}


@pytest.mark.parametrize(
    ("shape", "millions"), [("cifar10", 55.7), ("ffhq-64", 61.8), ("imagenet-64", 295.9)]
)
def test_its_networks_have_the_published_size(shape: str, millions: float) -> None:
    """The number of weights is that of EDM's pickles."""
    with torch.device("meta"):
        network = edm.build(edm.Config.model_validate(step.SHAPES[shape]))
    found = sum(parameter.numel() for parameter in network.parameters())
    assert round(found / 1e6, 1) == millions


def test_a_round_is_played_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command plays rounds of the setting asked for, and prints its row alone."""
    monkeypatch.setitem(step.SHAPES, "cifar10", TINY)
    words = ["--column", "bfloat16, shared batch", "--rounds", "1", "--batch", "2"]
    result = CliRunner().invoke(step.main, words)
    assert result.exception is None, result.output
    *_, rule, row = result.output.splitlines()
    network, column, seconds, images, *_, speed = row.strip("| ").split(" | ")
    assert rule.startswith("|---") and network == "cifar10" and column == words[1]
    assert float(images) == pytest.approx(2 / float(seconds), rel=0.02)
    assert speed == "1.00"


def test_speeds_are_in_units_of_the_first_column() -> None:
    """Medians count, so one slow round of four does not; share is of the column's own rate."""
    ours, official = step.Report(100.4, 5e9, 1e10), step.Report(None, 6e9, 8e9)
    row = step._row("ours", [1.0, 50.0, 1.0, 1.0], ours, batch=8, base=3.0)
    assert row == "| ours | 1 | 8 | 100 | 50% | 3.00 |"
    row = step._row("official code", [3.0, 3.0, 3.0, 2.0], official, batch=8, base=None)
    assert row == "| official code | 3 | 2.67 | unknown | 25% | unknown |"


def test_a_column_that_fails_leaves_the_others_their_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The official code cannot be imported: ours is measured all the same, and the end says so."""
    monkeypatch.setitem(step.SHAPES, "cifar10", TINY)
    words = ["--column", "float32", "--rounds", "1", "--batch", "2", "--published", str(tmp_path)]
    result = CliRunner().invoke(step.main, words)
    assert isinstance(result.exception, UserError) and "official code" in str(result.exception)
    assert [line.split(" | ")[1] for line in result.output.splitlines()[2:]] == ["float32"]


def test_published_code_shares_the_name_of_a_folder_of_ours(tmp_path: Path) -> None:
    """Both have a package `training`: in the body it is theirs, and afterwards ours again."""
    _write(tmp_path, "networks", "NAME = 'theirs'")
    with on_path(tmp_path):
        from training import networks  # pyright: ignore
    assert networks.NAME == "theirs"
    assert sys.modules["training.trainer"] is trainer
    assert "training.networks" not in sys.modules and str(tmp_path) not in sys.path


def test_what_the_published_code_lacks_is_named(tmp_path: Path) -> None:
    """A package that it imports and that is not installed ends in a sentence with its name."""
    _write(tmp_path, "networks", "import no_such_package")
    with pytest.raises(UserError, match="no_such_package"), on_path(tmp_path):
        from training import networks  # pyright: ignore  # noqa: F401
    assert sys.modules["training.trainer"] is trainer


def _write(checkout: Path, module: str, source: str) -> None:
    (checkout / "training").mkdir()
    (checkout / "training" / "__init__.py").touch()
    (checkout / "training" / f"{module}.py").write_text(source)


def test_a_plugin_that_was_loaded_can_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The published code imports by name what `cpp_extension.load` returned."""
    plugin = ModuleType("a_plugin_of_theirs")
    monkeypatch.setattr(cpp_extension, "load", lambda name, sources: plugin)
    monkeypatch.delitem(sys.modules, plugin.__name__, raising=False)
    with on_path(tmp_path), on_path(tmp_path):
        pass
    assert cpp_extension.load(name=plugin.__name__, sources=[]) is plugin
    assert importlib.import_module(plugin.__name__) is plugin
    del sys.modules[plugin.__name__]
