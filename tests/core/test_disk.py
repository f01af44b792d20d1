"""JSON of users: deep nesting is a ValueError, wherever it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from core.disk import parsed_json
from core.errors import UserError
from data.images import Images
from reports import data

DEEP = "[" * 100_000


def test_deep_nesting_is_a_value_error() -> None:
    assert parsed_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed_json(DEEP)


def test_files_that_are_nested_too_deeply_are_named(tmp_path: Path) -> None:
    """Labels of images and a report: the sentence says what is wrong with which file."""
    (tmp_path / "dataset.json").write_text(DEEP)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"dataset\.json must be .* nested too deeply"):
        Images(tmp_path)
    with pytest.raises(UserError, match="is not a report of this program: it is nested too deeply"):
        data.read(tmp_path / "dataset.json")
