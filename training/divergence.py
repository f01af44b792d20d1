"""Divergence: when a run counts as diverged, and how it goes back to where it was sound.

A loss or gradient that is not finite is caught by the loop, before weights change. What is noticed
here takes longer to show: readings far outside the range of those before them, and a metric much
worse than at the start. Both are looked at where they reach the host anyway, when a row of readings
or a measurement is due.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal, NamedTuple, cast

from pydantic import Field

from core import distributed
from core.config import Section
from core.distributed import World
from core.errors import UserError
from core.run_folder import RunFolder
from training import checkpoint
from training.state import TrainState

_log = logging.getLogger(__name__)
Reading = Mapping[str, object]
_FEWEST_ROWS = 10
"""Rows of readings before which no range is known."""
_NO_READINGS = frozenset(("images_seen", "images_per_second"))


class DivergenceConfig(Section):
    """When a run counts as diverged, and what is done then."""

    action: Literal["stop", "rollback"] = "stop"
    """stop: end with an error, all checkpoints stay; rollback: go on from the checkpoint that
    keep.best keeps, or else the newest, at lower learning rates.
    """
    reading_factor: float | None = Field(default=100.0, gt=1)
    """A loss or gradient norm of more than this times its running median counts as diverged. null:
    only one that is not finite does.
    """
    window_rows: int = Field(default=50, ge=_FEWEST_ROWS)
    """Rows of readings.jsonl that the running median is taken over."""
    metric_factor: float | None = Field(default=10.0, gt=1)
    """The metric of keep.best, or else fid, worse than at the start by more than this factor counts
    as diverged. null: no value of it does.
    """
    max_rollbacks: int = Field(default=3, ge=1)
    """So many times a run goes back; then it stops."""
    lr_factor: float = Field(default=0.5, gt=0, lt=1)
    """What each rollback multiplies both learning rates by."""


class Diverged(UserError):
    """Training that went wrong; what was saved before it did is whole."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}. {remedy}")
        self.why = why


class Score(NamedTuple):
    """A measurement of the metric that is watched."""

    images_seen: int
    value: float


@dataclass(frozen=True)
class Rollback:
    """That a run went back: the `rollback` of a row of readings."""

    why: str
    from_images_seen: int
    to_images_seen: int
    lr_scale: float
    """What both learning rates are multiplied by from here on."""


class Watch:
    """What the readings so far say of a run; made from them alone, so that a resumed run and all
    ranks judge alike.
    """

    def __init__(
        self,
        config: DivergenceConfig,
        rows: Sequence[Reading],
        *,
        metric: str,
        highest: bool = False,
    ) -> None:
        self.config, self.metric, self.highest = config, metric, highest
        self._means = [
            cast(dict[str, float], {k: v for k, v in row.items() if k not in _NO_READINGS})
            for row in rows
            if "images_per_second" in row
        ]
        self.rollbacks = [
            Rollback(**cast(dict, row["rollback"])) for row in rows if "rollback" in row
        ]
        self.curve: list[Score] = []
        self.measured_until = -1
        """How many images had been seen at the last measurement; -1 before the first."""
        for row in rows:
            if "measured" in row:
                self._add(cast(int, row["images_seen"]), cast(dict, row["measured"]))

    @property
    def lr_scale(self) -> float:
        """Return what rollbacks have left of the learning rates: 1 where there was none."""
        return self.rollbacks[-1].lr_scale if self.rollbacks else 1.0

    @property
    def is_spent(self) -> bool:
        """Return whether the run, if it diverges, stops rather than goes back."""
        config = self.config
        return config.action == "stop" or len(self.rollbacks) >= config.max_rollbacks

    @property
    def best(self) -> Score | None:
        """Return the best measurement so far, the first of equals."""
        if not self.curve:
            return None
        return (max if self.highest else min)(self.curve, key=lambda score: score.value)

    def is_better(self, score: Score, other: Score) -> bool:
        """Return whether a score is better than another, and not as good."""
        return score.value > other.value if self.highest else score.value < other.value

    def images_since_best(self) -> int:
        """Return how many images the metric has not improved for; 0 where it is not measured."""
        best = self.best
        return 0 if best is None else self.curve[-1].images_seen - best.images_seen

    def row(self, images_seen: int, means: Mapping[str, float]) -> None:
        """Take in a row of readings. Raises Diverged where one is far above those before it."""
        factor, before = self.config.reading_factor, self._means[-self.config.window_rows :]
        self._means = [*before, dict(means)]
        for name, value in means.items():
            known = [abs(row[name]) for row in before if name in row]
            if factor is None or len(known) < _FEWEST_ROWS:
                continue
            usual = median(known)
            if 0 < factor * usual < abs(value):
                raise Diverged(
                    f"after {images_seen} images {name} is {value:.4g}, {abs(value) / usual:.0f} "
                    f"times its median over the last {len(known)} rows",
                    "Try a smaller training.student_lr and training.score_lr, a "
                    "training.gradient_clip, or training.divergence.action=rollback; or, if that "
                    "is as it should be, a larger training.divergence.reading_factor",
                )

    def measured(self, images_seen: int, scores: Mapping[str, float]) -> None:
        """Take in a measurement. Raises Diverged where it is far worse than the first one."""
        self._add(images_seen, scores)
        factor = self.config.metric_factor
        if factor is None or self.metric not in scores:
            return
        first, last = self.curve[0].value, self.curve[-1].value
        better, worse = (last, first) if self.highest else (first, last)
        if first > 0 and factor * better < worse:
            raise Diverged(
                f"after {images_seen} images {self.metric} is {last:.4g}, and was {first:.4g} "
                "at the start",
                "Try a smaller training.student_lr, or training.divergence.action=rollback; or, if "
                "that is as it should be, a larger training.divergence.metric_factor",
            )

    def _add(self, images_seen: int, scores: Mapping[str, float]) -> None:
        self.measured_until = images_seen
        if self.metric in scores:
            self.curve.append(Score(images_seen, scores[self.metric]))


def go_back(
    state: TrainState,
    diverged: Diverged,
    watch: Watch,
    *,
    folder: RunFolder,
    keep: checkpoint.Keep,
    world: World,
) -> Rollback | None:
    """Return what was done, after setting the state to a checkpoint from before it diverged and
    dropping what came after; None where the settings or the lack of a checkpoint forbid it.

    All ranks call it, with no checkpoint being written.
    """
    if watch.is_spent:
        return None
    path = distributed.from_main(
        checkpoint.soundest(folder, keep) if world.is_main else None, world
    )
    if path is None:
        return None
    scale = watch.lr_scale * watch.config.lr_factor
    done = Rollback(diverged.why, state.images_seen, int(path.stem), scale)
    if world.is_main:
        checkpoint.drop_after(path, folder)
        row = {"images_seen": done.to_images_seen, "rollback": asdict(done)}
        folder.keep_readings_until(done.to_images_seen, then=[row])
        _log.warning("%s; back to %s, learning rates times %.4g", done.why, path, scale)
    checkpoint.restore(state, path)
    state.lr_scale = scale
    return done
