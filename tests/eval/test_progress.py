"""How far a measurement is: said seldom, with the rate and the time left."""

from __future__ import annotations

import torch

from core.distributed import World
from eval import progress
from eval.progress import Lines

CPU = torch.device("cpu")


class Clock:
    """A clock that is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def _said(seconds_a_batch: float, *, batches: int = 400, batch: int = 25) -> list[str]:
    """Return what is said of batches that come evenly."""
    clock, said = Clock(), list[str]()
    lines = Lines(batches * batch, said.append, clock=clock)
    for _ in range(batches):
        clock.now += seconds_a_batch
        lines.advance(batch)
    return said


def test_a_line_has_the_rate_and_the_time_left() -> None:
    """25 images a second, 10,000 of them: after 15 seconds 385 more remain."""
    assert _said(1.0)[0] == "375 of 10,000 images, 25 images/s, 0:06:25 left"


def test_lines_come_more_seldom_the_longer_it_takes() -> None:
    """After 15, 45, 105 and 225 seconds, then every two minutes; nothing at the end."""
    done = [int(line.split()[0].replace(",", "")) // 25 for line in _said(1.0)]
    assert done == [15, 45, 105, 225, 345]


def test_what_takes_seconds_says_nothing() -> None:
    """A test, or a measurement of few images, has no lines."""
    assert _said(0.03) == []


def test_only_the_first_rank_speaks() -> None:
    """The others show nothing."""
    assert progress.for_rank(World(0, 2, 0, CPU)) is progress.on_stderr
    assert progress.for_rank(World(1, 2, 1, CPU)) is progress.silent
