"""The two U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364): SongUNet and DhariwalUNet.

SongUNet is DDPM++ and NCSN++ (Song et al. 2021), DhariwalUNet is ADM (Dhariwal & Nichol 2021), with EDM's
settings (Table 7 and Appendix C). Module names and buffers are the published ones, so that published weights
fit with `strict=True`; initialisation is the published one too. Preconditioning is in edm.py, and so are all
defaults. Left out: half precision, and the second derivative of attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resample = Literal["up", "down"]
InitLaw = Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"]


class SongUNet(nn.Module):
    """DDPM++ (positional, standard, standard) and NCSN++ (fourier, residual, standard)."""

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        label_dropout: float,
        embedding_type: Literal["positional", "fourier"],
        channel_mult_noise: int,
        encoder_type: Literal["standard", "skip", "residual"],
        decoder_type: Literal["standard", "skip"],
        resample_filter: Sequence[int],
    ) -> None:
        super().__init__()
        init = _Init("xavier_uniform")
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        style = _BlockStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            resample_filter=tuple(resample_filter),
            init=init,
            init_zero=_Init("xavier_uniform", weight_scale=1e-5),
            init_attention=_Init("xavier_uniform", weight_scale=math.sqrt(0.2)),
            num_heads=1,
            skip_scale=math.sqrt(0.5),
            norm_eps=1e-6,
            project_resampled=True,
            adaptive_scale=False,
        )
        levels = _levels(img_resolution, model_channels, channel_mult)

        self.label_dropout = label_dropout
        self.map_noise = _noise_embedding(embedding_type, noise_channels)
        self.map_label = _linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = None
        if augment_dim:
            self.map_augment = _linear(augment_dim, noise_channels, init=init, bias=False)
        self.map_layer0 = _linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = _linear(emb_channels, emb_channels, init=init)
        self.enc = _encoder(
            levels,
            img_channels=img_channels,
            stem_channels=model_channels,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            encoder_type=encoder_type,
            style=style,
        )
        self.dec = _decoder(
            levels,
            skip_channels=_skip_channels(self.enc),
            attention=_attention_after_last_block(levels, num_blocks, attn_resolutions),
            style=style,
            heads=_song_heads(levels, img_channels=img_channels, kind=decoder_type, style=style),
        )

    def forward(
        self,
        images: Tensor,
        noise_levels: Tensor,
        one_hot_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """Return the raw network output [N, C, H, W] for scaled images, c_noise [N] and labels [N, label_dim]."""
        embedding = self.map_noise(noise_levels).unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_label is not None and one_hot_labels is not None:
            kept = _drop_labels(
                one_hot_labels, probability=self.label_dropout if self.training else 0.0
            )
            embedding = embedding + self.map_label(kept * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        _, output = _decode(self.dec, _encode(self.enc, images, embedding), embedding)
        assert output is not None, "a SongUNet always has an output head at its full resolution"
        return output


class DhariwalUNet(nn.Module):
    """ADM: adaptive group normalisation, heads of 64 channels, unscaled skips."""

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        label_dropout: float,
    ) -> None:
        super().__init__()
        init = _Init("kaiming_uniform", weight_scale=math.sqrt(1 / 3), bias_scale=math.sqrt(1 / 3))
        init_zero = _Init("kaiming_uniform", weight_scale=0.0)
        emb_channels = model_channels * channel_mult_emb
        style = _BlockStyle(
            emb_channels=emb_channels,
            dropout=dropout,
            resample_filter=(1, 1),
            init=init,
            init_zero=init_zero,
            init_attention=init,
            num_heads=None,
            skip_scale=1.0,
            norm_eps=1e-5,
            project_resampled=False,
            adaptive_scale=True,
        )
        levels = _levels(img_resolution, model_channels, channel_mult)

        self.label_dropout = label_dropout
        self.map_noise = _PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = None
        if augment_dim:
            self.map_augment = _linear(augment_dim, model_channels, init=init_zero, bias=False)
        self.map_layer0 = _linear(model_channels, emb_channels, init=init)
        self.map_layer1 = _linear(emb_channels, emb_channels, init=init)
        self.map_label = None
        if label_dim:
            init_label = _Init("kaiming_normal", weight_scale=math.sqrt(label_dim))
            self.map_label = _linear(label_dim, emb_channels, init=init_label, bias=False)
        self.enc = _encoder(
            levels,
            img_channels=img_channels,
            stem_channels=levels[0].channels,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            encoder_type="standard",
            style=style,
        )
        self.dec = _decoder(
            levels,
            skip_channels=_skip_channels(self.enc),
            attention=[
                [level.resolution in attn_resolutions] * (num_blocks + 1) for level in levels
            ],
            style=style,
            heads=[{} for _ in levels],
        )
        self.out_norm = _group_norm(levels[0].channels, eps=style.norm_eps)
        self.out_conv = _Conv(levels[0].channels, img_channels, kernel=3, init=init_zero)

    def forward(
        self,
        images: Tensor,
        noise_levels: Tensor,
        one_hot_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """Return the raw network output [N, C, H, W] for scaled images, c_noise [N] and labels [N, label_dim]."""
        embedding = self.map_noise(noise_levels)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and one_hot_labels is not None:
            kept = _drop_labels(
                one_hot_labels, probability=self.label_dropout if self.training else 0.0
            )
            embedding = embedding + self.map_label(kept)
        embedding = F.silu(embedding)
        features, _ = _decode(self.dec, _encode(self.enc, images, embedding), embedding)
        return self.out_conv(F.silu(self.out_norm(features)))


# Layers


@dataclass(frozen=True)
class _Init:
    """How the weights of a layer are drawn; biases follow the weights' law and are zero by default."""

    law: InitLaw
    weight_scale: float = 1.0
    bias_scale: float = 0.0

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Draw weight [out, in, *kernel] and bias [out] in place."""
        receptive = math.prod(weight.shape[2:])
        fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] * receptive
        scales = ((weight, self.weight_scale), (bias, self.bias_scale))
        with torch.no_grad():
            for parameter, scale in scales:
                if parameter is None:
                    continue
                elif scale == 0.0:
                    parameter.zero_()
                elif self.law == "kaiming_normal":
                    parameter.normal_(0.0, scale / math.sqrt(fan_in))
                else:
                    xavier = self.law == "xavier_uniform"
                    bound = scale * math.sqrt(6 / (fan_in + fan_out) if xavier else 3 / fan_in)
                    parameter.uniform_(-bound, bound)


def _linear(in_features: int, out_features: int, *, init: _Init, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias)
    init.fill(layer.weight, layer.bias)
    return layer


def _group_norm(channels: int, *, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class _Conv(nn.Module):
    """Resamples by two (or not) with a fixed filter, then convolves (or not: kernel 0)."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        init: _Init,
        resample: Resample | None = None,
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.padding = kernel // 2
        self.resample = resample
        self.weight = self.bias = None
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            init.fill(self.weight, self.bias)
        if resample:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            self.register_buffer(
                "resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None]
            )
        self.is_box = tuple(resample_filter) == (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        if self.resample == "up":
            images = self._upsampled(images)
        elif self.resample == "down":
            images = self._downsampled(images, padding=(self.resample_filter.shape[-1] - 1) // 2)
        if self.weight is None:
            return images
        return F.conv2d(images, self.weight, self.bias, padding=self.padding)

    def _upsampled(self, images: Tensor) -> Tensor:
        if self.is_box:
            return F.interpolate(images, scale_factor=2, mode="nearest")
        channels, taps = images.shape[1], self.resample_filter.shape[-1]
        kernel = (4 * self.resample_filter).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(
            images, kernel, stride=2, padding=(taps - 1) // 2, groups=channels
        )

    def _downsampled(self, images: Tensor, *, padding: int) -> Tensor:
        if self.is_box:
            return F.avg_pool2d(images, 2, padding=padding)
        channels = images.shape[1]
        kernel = self.resample_filter.expand(channels, 1, -1, -1)
        return F.conv2d(images, kernel, stride=2, padding=padding, groups=channels)


class _ConvThenDown(_Conv):
    """Convolves first, then halves: NCSN++'s input residual. The same keys as `_Conv`."""

    def forward(self, images: Tensor) -> Tensor:
        # The border that the filter would see as zeros is convolved too, as published: all padding comes first.
        assert self.weight is not None
        margin = (self.resample_filter.shape[-1] - 1) // 2
        wide = F.conv2d(images, self.weight, self.bias, padding=self.padding + margin)
        return self._downsampled(wide, padding=0)


class _PositionalEmbedding(nn.Module):
    """Cosines and sines of the noise level at frequencies from 1 to about 1/10000 [N, channels]."""

    frequencies: Tensor

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        half = channels // 2
        exponents = torch.arange(half, dtype=torch.float32) / (half - (1 if endpoint else 0))
        self.register_buffer("frequencies", (1 / 10000) ** exponents, persistent=False)

    def forward(self, noise_levels: Tensor) -> Tensor:
        angles = noise_levels.outer(self.frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class _FourierEmbedding(nn.Module):
    """Cosines and sines of the noise level at random, stored frequencies [N, channels]."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, noise_levels: Tensor) -> Tensor:
        angles = noise_levels.outer(2 * math.pi * self.freqs)
        return torch.cat((angles.cos(), angles.sin()), dim=1)


def _noise_embedding(kind: Literal["positional", "fourier"], channels: int) -> nn.Module:
    if kind == "fourier":
        return _FourierEmbedding(channels)
    return _PositionalEmbedding(channels, endpoint=True)


def _drop_labels(one_hot_labels: Tensor, *, probability: float) -> Tensor:
    """Return the labels, each row zeroed with this probability."""
    if probability == 0.0:
        return one_hot_labels
    kept = torch.rand_like(one_hot_labels[:, :1]) >= probability
    return one_hot_labels * kept


# Residual block


@dataclass(frozen=True)
class _BlockStyle:
    """What all residual blocks of one network share."""

    emb_channels: int
    dropout: float
    resample_filter: tuple[int, ...]
    init: _Init
    init_zero: _Init
    init_attention: _Init
    num_heads: int | None
    """None: one head for every 64 channels."""
    skip_scale: float
    norm_eps: float
    project_resampled: bool
    """A resampling block has a 1x1 convolution in its skip even where the channels stay the same."""
    adaptive_scale: bool
    """The embedding scales and shifts the normalised features, instead of being added before."""


class _Block(nn.Module):
    """A residual block, with its resampling inside and its attention after."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        style: _BlockStyle,
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.dropout = style.dropout
        self.skip_scale = style.skip_scale
        self.adaptive_scale = style.adaptive_scale
        self.num_heads = (style.num_heads or out_channels // 64) if attention else 0
        affine_channels = 2 * out_channels if style.adaptive_scale else out_channels
        resampling = {"resample": resample, "resample_filter": style.resample_filter}

        self.norm0 = _group_norm(in_channels, eps=style.norm_eps)
        self.conv0 = _Conv(in_channels, out_channels, kernel=3, init=style.init, **resampling)
        self.affine = _linear(style.emb_channels, affine_channels, init=style.init)
        self.norm1 = _group_norm(out_channels, eps=style.norm_eps)
        self.conv1 = _Conv(out_channels, out_channels, kernel=3, init=style.init_zero)
        self.skip = None
        if resample or in_channels != out_channels:
            kernel = 1 if style.project_resampled or in_channels != out_channels else 0
            self.skip = _Conv(
                in_channels, out_channels, kernel=kernel, init=style.init, **resampling
            )
        if self.num_heads:
            self.norm2 = _group_norm(out_channels, eps=style.norm_eps)
            self.qkv = _Conv(out_channels, 3 * out_channels, kernel=1, init=style.init_attention)
            self.proj = _Conv(out_channels, out_channels, kernel=1, init=style.init_zero)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        shortcut = features if self.skip is None else self.skip(features)
        hidden = self.conv0(F.silu(self.norm0(features)))
        hidden = F.silu(self._modulated(hidden, self.affine(embedding)[:, :, None, None]))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        features = self._joined(hidden, shortcut)
        if self.num_heads:
            features = self._joined(self.proj(self._attended(features)), features)
        return features

    def _modulated(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        if not self.adaptive_scale:
            return self.norm1(hidden.add_(modulation))
        scale, shift = modulation.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(hidden), scale + 1)

    def _joined(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        # In place: the branch comes from a convolution, whose backward does not need its output.
        joined = branch.add_(shortcut)
        return joined if self.skip_scale == 1.0 else joined.mul_(self.skip_scale)

    def _attended(self, features: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(channels per head)) v over pixels, in float32."""
        qkv = self.qkv(self.norm2(features)).flatten(2)
        # Published channel order: head, channel within the head, then which of q, k, v.
        qkv = qkv.unflatten(1, (self.num_heads, -1, 3)).permute(
            3, 0, 1, 4, 2
        )  # [3, N, heads, H*W, c]
        query, key, value = qkv.float().contiguous()
        mixed = F.scaled_dot_product_attention(query, key, value).to(features.dtype)
        return mixed.transpose(2, 3).reshape(features.shape)


# Encoder and decoder


class _Level(NamedTuple):
    """One resolution of a U-Net."""

    resolution: int
    channels: int

    @property
    def tag(self) -> str:
        return f"{self.resolution}x{self.resolution}"


def _levels(resolution: int, channels: int, channel_mult: Sequence[int]) -> list[_Level]:
    """Return the levels, the finest first."""
    return [_Level(resolution >> depth, channels * mult) for depth, mult in enumerate(channel_mult)]


def _encoder(
    levels: Sequence[_Level],
    *,
    img_channels: int,
    stem_channels: int,
    num_blocks: int,
    attn_resolutions: Sequence[int],
    encoder_type: Literal["standard", "skip", "residual"],
    style: _BlockStyle,
) -> nn.ModuleDict:
    """Return the layers on the way down, in the order in which they run."""
    layers = nn.ModuleDict()
    channels, aux_channels = stem_channels, img_channels
    for depth, level in enumerate(levels):
        if depth == 0:
            stem = _Conv(img_channels, stem_channels, kernel=3, init=style.init)
            layers[f"{level.tag}_conv"] = stem
        else:
            layers[f"{level.tag}_down"] = _Block(channels, channels, style=style, resample="down")
            layers.update(
                _input_layers(level.tag, encoder_type, aux_channels, channels, style=style)
            )
            if encoder_type == "residual":
                aux_channels = channels
        attention = level.resolution in attn_resolutions
        for index in range(num_blocks):
            block = _Block(channels, level.channels, style=style, attention=attention)
            layers[f"{level.tag}_block{index}"] = block
            channels = level.channels
    return layers


def _input_layers(
    tag: str, kind: str, aux_channels: int, channels: int, *, style: _BlockStyle
) -> dict[str, nn.Module]:
    """Return the layers that bring the shrunk input image in at one level."""
    halving = {"init": style.init, "resample": "down", "resample_filter": style.resample_filter}
    if kind == "skip":
        return {
            f"{tag}_aux_down": _Conv(aux_channels, aux_channels, kernel=0, **halving),
            f"{tag}_aux_skip": _Conv(aux_channels, channels, kernel=1, init=style.init),
        }
    if kind == "residual":
        return {f"{tag}_aux_residual": _ConvThenDown(aux_channels, channels, kernel=3, **halving)}
    return {}


def _skip_channels(encoder: nn.ModuleDict) -> list[int]:
    """Return the channels of each tensor that the encoder hands over, the finest first."""
    return [layer.out_channels for name, layer in encoder.items() if "aux" not in name]


def _attention_after_last_block(
    levels: Sequence[_Level], num_blocks: int, attn_resolutions: Sequence[int]
) -> list[list[bool]]:
    """Return, for each level and decoder block, whether a SongUNet attends there."""
    return [[False] * num_blocks + [level.resolution in attn_resolutions] for level in levels]


def _decoder(
    levels: Sequence[_Level],
    *,
    skip_channels: Sequence[int],
    attention: Sequence[Sequence[bool]],
    style: _BlockStyle,
    heads: Sequence[dict[str, nn.Module]],
) -> nn.ModuleDict:
    """Return the layers on the way up, in the order in which they run: each level's blocks, then its head."""
    layers = nn.ModuleDict()
    waiting = list(skip_channels)
    channels = levels[-1].channels
    for level, attends, head in reversed(list(zip(levels, attention, heads, strict=True))):
        if level is levels[-1]:
            layers[f"{level.tag}_in0"] = _Block(channels, channels, style=style, attention=True)
            layers[f"{level.tag}_in1"] = _Block(channels, channels, style=style)
        else:
            layers[f"{level.tag}_up"] = _Block(channels, channels, style=style, resample="up")
        for index, attend in enumerate(attends):
            joined = channels + waiting.pop()
            block = _Block(joined, level.channels, style=style, attention=attend)
            layers[f"{level.tag}_block{index}"] = block
            channels = level.channels
        layers.update(head)
    return layers


def _song_heads(
    levels: Sequence[_Level], *, img_channels: int, kind: str, style: _BlockStyle
) -> list[dict[str, nn.Module]]:
    """Return each level's output head: at the finest level only, or at all of them, summed (kind "skip")."""
    heads: list[dict[str, nn.Module]] = [{} for _ in levels]
    for depth, level in enumerate(levels if kind == "skip" else levels[:1]):
        if kind == "skip" and depth < len(levels) - 1:
            doubling = {"resample": "up", "resample_filter": style.resample_filter}
            up = _Conv(img_channels, img_channels, kernel=0, init=style.init, **doubling)
            heads[depth][f"{level.tag}_aux_up"] = up
        norm = _group_norm(level.channels, eps=1e-6)
        conv = _Conv(level.channels, img_channels, kernel=3, init=style.init_zero)
        heads[depth] |= {f"{level.tag}_aux_norm": norm, f"{level.tag}_aux_conv": conv}
    return heads


def _encode(encoder: nn.ModuleDict, images: Tensor, embedding: Tensor) -> list[Tensor]:
    """Return the features handed over to the decoder, the coarsest last."""
    features: list[Tensor] = []
    aux = images
    for name, layer in encoder.items():
        match name.partition("_")[2]:
            case "conv":
                features.append(layer(images))
            case "aux_down":
                aux = layer(aux)
            case "aux_skip":
                features[-1] = features[-1] + layer(aux)
            case "aux_residual":
                features[-1] = aux = (features[-1] + layer(aux)) * math.sqrt(0.5)
            case _:
                features.append(layer(features[-1], embedding))
    return features


def _decode(
    decoder: nn.ModuleDict, skips: Sequence[Tensor], embedding: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the finest features, and the image summed over the output heads where there are any."""
    waiting = list(skips)
    features, output, normed = waiting[-1], None, None
    for name, layer in decoder.items():
        match name.partition("_")[2]:
            case "aux_up":
                output = layer(output)
            case "aux_norm":
                normed = layer(features)
            case "aux_conv":
                head = layer(F.silu(normed))
                output = head if output is None else head + output
            case kind if kind.startswith("block"):
                features = layer(torch.cat((features, waiting.pop()), dim=1), embedding)
            case _:
                features = layer(features, embedding)
    return features, output
