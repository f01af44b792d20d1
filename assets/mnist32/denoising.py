"""Training of the embedded teacher: EDM's denoising score matching on real images (Karras et al.,
2022).

Its loss, weight and noise law are EDM's (Table 1, Eq. 2); augmentation is left out, the learning
rate falls to zero along a half cosine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor

from teachers.edm import EDMDenoiser


@dataclass(frozen=True)
class Settings:
    """Settings of one denoising training."""

    total_kimg: float
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_kimg: float = 3.0
    ema_halflife_kimg: float = 4.0
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    seed: int = 0


def train(
    teacher: EDMDenoiser, images: Tensor, labels: Tensor, settings: Settings
) -> Iterator[tuple[int, EDMDenoiser, dict[str, float]]]:
    """Yield (images seen, moving average of the teacher, readings) after every 1,000 images or so.

    teacher: trained in place; images: [N, C, H, W] float32 in [-1, 1]; labels: [N] int64.
    """
    torch.manual_seed(settings.seed)
    average = copy.deepcopy(teacher).eval().requires_grad_(False)
    adam = torch.optim.Adam(teacher.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    size = settings.batch_size
    for step in range(int(settings.total_kimg * 1000) // size):
        adam.param_groups[0]["lr"] = _learning_rate(step * size, settings)
        chosen = torch.randint(len(images), [size])
        loss = _loss(teacher, images[chosen], labels[chosen], settings)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        halflife = min(settings.ema_halflife_kimg * 1000, 0.05 * (step + 1) * size)
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), teacher.parameters(), strict=True):
                slow.lerp_(fast, 1 - 0.5 ** (size / halflife))
        if (step + 1) % max(1000 // size, 1) == 0:
            yield (step + 1) * size, average, {"denoising": loss.item()}


def _learning_rate(images_seen: int, settings: Settings) -> float:
    rising = min(images_seen / (settings.warmup_kimg * 1000), 1.0)
    falling = (1 + cos(pi * images_seen / (settings.total_kimg * 1000))) / 2
    return settings.learning_rate * rising * falling


def _loss(teacher: EDMDenoiser, images: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """E[lambda(sigma) |D(x + sigma n; sigma) - x|^2], lambda = (sigma^2 + s^2) / (sigma s)^2, per
    pixel.
    """
    count = len(images)
    sigma = (torch.randn(count) * settings.log_sigma_std + settings.log_sigma_mean).exp()
    column = sigma.reshape(-1, 1, 1, 1)
    denoised = teacher(images + column * torch.randn_like(images), sigma, labels)
    spread = teacher.sigma_data
    weight = (column.square() + spread**2) / (column * spread).square()
    return (weight * (denoised - images).square()).mean()
