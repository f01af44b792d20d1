"""One run in its folder: measured before, trained, measured after, reported; resumable at any
point.

What was measured is written to the readings, so that a resumed run or a new report measures nothing
twice.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import cast

from torch import nn

import generators
from core import distributed, networks, weights
from core.distributed import World
from core.downloads import local_file, sha256_of
from core.errors import UserError
from core.protocols import Networks
from core.run_folder import RunFolder, atomic_write
from eval import pages, pictures, report, samples
from eval.metrics import MetricResult, frechet_distance
from refinement.adapter import Downsample
from refinement.parts import Parts, found, size, with_teacher_samples
from refinement.recipe import NetworkSection, Recipe
from refinement.stopping import stop_signal
from training import checkpoint, loop
from training import state as training_state
from training.state import TrainState

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One run in its folder: what it was given, and where it stands."""

    recipe: Recipe
    parts: Parts
    folder: RunFolder
    world: World
    original: nn.Module
    """The student before any training."""
    state: TrainState
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of this process's work -> how long it took."""
    started_at: str = field(default_factory=lambda: _now())


def open_run(recipe: Recipe, parts: Parts, folder: RunFolder, world: World) -> Run:
    """Return the run where its newest checkpoint left it, or at its start."""
    original = copy.deepcopy(parts.student).eval().requires_grad_(False)
    trio = Networks(parts.student, copy.deepcopy(parts.teacher), parts.teacher, parts.adapter)
    settings = recipe.training
    state = training_state.start(
        trio,
        student_lr=settings.student_lr,
        score_lr=settings.score_lr,
        optimizer=settings.optimizer,
    )
    newest = checkpoint.restore_newest(state, folder, world)
    if newest is not None:
        _log.info("found %s: %d images seen", newest.name, state.images_seen)
    return Run(recipe, parts, folder, world, original, state)


def train(run: Run) -> None:
    """Train to the end of the recipe. Raises loop.Interrupted, with the state saved, when asked to
    stop.
    """
    if run.world.is_main:
        run.folder.keep_readings_until(run.state.images_seen)
    distributed.barrier(run.world)
    _meet_teacher(run)
    _measured(run, "before", run.original)
    if run.state.images_seen >= run.recipe.training.total_images:
        return
    with _timed(run, "training"):
        _begin_curve(run)
        with stop_signal() as stop_requested:
            loop.train(
                run.state,
                run.parts.objective,
                run.recipe.training,
                folder=run.folder,
                world=run.world,
                measure=lambda state: _measure_while_training(run, state),
                measure_every_kimg=run.recipe.evaluation.every_kimg,
                stop_requested=stop_requested,
            )


def finish(run: Run) -> report.Report:
    """Return the report of the run as it stands, after writing it and the refined weights."""
    _meet_teacher(run)
    _measured(run, "before", run.original)
    student = copy.deepcopy(run.state.student_ema)
    if hasattr(student, "settle"):
        student.settle()
    if run.world.is_main:
        provenance = {
            "refined_from": _file(run.recipe.student),
            "images_seen": run.state.images_seen,
        }
        networks.save(run.folder.student, student, provenance=provenance)
        _save_refined_pickle(run, student)
    _measured(run, "after", student)
    note_session(run)
    made = _report(run)
    if run.world.is_main:
        seeds = _pair_seeds(run)
        pairs = samples.pairs(
            run.parts.images_of(run.original),
            run.parts.images_of(student),
            seeds,
            labels=samples.inputs_of(student, seeds).labels,
            teacher=run.parts.images_of(run.parts.teacher) if _starts_from_noise(run) else None,
        )
        pages.write(run.folder.report, made, pairs)
    return made


def _save_refined_pickle(run: Run, student: nn.Module) -> None:
    """Where the student came in a published pickle, write that again with the refined weights."""
    source = run.recipe.student.weights
    original = None if source is None else local_file(found(source))
    if original is None or not weights.is_pickle(original):
        return
    try:
        written = generators.save_refined(original, run.folder.refined_pickle, student)
    except UserError as error:
        _log.warning("no refined.pkl: %s", error)
        return
    _log.info(
        "%s: %s refined, all else as it was", run.folder.refined_pickle, " and ".join(written)
    )


def _meet_teacher(run: Run) -> None:
    """Take in the statistics of the teacher's own samples, where the recipe asks for them."""
    run.parts = with_teacher_samples(run.parts, run.recipe.evaluation, run.folder, run.world)


def _starts_from_noise(run: Run) -> bool:
    """Return whether student and teacher make images from the same latents."""
    latents = getattr(run.original, "latent_shape", None)
    return latents == getattr(run.parts.teacher, "image_shape", ())


def _teacher_sees(parts: Parts) -> str | None:
    """Return the size of the images that the teacher sees, where it is not the student's."""
    return size(parts.adapter.image_shape) if isinstance(parts.adapter, Downsample) else None


def _teacher_score(parts: Parts) -> report.SampleScore | None:
    """Return how far the teacher's own samples are from the real images, where that is known."""
    made, real = parts.teacher_samples, parts.reference
    if made is None or real is None or made is real:
        return None
    return report.SampleScore(frechet_distance(made, real), made.images)


def _measured(run: Run, when: str, student: nn.Module) -> None:
    """Measure on all seeds and write it down, unless that was done at this point of the run."""
    images_seen = 0 if when == "before" else run.state.images_seen
    if run.parts.extractor is None or run.parts.reference is None:
        return
    if distributed.from_main(_noted(run.folder, when, images_seen), run.world) is not None:
        return
    settings = run.recipe.evaluation
    _log.info("measuring %s: %d x %d images", when, settings.seeds, settings.images)
    with _timed(run, when):
        fid = samples.fid_over_seeds(
            run.parts.images_of(student),
            run.parts.extractor,
            run.parts.reference,
            images=settings.images,
            seeds=settings.seeds,
            batch_size=settings.batch_size,
            world=run.world,
        )
    if run.world.is_main:
        row = {"images_seen": images_seen, when: {"fid": list(fid.values)}}
        run.folder.append_reading(row)


def _noted(folder: RunFolder, when: str, images_seen: int) -> dict[str, MetricResult] | None:
    """Return the metrics that the readings hold for this point of the run, if any."""
    for row in reversed(folder.read_readings()):
        if when in row and row["images_seen"] == images_seen:
            values = cast(Mapping[str, list[float]], row[when])
            return {name: MetricResult.of(found) for name, found in values.items()}
    return None


def _begin_curve(run: Run) -> None:
    """Measure at the start, unless an earlier process did."""
    is_begun = any("measured" in row for row in run.folder.read_readings())
    if run.recipe.evaluation.every_kimg > 0 and not distributed.from_main(is_begun, run.world):
        _append(run, {"measured": _measure_while_training(run, run.state)})


def _measure_while_training(run: Run, state: TrainState) -> dict[str, float]:
    """Return the metrics of fewer images, if any are wanted, and write a sample grid."""
    settings = run.recipe.evaluation
    images_of = run.parts.images_of(state.student_ema)
    if run.world.is_main:
        images = images_of(samples.pair_seeds(state.student_ema, 100)).cpu()
        with atomic_write(run.folder.samples / f"{state.images_seen:012d}.png") as partial:
            partial.write_bytes(pictures.grid_picture(images, columns=10))
    if settings.every_kimg == 0 or run.parts.extractor is None or run.parts.reference is None:
        return {}
    fid = samples.fid_over_seeds(
        images_of,
        run.parts.extractor,
        run.parts.reference,
        images=settings.images_while_training,
        seeds=1,
        batch_size=settings.batch_size,
        world=run.world,
    )
    return {"fid": fid.mean}


def _report(run: Run) -> report.Report:
    """Return the report's data, from the readings up to here and what was loaded."""
    recipe, parts = run.recipe, run.parts
    rows = [
        row
        for row in run.folder.read_readings()
        if cast(int, row["images_seen"]) <= run.state.images_seen
    ]
    sessions = [cast(dict, row["session"]) for row in rows if "session" in row]
    points = [
        report.CurvePoint(cast(int, row["images_seen"]), cast(dict, row["measured"])["fid"])
        for row in rows
        if "fid" in cast(dict, row.get("measured", {}))
    ]
    student = _file(recipe.student)
    return report.Report(
        name=recipe.name,
        before=_noted(run.folder, "before", 0) or {},
        after=_noted(run.folder, "after", run.state.images_seen) or {},
        images=recipe.evaluation.images,
        first_seed=0,
        reference=parts.reference and report.ReferenceName.of(parts.reference),
        extractor=parts.extractor and report.ExtractorName.of(parts.extractor),
        environment=report.Environment.here(run.world.device),
        kernel_backend=parts.kernel_backend,
        teacher_samples=_teacher_score(parts),
        student=report.File(**student),
        teacher=report.File(**_teacher_file(recipe)),
        images_seen=run.state.images_seen,
        started_at=min((session["started_at"] for session in sessions), default=run.started_at),
        finished_at=max((session["finished_at"] for session in sessions), default=_now()),
        durations_seconds=_total_seconds(sessions),
        curve=report.Curve(tuple(points), recipe.evaluation.images_while_training),
        teacher_sees=_teacher_sees(parts),
        pair_seeds=tuple(_pair_seeds(run)),
        recipe=recipe.model_dump(mode="json"),
    )


def _pair_seeds(run: Run) -> list[int]:
    return samples.pair_seeds(run.original, run.recipe.evaluation.pairs)


def _file(section: NetworkSection) -> dict[str, str | None]:
    """Return path and hash of a network's file, or the family whose weights were drawn."""
    if section.family == "one_step_edm" and "network" not in (section.config or {"network": 0}):
        return {"path": "a copy of the teacher", "sha256": None}
    if section.weights is None:
        return {"path": f"freshly drawn {section.family}", "sha256": None}
    return {"path": section.weights, "sha256": sha256_of(local_file(found(section.weights)))}


def _teacher_file(recipe: Recipe) -> dict[str, str | None]:
    """Return path and hash of what the student learnt from: a teacher's weights, or images."""
    if recipe.teacher is not None:
        return _file(recipe.teacher)
    path = local_file(found(recipe.objective.images))
    return {"path": recipe.objective.images, "sha256": None if path.is_dir() else sha256_of(path)}


def _append(run: Run, row: Mapping[str, object]) -> None:
    if run.world.is_main:
        run.folder.append_reading({"images_seen": run.state.images_seen, **row})


def note_session(run: Run) -> None:
    """Write down how long this process worked on the run, if it did."""
    if not run.seconds:
        return
    session = {"started_at": run.started_at, "finished_at": _now(), "seconds": run.seconds}
    _append(run, {"session": session})


def _total_seconds(sessions: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the time of each part of the work, over all processes that worked on the run."""
    parts = dict.fromkeys(name for session in sessions for name in session["seconds"])
    return {part: sum(s["seconds"].get(part, 0.0) for s in sessions) for part in parts}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def _timed(run: Run, part: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        run.seconds[part] = round(time.monotonic() - started, 1)
