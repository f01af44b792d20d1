"""benchmarks/step.py: its networks are the published ones, and its table is what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

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


def test_speeds_are_in_units_of_the_last_column() -> None:
    """Medians count, so one slow round of four does not; share is of the column's own rate."""
    seconds = {"ours": [1.0, 50.0, 1.0, 1.0], "official code": [3.0, 3.0, 3.0, 2.0]}
    reports = [step.Report(100.4, 5e9, 1e10), step.Report(None, 6e9, 8e9)]
    assert list(step._rows(seconds, reports, batch=8)) == [
        "| ours | 1 | 8 | 100 | 50% | 3.00 |",
        "| official code | 3 | 2.67 | unknown | 25% | 1.00 |",
    ]


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
