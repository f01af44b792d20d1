"""A mixture of Gaussians with diagonal covariance and its exact denoiser: a teacher in closed form.

For tests, in which it makes an objective exact, and for the ten-second tutorial recipe. All that
matters is trainable, so that a copy can serve as the score network. Left out: full covariance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from core.config import Section
from core.roles import Denoiser
from pretrained.nvidia_pickle import NetworkRecord
from teachers._inputs import check_inputs


class Config(Section):
    """A mixture of Gaussians over images, its components equally likely."""

    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Channels, height and width of an image."""
    components: int = Field(default=4, ge=1)
    """Number of Gaussians; where means are given, their number."""
    seed: int = Field(default=0, ge=0)
    """Draws the means, smooth images within [-1, 1], if none are given."""
    means: tuple[tuple[float, ...], ...] | None = None
    """One flattened image for each component, or nothing: drawn from the seed."""
    std: PositiveFloat | tuple[tuple[PositiveFloat, ...], ...] = 0.1
    """Standard deviation in pixel units: one number, or one for each component and pixel."""
    num_classes: int = Field(default=0, ge=0)
    """0 = unconditional; else as many as components: a label picks its component."""

    @model_validator(mode="before")
    @classmethod
    def _with_counted_means(cls, values: object) -> object:
        if isinstance(values, Mapping) and isinstance(values.get("means"), list | tuple):
            return {"components": len(values["means"]), **values}
        return values

    @model_validator(mode="after")
    def _check_pairs(self) -> Config:
        expected = (self.components, math.prod(self.image_shape))
        for name, rows in (("means", self.means), ("std", self.std)):
            if isinstance(rows, tuple):
                _check_table(name, rows, expected)
        if self.num_classes not in (0, self.components):
            raise ValueError(
                f"num_classes is {self.num_classes}, expected 0 or {self.components} (components)"
            )
        return self


class GaussianMixture(Denoiser):
    """The denoiser of sum_k pi_k N(m_k, diag v_k), m = means and log v = 2 log_stds.

    A `core.roles.Denoiser`.
    """

    def __init__(self, means: Tensor, stds: Tensor, *, config: Config) -> None:
        """means, stds: [components, C*H*W]."""
        super().__init__()
        self.config = config
        self.image_shape = config.image_shape
        self.num_classes = config.num_classes
        self.sigma_min = 0.002
        self.sigma_max = 80.0
        self.means = nn.Parameter(means.clone())
        self.log_stds = nn.Parameter(stds.log())
        self.logits: Tensor
        if config.num_classes:  # labels pick the component, and DDP waits for every gradient
            self.register_buffer("logits", torch.zeros(len(means)))
        else:
            self.logits = nn.Parameter(torch.zeros(len(means)))

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E[x | noisy] [N, C, H, W] float32.

        That is sum_k r_k (m_k + v_k / (v_k + sigma^2) (noisy - m_k)), r_k the posterior probability
        of component k: given k, it is the mean of a Gaussian observed with Gaussian noise (Bishop
        2006, Eq. 2.116). For v -> 0 it is the ideal denoiser of a finite set (EDM, Appendix B.3).
        noisy: [N, C, H, W]. sigma: [N]. labels: [N] int64; None is the mixture of all classes.
        Raises ValueError if a shape does not fit.
        """
        check_inputs(
            noisy, sigma, labels, image_shape=self.image_shape, num_classes=self.num_classes
        )
        posterior = self._posterior(noisy, sigma)
        if labels is None:
            weights = (self.logits + posterior.log_densities).softmax(dim=1)
        else:
            weights = F.one_hot(labels.long(), self.num_classes).float()
        return (weights[:, :, None] * posterior.means).sum(dim=1).view(noisy.shape)

    def log_density(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return log p(noisy; sigma) [N], of the mixture with noise of level sigma [N] added."""
        joint = self.logits.log_softmax(dim=0) + self._posterior(noisy, sigma).log_densities
        return joint.logsumexp(dim=1)

    def draw(self, normals: Tensor, uniforms: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images [N, C, H, W] of the mixture: a function of unit normals and uniforms [N].

        labels: [N] int64, or None for components picked by the uniforms in [0, 1).
        """
        if labels is None:
            edges = self.logits.softmax(dim=0).cumsum(dim=0)
            labels = torch.searchsorted(edges, uniforms, right=True).clamp(max=len(edges) - 1)
        images = self.means[labels] + self.log_stds.exp()[labels] * normals.flatten(1)
        return images.view(normals.shape)

    def _posterior(self, noisy: Tensor, sigma: Tensor) -> _Posterior:
        offsets = noisy.float().flatten(1)[:, None] - self.means  # [N, components, C*H*W]
        variances = (2 * self.log_stds).exp()
        noised = variances + sigma.float().square()[:, None, None]
        exponents = offsets.square() / noised + (2 * math.pi * noised).log()
        return _Posterior(self.means + variances / noised * offsets, -exponents.sum(dim=2) / 2)


class _Posterior(NamedTuple):
    """Posterior of each component, given a noisy image."""

    means: Tensor
    """[N, components, C*H*W]: E[x | noisy, component]"""
    log_densities: Tensor
    """[N, components]: log p(noisy | component)"""


def build(config: Config) -> GaussianMixture:
    """Return the mixture, its components equally likely."""
    shape = (config.components, math.prod(config.image_shape))
    if config.means is None:
        means = _smooth_images(config).view(shape)
    else:
        means = torch.tensor(config.means)
    return GaussianMixture(means, torch.tensor(config.std).expand(shape), config=config)


def from_record(record: NetworkRecord) -> Config | None:
    """Return None: no published pickle holds a mixture of Gaussians."""
    return None


def _smooth_images(config: Config) -> Tensor:
    """Return [components, C, H, W] smooth random images within [-1, 1], a function of the seed."""
    channels, height, width = config.image_shape
    generator = torch.Generator().manual_seed(config.seed)
    coarse = torch.randn(config.components, channels, 4, 4, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).tanh()


def _check_table(name: str, rows: tuple[tuple[float, ...], ...], expected: tuple[int, int]) -> None:
    lengths = sorted({len(row) for row in rows})
    if len(rows) != expected[0] or lengths != [expected[1]]:
        raise ValueError(
            f"{name} has {len(rows)} rows of {lengths} numbers, "
            f"expected {expected[0]} (components) of {expected[1]} (C * H * W)"
        )
