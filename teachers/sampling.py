"""EDM's sampler (Karras et al. 2022, arXiv 2206.00364), deterministic and stochastic.

Heun's method of second order on dx/dsigma = (x - D(x; sigma)) / sigma, with the steps of Eq. 5
(Algorithm 1), and with noise added before each step, as much as is asked for (Algorithm 2). Left
out: guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from core.config import Section
from core.protocols import Denoiser

NoiseOf = Callable[[int], Tensor]
"""From the number of a step, 0 first, to unit normals [N, C, H, W]."""


class Config(Section):
    """How a diffusion model is sampled; null is as its authors did."""

    steps: int | None = Field(default=None, ge=1)
    """Noise levels on the way; each is two network passes, the last one."""
    churn: float | None = Field(default=None, ge=0)
    """S_churn: how much noise is added on the way, over all steps; 0 adds none."""
    churn_sigma_min: float | None = Field(default=None, ge=0)
    """S_min: no noise is added below this level, in pixel units."""
    churn_sigma_max: float | None = Field(default=None, gt=0)
    """S_max: no noise is added above this level, in pixel units."""
    churn_noise: float | None = Field(default=None, gt=0)
    """S_noise: standard deviation of the noise that is added."""


class Settings(NamedTuple):
    """A sampler's settings, none of them open; the words of `Config`."""

    steps: int = 18
    churn: float = 0.0
    churn_sigma_min: float = 0.0
    churn_sigma_max: float = math.inf
    churn_noise: float = 1.0


def published(denoiser: Denoiser) -> Settings:
    """Return what the authors of EDM and EDM2 sampled a network of this kind with.

    18 steps at 32x32, 40 at 64x64; 256 with churn for ADM of ImageNet's thousand classes (EDM,
    Table 5 and Appendix E); 32 for EDM2.
    """
    shape = getattr(denoiser, "config", None)
    if type(denoiser).__module__.endswith(".edm2"):
        return Settings(steps=32)
    if getattr(shape, "model_type", "") == "DhariwalUNet" and denoiser.num_classes == 1000:
        return Settings(256, 40.0, 0.05, 50.0, 1.003)
    return Settings(steps=18 if denoiser.image_shape[-1] <= 32 else 40)


def settings_for(denoiser: Denoiser, config: Config) -> Settings:
    """Return the published settings with those on top that are given."""
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    return published(denoiser)._replace(**given)


def sample(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    noise: NoiseOf,
    *,
    config: Config,
) -> Tensor:
    """Return images [N, C, H, W] as `heun` makes them with `settings_for` the denoiser."""
    settings = settings_for(denoiser, config)
    return heun(denoiser, latents, labels, noise=noise, **settings._asdict())


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
    churn: float = 0.0,
    churn_sigma_min: float = 0.0,
    churn_sigma_max: float = math.inf,
    churn_noise: float = 1.0,
    noise: NoiseOf | None = None,
) -> Tensor:
    """Return images [N, C, H, W] float32, about [-1, 1], without graph (EDM, Algorithms 1 and 2).

    latents: [N, C, H, W] unit normal. labels: [N] int64 or None. Puts the range inside the
    denoiser's own and each level where the denoiser rounds it to (`round_sigma`), makes
    2 steps - 1 network passes, adds the steps up in float64. Put the denoiser in eval mode first.
    churn: S_churn, which needs noise; between the two levels S_min and S_max the image is first
    taken up to (1 + gamma) sigma, gamma = min(S_churn / steps, 2^(1/2) - 1). Raises ValueError
    where churn has no noise, or the range is empty.
    """
    if churn > 0 and noise is None:
        raise ValueError(f"churn is {churn}, and no noise is given to add")
    rounded = getattr(denoiser, "round_sigma", lambda sigma: sigma)  # to those that it knows
    levels = sigma_steps(
        steps,
        sigma_min=max(sigma_min, denoiser.sigma_min),
        sigma_max=min(sigma_max, denoiser.sigma_max),
        rho=rho,
    )
    levels[:-1] = rounded(levels[:-1].to(latents.device)).cpu()
    gamma = min(churn / steps, math.sqrt(2) - 1)
    images = latents.double() * float(levels[0])
    for step, (sigma, next_sigma) in enumerate(pairwise(levels.tolist())):
        if noise is not None and gamma > 0 and churn_sigma_min <= sigma <= churn_sigma_max:
            higher = torch.tensor([sigma * (1 + gamma)], dtype=torch.float64, device=latents.device)
            raised = float(rounded(higher))
            added = churn_noise * math.sqrt(max(raised**2 - sigma**2, 0.0))
            images, sigma = images + added * noise(step).double(), raised
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
