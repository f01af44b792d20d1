"""Images from seeds, and what is measured on them.

A seed stands for one image, whatever batch, rank or device makes it: its latent and label
are the first draws of NumPy's RandomState(seed), the convention of the published StyleGAN programs.
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


class Inputs(NamedTuple):
    """What a student is fed."""

    latents: Tensor
    """[N, *latent_shape] float32."""
    labels: Tensor | None
    """[N] int64, None where there are no classes."""


def latents_and_labels(
    seeds: Sequence[int], *, latent_shape: tuple[int, ...], num_classes: int
) -> Inputs:
    """Return the inputs of these seeds: of each stream unit normals, then a uniform label."""
    latents = np.empty((len(seeds), *latent_shape), dtype=np.float32)
    labels = np.zeros(len(seeds), dtype=np.int64)
    stream = np.random.RandomState(0)
    for row, seed in enumerate(seeds):
        stream.seed(seed)  # the same stream as a new RandomState(seed), seventy times sooner
        latents[row] = stream.standard_normal(latent_shape)
        if num_classes:
            labels[row] = stream.randint(num_classes)
    return Inputs(torch.from_numpy(latents), torch.from_numpy(labels) if num_classes else None)


def to_uint8(images: Tensor) -> Tensor:
    """Return uint8 images for floats of about [-1, 1]: 127.5 x + 128, clipped, fraction dropped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


Sampler = Callable[[nn.Module, Tensor, Tensor | None, Callable[[int], Tensor]], Tensor]
"""(denoiser, latents, labels [N] or None, step -> noise) to images in about [-1, 1]."""
ImagesOf = Callable[[Sequence[int]], Tensor]
"""From seeds to their images, uint8 [n, C, H, W]."""


def images_of_seeds(
    network: nn.Module, sampler: Sampler | None = None, *, device: torch.device | str
) -> ImagesOf:
    """Return a function from seeds to a network's images; eval mode, no gradients, and every
    module's mode is as before. The function raises UserError where an image is not finite.

    sampler: how a denoiser is sampled, whose latents have the shape of its images; None: the
    network makes images in one pass.
    """

    def images_of(seeds: Sequence[int]) -> Tensor:
        latents, labels = inputs_of(network, seeds)
        latents, labels = latents.to(device), None if labels is None else labels.to(device)
        with evaluating(network):
            if sampler is None:
                made = network(latents, labels)
            else:
                made = sampler(network, latents, labels, partial(_noise, seeds, like=latents))
        _check_finite(made, seeds)
        return to_uint8(made)

    return images_of


def _noise(seeds: Sequence[int], step: int, *, like: Tensor) -> Tensor:
    """Return what a sampler adds at a step: the first unit normals of RandomState([seed, step])."""
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


def inputs_of(network: nn.Module, seeds: Sequence[int]) -> Inputs:
    """Return what a student, or the sampler of a denoiser, is fed for these seeds."""
    shape = getattr(network, "latent_shape", network.image_shape)
    return latents_and_labels(seeds, latent_shape=shape, num_classes=network.num_classes)


class Pairs(NamedTuple):
    """Images of one student before and after, from the same seeds."""

    seeds: tuple[int, ...]
    before: Tensor
    """[N, C, H, W] uint8, on the CPU."""
    after: Tensor
    """[N, C, H, W] uint8, on the CPU."""
    labels: tuple[int, ...] | None
    """Class of each pair, None where there are no classes."""
    teacher: Tensor | None = None
    """The teacher's own samples, [N, C, H, W] uint8, where it starts from the same latents."""


class Neighbours(NamedTuple):
    """Images that come nearest to real ones."""

    seeds: tuple[int, ...]
    generated: Tensor
    """[N, C, H, W] uint8, on the CPU."""
    real: Tensor
    """[N, C, H, W] uint8: of each the nearest real image."""


def pairs(
    before: ImagesOf,
    after: ImagesOf,
    seeds: Sequence[int],
    *,
    labels: Tensor | None,
    teacher: ImagesOf | None = None,
) -> Pairs:
    """Return the images that two versions of a student make of these seeds. labels: their classes,
    [N], or None.
    """
    return Pairs(
        tuple(seeds),
        before(seeds).cpu(),
        after(seeds).cpu(),
        None if labels is None else tuple(labels.tolist()),
        None if teacher is None else teacher(seeds).cpu(),
    )


def pair_seeds(network: nn.Module, count: int, *, first_seed: int = 0) -> list[int]:
    """Return a picture's seeds: pair k shows class k modulo num_classes, lowest seeds first."""
    if not network.num_classes:
        return list(range(first_seed, first_seed + count))
    wanted = [index % network.num_classes for index in range(count)]
    found: dict[int, list[int]] = {label: [] for label in wanted}
    missing = count
    seed = first_seed
    while missing:
        labels = inputs_of(network, [seed]).labels
        assert labels is not None
        label = int(labels[0])
        if len(found.get(label, ())) < wanted.count(label):
            found[label].append(seed)
            missing -= 1
        seed += 1
    return [found[label].pop(0) for label in wanted]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Run the body without gradients, in eval mode; then restore each module's mode."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
