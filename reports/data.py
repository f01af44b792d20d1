"""Data of a run's report: metrics before and after, with their provenance.

Plain data, and its JSON, for programs: `to_json`, and `read`, which gives it back. Words are in
wording.py, pages in pages.py. A report measures nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from core.disk import parsed_json
from core.errors import UserError
from eval.metrics.registry import MetricResult, metrics
from eval.nearest import Drift, Nearness
from eval.provenance import Environment, ExtractorName, ReferenceName

SCHEMA_VERSION = 3
_RESULTS = ("before", "after", "last")
"""Fields of metrics."""


@dataclass(frozen=True)
class File:
    """A file that went into a run."""

    path: str
    sha256: str | None


@dataclass(frozen=True)
class SampleScore:
    """How far images that no student made are from the reference."""

    metrics: Mapping[str, float]
    """Metric -> value, such as fid."""
    images: int | None
    """Of how many; None if their file does not say."""


class CurvePoint(NamedTuple):
    """One measurement while training."""

    images_seen: int
    value: float


@dataclass(frozen=True)
class Curve:
    """A metric over images seen."""

    metric: str = ""
    points: tuple[CurvePoint, ...] = ()
    images: int | None = None
    """Generated images of each point."""


@dataclass(frozen=True)
class Report:
    """All that a run's report says, apart from the pictures of pairs."""

    name: str
    before: Mapping[str, MetricResult]
    """Metric -> result, such as fid; the names are those of eval.metrics."""
    after: Mapping[str, MetricResult]
    """The same metrics on the same seeds."""
    images: int
    """Generated images for each value of a metric."""
    first_seed: int
    """Value k is of the images first_seed + k * images and following."""
    reference: ReferenceName | None
    extractor: ExtractorName | None
    """None if nothing was measured."""
    environment: Environment
    kernel_backend: str
    """native or reference: which custom operations ran."""
    student: File
    teacher: File
    images_seen: int
    """Student images made in training."""
    started_at: str
    """ISO 8601, with the offset from UTC."""
    finished_at: str
    durations_seconds: Mapping[str, float]
    """Part of the run -> seconds, without those of processes that were killed."""
    exported_images_seen: int | None = None
    """Images seen of the refined weights: fewer than `images_seen` if earlier ones were better."""
    last: Mapping[str, MetricResult] = field(default_factory=dict)
    """Metrics of the last weights, if the refined ones are earlier."""
    timed_images: int | None = None
    """Images trained in these seconds; None if that is not known."""
    curve: Curve = field(default_factory=Curve)
    teacher_samples: SampleScore | None = None
    """Of the teacher's own samples, if they were evaluated."""
    real_halves: SampleScore | None = None
    """Of one half of the real images against the other, if known."""
    drift: Drift | None = None
    """How far images moved from before to after."""
    nearness: Nearness | None = None
    """How near images after come to real ones."""
    sampler: str | None = None
    """How the teacher's own samples are made, in words."""
    notes: tuple[str, ...] = ()
    """Remarks on the training, a sentence each."""
    teacher_sees: str | None = None
    """Size of the images that the teacher saw, if it differs from the student's."""
    pair_seeds: tuple[int, ...] = ()
    """Seeds of the picture's pairs."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """The resolved recipe."""
    truncation: float = 1.0
    noise_mode: str = "const"

    @property
    def metrics(self) -> list[str]:
        """Return the metrics that were measured both before and after, the headline first."""
        return [metric for metric in self.after if metric in self.before]

    @property
    def seeds(self) -> list[tuple[int, int]]:
        """Return for each value its first seed and the one after its last."""
        count = max((len(result.values) for result in self.after.values()), default=0)
        starts = [self.first_seed + index * self.images for index in range(count)]
        return [(start, start + self.images) for start in starts]


def to_json(report: Report) -> dict[str, object]:
    """Return the report as plain JSON data."""
    document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(report)}
    document["seeds"] = [list(seeds) for seeds in report.seeds]
    document["metrics"] = {name: _about(name) for name in {**report.before, **report.after}}
    document["curve"]["points"] = [list(point) for point in report.curve.points]
    for when in _RESULTS:
        document[when] = {
            name: {"mean": result.mean, "std": result.std, "values": list(result.values)}
            for name, result in getattr(report, when).items()
        }
    return document


def _about(metric: str) -> dict[str, str]:
    """Return title and direction of a metric."""
    about = metrics()[metric]
    return {"title": about.title, "better": about.better}


def read(path: str | Path) -> Report:
    """Return the report of a report.json."""
    try:
        document = parsed_json(Path(path).read_text())
        version = document.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: make "
                "it again with python refine.py --report RUN"
            )
        del document["seeds"], document["metrics"]
        for when in _RESULTS:
            for result in document[when].values():
                del result["mean"], result["std"]
        return TypeAdapter(Report).validate_python(document)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: the run has no report yet") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{path} is not a report of this program: {error}") from error
