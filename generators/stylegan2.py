"""The StyleGAN2 generator as a student (Karras et al., CVPR 2020; with StyleGAN2-ADA, NeurIPS
2020).

All published architectures (skip, resnet, orig), conditional or not. Parameter and buffer names are
those of the published networks, so their weights load with strict=True. Everything runs in float32,
which the published float16 blocks (`num_fp16_res`) approximate; while training, blocks from 16x16
on can compute in lower precision (core/precision.py), all but their styles and the image.

Modulated convolution never copies weights per sample. With s the style and d the demodulation,
    y[n, o] = d[n, o] * conv(s[n] * x[n], W)[o],  d[n, o]^-2 = sum_i s[n, i]^2 sum_k W[o, i, k]^2,
so the one weight tensor serves the whole batch in one convolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as MappingOf
from math import log2
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.config import Section, validate
from core.errors import UserError
from core.roles import Generator
from custom_ops.bias_act import ACTIVATIONS, bias_act
from custom_ops.conv2d import conv2d
from custom_ops.upfirdn2d import fir_filter, upfirdn2d
from generators._layers import (
    LOWERED_FROM,
    FullyConnected,
    Mapping,
    MappingConfig,
    demodulation,
    feature_limit,
    is_low,
    lowered,
    modulation,
    published_arguments,
)
from pretrained.nvidia_pickle import NetworkRecord
from pretrained.torch_checkpoint import STATE_DICT

NoiseMode = Literal["const", "random", "none"]


class Config(Section):
    """Shape of a StyleGAN2 generator, in the published argument names."""

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
    """Channels times resolution, up to channel_max."""
    channel_max: int = Field(default=512, ge=1)
    """Most channels in a layer."""
    architecture: Literal["orig", "skip", "resnet"] = "skip"
    """How blocks pass on their result."""
    resample_filter: tuple[float, ...] = (1, 3, 3, 1)
    """Taps of the low-pass filter used when upsampling."""
    conv_clamp: float | None = None
    """Clip the activations of every convolution to this magnitude; null: never."""
    use_noise: bool = True
    """Per-layer noise inputs."""
    activation: str = "lrelu"
    """Activation of every convolution."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Config:
        if self.img_resolution & (self.img_resolution - 1):
            raise ValueError(f"img_resolution: {self.img_resolution} is not a power of two")
        return self

    def channels(self, resolution: int) -> int:
        """Return the width of the block at this resolution."""
        return min(self.channel_base // resolution, self.channel_max)


def build(config: Config) -> StyleGAN2:
    """Return a student of this shape with freshly drawn weights."""
    return StyleGAN2(config)


def from_record(record: NetworkRecord) -> Config | None:
    """Return the Config of a published pickle's network, or None if it is no StyleGAN2.

    Generators of StyleGAN2 and StyleGAN3 share class name and arguments; only StyleGAN2's starts
    from a learned constant. Raises UserError if an argument is none of StyleGAN2's.
    """
    if "synthesis.b4.const" not in record.tensors:
        return None
    if record.class_name == STATE_DICT:
        return _from_shapes(record.tensors)
    if record.class_name != "Generator":
        return None
    arguments = record.named_arguments("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
    mapping = published_arguments(arguments.pop("mapping_kwargs", None))
    synthesis = published_arguments(arguments.pop("synthesis_kwargs", None))
    settings = {**published_arguments(arguments), **synthesis, "mapping": mapping}
    return validate(Config, settings, source=f"its {record.class_name}")


def _from_shapes(tensors: MappingOf[str, Tensor]) -> Config:
    """Return the Config of a state dict, from the shapes in it.

    What no shape tells has its default: no clamp, taps of 1, 3, 3, 1, leaky ReLU. Raises UserError
    if the widths of the blocks follow from no channel_base and channel_max.
    """
    blocks = {int(n.split(".")[1][1:]) for n in tensors if n.startswith("synthesis.b")}
    widths = {b: tensors[f"synthesis.b{b}.conv1.weight"].shape[0] for b in blocks}
    most, resolution = max(widths.values()), max(blocks)
    narrower = [b * width for b, width in widths.items() if width < most]
    layers = [n for n in tensors if re.fullmatch(r"mapping\.fc\d+\.weight", n)]
    embed = tensors.get("mapping.embed.weight")
    w_dim = tensors[f"mapping.fc{len(layers) - 1}.weight"].shape[0]
    embedded = 0 if embed is None else embed.shape[0]
    settings = {
        "z_dim": tensors["mapping.fc0.weight"].shape[1] - embedded,
        "c_dim": 0 if embed is None else embed.shape[1],
        "w_dim": w_dim,
        "img_resolution": resolution,
        "img_channels": tensors[f"synthesis.b{resolution}.torgb.weight"].shape[0],
        "mapping": {"num_layers": len(layers)},
        "channel_base": max(narrower, default=most * resolution),
        "channel_max": most,
        "architecture": _architecture(tensors, resolution),
        "use_noise": "synthesis.b4.conv1.noise_const" in tensors,
    }
    config = validate(Config, settings, source="its state dict")
    if wrong := [b for b, width in widths.items() if config.channels(b) != width]:
        raise UserError(f"its block b{wrong[0]} has {widths[wrong[0]]} channels: no StyleGAN2's")
    return config


def _architecture(tensors: MappingOf[str, Tensor], resolution: int) -> str:
    if f"synthesis.b{resolution}.skip.weight" in tensors:
        return "resnet"
    return "skip" if resolution == 4 or "synthesis.b4.torgb.weight" in tensors else "orig"


class StyleGAN2(Generator):
    """A StyleGAN2 generator: [N, z_dim], [N] -> [N, C, H, W] float32, about [-1, 1]."""

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
            num_ws=self.synthesis.num_ws,
            **config.mapping.model_dump(),
        )

    def forward(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        *,
        truncation: float = 1.0,
        noise_mode: NoiseMode = "const",
    ) -> Tensor:
        """Return images [N, C, H, W]. With the defaults a deterministic function of its arguments.

        truncation: psi, 1 = none. noise_mode: per-layer noise at its stored constants, freshly
        drawn from torch's global generator, or none.
        """
        return self.synthesis(
            self.mapping(latents, labels, truncation=truncation), noise_mode=noise_mode
        )

    def update_w_avg(self) -> None:
        """Bring w_avg up to date with these weights."""
        self.mapping.update_w_avg()


class Synthesis(nn.Module):
    """Intermediate latents to images: [N, num_ws, w_dim] -> [N, C, H, W]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.resolutions = [2**power for power in range(2, int(log2(config.img_resolution)) + 1)]
        for resolution in self.resolutions:
            setattr(self, f"b{resolution}", Block(config, resolution))
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, ws: Tensor, *, noise_mode: NoiseMode = "const") -> Tensor:
        x: Tensor | None = None
        image: Tensor | None = None
        first = 0
        for resolution in self.resolutions:
            block = getattr(self, f"b{resolution}")
            x, image = block(x, image, ws[:, first:], noise_mode=noise_mode)
            first += block.num_convolutions
        assert image is not None, "every architecture ends in an image"
        return image


class Block(nn.Module):
    """One resolution: two convolutions (one at 4x4), and the projection to an image."""

    resample_filter: Tensor

    def __init__(self, config: Config, resolution: int) -> None:
        super().__init__()
        is_first, is_last = resolution == 4, resolution == config.img_resolution
        channels = config.channels(resolution)
        self.architecture = config.architecture
        self.num_convolutions = 1 if is_first else 2
        self.register_buffer("resample_filter", fir_filter(config.resample_filter))
        if resolution >= LOWERED_FROM:
            self.compute_dtype = torch.float32
        if is_first:
            self.const = nn.Parameter(torch.randn(channels, resolution, resolution))
        else:
            before = config.channels(resolution // 2)
            self.conv0 = StyledConvolution(config, before, channels, resolution=resolution, up=2)
            if config.architecture == "resnet":
                self.skip = UpsampledProjection(config, before, channels)
        self.conv1 = StyledConvolution(config, channels, channels, resolution=resolution)
        if is_last or config.architecture == "skip":
            self.torgb = ToImage(config, channels)

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, *, noise_mode: NoiseMode
    ) -> tuple[Tensor, Tensor | None]:
        """Return features and image after this block, given those before it (None at 4x4)."""
        styles = iter(ws.unbind(1))
        x = None if x is None else lowered(x, self)
        if x is None:
            x = self.const.expand(len(ws), -1, -1, -1)
            x = self.conv1(x, next(styles), noise_mode=noise_mode)
        elif self.architecture == "resnet":
            shortcut = self.skip(x, gain=0.5**0.5)
            x = self.conv0(x, next(styles), noise_mode=noise_mode)
            x = shortcut + self.conv1(x, next(styles), noise_mode=noise_mode, gain=0.5**0.5)
        else:
            x = self.conv0(x, next(styles), noise_mode=noise_mode)
            x = self.conv1(x, next(styles), noise_mode=noise_mode)
        if image is not None:
            image = upsample(image, self.resample_filter)
        if hasattr(self, "torgb"):
            y = self.torgb(x, next(styles))
            image = y if image is None else image + y
        assert x is not None
        return x, image


class StyledConvolution(nn.Module):
    """Modulated 3x3 convolution, noise, bias and activation; upsamples by `up`."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self, config: Config, in_channels: int, out_channels: int, *, resolution: int, up: int = 1
    ) -> None:
        super().__init__()
        self.act, self.clamp, self.up, self.use_noise = (
            config.activation,
            config.conv_clamp,
            up,
            config.use_noise,
        )
        taps = config.resample_filter if up == 2 else (1, 3, 3, 1)  # as published: set, never used
        self.register_buffer("resample_filter", fir_filter(taps))
        self.affine = FullyConnected(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        if config.use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, *, noise_mode: NoiseMode, gain: float = 1.0) -> Tensor:
        dtype = x.dtype
        style, weight = modulation(self.affine(w), self.weight, dtype)
        x = x * style[:, :, None, None].to(dtype)
        if self.up == 2:
            x = convolve_upsampled(x, weight.to(dtype), self.resample_filter)
        else:
            x = conv2d(x, weight.to(dtype), padding=1)
        x = x * demodulation(style, weight)[:, :, None, None].to(dtype)
        if self.use_noise and noise_mode != "none":
            x = x + (self._noise(x, noise_mode) * self.noise_strength).to(dtype)
        gain_after = gain * ACTIVATIONS[self.act].gain
        limit = feature_limit(self.clamp, dtype)
        clamp = None if limit is None else limit * gain
        return bias_act(x, self.bias, act=self.act, gain=gain_after, clamp=clamp)

    def _noise(self, x: Tensor, noise_mode: NoiseMode) -> Tensor:
        if noise_mode == "const":
            return self.noise_const
        dtype = self.noise_const.dtype
        return torch.randn(len(x), 1, *x.shape[2:], device=x.device, dtype=dtype)


class ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation, in the features' precision; the bias and what
    is returned are float32.
    """

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__()
        self.clamp = config.conv_clamp
        self.affine = FullyConnected(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(config.img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(config.img_channels))
        self.weight_gain = in_channels**-0.5

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) * self.weight_gain
        x = conv2d(x * style[:, :, None, None].to(x.dtype), self.weight.to(x.dtype))
        return bias_act(x.float() if is_low(x.dtype) else x, self.bias, clamp=self.clamp)


class UpsampledProjection(nn.Module):
    """The shortcut of a resnet block: 1x1 convolution without bias, then upsampling by two."""

    resample_filter: Tensor

    def __init__(self, config: Config, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.register_buffer("resample_filter", fir_filter(config.resample_filter))
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.weight_gain = in_channels**-0.5

    def forward(self, x: Tensor, *, gain: float) -> Tensor:
        weight = self.weight * (self.weight_gain * gain)
        return upsample(conv2d(x, weight.to(x.dtype)), self.resample_filter)


def convolve_upsampled(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """Return the 3x3 convolution of x at twice its resolution: [N, in, H, W] -> [N, out, 2H, 2W].

    A transposed convolution of stride 2 does the zero-stuffing and the convolution at once; the
    low-pass filter follows (StyleGAN2, Fig. 2 and appendix B).
    """
    spread = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [N, out, 2H + 1, 2W + 1]
    count = len(taps)
    return upfirdn2d(spread, taps, padding=((count - 1) // 2, (count - 2) // 2) * 2, gain=4)


def upsample(image: Tensor, taps: Tensor) -> Tensor:
    """Return the image at twice its resolution, filtered: [N, C, H, W] -> [N, C, 2H, 2W]."""
    count = len(taps)
    return upfirdn2d(image, taps, up=2, padding=((count + 1) // 2, (count - 2) // 2) * 2, gain=4)
