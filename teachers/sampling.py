"""EDM's deterministic sampler (Karras et al. 2022, arXiv 2206.00364, Algorithm 1).

Heun's method of second order on dx/dsigma = (x - D(x; sigma)) / sigma, with the steps of Eq. 5.
Left out: added noise while sampling (Algorithm 2), and guidance.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from core.protocols import Denoiser


def sigma_steps(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return [steps + 1] float64 noise levels from sigma_max down to sigma_min, then 0.

    sigma_i^(1/rho) goes in equal steps from sigma_max^(1/rho) to sigma_min^(1/rho) (EDM, Eq. 5).
    One step goes from sigma_max to 0 at once. Raises ValueError where the range is empty.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(
            f"no noise levels from sigma_max {sigma_max} down to sigma_min {sigma_min}"
        )
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    return torch.cat(((first + ramp * (last - first)) ** rho, torch.zeros(1, dtype=torch.float64)))


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Return images [N, C, H, W] float32, about [-1, 1], without graph (EDM, Algorithm 1).

    latents: [N, C, H, W] unit normal. labels: [N] int64 or None. Puts the range inside the
    denoiser's own and each level where the denoiser rounds it to (`round_sigma`), makes
    2 steps - 1 network passes, adds the steps up in float64. Put the denoiser in eval mode first.
    """
    levels = sigma_steps(
        steps,
        sigma_min=max(sigma_min, denoiser.sigma_min),
        sigma_max=min(sigma_max, denoiser.sigma_max),
        rho=rho,
    )
    if hasattr(denoiser, "round_sigma"):  # to those that the network knows
        levels[:-1] = denoiser.round_sigma(levels[:-1].to(latents.device)).cpu()
    sigmas = levels.tolist()
    images = latents.double() * sigmas[0]
    for sigma, next_sigma in pairwise(sigmas):
        slope = _slope(denoiser, images, labels, sigma=sigma)
        moved = images + (next_sigma - sigma) * slope
        if next_sigma > 0:
            slope = (slope + _slope(denoiser, moved, labels, sigma=next_sigma)) / 2
            moved = images + (next_sigma - sigma) * slope
        images = moved
    return images.float()


def _slope(denoiser: Denoiser, images: Tensor, labels: Tensor | None, *, sigma: float) -> Tensor:
    """Return dx/dsigma of the probability flow, float64 (EDM, Eq. 4 for s = 1 and sigma = t)."""
    levels = torch.full((len(images),), sigma, dtype=torch.float32, device=images.device)
    return (images - denoiser(images.float(), levels, labels).double()) / sigma
