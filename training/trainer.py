"""The training loop: rounds, one after the other, and what is due between them: readings,
measurements, checkpoints, stopping, going back.

What a round is stands in rounds.py. Left out: everything about what is learned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core import distributed
from core.distributed import World, any_rank
from core.errors import UserError
from core.roles import Objective
from core.run_folder import RunFolder
from training import checkpoint, fsdp
from training.compilation import compiled
from training.config import Config
from training.divergence import Diverged, Score, Watch, go_back
from training.progress import Status
from training.schedule import Every
from training.state import TrainState
from training.step import play_round, wrapped

Measure = Callable[[TrainState], Mapping[str, float] | None]
"""From the state to its metrics; None, on all ranks, where a request to stop cut that short."""
_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


def train(
    state: TrainState,
    objective: Objective,
    config: Config,
    *,
    folder: RunFolder,
    world: World,
    measure: Measure | None = None,
    measure_every_kimg: float = 0.0,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Return the state after the last image; it is trained in place.

    measure: called on every rank when due and after the last round; what it gives up is measured
    when the run is resumed. stop_requested: asked after each round; if it says so on any rank, the
    state is saved and Interrupted raised. Raises Diverged before weights go bad, unless the run
    goes back to an earlier state and on from there.
    """
    _refuse_what_cannot_be(config, world, measures=measure_every_kimg > 0)
    total = config.total_images
    in_parts = [state.networks.teacher] if "teacher" in config.shard else []
    with (
        fsdp.sharded(in_parts, world),
        compiled(state.networks, config.compile, world.device) as networks,
        Status(
            folder,
            world,
            images_seen=state.images_seen,
            total_images=total,
            tensorboard=config.tensorboard,
        ) as status,
        checkpoint.Writer(folder, config.keep, is_main=world.is_main) as writer,
    ):
        run = _Run(
            state,
            config,
            folder,
            world,
            status,
            writer,
            _watch(config, folder, world),
            measure,
            Every.kimg(measure_every_kimg),
        )
        trained = wrapped(networks, state, world)
        try:
            run.begin()
        except Diverged as diverged:
            run.drop_newest()
            run.go_back(diverged)
        while state.images_seen < total and not run.is_over_early:
            try:
                for readings in play_round(state, objective, config, trained=trained, world=world):
                    status.add(readings)
                run.after_round(stop_requested)
            except Diverged as diverged:
                run.go_back(diverged)
        writer.wait()
        run.say_what_was_best()
    return state


@dataclass
class _Run:
    """What happens between the rounds of a run."""

    state: TrainState
    config: Config
    folder: RunFolder
    world: World
    status: Status
    writer: checkpoint.Writer
    watch: Watch
    measure: Measure | None
    measuring: Every

    @property
    def is_over_early(self) -> bool:
        """Return whether the metric has not improved for as long as the settings allow."""
        limit = self.config.early_stop_kimg
        return limit is not None and self.watch.images_since_best() >= round(limit * 1000)

    def begin(self) -> None:
        """Bring to where it stood what a checkpoint does not hold: learning rates after a rollback,
        and a measurement that a request to stop left out.
        """
        self.state.lr_scale = self.watch.lr_scale
        now, total = self.state.images_seen, self.config.total_images
        was_due = now > 0 and self.measuring.due(now - self.config.batch_size, now)
        if was_due and self.watch.measured_until < now < total:
            scores = self._measured()
            if self.config.keep.best is not None and scores is not None:
                self.writer.save(self.state, scores=scores)
        has_none = distributed.from_main(checkpoint.newest(self.folder) is None, self.world)
        if has_none and not self.watch.is_spent:
            self.writer.save(self.state)  # so that there is somewhere to go back to

    def after_round(self, stop_requested: Callable[[], bool]) -> None:
        """Show, measure and save what is due. Raises Diverged and Interrupted."""
        now, total = self.state.images_seen, self.config.total_images
        before, last = now - self.config.batch_size, now >= total
        stop = any_rank(stop_requested(), self.world) and not last
        if last or stop or Every.kimg(self.config.readings_every_kimg).due(before, now):
            self.watch.row(now, self.status.row(now))
        scores: Mapping[str, float] | None = {}
        if last or (self.measuring.due(before, now) and not stop):
            scores = self._measured_or_saved()
        stop = stop or scores is None
        saves = Every.kimg(self.config.checkpoint_every_kimg).due(before, now)
        if last or stop or saves or self.is_over_early:
            self.writer.save(self.state, scores=scores or {})
        if stop:
            self.wait_for_writing()
            raise Interrupted

    def drop_newest(self) -> None:
        """Remove the checkpoint that a resumed run began from, which was found to be bad, where the
        run is to go back to one before it.
        """
        if self.world.is_main and not self.watch.is_spent:
            checkpoint.drop_newest(self.folder)
        distributed.barrier(self.world)

    def go_back(self, diverged: Diverged) -> None:
        """Go on from an earlier checkpoint. Raises Diverged where that is not to be."""
        self.wait_for_writing()
        done = go_back(
            self.state,
            diverged,
            self.watch,
            folder=self.folder,
            keep=self.config.keep,
            world=self.world,
        )
        if done is None:
            if self.world.is_main:
                row = {"images_seen": self.state.images_seen, "diverged": {"why": diverged.why}}
                self.folder.append_reading(row)
            raise diverged
        self.watch = _watch(self.config, self.folder, self.world)
        self.status.begin_again(self.state.images_seen)

    def wait_for_writing(self) -> None:
        """Wait, on all ranks, until what was begun is on the disk: no rank then ends before it."""
        self.writer.wait()
        distributed.barrier(self.world)

    def say_what_was_best(self) -> None:
        """Write down why the run ended early, and that a checkpoint is better than its end."""
        if not self.world.is_main:
            return
        now, curve = self.state.images_seen, self.watch.curve
        rows = self.folder.read_readings()
        if not curve or any("early_stop" in row or "best" in row for row in rows):
            return
        if self.is_over_early and self.watch.best is not None:
            known = self._known(self.watch.best)
            _log.info("ends early, after %d images: %s", now, _in_words(known))
            self.folder.append_reading({"images_seen": now, "early_stop": known})
        path = checkpoint.best(self.folder, self.config.keep)
        kept = [] if path is None else [s for s in curve if s.images_seen == int(path.stem)]
        if path is not None and kept and self.watch.is_better(kept[-1], curve[-1]):
            known = {**self._known(kept[-1]), "checkpoint": path.name}
            _log.info("%s is better than the end: %s", path, _in_words(known))
            self.folder.append_reading({"images_seen": now, "best": known})

    def _known(self, score: Score) -> dict[str, object]:
        return {
            "metric": self.watch.metric,
            "value": score.value,
            "at_images_seen": score.images_seen,
        }

    def _measured_or_saved(self) -> Mapping[str, float] | None:
        """Return what is measured now; what goes wrong there does not cost what was trained."""
        try:
            return self._measured()
        except Diverged:
            raise
        except Exception:
            if not self.config.shard:  # else all ranks would have to be here
                self.writer.save(self.state)
            raise

    def _measured(self) -> Mapping[str, float] | None:
        """Return what is measured now, the same on all ranks, after writing it down; None where it
        was given up. Raises Diverged.
        """
        if self.measure is None:
            return {}
        now, found = self.state.images_seen, self.measure(self.state)
        if found is None:
            return None
        scores = distributed.from_main(dict(found), self.world)
        self.status.measured(now, scores)
        self.watch.measured(now, scores)
        return scores


def _watch(config: Config, folder: RunFolder, world: World) -> Watch:
    """Return what the readings say, the same on all ranks."""
    rows = distributed.from_main(folder.read_readings() if world.is_main else [], world)
    keep = config.keep
    return Watch(
        config.divergence, rows, metric=keep.best or "fid", highest=keep.best_is == "highest"
    )


def _refuse_what_cannot_be(config: Config, world: World, *, measures: bool) -> None:
    if config.batch_size < world.size:
        raise UserError(
            f"training.batch_size is {config.batch_size}, fewer than the {world.size} processes: "
            "start fewer, or make it larger"
        )
    size = config.micro_batch_size or config.batch_size
    fewest, most = config.batch_size // world.size, -(-config.batch_size // world.size)
    if config.shard and world.size > 1 and -(-fewest // size) != -(-most // size):
        raise UserError(
            f"training.shard: networks run equally often in all processes, and shares of {fewest} "
            f"and {most} images in parts of training.micro_batch_size={size} do not: choose a "
            f"training.batch_size that is a multiple of {world.size}"
        )
    if config.early_stop_kimg is not None and not measures:
        raise UserError(
            "training.early_stop_kimg needs measurements while training: set evaluation.every_kimg "
            "and a reference, or leave it out"
        )


def _in_words(known: Mapping[str, object]) -> str:
    return (
        f"{known['metric']} was best after {known['at_images_seen']} images, {known['value']:.4g}"
    )
