"""Divergence: the criteria by which a run counts as diverged, and the rollback to a checkpoint.

A loss or gradient that is not finite is caught by the iteration itself, before weights change. The
criteria here show later: stats far outside the range of earlier rows, and a metric much worse than
at the start. Both are checked when the numbers reach the host anyway: at a row of stats, at an
evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from statistics import median
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from core import distributed
from core.config import Section
from core.distributed import World
from core.errors import UserError
from core.run_folder import RunFolder
from core.run_log import Evaluation, Rollback, Row, Stats, of_kind
from training import checkpoint
from training.checkpoint import WatchedMetric
from training.state import TrainState

_log = logging.getLogger(__name__)
_FEWEST_ROWS = 10
"""Rows of stats that a running median needs."""


class DivergenceConfig(Section):
    """Criteria of divergence, and the reaction to it."""

    renamed: ClassVar[Mapping[str, str]] = {"reading_factor": "stats_factor"}

    action: Literal["stop", "rollback"] = "stop"
    """stop: end with an error, all checkpoints stay; rollback: go on from the checkpoint that
    keep.best keeps, or else the newest, at lower learning rates.
    """
    stats_factor: float | None = Field(default=100.0, gt=1)
    """A loss or gradient norm above this factor times its running median counts as diverged. null:
    only one that is not finite does.
    """
    window_rows: int = Field(default=50, ge=_FEWEST_ROWS)
    """Rows of stats.jsonl in the running median."""
    metric_factor: float | None = Field(default=10.0, gt=1)
    """The watched metric (training.watch), worse than at the start by more than
    this factor counts as diverged. null: no value of it does.
    """
    max_rollbacks: int = Field(default=3, ge=1)
    """Rollbacks after which the run stops instead."""
    lr_factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor of both learning rates at each rollback."""


class Diverged(UserError):
    """Training diverged; earlier checkpoints are intact."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}. {remedy}")
        self.why = why


class Score(NamedTuple):
    """The watched metric at one evaluation."""

    images_seen: int
    value: float


class DivergenceMonitor:
    """Checks stats and evaluations against the earlier ones of the run.

    Its state follows from the log's rows alone, so that a resumed run and all ranks judge alike.
    """

    def __init__(
        self, config: DivergenceConfig, rows: Sequence[Row], *, watched: WatchedMetric | None
    ) -> None:
        self.config, self.watched = config, watched
        self.rollbacks = of_kind(rows, Rollback)
        self._stats = [row.values for row in of_kind(rows, Stats)]
        self.curve: list[Score] = []
        """The watched metric at every evaluation while training."""
        self.evaluated_until = -1
        """Images seen at the last evaluation; -1 before the first."""
        for row in of_kind(rows, Evaluation):
            if row.when == "training":
                self._add_score(row.images_seen, row.means)

    @property
    def lr_scale(self) -> float:
        """Learning-rate factor after all rollbacks; 1 without any."""
        return self.rollbacks[-1].lr_scale if self.rollbacks else 1.0

    @property
    def is_spent(self) -> bool:
        """Whether the run stops at the next divergence instead of rolling back."""
        config = self.config
        return config.action == "stop" or len(self.rollbacks) >= config.max_rollbacks

    @property
    def best(self) -> Score | None:
        """The best evaluation so far, the first of equals."""
        if self.watched is None or not self.curve:
            return None
        choose = max if self.watched.highest else min
        return choose(self.curve, key=lambda score: score.value)

    def images_since_best(self) -> int:
        """Return the images seen since the best evaluation; 0 without evaluations."""
        best = self.best
        return 0 if best is None else self.curve[-1].images_seen - best.images_seen

    def add_stats(self, images_seen: int, means: Mapping[str, float]) -> None:
        """Take a row of stats into the running medians.

        Raises Diverged if a value is more than stats_factor times its median.
        """
        factor, earlier = self.config.stats_factor, self._stats[-self.config.window_rows :]
        self._stats = [*earlier, dict(means)]

        # each value against its own median
        for name, value in means.items():
            history = [abs(row[name]) for row in earlier if name in row]
            if factor is None or len(history) < _FEWEST_ROWS:
                continue
            usual = median(history)
            if 0 < factor * usual < abs(value):
                raise Diverged(
                    f"after {images_seen} images {name} is {value:.4g}, {abs(value) / usual:.0f} "
                    f"times its median over the last {len(history)} rows",
                    "Try a smaller training.student_lr and training.score_lr, a "
                    "training.gradient_clip, or training.divergence.action=rollback; or, if that "
                    "is as it should be, a larger training.divergence.stats_factor",
                )

    def add_evaluation(self, images_seen: int, scores: Mapping[str, float]) -> None:
        """Take an evaluation into the curve.

        Raises Diverged if the watched metric is worse than the first by metric_factor.
        """
        self._add_score(images_seen, scores)
        factor, watched = self.config.metric_factor, self.watched
        if factor is None or watched is None or watched.name not in scores:
            return
        first, last = self.curve[0].value, self.curve[-1].value
        better, worse = (last, first) if watched.highest else (first, last)
        if first > 0 and factor * better < worse:
            raise Diverged(
                f"after {images_seen} images {watched.name} is {last:.4g}, and was {first:.4g} "
                "at the start",
                "Try a smaller training.student_lr, or training.divergence.action=rollback; or, if "
                "that is as it should be, a larger training.divergence.metric_factor",
            )

    def _add_score(self, images_seen: int, scores: Mapping[str, float]) -> None:
        self.evaluated_until = images_seen
        if self.watched is not None and self.watched.name in scores:
            self.curve.append(Score(images_seen, scores[self.watched.name]))


def roll_back(
    state: TrainState,
    error: Diverged,
    monitor: DivergenceMonitor,
    *,
    folder: RunFolder,
    keep: checkpoint.Retention,
    world: World,
) -> Rollback | None:
    """Restore the best intact checkpoint, drop everything later, and return the logged row.

    None if settings or the lack of a checkpoint forbid it. All ranks call it, with no checkpoint
    being written.
    """
    # the checkpoint, if settings and folder allow one
    if monitor.is_spent:
        return None
    path = distributed.broadcast_from_main(
        checkpoint.best_intact(folder, keep, monitor.watched) if world.is_main else None, world
    )
    if path is None:
        return None

    # the row of the log, then the state
    rollback = Rollback(
        images_seen=int(path.stem),
        why=error.why,
        from_images_seen=state.images_seen,
        lr_scale=monitor.lr_scale * monitor.config.lr_factor,
    )
    if world.is_main:
        checkpoint.drop_after(path, folder)
        folder.log.keep_until(rollback.images_seen, then=[rollback])
        _log.warning(
            "%s; back to %s, learning rates times %.4g", error.why, path, rollback.lr_scale
        )
    checkpoint.restore(state, path)
    state.lr_scale = rollback.lr_scale
    return rollback
