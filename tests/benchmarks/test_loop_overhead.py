"""benchmarks/loop_overhead.py: every second of a round stands in one part of its table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner

from benchmarks import loop_overhead, step
from core.randomness import Draws
from training import step as training_step
from training import trainer

TINY = {"img_channels": 3, "img_resolution": 8, "model_type": "SongUNet", "augment_dim": 9}
TINY |= {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1}


class Clock:
    """Seconds that pass only in the functions that are slowed down."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def slow(self, function: Callable) -> Callable:
        """Return the function, which takes one second of this clock."""

        def slow(*arguments: object, **options: object) -> object:
            self.seconds += 1
            return function(*arguments, **options)

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that the stopwatch reads in place of the machine's."""
    clock = Clock()
    monkeypatch.setattr(loop_overhead.Stopwatch, "now", lambda _: clock.seconds)
    return clock


@pytest.mark.parametrize(
    ("owner", "name", "part", "calls"),
    [
        (training_step, "update_ema", "moving average", 1),
        (training_step, "_checked_norms", "gradient norms and check", 2),
        (trainer, "any_rank", "other", 1),
        (Draws, "normal", "draws", 6),
        (torch.optim.Adam, "step", "optimizer", 2),
    ],
)
def test_time_is_counted_where_it_is_spent(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    part: str,
    calls: int,
) -> None:
    """A slowed function's seconds all show in its own part of the round, and in no other."""
    monkeypatch.setattr(owner, name, clock.slow(getattr(owner, name)))
    (seconds,) = loop_overhead.measured(TINY, "float32", batch=2, rounds=1, device="cpu")
    assert +seconds == {part: calls}


def test_a_part_within_another_counts_for_the_outer(clock: Clock) -> None:
    """Nested parts are not counted twice."""
    watch = loop_overhead.Stopwatch(torch.device("cpu"))
    inner = watch.around("inner", clock.slow(lambda: None))
    watch.around("outer", clock.slow(inner))()
    inner()
    assert watch.seconds == {"outer": 2, "inner": 1}


def test_the_stopwatch_reads_the_time_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are those of the clock for durations."""
    monkeypatch.setattr(loop_overhead.time, "perf_counter", lambda: 17.5)
    assert loop_overhead.Stopwatch(torch.device("cpu")).now() == 17.5


def test_the_shares_make_up_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints a row for each part, and the loop's own are added up."""
    monkeypatch.setitem(step.SHAPES, "cifar10", TINY)
    result = CliRunner().invoke(loop_overhead.main, ["--rounds", "2", "--batch", "2"])
    assert result.exception is None, result.output
    lines = [line.strip("| ").split(" | ") for line in result.output.splitlines() if "%" in line]
    shares = {name: float(share.rstrip("%")) for name, share in lines}
    whole = shares.pop("the loop itself")
    assert sum(shares.values()) == pytest.approx(
        100, abs=0.1
    )  # of two rounds, a median is the mean
    of_loop = [share for name, share in shares.items() if name not in loop_overhead.NETWORKS]
    assert whole == pytest.approx(sum(of_loop), abs=0.1)
