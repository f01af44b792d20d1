"""Students and denoisers of Gaussians, whose losses and gradients have closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from core.randomness import Draws
from core.roles import Networks
from objectives._noise import LogNormal
from teachers import gaussian

CPU = torch.device("cpu")
SHAPE = (1, 2, 2)
PIXELS = 4
SIGMA = 0.7
FIXED = LogNormal(mean=math.log(SIGMA), std=0)
"""Law of one noise level."""
STUDENT_MEAN = torch.tensor([0.5, -0.3, 0.0, 1.0])
STUDENT_STD = torch.tensor([0.4, 0.8, 0.2, 0.5])
TEACHER_MEAN = torch.tensor([-0.2, 0.1, 0.3, 0.9])
TEACHER_STD = torch.tensor([0.6, 0.5, 0.3, 0.5])


class DiagonalStudent(nn.Module):
    """x = mean + std z, pixel by pixel."""

    latent_shape, image_shape, num_classes = (PIXELS,), SHAPE, 0

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(std.clone())

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self.mean + self.std * latents).view(-1, *SHAPE)


class AffineStudent(nn.Module):
    """x = mean + A z: a Gaussian of any covariance."""

    latent_shape, image_shape, num_classes = (PIXELS,), SHAPE, 0

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean.clone()), nn.Parameter(factor.clone())

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self.mean + latents @ self.factor.t()).view(-1, *SHAPE)


class AffineDenoiser(nn.Module):
    """D(y) = m + C (C + sigma^2)^-1 (y - m), exact for N(m, C = F F^T) of any covariance."""

    image_shape, num_classes, sigma_min, sigma_max = SHAPE, 0, 0.002, 80.0

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean.clone()), nn.Parameter(factor.clone())

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        covariance = self.factor @ self.factor.t()
        noised = covariance + sigma.square()[:, None, None] * torch.eye(PIXELS)  # [N, 4, 4]
        offset = (noisy.flatten(1) - self.mean)[:, :, None]
        return (self.mean + (covariance @ torch.linalg.solve(noised, offset))[..., 0]).view_as(
            noisy
        )


def denoiser(mean: Tensor, std: Tensor) -> gaussian.GaussianMixture:
    """Return the exact denoiser of N(mean, diag std^2)."""
    config = gaussian.Config(
        image_shape=SHAPE, means=(tuple(mean.tolist()),), std=(tuple(std.tolist()),)
    )
    return gaussian.build(config)


def exact_networks() -> Networks:
    """Return a Gaussian student, its exact denoiser as score, and another Gaussian's teacher."""
    return Networks(
        DiagonalStudent(STUDENT_MEAN, STUDENT_STD),
        denoiser(STUDENT_MEAN, STUDENT_STD),
        denoiser(TEACHER_MEAN, TEACHER_STD),
    )


def batch(count: int, *, seed: int = 0) -> Draws:
    return Draws(seed, images_seen=0, first=0, count=count, device=CPU)
