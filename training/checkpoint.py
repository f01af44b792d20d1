"""A state on the disk: written whole or not at all, checked and read back bit for bit."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch

from core import distributed
from core.distributed import World
from core.errors import UserError
from core.run_folder import RunFolder, atomic_write
from training._seal import damage, seal
from training.state import TrainState

_log = logging.getLogger(__name__)
_KEPT = 2
_DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
)
"""What reading bytes that are no whole checkpoint of this run can raise."""


def save(state: TrainState, folder: RunFolder) -> Path:
    """Return the path of the checkpoint of this state, after writing it; the newest two are kept.

    Raises UserError where the disk refuses; earlier checkpoints are then untouched.
    """
    path = folder.checkpoints / f"{state.images_seen:012d}.pt"
    folder.flush_readings()
    with atomic_write(path) as partial:
        torch.save(_content(state), partial)
        seal(partial, {})
    for old in _all(folder)[:-_KEPT]:
        old.unlink()
    return path


def newest(folder: RunFolder) -> Path | None:
    """Return the path of the newest checkpoint, or None where there is none yet."""
    return next(reversed(_all(folder)), None)


def images_saved(folder: RunFolder) -> int:
    """Return how many images the newest checkpoint has seen; 0 where there is none."""
    path = newest(folder)
    return 0 if path is None else int(path.stem)


def restore_newest(state: TrainState, folder: RunFolder, world: World) -> Path | None:
    """Return the path of the newest whole checkpoint, after setting the state to it; None where
    there is none yet.

    Those that are damaged are named in the log and set aside (NAME.pt.damaged). All ranks call it;
    the main one chooses. Raises UserError where none is whole, or where the newest does not fit.
    """
    path = distributed.from_main(_newest_whole(folder) if world.is_main else None, world)
    if path is not None:
        restore(state, path)
    return path


def restore(state: TrainState, path: Path) -> None:
    """Set the state to what a checkpoint holds.

    Raises UserError where the file is damaged (the state is then as it was) or does not fit (the
    state is then of no more use).
    """
    wrong = damage(path)
    if wrong is not None:
        raise UserError(f"{path} is damaged: {wrong}; delete it to go on from the one before")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state.networks.student.load_state_dict(content["student"])
        state.networks.score.load_state_dict(content["score"])
        state.student_ema.load_state_dict(content["student_ema"])
        for name, optimizer in state.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        state.images_seen = content["images_seen"]
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged or of another run ({type(error).__name__}); "
            "delete it to go on from the one before"
        ) from error


def _newest_whole(folder: RunFolder) -> Path | None:
    """Return the newest whole checkpoint, after setting aside those after it."""
    damaged: list[Path] = []
    for path in reversed(_all(folder)):
        wrong = damage(path)
        if wrong is None:
            break
        _log.warning("%s is damaged: %s", path, wrong)
        damaged.append(path)
    else:
        if damaged:
            raise UserError(
                f"{folder.checkpoints}: none of its {len(damaged)} checkpoints is whole; bring one "
                "back from a copy, or begin a new run"
            )
        return None
    for each in damaged:
        with suppress(OSError):  # to read is enough for a report
            each.rename(each.with_name(f"{each.name}.damaged"))
        _log.warning("%s, the checkpoint before it, is used", path.name)
    return path


def _content(state: TrainState) -> dict[str, object]:
    return {
        "images_seen": state.images_seen,
        "student": state.networks.student.state_dict(),
        "score": state.networks.score.state_dict(),
        "student_ema": state.student_ema.state_dict(),
        "optimizers": {name: value.state_dict() for name, value in state.optimizers.items()},
    }


def _all(folder: RunFolder) -> list[Path]:
    return sorted(folder.checkpoints.glob("*.pt"))
