"""The Heun sampler: the published numbers, and closed forms on Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from edm_goldens import assert_close, load, read_arrays, read_golden

from teachers import edm, gaussian
from teachers.sampling import Config, Settings, heun, published, sample, settings_for, sigma_steps


@pytest.mark.parametrize("steps", [5, 18])
def test_images_match_the_published_sampler(steps: int) -> None:
    """The same latents and labels give the golden images."""
    denoiser = load(read_golden("edm-ddpmpp-cond10-16"))
    inputs = read_arrays("edm-sampler", "in")
    images = heun(denoiser, inputs["latents"], inputs["labels"].argmax(dim=1), steps=steps)
    assert images.dtype == torch.float32
    assert_close(images, read_arrays("edm-sampler", "out")[f"steps{steps}"])


def test_sigmas_fall_from_largest_to_smallest_to_zero() -> None:
    """The ends are exact, the order is strict, and rho-th roots are equally spaced."""
    sigmas = sigma_steps(10, sigma_min=0.01, sigma_max=50.0, rho=3.0)
    assert sigmas.dtype == torch.float64 and len(sigmas) == 11
    torch.testing.assert_close(sigmas[[0, -2, -1]], torch.tensor([50.0, 0.01, 0.0]).double())
    roots = sigmas[:-1] ** (1 / 3)
    torch.testing.assert_close(roots.diff(), ((roots[-1] - roots[0]) / 9).expand(9))
    assert (sigmas.diff() < 0).all()


def test_one_step_is_one_denoising_at_the_largest_level() -> None:
    """steps=1 goes from sigma_max to 0 at once: D(sigma_max n; sigma_max)."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 2, 2)))
    latents = torch.randn(3, 1, 2, 2)
    expected = teacher(80 * latents, torch.full((3,), 80.0))
    torch.testing.assert_close(heun(teacher, latents, steps=1), expected)


def test_gaussian_is_sampled_by_its_linear_map() -> None:
    """For N(m, v) the flow from sigma is exactly x -> m + sqrt(v / (v + sigma^2)) (x - m)."""
    stds = ((0.1, 0.5, 1.0, 2.0),)
    config = gaussian.Config(image_shape=(1, 2, 2), means=((0.5, -0.5, 0.0, 1.0),), std=stds)
    teacher = gaussian.build(config)
    means, variances = (
        torch.tensor(config.means).view(1, 2, 2),
        torch.tensor(stds).view(1, 2, 2) ** 2,
    )
    latents = torch.randn(5, 1, 2, 2)
    exact = means + (variances / (variances + 80.0**2)).sqrt() * (80 * latents - means)
    torch.testing.assert_close(heun(teacher, latents, steps=400), exact, atol=2e-3, rtol=0)


def test_error_falls_with_the_square_of_the_step() -> None:
    """Heun is of second order: twice the steps, about a quarter of the error."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2), means=((0.5, -0.5),), std=0.5))
    latents = torch.tensor([[[[0.7, -1.3]]]])
    exact = heun(teacher, latents, steps=1000)
    errors = [(heun(teacher, latents, steps=n) - exact).abs().max() for n in (20, 40)]
    assert 3 < errors[0] / errors[1] < 5


def test_mixture_samples_have_the_mixture_mean_and_std() -> None:
    """Equal parts of N(-1, 0.01) and N(1, 0.01) give mean 0, variance 1.01 and equal parts."""
    torch.manual_seed(0)
    config = gaussian.Config(image_shape=(1, 1, 1), means=((-1.0,), (1.0,)), std=0.1)
    images = heun(gaussian.build(config), torch.randn(20_000, 1, 1, 1), steps=40)
    assert images.mean().abs() < 0.03
    assert (images.std() - 1.01**0.5).abs() < 0.01
    assert ((images > 0).float().mean() - 0.5).abs() < 0.015


def test_label_picks_what_is_sampled() -> None:
    """A class-conditional mixture samples the component of each label."""
    config = gaussian.Config(
        image_shape=(1, 1, 1), means=((-1.0,), (1.0,)), std=0.01, num_classes=2
    )
    labels = torch.tensor([0, 1, 1, 0])
    images = heun(gaussian.build(config), torch.randn(4, 1, 1, 1), labels)
    torch.testing.assert_close(images.flatten(), labels * 2.0 - 1, atol=0.1, rtol=0)


def test_range_is_cut_to_the_denoisers_own() -> None:
    """A denoiser is never asked about a noise level it was not made for."""
    settings = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet"}
    shape = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
    config = edm.Config.model_validate(settings | shape | {"sigma_min": 0.1, "sigma_max": 10.0})
    denoiser = edm.build(config).eval()
    seen: list[torch.Tensor] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    heun(denoiser, torch.randn(1, 1, 8, 8), steps=4, sigma_max=1000.0)
    torch.testing.assert_close(torch.cat(seen).max(), torch.tensor(10.0))
    torch.testing.assert_close(torch.cat(seen).min(), torch.tensor(0.1))


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"steps": 5, "sigma_min": 9.0, "sigma_max": 1.0}]
)
def test_empty_schedules_are_refused(settings: dict[str, float]) -> None:
    """No steps, or a range upside down, is an error."""
    with pytest.raises(ValueError, match=r"steps is 0|sigma_min 9"):
        sigma_steps(**settings)


def test_levels_are_put_where_the_denoiser_knows_them() -> None:
    """Each step is taken between levels that `round_sigma` gave, and the last one ends at 0."""

    class Rounding(torch.nn.Module):
        image_shape, num_classes, sigma_min, sigma_max = (1, 2, 2), 0, 0.01, 50.0

        def __init__(self) -> None:
            super().__init__()
            self.met: set[float] = set()

        def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
            return sigma.log2().round().exp2()

        def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, labels=None) -> torch.Tensor:
            self.met.update(sigma.tolist())
            return torch.zeros_like(noisy)

    denoiser = Rounding()
    images = heun(denoiser, torch.randn(2, 1, 2, 2), steps=6)
    assert len(denoiser.met) == 6
    assert all(float(torch.tensor(sigma).log2()) % 1 == 0 for sigma in denoiser.met)
    assert torch.equal(images, torch.zeros_like(images))


def test_churned_samples_have_the_mean_and_std_of_the_gaussian() -> None:
    """Noise added and taken away again leaves the distribution: 20,000 samples of N(0.3, 0.5^2).

    Three standard errors of mean and deviation, and what the discrete steps are off (0.005).
    """
    torch.manual_seed(0)
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 1), means=((0.3,),), std=0.5))
    latents = torch.randn(20_000, 1, 1, 1)
    noises: list[int] = []

    def noise(step: int) -> torch.Tensor:
        noises.append(step)
        return torch.randn_like(latents)

    images = heun(teacher, latents, steps=100, churn=40.0, noise=noise)
    assert noises == list(range(100))
    assert (images.mean() - 0.3).abs() < 3 * 0.5 / 20_000**0.5 + 0.005
    assert (images.std() - 0.5).abs() < 3 * 0.5 / 40_000**0.5 + 0.005
    deterministic = heun(teacher, latents, steps=100)
    correlation = torch.corrcoef(torch.stack([images.flatten(), deterministic.flatten()]))[0, 1]
    assert correlation < 0.9  # other images of the same latents


def test_noise_enters_between_its_two_levels_alone() -> None:
    """Steps whose level lies outside [S_min, S_max] add none."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2)))
    latents, added = torch.randn(2, 1, 1, 2), []

    def noise(step: int) -> torch.Tensor:
        added.append(step)
        return torch.zeros_like(latents)

    heun(teacher, latents, steps=10, churn=4, churn_sigma_min=1, churn_sigma_max=20, noise=noise)
    levels = sigma_steps(10)[:-1]
    expected = [step for step, level in enumerate(levels.tolist()) if 1 <= level <= 20]
    assert added == expected and 0 < len(expected) < 10


def test_a_churned_step_is_algorithm_2() -> None:
    """One step by hand: up to (1 + gamma) sigma with S_noise, then down to 0 with Euler."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2), means=((0.5, -0.5),), std=0.5))
    latents, noise = torch.randn(3, 1, 1, 2), torch.randn(3, 1, 1, 2)
    gamma = math.sqrt(2) - 1  # S_churn / 1 is more than the most that is allowed
    images = heun(
        teacher, latents, steps=1, sigma_max=10.0, churn=5.0, churn_noise=1.1, noise=lambda _: noise
    )
    raised = 10.0 * (1 + gamma)
    noisy = 10.0 * latents + 1.1 * math.sqrt(raised**2 - 10.0**2) * noise
    expected = teacher(noisy, torch.full((3,), raised))
    torch.testing.assert_close(images, expected)


def test_churn_without_noise_is_refused() -> None:
    """There is no silent deterministic sampler."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2)))
    with pytest.raises(ValueError, match="no noise"):
        heun(teacher, torch.randn(1, 1, 1, 2), churn=1.0)


class _Shaped:
    """What `published` looks at of a denoiser."""

    def __init__(self, size: int, classes: int, model_type: str) -> None:
        self.image_shape, self.num_classes = (3, size, size), classes
        self.config = type("Config", (), {"model_type": model_type})()


@pytest.mark.parametrize(
    ("denoiser", "expected"),
    [
        (_Shaped(32, 10, "SongUNet"), Settings(steps=18)),
        (_Shaped(64, 0, "SongUNet"), Settings(steps=40)),
        (_Shaped(64, 1000, "DhariwalUNet"), Settings(256, 40.0, 0.05, 50.0, 1.003)),
    ],
    ids=["cifar10", "ffhq", "imagenet"],
)
def test_a_teacher_is_sampled_as_its_authors_did(denoiser: _Shaped, expected: Settings) -> None:
    """Steps and churn follow from size, classes and network; what a recipe gives goes on top."""
    assert published(denoiser) == expected
    assert settings_for(denoiser, Config(steps=7)) == expected._replace(steps=7)
    assert settings_for(denoiser, Config(churn=0)).churn == 0


def test_sample_takes_its_noise_where_there_is_churn() -> None:
    """`sample` is `heun` with the settings for the denoiser."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 2, 2)))
    latents, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    found = sample(teacher, latents, None, lambda _: noise, config=Config(steps=5, churn=2))
    assert torch.equal(found, heun(teacher, latents, steps=5, churn=2, noise=lambda _: noise))
