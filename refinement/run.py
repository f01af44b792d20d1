"""An open run: recipe, components, folder and training state, in this process."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from core.distributed import World
from core.roles import Denoiser, Generator, Networks
from core.run_folder import RunFolder
from core.run_log import Session
from refinement.components import Components
from refinement.recipe import Recipe
from training import checkpoint
from training import state as training_state
from training.state import TrainState

_log = logging.getLogger(__name__)


def now() -> str:
    """Return the time in ISO 8601, with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass
class Run:
    """One run in its folder, with its training state."""

    recipe: Recipe
    components: Components
    folder: RunFolder
    world: World
    original: Generator | Denoiser
    """The student before any training."""
    state: TrainState
    images_before: int = 0
    """Images that the state had seen when this process opened the run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of this process's work -> how long it took."""
    started_at: str = field(default_factory=now)


def open_run(recipe: Recipe, components: Components, folder: RunFolder, world: World) -> Run:
    """Return the run at its newest checkpoint, or at its start."""
    original = copy.deepcopy(components.student).eval().requires_grad_(False)
    state = first_state(recipe, components, world)
    newest = checkpoint.restore_newest(state, folder, world)
    if newest is not None:
        _log.info("found %s: %d images seen", newest.name, state.images_seen)
    return Run(recipe, components, folder, world, original, state, state.images_seen)


def first_state(recipe: Recipe, components: Components, world: World) -> TrainState:
    """Return the state before the first image."""
    trio = Networks(
        components.student,
        copy.deepcopy(components.teacher),
        components.teacher,
        components.adapter,
    )
    settings = recipe.training
    return training_state.start(
        trio,
        student_lr=settings.student_lr,
        score_lr=settings.score_lr,
        optimizer=settings.optimizer,
        shard=settings.shard,
        world=world,
    )


@contextmanager
def timed(run: Run, part: str) -> Iterator[None]:
    """Add the duration of the body to this process's seconds, under that part's name."""
    started = time.monotonic()
    try:
        yield
    finally:
        run.seconds[part] = round(time.monotonic() - started, 1)


def log_session(run: Run) -> None:
    """Log this process's work on the run, if it did any."""
    if run.seconds and run.world.is_main:
        session = Session(
            images_seen=run.state.images_seen,
            started_at=run.started_at,
            finished_at=now(),
            seconds=run.seconds,
            images=run.state.images_seen - run.images_before,
        )
        run.folder.log.append(session)


def total_seconds(sessions: Sequence[Session]) -> dict[str, float]:
    """Return the seconds of each part of the work, over all processes that worked on the run."""
    parts = dict.fromkeys(name for session in sessions for name in session.seconds)
    return {part: sum(s.seconds.get(part, 0.0) for s in sessions) for part in parts}
