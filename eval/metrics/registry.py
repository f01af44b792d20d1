"""Metrics by name: the object behind each, the names that ask for them, and their preconditions.

    requests = parse(["fid", "kid50k_full"])     names of a recipe or the command line
    check(requests, images=..., real=..., ...)   everything that stands in the way, at once
    compute(requests, generated, real, ...)      {"fid": 3.1, "kid": 0.0004}

A metric is a module of this folder with METRICS, a tuple of Metric; nothing registers it. Metrics
of the student itself (needs "student": path lengths) are computed by the evaluator.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from core import plugins
from core.config import Section
from core.errors import UserError
from eval.feature_stats import ClassStatistics, Collected, Moments, Need

_PUBLISHED_PATH_IMAGES = 50_000
_FEW_REAL = 50_000
"""Most real images behind a published name without _full."""


class Config(Section):
    """Definitions of the metrics; the defaults are those of published values."""

    renamed: ClassVar[Mapping[str, str]] = {"neighbours": "neighbors"}

    kid_subsets: int = Field(default=100, ge=1)
    """Random subsets over which a KID is averaged."""
    kid_subset_size: int = Field(default=1000, ge=2)
    """Images of each kind in a subset."""
    score_splits: int = Field(default=10, ge=1)
    """Parts of the images over which an Inception Score is averaged."""
    neighbors: int = Field(default=3, ge=1)
    """The nearest neighbor that gives an image its radius in precision and recall."""
    kept_images: int = Field(default=50_000, ge=2)
    """Images of each kind whose features are kept, at most, for KID, precision and recall."""
    random_seed: int = Field(default=2020, ge=0)
    """Seed of subsets and splits."""
    path_distance: str | None = None
    """Distance between images in path lengths: lpips, mnist32 or a classifier's weights file; null:
    the extractor if it is such a classifier, else lpips.
    """


class Real(Moments, Protocol):
    """Statistics of real images: a reference, or those collected of an image set."""

    @property
    def images(self) -> int | None:
        """How many images; None if that is not known."""
        ...

    @property
    def features(self) -> Tensor | None:
        """[M, D] features of up to `kept_images` of them; None if they were not kept."""
        ...


class Planned(NamedTuple):
    """Statistics of images that are still to be made."""

    images: int
    kept: int
    """Number of images whose features will be kept."""
    mean: Tensor = torch.empty(0)
    covariance: Tensor = torch.empty(0, 0)

    @property
    def features(self) -> Tensor:
        """Return as many rows as there will be."""
        return torch.empty(self.kept, 0)


class Generated(Moments, Protocol):
    """Statistics of generated images, of all ranks together."""

    @property
    def features(self) -> Tensor | None:
        """[N, D] features of up to `kept_images` of them; None if they were not kept."""
        ...

    @property
    def classes(self) -> ClassStatistics | None:
        """Sums of class probabilities; None if they were not collected."""
        ...


Compute = Callable[[Generated, Real | None, Config, torch.device], Mapping[str, float]]
"""Values by metric name; the real images are None if the metric does not compare."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: its presentation, its preconditions, and its computation."""

    name: str
    """In recipes, logs and reports."""
    label: str
    """In tables."""
    title: str
    better: Literal["lower", "higher"]
    needs: Need
    """Statistics of the generated images (and of the real ones) that it is computed from."""
    published_features: str
    """The extractor of published values."""
    compute: Compute | None
    """One computation may give several metrics; None if it needs the student itself."""
    least_images: Callable[[Config], int]
    """Fewest images, of each kind that it looks at."""
    position: int
    """Place in tables, from 0 up."""
    compares: bool = True
    """Whether it compares with real images."""
    scale: float = 1.0
    """Factor on displayed values."""
    unit: str = ""
    """Unit of displayed values."""
    group: str = ""
    """A short name that asks for it, and for the others of its group."""
    published_suffix: str = ""
    """Part of the group's published names behind the k of thousands: pr50k3."""
    published_names: tuple[str, ...] = ()
    """Further names that ask for it, on 50,000 images."""
    grows_with_few_images: bool = False
    """Whether few images bias it upwards."""
    shows_mode_loss: bool = False
    """Whether a fall means that the student no longer produces some modes."""

    def is_better(self, value: float, than: float) -> bool:
        """Return whether a value is strictly better than another."""
        return value < than if self.better == "lower" else value > than


@cache
def metrics() -> Mapping[str, Metric]:
    """Return all metrics by name, in the order of tables."""
    folder = "eval.metrics"
    modules = (plugins.load(folder, name, defines=_DEFINES) for name in known_modules())
    every = [metric for module in modules for metric in module.METRICS]
    return {metric.name: metric for metric in sorted(every, key=lambda m: m.position)}


_DEFINES = ("METRICS",)


def known_modules() -> list[str]:
    """Return the names of the modules that define metrics."""
    return plugins.names("eval.metrics", defines=_DEFINES)


def groups() -> Mapping[str, tuple[str, ...]]:
    """Return short name -> the metrics that it asks for; a metric without a group is its own."""
    result: dict[str, tuple[str, ...]] = {}
    for metric in metrics().values():
        group = metric.group or metric.name
        result[group] = (*result.get(group, ()), metric.name)
    return result


class Request(NamedTuple):
    """A parsed name that asks for one metric or several."""

    name: str
    metrics: tuple[str, ...]
    """Names of metrics."""
    images: int | None = None
    """Generated images; None: as many as the recipe says."""
    real_images: int | None = None
    """Real images at most; None: all."""


def parse(names: Iterable[str]) -> tuple[Request, ...]:
    """Return the request of each name: a metric, a group such as is or pr, or a published name.

    fid50k_full is the FID of 50,000 generated against all real images, fid50k against 50,000 at
    most; so are kid50k_full, is50k, pr50k3_full, with any number of thousands; ppl2_wend and its
    kin are explained in path_length.py. Raises UserError for any other name, or if two ask for
    the same metric.
    """
    requests = tuple(map(_request, names))
    counts = Counter(metric for request in requests for metric in request.metrics)
    twice = [metric for metric, count in counts.items() if count > 1]
    if twice:
        asking = ", ".join(r.name for r in requests if set(r.metrics) & set(twice))
        raise UserError(f"{asking} ask for {' and '.join(twice)} more than once: keep one of them")
    return requests


def _request(name: str) -> Request:
    if name in metrics():
        return Request(name, (name,))
    if name in groups():
        return Request(name, groups()[name])
    for metric in metrics().values():
        if name in metric.published_names:
            return Request(name, (metric.name,), _PUBLISHED_PATH_IMAGES)
    if request := _published_request(name):
        return request
    short = [group for group in groups() if group not in metrics()]
    others = [name for metric in metrics().values() for name in metric.published_names]
    raise UserError(
        f"no metric {name!r}: expected {', '.join([*metrics(), *short])}, or a published name such "
        f"as fid50k_full, kid50k_full, is50k, pr50k3_full, {', '.join(others)}"
    )


def _published_request(name: str) -> Request | None:
    """Return the request of a name such as fid50k_full, or None."""
    for group, members in groups().items():
        metric = metrics()[members[0]]
        pattern = rf"{group}(?P<thousands>[1-9]\d*)k{metric.published_suffix}(?P<full>_full)?"
        match = re.fullmatch(pattern, name)
        if not match or metric.compute is None or (match["full"] and not metric.compares):
            continue
        few = _FEW_REAL if metric.compares and not match["full"] else None
        return Request(name, members, 1000 * int(match["thousands"]), few)
    return None


def needs(requests: Sequence[Request]) -> frozenset[Need]:
    """Return the statistics that the requests need of the images."""
    return frozenset(metrics()[m].needs for request in requests for m in request.metrics)


def least_images(metric: str, config: Config) -> int:
    """Return the fewest images that a metric needs, of each kind that it looks at."""
    return metrics()[metric].least_images(config)


def check(
    requests: Sequence[Request],
    *,
    images: int,
    real: Real | None,
    can_classify: bool,
    config: Config,
) -> None:
    """Raise a UserError that names everything in the way of these metrics, before any work.

    images: generated for each. can_classify: whether the extractor has classes.
    """
    lines = []
    for name, members, wanted, real_most in requests:
        if wanted not in (None, images):
            lines.append(f"{name} is of {wanted:,} generated images, these are {images:,}")
        for metric in members:
            lines += _missing(metrics()[metric], images, real, config)
            if metrics()[metric].needs == "classes" and not can_classify:
                lines.append(f"{metric} needs an extractor with classes: inception, mnist32")
        if real_most is not None and real is not None and (real.images or 0) > real_most:
            lines.append(
                f"{name} is against {real_most:,} real images at most, the reference has "
                f"{real.images:,}: ask for {name}_full"
            )
    if lines:
        raise UserError("; ".join(dict.fromkeys(lines)))


def _missing(metric: Metric, images: int, real: Real | None, config: Config) -> list[str]:
    """Return a line for each kind of image that a metric lacks."""
    least = metric.least_images(config)
    lines = []
    if images < least:
        lines.append(f"{metric.name} needs at least {least:,} generated images, got {images:,}")
    if not metric.compares:
        return lines
    if real is None:
        return [*lines, f"{metric.name} needs a reference"]
    if metric.needs == "features" and real.features is None:
        return [
            *lines,
            f"{metric.name} needs the features of real images, and the reference holds only their "
            "mean and covariance: give the images, as a zip or folder",
        ]
    count = real.images if real.features is None else len(real.features)
    if count is not None and count < least:
        lines.append(f"{metric.name} needs at least {least:,} real images, got {count:,}")
    return lines


def evaluate(
    requests: Sequence[Request],
    generated: Collected,
    real: Real | None,
    *,
    config: Config,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return the value of each requested metric but those of the student itself, in table order.

    device: where distances between features are computed. Raises UserError as `check` does.
    """
    can_classify = generated.classes is not None
    check(requests, images=generated.images, real=real, can_classify=can_classify, config=config)
    names = {name for request in requests for name in request.metrics}
    return compute(names, generated, real, config=config, device=device)


def compute(
    names: Collection[str],
    generated: Generated,
    real: Real | None,
    *,
    config: Config,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return the value of each named metric, as `evaluate` does, of images already checked."""
    computations = dict.fromkeys(m.compute for m in metrics().values() if m.name in names)
    values: dict[str, float] = {}
    for computation in computations:
        if computation is not None:
            values |= computation(generated, real, config, torch.device(device))
    return {name: values[name] for name in metrics() if name in names and name in values}


class Spread(NamedTuple):
    """A mean over subsets of the images, and the standard deviation (n in the denominator)."""

    mean: float
    std: float


def check_pair(generated: Tensor, real: Tensor, *, least: int) -> None:
    """Raise ValueError unless both [N, D] and [M, D] have `least` rows and the same D."""
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"cannot compare {generated.shape[1]} with {real.shape[1]} feature dimensions"
        )
    if min(len(generated), len(real)) < least:
        raise ValueError(
            f"at least {least} images of each kind are needed, got {len(generated)} generated and "
            f"{len(real)} real"
        )


@dataclass(frozen=True)
class MetricResult:
    """One metric over several seeds, displayed as mean ± std."""

    values: tuple[float, ...]
    """One value a seed range, in order."""

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Return the sample standard deviation over seeds (n - 1); 0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> MetricResult:
        """Return the result for one value a seed range."""
        return cls(tuple(float(value) for value in values))
