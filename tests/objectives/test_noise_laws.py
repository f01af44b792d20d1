"""The laws of sigma: quantiles in closed form, ranges, and noise of the drawn level."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from core.randomness import Draws
from objectives._noise import Karras, LogNormal, SigmaLaw, add_noise, column

COUNT = 200_000
PROBABILITIES = torch.tensor([0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999], dtype=torch.float64)


def draws(count: int = COUNT) -> Draws:
    return Draws(seed=0, images_seen=0, first=0, count=count, device=torch.device("cpu"))


def assert_quantiles(sigma: Tensor, expected: Tensor) -> None:
    """The share of draws below each expected quantile is its probability, to 5 standard errors."""
    shares = (sigma.double()[:, None] <= expected).double().mean(0)
    errors = (PROBABILITIES * (1 - PROBABILITIES) / COUNT).sqrt()
    assert ((shares - PROBABILITIES).abs() < 5 * errors).all(), (shares, PROBABILITIES)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.5)])
def test_lognormal_quantiles_are_those_of_the_law(mean: float, std: float) -> None:
    """P(sigma <= exp(mean + std q)) is the normal distribution function at q."""
    sigma = LogNormal(mean=mean, std=std).draw(draws(), "sigma")
    assert_quantiles(sigma, (mean + std * torch.special.ndtri(PROBABILITIES)).exp())


def test_lognormal_without_spread_is_one_level() -> None:
    """std 0 gives sigma = exp(mean) for every image."""
    sigma = LogNormal(mean=math.log(0.3), std=0).draw(draws(8), "sigma")
    torch.testing.assert_close(sigma, torch.full((8,), 0.3))


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_quantiles_are_the_sampling_schedule(rho: float) -> None:
    """The p-quantile is (a^(1/rho) + p (b^(1/rho) - a^(1/rho)))^rho over [a, b] (EDM, Eq. 5)."""
    low, high = 0.002 ** (1 / rho), 80.0 ** (1 / rho)
    sigma = Karras(rho=rho).draw(draws(), "sigma")
    assert_quantiles(sigma, (low + PROBABILITIES * (high - low)) ** rho)


def test_karras_stays_in_its_range_and_reaches_its_ends() -> None:
    """No sigma leaves [sigma_min, sigma_max] but by rounding, and both ends are approached."""
    sigma = Karras(sigma_min=0.1, sigma_max=2.0).draw(draws(), "sigma")
    assert 0.1 * (1 - 1e-5) <= sigma.min() < 0.1001
    assert 1.999 < sigma.max() <= 2.0 * (1 + 1e-5)


def test_a_law_is_picked_by_its_name() -> None:
    """`law:` decides which settings a recipe may give; a foreign or impossible one is refused."""
    law = TypeAdapter(SigmaLaw)
    assert law.validate_python({"law": "karras", "rho": 5}) == Karras(rho=5.0)
    assert law.validate_python({"law": "lognormal", "mean": 0}) == LogNormal(mean=0.0)
    for wrong in ({"law": "lognormal", "rho": 5}, {"law": "cosine"}):
        with pytest.raises(ValidationError):
            law.validate_python(wrong)
    with pytest.raises(ValidationError, match=r"sigma_min 3\.0 must be below sigma_max 2\.0"):
        law.validate_python({"law": "karras", "sigma_min": 3, "sigma_max": 2})


def test_added_noise_is_unit_normal_times_sigma() -> None:
    """(noisy - images) / sigma has mean 0 and variance 1, whatever the level of each image."""
    images = torch.full((COUNT // 4, 1, 2, 2), 0.7)
    sigma = LogNormal().draw(draws(len(images)), "sigma")
    noisy = add_noise(images, sigma, draws(len(images)), "noise")
    noise = (noisy.double() - images) / column(sigma)
    assert noise.mean().abs() < 5 / COUNT**0.5
    assert (noise.square().mean() - 1).abs() < 5 * (2 / COUNT) ** 0.5
