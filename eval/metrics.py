"""Numbers from features: streaming means and covariances, and their Fréchet distance (FID).

Features come in batches and are never kept: count, mean and scatter matrix are, in float64,
combined by the pairwise formula of Chan, Golub and LeVeque (1979), which is stable and lets ranks
measure apart and merge. The distance is that of Heusel et al. (NeurIPS 2017, Eq. 6).
"""

from __future__ import annotations

import statistics as _statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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

    S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), so the trace of its root is a
    sum of real square roots and no general matrix root is needed (Heusel et al. 2017, Eq. 6).
    """
    mean_1, covariance_1 = first.mean.cpu(), first.covariance.cpu()
    mean_2, covariance_2 = second.mean.cpu(), second.covariance.cpu()
    if mean_1.shape != mean_2.shape:
        raise ValueError(f"cannot compare {len(mean_1)} with {len(mean_2)} feature dimensions")
    root = _symmetric_root(covariance_1)
    product = _symmetric(root @ covariance_2 @ root)
    overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    spread = covariance_1.trace() + covariance_2.trace() - 2 * overlap
    return float((mean_1 - mean_2).square().sum() + spread)


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


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Return the positive semi-definite root; eigenvalues that rounding left below 0 count as 0."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
