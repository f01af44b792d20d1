"""RealUID: distillation that also sees real images, without a discriminator (arXiv 2509.22459, Eqs.
13, 16, 17), in the form for denoisers.

The score phase fits the score network F to the student's images x and to real images r at once:
    alpha lambda(sigma) |F(x + sigma n) - (beta / alpha) x|^2
    + (1 - alpha) lambda(sigma) |F(r + sigma n) - (1 - beta) / (1 - alpha) r|^2
and the student phase, with the weights of F and of the teacher T frozen and the gradient flowing
through both, minimizes
    alpha lambda(sigma) (|T(y) - (beta / alpha) x|^2 - |F(y) - (beta / alpha) x|^2)
at y = x + sigma n.
Where the student's images are the real ones, F = T is the score phase's minimum, whatever alpha and
beta are. alpha = beta = 1 has no real images and is SiD with alpha = 0.5 (twice its loss); alpha =
beta < 1 was published as no better than that. The published results are with flow-matching targets;
denoisers are this project's translation.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from core.config import Section
from core.errors import UserError
from core.randomness import Draws
from core.roles import Generator, LossOutput, Networks, Phase
from data.images import Images
from objectives._noise import LogNormal, SigmaLaw, add_noise, edm_weight
from objectives._real_images import RealImages
from objectives._student import compared, make


class Config(Section):
    """Settings of RealUID."""

    name: Literal["real_uid"] = "real_uid"
    """Name of this objective."""
    images: str
    """Real images of the student's size: a zip or folder in the layout of StyleGAN and EDM."""
    alpha: float = Field(default=0.94, gt=0, lt=1)
    """Share of the student's images in the score phase."""
    beta_over_alpha: float = Field(default=0.98, gt=0)
    """beta / alpha: how far from 1 it is says how much real images matter; 1: not at all."""
    sigma: SigmaLaw = LogNormal()
    """Law of the noise level, in both phases."""
    score_steps: int = Field(default=5, ge=1)
    """Score steps for each student step."""
    head_start_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images during which only the score network learns."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the images, in EDM's loss weight."""

    @model_validator(mode="after")
    def _has_a_share_of_real_images(self) -> Config:
        if self.alpha * self.beta_over_alpha >= 1:
            raise ValueError("alpha times beta_over_alpha must be below 1")
        return self


class RealUID:
    """The two phases of RealUID, score first."""

    def __init__(self, config: Config, images: RealImages) -> None:
        self.images = images
        score = partial(score_loss, real=images, config=config)
        student = partial(student_loss, config=config)
        begin = round(config.head_start_kimg * 1000)
        self.phases = (
            Phase("score", ("score",), score, repeats=config.score_steps),
            Phase("student", ("student",), student, starts_at=begin),
        )

    def check_fit(self, student: Generator) -> None:
        """Raise UserError if the real images are not of the student's size and classes."""
        known, images = student, self.images
        if tuple(known.image_shape) != images.image_shape:
            raise UserError(
                f"{images.source} holds images of shape {list(images.image_shape)}, the student "
                f"makes {list(known.image_shape)} (channels, height, width): prepare them with "
                "python -m data prepare"
            )
        if known.num_classes and (images.labels is None or images.num_classes > known.num_classes):
            raise UserError(
                f"{images.source} has {images.num_classes or 'no'} classes, the student "
                f"{known.num_classes}: give it a dataset.json with the student's classes"
            )


def build(config: Config) -> RealUID:
    """Return the objective with its images read. Raises UserError if they cannot be."""
    return RealUID(config, RealImages(Images(config.images)))


def score_loss(networks: Networks, draws: Draws, *, real: RealImages, config: Config) -> LossOutput:
    """Return the denoising loss of the score network on the student's and on real images, [N]."""
    with torch.no_grad():
        images, labels = make(networks, draws)
        of_real, real_labels = real.drawn(draws)
        of_real = networks.adapter(of_real)
    sigma = config.sigma.draw(draws, "sigma")
    ratio = config.beta_over_alpha
    real_ratio = (1 - config.alpha * ratio) / (1 - config.alpha)
    of_student = _distance(networks, draws, images, labels, sigma, ratio, "noise", config)
    known = real_labels if labels is not None else None
    of_images = _distance(networks, draws, of_real, known, sigma, real_ratio, "real_noise", config)
    loss = config.alpha * of_student + (1 - config.alpha) * of_images
    values = images[0].numel()
    stats = {"score_loss": of_student, "real_score_loss": of_images}
    return LossOutput(loss, {name: v.detach().mean() / values for name, v in stats.items()})


def student_loss(networks: Networks, draws: Draws, *, config: Config) -> LossOutput:
    """Return alpha lambda (|T - (beta / alpha) x|^2 - |F - (beta / alpha) x|^2), [N]."""
    images, sigma, score, teacher = compared(networks, draws, config.sigma)
    target = config.beta_over_alpha * images
    gap = (teacher - target).square() - (score - target).square()
    weight = config.alpha * edm_weight(sigma, sigma_data=config.sigma_data)
    loss = weight * gap.flatten(1).sum(1)
    return LossOutput(loss, {"student_loss": loss.detach().mean() / images[0].numel()})


def _distance(
    networks: Networks,
    draws: Draws,
    images: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    ratio: float,
    purpose: str,
    config: Config,
) -> Tensor:
    """Return lambda(sigma) |F(images + sigma n) - ratio images|^2 summed over pixels, [N]."""
    denoised = networks.score(add_noise(images, sigma, draws, purpose), sigma, labels)
    squared = (denoised - ratio * images).square().flatten(1).sum(1)
    return edm_weight(sigma, sigma_data=config.sigma_data) * squared
