"""Feature extractors: what a name stands for, and that weights are data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from eval import features
from eval.features import Classifier, Config, save_classifier

SMALL = Config(image_channels=3, resolution=8, width=4, num_classes=5, feature_dim=6)


def _images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def test_pixels_are_the_image_in_unit_range() -> None:
    """The extractor `pixels` gives x / 127.5 - 1, one feature for each value of an image."""
    images = _images(3, (1, 4, 4))
    found = features.load("pixels")(images)
    torch.testing.assert_close(found, images.flatten(1).float() / 127.5 - 1)


def test_a_saved_classifier_extracts_its_penultimate_layer(tmp_path: Path) -> None:
    """A classifier's file gives the features of what was saved, in a batch or one by one."""
    torch.manual_seed(0)
    classifier = Classifier(SMALL)
    classifier(torch.randn(64, 3, 8, 8))  # batch-norm statistics that are not the initial ones
    save_classifier(tmp_path / "net.safetensors", classifier, provenance={"made_by": "a test"})
    extractor = features.load(str(tmp_path / "net.safetensors"))
    images = _images(4, (3, 8, 8))
    expected = classifier.eval().features(images / 127.5 - 1)
    assert extractor.dimensions == 6
    torch.testing.assert_close(extractor(images), expected)
    torch.testing.assert_close(torch.cat([extractor(image[None]) for image in images]), expected)


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A classifier says which images it was made for."""
    save_classifier(tmp_path / "net.safetensors", Classifier(SMALL), provenance={})
    with pytest.raises(UserError, match=r"made for images \(3, 8, 8\), got \(1, 8, 8\)"):
        features.load(str(tmp_path / "net.safetensors"))(_images(2, (1, 8, 8)))


def test_an_unknown_extractor_lists_those_that_exist() -> None:
    """A wrong name is answered with the right ones."""
    with pytest.raises(UserError, match=r"'inceptoin'.*inception, .*mnist32"):
        features.load("inceptoin")


def test_inception_weights_are_data(tmp_path: Path) -> None:
    """A file that would run a command when unpickled is refused and does not run it."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trace"),)

    torch.save({"weight": Hostile()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        features.load(f"inception:{tmp_path / 'weights.pth'}")
    assert not (tmp_path / "trace").exists()


def test_other_tensors_are_not_inception(tmp_path: Path) -> None:
    """Plain tensors that are not Inception's are refused."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not hold the weights of Inception v3"):
        features.load(f"inception:{tmp_path / 'weights.pth'}")


def test_too_many_pixels_are_refused() -> None:
    """A covariance of 3 x 64 x 64 pixels would not fit: the reader is sent to inception."""
    with pytest.raises(UserError, match="use inception"):
        features.load("pixels")(_images(1, (3, 64, 64)))
