"""EDM's sampler (Karras et al. 2022, arXiv 2206.00364), deterministic and stochastic.

Heun's method of second order on dx/dsigma = (x - D(x; sigma)) / sigma, with the steps of Eq. 5
(Algorithm 1), and optional noise before each step (Algorithm 2). Each setting defaults to the value
of the teacher's authors. Left out: guidance, and the schedules of the paper's ablations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from core.config import Section
from core.errors import UserError
from core.roles import Denoiser
from pretrained.networks import family_of

NoiseOf = Callable[[int], Tensor]
"""Step number from 0 -> unit normals [N, C, H, W]."""


class Config(Section):
    """Settings of the sampler; null: the published setting of the network."""

    steps: int | None = Field(default=None, ge=1)
    """N: number of noise levels above 0, with two network passes each, one for the last."""
    sigma_min: float | None = Field(default=None, gt=0)
    """Smallest noise level in pixel units, clamped to the network's range."""
    sigma_max: float | None = Field(default=None, gt=0)
    """Largest noise level in pixel units, clamped to the network's range."""
    rho: float | None = Field(default=None, gt=0)
    """Exponent of the noise levels: larger values give shorter steps at low noise; 1: equal."""
    churn: float | None = Field(default=None, ge=0)
    """S_churn: amount of added noise over all steps; 0: deterministic."""
    churn_sigma_min: float | None = Field(default=None, ge=0)
    """S_tmin: smallest noise level with added noise, in pixel units."""
    churn_sigma_max: float | None = Field(default=None, gt=0)
    """S_tmax: largest noise level with added noise, in pixel units."""
    churn_noise: float | None = Field(default=None, gt=0)
    """S_noise: standard deviation of the added noise; slightly above 1 preserves detail."""

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Config:
        for low, high in (("sigma_min", "sigma_max"), ("churn_sigma_min", "churn_sigma_max")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}")
        return self


class Settings(NamedTuple):
    """Complete settings of the sampler, documented in `Config`."""

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    churn_sigma_min: float = 0.0
    churn_sigma_max: float = math.inf
    churn_noise: float = 1.0


def published_settings(denoiser: Denoiser) -> Settings:
    """Return the published sampler settings for a kind of network.

    18 steps up to 32x32, 40 above; 32 for EDM2: the published programs' settings. 256 with churn
    for ADM of a thousand classes (EDM, Table 5: twice as much with iDDPM preconditioning). For
    unpublished networks, including the mixture of Gaussians, the settings depend on the size.
    """
    config = getattr(denoiser, "config", None)
    if family_of(denoiser) == "edm2":
        return Settings(steps=32)
    if getattr(config, "model_type", "") == "DhariwalUNet" and denoiser.num_classes == 1000:
        churn = 80.0 if getattr(config, "preconditioning", "") == "iDDPM" else 40.0
        return Settings(
            steps=256, churn=churn, churn_sigma_min=0.05, churn_sigma_max=50.0, churn_noise=1.003
        )
    return Settings(steps=18 if denoiser.image_shape[-1] <= 32 else 40)


def settings_for(denoiser: Denoiser, config: Config) -> Settings:
    """Return the published settings, overridden by those of the config.

    Raises UserError if they leave no noise levels in the denoiser's range.
    """
    overrides = {name: value for name, value in config.model_dump().items() if value is not None}
    settings = published_settings(denoiser)._replace(**overrides)
    least, most = _range(denoiser, settings.sigma_min, settings.sigma_max)
    if least > most:
        raise UserError(
            f"sampler: no noise levels from sigma_min {least} up to sigma_max {most}; this network "
            f"was made for {denoiser.sigma_min:g} to {denoiser.sigma_max:g}"
        )
    if settings.churn > 0 and settings.churn_sigma_min > settings.churn_sigma_max:
        raise UserError(
            f"sampler: churn_sigma_min {settings.churn_sigma_min} is above churn_sigma_max "
            f"{settings.churn_sigma_max}; set both, or churn=0 for none"
        )
    return settings


def describe(denoiser: Denoiser, config: Config) -> str:
    """Return a sentence with the settings and the number of network passes for an image."""
    settings = settings_for(denoiser, config)
    values = ", ".join(f"{name} {value:g}" for name, value in settings._asdict().items())
    return f"Heun, {values}: {2 * settings.steps - 1} network passes"


def sample(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    noise: NoiseOf,
    *,
    config: Config,
) -> Tensor:
    """Return images [N, C, H, W] of `heun` with `settings_for` the denoiser."""
    settings = settings_for(denoiser, config)
    return heun(denoiser, latents, labels, noise=noise, **settings._asdict())


def sigma_steps(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Return [steps + 1] float64 noise levels from sigma_max down to sigma_min, then 0.

    sigma_i^(1/rho) are evenly spaced from sigma_max^(1/rho) to sigma_min^(1/rho) (EDM, Eq. 5); with
    one step the levels are sigma_max and 0. Raises ValueError if the range is empty.
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
    """Return images [N, C, H, W] float32, about [-1, 1], detached (EDM, Algorithms 1 and 2).

    latents: [N, C, H, W] unit normal. labels: [N] int64 or None. The range is clamped to the
    denoiser's, each level is rounded by its `round_sigma`; 2 steps - 1 network passes; steps are
    summed in float64. The denoiser must be in eval mode. churn: S_churn, which needs noise; at
    levels in [S_tmin, S_tmax] noise is added up to (1 + gamma) sigma, with
    gamma = min(S_churn / steps, 2^(1/2) - 1). Raises ValueError if churn is negative or without
    noise, or if the range is empty.
    """
    # check the arguments
    if churn < 0:
        raise ValueError(f"churn is {churn}, expected at least 0")
    if churn > 0 and noise is None:
        raise ValueError(f"churn is {churn}, and no noise is given to add")

    # noise levels, raised by churn, rounded to the denoiser's
    least, most = _range(denoiser, sigma_min, sigma_max)
    levels = sigma_steps(steps, sigma_min=least, sigma_max=most, rho=rho).to(latents.device)
    levels[:-1] = denoiser.round_sigma(levels[:-1])
    gamma = min(churn / steps, math.sqrt(2) - 1)
    in_churn_range = (churn_sigma_min <= levels) & (levels <= churn_sigma_max)
    raised = torch.where(in_churn_range, denoiser.round_sigma(levels + gamma * levels), levels)

    # Heun steps
    images = latents.double() * levels[0]
    ladder = torch.stack((levels[:-1], raised[:-1], levels[1:]), dim=1)  # [steps, 3]
    for step, (sigma, higher, next_sigma) in enumerate(ladder.tolist()):
        if higher > sigma:
            assert noise is not None
            scale = churn_noise * math.sqrt(higher**2 - sigma**2)
            images = images + scale * noise(step).double()
        slope = _slope(denoiser, images, labels, sigma=higher)
        next_images = images + (next_sigma - higher) * slope
        if next_sigma > 0:
            slope = (slope + _slope(denoiser, next_images, labels, sigma=next_sigma)) / 2
            next_images = images + (next_sigma - higher) * slope
        images = next_images
    return images.float()


def _range(denoiser: Denoiser, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Return the smallest and the largest noise level, clamped to the denoiser's range."""
    return max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)


def _slope(denoiser: Denoiser, images: Tensor, labels: Tensor | None, *, sigma: float) -> Tensor:
    """Return dx/dsigma of the probability flow, float64 (EDM, Eq. 4 for s = 1 and sigma = t)."""
    levels = torch.full((len(images),), sigma, dtype=torch.float32, device=images.device)
    return (images - denoiser(images.float(), levels, labels).double()) / sigma
