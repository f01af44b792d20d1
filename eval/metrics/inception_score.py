"""Inception Score (Salimans et al., NeurIPS 2016, Section 4), over torch-fidelity's splits."""

from __future__ import annotations

import torch

from eval.feature_stats import ClassStatistics
from eval.metrics.registry import Config, Generated, Metric, Real, Spread


def inception_score(statistics: ClassStatistics) -> Spread:
    """Return the Inception Score, from 1 to the number of classes, over the splits."""
    seen, total = int(statistics.counts.sum()), len(statistics.split_of)
    if seen != total:
        raise ValueError(f"{seen} images were seen of a set of {total}")
    mean = statistics.probabilities / statistics.counts[:, None]
    divergence = statistics.negentropy / statistics.counts + torch.special.entr(mean).sum(1)
    scores = divergence.exp()
    return Spread(float(scores.mean()), float(scores.std(correction=0)))


def _compute(
    generated: Generated, real: Real | None, config: Config, device: torch.device
) -> dict[str, float]:
    assert generated.classes is not None
    return {INCEPTION_SCORE.name: inception_score(generated.classes).mean}


INCEPTION_SCORE = Metric(
    name="inception_score",
    group="is",
    label="IS",
    title="Inception Score",
    better="higher",
    needs="classes",
    published_features="inception",
    compute=_compute,
    least_images=lambda config: config.score_splits,
    position=2,
    compares=False,
)
METRICS = (INCEPTION_SCORE,)
