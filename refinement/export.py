"""The weights that a run exports: its best ones, its last ones, or those of any kept checkpoint."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict
from pathlib import Path

import generators
from core import distributed
from core.errors import UserError
from core.roles import Denoiser, Generator
from core.run_folder import RunFolder
from core.run_log import Evaluation, of_kind
from pretrained import files, networks
from refinement import build_report
from refinement.run import Run
from training import checkpoint

_log = logging.getLogger(__name__)


def chosen(run: Run, at: str) -> Path | None:
    """Return the checkpoint of these weights; None: those of the state are meant.

    at: best, last, or a number of images. Raises UserError that lists the checkpoints if there is
    none of so many. All ranks call it; the main one chooses.
    """
    path = _chosen(run, at) if run.world.is_main else None
    return distributed.broadcast_from_main(path, run.world)


def student_at(run: Run, path: Path | None) -> tuple[Generator | Denoiser, int]:
    """Return the averaged student of a checkpoint, or of the state, and the images it has seen."""
    student, images_seen = copy.deepcopy(run.state.student_ema), run.state.images_seen
    if path is not None:
        images_seen = checkpoint.restore_average(student, path)
    assert isinstance(student, Generator | Denoiser), type(student)
    if isinstance(student, Generator):
        student.update_w_avg()
    return student, images_seen


def write(run: Run, student: Generator | Denoiser, images_seen: int, folder: RunFolder) -> None:
    """Write the weights, and the pickle that the student came from with these weights in it."""
    provenance = {
        "refined_from": asdict(build_report.file_of(run.recipe.student, run.recipe.files.student)),
        "images_seen": images_seen,
    }
    networks.save(folder.student, student, provenance=provenance)
    _save_refined_pickle(run, student, folder.refined_pickle)


def _chosen(run: Run, at: str) -> Path | None:
    if at == "last":
        return None
    if at == "best":
        return _better_than_state(run)
    kept = {str(int(path.stem)): path for path in checkpoint.kept(run.folder)}
    if at not in kept:
        raise UserError(
            f"--at {at}: {run.folder.checkpoints} has best, last and the checkpoints after "
            f"{', '.join(kept) or 'no'} images"
        )
    return kept[at]


def _better_than_state(run: Run) -> Path | None:
    """Return the best checkpoint by the watched metric, unless the state is as good."""
    watched = run.recipe.watched_metric
    path = checkpoint.best(run.folder, watched)
    if path is None:
        return None
    curve = {
        row.images_seen: row.means[watched.name]
        for row in of_kind(run.folder.log.rows(), Evaluation)
        if row.when == "training" and watched.name in row.metrics
    }
    best, last = curve.get(int(path.stem)), curve.get(run.state.images_seen)
    if best is None or int(path.stem) >= run.state.images_seen:
        return None
    if last is not None and (last >= best if watched.highest else last <= best):
        return None
    return path


def _save_refined_pickle(run: Run, student: Generator | Denoiser, path: Path) -> None:
    """Write the user's own pickle or checkpoint again, with the refined weights."""
    file = run.recipe.files.student
    if file is None:
        return
    if files.is_torch_checkpoint(file.path):
        path = path.with_suffix(".pt")
    elif not files.is_pickle(file.path):
        return
    try:
        written = generators.save_refined(
            file.path, path, student, g_ema_only=run.recipe.training.refined_pickle == "G_ema"
        )
    except UserError as error:
        _log.warning("no %s: %s", path.name, error)
        return
    _log.info(
        "%s: %s refined (averaged weights; a D beside them is the old one), all else as it was",
        *(path, " and ".join(written)),
    )
