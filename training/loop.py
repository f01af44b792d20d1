"""The training loop: phases say what is trained on what, `update` draws, accumulates, checks and
steps.

The same loop serves one process and many: each rank takes its share of the global batch, draws are
functions of the global sample index, and gradients are averaged over ranks. Left out: everything
about what is learned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from core import distributed, sharding
from core.distributed import World
from core.errors import UserError
from core.precision import computing_in
from core.protocols import (
    LossOutput,
    Networks,
    Objective,
    Phase,
    TrainedNetwork,
)
from core.randomness import Draws
from core.run_folder import RunFolder
from training import checkpoint
from training.divergence import Diverged, Score, Watch, go_back
from training.schedule import Every, annealing, ema_decay, warmup
from training.settings import Config
from training.state import TrainState, follow
from training.status import Status

Measure = Callable[[TrainState], Mapping[str, float]]
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

    measure: called on every rank when due and after the last round. stop_requested: asked after
    each round; if it says so on any rank, the state is saved and Interrupted raised. Raises
    Diverged before weights go bad, unless the run goes back to an earlier state and on from there.
    """
    _refuse_what_cannot_be(config, world, measures=measure_every_kimg > 0)
    total, trained = config.total_images, wrapped(state, world)
    in_parts = [state.networks.teacher] if "teacher" in config.shard else []
    with (
        sharding.sharded(in_parts, world),
        Status(
            folder,
            world,
            images_seen=state.images_seen,
            total_images=total,
            tensorboard=config.tensorboard,
        ) as status,
        checkpoint.Writer(folder, config.keep, is_main=world.is_main) as writer,
    ):
        run = _Run(state, config, folder, world, status, writer, _watch(config, folder, world))
        run.measure, run.measuring = measure, Every.kimg(measure_every_kimg)
        run.begin()
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
    measure: Measure | None = None
    measuring: Every = field(default_factory=lambda: Every(0))

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
            if self.config.keep.best is not None:
                self.writer.save(self.state, scores=scores)
        has_none = distributed.from_main(checkpoint.newest(self.folder) is None, self.world)
        if has_none and not self.watch.is_spent:
            self.writer.save(self.state)  # so that there is somewhere to go back to

    def after_round(self, stop_requested: Callable[[], bool]) -> None:
        """Show, measure and save what is due. Raises Diverged and Interrupted."""
        now, total = self.state.images_seen, self.config.total_images
        before, last = now - self.config.batch_size, now >= total
        stop = _any(stop_requested(), self.world) and not last
        if last or stop or Every.kimg(self.config.readings_every_kimg).due(before, now):
            self.watch.row(now, self.status.row(now))
        scores: Mapping[str, float] = {}
        if last or (self.measuring.due(before, now) and not stop):
            scores = self._measured()
        saves = Every.kimg(self.config.checkpoint_every_kimg).due(before, now)
        if last or stop or saves or self.is_over_early:
            self.writer.save(self.state, scores=scores)
        if stop:
            self.wait_for_writing()
            raise Interrupted

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

    def _measured(self) -> Mapping[str, float]:
        """Return what is measured now, the same on all ranks, after writing it down. Raises
        Diverged.
        """
        if self.measure is None:
            return {}
        now = self.state.images_seen
        scores = distributed.from_main(dict(self.measure(self.state)), self.world)
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


def play_round(
    state: TrainState, objective: Objective, config: Config, *, trained: Networks, world: World
) -> Iterator[dict[str, Tensor]]:
    """Yield the readings of each update of one round; then the round is counted and averaged in."""
    networks = (trained.student, trained.score, trained.teacher)
    with computing_in(config.precision, networks):
        for phase in objective.phases:
            for repeat in range(phase.repeats_at(state.images_seen)):
                yield update(phase, repeat, state, config, trained=trained, world=world)
    _advance(state, config)


def update(
    phase: Phase,
    repeat: int,
    state: TrainState,
    config: Config,
    *,
    trained: Networks,
    world: World,
) -> dict[str, Tensor]:
    """Return the readings of one optimizer step on one global batch, after taking it.

    trained: the state's networks, wrapped so that their gradients are averaged over ranks.
    Raises Diverged where loss or gradient is not finite, before any weight changes.
    """
    learning: dict[TrainedNetwork, nn.Module] = {n: getattr(trained, n) for n in phase.trains}
    networks = replace(state.networks, **learning)
    for name in learning:
        state.optimizers[name].zero_grad(set_to_none=True)
    draws = Draws(config.seed, state.images_seen, 0, config.batch_size, world.device)
    parts = list(_micro_batches(draws.scoped(f"{phase.name}/{repeat}"), config, world))
    outputs = []
    for index, part in enumerate(parts):
        with _synchronised(learning.values(), last=index == len(parts) - 1):
            output = phase.loss(networks, part)
            (output.per_image.sum() * (world.size / config.batch_size)).backward()
        outputs.append(LossOutput(output.per_image.detach(), output.readings))
    norms = _checked_norms(phase, learning, outputs, state.images_seen, world)
    for name, network in learning.items():
        if config.gradient_clip is not None:
            clip_grads_with_norm_(network.parameters(), config.gradient_clip, norms[name])
        _set_learning_rate(state, name, config)
        state.optimizers[name].step()
    return _mean_readings(outputs) | {f"{name}_gradient": norm for name, norm in norms.items()}


def wrapped(state: TrainState, world: World) -> Networks:
    """Return the networks, those that an optimizer trains wrapped for several processes where they
    are not spread over them.
    """
    trained = {name: getattr(state.networks, name) for name in state.optimizers}
    wrapped = {
        name: network if sharding.is_sharded(network) else distributed.wrap(network, world)
        for name, network in trained.items()
    }
    return replace(state.networks, **wrapped)


def _micro_batches(draws: Draws, config: Config, world: World) -> Iterator[Draws]:
    """Yield this rank's share of the global batch in parts of at most micro_batch_size."""
    share = distributed.shard(config.batch_size, world)
    size = config.micro_batch_size or len(share)
    for start in range(share.start, share.stop, size):
        yield draws.part(start, min(start + size, share.stop))


@contextmanager
def _synchronised(networks: Iterable[nn.Module], *, last: bool) -> Iterator[None]:
    """Run the body so that gradients are averaged over ranks only in the last micro-batch."""
    with ExitStack() as stack:
        for network in networks:
            sharding.synchronise(network, last)
            if isinstance(network, DistributedDataParallel) and not last:
                stack.enter_context(network.no_sync())
        yield


def _checked_norms(
    phase: Phase,
    learning: Mapping[TrainedNetwork, nn.Module],
    outputs: list[LossOutput],
    images_seen: int,
    world: World,
) -> dict[TrainedNetwork, Tensor]:
    """Return the norm of each network's averaged gradient, all finite on every rank."""
    norms: dict[TrainedNetwork, Tensor] = {n: _gradient_norm(net) for n, net in learning.items()}
    loss = distributed.mean(torch.cat([output.per_image for output in outputs]).mean(), world)
    if not torch.isfinite(sum(norms.values(), loss)):
        shown = " and ".join(f"{float(norm):.4g} ({name})" for name, norm in norms.items())
        raise Diverged(
            f"the {phase.name} phase gave a loss of {float(loss):.4g} and a gradient of norm "
            f"{shown} after {images_seen} images; no weight was changed by it",
            "Try a smaller training.student_lr and training.score_lr (each network learns from the "
            "other), a training.warmup_kimg, or a training.gradient_clip",
        )
    return norms


def _gradient_norm(network: nn.Module) -> Tensor:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return sharding.whole(get_total_norm(gradients))


def _set_learning_rate(state: TrainState, name: TrainedNetwork, config: Config) -> None:
    base = config.student_lr if name == "student" else config.score_lr
    after = state.images_seen + config.batch_size
    factor = warmup(after, warmup_kimg=config.warmup_kimg) * annealing(
        state.images_seen, total_images=config.total_images, anneal_kimg=config.anneal_kimg
    )
    for group in state.optimizers[name].param_groups:
        group["lr"] = base * factor * state.lr_scale


def _advance(state: TrainState, config: Config) -> None:
    """Count one round, and let the moving average follow."""
    state.images_seen += config.batch_size
    decay = ema_decay(
        config.batch_size,
        images_seen=state.images_seen,
        halflife_kimg=config.ema_halflife_kimg,
        rampup=config.ema_rampup,
    )
    follow(state.student_ema, state.networks.student, decay=decay)


def _mean_readings(outputs: list[LossOutput]) -> dict[str, Tensor]:
    """Return the mean over this rank's images of each reading."""
    counts = [len(output.per_image) for output in outputs]
    shares = [count / sum(counts) for count in counts]
    means = {}
    for name in outputs[0].readings:
        parts = [
            output.readings[name] * share for output, share in zip(outputs, shares, strict=True)
        ]
        means[name] = torch.stack(parts).sum()
    return means


def _any(flag: bool, world: World) -> bool:
    """Return whether the flag is up on any rank; the same answer on all."""
    if world.size == 1:
        return flag
    return bool(distributed.mean(torch.tensor(float(flag), device=world.device), world) > 0)
