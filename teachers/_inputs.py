"""The checks that every denoiser makes of its inputs: shapes only, so that no device waits."""

from __future__ import annotations

from torch import Tensor


def check_inputs(
    noisy: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    """Return nothing; raise ValueError unless noisy is [N, *image_shape], sigma [N], labels [N]."""
    images = len(noisy)
    _check_shape("noisy", noisy, (images, *image_shape))
    _check_shape("sigma", sigma, (images,))
    if labels is None:
        return
    if num_classes == 0:
        raise ValueError("labels given to an unconditional denoiser; pass labels=None")
    _check_shape("labels", labels, (images,))
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}, expected class numbers as int64")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
