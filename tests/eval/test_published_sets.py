"""References as others publish them: CIFAR-10's archive, and the statistics that StyleGAN keeps."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from eval import features
from eval.feature_stats import FeatureStatistics, kept_indices
from eval.metrics.registry import Config
from eval.reference import image_set, is_image_set, reference_statistics

INCEPTION = replace(features.load("pixels"), name="inception", dimensions=6)
FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def _statistics(path: Path, **changes: object) -> Path:
    """Write the fields that StyleGAN's programs keep of a data set, with changes."""
    wide = FEATURES.numpy().astype(np.float64)
    fields = {
        "capture_all": False,
        "capture_mean_cov": True,
        "max_items": None,
        "num_items": 50,
        "num_features": 6,
        "all_features": None,
        "raw_mean": wide.sum(0),
        "raw_cov": wide.T @ wide,
    }
    path.write_bytes(pickle.dumps(fields | changes))
    return path


def _archive(path: Path) -> np.ndarray:
    """Write CIFAR-10's archive with two images a batch; return its training images."""
    pixels = np.random.RandomState(0).randint(0, 256, (6, 2, 3072)).astype(np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    with tarfile.open(path, "w:gz") as archive:
        for name, data in zip(names, pixels, strict=True):
            content = pickle.dumps({"data": data, "labels": [0, 1]}, protocol=2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return pixels[:5].reshape(10, 3, 32, 32)


@pytest.mark.parametrize("protocol", [2, 4])
def test_stylegan_s_sums_are_means_and_covariances(tmp_path: Path, protocol: int) -> None:
    """Normalised by one less than the count, like every other reference."""
    path = _statistics(tmp_path / "stats.pkl")
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    found = reference_statistics(path, INCEPTION)
    expected = FeatureStatistics.of(FEATURES)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.covariance, expected.covariance)
    assert (found.images, found.image_shape, found.source) == (50, None, "stats.pkl")
    assert found.features is None and len(found.sha256) == 64


def test_features_that_were_all_kept_serve_the_other_metrics(tmp_path: Path) -> None:
    """In their order, as many as are to be kept; alone they give the moments too."""
    parts = [part.numpy() for part in FEATURES.split(20)]
    path = _statistics(tmp_path / "all.pkl", all_features=parts, raw_mean=None, raw_cov=None)
    found = reference_statistics(path, INCEPTION, keep=Config(kept_images=30))
    torch.testing.assert_close(found.features, FEATURES[kept_indices(50, 30, 2020)])
    torch.testing.assert_close(found.covariance, FeatureStatistics.of(FEATURES).covariance)
    part = _statistics(tmp_path / "part.pkl", all_features=parts[:2])
    assert reference_statistics(part, INCEPTION, keep=Config()).features is None


def test_stylegan_s_statistics_are_inception_s(tmp_path: Path) -> None:
    """By convention, as the file does not say: other features, or of another size, are refused."""
    path = _statistics(tmp_path / "stats.pkl")
    with pytest.raises(UserError, match="by convention Inception's"):
        reference_statistics(path, features.load("pixels"))
    with pytest.raises(UserError, match="6 features an image, but the extractor inception gives 9"):
        reference_statistics(path, replace(INCEPTION, dimensions=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 1}, "of 1 images"),
        ({"raw_mean": None}, "neither means and covariances nor all features"),
        ({"raw_cov": np.zeros((2, 2))}, r"raw_mean has shape \(6,\) and raw_cov \(2, 2\)"),
        ({"raw_mean": np.full(6, np.nan)}, "not finite"),
    ],
)
def test_statistics_that_are_none_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    """With what is wrong with them."""
    with pytest.raises(UserError, match=message):
        reference_statistics(_statistics(tmp_path / "stats.pkl", **changes), INCEPTION)


def test_other_pickles_are_refused_and_run_nothing(tmp_path: Path) -> None:
    """A command in a pickle is named, not run; half a pickle, and one of other things."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = tmp_path / "bad.pkl"
    whole = pickle.dumps({"num_items": Attack()})
    for content, message in (
        (whole, "was refused, and nothing"),
        (whole[:-9], "cut off|refused"),
        (pickle.dumps([1]), "not of statistics"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            reference_statistics(path, INCEPTION)
    assert not (tmp_path / "attacked").exists()


def test_cifar_s_archive_is_a_reference(tmp_path: Path) -> None:
    """Its training images, in their order; measured once, and kept by their content."""
    pixels = torch.from_numpy(_archive(tmp_path / "cifar-10-python.tar.gz"))
    images = image_set(tmp_path / "cifar-10-python.tar.gz")
    assert is_image_set(images.path) and (len(images), images.image_shape) == (10, (3, 32, 32))
    assert torch.equal(torch.stack([images[index] for index in range(10)]), pixels)
    extractor = replace(
        features.load("pixels"), function=lambda found: found.flatten(1)[:, ::500].float()
    )
    found = reference_statistics(images.path, extractor, cache=tmp_path / "kept")
    expected = FeatureStatistics.of(extractor(pixels))
    torch.testing.assert_close(found.mean, expected.mean)
    assert (found.images, found.sha256) == (10, images.sha256)
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_an_archive_that_is_cut_off_is_named(tmp_path: Path) -> None:
    """Half a download."""
    path = tmp_path / "cifar-10-python.tar.gz"
    _archive(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="is cut off or no tar archive"):
        reference_statistics(path, features.load("pixels"))
