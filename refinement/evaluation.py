"""What a run measures, before, while and after; written to its readings, so that a resumed run or a
new report measures nothing twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TypeVar, cast

import torch
from pydantic import TypeAdapter
from torch import nn

from core import distributed
from core.run_folder import RunFolder, atomic_write
from eval import samples
from eval.likeness import Drift, Nearness, drift, nearness
from eval.metrics import MetricResult
from eval.suite import GivenUp
from refinement.run import Run, append, timed
from reports import figures
from training.state import TrainState

T = TypeVar("T", Drift, Nearness)
COMPARED_IMAGES = 1000
"""Latents at most whose images are compared one by one: before with after, after with real."""
_log = logging.getLogger(__name__)


def measure(run: Run, when: str, student: nn.Module) -> None:
    """Measure "before" or "after" on all seeds and write it down, unless that was done."""
    images_seen = 0 if when == "before" else run.state.images_seen
    suite = run.parts.suite
    if suite is None:
        return
    if distributed.from_main(noted(run.folder, when, images_seen), run.world) is not None:
        return
    settings = run.recipe.evaluation
    _log.info("measuring %s: %d x %d images", when, settings.seeds, settings.images)
    with timed(run, when):
        found = suite.over_seeds(
            run.parts.images_of(student),
            images=settings.images,
            seeds=settings.seeds,
            student=student,
        )
    values = {metric: list(result.values) for metric, result in found.items()}
    append(run, {when: values}, images_seen=images_seen)


def noted(folder: RunFolder, when: str, images_seen: int) -> dict[str, MetricResult] | None:
    """Return the metrics that the readings hold for this point of the run, if any."""
    found = _row(folder, when, images_seen)
    if found is None:
        return None
    values = cast(Mapping[str, list[float]], found)
    return {name: MetricResult.of(value) for name, value in values.items()}


def begin_curve(run: Run) -> None:
    """Measure at the start, unless an earlier process did."""
    is_begun = any("measured" in row for row in run.folder.read_readings())
    if run.recipe.evaluation.every_kimg > 0 and not distributed.from_main(is_begun, run.world):
        append(run, {"measured": while_training(run, run.state)})


def while_training(
    run: Run, state: TrainState, *, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Return the metrics of fewer images, if any are wanted, and write a sample grid; None where
    a request to stop came before its end. The last measurement goes to its end.
    """
    settings = run.recipe.evaluation
    images_of = run.parts.images_of(state.student_ema)
    if run.world.is_main:
        seeds, size = samples.pair_seeds(state.student_ema, 100), settings.batch_size
        parts = [images_of(seeds[start : start + size]).cpu() for start in range(0, 100, size)]
        images = torch.cat(parts)
        with atomic_write(run.folder.samples / f"{state.images_seen:012d}.png") as partial:
            partial.write_bytes(figures.grid_picture(images, columns=10))
    count = settings.images_while_training
    suite = run.parts.suite and run.parts.suite.while_training(images=count)
    if settings.every_kimg == 0 or suite is None:
        return {}
    if state.images_seen < run.recipe.training.total_images:
        suite = replace(suite, stop_requested=stop_requested)
    try:
        found = suite.over_seeds(images_of, images=count)
    except GivenUp:
        return None
    return {metric: result.mean for metric, result in found.items()}


def compare(run: Run, student: nn.Module) -> None:
    """Compare images one by one, before with after and after with real ones, and write it down,
    unless that was done. What a teacher made before it was taught is not compared.
    """
    suite, images_seen = run.parts.suite, run.state.images_seen
    real = suite.real.features if suite is not None and suite.real is not None else None
    drifts = run.recipe.mode != "teach"
    if suite is None or not (drifts or real is not None):
        return
    done = _row(run.folder, "drift" if drifts else "nearness", images_seen) is not None
    if distributed.from_main(done, run.world):
        return
    seeds = range(max(2, run.world.size, min(COMPARED_IMAGES, run.recipe.evaluation.images)))
    row: dict[str, object] = {}
    with timed(run, "comparison"):
        device = suite.extractor.device
        after = suite.features(run.parts.images_of(student), seeds).to(device)
        if drifts:
            before = suite.features(run.parts.images_of(run.original), seeds).to(device)
            row["drift"] = asdict(drift(before, after))
        if real is not None:
            row["nearness"] = asdict(nearness(after, real.to(device)))
    append(run, row)


def likeness(folder: RunFolder, name: str, kind: type[T], images_seen: int) -> T | None:
    """Return the comparison of that name that the readings hold for this point, if any."""
    found = _row(folder, name, images_seen)
    return None if found is None else TypeAdapter(kind).validate_python(found)


def teacher_scores(run: Run) -> dict[str, float]:
    """Return what the teacher's own samples are worth, by each metric that they tell."""
    suite, made = run.parts.suite, run.parts.teacher_samples
    if suite is None or made is None or made is suite.real:
        return {}
    return suite.of_stored(made)


def _row(folder: RunFolder, name: str, images_seen: int) -> object | None:
    """Return the last reading of that name at this point of the run."""
    for row in reversed(folder.read_readings()):
        if name in row and row["images_seen"] == images_seen:
            return row[name]
    return None
