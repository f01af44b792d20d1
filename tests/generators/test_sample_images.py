"""`python -m generators images`: the images that an evaluation sees, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import generators.__main__ as command
from core.errors import UserError
from eval import samples
from generators import _images
from pretrained import networks
from tiny_networks import small_stylegan2


def _call(*arguments: object) -> str:
    result = CliRunner().invoke(command.main, ["images", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    networks.save(tmp_path / "student.safetensors", small_stylegan2(c_dim=3))
    return tmp_path / "student.safetensors"


def test_images_are_those_of_an_evaluation(weights: Path, tmp_path: Path) -> None:
    """One PNG a seed, and all in one grid, with white where there is none."""
    _call(weights, "--seeds", "3,7-9", "--out", tmp_path / "out", "--grid", tmp_path / "grid.png")
    student = command.generators.load(weights)
    expected = samples.images_of_seeds(student, device="cpu")([3, 7, 8, 9])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"seed{seed:04d}.png" for seed in (3, 7, 8, 9)]
    for name, image in zip(names, expected, strict=True):
        pixels = np.asarray(Image.open(tmp_path / "out" / name))
        assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), image)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    size = expected.shape[-1]
    assert grid.shape == (2 * size, 2 * size, 3)
    assert np.array_equal(grid[size:, size:].transpose(2, 0, 1), expected[3].numpy())


def test_truncation_and_class_reach_the_student(weights: Path) -> None:
    """psi 0 makes all images of a class alike."""
    student = command.generators.load(weights)
    alike = _images.sample(student, [0, 1, 2], truncation=0.0, label=1)
    assert (alike[0].int() - alike[2].int()).abs().max() <= 1
    apart = _images.sample(student, [0, 1, 2], label=1)
    assert not torch.equal(apart[0], apart[2])
    with pytest.raises(UserError, match="--class 3: the student has 3 classes"):
        _images.sample(student, [0], label=3)


@pytest.mark.parametrize("text", ["", "a", "5-3", "1,,2", "-4"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected numbers and ranges"):
        _images.parse_seeds(text)


def test_images_that_are_not_finite_and_places_that_are_none_are_named(
    weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written: File exists"):
        _call(weights, "--seeds", "1", "--out", tmp_path / "file")
    student = command.generators.load(weights)
    with torch.no_grad():
        student.synthesis.b4.const.fill_(float("nan"))
    with pytest.raises(UserError, match="the image of seed 3 is not finite"):
        _images.sample(student, [3, 4])


def test_a_place_for_the_images_is_asked_for(weights: Path) -> None:
    with pytest.raises(UserError, match="--out DIR"):
        _call(weights)
