"""Subjects of an evaluation: a network that makes images from seeds, or images in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.roles import Denoiser, Generator
from eval.reference import ImageSet
from eval.samples import ImagesOf, Sampler, images_of_seeds

Kind = Literal["student", "teacher", "images"]


@dataclass(frozen=True)
class Subject:
    """Images to evaluate, and their source."""

    source: str
    """As the user named it."""
    sha256: str
    """Of the weights file, or of the image set."""
    kind: Kind
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    images_of: ImagesOf
    """From seeds, or from indices of files, to images."""
    files: int | None = None
    """How many images there are; None if seeds make as many as are wanted."""
    student: Generator | None = None
    """The network whose latents can be walked."""
    sampler: str | None = None
    """How a teacher is sampled, in words."""


def of_student(
    network: Generator, *, source: str, sha256: str, device: torch.device | str
) -> Subject:
    """Return a student on the device as a subject."""
    return Subject(
        source,
        sha256,
        "student",
        network.image_shape,
        images_of_seeds(network, device=device),
        student=network,
    )


def of_teacher(
    network: Denoiser,
    sampler: Sampler,
    *,
    described: str,
    source: str,
    sha256: str,
    device: torch.device | str,
) -> Subject:
    """Return a teacher on the device, with its sampler, as a subject."""
    return Subject(
        source,
        sha256,
        "teacher",
        network.image_shape,
        images_of_seeds(network, sampler, device=device),
        sampler=described,
    )


def of_images(images: ImageSet, *, source: str) -> Subject:
    """Return a set of images as a subject; its indices take the place of seeds."""

    def images_of(indices: Sequence[int]) -> Tensor:
        return torch.stack([images[index] for index in indices])

    return Subject(
        source, images.sha256, "images", images.image_shape, images_of, files=len(images)
    )
