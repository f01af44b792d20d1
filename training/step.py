"""One round: each phase's updates, where `update` draws, accumulates, checks and steps; then the
round is counted and averaged in.

The same round serves one process and many: each rank takes its share of the global batch, draws are
functions of the global sample index, and gradients are averaged over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from core import distributed
from core.distributed import World
from core.precision import computing_in
from core.randomness import Draws
from core.roles import LossOutput, Networks, Objective, Phase, TrainedNetwork
from training import fsdp
from training.compilation import replays
from training.config import Config
from training.divergence import Diverged
from training.loss_scale import ONE, LossScale
from training.schedule import annealing, ema_decay, warmup
from training.state import TrainState, follow


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
    """Return the readings of one optimizer step on one global batch, after taking it; in float16 it
    is left out where scaled gradients overflowed.

    trained: the state's networks, wrapped so that their gradients are averaged over ranks.
    Raises Diverged where loss or gradient is not finite, before any weight changes.
    """
    learning: dict[TrainedNetwork, nn.Module] = {n: getattr(trained, n) for n in phase.trains}
    networks = replace(_bare(trained), **learning)
    for name in learning:
        _forget_gradients(state.optimizers[name], keep_memory=replays(config.compile))
    draws = Draws(config.seed, state.images_seen, 0, config.batch_size, world.device)
    parts = list(_micro_batches(draws.scoped(f"{phase.name}/{repeat}"), config, world))
    scale = _loss_scale(phase, state, config)
    factor = scale.loss_factor(batch_size=config.batch_size, ranks=world.size)
    outputs = []
    for index, part in enumerate(parts):
        with _synchronised(learning.values(), last=index == len(parts) - 1):
            if replays(config.compile):
                torch.compiler.cudagraph_mark_step_begin()
            output = phase.loss(networks, part)
            (output.per_image.sum() * factor).backward()
        outputs.append(LossOutput(output.per_image.detach(), output.readings))
    norms = _checked_norms(
        phase, learning, outputs, scale, config.batch_size, state.images_seen, world
    )
    for name, norm in norms.items():
        if config.gradient_clip is not None:
            clip_grads_with_norm_(learning[name].parameters(), config.gradient_clip, norm)
        _set_learning_rate(state, name, config)
        state.optimizers[name].step()
    readings = _mean_readings(outputs, batch_size=config.batch_size, ranks=world.size)
    readings |= {f"{name}_gradient": norm for name, norm in norms.items()}
    return readings | scale.readings(phase.name, skipped=not norms, device=world.device)


def wrapped(networks: Networks, state: TrainState, world: World) -> Networks:
    """Return the networks, compiled or not, those that an optimizer trains wrapped for several
    processes where they are not spread over them.
    """
    trained = {name: getattr(networks, name) for name in state.optimizers}
    ready = {
        name: network if fsdp.is_sharded(network) else distributed.wrap(network, world)
        for name, network in trained.items()
    }
    return replace(networks, **ready)


def _bare(networks: Networks) -> Networks:
    """Return the networks as they are called where they do not learn."""
    student, score = (distributed.unwrap(n) for n in (networks.student, networks.score))
    return replace(networks, student=student, score=score)


def _forget_gradients(optimizer: torch.optim.Optimizer, *, keep_memory: bool) -> None:
    """Begin anew. keep_memory: in memory of their own, where a replayed graph's results are not."""
    optimizer.zero_grad(set_to_none=not keep_memory)
    if keep_memory:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


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
            fsdp.synchronise(network, last)
            if isinstance(network, DistributedDataParallel) and not last:
                stack.enter_context(network.no_sync())
        yield


def _loss_scale(phase: Phase, state: TrainState, config: Config) -> LossScale:
    """Return the factor on a phase's loss; only in float16 there is one."""
    if config.precision != "float16":
        return ONE
    return state.loss_scales.setdefault(phase.name, LossScale())


def _checked_norms(
    phase: Phase,
    learning: Mapping[TrainedNetwork, nn.Module],
    outputs: list[LossOutput],
    scale: LossScale,
    batch_size: int,
    images_seen: int,
    world: World,
) -> dict[TrainedNetwork, Tensor]:
    """Return the norm of each network's averaged gradient, all finite on every rank; none where the
    gradients are to be dropped and the next ones scaled less.
    """
    scale.unscale(learning.values(), ranks=world.size)
    norms: dict[TrainedNetwork, Tensor] = {n: _gradient_norm(net) for n, net in learning.items()}
    total = torch.cat([output.per_image for output in outputs]).sum()
    loss = distributed.mean(total * (world.size / batch_size), world)
    if torch.isfinite(sum(norms.values(), loss)):
        scale.kept()
        return norms
    if torch.isfinite(loss) and scale.lowered():
        return {}
    shown = " and ".join(f"{float(norm):.4g} ({name})" for name, norm in norms.items())
    raise Diverged(
        f"the {phase.name} phase gave a loss of {float(loss):.4g} and a gradient of norm "
        f"{shown} after {images_seen} images; no weight was changed by it",
        "Try a smaller training.student_lr and training.score_lr (each network learns from the "
        "other), a training.warmup_kimg, or a training.gradient_clip"
        + ("" if scale.is_fixed else "; bfloat16 has larger numbers than float16"),
    )


def _gradient_norm(network: nn.Module) -> Tensor:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return fsdp.whole(get_total_norm(gradients))


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


def _mean_readings(outputs: list[LossOutput], *, batch_size: int, ranks: int) -> dict[str, Tensor]:
    """Return this rank's readings, whose mean over ranks is that over the images of the batch."""
    means = {}
    for name in outputs[0].readings:
        parts = [
            output.readings[name] * (len(output.per_image) * ranks / batch_size)
            for output in outputs
        ]
        means[name] = torch.stack(parts).sum()
    return means
