"""Result of an evaluation with its provenance, for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from core.downloads import short_sha256
from eval.metrics.display import arrow, image_count, metric_title, shown, unit
from eval.metrics.registry import MetricResult, metrics
from eval.provenance import Environment, ExtractorName, ReferenceName

SCHEMA_VERSION = 1
_FEW_IMAGES = 10_000


@dataclass(frozen=True)
class SubjectName:
    """Evaluated network or images."""

    source: str
    sha256: str
    kind: str
    """student, teacher or images."""


@dataclass(frozen=True)
class Scorecard:
    """Values of an evaluation, and everything needed to reproduce them."""

    subject: SubjectName
    metrics: Mapping[str, MetricResult]
    """Metric -> result; the names are those of eval.metrics."""
    asked: tuple[str, ...]
    """The names that were asked for, such as fid50k_full."""
    images: int
    """Images of each value."""
    seeds: tuple[tuple[int, int], ...]
    """For each value its first seed and the one after its last; for files, of indices."""
    reference: ReferenceName | None
    extractor: ExtractorName | None
    """None if no metric looks at features."""
    distance: ExtractorName | None
    """Between images, of path lengths; None if none was measured."""
    definitions: Mapping[str, object]
    """Subsets, splits and neighbors of the metrics: eval.metrics.registry.Config."""
    sampler: str | None
    left_out: Mapping[str, str]
    """Name of a metric -> why it was not measured."""
    environment: Environment
    seconds: float


def to_json(card: Scorecard) -> str:
    """Return the card as a JSON document."""
    document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(card)}
    document["metrics"] = {
        name: {
            "title": metrics()[name].title,
            "better": metrics()[name].better,
            "mean": result.mean,
            "std": result.std,
            "values": list(result.values),
        }
        for name, result in card.metrics.items()
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def table(card: Scorecard) -> str:
    """Return the values, their provenance and warnings, as lines."""
    values = {
        metric_title(name, card.extractor) + unit(name) + f" {arrow(name)}": shown(name, result)
        for name, result in card.metrics.items()
    }
    notes = [f"! {note}" for note in _notes(card)]
    return "\n".join([*_aligned(values), "", *_aligned(_facts(card)), *notes])


def _facts(card: Scorecard) -> dict[str, str]:
    subject, reference = card.subject, card.reference
    rows = {"of": f"{subject.kind} {subject.source} (sha256 {short_sha256(subject.sha256)})"}
    ranges = ", ".join(f"{start} to {stop - 1}" for start, stop in card.seeds)
    numbers = "images" if subject.kind == "images" else "seeds"
    rows["images"] = f"{len(card.seeds)} x {card.images:,}, {numbers} {ranges}"
    if reference is not None:
        count = image_count(reference.images)
        rows["against"] = f"{count} of {reference.name} (sha256 {short_sha256(reference.sha256)})"
    if card.extractor is not None:
        rows["features"] = f"{card.extractor.name} (sha256 {short_sha256(card.extractor.sha256)})"
    if card.distance is not None:
        rows["distance"] = f"{card.distance.name} (sha256 {short_sha256(card.distance.sha256)})"
    if card.sampler is not None:
        rows["sampler"] = card.sampler
    rows["took"] = f"{card.seconds:.1f} s on {card.environment.hardware}"
    return rows


def _notes(card: Scorecard) -> list[str]:
    lines = [f"{name} was left out: {why}" for name, why in card.left_out.items()]
    if any(metrics()[m].grows_with_few_images for m in card.metrics) and (
        card.images < _FEW_IMAGES
    ):
        lines.append(
            f"a Fréchet distance of {card.images:,} images is too high: compare it only with "
            "values of as many"
        )
    return lines


def _aligned(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in lines.items()]
