"""Roles as types: student, denoiser, phase, objective.

Everything here is a seam between folders. No behaviour lives here, and nothing inherits from it for
reuse: a class is a `Student` because it has the members, not because it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from core.randomness import Draws


class Student(Protocol):
    """Any one-step generator, an nn.Module; in eval mode a deterministic function."""

    latent_shape: tuple[int, ...]
    """Shape of one latent, always unit normal."""
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    """0 = unconditional."""

    def __call__(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images [N, C, H, W] float32, about [-1, 1], for latents [N, *latent_shape], labels
        [N] int64.
        """
        ...


class Denoiser(Protocol):
    """A preconditioned diffusion network, an nn.Module: the teacher and the score network are the
    same kind.
    """

    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    """0 = unconditional."""
    sigma_min: float
    """Smallest noise level it was made for, in pixel units."""
    sigma_max: float
    """Largest noise level it was made for, in pixel units."""

    def __call__(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E[x | noisy] [N, C, H, W] float32 for noisy = x + sigma n, sigma [N], labels [N]
        int64.
        """
        ...


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
