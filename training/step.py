"""One training iteration: the optimizer steps of each phase, then the moving average.

An optimizer step draws random numbers, accumulates gradients, checks them, and only then changes
weights. The same step serves one process and many: each rank takes its share of the global batch,
draws are functions of the global sample index, and gradients are averaged over ranks.
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
from core.precision import compute_precision
from core.randomness import Draws
from core.roles import LossOutput, Networks, Objective, Phase, TrainedNetwork
from training import fsdp
from training.compilation import replays
from training.config import Config
from training.divergence import Diverged
from training.loss_scale import ONE, LossScale
from training.schedule import annealing, ema_decay, warmup
from training.state import TrainState, update_ema


def training_iteration(
    state: TrainState, objective: Objective, config: Config, *, trained: Networks, world: World
) -> Iterator[dict[str, Tensor]]:
    """Yield the stats of each optimizer step of one iteration, then advance the state by a batch.

    trained: the state's networks from `wrap_for_ranks`.
    """
    networks = (trained.student, trained.score, trained.teacher)
    with compute_precision(config.precision, networks):
        for phase in objective.phases:
            for repeat in range(phase.repeats_at(state.images_seen)):
                yield optimizer_step(phase, repeat, state, config, trained=trained, world=world)
    _advance(state, config)


def optimizer_step(
    phase: Phase,
    repeat: int,
    state: TrainState,
    config: Config,
    *,
    trained: Networks,
    world: World,
) -> dict[str, Tensor]:
    """Take one optimizer step on one global batch, and return its stats (0-dim tensors).

    In float16 the step is skipped if scaled gradients overflowed. trained: the state's networks
    from `wrap_for_ranks`. Raises Diverged if loss or gradient is not finite, before any weight
    changes.
    """
    learning: dict[TrainedNetwork, nn.Module] = {n: getattr(trained, n) for n in phase.trains}
    networks = replace(_unwrapped(trained), **learning)
    for name in learning:
        _zero_gradients(state.optimizers[name], keep_memory=replays(config.compile))
    draws = Draws(config.seed, state.images_seen, 0, config.batch_size, world.device)
    micro_batches = list(_micro_batches(draws.with_scope(f"{phase.name}/{repeat}"), config, world))
    scale = _loss_scale(phase, state, config)
    factor = scale.loss_factor(batch_size=config.batch_size, ranks=world.size)

    # accumulate gradients; ranks average them in the last backward pass
    outputs = []
    for index, micro_batch in enumerate(micro_batches):
        with _gradient_sync(learning.values(), wanted=index == len(micro_batches) - 1):
            if replays(config.compile):
                torch.compiler.cudagraph_mark_step_begin()
            output = phase.loss(networks, micro_batch)
            (output.per_image.sum() * factor).backward()
        outputs.append(LossOutput(output.per_image.detach(), output.stats))

    # check, clip, step
    norms = _checked_norms(phase, learning, outputs, scale, state=state, config=config, world=world)
    for name, norm in norms.items():
        if config.gradient_clip is not None:
            clip_grads_with_norm_(learning[name].parameters(), config.gradient_clip, norm)
        _set_learning_rate(state, name, config)
        state.optimizers[name].step()

    stats = _mean_stats(outputs, batch_size=config.batch_size, ranks=world.size)
    stats |= {f"{name}_gradient": norm for name, norm in norms.items()}
    return stats | scale.stats(phase.name, skipped=not norms, device=world.device)


def wrap_for_ranks(networks: Networks, state: TrainState, world: World) -> Networks:
    """Return the networks; trained ones are wrapped by DDP unless they are sharded."""
    trained = {name: getattr(networks, name) for name in state.optimizers}
    ready = {
        name: network if fsdp.is_sharded(network) else distributed.wrap(network, world)
        for name, network in trained.items()
    }
    return replace(networks, **ready)


def _unwrapped(networks: Networks) -> Networks:
    """Return the networks without DDP, as they are called while they do not learn."""
    student, score = (distributed.unwrap(n) for n in (networks.student, networks.score))
    return replace(networks, student=student, score=score)


def _zero_gradients(optimizer: torch.optim.Optimizer, *, keep_memory: bool) -> None:
    """Reset gradients. keep_memory: to zeros in memory outside of a replayed CUDA graph."""
    optimizer.zero_grad(set_to_none=not keep_memory)
    if keep_memory:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


def _micro_batches(draws: Draws, config: Config, world: World) -> Iterator[Draws]:
    """Yield this rank's share of the global batch in parts of at most micro_batch_size."""
    share = distributed.local_range(config.batch_size, world)
    size = config.micro_batch_size or len(share)
    for start in range(share.start, share.stop, size):
        yield draws.part(start, min(start + size, share.stop))


@contextmanager
def _gradient_sync(networks: Iterable[nn.Module], *, wanted: bool) -> Iterator[None]:
    """Run the body with or without averaging of gradients over ranks in the backward pass."""
    with ExitStack() as stack:
        for network in networks:
            fsdp.set_gradient_sync(network, wanted)
            if isinstance(network, DistributedDataParallel) and not wanted:
                stack.enter_context(network.no_sync())
        yield


def _loss_scale(phase: Phase, state: TrainState, config: Config) -> LossScale:
    """Return the loss scale of a phase: 1 except in float16."""
    if config.precision != "float16":
        return ONE
    return state.loss_scales.setdefault(phase.name, LossScale())


def _checked_norms(
    phase: Phase,
    learning: Mapping[TrainedNetwork, nn.Module],
    outputs: list[LossOutput],
    scale: LossScale,
    *,
    state: TrainState,
    config: Config,
    world: World,
) -> dict[TrainedNetwork, Tensor]:
    """Return the norm of each network's averaged gradient, finite on every rank.

    Empty if float16 gradients overflowed: the step is skipped and the next loss scaled less.
    Raises Diverged for any other value that is not finite.
    """
    # norms of the averaged gradients, and the mean loss over ranks
    scale.unscale(learning.values(), ranks=world.size)
    norms: dict[TrainedNetwork, Tensor] = {n: _gradient_norm(net) for n, net in learning.items()}
    total = torch.cat([output.per_image for output in outputs]).sum()
    loss = distributed.mean(total * (world.size / config.batch_size), world)

    # finite: go on; overflow in float16: skip; else the run diverged
    if torch.isfinite(sum(norms.values(), loss)):
        scale.count_finite()
        return norms
    if torch.isfinite(loss) and scale.lower():
        return {}
    shown = " and ".join(f"{float(norm):.4g} ({name})" for name, norm in norms.items())
    raise Diverged(
        f"the {phase.name} phase gave a loss of {float(loss):.4g} and a gradient of norm "
        f"{shown} after {state.images_seen} images; no weight was changed by it",
        "Try a smaller training.student_lr and training.score_lr (each network learns from the "
        "other), a training.warmup_kimg, or a training.gradient_clip"
        + ("" if scale.is_fixed else "; bfloat16 has larger numbers than float16"),
    )


def _gradient_norm(network: nn.Module) -> Tensor:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return fsdp.full_tensor(get_total_norm(gradients))


def _set_learning_rate(state: TrainState, name: TrainedNetwork, config: Config) -> None:
    base = config.student_lr if name == "student" else config.score_lr
    after = state.images_seen + config.batch_size
    factor = warmup(after, warmup_kimg=config.warmup_kimg) * annealing(
        state.images_seen, total_images=config.total_images, anneal_kimg=config.anneal_kimg
    )
    for group in state.optimizers[name].param_groups:
        group["lr"] = base * factor * state.lr_scale


def _advance(state: TrainState, config: Config) -> None:
    """Count one batch, and update the moving average."""
    state.images_seen += config.batch_size
    decay = ema_decay(
        config.batch_size,
        images_seen=state.images_seen,
        halflife_kimg=config.ema_halflife_kimg,
        rampup=config.ema_rampup,
    )
    update_ema(state.student_ema, state.networks.student, decay=decay)


def _mean_stats(outputs: list[LossOutput], *, batch_size: int, ranks: int) -> dict[str, Tensor]:
    """Return this rank's stats, whose mean over ranks is the mean over the global batch."""
    means = {}
    for name in outputs[0].stats:
        parts = [
            output.stats[name] * (len(output.per_image) * ranks / batch_size) for output in outputs
        ]
        means[name] = torch.stack(parts).sum()
    return means
