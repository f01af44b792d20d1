"""A run that is opened again: its input files are those that it began with, and of its recipe only
settings change that leave earlier measurements and training as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from core import distributed
from core.disk import atomic_write, parsed_json
from core.distributed import World
from core.errors import UserError
from core.file import File
from core.run_folder import RunFolder
from data.images import Images
from refinement.recipe import Recipe

CHANGEABLE = (
    "training.duration_kimg",
    "training.stats_every_kimg",
    "training.checkpoint_every_kimg",
    "training.keep",
    "training.watch",
    "training.export",
    "training.refined_pickle",
    "training.early_stop_kimg",
    "training.divergence",
    "training.tensorboard",
    "evaluation.every_kimg",
    "evaluation.batch_size",
    "evaluation.pairs",
    "device",
)
"""Settings of a run that may be others when it goes on; those below them too."""


def check_changes(overrides: Sequence[str]) -> None:
    """Raise UserError for a setting that a run cannot change."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE):
            continue
        way_out = "begin a new run for it"
        if key.startswith("evaluation."):
            way_out = "measure the run's weights with python -m eval for it"
        raise UserError(
            f"{key}: a run that has begun keeps this setting: {way_out}. A run can change "
            f"{', '.join(CHANGEABLE)}"
        )


def with_paths(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Return a run's recipe, whose files are also found where they were when it began."""
    began = _began_with(folder) if folder.inputs.exists() else {}
    return recipe.begun_with({about["name"]: about["path"] for about in began.values()})


def check_inputs(recipe: Recipe, folder: RunFolder, world: World) -> None:
    """Note the run's input files with their SHA-256 when it begins; compare them later.

    Raises UserError on all ranks if one of them has another content.
    """
    wrong = _difference(recipe, folder) if world.is_main else None
    if wrong := distributed.broadcast_from_main(wrong, world):
        raise UserError(wrong)


def _difference(recipe: Recipe, folder: RunFolder) -> str | None:
    files = recipe.files
    named = {
        "student": files.student,
        "teacher": files.teacher,
        "images": files.images,
        "reference": files.reference,
        "teacher's samples": files.teacher_samples,
    }
    now = {role: _about(file) for role, file in named.items() if file is not None}
    if not folder.inputs.exists():
        with atomic_write(folder.inputs) as partial:
            partial.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return None

    # compare contents; a file may have moved
    began = _began_with(folder)
    for role, about in now.items():
        if role in began and began[role]["sha256"] != about["sha256"]:
            return (
                f"the run began with another {role}: {began[role]['path']} of SHA-256 "
                f"{began[role]['sha256'][:12]}…, and {about['path']} has "
                f"{about['sha256'][:12]}…: bring that file back, or begin a new run"
            )
    return None


def _began_with(folder: RunFolder) -> dict[str, dict[str, str]]:
    """Return what a run notes of its input files. Raises UserError if the note is damaged."""
    try:
        noted = parsed_json(folder.inputs.read_text(encoding="utf-8"))
        keys = ("name", "path", "sha256")
        return {role: {key: str(about[key]) for key in keys} for role, about in noted.items()}
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{folder.inputs} is damaged ({error!r}): bring it back from a copy, or delete it"
        ) from error


def _about(file: File) -> dict[str, str]:
    """Return name, absolute path and SHA-256 of a file; of a folder, that of its images."""
    path = Path(file.path).absolute()
    sha256 = file.sha256 or Images(path).sha256
    return {"name": file.shown, "path": str(path), "sha256": sha256}
