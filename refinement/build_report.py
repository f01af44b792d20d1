"""The data of a run's report, from its log, its recipe and its components."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch

from core.file import File
from core.roles import Denoiser
from core.run_log import (
    Divergence,
    EarlyStop,
    Evaluation,
    Rollback,
    Row,
    Session,
    Stats,
    of_kind,
)
from data.images import Images
from eval import edm_sampler, provenance, reference, samples
from eval.evaluator import size
from eval.feature_stats import kept_indices
from eval.metrics.frechet import FID
from eval.nearest import Drift, Nearness
from refinement.adapter import Downsample
from refinement.components import Components
from refinement.evaluation import logged_comparison, logged_metrics, teacher_scores
from refinement.recipe import SAMPLE, TEACHER, NetworkSection, Recipe
from refinement.run import Run, now, total_seconds
from reports import data


def report_of(run: Run, exported: int) -> data.Report:
    """Return the report of a run, from the rows of its log up to its last checkpoint.

    exported: images seen of the refined weights.
    """
    recipe, components, at = run.recipe, run.components, run.state.images_seen
    every = run.folder.log.rows()
    rows = [row for row in every if row.images_seen <= at]
    sessions = of_kind(rows, Session)
    loaded = components.evaluator
    real = loaded and loaded.real

    # every field of the report, in its order
    return data.Report(
        name=recipe.name,
        before=logged_metrics(run.folder, "before", 0) or {},
        after=logged_metrics(run.folder, "after", exported) or {},
        images=recipe.evaluation.images,
        first_seed=0,
        reference=real and provenance.ReferenceName.of(real),
        extractor=components.evaluator
        and provenance.ExtractorName.of(components.evaluator.extractor),
        environment=provenance.Environment.here(run.world.device, processes=run.world.size),
        kernel_backend=components.kernel_backend,
        teacher_samples=_teacher_score(run),
        real_halves=_real_halves(components),
        student=file_of(recipe.student, recipe.files.student),
        teacher=_teacher_file(recipe),
        sampler=_sampler(run),
        images_seen=at,
        exported_images_seen=exported,
        last=logged_metrics(run.folder, "after", at) or {} if exported != at else {},
        started_at=min((session.started_at for session in sessions), default=run.started_at),
        finished_at=max((session.finished_at for session in sessions), default=now()),
        durations_seconds=total_seconds(sessions),
        timed_images=sum(session.images for session in sessions) or None,
        curve=_curve(run, rows),
        drift=logged_comparison(run.folder, Drift, exported),
        nearness=logged_comparison(run.folder, Nearness, exported),
        teacher_sees=_teacher_sees(components),
        pair_seeds=tuple(pair_seeds(run)),
        notes=(*_setup_notes(recipe, components), *notes(every, at)),
        recipe=recipe.model_dump(mode="json"),
    )


def pair_seeds(run: Run) -> list[int]:
    """Return the seeds of the report's pairs."""
    return samples.pair_seeds(run.original, run.recipe.evaluation.pairs)


def neighbors(
    run: Run, report: data.Report, images_of: samples.ImagesOf
) -> samples.Neighbors | None:
    """Return pictures of the refined images nearest to real ones, if the images are available.

    images_of: of the student after.
    """
    source, evaluator = run.recipe.files.reference, run.components.evaluator
    if report.nearness is None or evaluator is None or source is None:
        return None
    path = source.path
    if not reference.is_image_set(path):
        return None
    images, config = reference.image_set(path), evaluator.config.definitions
    kept = kept_indices(len(images), config.kept_images, config.random_seed)
    seeds = [pair.image for pair in report.nearness.nearest]
    real = torch.stack([images[int(kept[pair.real])] for pair in report.nearness.nearest])
    return samples.Neighbors(tuple(seeds), images_of(seeds).cpu(), real)


def file_of(section: NetworkSection, file: File | None) -> data.File:
    """Return name and hash of a network's file, or a phrase for weights that came from none."""
    if file is not None:
        return data.File(file.shown, file.sha256)
    copies_teacher = section.family == "one_step_edm" and "network" not in (section.config or {})
    phrase = "a copy of the teacher" if copies_teacher else f"freshly drawn {section.family}"
    return data.File(phrase, None)


def _teacher_file(recipe: Recipe) -> data.File:
    """Return name and hash of the source of the student's learning: a teacher, or images."""
    if recipe.teacher is not None:
        return file_of(recipe.teacher, recipe.files.teacher)
    images = recipe.files.images
    assert images is not None, "an objective without a teacher learns from images"
    return data.File(images.shown, images.sha256)


def _teacher_score(run: Run) -> data.SampleScore | None:
    """Return the metrics of the teacher's own samples, if they were computed."""
    scores, samples_of_teacher = teacher_scores(run), run.components.teacher_samples
    return (
        data.SampleScore(scores, samples_of_teacher.images)
        if scores and samples_of_teacher is not None
        else None
    )


def _real_halves(components: Components) -> data.SampleScore | None:
    real = components.evaluator and components.evaluator.real
    if not real or real.halves_fid is None or real.images is None:
        return None
    return data.SampleScore({FID.name: real.halves_fid}, real.images // 2)


def _sampler(run: Run) -> str | None:
    """Return how a denoiser is sampled in this run, if one is: the teacher, or the student."""
    recipe = run.recipe
    if recipe.teacher is None:
        assert isinstance(run.original, Denoiser), type(run.original)
        return edm_sampler.describe(run.original, recipe.sampler)
    settings = recipe.evaluation
    is_sampled = settings.teacher == SAMPLE or settings.reference == TEACHER
    if recipe.mode == "gan" and not is_sampled:
        return None
    teacher = run.components.teacher
    assert isinstance(teacher, Denoiser), type(teacher)
    return edm_sampler.describe(teacher, recipe.sampler)


def _teacher_sees(components: Components) -> str | None:
    """Return the size of the images that the teacher sees, if it is not the student's."""
    return (
        size(components.adapter.image_shape) if isinstance(components.adapter, Downsample) else None
    )


def _setup_notes(recipe: Recipe, components: Components) -> Iterator[str]:
    """Yield remarks on student, teacher and images that a reader of the report needs."""
    images = recipe.files.images
    if images is not None and recipe.teacher is not None:
        known = Images(images.path)
        yield (
            f"Real images were used in training: {known.description}, of {images} "
            f"(sha256 {known.sha256[:12]})."
        )
    teacher, classes = components.teacher, components.student.num_classes
    if classes and isinstance(teacher, Denoiser) and not teacher.num_classes:
        yield (
            f"The teacher is unconditional: it saw the student's images of all {classes} classes "
            "without their labels, and cannot tell whether a class stayed itself."
        )


def notes(rows: Sequence[Row], at: int) -> Iterator[str]:
    """Yield remarks on the training that a reader of the report needs.

    at: images seen at the end.
    """
    stats = of_kind(rows, Stats)
    skipped = [v for row in stats for k, v in row.values.items() if k.endswith("_skipped")]
    if any(skipped):
        yield (
            f"{fmean(skipped):.1%} of the updates were left out: their gradients overflowed "
            "float16."
        )
    for row in rows:
        match row:
            case Rollback():
                yield (
                    f"The run diverged and went back from {row.from_images_seen:,} to "
                    f"{row.images_seen:,} images ({row.why}); learning rates were "
                    f"{row.lr_scale:g} times the recipe's from there on."
                )
            case Divergence():
                yield f"Training stopped because it diverged: {row.why}."
            case EarlyStop() if row.images_seen == at:
                yield (
                    f"The run ended early, as its recipe asks: {row.metric} had not improved since "
                    f"{row.at_images_seen:,} images."
                )


def _curve(run: Run, rows: Sequence[Row]) -> data.Curve:
    """Return the headline metric over images seen."""
    points = [
        (row.images_seen, row.means)
        for row in of_kind(rows, Evaluation)
        if row.when == "training" and row.metrics
    ]
    if not points:
        return data.Curve()
    metric = next(iter(points[0][1]))
    return data.Curve(
        metric,
        tuple(data.CurvePoint(images_seen, scores[metric]) for images_seen, scores in points),
        run.recipe.evaluation.images_while_training,
    )
