"""Improved precision and recall by nearest neighbors (Kynkaanniemi et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.registry import Config, Generated, Metric, Real, check_pair

_STRIP = 1000
"""Images whose distances to all others are held at once: 200 MB for 50,000 others."""


class PrecisionRecall(NamedTuple):
    """Shares of images, 0 to 1."""

    precision: float
    """Of generated images that lie among the real ones."""
    recall: float
    """Of real images that lie among the generated ones."""


def precision_and_recall(generated: Tensor, real: Tensor, *, neighbors: int = 3) -> PrecisionRecall:
    """Return improved precision and recall (Kynkaanniemi et al., NeurIPS 2019, Eq. 1 and 2).

    An image lies among a set if it is no further from one of the set's images than that one's
    `neighbors`-th nearest other. generated [N, D], real [M, D], on any device.
    """
    check_pair(generated, real, least=neighbors + 1)
    real_radii = _radii(real, neighbors)
    generated_radii = _radii(generated, neighbors)
    precise = torch.zeros(0, dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for images, radii in zip(generated.split(_STRIP), generated_radii.split(_STRIP), strict=True):
        distances = torch.cdist(images, real)
        precise = torch.cat([precise, (distances <= real_radii).any(1)])
        recalled |= (distances <= radii[:, None]).any(0)
    return PrecisionRecall(*(float(flags.double().mean()) for flags in (precise, recalled)))


def _radii(features: Tensor, neighbors: int) -> Tensor:
    """Return the distance [N] from each to its `neighbors`-th nearest other one."""
    nearest = [
        torch.cdist(strip, features).topk(neighbors + 1, largest=False).values
        for strip in features.split(_STRIP)
    ]
    return torch.cat(nearest)[:, -1]  # the nearest of all is the image itself


def _compute(
    generated: Generated, real: Real | None, config: Config, device: torch.device
) -> dict[str, float]:
    assert generated.features is not None and real is not None and real.features is not None
    shares = precision_and_recall(
        generated.features.to(device), real.features.to(device), neighbors=config.neighbors
    )
    return {PRECISION.name: shares.precision, RECALL.name: shares.recall}


def _least_images(config: Config) -> int:
    return config.neighbors + 1


PRECISION = Metric(
    name="precision",
    group="pr",
    published_suffix="3",
    label="Precision",
    title="improved precision",
    better="higher",
    needs="features",
    published_features="vgg16",
    compute=_compute,
    least_images=_least_images,
    position=3,
    scale=100,
    unit="%",
)
RECALL = Metric(
    name="recall",
    group="pr",
    published_suffix="3",
    label="Recall",
    title="improved recall",
    better="higher",
    needs="features",
    published_features="vgg16",
    compute=_compute,
    least_images=_least_images,
    position=4,
    scale=100,
    unit="%",
    shows_mode_loss=True,
)
METRICS = (PRECISION, RECALL)
