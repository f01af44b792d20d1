"""Numbers from features: Fréchet and kernel distance, precision and recall, Inception Score.

    frechet_distance       streams: count, mean and scatter matrix stand for any number of images
    ClassStatistics        streams: sums of class probabilities, a row for each split
    kernel_distance        needs the features kept, of which it draws subsets
    precision_and_recall   needs the features kept; of all their distances it holds a strip

Kept features take 8 KB an image where there are 2048. Definitions are torch-fidelity's, down to
its subsets and splits. What streams is added up in float64 by formulas that let ranks measure apart
and merge.
"""

from __future__ import annotations

import statistics as _statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

_STRIP = 1000
"""Images whose distances to all others are held at once: 200 MB for 50,000 others."""


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


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): FID, where the features are Inception's.

    (Heusel et al., NeurIPS 2017, Eq. 6.)
    """
    mean_1, covariance_1 = first.mean.cpu(), first.covariance.cpu()
    mean_2, covariance_2 = second.mean.cpu(), second.covariance.cpu()
    if mean_1.shape != mean_2.shape:
        raise ValueError(f"cannot compare {len(mean_1)} with {len(mean_2)} feature dimensions")
    overlap = _trace_of_root(covariance_1.numpy(), covariance_2.numpy())
    spread = covariance_1.trace() + covariance_2.trace() - 2 * overlap
    return float((mean_1 - mean_2).square().sum() + spread)


def _trace_of_root(first: np.ndarray, second: np.ndarray) -> float:
    """Return tr (S1 S2)^(1/2) of covariances [D, D].

    With U^T U = S1, S1 S2 has the eigenvalues of the symmetric U S2 U^T, all real and none
    negative. The Cholesky factor U [rank, D] is pivoted, so that S1 may be singular.
    """
    factor, order, rank, _ = linalg.lapack.dpstrf(first)
    if rank == 0:
        return 0.0
    upper = np.triu(factor[:rank])
    reordered = second[np.ix_(order - 1, order - 1)]
    if rank == len(first):
        product, _ = linalg.lapack.dsygst(
            reordered, upper, itype=2
        )  # half the work of two products
    else:
        product = upper @ reordered @ upper.T
    values = linalg.eigvalsh(product, lower=False, driver="evd")
    return float(np.sqrt(values.clip(min=0)).sum())


class Spread(NamedTuple):
    """A mean over subsets of the images, and the standard deviation (n in the denominator)."""

    mean: float
    std: float


def kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> Spread:
    """Return the squared maximum mean discrepancy (KID), unbiased, over random subsets.

    Its kernel is (x . y / D + 1)^3 (Binkowski et al., ICLR 2018, Eq. 4). generated [N, D] and real
    [M, D], on one device; the subsets are torch-fidelity's of this seed, the sums, of which almost
    all cancels, are of float64. A value may be a little below 0.
    """
    _check_pair(generated, real, least=subset_size)
    drawn = np.random.RandomState(seed)
    found = np.empty(subsets)
    for index in range(subsets):
        first, second = (
            features[torch.from_numpy(drawn.choice(len(features), subset_size, replace=False))]
            for features in (generated, real)
        )
        found[index] = _squared_discrepancy(first, second)
    return Spread(float(found.mean()), float(found.std()))


def _squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased estimate for two sets of n features [n, D]."""
    count = len(first)
    within = sum(_kernel_sum(one, one) - _kernel_trace(one) for one in (first, second))
    between = _kernel_sum(first, second) / count**2
    return float(within / (count * (count - 1)) - 2 * between)


def _kernel_sum(first: Tensor, second: Tensor) -> Tensor:
    base = (first @ second.T).to(torch.float64).div_(first.shape[1]).add_(1).flatten()
    return torch.dot(base * base, base)


def _kernel_trace(features: Tensor) -> Tensor:
    base = features.to(torch.float64).square().sum(1) / features.shape[1] + 1
    return (base * base * base).sum()


class PrecisionRecall(NamedTuple):
    """Shares of images, 0 to 1."""

    precision: float
    """Of generated images that lie among the real ones."""
    recall: float
    """Of real images that lie among the generated ones."""


def precision_and_recall(
    generated: Tensor, real: Tensor, *, neighbours: int = 3
) -> PrecisionRecall:
    """Return improved precision and recall (Kynkaanniemi et al., NeurIPS 2019, Eq. 1 and 2).

    An image lies among a set where it is no further from one of the set's images than that one's
    `neighbours`-th nearest other. generated [N, D], real [M, D], on any device.
    """
    _check_pair(generated, real, least=neighbours + 1)
    real_radii = _radii(real, neighbours)
    generated_radii = _radii(generated, neighbours)
    precise = torch.zeros(0, dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for images, radii in zip(generated.split(_STRIP), generated_radii.split(_STRIP), strict=True):
        distances = torch.cdist(images, real)
        precise = torch.cat([precise, (distances <= real_radii).any(1)])
        recalled |= (distances <= radii[:, None]).any(0)
    return PrecisionRecall(*(float(flags.double().mean()) for flags in (precise, recalled)))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Return the distance [N] from each to its `neighbours`-th nearest other one."""
    nearest = [
        torch.cdist(strip, features).topk(neighbours + 1, largest=False).values
        for strip in features.split(_STRIP)
    ]
    return torch.cat(nearest)[:, -1]  # the nearest of all is the image itself


def _check_pair(generated: Tensor, real: Tensor, *, least: int) -> None:
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"cannot compare {generated.shape[1]} with {real.shape[1]} feature dimensions"
        )
    if min(len(generated), len(real)) < least:
        raise ValueError(
            f"at least {least} images of each kind are needed, got {len(generated)} generated and "
            f"{len(real)} real"
        )


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

    @property
    def score(self) -> Spread:
        """Return the Inception Score, from 1 to the number of classes, over the splits."""
        seen, total = int(self.counts.sum()), len(self.split_of)
        if seen != total:
            raise ValueError(f"{seen} images were seen of a set of {total}")
        mean = self.probabilities / self.counts[:, None]
        divergence = self.negentropy / self.counts + torch.special.entr(mean).sum(1)
        scores = divergence.exp()
        return Spread(float(scores.mean()), float(scores.std(correction=0)))


@dataclass(frozen=True)
class MetricResult:
    """One metric over several seeds: what a report shows as mean ± std."""

    values: tuple[float, ...]
    """One value a seed range, in order."""

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return _statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Return the sample standard deviation over seeds (n - 1); 0 for a single value."""
        return _statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> MetricResult:
        """Return the result for one value a seed range."""
        return cls(tuple(float(value) for value in values))
