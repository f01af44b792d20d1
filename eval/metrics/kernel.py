"""KID: the squared maximum mean discrepancy of features (Binkowski et al., ICLR 2018).

Subsets and their seed are torch-fidelity's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.metrics.registry import Config, Generated, Metric, Real, Spread, check_pair


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
    check_pair(generated, real, least=subset_size)
    drawn = np.random.RandomState(seed)
    values = np.empty(subsets)
    for index in range(subsets):
        first, second = (
            features[torch.from_numpy(drawn.choice(len(features), subset_size, replace=False))]
            for features in (generated, real)
        )
        values[index] = _squared_discrepancy(first, second)
    return Spread(float(values.mean()), float(values.std()))


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


def _compute(
    generated: Generated, real: Real | None, config: Config, device: torch.device
) -> dict[str, float]:
    assert generated.features is not None and real is not None and real.features is not None
    spread = kernel_distance(
        generated.features.to(device),
        real.features.to(device),
        subsets=config.kid_subsets,
        subset_size=config.kid_subset_size,
        seed=config.random_seed,
    )
    return {KID.name: spread.mean}


KID = Metric(
    name="kid",
    label="KID",
    title="Kernel Inception Distance",
    better="lower",
    needs="features",
    published_features="inception",
    compute=_compute,
    least_images=lambda config: config.kid_subset_size,
    position=1,
    scale=1e3,
    unit="10⁻³",
)
METRICS = (KID,)
