"""R3GAN's generator (Huang et al., NeurIPS 2024): residual blocks of grouped convolutions, without
mapping, noise, normalization or truncation.

Parameter and buffer names are those of the published networks. Left out: bfloat16 of the late
stages, which is about speed (training.precision has it for all but the first).
"""

from __future__ import annotations

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from core.config import Section
from core.errors import UserError
from core.roles import Generator
from custom_ops.bias_act import bias_act
from custom_ops.conv2d import conv2d
from custom_ops.upfirdn2d import fir_filter, upfirdn2d
from pretrained.nvidia_pickle import NetworkRecord
from pretrained.torch_checkpoint import STATE_DICT

_TAPS = (1, 3, 3, 1)
_CLASSES = ("training.networks.Generator", "training.networks_baseline.Generator", STATE_DICT)
_BLOCK = re.compile(r"Model\.MainLayers\.(\d+)\.Layers\.(\d+)\.LinearLayer2\.Layer\.weight")


class Config(Section):
    """Shape of an R3GAN generator."""

    noise_dimension: int = Field(default=64, ge=1)
    """Length of a latent."""
    width_per_stage: tuple[int, ...] = Field(default=(768, 768, 768, 768), min_length=1)
    """Channels of each stage, from 4x4 up; each later one doubles the resolution."""
    cardinality_per_stage: tuple[int, ...] = Field(default=(96, 96, 96, 96), min_length=1)
    """Groups of the 3x3 convolutions of each stage."""
    blocks_per_stage: tuple[int, ...] = Field(default=(2, 2, 2, 2), min_length=1)
    """Residual blocks of each stage."""
    expansion_factor: int = Field(default=2, ge=1)
    """Channels inside a block, as a multiple of the stage's."""
    c_dim: int = Field(default=0, ge=0)
    """Classes; 0 = unconditional."""
    condition_embedding_dimension: int = Field(default=64, ge=1)
    """Width of the label embedding."""
    img_channels: int = Field(default=3, ge=1)
    """Channels of an image."""

    @model_validator(mode="after")
    def _as_many_of_each(self) -> Config:
        per_stage = (self.width_per_stage, self.cardinality_per_stage, self.blocks_per_stage)
        if len({len(values) for values in per_stage}) > 1:
            raise ValueError("width, cardinality and blocks per stage: give as many of each")
        for width, groups in zip(self.width_per_stage, self.cardinality_per_stage, strict=True):
            if (width * self.expansion_factor) % groups:
                raise ValueError(
                    f"{width} channels times {self.expansion_factor} are no multiple of {groups} "
                    "groups"
                )
        return self

    @property
    def img_resolution(self) -> int:
        """Return height and width of an image."""
        return 4 * 2 ** (len(self.width_per_stage) - 1)


def build(config: Config) -> R3GAN:
    """Return a student of this shape with freshly drawn weights."""
    return R3GAN(config)


def from_record(record: NetworkRecord) -> Config | None:
    """Return the Config of a published network, or None if it is no R3GAN.

    The pickles have no constructor arguments: the shapes tell them. Raises UserError if the shapes
    are not those of such a network.
    """
    tensors = record.tensors
    if record.class_name not in _CLASSES or "Model.MainLayers.0.Layers.0.Basis" not in tensors:
        return None
    blocks: dict[int, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), []).append(tensor)
    if sorted(blocks) != list(range(len(blocks))):
        raise UserError("its R3GAN generator has stages without a block")

    # widths: what the third layer of a block gives back
    first = {stage: f"Model.MainLayers.{stage}.Layers.1.LinearLayer3" for stage in blocks}
    widths = [tensors[f"{first[stage]}.Layer.weight"].shape[0] for stage in sorted(blocks)]
    inside = blocks[0][0].shape[0]
    embedding = tensors.get("Model.EmbeddingLayer.weight")
    embedded = 0 if embedding is None else embedding.shape[0]
    return Config(
        noise_dimension=tensors["Model.MainLayers.0.Layers.0.LinearLayer.weight"].shape[1]
        - embedded,
        width_per_stage=tuple(widths),
        cardinality_per_stage=tuple(
            weights[0].shape[0] // weights[0].shape[1] for _, weights in sorted(blocks.items())
        ),
        blocks_per_stage=tuple(len(weights) for _, weights in sorted(blocks.items())),
        expansion_factor=inside // widths[0],
        c_dim=0 if embedding is None else embedding.shape[1],
        condition_embedding_dimension=embedded or 64,
        img_channels=tensors["Model.AggregationLayer.Layer.weight"].shape[0],
    )


class R3GAN(Generator):
    """An R3GAN generator: [N, noise_dimension], [N] -> [N, C, H, W] float32, about [-1, 1]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = (config.noise_dimension,)
        self.image_shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.num_classes = config.c_dim
        self.Model = _Model(config)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images [N, C, H, W], a deterministic function of latents and labels."""
        if (labels is not None) != (self.num_classes > 0):
            raise ValueError(f"labels are for {self.num_classes} classes, got {labels}")
        return self.Model(latents, labels)


class _Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        widths, embedded = config.width_per_stage, 0
        self.num_classes = config.c_dim
        if config.c_dim:
            embedded = config.condition_embedding_dimension
            self.EmbeddingLayer = nn.Linear(config.c_dim, embedded, bias=False)
        first = _Basis(config.noise_dimension + embedded, widths[0])
        later = [_Upsample(*pair) for pair in pairwise(widths)]
        self.MainLayers = nn.ModuleList(
            _Stage(layer, config, index) for index, layer in enumerate([first, *later])
        )
        self.AggregationLayer = _Convolution(widths[-1], config.img_channels, size=1)

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None:
            one_hot = F.one_hot(labels, self.num_classes).to(latents.dtype)
            latents = torch.cat([latents, self.EmbeddingLayer(one_hot)], 1)
        x = latents
        for stage in self.MainLayers:
            x = stage(x)
        return self.AggregationLayer(x)


class _Stage(nn.Module):
    """A layer that makes or doubles features, then residual blocks."""

    def __init__(self, layer: nn.Module, config: Config, index: int) -> None:
        super().__init__()
        width, groups = config.width_per_stage[index], config.cardinality_per_stage[index]
        inside = width * config.expansion_factor
        blocks = [_Block(width, inside, groups) for _ in range(config.blocks_per_stage[index])]
        self.Layers = nn.ModuleList([layer, *blocks])
        if index > 0:
            self.compute_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(getattr(self, "compute_dtype", x.dtype))
        for layer in self.Layers:
            x = layer(x)
        return x.float()


class _Basis(nn.Module):
    """Latents [N, D] -> [N, width, 4, 4]: a learned basis, scaled channel by channel."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        self.Basis = nn.Parameter(torch.randn(width, 4, 4))
        self.LinearLayer = nn.Linear(dimension, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.Basis * self.LinearLayer(latents)[:, :, None, None]


class _Upsample(nn.Module):
    """A 1x1 convolution if the width changes, then twice the resolution by a filter."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.Resampler = _Resampler()
        if before != after:
            self.LinearLayer = _Convolution(before, after, size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.LinearLayer(x) if hasattr(self, "LinearLayer") else x
        return upfirdn2d(x, self.Resampler.Kernel, up=2, padding=(2, 1, 2, 1), gain=4)


class _Resampler(nn.Module):
    Kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("Kernel", fir_filter(_TAPS))


class _Block(nn.Module):
    """x + W3 act(W2 act(W1 x + b1) + b2): 1x1, grouped 3x3, 1x1."""

    def __init__(self, width: int, inside: int, groups: int) -> None:
        super().__init__()
        self.LinearLayer1 = _Convolution(width, inside, size=1)
        self.LinearLayer2 = _Convolution(inside, inside, size=3, groups=groups)
        self.LinearLayer3 = _Convolution(inside, width, size=1)
        self.NonLinearity1, self.NonLinearity2 = (
            _BiasedActivation(inside),
            _BiasedActivation(inside),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.NonLinearity1(self.LinearLayer1(x))
        y = self.NonLinearity2(self.LinearLayer2(y))
        return x + self.LinearLayer3(y)


class _BiasedActivation(nn.Module):
    """Leaky ReLU of slope 0.2 of x + bias, without a gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.Bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(x, self.Bias.to(x.dtype), act="lrelu", gain=1.0)


class _Convolution(nn.Module):
    """A convolution without bias."""

    def __init__(self, before: int, after: int, *, size: int, groups: int = 1) -> None:
        super().__init__()
        self.Layer = nn.Conv2d(before, after, size, padding=size // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, layer = self.Layer.weight.to(x.dtype), self.Layer
        if layer.groups == 1:
            return conv2d(x, weight, padding=int(layer.padding[0]))
        return F.conv2d(x, weight, padding=layer.padding, groups=layer.groups)
