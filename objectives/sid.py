"""Score identity distillation (SiD; Zhou et al., ICML 2024) and score implicit matching (SIM; Luo
et al., NeurIPS 2024): a distance between the scores of student and teacher.

Two phases. The score phase is that of Diff-Instruct. The student phase lets the gradient flow by
the noisy image y = x + sigma n through the teacher T and the score network F too, whose weights are
frozen: it sees how the scores change when an image moves, which the Integral KL gradient does not.
With a perfect score network, alpha = 0.5 is the gradient of E |s_F - s_T|^2; alpha = 1 is SIM with
a squared distance; 1.2, SiD's, makes up for a score network that lags behind.

A student step costs two passes backward through T and F more than Diff-Instruct's, and holds both
their graphs. Left out: dropout (of F and T none may be active here).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from core.config import Section
from core.randomness import Draws
from core.roles import LossOutput, Networks, Phase
from objectives._noise import Karras, LogNormal, SigmaLaw
from objectives._student import compared, score_loss

Normalizer = Literal["l1", "pseudo_huber", "none"]


class Config(Section):
    """Settings of SiD and SIM."""

    name: Literal["sid"] = "sid"
    """Name of this objective."""
    alpha: float = Field(default=1.2, ge=0.5)
    """Weight of the squared distance of denoised images: 1.2 in SiD, 1 in SIM."""
    normalizer: Normalizer = "l1"
    """Divisor of an image's loss. l1: mean |x - T|, as SiD; pseudo_huber: sqrt(|T - F|^2 + c^2), as
    SIM's distance, through which the gradient flows too; none: 1.
    """
    huber_c: float = Field(default=0.00054, gt=0)
    """c of pseudo_huber, times the square root of the number of an image's values."""
    sigma: SigmaLaw = Karras(sigma_max=24.4)
    """Law of the noise level in the student phase; SiD: the lower four fifths of EDM's schedule."""
    score_sigma: SigmaLaw = LogNormal()
    """Law of the noise level in the score phase."""
    score_steps: int = Field(default=1, ge=1)
    """Score steps for each student step."""
    head_start_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images during which only the score network learns."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the images, in EDM's loss weight."""


class ScoreIdentity:
    """The two phases of SiD, score first."""

    def __init__(self, config: Config) -> None:
        score = partial(score_loss, sigma=config.score_sigma, sigma_data=config.sigma_data)
        student = partial(student_loss, config=config)
        begin = round(config.head_start_kimg * 1000)
        self.phases = (
            Phase("score", ("score",), score, repeats=config.score_steps),
            Phase("student", ("student",), student, starts_at=begin),
        )


def build(config: Config) -> ScoreIdentity:
    """Return the objective with these settings."""
    return ScoreIdentity(config)


def student_loss(networks: Networks, draws: Draws, *, config: Config) -> LossOutput:
    """Return the loss of SiD or SIM, [N]; its value may be negative."""
    images, _, score, teacher = compared(networks, draws, config.sigma)
    loss = identity_loss(
        images,
        score,
        teacher,
        alpha=config.alpha,
        normalizer=config.normalizer,
        huber_c=config.huber_c,
    )
    difference = (score - teacher).detach().square().mean((1, 2, 3)).sqrt().mean()
    return LossOutput(loss, {"student_loss": loss.detach().mean(), "score_difference": difference})


def identity_loss(
    images: Tensor,
    score: Tensor,
    teacher: Tensor,
    *,
    alpha: float,
    normalizer: Normalizer = "none",
    huber_c: float = 0.00054,
) -> Tensor:
    """Return <T - F, (T - x) - alpha (T - F)> / normalizer, summed over pixels: [N].

    images x, score F and teacher T, both denoised images of x + sigma n: [N, C, H, W], with graph.
    """
    difference = teacher - score
    product = (difference * (teacher - images - alpha * difference)).flatten(1).sum(1)
    if normalizer == "l1":
        return product / (images - teacher).detach().abs().mean((1, 2, 3)).clamp_min(1e-5)
    if normalizer == "pseudo_huber":
        squared = difference.square().flatten(1).sum(1)
        return product / (squared + huber_c**2 * images[0].numel()).sqrt()
    return product
