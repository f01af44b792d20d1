"""All that a resumed run needs: networks, the student's moving average, optimizers, images seen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from core.config import Section
from core.distributed import World
from core.roles import Networks, TrainedNetwork
from training import fsdp
from training.loss_scale import LossScale


class OptimizerConfig(Section):
    """An optimizer of torch.optim, for student and score alike."""

    name: str = "Adam"
    """Class in torch.optim."""
    beta1: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the mean gradient (optimizers with betas)."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the mean squared gradient (optimizers with betas)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator (optimizers with eps)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name not in optimizer_names():
            known = ", ".join(optimizer_names())
            raise ValueError(f"torch.optim has no optimizer {name!r} that fits; it has {known}")
        return name


_UNFIT = frozenset(("Optimizer", "LBFGS", "Muon", "SparseAdam"))
"""The base class, and those that need a closure, matrices alone or sparse gradients."""


_FUSED = frozenset(("Adam", "AdamW", "SGD"))
"""Those that go over the weights once instead of ten times, on every device …"""
_FUSED_IN_PARTS = frozenset(("Adam", "AdamW"))
"""… and also over a sharded network's."""


def optimizer_names() -> list[str]:
    """Return the names of torch.optim's optimizers that can train any network from gradients."""
    kinds = ((name, kind) for name, kind in vars(torch.optim).items() if isinstance(kind, type))
    fit = {name for name, kind in kinds if issubclass(kind, torch.optim.Optimizer)}
    return sorted(fit - _UNFIT)


@dataclass
class TrainState:
    """Training state: everything that changes. Equal states continue to equal states."""

    images_seen: int
    networks: Networks
    student_ema: nn.Module
    """Moving average of the student, in eval mode: evaluated and published."""
    optimizers: dict[TrainedNetwork, torch.optim.Optimizer]
    lr_scale: float = 1.0
    """Both learning rates are multiplied by it: below 1 after a rollback. The log holds it, not the
    checkpoint, which is older than the rollback to it.
    """
    loss_scales: dict[str, LossScale] = field(default_factory=dict)
    """Phase -> the factor on its loss; in float16 alone."""


def start(
    networks: Networks,
    *,
    student_lr: float,
    score_lr: float,
    optimizer: OptimizerConfig,
    shard: Collection[str] = (),
    world: World | None = None,
) -> TrainState:
    """Return the state before the first image. Freezes the teacher.

    shard: of student and score, those to be spread over the processes of the world, before their
    optimizers are made; the student's average stays whole. Raises UserError if one cannot be.
    """
    # the teacher is frozen; the average starts as a copy
    networks.teacher.eval().requires_grad_(False)
    ema = copy.deepcopy(networks.student).eval().requires_grad_(False)
    learning: dict[TrainedNetwork, tuple[nn.Module, float]] = {
        "student": (networks.student, student_lr),
        "score": (networks.score, score_lr),
    }

    # shard before the optimizers are created
    for name, (network, _) in learning.items():
        if name in shard and world is not None:
            fsdp.shard(network, world)
    optimizers: dict[TrainedNetwork, torch.optim.Optimizer] = {
        name: _optimizer(network.eval().requires_grad_(True), lr, optimizer)
        for name, (network, lr) in learning.items()
        if any(True for _ in network.parameters())
    }
    return TrainState(0, networks, ema, optimizers)


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, *, decay: float) -> None:
    """Move parameters to decay * average + (1 - decay) * network; copy buffers."""
    slow: list[Tensor] = list(average.parameters())
    fast: list[Tensor] = [fsdp.full_tensor(parameter) for parameter in network.parameters()]
    torch._foreach_lerp_(slow, fast, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for averaged, current in zip(average.buffers(), network.buffers(), strict=True):
        averaged.copy_(current)


def _optimizer(network: nn.Module, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer with those of the settings that it knows."""
    kind = getattr(torch.optim, config.name)
    offered = {
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    known = inspect.signature(kind).parameters
    chosen = {
        name: value
        for name, value in offered.items()
        # Adafactor's eps is a pair, of another meaning.
        if name in known and isinstance(known[name].default, tuple) == isinstance(value, tuple)
    }
    if config.name in (_FUSED_IN_PARTS if fsdp.is_sharded(network) else _FUSED):
        chosen["fused"] = True
    return kind(network.parameters(), lr=lr, **chosen)
