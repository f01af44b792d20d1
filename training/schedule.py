"""When something is due, and how learning rate and moving average change: pure functions of images
seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """Due whenever images_seen crosses a multiple of `images`; never if that is 0."""

    images: int

    @classmethod
    def kimg(cls, kimg: float) -> Every:
        """Return a schedule of every so many thousand images."""
        return cls(round(kimg * 1000))

    def due(self, before: int, after: int) -> bool:
        """Return whether a multiple lies in (before, after]."""
        return self.images > 0 and after // self.images > before // self.images


def warmup(images_seen: int, *, warmup_kimg: float) -> float:
    """Return the factor on the learning rate: rises linearly from 0 to 1 over the first
    warmup_kimg.
    """
    return 1.0 if warmup_kimg == 0 else min(images_seen / (warmup_kimg * 1000), 1.0)


def annealing(images_seen: int, *, total_images: int, anneal_kimg: float) -> float:
    """Return the factor on the learning rate: 1, then falling linearly to 0 over the last
    anneal_kimg.
    """
    left = total_images - images_seen
    return 1.0 if anneal_kimg == 0 else min(max(left / (anneal_kimg * 1000), 0.0), 1.0)


def ema_decay(
    images: int, *, images_seen: int, halflife_kimg: float, rampup: float | None
) -> float:
    """Return how much of the moving average stays after `images` more: 0.5^(images / halflife).

    The half-life is at most `rampup` times the images seen (EDM's training), so an early average is
    not stale. halflife_kimg 0 is no averaging: the decay is 0.
    """
    halflife = halflife_kimg * 1000
    if rampup is not None:
        halflife = min(halflife, rampup * images_seen)
    return 0.5 ** (images / halflife) if halflife > 0 else 0.0
