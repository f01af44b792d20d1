"""The evaluations of a run, before, while and after training; each logged once.

A resumed run or a rebuilt report reads the log and evaluates nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal, TypeVar

import torch
from pydantic import TypeAdapter
from torch import nn

from core import distributed
from core.disk import atomic_write
from core.roles import Denoiser, Generator
from core.run_folder import RunFolder
from core.run_log import Evaluation, ImageComparison
from eval import samples
from eval.metrics.registry import MetricResult
from eval.nearest import Drift, Nearness, drift, nearness
from refinement.run import Run, timed
from reports import figures
from training.state import TrainState

T = TypeVar("T", Drift, Nearness)
COMPARED_IMAGES = 1000
"""Most latents whose images are compared one by one."""
_log = logging.getLogger(__name__)


def evaluate(
    run: Run, when: Literal["before", "after"], student: Generator | Denoiser, images_seen: int
) -> None:
    """Evaluate a student on all seeds and log the metrics, unless the log holds them already.

    images_seen: of the student, its place in the log.
    """
    evaluator = run.components.evaluator
    if evaluator is None:
        return
    is_logged = logged_metrics(run.folder, when, images_seen) is not None
    if distributed.broadcast_from_main(is_logged, run.world):
        return

    settings = run.recipe.evaluation
    _log.info("measuring %s: %d x %d images", when, settings.seeds, settings.images)
    with timed(run, when):
        walks = student if isinstance(student, Generator) else None
        results = evaluator.evaluate(run.components.images_of(student), student=walks)
    if run.world.is_main:
        values = {metric: result.values for metric, result in results.items()}
        run.folder.log.append(Evaluation(images_seen=images_seen, when=when, metrics=values))


def logged_metrics(
    folder: RunFolder, when: Literal["before", "after"], images_seen: int
) -> dict[str, MetricResult] | None:
    """Return the logged metrics of this point of the run, if any."""
    row = folder.log.last(Evaluation, when=when, images_seen=images_seen)
    if row is None:
        return None
    return {name: MetricResult.of(values) for name, values in row.metrics.items()}


def start_curve(run: Run) -> None:
    """Evaluate at the start of training, unless an earlier process did."""
    has_curve = run.folder.log.last(Evaluation, when="training") is not None
    if run.recipe.evaluation.every_kimg == 0 or distributed.broadcast_from_main(
        has_curve, run.world
    ):
        return
    scores = while_training(run, run.state)
    if run.world.is_main:
        values = {name: (value,) for name, value in scores.items()}
        row = Evaluation(images_seen=run.state.images_seen, when="training", metrics=values)
        run.folder.log.append(row)


def while_training(
    run: Run, state: TrainState, *, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Return the metrics of fewer images, if the recipe wants any, and write a sample grid.

    Raises EvaluationCancelled at a request to stop, except after the last iteration.
    """
    settings = run.recipe.evaluation
    student = state.student_ema
    assert isinstance(student, Generator | Denoiser), type(student)
    images_of = run.components.images_of(student)

    # a grid of samples, by rank 0
    if run.world.is_main:
        seeds, size = samples.pair_seeds(student, 100), settings.batch_size
        parts = [images_of(seeds[start : start + size]).cpu() for start in range(0, 100, size)]
        images = torch.cat(parts)
        with atomic_write(run.folder.samples / f"{state.images_seen:012d}.png") as partial:
            partial.write_bytes(figures.grid_picture(images, columns=10))

    # metrics, by all ranks
    evaluator = run.components.evaluator
    if settings.every_kimg == 0 or evaluator is None:
        return {}
    if state.images_seen >= run.recipe.training.total_images:
        return evaluator.evaluate_quick(images_of)
    return evaluator.evaluate_quick(images_of, stop_requested=stop_requested)


def compare(run: Run, student: nn.Module, images_seen: int) -> None:
    """Compare images one by one, before with after and after with real ones, and log the results.

    Skipped if the log holds them. A denoiser that began as noise is not compared with itself.
    """
    evaluator = run.components.evaluator
    real = evaluator.real.features if evaluator and evaluator.real else None
    drifts = run.recipe.mode != "teach"
    if evaluator is None or not (drifts or real is not None):
        return
    is_logged = run.folder.log.last(ImageComparison, images_seen=images_seen) is not None
    if distributed.broadcast_from_main(is_logged, run.world):
        return

    seeds = range(max(2, run.world.size, min(COMPARED_IMAGES, run.recipe.evaluation.images)))
    results: list[Drift | Nearness] = []
    with timed(run, "comparison"):
        device = evaluator.extractor.device
        after = evaluator.features(run.components.images_of(student), seeds).to(device)
        if drifts:
            before = evaluator.features(run.components.images_of(run.original), seeds).to(device)
            results.append(drift(before, after))
        if real is not None:
            results.append(nearness(after, real.to(device)))
    if run.world.is_main:
        for result in results:
            row = ImageComparison(
                images_seen=images_seen, name=type(result).__name__.lower(), result=asdict(result)
            )
            run.folder.log.append(row)


def logged_comparison(folder: RunFolder, kind: type[T], images_seen: int) -> T | None:
    """Return the logged comparison of that kind at this point of the run, if any."""
    name = kind.__name__.lower()
    row = folder.log.last(ImageComparison, name=name, images_seen=images_seen)
    return None if row is None else TypeAdapter(kind).validate_python(row.result)


def teacher_scores(run: Run) -> dict[str, float]:
    """Return the metrics of the teacher's own samples, as far as their statistics give them."""
    evaluator, teacher = run.components.evaluator, run.components.teacher_samples
    if evaluator is None or teacher is None or teacher is evaluator.real:
        return {}
    return evaluator.evaluate_stored(teacher)
