"""DINOv2's vision transformer (Oquab et al., TMLR 2024), for features only.

Parameter names are those of the published files, which load with strict=True; width, depth and grid
follow from the shapes of the tensors. Left out: registers, masks, and the SwiGLU layers of ViT-g.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD_WIDTH = 64
_OFFSET = 0.1
"""Added to the grid's size in the resampling of positions, as in the published networks."""


class DINOv2(nn.Module):
    """DINOv2: normalized images [N, 3, H, W], sides multiples of the patch -> [N, width]."""

    def __init__(self, *, width: int, depth: int, patch: int, grid: int) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Return the class token after the last normalization."""
        height, width = (side // self.patch for side in images.shape[2:])
        patches = self.patch_embed["proj"](images).flatten(2).mT  # [N, height width, self.width]
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = tokens + self._positions(height, width)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the position embeddings, resampled to a grid [1, 1 + height width, self.width]."""
        first, others = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = isqrt(others.shape[1])
        if (height, width) == (grid, grid):
            return self.pos_embed
        square = others.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        scale = ((height + _OFFSET) / grid, (width + _OFFSET) / grid)
        resampled = F.interpolate(square, scale_factor=scale, mode="bicubic")
        return torch.cat([first, resampled.flatten(2).mT], dim=1)


def from_tensors(tensors: Mapping[str, Tensor]) -> DINOv2:
    """Return the network of a published state dict, in eval mode and without gradients."""
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = len([name for name in tensors if name.endswith(".attn.qkv.weight")])
    grid = isqrt(tensors["pos_embed"].shape[1] - 1)
    network = DINOv2(width=width, depth=depth, patch=patch, grid=grid)
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


class _Block(nn.Module):
    """Residual block of attention and MLP, each with a pre-normalization and a layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1["gamma"] * self._attention(self.norm1(tokens))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(tokens)))
        return tokens + self.ls2["gamma"] * self.mlp["fc2"](hidden)

    def _attention(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        qkv = self.attn["qkv"](tokens).view(batch, length, 3, -1, _HEAD_WIDTH)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, length, _HEAD_WIDTH] each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](mixed.transpose(1, 2).reshape(batch, length, width))
