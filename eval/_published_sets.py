"""Published real images and published statistics of real images.

    cifar-10-python.tar.gz       the training images
    NAME-inception-….pkl         statistics of a data set in the format of StyleGAN's programs

Both contain pickles, which are read as data (pretrained.nvidia_pickle): no code in them runs.
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
from torch.utils.data import Dataset

from core.errors import UserError
from data.prepare import open_source
from eval.feature_stats import FeatureStatistics
from pretrained import nvidia_pickle

ARCHIVES = (".tar", ".tgz", ".tar.gz")


class Archive(Dataset[Tensor]):
    """Images of a published archive, in its order; an item is a uint8 tensor [C, H, W]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = open_source(path, labeling="none")
        channels, height, width = self[0].shape
        self.image_shape = (channels, height, width)
        """(C, H, W) of every image."""

    @cached_property
    def sha256(self) -> str:
        """Return a hash of all pixels in the order of the images."""
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
    """Statistics of a whole data set from a file of StyleGAN's."""

    mean: Tensor
    """[D] float64."""
    covariance: Tensor
    """[D, D] float64, normalized by count - 1."""
    images: int
    features: Tensor | None
    """[images, D] float32, or None without the features of all images."""


@dataclass(frozen=True)
class _Fields:
    """Fields of the file."""

    images: int
    sums: tuple[np.ndarray, np.ndarray] | None
    """raw_mean [D] and raw_cov [D, D]: sums of the features and of their products."""
    features: np.ndarray | None
    """[images, D]"""


def read_full_data(path: Path) -> FullData:
    """Return the statistics of a data set from a file of StyleGAN's programs.

    The file has sums over the images. The published distance normalizes the covariance by the
    count, ours by count - 1, as for all other references. Raises UserError for any other file.
    """
    fields = _read_fields(path)
    features = None if fields.features is None else torch.from_numpy(fields.features).float()
    if fields.sums is not None:
        first, second = (torch.from_numpy(total.astype(np.float64)) for total in fields.sums)
        mean = first / fields.images
        scatter = second - torch.outer(first, mean)
        return FullData(mean, scatter / (fields.images - 1), fields.images, features)
    assert features is not None
    moments = FeatureStatistics.of(features)
    return FullData(moments.mean, moments.covariance, fields.images, features)


def _read_fields(path: Path) -> _Fields:
    """Return the fields of a file after checks of types and shapes."""
    # count
    content = nvidia_pickle.read_plain(path.read_bytes(), what=str(path))
    if not isinstance(content, dict) or not {"num_items", "raw_mean", "raw_cov"} <= content.keys():
        raise UserError(
            f"{path} is a pickle, but not of statistics as StyleGAN's programs keep them: expected "
            "num_items, raw_mean and raw_cov"
        )
    images, mean, products = content["num_items"], content["raw_mean"], content["raw_cov"]
    if type(images) is not int or images < 2:
        raise UserError(f"{path} holds statistics of {images!r} images: 2 are needed at least")

    # features and sums, at least one of the two
    features = _features(content.get("all_features"), images)
    if not (isinstance(mean, np.ndarray) and isinstance(products, np.ndarray)):
        if features is None:
            raise UserError(f"{path} holds neither means and covariances nor all features")
        return _Fields(images, None, features)

    # shapes and values of the sums
    if mean.ndim != 1 or products.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: raw_mean has shape {mean.shape} and raw_cov {products.shape}; "
            "expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(products).all()):
        raise UserError(f"{path} holds numbers that are not finite")
    return _Fields(images, (mean, products), features)


def _features(parts: object, images: int) -> np.ndarray | None:
    """Return the features [images, D], or None unless they are those of all images."""
    if not isinstance(parts, list) or not parts:
        return None
    if not all(isinstance(part, np.ndarray) and part.ndim == 2 for part in parts):
        return None
    features = np.concatenate(parts)
    return features if len(features) == images and np.isfinite(features).all() else None
