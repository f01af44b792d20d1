"""Statistics of a set of images' features, collected in batches, on one rank or many.

moments    count, mean and scatter matrix: 34 MB at 2048 features
classes    sums of class probabilities, a row for each split: 80 KB at 1008 classes
features   the features themselves: 8 KB an image, 410 MB for 50,000, on the CPU

Sums are float64, by formulas that let ranks collect apart and merge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from core.distributed import World, all_gather_rows
from core.errors import UserError

Need = Literal["moments", "features", "classes", "student"]
"""Statistics that a metric needs; student: none, but the network itself."""
Head = Callable[[Tensor], Tensor]
"""Features [N, D] to the logits of classes [N, K]."""


class Moments(Protocol):
    """Anything with a mean and a covariance: our own statistics, or published ones."""

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        ...

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, normalised by count - 1."""
        ...


@dataclass
class FeatureStatistics:
    """Count, mean and scatter of the features seen so far; `update` adds a batch in place."""

    count: int
    mean: Tensor
    """[D] float64."""
    scatter: Tensor
    """[D, D] float64: the sum of (x - mean)(x - mean)^T."""

    @classmethod
    def empty(cls, dimensions: int, *, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Return the statistics of no features at all, the neutral element of `merge`."""
        zeros = torch.zeros(dimensions, dimensions + 1, dtype=torch.float64, device=device)
        return cls(0, zeros[:, 0].clone(), zeros[:, 1:].clone())

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Return the statistics of features [N, D], N >= 1, of any float dtype, on their device."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features must be [N, D] with N >= 1, got {tuple(features.shape)}")
        features = features.detach().to(torch.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def update(self, features: Tensor) -> None:
        """Add features [N, D] in place."""
        merged = self.merge(FeatureStatistics.of(features.to(self.mean.device)))
        self.count, self.mean, self.scatter = merged.count, merged.mean, merged.scatter

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets of features together (Chan et al. 1979, Eq. 2.1)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge {len(self.mean)} with {len(other.mean)} dimensions")
        count = self.count + other.count
        share = other.count / max(count, 1)
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.count * share)
        return FeatureStatistics(count, self.mean + step * share, scatter)

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance [D, D]; two features at least are needed."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


@dataclass
class ClassStatistics:
    """Sums over the class probabilities p of the images seen so far, a row for each split.

    The Inception Score of a split, exp E KL(p || E p), is exp(E sum p ln p - sum q ln q) with
    q = E p, so these sums are all that it needs (Salimans et al., NeurIPS 2016, Section 4).
    """

    split_of: Tensor
    """[images] int64: the split of each image of the whole set."""
    counts: Tensor
    """[splits] float64: images seen."""
    negentropy: Tensor
    """[splits] float64: the sum of p ln p."""
    probabilities: Tensor
    """[splits, K] float64: the sum of p."""

    @classmethod
    def empty(
        cls, classes: int, *, images: int, splits: int = 10, seed: int = 2020
    ) -> ClassStatistics:
        """Return the statistics of a set of which no image was seen yet.

        Images are dealt to splits as torch-fidelity does: shuffled, then cut.
        """
        if images < splits:
            raise ValueError(f"{splits} splits need at least {splits} images, got {images}")
        ends = np.arange(1, splits + 1) * images // splits
        split_of = np.empty(images, dtype=np.int64)
        shuffled = np.random.RandomState(seed).permutation(images)
        split_of[shuffled] = np.searchsorted(ends, np.arange(images), side="right")
        zeros = torch.zeros(splits, classes, dtype=torch.float64)
        return cls(torch.from_numpy(split_of), zeros[:, 0].clone(), zeros[:, 0].clone(), zeros)

    def update(self, logits: Tensor, *, first: int) -> None:
        """Add in place logits [N, K], those of the images `first` and following."""
        logs = logits.detach().to("cpu", torch.float64).log_softmax(1)
        splits = self.split_of[first : first + len(logs)]
        self.counts.index_add_(0, splits, torch.ones(len(logs), dtype=torch.float64))
        self.negentropy.index_add_(0, splits, (logs.exp() * logs).sum(1))
        self.probabilities.index_add_(0, splits, logs.exp())

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Return the statistics of two parts of one set together."""
        return ClassStatistics(
            self.split_of,
            self.counts + other.counts,
            self.negentropy + other.negentropy,
            self.probabilities + other.probabilities,
        )


@dataclass
class Collected:
    """Statistics of a set of images, or of one rank's part of it."""

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
    """Collects statistics of a set of images' features, batch by batch.

    `images` is the size of the whole set; where ranks share it, each has a Collector whose `first`
    is the index of its first image, and `merged_over_ranks` puts the parts together. The features
    of `kept_images` images are kept at most, drawn at random if there are more; `head` and
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
        """Take the features [N, D] of the next images. Raises UserError if one is not finite."""
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
        """Return the statistics so far."""
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
    """Return the statistics of all ranks, in the order of ranks, on every rank and on the CPU.

    Every rank must have seen at least one image.
    """
    parts = [
        Collected(int(count))
        for count in all_gather_rows(torch.tensor([part.images], device=world.device), world)
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
        merged.features = all_gather_rows(part.features.to(world.device), world).cpu()
    return merged


def _all_moments(part: FeatureStatistics, world: World) -> list[FeatureStatistics]:
    """Return the statistics of each rank."""
    dimensions = len(part.mean)
    count = part.mean.new_tensor([part.count])
    row = torch.cat([count, part.mean, part.scatter.flatten()])
    parts = []
    for other in all_gather_rows(row[None].to(world.device), world).cpu():
        count, mean, scatter = other.split([1, dimensions, dimensions**2])
        parts.append(FeatureStatistics(int(count), mean, scatter.view(dimensions, dimensions)))
    return parts


def _all_classes(part: ClassStatistics, world: World) -> list[ClassStatistics]:
    """Return the class statistics of each rank."""
    sums = torch.cat([part.counts[:, None], part.negentropy[:, None], part.probabilities], 1)
    return [
        ClassStatistics(part.split_of, other[:, 0], other[:, 1], other[:, 2:])
        for other in all_gather_rows(sums[None].to(world.device), world).cpu()
    ]
