"""What is kept of images' features while they come in batches, on one rank or many.

moments    count, mean and scatter matrix: 34 MB where there are 2048 features
classes    sums of class probabilities, a row for each split: 80 KB where there are 1008
features   the features themselves: 8 KB an image, 410 MB for 50,000, on the CPU
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.distributed import World, gather_rows
from core.errors import UserError
from eval.metrics import ClassStatistics, FeatureStatistics

Need = Literal["moments", "features", "classes", "student"]
"""What a metric is made of; student: walks in its latents, of which nothing is collected here."""
Head = Callable[[Tensor], Tensor]
"""Features [N, D] to the logits of classes [N, K]."""


@dataclass
class Collected:
    """What was kept of the features of a set of images, or of one rank's part of it."""

    images: int
    """How many were seen."""
    statistics: FeatureStatistics | None = None
    features: Tensor | None = None
    """[n, D] float32, on the CPU, in the order of the images."""
    classes: ClassStatistics | None = None

    @property
    def mean(self) -> Tensor:
        """Return the mean feature [D] float64."""
        assert self.statistics is not None, "the moments were not asked for"
        return self.statistics.mean

    @property
    def covariance(self) -> Tensor:
        """Return the covariance [D, D] float64."""
        assert self.statistics is not None, "the moments were not asked for"
        return self.statistics.covariance

    def merge(self, other: Collected) -> Collected:
        """Return both parts of one set together; the images of `other` follow these."""
        statistics, features, classes = self.statistics, self.features, self.classes
        if statistics is not None and other.statistics is not None:
            statistics = statistics.merge(other.statistics)
        if features is not None and other.features is not None:
            features = torch.cat([features, other.features])
        if classes is not None and other.classes is not None:
            classes = classes.merge(other.classes)
        return Collected(self.images + other.images, statistics, features, classes)


def kept_indices(images: int, kept_images: int, random_seed: int) -> Tensor:
    """Return which of so many images have their features kept, [n] int64 in ascending order."""
    return _is_kept(images, kept_images, random_seed).nonzero().flatten()


def _is_kept(images: int, kept_images: int, random_seed: int) -> Tensor:
    order = np.random.RandomState(random_seed).permutation(images)
    return torch.from_numpy(order < kept_images)  # [images]


class Collector:
    """Takes the features of a set of images in batches and keeps what metrics need of them.

    `images` is the size of the whole set; where ranks share it, each has a Collector whose `first`
    is the index of its first image, and `merged_over_ranks` puts the parts together. The features
    of `kept_images` images are kept at most, drawn at random where there are more; `head` and
    `splits` are those of the class statistics.
    """

    def __init__(
        self,
        wanted: Collection[Need],
        *,
        images: int,
        kept_images: int = 50_000,
        splits: int = 10,
        random_seed: int = 2020,
        head: Head | None = None,
        first: int = 0,
    ) -> None:
        self._wanted, self._head = frozenset(wanted), head
        self._images, self._next = images, first
        self._splits, self._random_seed = splits, random_seed
        self._is_kept = _is_kept(images, kept_images, random_seed)
        self._parts: list[Tensor] = []
        self._found = Collected(0)

    def add(self, features: Tensor) -> None:
        """Take the features [N, D] of the next images. Raises UserError where one is not finite."""
        first, self._next = self._next, self._next + len(features)
        _check_finite(features, first=first)
        self._found.images += len(features)
        if "moments" in self._wanted:
            moments = FeatureStatistics.of(features)
            before = self._found.statistics
            self._found.statistics = moments if before is None else before.merge(moments)
        if "features" in self._wanted:
            kept = self._is_kept[first : self._next]
            self._parts.append(features.detach().to("cpu", torch.float32)[kept])
        if "classes" in self._wanted:
            self._add_classes(features, first)

    def _add_classes(self, features: Tensor, first: int) -> None:
        assert self._head is not None, "the extractor has no classes: check() says so"
        with torch.no_grad():
            logits = self._head(features)
        if self._found.classes is None:
            self._found.classes = ClassStatistics.empty(
                logits.shape[1],
                images=self._images,
                splits=self._splits,
                seed=self._random_seed,
            )
        self._found.classes.update(logits, first=first)

    @property
    def collected(self) -> Collected:
        """Return what was kept so far."""
        if self._parts:
            self._found.features = torch.cat(self._parts)
            self._parts = [self._found.features]
        return self._found


def _check_finite(features: Tensor, *, first: int) -> None:
    finite = features.isfinite().all(1)
    if not finite.all():
        index = first + int((~finite).nonzero()[0])
        raise UserError(
            f"the features of image {index} are not finite: was it made by a network that diverged?"
        )


def merged_over_ranks(part: Collected, world: World) -> Collected:
    """Return what all ranks collected, in the order of ranks, on every rank and on the CPU.

    Every rank must have seen at least one image.
    """
    parts = [
        Collected(int(count))
        for count in gather_rows(torch.tensor([part.images], device=world.device), world)
    ]
    if part.statistics is not None:
        for one, statistics in zip(parts, _all_moments(part.statistics, world), strict=True):
            one.statistics = statistics
    if part.classes is not None:
        for one, classes in zip(parts, _all_classes(part.classes, world), strict=True):
            one.classes = classes
    merged = parts[0]
    for other in parts[1:]:
        merged = merged.merge(other)
    if part.features is not None:
        merged.features = gather_rows(part.features.to(world.device), world).cpu()
    return merged


def _all_moments(part: FeatureStatistics, world: World) -> list[FeatureStatistics]:
    """Return the statistics of each rank."""
    dimensions = len(part.mean)
    count = part.mean.new_tensor([part.count])
    row = torch.cat([count, part.mean, part.scatter.flatten()])
    found = []
    for other in gather_rows(row[None].to(world.device), world).cpu():
        count, mean, scatter = other.split([1, dimensions, dimensions**2])
        found.append(FeatureStatistics(int(count), mean, scatter.view(dimensions, dimensions)))
    return found


def _all_classes(part: ClassStatistics, world: World) -> list[ClassStatistics]:
    """Return the class statistics of each rank."""
    sums = torch.cat([part.counts[:, None], part.negentropy[:, None], part.probabilities], 1)
    return [
        ClassStatistics(part.split_of, other[:, 0], other[:, 1], other[:, 2:])
        for other in gather_rows(sums[None].to(world.device), world).cpu()
    ]
