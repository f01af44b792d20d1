"""Denoising score matching on real images: a teacher for one's own (Karras et al. 2022).

One phase: the student, which is a denoiser here, learns to take noise from real images (EDM, Eq. 2
and Table 1). Augmented images come with the numbers that say how they were changed, so that the
images which it makes later, at numbers of 0, are not.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from core.config import Section
from core.distributed import unwrap
from core.errors import UserError
from core.randomness import Draws
from core.roles import Denoiser, LossOutput, Networks, Phase
from data.images import Images
from objectives import _augment
from objectives._dropout import dropping
from objectives._noise import LogNormal, SigmaLaw, add_noise, denoising_loss
from objectives._real_images import RealImages

_log = logging.getLogger(__name__)


class Config(Section):
    """Settings of the training of a denoiser."""

    trains: ClassVar = "denoiser"
    """Kind of the student."""

    name: Literal["denoising"] = "denoising"
    """Name of this objective."""
    images: str
    """Real images to learn from: a zip or folder in the layout of StyleGAN and EDM."""
    augment_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability of each geometric augmentation; above 0 the network needs augment_dim 9, and
    every second image is mirrored.
    """
    sigma: SigmaLaw = LogNormal()
    """Law of the noise level."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the images, in EDM's loss weight."""


class Denoising:
    """The one phase of training a denoiser on real images."""

    def __init__(self, config: Config, images: RealImages) -> None:
        self.config, self.images = config, images
        loss = partial(denoiser_loss, images=images, config=config)
        self.phases = (Phase("denoising", ("student",), loss),)

    def check_fit(self, denoiser: nn.Module) -> None:
        """Raise UserError if a denoiser cannot learn from these images."""
        known, images = cast(Denoiser, denoiser), self.images
        _log.info("%s: %s", images.source, images.description)
        classes = known.num_classes
        if tuple(known.image_shape) != images.image_shape:
            raise UserError(
                f"{images.source} holds images of shape {list(images.image_shape)}, the denoiser "
                f"is for {list(known.image_shape)} (channels, height, width): set "
                "student.config.img_channels and student.config.img_resolution to those of the "
                "images, or prepare them with python -m data prepare"
            )

        # labels
        if images.num_classes and not classes:
            _log.warning(
                "%s: its labels, of %d classes, are ignored: the denoiser has none "
                "(student.config.label_dim=0)",
                images.source,
                images.num_classes,
            )
        if classes and images.labels is None:
            raise UserError(
                f"{images.source} has no labels, the denoiser has {classes} classes: "
                "give it none, or the images a dataset.json"
            )
        if classes and images.num_classes > classes:
            raise UserError(
                f"{images.source} has labels up to {images.num_classes - 1}, "
                f"the denoiser has {classes} classes: give it as many as there are"
            )

        # augmentation
        wanted = _augment.LABELS if self.config.augment_probability > 0 else None
        if wanted and getattr(denoiser, "augment_dim", 0) != wanted:
            raise UserError(
                f"augmented images need a denoiser that is told how: give it augment_dim {wanted}, "
                "or set objective.augment_probability to 0"
            )


def build(config: Config) -> Denoising:
    """Return the objective with its images read. Raises UserError if they cannot be."""
    images = RealImages(Images(config.images))
    height, width = images.image_shape[1:]
    if config.augment_probability > 0 and height != width:
        raise UserError(f"{config.images}: only square images are augmented, not {width}x{height}")
    return Denoising(config, images)


def denoiser_loss(
    networks: Networks, draws: Draws, *, images: RealImages, config: Config
) -> LossOutput:
    """Return lambda(sigma) |D(x + sigma n; sigma) - x|^2 of real images x, [N]."""
    real, labels = images.drawn(draws)
    told: dict[str, Tensor] = {}
    if config.augment_probability > 0:
        real, told["augment_labels"] = _augment.augment(
            real, draws, probability=config.augment_probability
        )
    sigma = config.sigma.draw(draws, "sigma")
    noisy = add_noise(real, sigma, draws, "noise")
    labels = labels if unwrap(networks.student).num_classes else None
    with dropping(networks.student, draws):
        denoised = networks.student(noisy, sigma, labels, **told)
    return denoising_loss(denoised, real, sigma, sigma_data=config.sigma_data)
