"""Real images, or their statistics, as others publish them.

    cifar-10-python.tar.gz       the images themselves; of them the training images count
    NAME-inception-….pkl         statistics that StyleGAN's programs keep of a data set

Both hold pickles, which are read as data (pretrained.nvidia_pickle): nothing in them can run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from data.prepare import open_source
from eval.feature_stats import FeatureStatistics
from pretrained import nvidia_pickle

ARCHIVES = (".tar", ".tgz", ".tar.gz")


class Archive:
    """The images of a published archive, in its order; an item is a uint8 tensor [C, H, W]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = open_source(path, labelling="none")
        self.image_shape: tuple[int, int, int] = tuple(self[0].shape)
        """(C, H, W) of every image."""

    @cached_property
    def sha256(self) -> str:
        """Return a hash of all pixels, in the order of the images."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self[index].numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._source.names)

    def __getitem__(self, index: int) -> Tensor:
        pixels = np.array(self._source.picture(index))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class FullData(NamedTuple):
    """What a file of StyleGAN's holds of a whole data set."""

    mean: Tensor
    """[D] float64."""
    covariance: Tensor
    """[D, D] float64, normalised by count - 1."""
    images: int
    features: Tensor | None
    """[images, D] float32, where all of them were kept."""


@dataclass(frozen=True)
class _Stored:
    """The fields of the file that count here."""

    images: int
    sums: tuple[np.ndarray, np.ndarray] | None
    """Of the features, [D], and of their products, [D, D]."""
    features: np.ndarray | None
    """[images, D]"""


def read_full_data(path: Path) -> FullData:
    """Return the statistics of a file that StyleGAN's programs keep of a data set.

    It holds sums over the images; the published distance normalises the covariance of them by the
    count, ours by one less, as its other references are. Raises UserError for anything else.
    """
    stored = _stored(path)
    features = None if stored.features is None else torch.from_numpy(stored.features).float()
    if stored.sums is not None:
        first, second = (torch.from_numpy(total.astype(np.float64)) for total in stored.sums)
        mean = first / stored.images
        scatter = second - torch.outer(first, mean)
        return FullData(mean, scatter / (stored.images - 1), stored.images, features)
    assert features is not None
    moments = FeatureStatistics.of(features)
    return FullData(moments.mean, moments.covariance, stored.images, features)


def _stored(path: Path) -> _Stored:
    """Return the fields of a file, checked against each other."""
    found = nvidia_pickle.plain(path.read_bytes(), what=str(path))
    if not isinstance(found, dict) or not {"num_items", "raw_mean", "raw_cov"} <= found.keys():
        raise UserError(
            f"{path} is a pickle, but not of statistics as StyleGAN's programs keep them: expected "
            "num_items, raw_mean and raw_cov"
        )
    images, mean, products = found["num_items"], found["raw_mean"], found["raw_cov"]
    if type(images) is not int or images < 2:
        raise UserError(f"{path} holds statistics of {images!r} images: 2 are needed at least")
    features = _features(found.get("all_features"), images)
    if not (isinstance(mean, np.ndarray) and isinstance(products, np.ndarray)):
        if features is None:
            raise UserError(f"{path} holds neither means and covariances nor all features")
        return _Stored(images, None, features)
    if mean.ndim != 1 or products.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: raw_mean has shape {mean.shape} and raw_cov {products.shape}; "
            "expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(products).all()):
        raise UserError(f"{path} holds numbers that are not finite")
    return _Stored(images, (mean, products), features)


def _features(parts: object, images: int) -> np.ndarray | None:
    """Return all features, if these are those of all images."""
    if not isinstance(parts, list) or not parts:
        return None
    if not all(isinstance(part, np.ndarray) and part.ndim == 2 for part in parts):
        return None
    features = np.concatenate(parts)
    return features if len(features) == images and np.isfinite(features).all() else None
