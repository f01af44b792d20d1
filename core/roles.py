"""The roles of networks and objectives: Generator, Denoiser, Phase, Objective.

Networks inherit their role; objectives have one by their members. No behavior lives here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from core.randomness import Draws


class Generator(nn.Module):
    """A one-step generator, which a student is; in eval mode a deterministic function.

    forward(latents [N, *latent_shape], labels [N] int64 | None) -> images [N, C, H, W] float32,
    about [-1, 1].
    """

    latent_shape: tuple[int, ...]
    """Shape of one latent, always unit normal."""
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    """0 = unconditional."""

    def update_w_avg(self) -> None:
        """Recompute buffers that follow from the weights, such as StyleGAN's w_avg, if any."""


class Denoiser(nn.Module):
    """A preconditioned diffusion network: the teacher, and the score network.

    forward(noisy [N, C, H, W], sigma [N], labels [N] int64 | None) -> E[x | noisy] [N, C, H, W]
    float32, for noisy = x + sigma n.
    """

    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    """0 = unconditional."""
    sigma_min: float
    """Smallest noise level that it was trained for, in pixel units."""
    sigma_max: float
    """Largest noise level that it was trained for, in pixel units."""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest noise levels that the network can take: by default, sigma itself."""
        return sigma


@dataclass(frozen=True)
class Networks:
    """The networks of a run; a bare `nn.Module` stands for one that it does without.

    The student learns: a generator from the teacher, or a denoiser from real images.
    """

    student: nn.Module
    score: nn.Module = field(default_factory=nn.Module)
    teacher: nn.Module = field(default_factory=nn.Module)
    """Frozen and in eval mode, always."""
    adapter: nn.Module = field(default_factory=nn.Identity)
    """From the student's images to those that teacher and score know; no parameters."""


@dataclass(frozen=True)
class LossOutput:
    """A loss before averaging: the loop alone averages over images and scales."""

    per_image: Tensor
    """[N] float32, with graph."""
    stats: Mapping[str, Tensor]
    """Name -> 0-dim detached tensor, a mean over these images."""


TrainedNetwork = Literal["student", "score"]


@dataclass(frozen=True)
class Phase:
    """One kind of update: which networks it trains, on which loss, how many times a round."""

    name: str
    trains: tuple[TrainedNetwork, ...]
    loss: Callable[[Networks, Draws], LossOutput]
    """From the networks and the random numbers of some samples to their losses."""
    repeats: int = 1
    starts_at: int = 0
    """Images seen before which the phase is left out."""
    ends_at: int | None = None
    """Images seen from which on the phase is left out again; None: never."""

    def repeats_at(self, images_seen: int) -> int:
        """Return how many times the phase runs in the round that begins after so many images."""
        over = self.ends_at is not None and images_seen >= self.ends_at
        return self.repeats if self.starts_at <= images_seen and not over else 0


class Objective(Protocol):
    """Training objective: a tuple of phases, run in this order each iteration."""

    phases: tuple[Phase, ...]
