"""Which metrics there are, what each needs of images' features, and all of them measured at once.

    requests = parse(["fid", "kid50k_full"])       the names that a recipe or the command line gives
    taken = collector(requests, config, ...)       takes features in batches, see collecting.py
    measure(requests, taken.collected, real, ...)  {"fid": 3.1, "kid": 0.0004}

Path lengths need the student, not features: see path_length.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from core.config import Section
from core.errors import UserError
from eval.collecting import Collected, Collector, Head, Need
from eval.metrics import Moments, frechet_distance, kernel_distance, precision_and_recall
from eval.path_length import WALKS


@dataclass(frozen=True)
class Metric:
    """What a number is, for whoever shows or compares it."""

    label: str
    title: str
    better: Literal["lower", "higher"]
    needs: Need
    """What of the generated images it is made of."""
    published_features: str
    """The extractor of published values."""
    compares: bool = True
    """Whether it compares with real images."""
    times: float = 1.0
    """What a value is multiplied by where it is shown."""
    unit: str = ""
    """What stands after a shown value or in its column's title."""


METRICS = {
    "fid": Metric("FID", "Fréchet Inception Distance", "lower", "moments", "inception"),
    "kid": Metric(
        *("KID", "Kernel Inception Distance", "lower", "features", "inception"),
        times=1e3,
        unit="10⁻³",
    ),
    "inception_score": Metric(
        *("IS", "Inception Score", "higher", "classes", "inception"), compares=False
    ),
    "precision": Metric(
        *("Precision", "improved precision", "higher", "features", "vgg16"), times=100, unit="%"
    ),
    "recall": Metric(
        *("Recall", "improved recall", "higher", "features", "vgg16"), times=100, unit="%"
    ),
    "ppl": Metric(*("PPL", "Perceptual Path Length", "lower", "student", "lpips"), compares=False),
}
"""Name of a value -> what it is, in the order of a report."""

_SHORT = {"is": ("inception_score",), "pr": ("precision", "recall")}
_PUBLISHED_NAMES = re.compile(
    r"(?P<short>fid|kid|is|pr)(?P<thousands>[1-9]\d*)k(?P<k>3)?(?P<full>_full)?"
)
_PATH_NAMES = tuple(name for name in WALKS if name not in METRICS)
_PATH_IMAGES = 50_000
_FEW_REAL = 50_000
"""Real images at most behind a published name without _full."""


class Config(Section):
    """What the metrics' names mean; the defaults are published."""

    kid_subsets: int = Field(default=100, ge=1)
    """Random subsets over which a KID is averaged."""
    kid_subset_size: int = Field(default=1000, ge=2)
    """Images of each kind in a subset."""
    score_splits: int = Field(default=10, ge=1)
    """Parts of the images over which an Inception Score is averaged."""
    neighbours: int = Field(default=3, ge=1)
    """The nearest neighbour that gives an image its radius in precision and recall."""
    kept_images: int = Field(default=50_000, ge=2)
    """Images of each kind whose features are kept, at most, for KID, precision and recall."""
    random_seed: int = Field(default=2020, ge=0)
    """Seed of subsets and splits."""
    path_distance: str | None = None
    """What ppl measures images' distance by: lpips, mnist32 or a classifier's weights file; null:
    the extractor, where it is such a classifier, else lpips.
    """


class Request(NamedTuple):
    """A name that asks for metrics, understood."""

    name: str
    metrics: tuple[str, ...]
    """Keys of METRICS."""
    images: int | None = None
    """Generated images; None: as many as the recipe says."""
    real_images: int | None = None
    """Real images at most; None: all."""


def parse(names: Iterable[str]) -> tuple[Request, ...]:
    """Return what each name asks for: a key of METRICS, is, pr, or one of StyleGAN's names.

    fid50k_full is the FID of 50,000 generated against all real images, fid50k against 50,000 at
    most; so are kid50k_full, is50k, pr50k3_full, with any number of thousands. ppl2_wend and its
    kin are told apart in path_length.py. Raises UserError for a name that is none of these, or
    where two ask for the same value.
    """
    requests = tuple(map(_request, names))
    counts = Counter(metric for request in requests for metric in request.metrics)
    twice = [metric for metric, count in counts.items() if count > 1]
    if twice:
        asking = ", ".join(r.name for r in requests if set(r.metrics) & set(twice))
        raise UserError(f"{asking} ask for {' and '.join(twice)} more than once: keep one of them")
    return requests


def _request(name: str) -> Request:
    if name in METRICS or name in _SHORT:
        return Request(name, _SHORT.get(name, (name,)))
    if name in _PATH_NAMES:
        return Request(name, ("ppl",), _PATH_IMAGES)
    found = _PUBLISHED_NAMES.fullmatch(name)
    if found and (found["short"] == "pr") == bool(found["k"]):
        metrics = _SHORT.get(found["short"], (found["short"],))
        compares = METRICS[metrics[0]].compares
        if compares or not found["full"]:
            few = _FEW_REAL if compares and not found["full"] else None
            return Request(name, metrics, 1000 * int(found["thousands"]), few)
    raise UserError(
        f"no metric {name!r}: expected {', '.join([*METRICS, *_SHORT])}, or a published name such "
        f"as fid50k_full, kid50k_full, is50k, pr50k3_full, {', '.join(_PATH_NAMES)}"
    )


def needs(requests: Sequence[Request]) -> frozenset[Need]:
    """Return what the requests need of the images."""
    return frozenset(METRICS[metric].needs for request in requests for metric in request.metrics)


def least_images(metric: str, config: Config) -> int:
    """Return how many images a metric needs, of each kind that it looks at."""
    return {
        "fid": 2,
        "kid": config.kid_subset_size,
        "inception_score": config.score_splits,
        "precision": config.neighbours + 1,
        "recall": config.neighbours + 1,
        "ppl": 1,
    }[metric]


class Real(Moments, Protocol):
    """Real images as metrics see them: a reference, or what was collected of an image set."""

    @property
    def images(self) -> int | None:
        """How many images; None where that is not known."""
        ...

    @property
    def features(self) -> Tensor | None:
        """[M, D] features of up to `kept_images` of them; None where they were not kept."""
        ...


class Planned(NamedTuple):
    """Images that are still to be made."""

    images: int
    kept: int
    """So many of their features will be kept."""
    mean: Tensor = torch.empty(0)
    covariance: Tensor = torch.empty(0, 0)

    @property
    def features(self) -> Tensor:
        """Return as many rows as there will be."""
        return torch.empty(self.kept, 0)


def check(
    requests: Sequence[Request],
    *,
    images: int,
    real: Real | None,
    can_classify: bool,
    config: Config,
) -> None:
    """Raise a UserError that says all that stands in the way of these metrics, before any work.

    images: those to be generated for each. can_classify: whether the extractor has classes.
    """
    found = []
    for name, metrics, wanted, real_most in requests:
        if wanted not in (None, images):
            found.append(f"{name} is of {wanted:,} generated images, these are {images:,}")
        for metric in metrics:
            found += _missing(metric, images, real, config)
        if "inception_score" in metrics and not can_classify:
            found.append("inception_score needs an extractor with classes: inception, mnist32")
        if real_most is not None and real is not None and (real.images or 0) > real_most:
            found.append(
                f"{name} is against {real_most:,} real images at most, the reference has "
                f"{real.images:,}: ask for {name}_full"
            )
    if found:
        raise UserError("; ".join(dict.fromkeys(found)))


def _missing(metric: str, images: int, real: Real | None, config: Config) -> list[str]:
    """Return which images a metric lacks."""
    least, about = least_images(metric, config), METRICS[metric]
    found = []
    if images < least:
        found.append(f"{metric} needs at least {least:,} generated images, got {images:,}")
    if not about.compares:
        return found
    if real is None:
        return [*found, f"{metric} needs a reference"]
    if about.needs == "features" and real.features is None:
        return [
            *found,
            f"{metric} needs the features of real images, and the reference holds only their mean "
            "and covariance: give the images, as a zip or folder",
        ]
    count = real.images if real.features is None else len(real.features)
    if count is not None and count < least:
        found.append(f"{metric} needs at least {least:,} real images, got {count:,}")
    return found


def collector(
    requests: Sequence[Request],
    config: Config,
    *,
    images: int,
    head: Head | None = None,
    first: int = 0,
    also: Collection[Need] = (),
) -> Collector:
    """Return the collector of a set of images, or of a rank's part of it that begins at `first`.

    images: of the whole set. head: the extractor's, where it has classes. also: what is needed
    besides what the metrics need.
    """
    return Collector(
        needs(requests) | frozenset(also),
        images=images,
        kept_images=config.kept_images,
        splits=config.score_splits,
        random_seed=config.random_seed,
        head=head,
        first=first,
    )


def measure(
    requests: Sequence[Request],
    made: Collected,
    real: Real | None,
    *,
    config: Config,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return the value of each metric asked for, by its name in METRICS.

    made: of the generated images, all ranks together. real: may be None where nothing compares.
    device: where the distances of precision and recall are computed.
    Path lengths are left out: no features tell them. Raises UserError as `check` does.
    """
    can_classify = made.classes is not None
    check(requests, images=made.images, real=real, can_classify=can_classify, config=config)
    wanted = {metric for request in requests for metric in request.metrics}
    found: dict[str, float] = {}
    if "fid" in wanted and real is not None:
        found["fid"] = frechet_distance(made, real)
    if "inception_score" in wanted and made.classes is not None:
        found["inception_score"] = made.classes.score.mean
    if made.features is not None and real is not None and real.features is not None:
        found |= of_features(wanted, made.features, real.features, config=config, device=device)
    return {metric: found[metric] for metric in METRICS if metric in wanted & found.keys()}


def of_features(
    wanted: Collection[str],
    made: Tensor,
    real: Tensor,
    *,
    config: Config,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return those of the metrics that features [N, D] and [M, D] tell."""
    found: dict[str, float] = {}
    if "kid" in wanted:
        found["kid"] = kernel_distance(
            made.to(device),
            real.to(device),
            subsets=config.kid_subsets,
            subset_size=config.kid_subset_size,
            seed=config.random_seed,
        ).mean
    if "precision" in wanted or "recall" in wanted:
        shares = precision_and_recall(
            made.to(device), real.to(device), neighbours=config.neighbours
        )
        found |= {name: share for name, share in shares._asdict().items() if name in wanted}
    return found
