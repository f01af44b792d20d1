"""Features of a fixed network with random weights: for distances without any download.

Four convolutions of random weights, and the mean and standard deviation of each channel's
activations, describe textures, edges and shapes at four scales; means of color over a 4x4 grid
describe the layout. Untrained convolutions rank images by quality less well than trained ones, and
know no objects: values compare runs of this project on the same images, nothing else. Networks
with random weights as embeddings for precision and recall: Naeem et al. 2020 (arXiv 2002.09797).

Version 1 is: weights from NumPy's RandomState(0), normal with variance 2 / fan-in, no bias; 3x3
kernels, stride 2, reflection padding, leaky ReLU of slope 0.2 times sqrt(2 / 1.04), which keeps the
second moment; widths 16, 32, 64, 128. A change of any of it is another version, of another name.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "random-conv-v1"
_WIDTHS = (16, 32, 64, 128)
SMALLEST = 16
"""Smallest height and width of an image, in pixels."""
_GRID = 4
DIMENSIONS = 2 * sum(_WIDTHS) + 3 * _GRID**2
"""Size of the feature vector: 528."""
_SLOPE = 0.2
_GAIN = math.sqrt(2 / (1 + _SLOPE**2))


class RandomConvolutions:
    """Features [N, 528] of images [N, 1 or 3, H, W] float32 in [-1, 1], of any size from 16x16."""

    def __init__(self, device: torch.device) -> None:
        random, channels = np.random.RandomState(0), 3
        self.weights: list[Tensor] = []
        digest = hashlib.sha256(NAME.encode())
        for width in _WIDTHS:
            scale = math.sqrt(1 / (9 * channels))  # the gain is with the activation
            weight = (random.standard_normal((width, channels, 3, 3)) * scale).astype(np.float32)
            digest.update(weight.tobytes())
            self.weights.append(torch.from_numpy(weight).to(device))
            channels = width
        self.sha256 = digest.hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1)
        features = [F.adaptive_avg_pool2d(images, _GRID).flatten(1)]
        activations = images
        for weight in self.weights:
            padded = F.pad(activations, (1, 1, 1, 1), mode="reflect")
            activations = _GAIN * F.leaky_relu(F.conv2d(padded, weight, stride=2), _SLOPE)
            features.append(activations.mean((2, 3)))
            features.append(activations.std((2, 3), correction=0))
        return torch.cat(features, 1)
