"""The Heun sampler: the published numbers, and closed forms on Gaussians."""

from __future__ import annotations

import pytest
import torch
from edm_goldens import assert_close, load, read_arrays, read_golden

from teachers import edm, gaussian
from teachers.sampling import heun, sigma_steps


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
