"""torch's convolution, along the faster of its ways."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv2d(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0
) -> Tensor:
    """Return `torch.nn.functional.conv2d` of stride 1: [N, in, H, W], [out, in, k, k] -> images.

    On a CPU, torch turns a float32 convolution by a 1x1 kernel into a product of matrices, at half
    the speed of oneDNN's convolution; a dilation, which a single tap does not feel, selects that.
    """
    is_point = weight.shape[2:] == (1, 1) and images.device.type == "cpu"
    return F.conv2d(images, weight, bias, padding=padding, dilation=2 if is_point else 1)
