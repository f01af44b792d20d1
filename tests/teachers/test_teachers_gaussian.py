"""The analytic mixture and its denoiser: against the score, sampling, and closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from pretrained.nvidia_pickle import NetworkRecord
from teachers.gaussian import Config, GaussianMixture, build, from_record


def uneven_mixture(**settings: object) -> GaussianMixture:
    """Return three components with different means, diagonal stds and weights."""
    torch.manual_seed(0)
    mixture = build(Config.model_validate({"image_shape": (1, 2, 3), "components": 3} | settings))
    with torch.no_grad():
        mixture.log_stds.copy_((0.2 + torch.rand(3, 6)).log())
        mixture.logits.copy_(torch.tensor([0.0, 1.0, -0.5]))
    return mixture


@pytest.mark.parametrize("level", [0.05, 0.5, 5.0])
def test_denoised_is_the_input_moved_along_the_score(level: float) -> None:
    """D = y + sigma^2 grad log p(y; sigma) (EDM, Eq. 3), the gradient by autograd."""
    mixture = uneven_mixture()
    noisy = torch.randn(8, 1, 2, 3, requires_grad=True)
    sigma = torch.full((8,), level)
    (score,) = torch.autograd.grad(mixture.log_density(noisy, sigma).sum(), noisy)
    torch.testing.assert_close(
        mixture(noisy, sigma), noisy + level**2 * score, atol=1e-4, rtol=1e-4
    )


def test_log_density_is_that_of_torch_distributions() -> None:
    """log p(y; sigma) equals a MixtureSameFamily of the noised components."""
    mixture, noisy = uneven_mixture(), torch.randn(4, 1, 2, 3)
    stds = (mixture.log_stds.exp() ** 2 + 0.7**2).sqrt()
    normal = torch.distributions.Independent(torch.distributions.Normal(mixture.means, stds), 1)
    weights = torch.distributions.Categorical(logits=mixture.logits)
    expected = torch.distributions.MixtureSameFamily(weights, normal).log_prob(noisy.flatten(1))
    torch.testing.assert_close(mixture.log_density(noisy, torch.full((4,), 0.7)), expected)


def test_denoised_is_the_best_guess_of_drawn_images() -> None:
    """Over draws, x - D(y) is uncorrelated with D(y): the defining property of E[x | y]."""
    mixture = uneven_mixture()
    count = 50_000
    images = mixture.draw(torch.randn(count, 1, 2, 3), torch.rand(count)).detach()
    denoised = mixture(images + 0.5 * torch.randn_like(images), torch.full((count,), 0.5)).detach()
    residual = images - denoised
    assert residual.mean(dim=0).abs().max() < 0.02
    assert (residual * denoised).mean(dim=0).abs().max() < 0.02


def test_denoising_without_noise_returns_the_input() -> None:
    """D(x; sigma) goes to x with sigma."""
    noisy = torch.randn(3, 1, 2, 3)
    denoised = uneven_mixture()(noisy, torch.full((3,), 0.002))
    torch.testing.assert_close(denoised, noisy, atol=1e-3, rtol=0)


def test_denoising_pure_noise_returns_the_mean() -> None:
    """D goes to the mixture's mean as sigma grows."""
    mixture = uneven_mixture()
    mean = (mixture.logits.softmax(0)[:, None] * mixture.means).sum(0).view(1, 1, 2, 3)
    denoised = mixture(torch.zeros(1, 1, 2, 3), torch.full((1,), 1000.0))
    torch.testing.assert_close(denoised, mean, atol=1e-4, rtol=0)


def test_label_leaves_one_component() -> None:
    """With a label the denoiser is linear: m + v / (v + sigma^2) (y - m) of that component."""
    mixture = uneven_mixture(num_classes=3)
    noisy, sigma, labels = torch.randn(3, 1, 2, 3), torch.tensor([0.1, 1.0, 9.0]), torch.arange(3)
    means, variances = mixture.means.view(3, 1, 2, 3), mixture.log_stds.exp().view(3, 1, 2, 3) ** 2
    shrink = variances / (variances + sigma[:, None, None, None] ** 2)
    torch.testing.assert_close(mixture(noisy, sigma, labels), means + shrink * (noisy - means))


def test_far_from_every_component_nothing_overflows() -> None:
    """Densities far below the smallest float still give a finite image and gradient."""
    mixture = uneven_mixture()
    noisy = torch.full((1, 1, 2, 3), 1e4, requires_grad=True)
    denoised = mixture(noisy, torch.full((1,), 0.002))
    denoised.sum().backward()
    assert denoised.isfinite().all() and noisy.grad is not None and noisy.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in mixture.parameters())


def test_draws_have_the_mixture_moments() -> None:
    """Mean and covariance of many draws are those of the mixture."""
    mixture = uneven_mixture()
    images = mixture.draw(torch.randn(50_000, 1, 2, 3), torch.rand(50_000)).detach().flatten(1)
    weights, means = mixture.logits.softmax(0).detach(), mixture.means.detach()
    mean = weights @ means
    spread = torch.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
    covariance = spread + torch.diag(weights @ mixture.log_stds.detach().exp() ** 2)
    torch.testing.assert_close(images.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(images.T.cov(), covariance, atol=0.04, rtol=0)


def test_drawn_labels_pick_their_component() -> None:
    """Without noise a labelled draw is the mean of its component."""
    mixture = uneven_mixture(num_classes=3)
    images = mixture.draw(torch.zeros(2, 1, 2, 3), torch.rand(2), torch.tensor([2, 0]))
    torch.testing.assert_close(images.flatten(1), mixture.means[[2, 0]])


def test_denoising_loss_finds_the_gaussian() -> None:
    """A copy trained by denoising moves to the mean and std of the images it sees."""
    torch.manual_seed(0)
    score = build(Config(image_shape=(1, 1, 2), means=((0.0, 0.0),), std=1.0))
    mean, std = torch.tensor([[[0.8, -0.3]]]), torch.tensor([[[0.3, 0.6]]])
    optimizer = torch.optim.Adam(score.parameters(), lr=0.02)
    for _ in range(400):
        images = mean + std * torch.randn(256, 1, 1, 2)
        sigma = (0.8 * torch.randn(256) - 0.7).exp()
        noisy = images + sigma[:, None, None, None] * torch.randn_like(images)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        error = (score(noisy, sigma) - images).square().flatten(1).sum(1)
        optimizer.zero_grad()
        (weight * error).mean().backward()
        optimizer.step()
    torch.testing.assert_close(score.means.view(1, 1, 2), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(score.log_stds.exp().view(1, 1, 2), std, atol=0.05, rtol=0)


def test_drawn_means_are_a_function_of_the_seed() -> None:
    """The same seed gives the same smooth images within [-1, 1], another seed others."""
    torch.manual_seed(1)
    first = build(Config(image_shape=(3, 16, 16), seed=5)).means
    torch.manual_seed(2)
    again = build(Config(image_shape=(3, 16, 16), seed=5)).means
    other = build(Config(image_shape=(3, 16, 16), seed=6)).means
    assert torch.equal(first, again) and not torch.equal(first, other)
    images = first.view(4, 3, 16, 16)
    assert images.abs().max() <= 1 and images.std() > 0.3
    assert images.diff(dim=3).abs().mean() < 0.5 * images.std()


def test_copy_is_independent() -> None:
    """A deep copy shares no parameters."""
    mixture = uneven_mixture()
    score = copy.deepcopy(mixture)
    with torch.no_grad():
        score.means.add_(1.0)
    assert not torch.allclose(mixture.means, score.means)


def test_state_fits_a_mixture_built_from_the_config() -> None:
    """Config and state dict together are the whole mixture."""
    mixture = uneven_mixture()
    again = build(Config.model_validate_json(mixture.config.model_dump_json()))
    again.load_state_dict(mixture.state_dict(), strict=True)
    noisy, sigma = torch.randn(2, 1, 2, 3), torch.ones(2)
    torch.testing.assert_close(again(noisy, sigma), mixture(noisy, sigma), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"means": ((0.0, 1.0), (0.0,))}, "means has 2 rows"),
        ({"means": ((0.0, 1.0),), "components": 2}, "expected 2"),
        ({"components": 2, "std": ((0.1, 0.1),)}, "std has 1 rows"),
        ({"components": 2, "num_classes": 3}, "num_classes is 3"),
        ({"std": 0.0}, "greater than 0"),
    ],
)
def test_impossible_configs_are_refused(settings: dict[str, object], expected: str) -> None:
    """Tables that do not fit the components and pixels say what was expected."""
    with pytest.raises(ValidationError, match=expected):
        Config.model_validate({"image_shape": (1, 1, 2)} | settings)


def test_no_published_record_is_a_mixture() -> None:
    """from_record leaves every pickle to other families."""
    assert from_record(NetworkRecord("EDMPrecond")) is None
