"""Real images in memory, and which of them a sample of the training is."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from core.randomness import Draws
from data.images import Images


class RealImages:
    """Every image of a set in memory, and which of them a sample of the training is."""

    def __init__(self, images: Images) -> None:
        self.source = str(images.path)
        self.image_shape, self.num_classes = images.image_shape, images.num_classes
        self.pixels, self.labels = images.load_all(), images.labels
        self.description = images.description
        """Number, size and classes, for the log."""

    def drawn(self, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Return images [N, C, H, W] float32 in [-1, 1] and labels [N] or None."""
        index = shuffled(draws, len(self.pixels))
        images = self.pixels[index].to(draws.device).float() / 127.5 - 1
        labels = None if self.labels is None else self.labels[index].to(draws.device)
        return images, labels


def shuffled(draws: Draws, total: int) -> Tensor:
    """Return which of `total` images these samples are, [N] int64: each once before any again.

    A function of the seed and of how many samples came before, the order another in every epoch.
    """
    position = torch.arange(draws.count) + draws.images_seen + draws.first
    epochs = (position // total).unique().tolist()
    orders = torch.cat([_order(draws.seed, epoch, total) for epoch in epochs])
    return orders[position - epochs[0] * total]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, total: int) -> Tensor:
    draws = Draws(seed, epoch, 0, total, torch.device("cpu"), scope="epoch")
    return draws.uniform("order").argsort(stable=True)
