"""Statistics and Fréchet distances: torch-fidelity's, and those of closed forms."""

from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from eval.metrics import FeatureStatistics, MetricResult, frechet_distance


def _features(count: int, dimensions: int, seed: int, *, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return scale * (noise @ mix) + torch.arange(dimensions) / 3


def _streamed(features: torch.Tensor, batch_size: int) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("count", [500, 20])
def test_distance_equals_torch_fidelitys(count: int) -> None:
    """The distance is torch-fidelity's to 1e-6, also where the covariance is singular (20 < 48)."""
    first, second = _features(count, 48, 1), _features(400, 48, 2, scale=1.3)
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), False
    )[KEY_METRIC_FID]
    found = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert found == pytest.approx(expected, rel=1e-6)


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    """Where covariances are diagonal, it is the sum of (m1 - m2)^2 + (s1 - s2)^2."""
    means = torch.tensor([[0.0, 1.0, 2.0], [0.5, -1.0, 2.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.0], [1.5, 0.5, 3.0]], dtype=torch.float64)
    first, second = (
        FeatureStatistics(11, mean, 10 * torch.diag(deviation**2))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), abs=1e-12)


def test_distance_of_a_set_to_itself_is_zero() -> None:
    """Nothing is nearer to a set than the set, up to the square root of rounding."""
    statistics = FeatureStatistics.of(_features(200, 32, 3))
    scale = float(statistics.covariance.trace())
    assert abs(frechet_distance(statistics, statistics)) < 1e-8 * scale


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_streaming_equals_one_batch(batch_size: int) -> None:
    """Batches give the mean and covariance of all features, even far from the origin."""
    features = _features(301, 12, 4) + 1e5
    statistics = _streamed(features, batch_size)
    assert statistics.count == 301
    torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(statistics.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)


def test_merging_is_as_good_as_seeing_all() -> None:
    """Statistics of two parts, merged, are those of the whole."""
    features = _features(100, 5, 5)
    merged = FeatureStatistics.of(features[:30]).merge(FeatureStatistics.of(features[30:]))
    whole = FeatureStatistics.of(features)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-12)


def test_one_image_has_no_covariance() -> None:
    """A covariance of one image is refused rather than infinite."""
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = FeatureStatistics.of(torch.ones(1, 3)).covariance


def test_different_features_cannot_be_compared() -> None:
    """A distance between 3 and 4 dimensions is refused."""
    with pytest.raises(ValueError, match="3 with 4"):
        frechet_distance(
            FeatureStatistics.of(torch.rand(9, 3)), FeatureStatistics.of(torch.rand(9, 4))
        )


def test_result_has_the_sample_standard_deviation() -> None:
    """Mean and spread over seeds: n - 1 in the denominator, 0 where there is one value."""
    assert MetricResult.of([1, 2, 3]).mean == 2
    assert MetricResult.of([1, 2, 3]).std == 1
    assert MetricResult.of([4]).std == 0
