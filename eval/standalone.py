"""`python -m eval fid …`: the metrics of a network, or of images in files.

    evaluation = prepare(subject, config, world=world)
    card = scorecard(evaluation)

Everything that can be refused is refused by `prepare`, before an image is made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from core import distributed
from core.distributed import World
from core.downloads import local_file
from core.errors import UserError
from core.roles import Denoiser, Generator
from eval import evaluator
from eval.evaluator import Evaluator
from eval.metrics import path_length, registry
from eval.metrics.path_length import WALKS
from eval.metrics.registry import Request, metrics, parse
from eval.provenance import Environment, ExtractorName, ReferenceName
from eval.reference import ImageSet
from eval.samples import ImagesOf, Sampler, images_of_seeds
from eval.scorecard import Scorecard, SubjectName

Kind = Literal["student", "teacher", "images"]


@dataclass(frozen=True)
class Subject:
    """Images to evaluate, and their source."""

    source: str
    """As the user named it."""
    sha256: str
    """Of the weights file, or of the image set."""
    kind: Kind
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    images_of: ImagesOf
    """From seeds, or from indices of files, to images."""
    files: int | None = None
    """How many images there are; None if seeds make as many as are wanted."""
    student: Generator | None = None
    """The network whose latents can be walked."""
    sampler: str | None = None
    """How a teacher is sampled, in words."""


_USUAL_IMAGES = 50_000
_SEEDS = 2**32
"""Of NumPy's RandomState."""


@dataclass(frozen=True, kw_only=True)
class PreparedEvaluation:
    """A prepared evaluation."""

    subject: Subject
    evaluator: Evaluator
    first_seed: int
    left_out: Mapping[str, str]
    """Name of a metric -> why it cannot be measured."""


def of_student(
    network: Generator, *, source: str, sha256: str, device: torch.device | str
) -> Subject:
    """Return a student on the device as a subject."""
    return Subject(
        source,
        sha256,
        "student",
        network.image_shape,
        images_of_seeds(network, device=device),
        student=network,
    )


def of_teacher(
    network: Denoiser,
    sampler: Sampler,
    *,
    described: str,
    source: str,
    sha256: str,
    device: torch.device | str,
) -> Subject:
    """Return a teacher on the device, with its sampler, as a subject."""
    return Subject(
        source,
        sha256,
        "teacher",
        network.image_shape,
        images_of_seeds(network, sampler, device=device),
        sampler=described,
    )


def of_images(images: ImageSet, *, source: str) -> Subject:
    """Return a set of images as a subject; its indices take the place of seeds."""

    def images_of(indices: Sequence[int]) -> Tensor:
        return torch.stack([images[index] for index in indices])

    return Subject(
        source, images.sha256, "images", images.image_shape, images_of, files=len(images)
    )


def all_names() -> tuple[str, ...]:
    """Return the names behind `all`: every metric, or the group that it belongs to."""
    return tuple(registry.groups())


def usual_images(names: Sequence[str]) -> int:
    """Return the number of images that the names promise, or else the field's usual one."""
    return max((r.images for r in parse(names) if r.images is not None), default=_USUAL_IMAGES)


def usual_extractor(names: Sequence[str]) -> str:
    """Return the extractor of published values if it is one for all names, else inception.

    Path lengths have a distance of their own: for them alone it is pixels, which loads nothing.
    """
    members = [metrics()[name] for request in parse(names) for name in request.metrics]
    extractors = {m.published_features for m in members if m.needs != "student"}
    if not extractors:
        return "pixels"
    return extractors.pop() if len(extractors) == 1 else "inception"


def prepare(
    subject: Subject,
    config: evaluator.Config,
    *,
    world: World,
    first_seed: int = 0,
    leaving_out: bool = False,
) -> PreparedEvaluation:
    """Return the evaluation of `config.metrics`, its reference and extractor loaded.

    leaving_out: metrics that cannot be computed are left out with the reason, if any metric is
    left; otherwise they are refused. Raises UserError in either case if subject, reference and
    extractor do not fit each other.
    """
    if subject.files is not None:
        config = config.model_copy(update={"images": subject.files, "seeds": 1})
    if first_seed + config.seeds * config.images > _SEEDS:
        raise UserError(f"the seeds go on from {first_seed:,}, but there are {_SEEDS:,} at most")

    # metrics that subject and reference rule out, before anything is loaded
    left_out = _reasons(parse(config.metrics), subject, config)
    config = _without(config, left_out, leaving_out=leaving_out)
    with distributed.main_first(world):
        if config.reference is not None:
            local_file(config.reference)  # a wrong path is said before an extractor is fetched
        loaded, left_out = _load(subject, config, left_out, world, leaving_out=leaving_out)
    if any(metrics()[name].compares for name in loaded.metrics):
        assert config.reference is not None
        real = evaluator.read_reference(config.reference, loaded, image_shape=subject.image_shape)
        loaded = loaded.with_real(real)

    # metrics that reference, extractor or the number of images rule out
    if leaving_out:
        left_out = {**left_out, **_lacking(loaded, subject)}
        config = _without(loaded.config, left_out, leaving_out=True)
        loaded = replace(loaded, config=config, requests=parse(config.metrics))
    else:
        loaded.check(student=subject.student)
    return PreparedEvaluation(
        subject=subject, evaluator=loaded, first_seed=first_seed, left_out=left_out
    )


def _load(
    subject: Subject,
    config: evaluator.Config,
    left_out: Mapping[str, str],
    world: World,
    *,
    leaving_out: bool,
) -> tuple[Evaluator, Mapping[str, str]]:
    """Return the evaluator, without path lengths if their distance cannot be loaded."""
    try:
        loaded = evaluator.load(config, image_shape=subject.image_shape, world=world)
    except UserError as error:
        walks = {name: str(error) for name in config.metrics if name in WALKS}
        if not walks or not leaving_out:
            raise
        left_out = {**left_out, **walks}  # another cause is raised by the second attempt
        config = _without(config, left_out, leaving_out=True)
        loaded = evaluator.load(config, image_shape=subject.image_shape, world=world)
    assert loaded is not None, "metrics that compare without a reference were left out or refused"
    return loaded, left_out


def scorecard(evaluation: PreparedEvaluation) -> Scorecard:
    """Compute the metrics, the work shared by all ranks, and return them on each of them."""
    subject, loaded, first = evaluation.subject, evaluation.evaluator, evaluation.first_seed
    config = loaded.config
    started_at = time.monotonic()
    results = loaded.evaluate(subject.images_of, student=subject.student, first_seed=first)

    # provenance of the values
    starts = [first + k * config.images for k in range(config.seeds)]
    needs = {metrics()[name].needs for name in results}
    distance = loaded.distance if "student" in needs else None
    return Scorecard(
        subject=SubjectName(subject.source, subject.sha256, subject.kind),
        metrics=results,
        asked=config.metrics,
        images=config.images,
        seeds=tuple((start, start + config.images) for start in starts),
        reference=loaded.real and ReferenceName.of(loaded.real),
        extractor=ExtractorName.of(loaded.extractor) if needs - {"student"} else None,
        distance=distance and ExtractorName(distance.name, distance.sha256),
        definitions=config.definitions.model_dump(mode="json"),
        sampler=subject.sampler,
        left_out=evaluation.left_out,
        environment=Environment.here(loaded.world.device, processes=loaded.world.size),
        seconds=time.monotonic() - started_at,
    )


def _without(
    config: evaluator.Config, left_out: Mapping[str, str], *, leaving_out: bool
) -> evaluator.Config:
    """Return the config without some metrics. Raises UserError if that is too few."""
    names = tuple(name for name in config.metrics if name not in left_out)
    if not names or (left_out and not leaving_out):
        raise UserError("; ".join(dict.fromkeys(left_out.values())))
    return config.model_copy(update={"metrics": names})


def _reasons(
    requests: Sequence[Request], subject: Subject, config: evaluator.Config
) -> dict[str, str]:
    """Return the metrics that cannot be computed -> why, as far as known without a network."""
    reasons = {}
    for request in requests:
        if metrics()[request.metrics[0]].compares and config.reference is None:
            reasons[request.name] = (
                f"{request.name} compares with real images: name them with --reference"
            )
        if request.name in WALKS:
            if subject.student is None:
                reasons[request.name] = (
                    f"{request.name} walks in the latents of a student, and {subject.source} is "
                    f"{_A[subject.kind]}"
                )
                continue
            try:
                path_length.check(subject.student, WALKS[request.name])
            except UserError as error:
                reasons[request.name] = str(error)
    return reasons


_A = {"teacher": "a teacher, which is sampled", "images": "a set of images"}


def _lacking(loaded: Evaluator, subject: Subject) -> dict[str, str]:
    """Return the metrics that reference, extractor or count do not allow -> why."""
    reasons = {}
    for request in loaded.requests:
        try:
            replace(loaded, requests=(request,)).check(student=subject.student)
        except UserError as error:
            reasons[request.name] = str(error)
    return reasons
