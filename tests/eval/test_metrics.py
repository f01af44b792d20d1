"""Distances, shares and scores of features: torch-fidelity's, and those of closed forms."""

from __future__ import annotations

import pytest
import torch
from torch_fidelity import metric_kid, metric_prc
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)

from eval.feature_stats import ClassStatistics, FeatureStatistics
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.kernel import kernel_distance
from eval.metrics.precision_recall import PrecisionRecall, precision_and_recall
from eval.metrics.registry import MetricResult


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


def test_distance_is_torch_fidelitys_to_eight_digits_where_it_is_regular() -> None:
    """With more images than features nothing is lost to rounding: 1e-8 of the trace term."""
    first, second = _features(900, 96, 6), _features(700, 96, 7, scale=1.1)
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), False
    )[KEY_METRIC_FID]
    found = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert found == pytest.approx(expected, rel=1e-8)


def test_distance_does_not_depend_on_which_set_is_singular() -> None:
    """The pivoted factor of a singular covariance gives what that of the regular one gives."""
    singular, regular = _features(12, 40, 8), _features(300, 40, 9)
    there = frechet_distance(FeatureStatistics.of(singular), FeatureStatistics.of(regular))
    back = frechet_distance(FeatureStatistics.of(regular), FeatureStatistics.of(singular))
    assert there == pytest.approx(back, rel=1e-7)


def test_kernel_distance_is_the_unbiased_sum() -> None:
    """With one subset of all images: mean k(x, x') + mean k(y, y') - 2 mean k(x, y), no i = j."""
    first, second = _features(15, 4, 10) / 4, _features(15, 4, 11) / 4

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / 4 + 1) ** 3

    def mean_of_others(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.sum() - matrix.trace()) / (15 * 14)

    expected = mean_of_others(kernel(first, first)) + mean_of_others(kernel(second, second))
    expected -= 2 * kernel(first, second).mean()
    found = kernel_distance(first, second, subsets=1, subset_size=15)
    assert found.mean == pytest.approx(float(expected), rel=1e-9)
    assert found.std == 0


def test_kernel_distance_and_precision_are_torch_fidelitys() -> None:
    """Of the same features, by its subsets and neighbours; in float64, which it takes too."""
    made, real = _features(90, 6, 12).double(), _features(80, 6, 13).double() + 0.2
    theirs = metric_kid.kid_features_to_metric(
        made, real, kid_subsets=5, kid_subset_size=40, rng_seed=7, verbose=False
    )
    found = kernel_distance(made, real, subsets=5, subset_size=40, seed=7)
    assert found.mean == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-12)
    assert found.std == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_STD], rel=1e-12)
    shares = metric_prc.calculate_precision_recall_full(made, real, 3, 25)
    assert precision_and_recall(made, real) == pytest.approx(shares, rel=1e-6)
    assert 0.2 < shares[0] < 1


def _two_clusters(count: int, seed: int) -> torch.Tensor:
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return centres[torch.arange(count) % 2] + noise


def test_images_of_one_of_two_kinds_are_precise_and_recall_half() -> None:
    """Images right among one cluster of two: precision 1, recall 1/2; and the other way round."""
    real = _two_clusters(40, 1)
    made = real[::2] + 1e-3
    assert precision_and_recall(made, real) == PrecisionRecall(1.0, 0.5)
    assert precision_and_recall(real, made) == PrecisionRecall(0.5, 1.0)


def test_distances_are_held_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 7 images give the same shares, and no matrix is larger than a strip."""
    made, real = _two_clusters(50, 2), _two_clusters(40, 3) + 0.5
    whole = precision_and_recall(made, real)
    sizes = []
    cdist = torch.cdist

    def recorded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        sizes.append(len(first) * len(second))
        return cdist(first, second)

    monkeypatch.setattr("eval.metrics.precision_recall._STRIP", 7)
    monkeypatch.setattr(torch, "cdist", recorded)
    assert precision_and_recall(made, real) == whole
    assert 0.2 < whole.precision < 1
    assert max(sizes) == 7 * 50


def test_too_few_images_for_distances_are_refused() -> None:
    """A subset of 20 cannot be drawn from 19, and a third neighbour needs four images."""
    with pytest.raises(ValueError, match=r"at least 20 images of each kind.*19 generated and 30"):
        kernel_distance(torch.rand(19, 3), torch.rand(30, 3), subset_size=20)
    with pytest.raises(ValueError, match=r"at least 4 images of each kind.*9 generated and 3 real"):
        precision_and_recall(torch.rand(9, 3), torch.rand(3, 3))


def _seen(logits: torch.Tensor, *, batch_size: int, first: int, images: int) -> ClassStatistics:
    statistics = ClassStatistics.empty(logits.shape[1], images=images)
    for start in range(0, len(logits), batch_size):
        statistics.update(logits[start : start + batch_size], first=first + start)
    return statistics


def test_inception_score_streams_to_torch_fidelitys() -> None:
    """Batches on two ranks, merged, give the score that torch-fidelity has from all logits."""
    logits = 3 * torch.randn(173, 12, generator=torch.Generator().manual_seed(1))
    expected = isc_features_to_metric(logits)
    parts = (
        _seen(logits[:100], batch_size=30, first=0, images=173),
        _seen(logits[100:], batch_size=17, first=100, images=173),
    )
    found = inception_score(parts[0].merge(parts[1]))
    assert found.mean == pytest.approx(expected[KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert found.std == pytest.approx(expected[KEY_METRIC_ISC_STD], rel=1e-9)


def test_inception_score_of_certain_and_even_classes_is_their_number() -> None:
    """Each image surely of one class, all classes as often: the score is how many there are."""
    logits = 1000 * torch.eye(7).repeat(5, 1)
    statistics = ClassStatistics.empty(7, images=35, splits=1)
    statistics.update(logits, first=0)
    assert inception_score(statistics).mean == pytest.approx(7, rel=1e-12)


def test_a_score_of_half_the_images_is_refused() -> None:
    """Splits are those of the whole set: a part of it has no score."""
    with pytest.raises(ValueError, match="20 images were seen of a set of 40"):
        inception_score(_seen(torch.zeros(20, 3), batch_size=20, first=0, images=40))
    with pytest.raises(ValueError, match="at least 10 images, got 9"):
        ClassStatistics.empty(3, images=9)
