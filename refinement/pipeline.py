"""One run from its start to its report: measured before, trained, measured after; resumable at any
point.
"""

from __future__ import annotations

from core import distributed
from core.roles import Denoiser, Generator
from eval import samples
from refinement import build_report, evaluation, export
from refinement.components import with_teacher_samples
from refinement.run import Run, log_session, timed
from refinement.signals import stop_signal
from reports import data, write
from training import trainer


def train(run: Run) -> None:
    """Train to the end of the recipe. Raises loop.Interrupted, with the state saved, when asked to
    stop.
    """

    # drop log rows behind the checkpoint
    if run.world.is_main:
        run.folder.log.keep_until(run.state.images_seen)
    distributed.barrier(run.world)

    # evaluate before, unless the log has it
    _meet_teacher(run)
    evaluation.evaluate(run, "before", run.original, 0)
    if run.state.images_seen >= run.recipe.training.total_images:
        return

    # train
    with timed(run, "training"):
        evaluation.start_curve(run)
        with stop_signal() as stop_requested:
            trainer.Trainer(
                run.state,
                run.components.objective,
                run.recipe.training,
                folder=run.folder,
                world=run.world,
                evaluate=lambda state: evaluation.while_training(
                    run, state, stop_requested=stop_requested
                ),
                evaluate_every_kimg=run.recipe.evaluation.every_kimg,
                watched=run.recipe.watched_metric,
                stop_requested=stop_requested,
            ).train()


def finish(run: Run) -> data.Report:
    """Return the report of the run as it stands, after writing it and the refined weights."""
    _meet_teacher(run)
    evaluation.evaluate(run, "before", run.original, 0)

    # the refined weights
    best = export.chosen(run, run.recipe.training.export)
    student, images_seen = export.student_at(run, best)
    if run.world.is_main:
        export.write(run, student, images_seen, run.folder)

    # evaluate them, and the last ones if they are others; then report
    evaluation.evaluate(run, "after", student, images_seen)
    if best is not None:
        last, seen = export.student_at(run, None)
        evaluation.evaluate(run, "after", last, seen)
    evaluation.compare(run, student, images_seen)
    log_session(run)
    report = build_report.report_of(run, images_seen)
    if run.world.is_main:
        near = build_report.neighbors(run, report, run.components.images_of(student))
        write.write(run.folder.report, report, _pairs(run, student), near)
    return report


def _pairs(run: Run, student: Generator | Denoiser) -> samples.Pairs:
    """Return images of the same latents before and after; the teacher's if it shares them."""
    seeds, components = build_report.pair_seeds(run), run.components
    shares_latents = _starts_from_noise(run)
    return samples.pairs(
        components.images_of(run.original),
        components.images_of(student),
        seeds,
        labels=samples.inputs_of(student, seeds).labels,
        teacher=components.images_of(components.teacher) if shares_latents else None,
    )


def _meet_teacher(run: Run) -> None:
    """Add the statistics of the teacher's own samples to the components, if the recipe asks."""
    run.components = with_teacher_samples(run.components, run.recipe, run.folder, run.world)


def _starts_from_noise(run: Run) -> bool:
    """Return whether student and teacher make images from the same latents."""
    latents = getattr(run.original, "latent_shape", None)
    return latents == getattr(run.components.teacher, "image_shape", ())
