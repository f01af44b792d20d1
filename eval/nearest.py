"""Distances between single images' features: drift through refinement, and copies of real images.

    drift      images before and after of the same latents: do latents keep their meaning?
    nearness   generated images and the real ones nearest to them: is one a copy?

Distances are Euclidean, between features of one extractor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STRIP = 1000
"""Images whose distances to all others are held at once."""
_NEAR = 0.01
"""Share of real images nearest to another one that defines a suspicious distance."""


@dataclass(frozen=True)
class Drift:
    """Movement of the images of some latents."""

    images: int
    """How many latents."""
    moved: float
    """Mean distance from a latent's before-image to its after-image."""
    apart: float
    """Mean pairwise distance of the before-images; the scale for `moved`."""
    recognised: float
    """Share, 0 to 1, of the images after that are nearer to their own image before than to that of
    any other latent.
    """


def drift(before: Tensor, after: Tensor) -> Drift:
    """Return the movement of images between features [N, D] of the same N >= 2 latents."""
    count = len(before)
    if before.shape != after.shape or count < 2:
        raise ValueError(f"expected two [N, D], N >= 2: {before.shape} and {after.shape}")
    before, after = before.to(torch.float64), after.to(torch.float64)
    nearest = _nearest(after, before).index
    between = torch.cdist(before, before).sum() / (count * (count - 1))
    return Drift(
        images=count,
        moved=float((after - before).norm(dim=1).mean()),
        apart=float(between),
        recognised=float((nearest.cpu() == torch.arange(count)).double().mean()),
    )


@dataclass(frozen=True)
class Near:
    """A generated image and the real one nearest to it."""

    image: int
    """Which generated image."""
    real: int
    """Which real one."""
    distance: float


@dataclass(frozen=True)
class Nearness:
    """Distances of generated images to the nearest real ones."""

    images: int
    """How many generated ones."""
    real_images: int
    generated_distance: float
    """Median distance from a generated image to the nearest real one."""
    real_distance: float
    """Median distance from a real image to the nearest other real one."""
    suspicious: float
    """Share, 0 to 1, of generated images that are nearer to a real one than all but the nearest
    hundredth of real images are to another: about 0.01 where nothing is copied.
    """
    nearest: tuple[Near, ...]
    """The nearest pairs, nearest first."""


def nearness(generated: Tensor, real: Tensor, *, pairs: int = 8) -> Nearness:
    """Return the distances of generated images [N, D] to the nearest real ones [M, D], M >= 2."""
    if len(generated) == 0 or len(real) < 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(f"expected [N, D] and [M, D]: {generated.shape} and {real.shape}")
    neighbors = _nearest(generated, real)
    among_real = _nearest(real, real, itself=False).distance
    threshold = among_real.quantile(_NEAR)
    order = neighbors.distance.argsort(stable=True)[:pairs].tolist()
    return Nearness(
        images=len(generated),
        real_images=len(real),
        generated_distance=float(neighbors.distance.median()),
        real_distance=float(among_real.median()),
        suspicious=float((neighbors.distance <= threshold).double().mean()),
        nearest=tuple(
            Near(i, int(neighbors.index[i]), float(neighbors.distance[i])) for i in order
        ),
    )


@dataclass(frozen=True)
class _Nearest:
    distance: Tensor
    """[N] float64."""
    index: Tensor
    """[N] int64."""


def _nearest(first: Tensor, second: Tensor, *, itself: bool = True) -> _Nearest:
    """Return for each of the first [N, D] the nearest of the second [M, D].

    itself: whether row k of the second may be the nearest of row k of the first.
    """
    distances, indices = [], []
    for start in range(0, len(first), _STRIP):
        strip = torch.cdist(
            first[start : start + _STRIP].to(torch.float32), second.to(torch.float32)
        )
        if not itself:
            rows = torch.arange(len(strip), device=strip.device)
            strip[rows, rows + start] = torch.inf
        nearest = strip.argmin(1)
        # Distances by products of matrices lose their digits where they are small.
        apart = first[start : start + _STRIP].to(torch.float64) - second[nearest].to(torch.float64)
        distances.append(apart.norm(dim=1))
        indices.append(nearest)
    return _Nearest(torch.cat(distances).cpu(), torch.cat(indices).cpu())
