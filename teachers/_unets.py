"""The two U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364): SongUNet and DhariwalUNet.

SongUNet is DDPM++ and NCSN++ (Song et al. 2021), DhariwalUNet is ADM (Dhariwal & Nichol 2021), with
EDM's settings (Appendix F). Names of modules and buffers are the published ones, so that published
weights fit with `strict=True`; so is the initialisation. Preconditioning and all defaults are in
edm.py. Features have the precision of the images, embeddings are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers._layers import (
    Block,
    BlockStyle,
    Conv,
    ConvThenDown,
    Init,
    LabelDropout,
    PositionalEmbedding,
    group_norm,
    linear,
    noise_embedding,
)


def _song_style(emb_channels: int, dropout: float, taps: tuple[int, ...]) -> BlockStyle:
    """Return the blocks of DDPM++ and NCSN++."""
    return BlockStyle(
        emb_channels=emb_channels,
        dropout=dropout,
        resample_filter=taps,
        init=Init("xavier_uniform"),
        init_zero=Init("xavier_uniform", weight_scale=1e-5),
        init_attention=Init("xavier_uniform", weight_scale=math.sqrt(0.2)),
        num_heads=1,
        skip_scale=math.sqrt(0.5),
        norm_eps=1e-6,
        project_resampled=True,
        adaptive_scale=False,
    )


def _adm_style(emb_channels: int, dropout: float) -> BlockStyle:
    """Return the blocks of ADM."""
    init = Init("kaiming_uniform", weight_scale=math.sqrt(1 / 3), bias_scale=math.sqrt(1 / 3))
    return BlockStyle(
        emb_channels=emb_channels,
        dropout=dropout,
        resample_filter=(1, 1),
        init=init,
        init_zero=Init("kaiming_uniform", weight_scale=0.0),
        init_attention=init,
        num_heads=None,
        skip_scale=1.0,
        norm_eps=1e-5,
        project_resampled=False,
        adaptive_scale=True,
    )


class SongUNet(nn.Module):
    """DDPM++ (positional, standard, standard) and NCSN++ (fourier, residual, standard)."""

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        out_channels: int,
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
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        style = _song_style(emb_channels, dropout, tuple(resample_filter))
        init = style.init
        levels = _levels(img_resolution, model_channels, channel_mult)

        self.label_dropout = LabelDropout(label_dropout)
        self.map_noise = noise_embedding(embedding_type, noise_channels)
        self.map_label = linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = None
        if augment_dim:
            self.map_augment = linear(augment_dim, noise_channels, init=init, bias=False)
        self.map_layer0 = linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = linear(emb_channels, emb_channels, init=init)
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
            heads=_song_heads(levels, img_channels=out_channels, kind=decoder_type, style=style),
        )

    def forward(
        self,
        images: Tensor,
        noise_levels: Tensor,
        one_hot_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """Return the raw output [N, out_channels, H, W] for images c_in x, noise_levels c_noise.

        one_hot_labels: [N, label_dim] or None. augment_labels: [N, augment_dim] or None.
        """
        embedding = self.map_noise(noise_levels).unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_label is not None and one_hot_labels is not None:
            # A one-hot vector of length n has mean square 1 / n; the scale makes that 1.
            scaled = self.label_dropout(one_hot_labels) * math.sqrt(self.map_label.in_features)
            embedding = embedding + self.map_label(scaled)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        _, output = _decode(self.dec, _encode(self.enc, images, embedding), embedding)
        assert output is not None, "a SongUNet always has an output head at its full resolution"
        return output


class DhariwalUNet(nn.Module):
    """ADM: adaptive group normalization, heads of 64 channels, unscaled skips."""

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        out_channels: int,
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
        emb_channels = model_channels * channel_mult_emb
        style = _adm_style(emb_channels, dropout)
        init, init_zero = style.init, style.init_zero
        levels = _levels(img_resolution, model_channels, channel_mult)

        self.label_dropout = LabelDropout(label_dropout)
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = None
        if augment_dim:
            self.map_augment = linear(augment_dim, model_channels, init=init_zero, bias=False)
        self.map_layer0 = linear(model_channels, emb_channels, init=init)
        self.map_layer1 = linear(emb_channels, emb_channels, init=init)
        self.map_label = None
        if label_dim:
            init_label = Init("kaiming_normal", weight_scale=math.sqrt(label_dim))
            self.map_label = linear(label_dim, emb_channels, init=init_label, bias=False)
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
        self.out_norm = group_norm(levels[0].channels, eps=style.norm_eps)
        self.out_conv = Conv(levels[0].channels, out_channels, kernel=3, init=init_zero)

    def forward(
        self,
        images: Tensor,
        noise_levels: Tensor,
        one_hot_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """Return the raw output [N, out_channels, H, W] for images c_in x, noise_levels c_noise.

        one_hot_labels: [N, label_dim] or None. augment_labels: [N, augment_dim] or None.
        """
        embedding = self.map_noise(noise_levels)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and one_hot_labels is not None:
            embedding = embedding + self.map_label(self.label_dropout(one_hot_labels))
        embedding = F.silu(embedding)
        features, _ = _decode(self.dec, _encode(self.enc, images, embedding), embedding)
        return self.out_conv(self.out_norm(features, silu=True))


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
    style: BlockStyle,
) -> nn.ModuleDict:
    """Return the layers on the way down, in the order in which they run."""
    layers = nn.ModuleDict()
    channels, aux_channels = stem_channels, img_channels
    for depth, level in enumerate(levels):
        if depth == 0:
            stem = Conv(img_channels, stem_channels, kernel=3, init=style.init)
            layers[f"{level.tag}_conv"] = stem
        else:
            layers[f"{level.tag}_down"] = Block(channels, channels, style=style, resample="down")
            layers.update(
                _input_layers(level.tag, encoder_type, aux_channels, channels, style=style)
            )
            if encoder_type == "residual":
                aux_channels = channels
        attention = level.resolution in attn_resolutions
        for index in range(num_blocks):
            block = Block(channels, level.channels, style=style, attention=attention)
            layers[f"{level.tag}_block{index}"] = block
            channels = level.channels
    return layers


def _input_layers(
    tag: str, kind: str, aux_channels: int, channels: int, *, style: BlockStyle
) -> dict[str, nn.Module]:
    """Return the layers that bring the shrunk input image in at one level."""
    halving = {"init": style.init, "resample": "down", "resample_filter": style.resample_filter}
    if kind == "skip":
        return {
            f"{tag}_aux_down": Conv(aux_channels, aux_channels, kernel=0, **halving),
            f"{tag}_aux_skip": Conv(aux_channels, channels, kernel=1, init=style.init),
        }
    if kind == "residual":
        return {f"{tag}_aux_residual": ConvThenDown(aux_channels, channels, kernel=3, **halving)}
    return {}


def _skip_channels(encoder: nn.ModuleDict) -> list[int]:
    """Return the channels of each tensor that the encoder hands over, the finest first."""
    return [
        layer.out_channels
        for name, layer in encoder.items()
        if isinstance(layer, Block | Conv) and "aux" not in name
    ]


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
    style: BlockStyle,
    heads: Sequence[dict[str, nn.Module]],
) -> nn.ModuleDict:
    """Return the layers on the way up, in the order in which they run; a level ends in its head."""
    layers = nn.ModuleDict()
    waiting = list(skip_channels)
    channels = levels[-1].channels
    for level, attends, head in reversed(list(zip(levels, attention, heads, strict=True))):
        if level is levels[-1]:
            layers[f"{level.tag}_in0"] = Block(channels, channels, style=style, attention=True)
            layers[f"{level.tag}_in1"] = Block(channels, channels, style=style)
        else:
            layers[f"{level.tag}_up"] = Block(channels, channels, style=style, resample="up")
        for index, attend in enumerate(attends):
            joined = channels + waiting.pop()
            block = Block(joined, level.channels, style=style, attention=attend)
            layers[f"{level.tag}_block{index}"] = block
            channels = level.channels
        layers.update(head)
    return layers


def _song_heads(
    levels: Sequence[_Level], *, img_channels: int, kind: str, style: BlockStyle
) -> list[dict[str, nn.Module]]:
    """Return each level's output head: one at the finest level, or (skip) one at every level."""
    heads: list[dict[str, nn.Module]] = [{} for _ in levels]
    for depth, level in enumerate(levels if kind == "skip" else levels[:1]):
        if kind == "skip" and depth < len(levels) - 1:
            doubling = {"resample": "up", "resample_filter": style.resample_filter}
            up = Conv(img_channels, img_channels, kernel=0, init=style.init, **doubling)
            heads[depth][f"{level.tag}_aux_up"] = up
        norm = group_norm(level.channels, eps=1e-6)
        conv = Conv(level.channels, img_channels, kernel=3, init=style.init_zero)
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
    """Return the finest features, and the sum of the output heads if there are any."""
    waiting = list(skips)
    features, output, normed = waiting[-1], None, None
    for name, layer in decoder.items():
        match name.partition("_")[2]:
            case "aux_up":
                output = layer(output)
            case "aux_norm":
                normed = layer(features, silu=True)
            case "aux_conv":
                head = layer(normed)
                output = head if output is None else head + output
            case kind if kind.startswith("block"):
                features = layer(torch.cat((features, waiting.pop()), dim=1), embedding)
            case _:
                features = layer(features, embedding)
    return features, output
