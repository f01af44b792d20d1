"""What a run's report says: gathered from its readings, its recipe and what was loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import cast

import torch

from core.downloads import local_file, sha256_of
from eval import edm_sampler, provenance, reference, samples
from eval.collecting import kept_indices
from eval.likeness import Drift, Nearness
from eval.suite import size
from refinement.adapter import Downsample
from refinement.components import SAMPLED, Parts, found
from refinement.evaluation import likeness, noted, teacher_scores
from refinement.recipe import NetworkSection, Recipe
from refinement.run import Run, now, total_seconds
from reports import data


def report_of(run: Run) -> data.Report:
    """Return the report's data, from the readings up to here and what was loaded."""
    recipe, parts, at = run.recipe, run.parts, run.state.images_seen
    every = run.folder.read_readings()
    rows = [row for row in every if cast(int, row["images_seen"]) <= at]
    sessions = [cast(dict, row["session"]) for row in rows if "session" in row]
    real = parts.suite and parts.suite.real
    return data.Report(
        name=recipe.name,
        before=noted(run.folder, "before", 0) or {},
        after=noted(run.folder, "after", at) or {},
        images=recipe.evaluation.images,
        first_seed=0,
        reference=real and provenance.ReferenceName.of(real),
        extractor=parts.suite and provenance.ExtractorName.of(parts.suite.extractor),
        environment=provenance.Environment.here(run.world.device, processes=run.world.size),
        kernel_backend=parts.kernel_backend,
        teacher_samples=_teacher_score(run),
        real_halves=_real_halves(parts),
        student=data.File(**file_of(recipe.student)),
        teacher=data.File(**_teacher_file(recipe)),
        sampler=_sampler(run),
        images_seen=at,
        started_at=min((session["started_at"] for session in sessions), default=run.started_at),
        finished_at=max((session["finished_at"] for session in sessions), default=now()),
        durations_seconds=total_seconds(sessions),
        timed_images=sum(session.get("images", 0) for session in sessions) or None,
        curve=_curve(run, rows),
        drift=likeness(run.folder, "drift", Drift, at),
        nearness=likeness(run.folder, "nearness", Nearness, at),
        teacher_sees=_teacher_sees(parts),
        pair_seeds=tuple(pair_seeds(run)),
        notes=tuple(notes(every)),
        recipe=recipe.model_dump(mode="json"),
    )


def pair_seeds(run: Run) -> list[int]:
    """Return the seeds of the report's pairs."""
    return samples.pair_seeds(run.original, run.recipe.evaluation.pairs)


def neighbours(
    run: Run, made: data.Report, images_of: samples.ImagesOf
) -> samples.Neighbours | None:
    """Return pictures of the images after that come nearest to real ones, where those are at hand.

    images_of: of the student after.
    """
    source, suite = run.recipe.evaluation.reference, run.parts.suite
    if made.nearness is None or suite is None or source in (None, "teacher"):
        return None
    path = local_file(found(source))
    if not reference.is_image_set(path):
        return None
    images, config = reference.image_set(path), suite.definitions
    kept = kept_indices(len(images), config.kept_images, config.random_seed)
    seeds = [pair.image for pair in made.nearness.nearest]
    real = torch.stack([images[int(kept[pair.real])] for pair in made.nearness.nearest])
    return samples.Neighbours(tuple(seeds), images_of(seeds).cpu(), real)


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
    real = parts.suite and parts.suite.real
    if not real or real.halves_fid is None or real.images is None:
        return None
    return data.SampleScore({"fid": real.halves_fid}, real.images // 2)


def _sampler(run: Run) -> str | None:
    """Return how a denoiser is sampled in this run, if one is: the teacher, or the student."""
    recipe = run.recipe
    if recipe.teacher is None:
        return edm_sampler.described(run.original, recipe.sampler)
    settings = recipe.evaluation
    is_sampled = settings.teacher == SAMPLED or settings.reference == "teacher"
    if recipe.mode == "gan" and not is_sampled:
        return None
    return edm_sampler.described(run.parts.teacher, recipe.sampler)


def _teacher_sees(parts: Parts) -> str | None:
    """Return the size of the images that the teacher sees, where it is not the student's."""
    return size(parts.adapter.image_shape) if isinstance(parts.adapter, Downsample) else None


def notes(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield what happened while training that a reader must know."""
    skipped = [v for row in rows for k, v in row.items() if k.endswith("_skipped")]
    if any(skipped):
        share = fmean(cast(list[float], skipped))
        yield f"{share:.1%} of the updates were left out: their gradients overflowed float16."
    for row in rows:
        if "rollback" in row:
            back = cast(dict, row["rollback"])
            yield (
                f"The run diverged and went back from {back['from_images_seen']:,} to "
                f"{back['to_images_seen']:,} images ({back['why']}); learning rates were "
                f"{back['lr_scale']:g} times the recipe's from there on."
            )
        if "diverged" in row:
            yield f"Training stopped because it diverged: {cast(dict, row['diverged'])['why']}."
        if "early_stop" in row:
            best = cast(dict, row["early_stop"])
            yield (
                f"The run ended early, as its recipe asks: {best['metric']} had not improved since "
                f"{best['at_images_seen']:,} images."
            )
        if "best" in row:
            best = cast(dict, row["best"])
            yield (
                f"The end is not the best that was measured: {best['metric']} was "
                f"{best['value']:.4g} after {best['at_images_seen']:,} images, kept in "
                f"`{best['checkpoint']}`."
            )


def _curve(run: Run, rows: Sequence[Mapping[str, object]]) -> data.Curve:
    """Return the first metric that was measured while training."""
    measured = [
        (cast(int, row["images_seen"]), row["measured"]) for row in rows if row.get("measured")
    ]
    points = [(seen, cast(dict[str, float], scores)) for seen, scores in measured]
    if not points:
        return data.Curve()
    metric = next(iter(points[0][1]))
    return data.Curve(
        metric,
        tuple(data.CurvePoint(seen, scores[metric]) for seen, scores in points),
        run.recipe.evaluation.images_while_training,
    )
