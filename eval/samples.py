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
from pydantic import Field
from torch import Tensor, nn

from core.config import Section
from core.distributed import World, gather_rows, shard
from core.errors import UserError
from eval.features import Extractor
from eval.metrics import FeatureStatistics, MetricResult, Moments, frechet_distance


class Config(Section):
    """The `evaluation` section of a recipe."""

    reference: str | None = None
    """Real images (zip, folder) or statistics (.npz), path or URL; "teacher": the teacher's own
    samples; null: nothing is measured.
    """
    teacher: str | None = None
    """The teacher's own samples, for the report: "sample", or their statistics (.npz); null: no."""
    extractor: str = "inception"
    """What features the FID compares: inception, mnist32, pixels or a classifier's weights file."""
    images: int = Field(default=50_000, ge=2)
    """Generated images a measurement, before and after."""
    seeds: int = Field(default=1, ge=1)
    """Measurements before and after, each on images of its own: they give mean and spread."""
    batch_size: int = Field(default=250, ge=1)
    """Images generated at a time."""
    every_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images between measurements while training; 0 measures only before and after."""
    images_while_training: int = Field(default=5_000, ge=2)
    """Generated images of a measurement while training."""
    pairs: int = Field(default=16, ge=1)
    """Pairs of images, before and after from one latent, in the report's picture."""


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
    module's mode is as before.

    sampler: how a denoiser is sampled, whose latents have the shape of its images; None: the
    network makes images in one pass.
    """

    def images_of(seeds: Sequence[int]) -> Tensor:
        latents, labels = inputs_of(network, seeds)
        latents, labels = latents.to(device), None if labels is None else labels.to(device)
        with _evaluating(network):
            if sampler is None:
                return to_uint8(network(latents, labels))
            return to_uint8(sampler(network, latents, labels, partial(_noise, seeds, like=latents)))

    return images_of


def _noise(seeds: Sequence[int], step: int, *, like: Tensor) -> Tensor:
    """Return what a sampler adds at a step: the first unit normals of RandomState([seed, step])."""
    shape = like.shape[1:]
    rows = [np.random.RandomState([seed, step]).standard_normal(shape) for seed in seeds]
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(like.device)


def inputs_of(network: nn.Module, seeds: Sequence[int]) -> Inputs:
    """Return what a student, or the sampler of a denoiser, is fed for these seeds."""
    shape = getattr(network, "latent_shape", network.image_shape)
    return latents_and_labels(seeds, latent_shape=shape, num_classes=network.num_classes)


def generated_statistics(
    images_of: ImagesOf,
    seeds: Sequence[int],
    extractor: Extractor,
    *,
    batch_size: int,
    world: World | None = None,
) -> FeatureStatistics:
    """Return the statistics, on the CPU, of these seeds' images, the work shared by all ranks.

    images_of: seeds -> uint8 [n, C, H, W], from a student or anything else. Every rank gets the
    same result; the number of ranks and the batch size change it by rounding only.
    """
    world = world or World(rank=0, size=1, local_rank=0, device=extractor.device)
    if len(seeds) < world.size:
        raise UserError(f"{len(seeds)} images are fewer than {world.size} ranks: measure on more")
    share = shard(len(seeds), world)
    statistics: FeatureStatistics | None = None
    for batch in _batches(seeds[share.start : share.stop], batch_size):
        features = extractor(images_of(batch))
        if statistics is None:
            statistics = FeatureStatistics.of(features)
        else:
            statistics.update(features)
    assert statistics is not None
    return _merged_over_ranks(statistics, world)


def fid_over_seeds(
    images_of: ImagesOf,
    extractor: Extractor,
    reference: Moments,
    *,
    images: int,
    seeds: int = 3,
    batch_size: int = 250,
    first_seed: int = 0,
    world: World | None = None,
) -> MetricResult:
    """Return the images' Fréchet distance to the reference, on `seeds` disjoint sets of them.

    Set k holds the images of seeds first_seed + k * images and following.
    """
    distances = []
    for start in range(first_seed, first_seed + seeds * images, images):
        statistics = generated_statistics(
            images_of,
            range(start, start + images),
            extractor,
            batch_size=batch_size,
            world=world,
        )
        distances.append(frechet_distance(statistics, reference))
    return MetricResult.of(distances)


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


def _batches(seeds: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), batch_size):
        yield seeds[start : start + batch_size]


def _merged_over_ranks(statistics: FeatureStatistics, world: World) -> FeatureStatistics:
    """Return the statistics of all ranks together, merged in the order of ranks, on the CPU."""
    dimensions = len(statistics.mean)
    count = statistics.mean.new_tensor([statistics.count])
    row = torch.cat([count, statistics.mean, statistics.scatter.flatten()])
    merged = FeatureStatistics.empty(dimensions)
    for other in gather_rows(row[None].to(world.device), world).cpu():
        count, mean, scatter = other.split([1, dimensions, dimensions**2])
        part = FeatureStatistics(int(count), mean, scatter.view(dimensions, dimensions))
        merged = merged.merge(part)
    return merged


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Run the body without gradients, in eval mode; then restore each module's mode."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
