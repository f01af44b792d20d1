"""FID: the Fréchet distance between Gaussians fitted to features (Heusel et al., NeurIPS 2017)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import linalg

from eval.feature_stats import Moments
from eval.metrics.registry import Config, Generated, Metric, Real


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): FID if the features are Inception's.

    (Heusel et al., NeurIPS 2017, Eq. 6.)
    """
    mean_1, covariance_1 = first.mean.cpu(), first.covariance.cpu()
    mean_2, covariance_2 = second.mean.cpu(), second.covariance.cpu()
    if mean_1.shape != mean_2.shape:
        raise ValueError(f"cannot compare {len(mean_1)} with {len(mean_2)} feature dimensions")
    overlap = _trace_of_root(covariance_1.numpy(), covariance_2.numpy())
    spread = covariance_1.trace() + covariance_2.trace() - 2 * overlap
    distance = float((mean_1 - mean_2).square().sum() + spread)
    return max(distance, 0.0)  # of a set against itself, rounding gives -1e-13


def _trace_of_root(first: np.ndarray, second: np.ndarray) -> float:
    """Return tr (S1 S2)^(1/2) of covariances [D, D].

    With U^T U = S1, S1 S2 has the eigenvalues of the symmetric U S2 U^T, all real and none
    negative. The Cholesky factor U [rank, D] is pivoted, so that S1 may be singular.
    """
    factor, order, rank, _ = linalg.lapack.dpstrf(first)  # pyright: ignore[reportAttributeAccessIssue]
    if rank == 0:
        return 0.0
    upper = np.triu(factor[:rank])
    reordered = second[np.ix_(order - 1, order - 1)]
    if rank == len(first):
        product, _ = linalg.lapack.dsygst(  # pyright: ignore[reportAttributeAccessIssue]
            reordered, upper, itype=2
        )  # half the work of two products
    else:
        product = upper @ reordered @ upper.T
    values = linalg.eigvalsh(product, lower=False, driver="evd")
    return float(np.sqrt(values.clip(min=0)).sum())


def _compute(
    generated: Generated, real: Real | None, config: Config, device: torch.device
) -> dict[str, float]:
    assert real is not None
    return {FID.name: frechet_distance(generated, real)}


FID = Metric(
    name="fid",
    label="FID",
    title="Fréchet Inception Distance",
    better="lower",
    needs="moments",
    published_features="inception",
    compute=_compute,
    least_images=lambda config: 2,
    position=0,
    grows_with_few_images=True,
)
METRICS = (FID,)
