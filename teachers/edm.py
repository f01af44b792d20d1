"""Preconditioned denoisers (Karras et al. 2022, arXiv 2206.00364, Table 1): VP, VE, iDDPM and EDM.

Fits the published networks of DDPM++, NCSN++ and ADM shape, of classes `EDMPrecond`, `VPPrecond`,
`VEPrecond` and `iDDPMPrecond`. Their own precision switch is ignored: see core/precision.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from core.config import Section
from core.errors import UserError
from core.roles import Denoiser
from pretrained.nvidia_pickle import NetworkRecord
from teachers._inputs import check_inputs
from teachers._unets import DhariwalUNet, SongUNet

_SONG_DEFAULTS = {
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "num_blocks": 4,
    "attn_resolutions": (16,),
}
SONG_ONLY = set(
    ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
)
_PRECONDITIONING_DEFAULTS: dict[object, dict[str, object]] = {
    "VP": {"model_type": "SongUNet"},
    "VE": {"model_type": "SongUNet", "sigma_min": 0.02, "sigma_max": 100.0},
}
_NOT_THE_NETWORK = {
    *("preconditioning", "model_type", "sigma_min", "sigma_max", "sigma_data"),
    *("beta_d", "beta_min", "epsilon_t", "C_1", "C_2", "M"),
}
OWN_ARGUMENTS = {
    "EDM": ("sigma_min", "sigma_max", "sigma_data"),
    "VP": ("beta_d", "beta_min", "M", "epsilon_t"),
    "VE": ("sigma_min", "sigma_max"),
    "iDDPM": ("C_1", "C_2", "M"),
}
"""Each published constructor's own arguments in order, between use_fp16 and model_type."""
_COMMON_ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_IGNORED_ARGUMENTS = frozenset(("use_fp16",))
"""Published arguments without effect here: use_fp16 is about speed on a GPU, not about results."""
_SAMPLED_SIGMA_MIN = 0.002
_SAMPLED_SIGMA_MAX = 80.0


class Config(Section):
    """An EDM denoiser in the words of the published constructors, with their defaults."""

    img_resolution: int = Field(gt=0)
    """Height and width in pixels."""
    img_channels: int = Field(gt=0)
    """Colour channels: 3 for RGB, 1 for grey."""
    label_dim: int = Field(default=0, ge=0)
    """Number of classes; 0 = unconditional."""
    preconditioning: Literal["EDM", "VP", "VE", "iDDPM"] = "EDM"
    """Column of EDM's Table 1 that scales the network's input and output."""
    sigma_min: float = Field(default=0.0, ge=0.0)
    """Smallest noise level, in pixel units; 0 = no limit, sampled from 0.002 up."""
    sigma_max: float | None = Field(default=None, gt=0.0)
    """Largest noise level, in pixel units; nothing = no limit (infinity), sampled from 80 down."""
    sigma_data: float = Field(default=0.5, gt=0.0)
    """Expected standard deviation of the training images, in pixel units."""
    beta_d: float = Field(default=19.9, gt=0.0)
    """VP only. Extent of the noise schedule."""
    beta_min: float = Field(default=0.1, gt=0.0)
    """VP only. Initial slope of the noise schedule."""
    epsilon_t: float = Field(default=1e-5, gt=0.0, lt=1.0)
    """VP only. Smallest time of training, which gives the smallest noise level."""
    C_1: float = Field(default=0.001, gt=0.0)
    """iDDPM only. Lower limit of the ratio of successive alpha_bar."""
    C_2: float = Field(default=0.008, gt=0.0)
    """iDDPM only. Offset of the cosine schedule."""
    M: int = Field(default=1000, gt=1)
    """VP and iDDPM only. Number of time steps in training."""
    model_type: Literal["SongUNet", "DhariwalUNet"] = "DhariwalUNet"
    """SongUNet: DDPM++ and NCSN++. DhariwalUNet: ADM."""

    augment_dim: int = Field(default=0, ge=0)
    """Length of the augmentation labels the network was trained with; 0 = none."""
    model_channels: int = Field(default=192, ge=4)
    """Channels that `channel_mult` multiplies; SongUNet's default is 128."""
    channel_mult: tuple[int, ...] = Field(default=(1, 2, 3, 4), min_length=1)
    """Channel multiplier at each resolution, the finest first; SongUNet's default is 1, 2, 2, 2."""
    channel_mult_emb: int = Field(default=4, gt=0)
    """Channel multiplier of the embedding vector."""
    num_blocks: int = Field(default=3, gt=0)
    """Residual blocks at each resolution; SongUNet's default is 4."""
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    """Resolutions with self-attention; SongUNet's default is 16."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Probability that a feature is dropped inside a block while training."""
    label_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a class label is dropped while training, for classifier-free guidance."""

    embedding_type: Literal["positional", "fourier"] = "positional"
    """SongUNet only. Embedding of the noise level: positional for DDPM++, fourier for NCSN++."""
    channel_mult_noise: int = Field(default=1, gt=0)
    """SongUNet only. Channel multiplier of the noise embedding: 1 for DDPM++, 2 for NCSN++."""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """SongUNet only. How the encoder sees the shrunk input: DDPM++ standard, NCSN++ residual."""
    decoder_type: Literal["standard", "skip"] = "standard"
    """SongUNet only. Output at the finest resolution, or summed over all of them (skip)."""
    resample_filter: tuple[int, ...] = Field(default=(1, 1), min_length=2)
    """SongUNet only. Even number of resampling filter taps: DDPM++ 1, 1; NCSN++ 1, 3, 3, 1."""

    @model_validator(mode="before")
    @classmethod
    def _with_published_defaults(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        values = {**_PRECONDITIONING_DEFAULTS.get(values.get("preconditioning"), {}), **values}
        defaults = _SONG_DEFAULTS if values.get("model_type") == "SongUNet" else {}
        # JSON has no infinity, so the open end of the range is written as nothing.
        unlimited = {"sigma_max": None} if values.get("sigma_max") == math.inf else {}
        return {**defaults, **values, **unlimited}

    @model_validator(mode="after")
    def _check_pairs(self) -> Config:
        fields = type(self).model_fields
        if self.model_type == "DhariwalUNet":
            foreign = sorted(n for n in SONG_ONLY if getattr(self, n) != fields[n].default)
            if foreign:
                raise ValueError(
                    f"{', '.join(foreign)}: only for SongUNet; remove or change model_type"
                )

        # arguments of another preconditioning
        own = set(OWN_ARGUMENTS[self.preconditioning])
        others = sorted(set().union(*OWN_ARGUMENTS.values()) - own)
        if foreign := [n for n in others if getattr(self, n) != fields[n].default]:
            raise ValueError(
                f"{', '.join(foreign)}: not for preconditioning {self.preconditioning}; remove, or "
                "change preconditioning"
            )

        # numbers that do not fit each other
        if len(self.resample_filter) % 2:
            raise ValueError(f"resample_filter has {len(self.resample_filter)} taps; make it even")
        coarsest = 1 << (len(self.channel_mult) - 1)
        if self.img_resolution % coarsest:
            raise ValueError(
                f"img_resolution {self.img_resolution} is not a multiple of {coarsest}, "
                f"which {len(self.channel_mult)} entries of channel_mult need"
            )
        if self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self


class Coefficients(NamedTuple):
    """Coefficients of the preconditioning, [N, 1, 1, 1] or a number, and c_noise, [N]."""

    c_skip: Tensor | float
    c_out: Tensor
    c_in: Tensor | float
    c_noise: Tensor


class EDMDenoiser(Denoiser):
    """D(noisy; sigma) = c_skip noisy + c_out F(c_in noisy; c_noise) (EDM, Eq. 7).

    A `core.roles.Denoiser`. Random (dropout, of features and labels) in train mode only. F
    computes in `compute_dtype`, all around it in float32.
    """

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.num_classes = config.label_dim
        self.augment_dim = config.augment_dim
        self.sigma_min = config.sigma_min or _SAMPLED_SIGMA_MIN
        self.sigma_max = config.sigma_max or _SAMPLED_SIGMA_MAX
        self.sigma_data = config.sigma_data
        self.compute_dtype = torch.float32
        self.model = network

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Return E[x | noisy] [N, C, H, W] float32 for noisy = x + sigma n.

        noisy: [N, C, H, W]. sigma: [N], pixel units. labels: [N] int64; None is the published zero
        vector, that is, no class. augment_labels: [N, augment_dim]; None is no augmentation.
        Raises ValueError if a shape does not fit.
        """
        check_inputs(
            noisy, sigma, labels, image_shape=self.image_shape, num_classes=self.num_classes
        )
        augment_labels = self._augment_labels(noisy, augment_labels)
        noisy, sigma = noisy.float(), sigma.float()
        c = self._coefficients(sigma, sigma[:, None, None, None])
        scaled = (c.c_in * noisy).to(self.compute_dtype)
        output = self.model(scaled, c.c_noise, self._one_hot(noisy, labels), augment_labels)
        return c.c_skip * noisy + c.c_out * output[:, : self.image_shape[0]].float()

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest noise levels that the network knows, of sigma's shape and dtype."""
        return sigma

    def _coefficients(self, sigma: Tensor, level: Tensor) -> Coefficients:
        """Return Table 1's column for sigma [N], and the same as level [N, 1, 1, 1]."""
        variance = level.square() + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / variance,
            c_out=level * self.sigma_data * variance.rsqrt(),
            c_in=variance.rsqrt(),
            c_noise=sigma.log() / 4,
        )

    def _one_hot(self, noisy: Tensor, labels: Tensor | None) -> Tensor | None:
        if self.num_classes == 0:
            return None
        if labels is None:
            return noisy.new_zeros(len(noisy), self.num_classes)
        return F.one_hot(labels.long(), self.num_classes).to(noisy.dtype)

    def _augment_labels(self, noisy: Tensor, augment_labels: Tensor | None) -> Tensor | None:
        """Return the augment labels, zeros for none: the same number, and every parameter is used.

        Training on several processes waits for the gradient of every parameter.
        """
        if self.augment_dim == 0:
            if augment_labels is not None:
                raise ValueError("augment_labels given to a denoiser trained without; pass None")
            return None
        if augment_labels is None:
            return noisy.new_zeros(len(noisy), self.augment_dim)
        if augment_labels.shape != (len(noisy), self.augment_dim):
            came, expected = list(augment_labels.shape), [len(noisy), self.augment_dim]
            raise ValueError(f"augment_labels has shape {came}, expected {expected}")
        return augment_labels


class VPDenoiser(EDMDenoiser):
    """The variance preserving column of Table 1: DDPM++ of Song et al. 2021."""

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__(network, config)
        times = torch.tensor([config.epsilon_t, 1.0])
        exponent = 0.5 * config.beta_d * times.square() + config.beta_min * times
        self.sigma_min, self.sigma_max = (exponent.exp() - 1).sqrt().tolist()

    def _coefficients(self, sigma: Tensor, level: Tensor) -> Coefficients:
        beta_d, beta_min = self.config.beta_d, self.config.beta_min
        # t(sigma), the inverse of sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1.
        root = (beta_min**2 + 2 * beta_d * (1 + sigma.square()).log()).sqrt()
        time = (root - beta_min) / beta_d
        c_in = (level.square() + 1).rsqrt()
        return Coefficients(1.0, -level, c_in, (self.config.M - 1) * time)


class VEDenoiser(EDMDenoiser):
    """The variance exploding column of Table 1: NCSN++ of Song et al. 2021."""

    def _coefficients(self, sigma: Tensor, level: Tensor) -> Coefficients:
        return Coefficients(1.0, level, 1.0, (sigma / 2).log())


class IDDPMDenoiser(EDMDenoiser):
    """The iDDPM column of Table 1 (Nichol & Dhariwal 2021, and ADM): M noise levels, kept as u.

    The network's second C channels, a variance, are not used.
    """

    u: Tensor

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__(network, config)
        self.register_buffer("u", _iddpm_levels(config))
        self.sigma_min, self.sigma_max = float(self.u[-2]), float(self.u[0])

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest noise levels that the network knows, of sigma's shape and dtype."""
        return self.u[self._nearest(sigma)].to(sigma)

    def _coefficients(self, sigma: Tensor, level: Tensor) -> Coefficients:
        c_noise = (self.config.M - 1 - self._nearest(sigma)).to(sigma)
        return Coefficients(1.0, -level, (level.square() + 1).rsqrt(), c_noise)

    def _nearest(self, sigma: Tensor) -> Tensor:
        return (sigma.to(self.u)[..., None] - self.u).abs().argmin(-1)


def _iddpm_levels(config: Config) -> Tensor:
    """Return u [M + 1], from the largest noise level to u_M = 0 (EDM, Table 1, iDDPM)."""
    steps = torch.arange(config.M + 1)
    alpha_bar = (0.5 * math.pi * steps / config.M / (config.C_2 + 1)).sin().square()
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=config.C_1)
    levels = [torch.zeros(())]
    for ratio in ratios.flip(0):
        levels.append(((levels[-1].square() + 1) / ratio - 1).sqrt())
    return torch.stack(levels).flip(0)


_DENOISERS: dict[str, type[EDMDenoiser]] = {
    "EDM": EDMDenoiser,
    "VP": VPDenoiser,
    "VE": VEDenoiser,
    "iDDPM": IDDPMDenoiser,
}


def build(config: Config) -> EDMDenoiser:
    """Return a denoiser with freshly initialised weights.

    Raises UserError if its channels cannot be normalised in the published groups.
    """
    out_channels = config.img_channels * (2 if config.preconditioning == "iDDPM" else 1)
    is_song = config.model_type == "SongUNet"
    excluded = _NOT_THE_NETWORK if is_song else _NOT_THE_NETWORK | SONG_ONLY
    shape = config.model_dump(exclude=excluded)
    try:
        network = (SongUNet if is_song else DhariwalUNet)(out_channels=out_channels, **shape)
    except ValueError as error:
        raise UserError(
            f"model_channels {config.model_channels} times channel_mult {config.channel_mult}: "
            f"{error}; a multiple of 16 or 32 as model_channels does"
        ) from error
    return _DENOISERS[config.preconditioning](network, config)


def from_record(record: NetworkRecord) -> Config | None:
    """Return the Config of a published pickle's network, or None if it is not an EDM network.

    Raises UserError if the class is EDM's but its arguments are not.
    """
    preconditioning = record.class_name.removesuffix("Precond")
    if record.class_name == preconditioning or preconditioning not in OWN_ARGUMENTS:
        return None
    own = OWN_ARGUMENTS[preconditioning]
    arguments = record.named_arguments(*_COMMON_ARGUMENTS, *own, "model_type")
    arguments = {**arguments, "preconditioning": preconditioning}
    kept = {name: value for name, value in arguments.items() if name not in _IGNORED_ARGUMENTS}
    try:
        return Config.model_validate(kept)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors()
        )
        raise UserError(
            f"{record.class_name} network with arguments that its constructor does not take: "
            f"{problems}"
        ) from error
