"""The training loop: iterations, and after each one: stats, evaluation, checkpoint, stop, rollback.

One iteration is in step.py. The loop knows neither networks nor losses: those are the objective's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from core import distributed
from core.distributed import World, any_rank
from core.errors import EvaluationCancelled, UserError
from core.roles import Networks, Objective
from core.run_folder import RunFolder
from core.run_log import Divergence, EarlyStop
from training import checkpoint, fsdp
from training.checkpoint import WatchedMetric
from training.compilation import compiled_networks
from training.config import Config
from training.divergence import Diverged, DivergenceMonitor, roll_back
from training.progress import Progress
from training.schedule import Every
from training.state import TrainState
from training.step import training_iteration, wrap_for_ranks

Evaluate = Callable[[TrainState], Mapping[str, float]]
"""From the state to its metrics, on every rank. Raises EvaluationCancelled on all of them."""
_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass
class Trainer:
    """The training of one run: `train` goes on from the state, which it changes in place."""

    state: TrainState
    objective: Objective
    config: Config
    folder: RunFolder = field(kw_only=True)
    world: World = field(kw_only=True)
    evaluate: Evaluate | None = field(default=None, kw_only=True)
    """Called when due and after the last iteration; a cancelled one is made up for on resuming."""
    evaluate_every_kimg: float = field(default=0.0, kw_only=True)
    """Thousands of images between evaluations; 0: only after the last iteration."""
    watched: WatchedMetric | None = field(default=None, kw_only=True)
    """The metric that tells divergence, early stop and the best checkpoint; None: nothing does."""
    stop_requested: Callable[[], bool] = field(default=lambda: False, kw_only=True)
    """Asked after each iteration; True on any rank saves the state and raises Interrupted."""
    progress: Progress = field(init=False, repr=False)
    writer: checkpoint.Writer = field(init=False, repr=False)
    monitor: DivergenceMonitor = field(init=False, repr=False)

    def train(self) -> TrainState:
        """Return the state after the last image.

        Raises Diverged before weights go bad, unless the run rolls back to an earlier checkpoint,
        and Interrupted with the state saved.
        """
        _check_config(self.config, self.world, evaluates=self.evaluate_every_kimg > 0)
        with self._prepared_networks() as networks:
            self.resume()
            while not self.is_finished:
                try:
                    for stats in training_iteration(
                        self.state, self.objective, self.config, trained=networks, world=self.world
                    ):
                        self.progress.add(stats)
                    self.after_iteration()
                except Diverged as error:
                    self.roll_back(error)
            self.writer.wait()
            self.log_early_stop()
        return self.state

    @contextmanager
    def _prepared_networks(self) -> Iterator[Networks]:
        """Yield the networks sharded, compiled and wrapped; open progress, writer and monitor."""
        config, state = self.config, self.state
        sharded_teacher = [state.networks.teacher] if "teacher" in config.shard else []
        self.monitor = self._new_monitor()
        with (
            fsdp.sharding(sharded_teacher, self.world),
            compiled_networks(state.networks, config.compile, self.world.device) as networks,
            Progress(
                self.folder,
                self.world,
                images_seen=state.images_seen,
                total_images=config.total_images,
                tensorboard=config.tensorboard,
            ) as self.progress,
            checkpoint.Writer(
                self.folder, config.keep, watched=self.watched, is_main=self.world.is_main
            ) as self.writer,
        ):
            yield wrap_for_ranks(networks, state, self.world)

    @property
    def is_finished(self) -> bool:
        """Whether all images were seen, or the run stops early."""
        return self.state.images_seen >= self.config.total_images or self.stops_early

    @property
    def stops_early(self) -> bool:
        """Whether the watched metric has not improved for as long as early_stop_kimg allows."""
        limit = self.config.early_stop_kimg
        return limit is not None and self.monitor.images_since_best() >= round(limit * 1000)

    def resume(self) -> None:
        """Restore learning rates after a rollback, and make up a missing evaluation.

        A run whose checkpoint turns out to be diverged rolls back to the one before it.
        """
        self.state.lr_scale = self.monitor.lr_scale
        try:
            self._make_up_evaluation()
            no_checkpoint = distributed.broadcast_from_main(
                checkpoint.newest(self.folder) is None, self.world
            )
            if no_checkpoint and not self.monitor.is_spent:
                self.writer.save(self.state)  # so that there is a checkpoint to roll back to
        except Diverged as error:
            if self.world.is_main and not self.monitor.is_spent:
                checkpoint.drop_newest(self.folder)
            distributed.barrier(self.world)
            self.roll_back(error)

    def _make_up_evaluation(self) -> None:
        """Evaluate now if a request to stop cancelled the evaluation that was due here."""
        now = self.state.images_seen
        was_due = now > 0 and self._evaluation_is_due(now)
        if not was_due or not self.monitor.evaluated_until < now < self.config.total_images:
            return
        try:
            scores = self._evaluate()
        except EvaluationCancelled:
            return
        if self.config.keep.best:
            self.writer.save(self.state, scores=scores)

    def after_iteration(self) -> None:
        """Log, evaluate and save when due. Raises Diverged and Interrupted."""
        now = self.state.images_seen
        before, is_last = now - self.config.batch_size, now >= self.config.total_images
        stops = any_rank(self.stop_requested(), self.world) and not is_last

        # log the means since the last row
        if is_last or stops or Every.kimg(self.config.stats_every_kimg).due(before, now):
            self.monitor.add_stats(now, self.progress.log(now))

        # evaluate; a cancelled evaluation means a request to stop
        scores: Mapping[str, float] = {}
        if is_last or (self._evaluation_is_due(now) and not stops):
            try:
                scores = self._evaluate_or_save()
            except EvaluationCancelled:
                stops = True

        # save
        is_due = Every.kimg(self.config.checkpoint_every_kimg).due(before, now)
        is_due = is_due or (self.config.keep.best and self._is_best(now, scores))
        if is_last or stops or is_due or self.stops_early:
            self.writer.save(self.state, scores=scores)
        if stops:
            self._wait_for_writer()
            raise Interrupted

    def roll_back(self, error: Diverged) -> None:
        """Go on from an earlier checkpoint. Raises the error if the settings forbid it."""
        self._wait_for_writer()
        rollback = roll_back(
            self.state,
            error,
            self.monitor,
            folder=self.folder,
            keep=self.config.keep,
            world=self.world,
        )

        # forbidden: log the end
        if rollback is None:
            if self.world.is_main:
                self.folder.log.append(
                    Divergence(images_seen=self.state.images_seen, why=error.why)
                )
            raise error

        # from here on, judge and show by the shortened log
        self.monitor = self._new_monitor()
        self.progress.restart(self.state.images_seen)

    def log_early_stop(self) -> None:
        """Log why the run ended early, if it did."""
        now, watched, best = self.state.images_seen, self.monitor.watched, self.monitor.best
        if not self.world.is_main or watched is None or best is None or not self.stops_early:
            return
        if self.folder.log.last(EarlyStop, images_seen=now) is not None:
            return  # an earlier process did
        _log.info(
            "ends early, after %d images: %s was best after %d images, %.4g",
            *(now, watched.name, best.images_seen, best.value),
        )
        self.folder.log.append(
            EarlyStop(
                images_seen=now,
                metric=watched.name,
                value=best.value,
                at_images_seen=best.images_seen,
            )
        )

    def _is_best(self, now: int, scores: Mapping[str, float]) -> bool:
        """Return whether the state was evaluated, and is the best so far."""
        best = self.monitor.best
        return bool(scores) and best is not None and best.images_seen == now

    def _evaluation_is_due(self, now: int) -> bool:
        return Every.kimg(self.evaluate_every_kimg).due(now - self.config.batch_size, now)

    def _evaluate_or_save(self) -> Mapping[str, float]:
        """Return the metrics; an error while evaluating does not cost the training before it."""
        try:
            return self._evaluate()
        except (Diverged, EvaluationCancelled):
            raise
        except Exception:
            if not self.config.shard:  # saving shards needs all ranks, and this one may be alone
                self.writer.save(self.state)
            raise

    def _evaluate(self) -> Mapping[str, float]:
        """Return the metrics of the state, the same on all ranks, after logging them.

        Raises Diverged if they are far worse than at the start, and EvaluationCancelled.
        """
        if self.evaluate is None:
            return {}
        now = self.state.images_seen
        scores = distributed.broadcast_from_main(dict(self.evaluate(self.state)), self.world)
        self.progress.add_evaluation(now, scores)
        self.monitor.add_evaluation(now, scores)
        return scores

    def _wait_for_writer(self) -> None:
        """Wait on all ranks for the pending checkpoint, so that no rank ends before it."""
        self.writer.wait()
        distributed.barrier(self.world)

    def _new_monitor(self) -> DivergenceMonitor:
        """Return a monitor of the log so far, the same on all ranks."""
        rows = distributed.broadcast_from_main(
            self.folder.log.rows() if self.world.is_main else [], self.world
        )
        return DivergenceMonitor(self.config.divergence, rows, watched=self.watched)


def _check_config(config: Config, world: World, *, evaluates: bool) -> None:
    """Raise UserError for settings that this many processes or this recipe cannot serve."""
    if config.batch_size < world.size:
        raise UserError(
            f"training.batch_size is {config.batch_size}, fewer than the {world.size} processes: "
            "start fewer, or make it larger"
        )

    # FSDP runs the networks equally often in all processes
    size = config.micro_batch_size or config.batch_size
    fewest, most = config.batch_size // world.size, -(-config.batch_size // world.size)
    if config.shard and world.size > 1 and -(-fewest // size) != -(-most // size):
        raise UserError(
            f"training.shard: networks run equally often in all processes, and shares of {fewest} "
            f"and {most} images in parts of training.micro_batch_size={size} do not: choose a "
            f"training.batch_size that is a multiple of {world.size}"
        )

    if config.early_stop_kimg is not None and not evaluates:
        raise UserError(
            "training.early_stop_kimg needs measurements while training: set evaluation.every_kimg "
            "and a reference, or leave it out"
        )
