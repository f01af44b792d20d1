"""core/randomness.py: Philox as published, no dependence on how work is cut up, statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from core.randomness import Draws, philox

CPU = torch.device("cpu")
DRAWS = Draws(seed=7, images_seen=1280, first=0, count=64, device=CPU)
PINNED = [309853292, 1059319683, 1380888949, 778572586, 1272511666, 1656658967]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    """The words are Philox4x32-10's, as its authors publish them."""
    words = (torch.tensor(int(word, 16)) for word in counter.split())
    key0, key1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(*words, key=(key0, key1))] == expected.split()


def _everything(draws: Draws) -> list[torch.Tensor]:
    return [
        draws.normal("noise", (3, 5, 7)),
        draws.normal("sigma"),
        draws.uniform("augment", (9,)),
        draws.integers("labels", 10),
    ]


def test_a_micro_batch_draws_the_same_rows_as_the_whole_batch() -> None:
    """A part's draws equal the same rows of the whole's, bit for bit, also for a part of a part."""
    whole = _everything(DRAWS)
    for rows in (slice(0, 1), slice(13, 30), slice(0, 64), slice(5, 5)):
        for part, full in zip(_everything(DRAWS.part(rows.start, rows.stop)), whole, strict=True):
            assert torch.equal(part, full[rows])
    nested = DRAWS.part(10, 40).part(5, 9)
    assert torch.equal(nested.normal("noise", (33,)), DRAWS.normal("noise", (33,))[15:19])


def test_draws_do_not_depend_on_the_global_generator_or_on_order() -> None:
    """Only the four arguments matter: not torch's seed, not what was drawn before."""
    torch.manual_seed(1)
    before = _everything(DRAWS)
    torch.manual_seed(2)
    DRAWS.normal("something else", (4,))
    assert all(torch.equal(a, b) for a, b in zip(before, _everything(DRAWS), strict=True))


def test_the_numbers_stay_those_of_the_first_release() -> None:
    """These words are pinned: a change here changes every run that was ever recorded."""
    assert DRAWS.part(0, 6).integers("pinned", 2**31).tolist() == PINNED


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (5,), (1, 4, 4), (0,)])
def test_every_shape_comes_out(shape: tuple[int, ...]) -> None:
    """A draw has the shape asked for, in float32 or int64, also if no multiple of a block."""
    assert DRAWS.normal("x", shape).shape == (64, *shape)
    assert DRAWS.normal("x", shape).dtype == DRAWS.uniform("x", shape).dtype == torch.float32
    assert DRAWS.integers("x", 10, shape).dtype == torch.int64


def test_normals_are_normal() -> None:
    """Kolmogorov-Smirnov, mean and variance of 400,000 normals agree with N(0, 1)."""
    numbers = replace(DRAWS, count=4000).normal("noise", (100,)).flatten().double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert abs(numbers.mean()) < 4 / 400_000**0.5
    assert abs(numbers.var() - 1) < 4 * (2 / 400_000) ** 0.5
    assert 4.2 < np.abs(numbers).max() < 6.7


def test_the_four_words_of_a_block_make_independent_normals() -> None:
    """Columns that share a Box-Muller pair or a block are uncorrelated, squares too."""
    numbers = replace(DRAWS, count=50_000).normal("noise", (8,)).double()
    for values in (numbers, numbers.square()):
        correlation = torch.corrcoef(values.T) - torch.eye(8)
        assert correlation.abs().max() < 4.5 / 50_000**0.5


def test_uniforms_are_uniform_and_below_one() -> None:
    """Kolmogorov-Smirnov of 400,000 uniforms agrees; the range is [0, 1)."""
    numbers = replace(DRAWS, count=4000).uniform("u", (100,)).flatten().double().numpy()
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert numbers.min() >= 0 and numbers.max() < 1


def test_integers_are_even_over_their_range() -> None:
    """Chi-square over ten classes; every class occurs and none outside."""
    counts = torch.bincount(replace(DRAWS, count=100_000).integers("labels", 10))
    assert counts.shape == (10,)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize(
    "other",
    [replace(DRAWS, seed=8), replace(DRAWS, images_seen=1344), replace(DRAWS, first=64)],
    ids=["seed", "images_seen", "first"],
)
def test_another_seed_count_or_sample_gives_unrelated_numbers(other: Draws) -> None:
    """Changing any one argument leaves no correlation, not even between neighbours."""
    a, b = (draws.normal("noise", (1000,)).flatten() for draws in (DRAWS, other))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / 64_000**0.5


def test_another_purpose_gives_unrelated_numbers() -> None:
    """Two purposes share nothing, also where one begins the other or looks like its prefix."""
    rows = [DRAWS.normal(purpose, (1000,)).flatten() for purpose in ("a", "ab", "b", "1280/a", "")]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(5)
    assert correlation.abs().max() < 4.5 / 64_000**0.5


def test_another_scope_gives_unrelated_numbers() -> None:
    """The same purpose in two phases, or two repeats of one, shares nothing."""
    scopes = (
        DRAWS,
        DRAWS.with_scope("score/0"),
        DRAWS.with_scope("score/1"),
        DRAWS.with_scope("student/0"),
    )
    rows = [draws.normal("sigma", (1000,)).flatten() for draws in scopes]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / 64_000**0.5
    assert torch.equal(scopes[1].part(3, 9).uniform("u"), scopes[1].uniform("u")[3:9])


def test_consecutive_samples_are_uncorrelated() -> None:
    """Neighbouring sample indices, the counter's low bits, leave no trace."""
    rows = replace(DRAWS, count=2).normal("noise", (100_000,))
    assert abs(torch.corrcoef(rows)[0, 1]) < 4 / 100_000**0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    """Integers and uniforms agree exactly, normals to one rounding."""
    cuda = replace(DRAWS, device=torch.device("cuda"))
    assert torch.equal(cuda.integers("i", 1000, (99,)).cpu(), DRAWS.integers("i", 1000, (99,)))
    assert torch.equal(cuda.uniform("u", (99,)).cpu(), DRAWS.uniform("u", (99,)))
    torch.testing.assert_close(
        cuda.normal("n", (99,)).cpu(), DRAWS.normal("n", (99,)), rtol=2e-7, atol=1e-12
    )
