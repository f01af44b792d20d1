"""The data of a run's report, from its log, its recipe and its components."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch

from core.downloads import local_file, sha256_of
from core.run_log import (
    Best,
    Divergence,
    EarlyStop,
    Evaluation,
    Rollback,
    Row,
    Session,
    Stats,
    of_kind,
)
from eval import edm_sampler, provenance, reference, samples
from eval.evaluator import size
from eval.feature_stats import kept_indices
from eval.metrics.frechet import FID
from eval.nearest import Drift, Nearness
from refinement.adapter import Downsample
from refinement.components import SAMPLED, Parts, found
from refinement.evaluation import logged_comparison, logged_metrics, teacher_scores
from refinement.recipe import NetworkSection, Recipe
from refinement.run import Run, now, total_seconds
from reports import data


def report_of(run: Run) -> data.Report:
    """Return the report of a run, from the rows of its log up to its last checkpoint."""
    recipe, parts, at = run.recipe, run.parts, run.state.images_seen
    every = run.folder.log.rows()
    rows = [row for row in every if row.images_seen <= at]
    sessions = of_kind(rows, Session)
    real = parts.evaluator and parts.evaluator.real
    return data.Report(
        name=recipe.name,
        before=logged_metrics(run.folder, "before", 0) or {},
        after=logged_metrics(run.folder, "after", at) or {},
        images=recipe.evaluation.images,
        first_seed=0,
        reference=real and provenance.ReferenceName.of(real),
        extractor=parts.evaluator and provenance.ExtractorName.of(parts.evaluator.extractor),
        environment=provenance.Environment.here(run.world.device, processes=run.world.size),
        kernel_backend=parts.kernel_backend,
        teacher_samples=_teacher_score(run),
        real_halves=_real_halves(parts),
        student=data.File(**file_of(recipe.student)),
        teacher=data.File(**_teacher_file(recipe)),
        sampler=_sampler(run),
        images_seen=at,
        started_at=min((session.started_at for session in sessions), default=run.started_at),
        finished_at=max((session.finished_at for session in sessions), default=now()),
        durations_seconds=total_seconds(sessions),
        timed_images=sum(session.images for session in sessions) or None,
        curve=_curve(run, rows),
        drift=logged_comparison(run.folder, Drift, at),
        nearness=logged_comparison(run.folder, Nearness, at),
        teacher_sees=_teacher_sees(parts),
        pair_seeds=tuple(pair_seeds(run)),
        notes=tuple(notes(every)),
        recipe=recipe.model_dump(mode="json"),
    )


def pair_seeds(run: Run) -> list[int]:
    """Return the seeds of the report's pairs."""
    return samples.pair_seeds(run.original, run.recipe.evaluation.pairs)


def neighbors(run: Run, made: data.Report, images_of: samples.ImagesOf) -> samples.Neighbors | None:
    """Return pictures of the images after that come nearest to real ones, where those are at hand.

    images_of: of the student after.
    """
    source, evaluator = run.recipe.evaluation.reference, run.parts.evaluator
    if made.nearness is None or evaluator is None or source in (None, "teacher"):
        return None
    path = local_file(found(source))
    if not reference.is_image_set(path):
        return None
    images, config = reference.image_set(path), evaluator.config.definitions
    kept = kept_indices(len(images), config.kept_images, config.random_seed)
    seeds = [pair.image for pair in made.nearness.nearest]
    real = torch.stack([images[int(kept[pair.real])] for pair in made.nearness.nearest])
    return samples.Neighbors(tuple(seeds), images_of(seeds).cpu(), real)


def file_of(section: NetworkSection) -> dict[str, str | None]:
    """Return path and hash of a network's file, or the family whose weights were drawn."""
    if section.family == "one_step_edm" and "network" not in (section.config or {"network": 0}):
        return {"path": "a copy of the teacher", "sha256": None}
    if section.weights is None:
        return {"path": f"freshly drawn {section.family}", "sha256": None}
    return {"path": section.weights, "sha256": sha256_of(local_file(found(section.weights)))}


def _teacher_file(recipe: Recipe) -> dict[str, str | None]:
    """Return path and hash of what the student learnt from: a teacher's weights, or images."""
    if recipe.teacher is not None:
        return file_of(recipe.teacher)
    path = local_file(found(recipe.objective.images))
    return {"path": recipe.objective.images, "sha256": None if path.is_dir() else sha256_of(path)}


def _teacher_score(run: Run) -> data.SampleScore | None:
    """Return how far the teacher's own samples are from the real images, where that is known."""
    scores, made = teacher_scores(run), run.parts.teacher_samples
    return data.SampleScore(scores, made.images) if scores and made is not None else None


def _real_halves(parts: Parts) -> data.SampleScore | None:
    real = parts.evaluator and parts.evaluator.real
    if not real or real.halves_fid is None or real.images is None:
        return None
    return data.SampleScore({FID.name: real.halves_fid}, real.images // 2)


def _sampler(run: Run) -> str | None:
    """Return how a denoiser is sampled in this run, if one is: the teacher, or the student."""
    recipe = run.recipe
    if recipe.teacher is None:
        return edm_sampler.describe(run.original, recipe.sampler)
    settings = recipe.evaluation
    is_sampled = settings.teacher == SAMPLED or settings.reference == "teacher"
    if recipe.mode == "gan" and not is_sampled:
        return None
    return edm_sampler.describe(run.parts.teacher, recipe.sampler)


def _teacher_sees(parts: Parts) -> str | None:
    """Return the size of the images that the teacher sees, where it is not the student's."""
    return size(parts.adapter.image_shape) if isinstance(parts.adapter, Downsample) else None


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield remarks on the training that a reader of the report needs."""
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
            case EarlyStop():
                yield (
                    f"The run ended early, as its recipe asks: {row.metric} had not improved since "
                    f"{row.at_images_seen:,} images."
                )
            case Best():
                yield (
                    f"The end is not the best that was measured: {row.metric} was "
                    f"{row.value:.4g} after {row.at_images_seen:,} images, kept in "
                    f"`{row.checkpoint}`."
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
