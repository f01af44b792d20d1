"""EDM2's magnitude-preserving denoisers (Karras et al. 2024, arXiv 2312.02696, config G).

Fits the published networks of class `Precond` that work on pixels, such as phema snapshots, whose
half-precision weights become float32; so is all arithmetic. Numbers of equations are that paper's.
Left out: latents of an autoencoder, guidance, and the estimate of the loss's log variance, which
serves published training alone: its tensors are kept, and nothing reads them.

How a copy is trained. A layer uses the direction of its stored weights only, so whatever an
optimizer does, the effective weights keep their scale. Only the stored norm drifts, and with it
the step's angle: T uncorrelated Adam steps of size lr on weights of RMS 1 make it sqrt(1 + T lr^2),
2 % after 40,000 steps of 1e-3. The published training prevents that by normalising in the forward
pass of train mode, and so does ours there. This project trains in eval mode, if a forward pass
writes nothing: processes agree, several passes share one graph, and a resumed run is bitwise the
same. For long runs at high rates `EDM2Denoiser.normalize_weights`, after each optimizer step, gives
the published updates. Learning rates act on weights of RMS 1, and the published ones are about
1e-2: one rate turns them sqrt(fan in) times slower than an EDM network's, of RMS 1/sqrt(fan in).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from core.config import Section
from core.errors import UserError
from core.roles import Denoiser
from pretrained.nvidia_pickle import NetworkRecord
from teachers._inputs import check_inputs
from teachers._mp_layers import (
    Kept,
    MPConv,
    MPFourier,
    Resample,
    mp_cat,
    mp_silu,
    mp_sum,
    normalized,
    resampled,
)

_POSITIONAL_ARGUMENTS = (
    *("img_resolution", "img_channels", "label_dim", "use_fp16"),
    *("sigma_data", "logvar_channels"),
)
"""The published constructor's arguments in their order; the U-Net's own come by name alone."""
_IGNORED_ARGUMENTS = frozenset(("use_fp16",))
"""Published arguments without effect here: use_fp16 is about speed on a GPU, not about results."""
_LATENT_CHANNELS = 4
_SIGMA_MIN = 0.002
_SIGMA_MAX = 80.0


class Config(Section):
    """An EDM2 denoiser in the words of the published constructors, with their defaults."""

    img_resolution: int = Field(gt=0)
    """Height and width in pixels."""
    img_channels: int = Field(gt=0)
    """Colour channels: 3 for RGB, 1 for grey."""
    label_dim: int = Field(default=0, ge=0)
    """Number of classes; 0 = unconditional."""
    sigma_data: float = Field(default=0.5, gt=0.0)
    """Expected standard deviation of the training images, in pixel units."""
    logvar_channels: int = Field(default=128, gt=0)
    """Noise features of the log-variance head, which is stored and not used."""

    model_channels: int = Field(default=192, gt=0)
    """Channels that `channel_mult` multiplies."""
    channel_mult: tuple[int, ...] = Field(default=(1, 2, 3, 4), min_length=1)
    """Channel multiplier at each resolution, the finest first."""
    channel_mult_noise: int | None = Field(default=None, gt=0)
    """Channel multiplier of the noise features; nothing = the finest resolution's."""
    channel_mult_emb: int | None = Field(default=None, gt=0)
    """Channel multiplier of the embedding vector; nothing = the largest of `channel_mult`."""
    num_blocks: int = Field(default=3, gt=0)
    """Residual blocks at each resolution."""
    attn_resolutions: tuple[int, ...] = (16, 8)
    """Resolutions with self-attention, which the middle block always has."""
    label_balance: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the class in the embedding, against the noise level."""
    concat_balance: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the encoder's features if the decoder takes them in."""

    resample_filter: tuple[int, ...] = Field(default=(1, 1), min_length=2)
    """Even number of resampling filter taps."""
    channels_per_head: int = Field(default=64, gt=0)
    """Channels of an attention head."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that a feature is dropped inside a block while training."""
    res_balance: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of the residual branch in a block."""
    attn_balance: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of attention in a block."""
    clip_act: float | None = Field(default=256.0, gt=0.0)
    """Largest magnitude that a block lets out; nothing = no limit."""

    @model_validator(mode="after")
    def _check_pairs(self) -> Config:
        if len(self.resample_filter) % 2 or sum(self.resample_filter) == 0:
            raise ValueError("resample_filter needs an even number of taps with a sum other than 0")
        coarsest = 1 << (len(self.channel_mult) - 1)
        if self.img_resolution % coarsest:
            raise ValueError(
                f"img_resolution {self.img_resolution} is not a multiple of {coarsest}, "
                f"which {len(self.channel_mult)} entries of channel_mult need"
            )
        attended = {ch for size, ch in self.levels if size in self.attn_resolutions}
        for channels in sorted({*attended, self.levels[-1][1]}):
            heads = channels // self.channels_per_head
            if heads and channels % heads:
                raise ValueError(
                    f"{channels} channels with attention cannot be split into {heads} heads of "
                    f"about channels_per_head {self.channels_per_head}"
                )
        return self

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Return (resolution, channels), the finest first."""
        return [
            (self.img_resolution >> level, self.model_channels * factor)
            for level, factor in enumerate(self.channel_mult)
        ]

    @property
    def noise_channels(self) -> int:
        """Return the length of the noise features."""
        return self.model_channels * (self.channel_mult_noise or self.channel_mult[0])

    @property
    def emb_channels(self) -> int:
        """Return the length of the embedding vector."""
        return self.model_channels * (self.channel_mult_emb or max(self.channel_mult))


class EDM2Denoiser(Denoiser):
    """D(noisy; sigma) = c_skip noisy + c_out F(c_in noisy; c_noise), with EDM's coefficients.

    A `core.roles.Denoiser`. Train mode drops features and normalises the stored weights; eval
    mode, which serves for training too, does neither.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.num_classes = config.label_dim
        self.sigma_min, self.sigma_max = _SIGMA_MIN, _SIGMA_MAX
        self.sigma_data = config.sigma_data
        self.compute_dtype = torch.float32
        self.unet = UNet(config)
        self.logvar_fourier = MPFourier(config.logvar_channels)
        self.logvar_linear = Kept(torch.randn(1, config.logvar_channels))

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E[x | noisy] [N, C, H, W] float32 for noisy = x + sigma n.

        noisy: [N, C, H, W]. sigma: [N], pixel units. labels: [N] int64; None is the published zero
        vector, that is, no class. Raises ValueError if a shape does not fit.
        """
        check_inputs(
            noisy, sigma, labels, image_shape=self.image_shape, num_classes=self.num_classes
        )
        noisy, sigma = noisy.float(), sigma.float()
        level = sigma[:, None, None, None]
        variance = level.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = level * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.log() / 4
        scaled = (c_in * noisy).to(self.compute_dtype)
        residual = self.unet(scaled, c_noise, self._one_hot(noisy, labels))
        return c_skip * noisy + c_out * residual.float()

    def normalize_weights(self) -> None:
        """Set every stored weight to RMS 1 in place (Eq. 66); effective weights stay, but for eps.

        For after an optimizer step, on every process: the same weights become the same weights.
        """
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_weight()

    def _one_hot(self, noisy: Tensor, labels: Tensor | None) -> Tensor | None:
        if self.num_classes == 0:
            return None
        if labels is None:
            return noisy.new_zeros(len(noisy), self.num_classes)
        return F.one_hot(labels.long(), self.num_classes).to(noisy.dtype)


def build(config: Config) -> EDM2Denoiser:
    """Return a denoiser with freshly initialised weights."""
    return EDM2Denoiser(config)


def from_record(record: NetworkRecord) -> Config | None:
    """Return the Config of a published pickle's network, or None if it is not an EDM2 network.

    Raises UserError if the class is EDM2's but its arguments are not, or it works on latents.
    """
    if record.class_name != "Precond":
        return None
    arguments = record.named_arguments(*_POSITIONAL_ARGUMENTS)
    kept = {name: value for name, value in arguments.items() if name not in _IGNORED_ARGUMENTS}
    try:
        config = Config.model_validate(kept)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors()
        )
        raise UserError(
            f"Precond network with arguments that EDM2's constructor does not take: {problems}"
        ) from error

    # latent networks have no pixels
    if config.img_channels == _LATENT_CHANNELS:
        raise UserError(
            f"this EDM2 network denoises latents of an autoencoder ({_LATENT_CHANNELS} channels of "
            f"{config.img_resolution}x{config.img_resolution}), not images: "
            "give one that works on pixels, such as edm2-img64-s"
        )
    return config


# The network


class UNet(nn.Module):
    """F: the U-Net (Fig. 21), scaled by one learned gain at its end."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.label_balance, self.concat_balance = config.label_balance, config.concat_balance
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = MPFourier(config.noise_channels)
        self.emb_noise = MPConv(config.noise_channels, config.emb_channels)
        self.emb_label = None
        if config.label_dim:
            self.emb_label = MPConv(config.label_dim, config.emb_channels)
        self.enc, skip_channels = _encoder(config)
        self.dec = _decoder(config, skip_channels)
        self.out_conv = MPConv(config.levels[0][1], config.img_channels, kernel=(3, 3))

    def forward(
        self, images: Tensor, noise_levels: Tensor, one_hot_labels: Tensor | None
    ) -> Tensor:
        """Return the raw network output [N, C, H, W] for images c_in x, noise_levels c_noise [N].

        one_hot_labels: [N, label_dim] or None.
        """
        embedding = self.emb_noise(self.emb_fourier(noise_levels))
        if self.emb_label is not None and one_hot_labels is not None:
            # A one-hot vector of length n has mean square 1 / n; the scale makes that 1.
            scaled = one_hot_labels * math.sqrt(one_hot_labels.shape[1])
            embedding = mp_sum(embedding, self.emb_label(scaled), t=self.label_balance)
        embedding = mp_silu(embedding)
        features = torch.cat((images, torch.ones_like(images[:, :1])), dim=1)  # ones: a bias
        skips = []
        for layer in self.enc.values():
            features = layer(features, embedding) if isinstance(layer, Block) else layer(features)
            skips.append(features)
        for name, layer in self.dec.items():
            if _takes_skip(name):
                features = mp_cat(features, skips.pop(), t=self.concat_balance)
            features = layer(features, embedding)
        return self.out_conv(features, gain=self.out_gain)


def _encoder(config: Config) -> tuple[nn.ModuleDict, list[int]]:
    """Return the layers from fine to coarse, and the channels that each of them puts out."""
    layers, widths = nn.ModuleDict(), []
    channels = config.img_channels + 1
    for level, (size, width) in enumerate(config.levels):
        if level == 0:
            layers[f"{size}x{size}_conv"] = MPConv(channels, width, kernel=(3, 3))
            channels = width
        else:
            layers[f"{size}x{size}_down"] = Block(
                channels, channels, config=config, kind="enc", resample="down"
            )
        widths.append(channels)
        attention = size in config.attn_resolutions
        for index in range(config.num_blocks):
            layers[f"{size}x{size}_block{index}"] = Block(
                channels, width, config=config, kind="enc", attention=attention
            )
            channels = width
            widths.append(channels)
    return layers, widths


def _decoder(config: Config, skip_channels: list[int]) -> nn.ModuleDict:
    """Return the layers from coarse to fine; those that take a skip take the last one left."""
    layers, left = nn.ModuleDict(), list(skip_channels)
    size, channels = config.levels[-1]
    for index, attention in enumerate((True, False)):
        layers[f"{size}x{size}_in{index}"] = Block(
            channels, channels, config=config, kind="dec", attention=attention
        )
    for level, (size, width) in reversed(list(enumerate(config.levels))):
        if level < len(config.levels) - 1:
            layers[f"{size}x{size}_up"] = Block(
                channels, channels, config=config, kind="dec", resample="up"
            )
        attention = size in config.attn_resolutions
        for index in range(config.num_blocks + 1):
            layers[f"{size}x{size}_block{index}"] = Block(
                channels + left.pop(), width, config=config, kind="dec", attention=attention
            )
            channels = width
    return layers


def _takes_skip(name: str) -> bool:
    return "block" in name


class Block(nn.Module):
    """A residual block (Fig. 21), with its resampling before and its attention after."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        config: Config,
        kind: Literal["enc", "dec"],
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.is_encoder, self.taps = kind == "enc", config.resample_filter
        self.resample: Resample | None = resample
        self.dropout, self.clip_act = config.dropout, config.clip_act
        self.res_balance, self.attn_balance = config.res_balance, config.attn_balance
        # As published, a block narrower than one head has no attention.
        self.num_heads = out_channels // config.channels_per_head if attention else 0
        res_channels = out_channels if self.is_encoder else in_channels

        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPConv(res_channels, out_channels, kernel=(3, 3))
        self.emb_linear = MPConv(config.emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=(3, 3))
        self.conv_skip = None
        if in_channels != out_channels:
            self.conv_skip = MPConv(in_channels, out_channels, kernel=(1, 1))
        if self.num_heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, kernel=(1, 1))
            self.attn_proj = MPConv(out_channels, out_channels, kernel=(1, 1))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        features = resampled(features, self.resample, taps=self.taps)
        # The encoder narrows and normalises before the branch leaves, the decoder narrows after.
        if self.is_encoder:
            features = normalized(self._narrowed(features), dim=1)
        scale = 1 + self.emb_linear(embedding, gain=self.emb_gain)[:, :, None, None]
        hidden = mp_silu(self.conv_res0(mp_silu(features)) * scale.to(features.dtype))
        hidden = self.conv_res1(F.dropout(hidden, self.dropout, self.training))
        if not self.is_encoder:
            features = self._narrowed(features)
        features = mp_sum(features, hidden, t=self.res_balance)
        if self.num_heads:
            attended = self.attn_proj(self._attended(features))
            features = mp_sum(features, attended, t=self.attn_balance)
        if self.clip_act is None:
            return features
        return features.clamp(-self.clip_act, self.clip_act)

    def _narrowed(self, features: Tensor) -> Tensor:
        return features if self.conv_skip is None else self.conv_skip(features)

    def _attended(self, features: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(channels per head)) v over pixels, all three of RMS 1."""
        qkv = self.attn_qkv(features).flatten(2)
        # Published channel order: head, channel within the head, then which of query, key, value.
        qkv = normalized(qkv.unflatten(1, (self.num_heads, -1, 3)), dim=2)
        query, key, value = qkv.permute(3, 0, 1, 4, 2).contiguous()  # [N, heads, H*W, c]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(2, 3).reshape(features.shape)
