"""EDM's sampler (Karras et al. 2022, arXiv 2206.00364), deterministic and stochastic.

Heun's method of second order on dx/dsigma = (x - D(x; sigma)) / sigma, with the steps of Eq. 5
(Algorithm 1), and with noise added before each step, as much as is asked for (Algorithm 2). A
recipe may set each of its numbers; one that is left open is what the teacher's authors used. Left
out: guidance, and the schedules of the paper's ablations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.config import Section
from core.errors import UserError
from core.roles import Denoiser
from pretrained.networks import family_of

NoiseOf = Callable[[int], Tensor]
"""From the number of a step, 0 first, to unit normals [N, C, H, W]."""


class Config(Section):
    """How a diffusion model is sampled; null is as its authors did."""

    steps: int | None = Field(default=None, ge=1)
    """N: noise levels above 0, each two network passes, the last one."""
    sigma_min: float | None = Field(default=None, gt=0)
    """Smallest of them, in pixel units; not below what the network was made for."""
    sigma_max: float | None = Field(default=None, gt=0)
    """Largest of them, in pixel units; not above what the network was made for."""
    rho: float | None = Field(default=None, gt=0)
    """How much shorter the steps are at low noise levels; 1 makes all of them equal."""
    churn: float | None = Field(default=None, ge=0)
    """S_churn: how much noise is added on the way, over all steps; 0 adds none."""
    churn_sigma_min: float | None = Field(default=None, ge=0)
    """S_tmin: no noise is added below this level, in pixel units."""
    churn_sigma_max: float | None = Field(default=None, gt=0)
    """S_tmax: no noise is added above this level, in pixel units."""
    churn_noise: float | None = Field(default=None, gt=0)
    """S_noise: standard deviation of the noise that is added; a little over 1 keeps detail."""

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Config:
        for low, high in (("sigma_min", "sigma_max"), ("churn_sigma_min", "churn_sigma_max")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}")
        return self


class Settings(NamedTuple):
    """A sampler's settings, none of them open; the words of `Config`."""

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    churn_sigma_min: float = 0.0
    churn_sigma_max: float = math.inf
    churn_noise: float = 1.0


def published(denoiser: Denoiser) -> Settings:
    """Return what the authors of EDM and EDM2 sampled a network of this kind with.

    18 steps up to 32x32, 40 above; 32 for EDM2: the published programs' settings. 256 with churn
    for ADM of a thousand classes (EDM, Table 5: twice as much where it was trained as iDDPM).
    Networks that nobody published, the mixture of Gaussians too, go by their size.
    """
    config = getattr(denoiser, "config", None)
    if family_of(cast(nn.Module, denoiser)) == "edm2":
        return Settings(steps=32)
    if getattr(config, "model_type", "") == "DhariwalUNet" and denoiser.num_classes == 1000:
        churn = 80.0 if getattr(config, "preconditioning", "") == "iDDPM" else 40.0
        return Settings(
            steps=256, churn=churn, churn_sigma_min=0.05, churn_sigma_max=50.0, churn_noise=1.003
        )
    return Settings(steps=18 if denoiser.image_shape[-1] <= 32 else 40)


def settings_for(denoiser: Denoiser, config: Config) -> Settings:
    """Return the published settings with those on top that are given.

    Raises UserError where the two together, or the denoiser's own range, leave no noise levels.
    """
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    settings = published(denoiser)._replace(**given)
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


def described(denoiser: Denoiser, config: Config) -> str:
    """Return `settings_for` the denoiser in words, and how many network passes an image takes."""
    settings = settings_for(denoiser, config)
    named = ", ".join(f"{name} {value:g}" for name, value in settings._asdict().items())
    return f"Heun, {named}: {2 * settings.steps - 1} network passes"


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
    churn: S_churn, which needs noise; between the levels S_tmin and S_tmax, both included, the
    image is first taken up to (1 + gamma) sigma, gamma = min(S_churn / steps, 2^(1/2) - 1). Raises
    ValueError where churn is negative or has no noise, or the range is empty.
    """
    if churn < 0:
        raise ValueError(f"churn is {churn}, expected at least 0")
    if churn > 0 and noise is None:
        raise ValueError(f"churn is {churn}, and no noise is given to add")
    least, most = _range(denoiser, sigma_min, sigma_max)
    levels = sigma_steps(steps, sigma_min=least, sigma_max=most, rho=rho).to(latents.device)
    rounded = getattr(denoiser, "round_sigma", lambda sigma: sigma)  # to those that it knows
    levels[:-1] = rounded(levels[:-1])
    gamma = min(churn / steps, math.sqrt(2) - 1)
    churned = (churn_sigma_min <= levels) & (levels <= churn_sigma_max)
    raised = torch.where(churned, rounded(levels + gamma * levels), levels)
    images = latents.double() * levels[0]
    ladder = torch.stack((levels[:-1], raised[:-1], levels[1:]), dim=1)  # [steps, 3]
    for step, (sigma, higher, next_sigma) in enumerate(ladder.tolist()):
        if higher > sigma:
            assert noise is not None
            added = churn_noise * math.sqrt(higher**2 - sigma**2)
            images = images + added * noise(step).double()
        slope = _slope(denoiser, images, labels, sigma=higher)
        moved = images + (next_sigma - higher) * slope
        if next_sigma > 0:
            slope = (slope + _slope(denoiser, moved, labels, sigma=next_sigma)) / 2
            moved = images + (next_sigma - higher) * slope
        images = moved
    return images.float()


def _range(denoiser: Denoiser, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Return the smallest and the largest noise level that are inside the denoiser's range."""
    return max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)


def _slope(denoiser: Denoiser, images: Tensor, labels: Tensor | None, *, sigma: float) -> Tensor:
    """Return dx/dsigma of the probability flow, float64 (EDM, Eq. 4 for s = 1 and sigma = t)."""
    levels = torch.full((len(images),), sigma, dtype=torch.float32, device=images.device)
    return (images - denoiser(images.float(), levels, labels).double()) / sigma
