"""One run from its start to its report: measured before, trained, measured after; resumable at any
point.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict

from torch import nn

import generators
from core import distributed
from core.errors import UserError
from core.roles import Denoiser, Generator
from eval import samples
from pretrained import files, networks
from refinement import build_report, evaluation
from refinement.components import with_teacher_samples
from refinement.run import Run, log_session, timed
from refinement.signals import stop_signal
from reports import data, write
from training import trainer

_log = logging.getLogger(__name__)


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
    evaluation.evaluate(run, "before", run.original)
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
    evaluation.evaluate(run, "before", run.original)

    # the refined weights
    student = copy.deepcopy(run.state.student_ema)
    assert isinstance(student, Generator | Denoiser), type(student)
    if isinstance(student, Generator):
        student.update_w_avg()
    if run.world.is_main:
        provenance = {
            "refined_from": asdict(
                build_report.file_of(run.recipe.student, run.recipe.files.student)
            ),
            "images_seen": run.state.images_seen,
        }
        networks.save(run.folder.student, student, provenance=provenance)
        _save_refined_pickle(run, student)

    # evaluate after, then report
    evaluation.evaluate(run, "after", student)
    evaluation.compare(run, student)
    log_session(run)
    report = build_report.report_of(run)
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


def _save_refined_pickle(run: Run, student: nn.Module) -> None:
    """Write a published pickle of the student again, with the refined weights."""
    file = run.recipe.files.student
    if file is None or not files.is_pickle(file.path):
        return
    try:
        written = generators.save_refined(file.path, run.folder.refined_pickle, student)
    except UserError as error:
        _log.warning("no refined.pkl: %s", error)
        return
    _log.info(
        "%s: %s refined, all else as it was", run.folder.refined_pickle, " and ".join(written)
    )


def _meet_teacher(run: Run) -> None:
    """Add the statistics of the teacher's own samples to the components, if the recipe asks."""
    run.components = with_teacher_samples(run.components, run.recipe, run.folder, run.world)


def _starts_from_noise(run: Run) -> bool:
    """Return whether student and teacher make images from the same latents."""
    latents = getattr(run.original, "latent_shape", None)
    return latents == getattr(run.components.teacher, "image_shape", ())
