"""Metrics from features, beside torch-fidelity's own functions: time, and by how much they differ.

    OMP_NUM_THREADS=1 python -m benchmarks.metrics                       on one core
    OMP_NUM_THREADS=1 python -m benchmarks.metrics --case "FID 2048"     one row

Both get the same features of drawn images, 10,000 generated and 8,000 real, and the same subsets.
Their directions vary as much as those of a trained network do: the k-th by 1 / k. Each time is the
median of alternating runs in this process, so that a busy machine slows both alike. The
environment variable also sets the threads of NumPy, in which half of torch-fidelity computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import click
import torch
from torch import Tensor
from torch_fidelity import metric_fid, metric_kid, metric_prc

from eval.feature_stats import FeatureStatistics
from eval.metrics.frechet import frechet_distance
from eval.metrics.kernel import kernel_distance
from eval.metrics.precision_recall import precision_and_recall

GENERATED, REAL = 10_000, 8_000
_NEIGHBORS = 3
_SUBSET_SIZE = 1000
_SEED = 2020


class Pair(NamedTuple):
    """A metric twice: our computation and torch-fidelity's."""

    ours: Callable[[], float]
    theirs: Callable[[], float]


class Row(NamedTuple):
    """Results of one case."""

    name: str
    ours_seconds: float
    theirs_seconds: float
    ratio: float
    """How many times longer torch-fidelity takes: the median over pairs of runs."""
    difference: float
    """Of the two values, relative to torch-fidelity's."""


def features(images: int, dimensions: int, *, seed: int) -> Tensor:
    """Return drawn features [images, dimensions] float32, correlated, none below 0."""
    random = torch.Generator().manual_seed(seed)
    turn = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(0))
    scale = 1 / torch.arange(1, dimensions + 1)
    drawn = torch.randn(images, dimensions, generator=random) * (1 + 0.1 * seed) + 0.02 * seed
    return ((drawn * scale) @ turn).relu()


def trace(dimensions: int) -> Pair:
    """Return the trace of the Fréchet distance: of the root of a product of covariances.

    Both are timed on the whole distance, of which the trace takes nearly all; traces are compared.
    """
    made = FeatureStatistics.of(features(GENERATED, dimensions, seed=1))
    real = FeatureStatistics.of(features(REAL, dimensions, seed=2))
    rest = float((made.mean - real.mean).square().sum())
    rest += float(made.covariance.trace() + real.covariance.trace())
    published = [
        {"mu": part.mean.numpy(), "sigma": part.covariance.numpy()} for part in (made, real)
    ]

    def theirs() -> float:
        found = metric_fid.fid_statistics_to_metric(*published, verbose=False)
        return (rest - found[metric_fid.KEY_METRIC_FID]) / 2

    return Pair(lambda: (rest - frechet_distance(made, real)) / 2, theirs)


def kernel(dimensions: int, subsets: int) -> Pair:
    """Return the kernel distance over so many subsets of 1,000 images."""
    made, real = (features(n, dimensions, seed=k) for n, k in ((GENERATED, 1), (REAL, 2)))
    options = {
        "kid_subsets": subsets,
        "kid_subset_size": _SUBSET_SIZE,
        "rng_seed": _SEED,
        "verbose": False,
    }

    def theirs() -> float:
        found = metric_kid.kid_features_to_metric(made, real, **options)
        return found[metric_kid.KEY_METRIC_KID_MEAN]

    def ours() -> float:
        found = kernel_distance(made, real, subsets=subsets, subset_size=_SUBSET_SIZE, seed=_SEED)
        return found.mean

    return Pair(ours, theirs)


def precision(dimensions: int) -> Pair:
    """Return the sum of precision and recall, in which a difference of either would show."""
    made, real = (features(n, dimensions, seed=k) for n, k in ((GENERATED, 1), (REAL, 2)))
    options = {"prc_neighborhood": _NEIGHBORS, "prc_batch_size": 10_000, "verbose": False}

    def theirs() -> float:
        found = metric_prc.prc_features_to_metric(made, real, **options)
        return found[metric_prc.KEY_METRIC_PRECISION] + found[metric_prc.KEY_METRIC_RECALL]

    return Pair(lambda: sum(precision_and_recall(made, real, neighbors=_NEIGHBORS)), theirs)


CASES: dict[str, Callable[[], Pair]] = {
    "FID 64, trace": lambda: trace(64),
    "FID 2048, trace": lambda: trace(2048),
    "KID 64, 100 subsets": lambda: kernel(64, 100),
    "KID 2048, 20 subsets": lambda: kernel(2048, 20),
    "precision + recall 64": lambda: precision(64),
    "precision + recall 2048": lambda: precision(2048),
}
"""Metric and number of features -> the two computations."""


@click.command()
@click.option("--case", "names", multiple=True, help="Rows that begin so.  [default: all]")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(names: tuple[str, ...], runs: int, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    click.echo("| features of | ours, s | torch-fidelity, s | times sooner | difference |")
    click.echo("|---|---:|---:|---:|---:|")
    for name, case in CASES.items():
        if not names or any(name.startswith(wanted) for wanted in names):
            row = measured(name, case(), runs=runs)
            click.echo(
                f"| {row.name} | {row.ours_seconds:.3g} | {row.theirs_seconds:.3g} "
                f"| {row.ratio:.1f} | {row.difference:.1e} |"
            )


def measured(name: str, pair: Pair, *, runs: int) -> Row:
    """Return how long both take, in turns, and how far their values are apart."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    values = {}
    for _ in range(runs):
        for which, function in pair._asdict().items():
            started_at = time.perf_counter()
            values[which] = function()
            seconds[which].append(time.perf_counter() - started_at)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    difference = abs(values["ours"] - values["theirs"]) / abs(values["theirs"])
    ours, theirs = (statistics.median(seconds[which]) for which in ("ours", "theirs"))
    return Row(name, ours, theirs, statistics.median(ratios), difference)


if __name__ == "__main__":
    main()
