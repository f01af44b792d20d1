"""The training loop: phases say what is trained on what, `update` draws, accumulates, checks and
steps.

The same loop serves one process and many: each rank takes its share of the global batch, draws are
functions of the global sample index, and gradients are averaged over ranks. Left out: everything
about what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from core import distributed
from core.config import Section
from core.distributed import World
from core.errors import UserError
from core.precision import Precision, computing_in
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
from training.schedule import Every, annealing, ema_decay, warmup
from training.state import OptimizerConfig, TrainState, follow
from training.status import Status


class Config(Section):
    """The `training` section of a recipe."""

    duration_kimg: float = Field(default=5000, gt=0)
    """Length of the run, in thousands of student images."""
    batch_size: int = Field(default=128, ge=1)
    """Images of one update, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images a process puts through the networks at a time; null: its whole share of the batch."""
    seed: int = Field(default=0, ge=0)
    """Every random number of the training follows from it."""
    student_lr: float = Field(default=1e-5, gt=0)
    """Learning rate of the student."""
    score_lr: float = Field(default=1e-5, gt=0)
    """Learning rate of the score network."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer of both."""
    warmup_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images over which both learning rates rise from 0."""
    anneal_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images at the end over which both learning rates fall to 0."""
    precision: Precision = "float32"
    """What diffusion networks compute in while training; weights and what is measured stay
    float32. bfloat16 is faster where the device has it.
    """
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest norm of an update's gradient; longer ones are scaled down to it. null: no limit."""
    ema_halflife_kimg: float = Field(default=500.0, ge=0)
    """Half-life of the student's moving average, in thousands of images; 0: no averaging."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """The half-life is at most this times the images seen; null: no such limit."""
    readings_every_kimg: float = Field(default=1.0, gt=0)
    """Thousands of images between rows of readings.jsonl."""
    checkpoint_every_kimg: float = Field(default=500.0, ge=0)
    """Thousands of images between checkpoints; 0: only at the end or when stopped."""
    keep: checkpoint.Keep = checkpoint.Keep()
    """Which checkpoints stay when a new one is written."""

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Config:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} exceeds batch_size {self.batch_size}"
            )
        return self

    @property
    def total_images(self) -> int:
        """Return the length of the run in images."""
        return round(self.duration_kimg * 1000)


class Diverged(UserError):
    """A loss or gradient that is not finite. The weights are those of before the update."""


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


def train(
    state: TrainState,
    objective: Objective,
    config: Config,
    *,
    folder: RunFolder,
    world: World,
    measure: Callable[[TrainState], Mapping[str, float]] | None = None,
    measure_every_kimg: float = 0.0,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Return the state after the last image; it is trained in place.

    measure: called on every rank when due and after the last round. stop_requested: asked after
    each round; if it says so on any rank, the state is saved and Interrupted raised. Raises
    Diverged before weights go bad.
    """
    if config.batch_size < world.size:
        raise UserError(
            f"training.batch_size is {config.batch_size}, fewer than the {world.size} processes: "
            "start fewer, or make it larger"
        )
    total = config.total_images
    showing, saving = (
        Every.kimg(config.readings_every_kimg),
        Every.kimg(config.checkpoint_every_kimg),
    )
    measuring = Every.kimg(measure_every_kimg)
    trained = _wrapped(state, world)
    with (
        Status(folder, world, images_seen=state.images_seen, total_images=total) as status,
        checkpoint.Writer(folder, config.keep) as writer,
    ):
        while state.images_seen < total:
            before = state.images_seen
            for readings in play_round(state, objective, config, trained=trained, world=world):
                status.add(readings)
            now, last = state.images_seen, state.images_seen >= total
            stop = _any(stop_requested(), world)
            if last or stop or showing.due(before, now):
                status.row(now)
            scores: Mapping[str, float] = {}
            if measure is not None and (last or measuring.due(before, now)):
                scores = measure(state)
                status.measured(now, scores)
            if (last or stop or saving.due(before, now)) and world.is_main:
                writer.save(state, scores=scores)
            if stop and not last:
                writer.wait()
                raise Interrupted
    return state


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
        _set_learning_rate(state.optimizers[name], name, state.images_seen, config)
        state.optimizers[name].step()
    return _mean_readings(outputs) | {f"{name}_gradient": norm for name, norm in norms.items()}


def _wrapped(state: TrainState, world: World) -> Networks:
    """Return the networks, those that an optimizer trains wrapped for several processes."""
    trained = {
        name: distributed.wrap(getattr(state.networks, name), world) for name in state.optimizers
    }
    return replace(state.networks, **trained)


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
            f"{shown} after {images_seen} images; no weight was changed by it. "
            "Try a smaller training.student_lr and training.score_lr (each network learns from the "
            "other), a training.warmup_kimg, or a training.gradient_clip"
        )
    return norms


def _gradient_norm(network: nn.Module) -> Tensor:
    return get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, name: TrainedNetwork, images_seen: int, config: Config
) -> None:
    base = config.student_lr if name == "student" else config.score_lr
    after = images_seen + config.batch_size
    factor = warmup(after, warmup_kimg=config.warmup_kimg) * annealing(
        images_seen, total_images=config.total_images, anneal_kimg=config.anneal_kimg
    )
    for group in optimizer.param_groups:
        group["lr"] = base * factor


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
    counts = torch.tensor([float(len(output.per_image)) for output in outputs])
    shares = (counts / counts.sum()).tolist()
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
