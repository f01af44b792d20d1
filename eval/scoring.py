"""Metrics by name, measured on a network or on files: what `python -m eval fid …` does.

    measurement = prepare(subject, ["fid", "kid"], settings, world=world)
    card = measure(measurement)

Everything that can be refused is refused by `prepare`, before an image is made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from core import distributed
from core.distributed import World
from core.downloads import local_file
from core.errors import UserError
from eval import path_length, suite
from eval.measuring import METRICS, Request, parse
from eval.path_length import WALKS
from eval.provenance import Environment, ExtractorName, ReferenceName
from eval.scorecard import Scorecard, SubjectName
from eval.subjects import Subject
from eval.suite import Suite

ALL = ("fid", "kid", "is", "pr", "ppl")
"""What `all` asks for."""
_USUAL_IMAGES = 50_000
_SEEDS = 2**32
"""Of NumPy's RandomState."""


@dataclass(frozen=True)
class Measurement:
    """All of a measurement but its values."""

    subject: Subject
    suite: Suite
    asked: tuple[str, ...]
    settings: suite.Config
    first_seed: int
    left_out: Mapping[str, str]
    """Name of a metric -> why it cannot be measured."""


def usual_images(names: Sequence[str]) -> int:
    """Return how many images the names promise, or the field's usual count."""
    return max((r.images for r in parse(names) if r.images is not None), default=_USUAL_IMAGES)


def usual_extractor(names: Sequence[str]) -> str:
    """Return the extractor of published values, where it is one for all names; else inception.

    Path lengths have a distance of their own: for them alone it is pixels, which loads nothing.
    """
    found = {METRICS[m].published_features for request in parse(names) for m in request.metrics}
    found.discard("lpips")
    if not found:
        return "pixels"
    return found.pop() if len(found) == 1 else "inception"


def prepare(
    subject: Subject,
    settings: suite.Config,
    *,
    world: World,
    first_seed: int = 0,
    leaving_out: bool = False,
) -> Measurement:
    """Return the measurement of `settings.metrics`, its reference and extractor loaded.

    leaving_out: what cannot be measured is left out with its reason, if anything is left; otherwise
    it is refused. Raises UserError in either case where the subject, the reference and the
    extractor do not fit each other.
    """
    settings = _of_files(settings, subject)
    if first_seed + settings.seeds * settings.images > _SEEDS:
        raise UserError(f"the seeds go on from {first_seed:,}, but there are {_SEEDS:,} at most")
    left_out = _reasons(parse(settings.metrics), subject, settings)
    names = _left(settings.metrics, left_out, leaving_out=leaving_out)
    settings = settings.model_copy(update={"metrics": names})
    with distributed.main_first(world):
        if settings.reference is not None:
            local_file(settings.reference)  # a wrong path is said before an extractor is fetched
        try:
            loaded = suite.load(settings, image_shape=subject.image_shape, world=world)
        except UserError as error:
            walks = {name: str(error) for name in names if name in WALKS}
            if not walks or not leaving_out:
                raise
            left_out |= walks  # if their distance is not what is missing, it is said again
            names = _left(names, left_out, leaving_out=True)
            settings = settings.model_copy(update={"metrics": names})
            loaded = suite.load(settings, image_shape=subject.image_shape, world=world)
    assert loaded is not None, "what compares without a reference was left out or refused"
    if any(METRICS[metric].compares for metric in loaded.metrics):
        assert settings.reference is not None
        real = suite.read_reference(settings.reference, loaded, image_shape=subject.image_shape)
        loaded = replace(loaded, real=real)
    if not leaving_out:
        loaded.check(images=settings.images, student=subject.student)
        return Measurement(subject, loaded, names, settings, first_seed, left_out)
    left_out |= _lacking(loaded, subject, settings)
    names = _left(names, left_out, leaving_out=True)
    loaded = replace(loaded, requests=parse(names))
    return Measurement(subject, loaded, names, settings, first_seed, left_out)


def measure(measurement: Measurement) -> Scorecard:
    """Return the values, the work shared by all ranks, on each of them."""
    subject, measures, settings = measurement.subject, measurement.suite, measurement.settings
    started_at = time.monotonic()
    found = measures.over_seeds(
        subject.images_of,
        images=settings.images,
        seeds=settings.seeds,
        first_seed=measurement.first_seed,
        student=subject.student,
    )
    starts = [measurement.first_seed + k * settings.images for k in range(settings.seeds)]
    distance = measures.distance if "ppl" in found else None
    looked_at_features = set(found) != {"ppl"}
    return Scorecard(
        subject=SubjectName(subject.source, subject.sha256, subject.kind),
        metrics=found,
        asked=measurement.asked,
        images=settings.images,
        seeds=tuple((start, start + settings.images) for start in starts),
        reference=measures.real and ReferenceName.of(measures.real),
        extractor=ExtractorName.of(measures.extractor) if looked_at_features else None,
        distance=distance and ExtractorName(distance.name, distance.sha256),
        definitions=settings.definitions.model_dump(mode="json"),
        sampler=subject.sampler,
        left_out=measurement.left_out,
        environment=Environment.here(measures.world.device, processes=measures.world.size),
        seconds=time.monotonic() - started_at,
    )


def _of_files(settings: suite.Config, subject: Subject) -> suite.Config:
    """Return the settings, for files with the number of images that there are."""
    if subject.files is None:
        return settings
    return settings.model_copy(update={"images": subject.files, "seeds": 1})


def _left(
    names: Sequence[str], left_out: Mapping[str, str], *, leaving_out: bool
) -> tuple[str, ...]:
    """Return the names that can be measured. Raises UserError where that is too few."""
    left = tuple(name for name in names if name not in left_out)
    if not left or (left_out and not leaving_out):
        raise UserError("; ".join(dict.fromkeys(left_out.values())))
    return left


def _reasons(
    requests: Sequence[Request], subject: Subject, settings: suite.Config
) -> dict[str, str]:
    """Return for each name that cannot be measured why not, by what is known without a network."""
    found = {}
    for request in requests:
        if METRICS[request.metrics[0]].compares and settings.reference is None:
            found[request.name] = (
                f"{request.name} compares with real images: name them with --reference"
            )
        if request.name in WALKS:
            if subject.student is None:
                found[request.name] = (
                    f"{request.name} walks in the latents of a student, and {subject.source} is "
                    f"{_A[subject.kind]}"
                )
                continue
            try:
                path_length.check(subject.student, WALKS[request.name])
            except UserError as error:
                found[request.name] = str(error)
    return found


_A = {"teacher": "a teacher, which is sampled", "images": "a set of images"}


def _lacking(loaded: Suite, subject: Subject, settings: suite.Config) -> dict[str, str]:
    """Return for each name that reference, extractor or count do not allow why not."""
    found = {}
    for request in loaded.requests:
        try:
            replace(loaded, requests=(request,)).check(
                images=settings.images, student=subject.student
            )
        except UserError as error:
            found[request.name] = str(error)
    return found
