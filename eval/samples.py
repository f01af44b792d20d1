"""Images from seeds, and pairs of images for reports.

A seed determines one image, independent of batch, rank and device: its latent and label are the
first draws of NumPy's RandomState(seed), the convention of the published StyleGAN programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.errors import UserError
from core.roles import Denoiser, Generator


class Inputs(NamedTuple):
    """Inputs of a student."""

    latents: Tensor
    """[N, *latent_shape] float32."""
    labels: Tensor | None
    """[N] int64, None for an unconditional network."""


def latents_and_labels(
    seeds: Sequence[int], *, latent_shape: tuple[int, ...], num_classes: int
) -> Inputs:
    """Return the inputs of the seeds: unit normals, then a uniform label, of each seed's stream."""
    latents = np.empty((len(seeds), *latent_shape), dtype=np.float32)
    labels = np.zeros(len(seeds), dtype=np.int64)
    stream = np.random.RandomState(0)
    for row, seed in enumerate(seeds):
        stream.seed(seed)  # the stream of a new RandomState(seed), seventy times faster
        latents[row] = stream.standard_normal(latent_shape)
        if num_classes:
            labels[row] = stream.randint(num_classes)
    return Inputs(torch.from_numpy(latents), torch.from_numpy(labels) if num_classes else None)


def to_uint8(images: Tensor) -> Tensor:
    """Return floats of about [-1, 1] as uint8: 127.5 x + 128, clamped and truncated."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


Sampler = Callable[[Denoiser, Tensor, Tensor | None, Callable[[int], Tensor]], Tensor]
"""(denoiser, latents, labels [N] or None, step -> noise) -> images in about [-1, 1]."""
ImagesOf = Callable[[Sequence[int]], Tensor]
"""Seeds -> their images, uint8 [n, C, H, W]."""


def images_of_seeds(
    network: Generator | Denoiser, sampler: Sampler | None = None, *, device: torch.device | str
) -> ImagesOf:
    """Return a function from seeds to a network's images, in eval mode and without gradients.

    sampler: sampler of a denoiser, whose latents have the shape of its images; None: the network is
    a student. The function restores each module's mode; it raises UserError for images that are
    not finite.
    """

    def images_of(seeds: Sequence[int]) -> Tensor:
        latents, labels = inputs_of(network, seeds)
        latents, labels = latents.to(device), None if labels is None else labels.to(device)
        with eval_mode(network):
            if sampler is None:
                images = network(latents, labels)
            else:
                assert isinstance(network, Denoiser), "a generator needs no sampler"
                images = sampler(network, latents, labels, partial(_noise, seeds, like=latents))
        _check_finite(images, seeds)
        return to_uint8(images)

    return images_of


def _noise(seeds: Sequence[int], step: int, *, like: Tensor) -> Tensor:
    """Return a sampler's noise at a step: the first unit normals of RandomState([seed, step])."""
    shape = like.shape[1:]
    noise = np.empty((len(seeds), *shape), dtype=np.float32)
    stream = np.random.RandomState(0)
    for row, seed in enumerate(seeds):
        stream.seed([seed, step])
        noise[row] = stream.standard_normal(shape)
    return torch.from_numpy(noise).to(like.device)


def _check_finite(images: Tensor, seeds: Sequence[int]) -> None:
    finite = images.flatten(1).isfinite().all(1)
    if not finite.all():
        bad = [seed for seed, good in zip(seeds, finite.tolist(), strict=True) if not good]
        raise UserError(
            f"the image of seed {bad[0]} is not finite, nor are those of {len(bad) - 1} more of "
            f"{len(seeds)} seeds: the network that made it has diverged"
        )


def inputs_of(network: Generator | Denoiser, seeds: Sequence[int]) -> Inputs:
    """Return the inputs of a student, or of a denoiser's sampler, for the seeds."""
    shape = network.image_shape if isinstance(network, Denoiser) else network.latent_shape
    return latents_and_labels(seeds, latent_shape=shape, num_classes=network.num_classes)


class Pairs(NamedTuple):
    """Images of one student before and after refinement, from the same seeds."""

    seeds: tuple[int, ...]
    before: Tensor
    """[N, C, H, W] uint8, on the CPU."""
    after: Tensor
    """[N, C, H, W] uint8, on the CPU."""
    labels: tuple[int, ...] | None
    """Class of each pair, None for an unconditional student."""
    teacher: Tensor | None = None
    """Samples of the teacher from the same latents, [N, C, H, W] uint8; None for other shapes."""


class Neighbors(NamedTuple):
    """Generated images with the smallest distances to real images."""

    seeds: tuple[int, ...]
    generated: Tensor
    """[N, C, H, W] uint8, on the CPU."""
    real: Tensor
    """[N, C, H, W] uint8: the nearest real image of each."""


def pairs(
    before: ImagesOf,
    after: ImagesOf,
    seeds: Sequence[int],
    *,
    labels: Tensor | None,
    teacher: ImagesOf | None = None,
) -> Pairs:
    """Return the images of two versions of a student for the seeds.

    labels: classes of the seeds, [N], or None.
    """
    return Pairs(
        tuple(seeds),
        before(seeds).cpu(),
        after(seeds).cpu(),
        None if labels is None else tuple(labels.tolist()),
        None if teacher is None else teacher(seeds).cpu(),
    )


def pair_seeds(network: Generator | Denoiser, count: int, *, first_seed: int = 0) -> list[int]:
    """Return the seeds of a figure: pair k has class k modulo num_classes, lowest seeds first."""
    if not network.num_classes:
        return list(range(first_seed, first_seed + count))

    # search seeds in order until every class has enough
    classes = [index % network.num_classes for index in range(count)]
    seeds: dict[int, list[int]] = {label: [] for label in classes}
    missing = count
    seed = first_seed
    while missing:
        labels = inputs_of(network, [seed]).labels
        assert labels is not None
        label = int(labels[0])
        if len(seeds.get(label, ())) < classes.count(label):
            seeds[label].append(seed)
            missing -= 1
        seed += 1

    return [seeds[label].pop(0) for label in classes]


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Set a network to eval mode without gradients in the body; then restore each module's mode."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
