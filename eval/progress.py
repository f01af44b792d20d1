"""Progress display of an evaluation: a bar on a terminal, otherwise a plain line at intervals.

    with show(50_000) as advance:      Show: total number of images
        advance(250)                   Advance: number of newly finished images

Both are plain callables, so evaluations do not depend on a terminal. Evaluations of a few seconds
display nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import click
from tqdm import tqdm

from core.distributed import World

Advance = Callable[[int], None]
"""Function of the number of newly finished images."""
Show = Callable[[int], AbstractContextManager[Advance]]
"""Function of the total number of images."""

_FIRST_LINE_SECONDS = 15.0
_LONGEST_PAUSE_SECONDS = 120.0
_BAR_AFTER_SECONDS = 1.0


@contextmanager
def silent(images: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done: None


def for_rank(world: World) -> Show:
    """Return the display on stderr for rank 0, and the silent one for other ranks."""
    return on_stderr if world.is_main else silent


@contextmanager
def on_stderr(images: int) -> Iterator[Advance]:
    """Show finished images, images per second and the remaining time."""
    if not sys.stderr.isatty():
        yield Lines(images, lambda line: click.echo(line, err=True)).advance
        return
    with tqdm(
        total=images,
        unit=" images",
        leave=False,
        dynamic_ncols=True,
        delay=_BAR_AFTER_SECONDS,
    ) as bar:

        def advance(done: int) -> None:
            bar.update(min(done, images - bar.n))

        yield advance


class Lines:
    """Display of plain lines: the first after 15 seconds, then at intervals that double up to 2
    minutes.
    """

    def __init__(
        self,
        images: int,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images, self._say, self._clock = images, say, clock
        self._done = 0
        self._started_at = self._said_at = clock()
        self._pause = _FIRST_LINE_SECONDS

    def advance(self, done: int) -> None:
        """Add newly finished images; print a line if one is due."""
        self._done = min(self._done + done, self._images)
        now = self._clock()
        if now - self._said_at < self._pause or self._done == self._images:
            return
        self._said_at, self._pause = now, min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        rate = self._done / (now - self._started_at)
        left = timedelta(seconds=round((self._images - self._done) / rate))
        self._say(f"{self._done:,} of {self._images:,} images, {rate:.3g} images/s, {left} left")
