"""training/schedule.py: when something is due, the warm-up, and the moving average's decay."""

from __future__ import annotations

import pytest

from training.schedule import Every, annealing, ema_decay, warmup


@pytest.mark.parametrize("batch", [1, 64, 300, 1000, 2500])
def test_something_is_due_once_for_each_multiple_crossed(batch: int) -> None:
    """Whatever the batch, it is due in just the rounds that reach or cross a multiple."""
    every, crossings = Every.kimg(1), 0
    for before in range(0, 20_000, batch):
        after = before + batch
        holds_multiple = any(count % 1000 == 0 for count in range(before + 1, after + 1))
        assert every.due(before, after) == holds_multiple
        crossings += every.due(before, after)
    assert crossings == min(20, -(-20_000 // batch))


def test_nothing_is_due_every_zero_images() -> None:
    """0 switches it off."""
    assert not Every.kimg(0).due(0, 10**9)


def test_parts_of_a_thousand_images_are_counted_in_images() -> None:
    """0.128 kimg is 128 images, although 0.128 has no exact binary form."""
    assert Every.kimg(0.128) == Every(128)


def test_warmup_rises_linearly_and_stays_at_one() -> None:
    """A quarter of the way the factor is 0.25; after the warm-up, and without one, it is 1."""
    assert warmup(500, warmup_kimg=2) == 0.25
    assert warmup(2000, warmup_kimg=2) == warmup(10**6, warmup_kimg=2) == 1
    assert warmup(0, warmup_kimg=0) == 1


def test_annealing_falls_linearly_to_zero_at_the_end() -> None:
    """1 until the last 4,000 images, a half in their middle, 0 at the end; 0 kimg: always 1."""
    assert annealing(6000, total_images=10_000, anneal_kimg=4) == 1
    assert annealing(8000, total_images=10_000, anneal_kimg=4) == 0.5
    assert annealing(10_000, total_images=10_000, anneal_kimg=4) == 0
    assert annealing(10_000, total_images=10_000, anneal_kimg=0) == 1


@pytest.mark.parametrize("batch", [1, 50, 500])
def test_after_a_halflife_half_of_an_old_weight_is_left(batch: int) -> None:
    """Decays multiply to 0.5 over the half-life, whatever the batch."""
    kept = 1.0
    for _ in range(500 // batch):
        kept *= ema_decay(batch, images_seen=10**6, halflife_kimg=0.5, rampup=None)
    assert kept == pytest.approx(0.5)


def test_early_halflife_is_a_part_of_the_images_seen() -> None:
    """With rampup 0.05 after 1000 images the half-life is 50 images, later the configured one."""
    early = ema_decay(50, images_seen=1000, halflife_kimg=0.5, rampup=0.05)
    late = ema_decay(50, images_seen=10**6, halflife_kimg=0.5, rampup=0.05)
    assert early == pytest.approx(0.5) and late == pytest.approx(0.5 ** (50 / 500))


def test_no_halflife_is_no_averaging() -> None:
    """At half-life 0, and before the first image with a ramp-up, nothing old is kept."""
    assert ema_decay(1, images_seen=10**6, halflife_kimg=0, rampup=None) == 0
    assert ema_decay(1, images_seen=0, halflife_kimg=500, rampup=0.05) == 0
