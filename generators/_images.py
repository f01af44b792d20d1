"""Sample images of a student as PNG files, one a seed, or as one grid."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.disk import atomic_write, writing
from core.errors import UserError
from core.roles import Generator
from eval import samples
from generators._fixed import FixedStudent

_BATCH = 16


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of a text such as "0-63" or "1,5,10-12". Raises UserError for another."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--seeds {text}: expected numbers and ranges, such as 1,5,9-12")
        seeds += range(first, last + 1)
    return seeds


def sample(
    student: Generator, seeds: list[int], *, truncation: float = 1.0, label: int | None = None
) -> Tensor:
    """Return the images of the seeds, uint8 [N, C, H, W]: those that evaluations see.

    truncation: psi, 1 = none. label: the class of all; None: as each seed draws it. Raises
    UserError if the student has no truncation or no such class, or an image is not finite.
    """
    fixed = FixedStudent(student, truncation=truncation, label=label)
    images_of = samples.images_of_seeds(fixed, device="cpu")
    parts = [images_of(seeds[start : start + _BATCH]) for start in range(0, len(seeds), _BATCH)]
    return torch.cat(parts)


def write(images: Tensor, seeds: list[int], folder: Path) -> None:
    """Write each image as seed0000.png. Raises UserError if the folder cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        _save(image, folder / f"seed{seed:04d}.png")


def write_grid(images: Tensor, path: Path) -> None:
    """Write all images as one PNG, in rows of about as many as there are rows."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = torch.full((channels, rows * height, columns * width), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        grid[:, top : top + height, left : left + width] = image
    _save(grid, path)


def _save(image: Tensor, path: Path) -> None:
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).squeeze(2).numpy())
    with atomic_write(path) as partial:
        Image.fromarray(pixels).save(partial, format="png")
