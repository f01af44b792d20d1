"""A diffusion network at one noise level as a one-step generator (Diff-Instruct, Luo et al. 2023).

x = D(sigma z; sigma, c) with z unit normal and sigma fixed: any denoiser of teachers/, EDM or not.
Left out: augmentation labels, which stay 0.
"""

from __future__ import annotations

import copy
from typing import cast

from pydantic import Field
from torch import Tensor, nn

from core import plugins
from core.config import Section, validate
from core.errors import UserError
from core.roles import Denoiser, Generator
from pretrained import networks
from pretrained.nvidia_pickle import NetworkRecord


class Config(Section):
    """Settings of a one-step generator."""

    init_sigma: float = Field(default=1.0, gt=0)
    """The noise level it works at, in pixel units: latents are scaled by it."""
    family: str | None = None
    """Plug-in of teachers/ whose network it is; null: the teacher's."""
    network: dict[str, object] | None = None
    """Settings of that family; null: it begins as a copy of the teacher."""


class OneStepEDM(Generator):
    """Latents and labels to images: [N, C, H, W] unit normal, [N] int64 -> [N, C, H, W] float32."""

    def __init__(self, denoiser: Denoiser, *, config: Config) -> None:
        super().__init__()
        self.config, self.denoiser = config, denoiser
        self.latent_shape = denoiser.image_shape
        self.image_shape = denoiser.image_shape
        self.num_classes = denoiser.num_classes

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma = latents.new_full((len(latents),), self.config.init_sigma)
        return self.denoiser(latents * self.config.init_sigma, sigma, labels)


def build(config: Config) -> OneStepEDM:
    """Return the generator with freshly drawn weights. Raises UserError if none is named."""
    if config.family is None or config.network is None:
        raise UserError("one_step_edm needs a teacher to copy, or both family and network")
    module = plugins.load("teachers", config.family)
    settings = validate(module.Config, config.network, source=f"{config.family} in teachers/")
    return OneStepEDM(module.build(settings), config=config)


def from_teacher(teacher: nn.Module, config: Config) -> OneStepEDM:
    """Return the generator that begins as a copy of a teacher, on its device.

    Raises UserError if init_sigma is outside the teacher's noise levels.
    """
    known = cast(Denoiser, teacher)
    if not known.sigma_min <= config.init_sigma <= known.sigma_max:
        raise UserError(
            f"init_sigma {config.init_sigma} is outside the teacher's noise levels, "
            f"{known.sigma_min} to {known.sigma_max}"
        )
    shape = config.model_copy(
        update={
            "family": networks.family_of(teacher),
            "network": networks.config_of(teacher).model_dump(mode="json"),
        }
    )
    denoiser = copy.deepcopy(known)
    denoiser.requires_grad_(True)
    return OneStepEDM(denoiser, config=shape)


def from_record(record: NetworkRecord) -> Config | None:
    """Return None: no published pickle holds a one-step generator of this kind."""
    return None
