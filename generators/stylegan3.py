"""The StyleGAN3 generator as a student (Karras et al., "Alias-Free Generative Adversarial
Networks", NeurIPS 2021), configurations T and R.

Parameter and buffer names are those of the published networks, so their weights load with
strict=True. Everything runs in float32, also the published float16 layers (`num_fp16_res`); while
training, layers that make signals sampled at 16 and more can compute in lower precision
(core/precision.py), all but their styles and the image. As in StyleGAN2 here, modulation never
copies weights per sample: inputs are scaled, one convolution serves the batch, outputs are
demodulated. The magnitudes that layers divide by (`magnitude_ema`) stay as they were trained unless
a call asks for their update, as published.
"""

from __future__ import annotations

from math import ceil, log2, pi
from typing import NamedTuple

import numpy as np
import scipy.signal
import scipy.special
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.config import Section, validate
from core.roles import Generator
from custom_ops.conv2d import conv2d
from custom_ops.filtered_lrelu import filtered_lrelu
from generators._layers import (
    LOWERED_FROM,
    FullyConnected,
    Mapping,
    MappingConfig,
    demodulation,
    feature_limit,
    lowered,
    modulation,
    published_arguments,
)
from pretrained.nvidia_pickle import NetworkRecord


class Config(Section):
    """Shape of a StyleGAN3 generator, in the published argument names; the defaults are T's."""

    z_dim: int = Field(default=512, ge=1)
    """Length of a latent."""
    c_dim: int = Field(default=0, ge=0)
    """Classes; 0 = unconditional."""
    w_dim: int = Field(default=512, ge=1)
    """Length of an intermediate latent."""
    img_resolution: int = Field(..., ge=4)
    """Height and width of an image, a power of two."""
    img_channels: int = Field(..., ge=1)
    """Channels of an image."""
    mapping: MappingConfig = MappingConfig()
    """The mapping network."""
    channel_base: int = Field(default=32768, ge=1)
    """Channels times twice the cutoff frequency, up to channel_max."""
    channel_max: int = Field(default=512, ge=1)
    """Most channels in a layer."""
    num_layers: int = Field(default=14, ge=2)
    """Layers between Fourier features and the image."""
    num_critical: int = Field(default=2, ge=0)
    """Layers at the end that are sampled critically: their cutoff is the highest frequency."""
    first_cutoff: float = Field(default=2.0, gt=0)
    """Cutoff frequency of the first layer, f_c."""
    first_stopband: float = Field(default=2**2.1, gt=0)
    """Least stopband frequency of the first layer, f_t."""
    last_stopband_rel: float = Field(default=2**0.3, ge=1)
    """Least stopband of the last layer, in cutoffs."""
    margin_size: int = Field(default=10, ge=0)
    """Pixels beyond the image on each side, in every layer but the last two."""
    output_scale: float = 0.25
    """Factor on the image."""
    conv_kernel: int = Field(default=3, ge=1)
    """Side of the convolutions: 3 in T, 1 in R."""
    filter_size: int = Field(default=6, ge=1)
    """Taps of a low-pass filter at its lower sampling rate."""
    lrelu_upsampling: int = Field(default=2, ge=1)
    """How much finer the leaky ReLU is sampled than its layer."""
    use_radial_filters: bool = False
    """Radially symmetric filters when downsampling, as in R."""
    conv_clamp: float | None = 256.0
    """Clip activations to this magnitude; null: never."""
    magnitude_ema_beta: float = Field(default=0.999, ge=0, le=1)
    """Decay of the moving averages of layers' squared inputs."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.img_resolution & (self.img_resolution - 1):
            raise ValueError(f"img_resolution: {self.img_resolution} is not a power of two")
        if self.num_critical >= self.num_layers:
            raise ValueError("num_critical: expected fewer than num_layers")
        return self


def build(config: Config) -> StyleGAN3:
    """Return a student of this shape with freshly drawn weights."""
    return StyleGAN3(config)


def from_record(record: NetworkRecord) -> Config | None:
    """Return the Config of a published pickle's network, or None if it is no StyleGAN3.

    Generators of StyleGAN2 and StyleGAN3 share class name and arguments; only StyleGAN3's starts
    from Fourier features. Raises UserError if an argument is none of StyleGAN3's.
    """
    if record.class_name != "Generator" or "synthesis.input.freqs" not in record.tensors:
        return None
    arguments = record.named_arguments("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
    mapping = {"num_layers": 2, **published_arguments(arguments.pop("mapping_kwargs", None))}
    settings = {**published_arguments(arguments), "mapping": mapping}
    return validate(Config, settings, source=f"its {record.class_name}")


class Signal(NamedTuple):
    """A layer's output as a sampled continuous signal (Sec. 3.2 and appendix F)."""

    channels: int
    size: int
    """Pixels of a side, margins included."""
    rate: int
    """Sampling rate s, in pixels over the unit image."""
    cutoff: float
    """f_c: lower frequencies pass."""
    half_width: float
    """f_h: half the width of the transition from pass to stop."""


def signals(config: Config) -> list[Signal]:
    """Return the signal after each layer, the image last: num_layers + 1 of them.

    Cutoff f_c and stopband f_t go in geometric progression from the first layer's to the last's,
    which the critically sampled layers share; s = 2^ceil(log2 min(2 f_t, resolution)),
    f_h = max(f_t, s / 2) - f_c (appendix F, Eq. 8 to 10).
    """
    last_cutoff = config.img_resolution / 2
    last_stopband = last_cutoff * config.last_stopband_rel
    signals = []
    for index in range(config.num_layers + 1):
        share = min(index / (config.num_layers - config.num_critical), 1.0)
        cutoff = config.first_cutoff * (last_cutoff / config.first_cutoff) ** share
        stopband = config.first_stopband * (last_stopband / config.first_stopband) ** share
        rate = 2 ** ceil(log2(min(2 * stopband, config.img_resolution)))
        is_last = index >= config.num_layers - 1
        size = config.img_resolution if is_last else rate + 2 * config.margin_size
        channels = round(min(config.channel_base / 2 / cutoff, config.channel_max))
        if index == config.num_layers:
            channels = config.img_channels
        signals.append(Signal(channels, size, rate, cutoff, max(stopband, rate / 2) - cutoff))
    return signals


class StyleGAN3(Generator):
    """A StyleGAN3 generator: [N, z_dim], [N] -> [N, C, H, W] float32, about [-1, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = (config.z_dim,)
        self.image_shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.num_classes = config.c_dim
        self.synthesis = Synthesis(config)
        self.mapping = Mapping(
            z_dim=config.z_dim,
            c_dim=config.c_dim,
            w_dim=config.w_dim,
            num_ws=config.num_layers + 2,
            **config.mapping.model_dump(),
        )

    def forward(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        *,
        truncation: float = 1.0,
        update_magnitudes: bool = False,
    ) -> Tensor:
        """Return images [N, C, H, W], a deterministic function. truncation: psi, 1 = none.

        update_magnitudes: first move each layer's `magnitude_ema` towards this batch, as the
        published training does in its generator step (`update_emas`); w_avg has `update_w_avg`.
        """
        ws = self.mapping(latents, labels, truncation=truncation)
        return self.synthesis(ws, update_magnitudes=update_magnitudes)

    def update_w_avg(self) -> None:
        """Bring w_avg up to date with these weights."""
        self.mapping.update_w_avg()


class Synthesis(nn.Module):
    """Intermediate latents to images: [N, num_ws, w_dim] -> [N, C, H, W]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        after = signals(config)
        before = [after[0], *after[:-1]]
        self.output_scale = config.output_scale
        self.input = FourierFeatures(config.w_dim, after[0])
        self.layers: list[str] = []
        for index, (given, made) in enumerate(zip(before, after, strict=True)):
            kind = ToImage if index == config.num_layers else FilteredConvolution
            is_critical = index >= config.num_layers - config.num_critical
            name = f"L{index}_{made.size}_{made.channels}"
            setattr(self, name, kind(config, given, made, is_critical=is_critical))
            self.layers.append(name)

    def forward(self, ws: Tensor, *, update_magnitudes: bool = False) -> Tensor:
        first, *others = ws.unbind(1)
        x = self.input(first)
        for name, w in zip(self.layers, others, strict=True):
            layer = getattr(self, name)
            if update_magnitudes:
                track_magnitude(layer.magnitude_ema, x, beta=layer.magnitude_ema_beta)
            x = layer(x, w)
        return x * self.output_scale


class FourierFeatures(nn.Module):
    """Intermediate latents to the first signal: [N, w_dim] -> [N, C, size, size].

    Sine waves of fixed frequencies over the plane, which w rotates and moves, mixed by a learned
    matrix (Sec. 3.1 and appendix F.1). `transform` [3, 3] moves the image, for those who edit it.
    """

    transform: Tensor
    freqs: Tensor
    phases: Tensor

    def __init__(self, w_dim: int, signal: Signal) -> None:
        super().__init__()
        self.signal = signal
        directions = torch.randn(signal.channels, 2)
        radii = directions.norm(dim=1, keepdim=True)
        within = directions / (radii * radii.square().exp().pow(0.25))  # uniform in the unit disc
        self.weight = nn.Parameter(torch.randn(signal.channels, signal.channels))
        self.affine = FullyConnected(w_dim, 4)
        with torch.no_grad():  # begins as no rotation and no translation
            self.affine.weight.zero_()
            self.affine.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", within * signal.cutoff)
        self.register_buffer("phases", torch.rand(signal.channels) - 0.5)

    def forward(self, w: Tensor) -> Tensor:
        freqs, phases = self._placed(w)
        rate, size = self.signal.rate, self.signal.size
        nyquist, cutoff = rate / 2, self.signal.cutoff
        amplitude = (1 - (freqs.norm(dim=2) - cutoff) / (nyquist - cutoff)).clamp(0, 1)  # [N, C]
        line = (torch.arange(size, device=w.device, dtype=w.dtype) + 0.5 - size / 2) / rate
        across, down = freqs[:, :, :1] * line, freqs[:, :, 1:] * line + phases[:, :, None]
        waves = torch.sin(2 * pi * (across[:, :, None, :] + down[:, :, :, None]))
        mixing = self.weight / self.signal.channels**0.5
        return conv2d(waves * amplitude[:, :, None, None], mixing[:, :, None, None])

    def _placed(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return frequencies [N, C, 2] and phases [N, C] after the rotation and shift of w."""
        cos, sin, *shift = self.affine(w).unbind(1)
        length = torch.stack([cos, sin]).norm(dim=0)
        cos, sin, shift = cos / length, sin / length, torch.stack(shift, 1) / length[:, None]
        rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
        moved = rotation @ (self.transform[:2, 2] - shift)[:, :, None]  # [N, 2, 1]
        phases = self.phases + (self.freqs @ moved)[:, :, 0]
        return self.freqs @ (rotation @ self.transform[:2, :2]), phases


class FilteredConvolution(nn.Module):
    """Modulated convolution, then a leaky ReLU between up- and downsampling (Sec. 3.2)."""

    magnitude_ema: Tensor
    up_filter: Tensor
    down_filter: Tensor

    def __init__(self, config: Config, given: Signal, made: Signal, *, is_critical: bool) -> None:
        super().__init__()
        self.clamp, self.magnitude_ema_beta = config.conv_clamp, config.magnitude_ema_beta
        fine = max(given.rate, made.rate) * config.lrelu_upsampling
        self.up, self.down = fine // given.rate, fine // made.rate
        taps_up, taps_down = (config.filter_size * f if f > 1 else 1 for f in (self.up, self.down))
        radial = config.use_radial_filters and not is_critical
        if made.rate >= LOWERED_FROM:
            self.compute_dtype = torch.float32
        self.affine = FullyConnected(config.w_dim, given.channels, bias_init=1.0)
        shape = (made.channels, given.channels, config.conv_kernel, config.conv_kernel)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(made.channels))
        self.register_buffer("magnitude_ema", torch.ones([]))
        self.register_buffer("up_filter", lowpass(taps_up, given, rate=fine))
        self.register_buffer("down_filter", lowpass(taps_down, made, rate=fine, radial=radial))
        before = (given.size + config.conv_kernel - 1) * self.up
        total = (made.size - 1) * self.down + 1 - before + taps_up + taps_down - 2
        low = (total + self.up) // 2  # sample positions stay symmetric (appendix C.3)
        self.padding = [low, total - low, low, total - low]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = lowered(x, self)
        dtype = x.dtype
        style, weight = modulation(self.affine(w), self.weight, dtype)
        x = x * (style * self.magnitude_ema.rsqrt())[:, :, None, None].to(dtype)
        x = conv2d(x, weight.to(dtype), padding=weight.shape[-1] - 1)
        x = x * demodulation(style, weight)[:, :, None, None].to(dtype)
        return filtered_lrelu(
            x,
            self.up_filter,
            self.down_filter,
            self.bias,
            up=self.up,
            down=self.down,
            padding=self.padding,
            clamp=feature_limit(self.clamp, dtype),
        )


class ToImage(nn.Module):
    """Features to image channels in float32: a modulated 1x1 convolution without demodulation."""

    magnitude_ema: Tensor

    def __init__(self, config: Config, given: Signal, made: Signal, *, is_critical: bool) -> None:
        super().__init__()
        self.clamp, self.magnitude_ema_beta = config.conv_clamp, config.magnitude_ema_beta
        self.affine = FullyConnected(config.w_dim, given.channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(made.channels, given.channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(made.channels))
        self.register_buffer("magnitude_ema", torch.ones([]))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        gain = self.magnitude_ema.rsqrt() * self.weight.shape[1] ** -0.5
        x = x * (self.affine(w) * gain)[:, :, None, None]  # float32, as the style is
        x = conv2d(x, self.weight, self.bias)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


@torch.no_grad()
def track_magnitude(average: Tensor, x: Tensor, *, beta: float) -> None:
    """Set the average, in place, to beta * average + (1 - beta) * mean(x^2) (Sec. 3.2)."""
    average.copy_(x.to(average.dtype).square().mean().lerp(average, beta))


def lowpass(taps: int, signal: Signal, *, rate: int, radial: bool = False) -> Tensor | None:
    """Return a Kaiser low-pass filter of unit sum, [taps] or, if radial, [taps, taps] (appendix
    C.1 and C.2); None, the identity, for one tap.

    It passes frequencies below the signal's cutoff; rate: its sampling rate.
    """
    if taps == 1:
        return None
    width = 2 * signal.half_width
    if not radial:
        line = scipy.signal.firwin(taps, cutoff=signal.cutoff, width=width, fs=rate)
        return torch.as_tensor(line, dtype=torch.float32)
    place = (np.arange(taps) - (taps - 1) / 2) / rate
    radius = np.hypot(place[:, None], place[None, :])
    jinc = scipy.special.j1(2 * signal.cutoff * pi * radius) / (pi * radius)
    beta = scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(taps, width / (rate / 2)))
    window = np.kaiser(taps, beta)
    plane = jinc * np.outer(window, window)
    return torch.as_tensor(plane / plane.sum(), dtype=torch.float32)
