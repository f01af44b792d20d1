"""LPIPS, a perceptual distance between images (Zhang et al., CVPR 2018), on VGG16.

Version 0.1, with linear layers trained on VGG16 of ImageNet. Images stay float32 in [-1, 1], the
output of a student: path lengths measure steps far below one level of 256.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions; a pooling layer precedes each group but the first."""
_MEAN = (-0.030, -0.088, -0.188)
_DEVIATION = (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """LPIPS: pairs of images [N, 3, H, W] float32 in [-1, 1] -> distances [N] >= 0."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_layers())
        self.weights = nn.ParameterList(torch.zeros(1, widths[-1], 1, 1) for widths in _WIDTHS)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION)[:, None, None], persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2 over unit features a, b (Eq. 1)."""
        distance = first.new_zeros(len(first))
        pairs = zip(self._activations(first), self._activations(second), strict=True)
        for weight, (a, b) in zip(self.weights, pairs, strict=True):
            squares = (_unit(a) - _unit(b)).square()
            distance = distance + (weight * squares).sum(1).mean([1, 2])
        return distance

    def _activations(self, images: Tensor) -> list[Tensor]:
        """Return the output of each of the five groups of convolutions."""
        activations = []
        images = (images - self.mean) / self.deviation
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                activations.append(images)
            images = layer(images)
        return [*activations, images]


def from_tensors(vgg16: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> LPIPS:
    """Return the network of torchvision's VGG16 and of LPIPS's linear layers, in eval mode."""
    network = LPIPS()
    tensors = {name: value for name, value in vgg16.items() if name.startswith("features.")}
    for level in range(len(_WIDTHS)):
        tensors[f"weights.{level}"] = linear[f"lin{level}.model.1.weight"]
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _layers() -> list[nn.Module]:
    """Return VGG16's layers up to its last convolution, in torchvision's order and numbering."""
    layers: list[nn.Module] = []
    channels = 3
    for group, widths in enumerate(_WIDTHS):
        if group:
            layers.append(nn.MaxPool2d(2))
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


def _unit(features: Tensor) -> Tensor:
    """Return features normalized to length 1 over the channels."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)
