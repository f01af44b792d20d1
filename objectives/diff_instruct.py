"""Diff-Instruct: the Integral KL divergence between student and teacher (Luo et al., NeurIPS 2023).

Two phases a round. The score phase fits the score network to the student's own images by denoising,
so that it knows the score of the student's images. The student phase moves each image along the
difference between the two networks' scores (Diff-Instruct, Eq. 3.2): the gradient of
    E_sigma w(sigma) KL(student * N(0, sigma^2) || teacher * N(0, sigma^2)).
Left out: the paper's remark on GAN discriminators as a special case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.config import Section
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from objectives._dropout import dropping
from objectives._noise import LogNormal, SigmaLaw, add_noise, column, denoising_loss, edm_weight
from objectives._student import make, score_loss

Weighting = Literal["sigma_squared", "edm", "uniform", "dmd"]


class Dropout(Section):
    """Networks whose dropout is active; none by default. The official code has all three."""

    renamed: ClassVar[Mapping[str, str]] = {"pull": "gradient"}

    score: bool = False
    """In the score phase: the score network."""
    gradient: bool = False
    """In the student phase: score network and teacher, both the same features."""
    student: bool = False
    """In the student phase: the student, if it is a diffusion network (one_step_edm)."""


class Config(Section):
    """Settings of Diff-Instruct."""

    name: Literal["diff_instruct"] = "diff_instruct"
    """Name of this objective."""
    weighting: Weighting = "sigma_squared"
    """w(sigma) on the score difference: sigma_squared, edm, uniform or dmd."""
    sigma: SigmaLaw = LogNormal()
    """Law of the noise level in the student phase."""
    score_sigma: SigmaLaw | None = None
    """Law of the noise level in the score phase; null: as in the student phase."""
    score_steps: int = Field(default=1, ge=1)
    """Score steps for each student step."""
    shared_batch: bool = False
    """Take a score and the student step on one batch of images, with one score pass for both."""
    head_start_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images during which only the score network learns."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the images, in EDM's loss weight."""
    dropout: Dropout = Dropout()
    """Who drops features, and when."""

    @model_validator(mode="after")
    def _one_law_of_a_shared_batch(self) -> Config:
        if self.shared_batch and self.score_sigma not in (None, self.sigma):
            raise ValueError("shared_batch has one sigma for both steps: leave score_sigma out")
        return self

    @model_validator(mode="after")
    def _one_score_pass_of_a_shared_batch(self) -> Config:
        if self.shared_batch and self.dropout.score != self.dropout.gradient:
            raise ValueError(
                "shared_batch has one pass of the score network for both steps: "
                "give dropout.score and dropout.gradient the same value"
            )
        return self


class DiffInstruct:
    """The two phases of Diff-Instruct, score first; or, on a shared batch, both at once."""

    def __init__(self, config: Config) -> None:
        score = partial(
            score_loss,
            sigma=config.score_sigma or config.sigma,
            sigma_data=config.sigma_data,
            dropout=config.dropout.score,
        )
        student, both = (partial(loss, config=config) for loss in (student_loss, shared_loss))
        begin, steps = round(config.head_start_kimg * 1000), config.score_steps
        if not config.shared_batch:
            self.phases = (
                Phase("score", ("score",), score, repeats=steps),
                Phase("student", ("student",), student, starts_at=begin),
            )
        else:
            self.phases = (
                Phase("score", ("score",), score, repeats=steps, ends_at=begin),
                Phase("score", ("score",), score, repeats=steps - 1, starts_at=begin),
                Phase("both", ("score", "student"), both, starts_at=begin),
            )


def build(config: Config) -> DiffInstruct:
    """Return the objective with these settings."""
    return DiffInstruct(config)


def student_loss(networks: Networks, draws: Draws, *, config: Config) -> LossOutput:
    """Return the surrogate of the Integral KL divergence, [N]; only its gradient has a meaning."""
    generated = make(networks, draws, dropout=config.dropout.student)
    sigma = config.sigma.draw(draws, "sigma")
    noisy = add_noise(generated.images.detach(), sigma, draws, "noise")
    pair = (networks.score, networks.teacher)
    score, teacher = (
        _denoised(network, noisy, sigma, generated.labels, draws, config=config) for network in pair
    )
    return _surrogate(generated.images, score, teacher, sigma, config=config)


def shared_loss(networks: Networks, draws: Draws, *, config: Config) -> LossOutput:
    """Return the sum of both phases' losses on the same images, noise and score pass, [N].

    The score network learns from the first term alone and the student from the second alone, so
    the gradient of the sum is both. The student meets the score of before this step.
    """
    generated = make(networks, draws, dropout=config.dropout.student)
    images = generated.images.detach()
    sigma = config.sigma.draw(draws, "sigma")
    noisy = add_noise(images, sigma, draws, "noise")
    teacher = _denoised(networks.teacher, noisy, sigma, generated.labels, draws, config=config)
    with dropping(networks.score, draws, wanted=config.dropout.score):
        score = networks.score(noisy, sigma, generated.labels)
    of_score = denoising_loss(score, images, sigma, sigma_data=config.sigma_data)
    of_student = _surrogate(generated.images, score.detach(), teacher, sigma, config=config)
    stats = {**of_score.stats, **of_student.stats}
    return LossOutput(of_score.per_image + of_student.per_image, stats)


def _denoised(
    network: nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    draws: Draws,
    *,
    config: Config,
) -> Tensor:
    """Return the denoised images of score network or teacher in the student phase, no graph."""
    with torch.no_grad(), dropping(network, draws, wanted=config.dropout.gradient):
        return network(noisy, sigma, labels)


def _surrogate(
    images: Tensor,
    score_denoised: Tensor,
    teacher_denoised: Tensor,
    sigma: Tensor,
    *,
    config: Config,
) -> LossOutput:
    """Return a loss [N] whose gradient by the images is the IKL gradient."""
    gradient = ikl_gradient(
        images.detach(),
        score_denoised,
        teacher_denoised,
        sigma,
        weighting=config.weighting,
        sigma_data=config.sigma_data,
    )
    loss = (gradient * images).flatten(1).sum(1)
    return LossOutput(loss, {"ikl_gradient": gradient.square().mean((1, 2, 3)).sqrt().mean()})


def ikl_gradient(
    images: Tensor,
    score_denoised: Tensor,
    teacher_denoised: Tensor,
    sigma: Tensor,
    *,
    weighting: Weighting,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return w(sigma) (s_score - s_teacher), the gradient of the Integral KL by the image: [N, C,
    H, W].

    s(y; sigma) = (D(y; sigma) - y) / sigma^2, so y cancels and D_score - D_teacher remains, times

        sigma_squared  1                            w = sigma^2, the official code's choice
        edm            lambda(sigma)                w = sigma^2 lambda(sigma), EDM's weight
        uniform        1 / sigma^2                  w = 1
        dmd            1 / mean |x - D_teacher|     DMD (Yin et al., 2024), Eq. 8

    images: [N, C, H, W], detached; sigma: [N].
    """
    difference = score_denoised - teacher_denoised
    if weighting == "dmd":
        distance = (images - teacher_denoised).abs().mean((1, 2, 3))
        return difference / column(distance.clamp_min(1e-8))
    return column(_WEIGHTS[weighting](sigma, sigma_data)) * difference


_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigma_squared": lambda sigma, _: torch.ones_like(sigma),
    "edm": lambda sigma, sigma_data: edm_weight(sigma, sigma_data=sigma_data),
    "uniform": lambda sigma, _: sigma.square().reciprocal(),
}
