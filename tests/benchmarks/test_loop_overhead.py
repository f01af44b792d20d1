"""benchmarks/loop_overhead.py: every second of a round stands in one part of its table."""

from __future__ import annotations

import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import loop_overhead, step
from core.randomness import Draws
from training import step as training_step
from training import trainer

TINY = {"img_channels": 3, "img_resolution": 8, "model_type": "SongUNet", "augment_dim": 9}
TINY |= {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1}
SLEEP = 0.2


def sleeping(function):
    def slow(*arguments: object, **options: object) -> object:
        time.sleep(SLEEP)
        return function(*arguments, **options)

    return slow


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
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, part: str, calls: int
) -> None:
    """What is slowed down shows in its own part, by as much, and the parts make up the round."""
    monkeypatch.setattr(owner, name, sleeping(getattr(owner, name)))
    started = time.perf_counter()
    (seconds,) = loop_overhead.measured(TINY, "float32", batch=2, rounds=1, device="cpu")
    elapsed = time.perf_counter() - started
    assert all(value >= 0 for value in seconds.values())
    assert seconds[part] == pytest.approx(calls * SLEEP, abs=SLEEP / 2)
    assert seconds.total() < elapsed


def test_the_shares_make_up_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints a row for each part, and the loop's own are added up."""
    monkeypatch.setitem(step.SHAPES, "cifar10", TINY)
    result = CliRunner().invoke(loop_overhead.main, ["--rounds", "2", "--batch", "2"])
    assert result.exception is None, result.output
    lines = [line.strip("| ").split(" | ") for line in result.output.splitlines() if "%" in line]
    shares = {name: float(share.rstrip("%")) for name, share in lines}
    whole = shares.pop("the loop itself")
    assert sum(shares.values()) == pytest.approx(100, abs=10)  # a median of each
    of_loop = [share for name, share in shares.items() if name not in loop_overhead.NETWORKS]
    assert whole == pytest.approx(sum(of_loop), abs=0.1)
