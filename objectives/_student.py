"""What objectives of generators share: the student's images, and the score network's own step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from core.distributed import unwrap
from core.randomness import Draws
from core.roles import Denoiser, Generator, LossOutput, Networks
from objectives._dropout import dropping
from objectives._noise import SigmaLaw, add_noise, denoising_loss


class Made(NamedTuple):
    """The student's images, as the teacher sees them."""

    images: Tensor
    """[N, C, H, W]"""
    labels: Tensor | None
    """[N] int64 for the teacher and the score network, or None if they are unconditional."""


def make(networks: Networks, draws: Draws, *, dropout: bool = False) -> Made:
    """Return the student's images of drawn latents and labels."""
    student = cast(Generator, unwrap(networks.student))
    latents = draws.normal("latents", student.latent_shape)
    labels = draws.integers("labels", student.num_classes) if student.num_classes else None
    with dropping(networks.student, draws.with_scope(f"{draws.scope}/make"), wanted=dropout):
        images = networks.student(latents, labels)
    is_conditional = cast(Denoiser, unwrap(networks.score)).num_classes > 0
    return Made(networks.adapter(images), labels if is_conditional else None)


def score_loss(
    networks: Networks,
    draws: Draws,
    *,
    sigma: SigmaLaw,
    sigma_data: float = 0.5,
    dropout: bool = False,
) -> LossOutput:
    """Return EDM's denoising loss of the score network on the student's images (EDM, Eq. 2 and
    Table 1), [N].
    """
    with torch.no_grad():
        images, labels = make(networks, draws)
    level = sigma.draw(draws, "sigma")
    noisy = add_noise(images, level, draws, "noise")
    with dropping(networks.score, draws, wanted=dropout):
        denoised = networks.score(noisy, level, labels)
    return denoising_loss(denoised, images, level, sigma_data=sigma_data)


class Compared(NamedTuple):
    """The student's images, and how score network and teacher denoise them: all with graph."""

    images: Tensor
    """x, [N, C, H, W]"""
    sigma: Tensor
    """[N]"""
    score: Tensor
    """F(x + sigma n), [N, C, H, W]"""
    teacher: Tensor
    """T(x + sigma n), [N, C, H, W]"""


def compared(networks: Networks, draws: Draws, law: SigmaLaw) -> Compared:
    """Return images and their denoised forms; gradients flow to the student by all of them, and
    the weights of score network and teacher get none.
    """
    images, labels = make(networks, draws)
    sigma = law.draw(draws, "sigma")
    noisy = add_noise(images, sigma, draws, "noise")
    with _frozen(networks.score, networks.teacher):
        score = networks.score(noisy, sigma, labels)
        teacher = networks.teacher(noisy, sigma, labels)
    return Compared(images, sigma, score, teacher)


@contextmanager
def _frozen(*networks: nn.Module) -> Iterator[None]:
    """Run the body with weights that record no gradients; gradients by the inputs are as ever."""
    learning = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
