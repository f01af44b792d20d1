"""Noise and the loss of removing it: laws that the noise level sigma is drawn from, in pixel units,
and EDM's weighted denoising loss.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from core.config import Section
from core.randomness import Draws
from core.roles import LossOutput


class LogNormal(Section):
    """log sigma ~ N(mean, std^2) (EDM, Table 1)."""

    law: Literal["lognormal"] = "lognormal"
    """Name of this law."""
    mean: float = -1.2
    """Mean of log sigma."""
    std: float = Field(default=1.2, ge=0)
    """Standard deviation of log sigma."""

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        """Return sigma [N]."""
        return (draws.normal(purpose) * self.std + self.mean).exp()


class Karras(Section):
    """sigma at a uniformly drawn position of EDM's sampling schedule (EDM, Eq. 5)."""

    law: Literal["karras"] = "karras"
    """Name of this law."""
    sigma_min: float = Field(default=0.002, gt=0)
    """Smallest sigma."""
    sigma_max: float = Field(default=80.0, gt=0)
    """Largest sigma."""
    rho: float = Field(default=7.0, gt=0)
    """Curvature of the schedule: larger favours small sigma."""

    @model_validator(mode="after")
    def _ordered(self) -> Karras:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    def draw(self, draws: Draws, purpose: str) -> Tensor:
        """Return sigma [N]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + draws.uniform(purpose) * (low - high)) ** self.rho


def _lognormal_unless_named(value: object) -> object:
    return {"law": "lognormal", **value} if isinstance(value, dict) else value


SigmaLaw = Annotated[
    Annotated[LogNormal | Karras, Field(discriminator="law")],
    BeforeValidator(_lognormal_unless_named),
]


def column(sigma: Tensor) -> Tensor:
    """Return sigma [N] as [N, 1, 1, 1], to broadcast over images."""
    return sigma[:, None, None, None]


def add_noise(images: Tensor, sigma: Tensor, draws: Draws, purpose: str) -> Tensor:
    """Return images + sigma n with n unit normal: [N, C, H, W]; sigma: [N]."""
    return images + column(sigma) * draws.normal(purpose, tuple(images.shape[1:]))


def denoising_loss(
    denoised: Tensor, images: Tensor, sigma: Tensor, *, sigma_data: float
) -> LossOutput:
    """Return lambda(sigma) |D(x + sigma n; sigma) - x|^2 summed over pixels, [N]; its reading is
    per pixel.
    """
    loss = edm_weight(sigma, sigma_data=sigma_data) * (denoised - images).square().flatten(1).sum(1)
    return LossOutput(loss, {"score_loss": loss.detach().mean() / images[0].numel()})


def edm_weight(sigma: Tensor, *, sigma_data: float) -> Tensor:
    """Return lambda(sigma) = (sigma^2 + s^2) / (sigma s)^2, s = sigma_data (EDM, Table 1), [N]."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
