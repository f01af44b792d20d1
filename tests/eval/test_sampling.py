"""The Heun sampler: the published numbers, and closed forms on Gaussians."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from pydantic import ValidationError

from core.errors import UserError
from core.roles import Denoiser
from edm_goldens import assert_close, load, read_arrays, read_golden
from eval.edm_sampler import (
    Config,
    Settings,
    heun,
    published_settings,
    sample,
    settings_for,
    sigma_steps,
)
from teachers import edm, edm2, gaussian
from tiny_networks import songunet_config


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
    """A denoiser is asked about the levels of Eq. 5 inside its range, in 2 steps - 1 passes."""
    denoiser = edm.build(songunet_config(sigma_min=0.1, sigma_max=10.0)).eval()
    seen: list[torch.Tensor] = []
    denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    heun(denoiser, torch.randn(1, 1, 8, 8), steps=4, sigma_max=1000.0, rho=3.0)
    first, *others = sigma_steps(4, sigma_min=0.1, sigma_max=10.0, rho=3.0)[:-1].tolist()
    expected = [first, *(level for level in others for _ in range(2))]
    torch.testing.assert_close(torch.cat(seen), torch.tensor(expected))


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


def test_all_noise_together_has_the_variance_of_the_gaussian() -> None:
    """For N(m, v) an image is linear in latent and noise: its variance is a sum of squares.

    No random number enters: row 0 has no noise at all, row k a one in the k-th place it may come
    from. The variance is off by the steps' error alone, of second order.
    """
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2), means=((0.3, -0.2),), std=0.5))

    def mean_and_covariance(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.eye(2 * (steps + 1) + 1)[:, 1:].view(-1, steps + 1, 1, 1, 2)
        images = heun(
            teacher,
            places[:, 0],
            steps=steps,
            churn=20.0,
            churn_sigma_min=0.05,
            churn_sigma_max=10.0,
            noise=lambda step: places[:, step + 1],
        ).flatten(1)
        weights = images[1:] - images[0]  # [places, pixels]
        return images[0], weights.T @ weights

    for steps, tolerance in ((100, 4e-3), (320, 4e-4)):  # ten times less where steps are 3.2 times
        mean, covariance = mean_and_covariance(steps)
        torch.testing.assert_close(mean, torch.tensor([0.3, -0.2]), atol=1e-4, rtol=0)
        torch.testing.assert_close(covariance, 0.25 * torch.eye(2), atol=tolerance, rtol=0)


@pytest.mark.parametrize("churn", [0.0, 30.0])
def test_no_churn_is_the_deterministic_sampler(churn: float) -> None:
    """No churn, or none between the two levels, asks for no noise and is bitwise the same."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 4, 4)))
    latents = torch.randn(2, 1, 4, 4)

    def noise(step: int) -> torch.Tensor:
        raise AssertionError("no noise is to be added")

    images = heun(teacher, latents, steps=6, churn=churn, churn_sigma_min=1e4, noise=noise)
    assert torch.equal(images, heun(teacher, latents, steps=6))


def test_noise_enters_between_its_two_levels_alone() -> None:
    """Steps whose level lies outside [S_tmin, S_tmax] add none; those at its ends do."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2)))
    latents, added = torch.randn(2, 1, 1, 2), []
    levels = sigma_steps(10).tolist()

    def noise(step: int) -> torch.Tensor:
        added.append(step)
        return torch.zeros_like(latents)

    heun(
        teacher,
        latents,
        steps=10,
        churn=4,
        churn_sigma_min=levels[6],
        churn_sigma_max=levels[2],
        noise=noise,
    )
    assert added == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(("churn", "gamma"), [(0.5, 0.25), (5.0, math.sqrt(2) - 1)])
def test_churned_steps_are_algorithm_2(churn: float, gamma: float) -> None:
    """Two steps by hand: a churned one of second order, then one below S_tmin, of first order.

    gamma is S_churn / steps, and at most 2^(1/2) - 1.
    """
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2), means=((0.5, -0.5),), std=0.5))
    latents, noise = torch.randn(3, 1, 1, 2).double(), torch.randn(3, 1, 1, 2)
    images = heun(
        teacher,
        latents,
        steps=2,
        sigma_min=1.0,
        sigma_max=10.0,
        churn=churn,
        churn_sigma_min=2.0,
        churn_noise=1.1,
        noise=lambda step: (noise, None)[step],
    )

    def slope(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
        return (noisy - teacher(noisy.float(), torch.full((3,), sigma))) / sigma

    raised = 10.0 * (1 + gamma)
    noisy = 10.0 * latents + 1.1 * math.sqrt(raised**2 - 10.0**2) * noise
    euler = noisy + (1.0 - raised) * slope(noisy, raised)
    heuns = noisy + (1.0 - raised) * (slope(noisy, raised) + slope(euler, 1.0)) / 2
    torch.testing.assert_close(images, (heuns - slope(heuns, 1.0)).float())


def test_churn_raises_to_a_level_that_the_denoiser_knows() -> None:
    """An iDDPM network is asked about its own levels alone, and the noise fills the gap to them."""
    config = {"img_resolution": 8, "img_channels": 1, "preconditioning": "iDDPM"}
    small = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    denoiser = edm.build(edm.Config.model_validate(config | small)).eval()
    latents, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    met: list[float] = []
    noisies: list[torch.Tensor] = []

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        noisies.append(inputs[0])
        met.append(float(inputs[1][0]))

    denoiser.register_forward_pre_hook(note)
    heun(denoiser, latents, steps=4, churn=4.0, sigma_max=10.0, noise=lambda _: noise)
    known = denoiser.u.tolist()
    assert len(met) == 7 and set(met) <= set(known)  # 2 steps - 1 passes
    first, raised = float(denoiser.round_sigma(torch.tensor(10.0))), met[0]
    assert raised > first
    expected = first * latents + math.sqrt(raised**2 - first**2) * noise
    torch.testing.assert_close(noisies[0], expected)


@pytest.mark.parametrize(("churn", "message"), [(1.0, "no noise"), (-1.0, "at least 0")])
def test_churn_without_noise_and_negative_churn_are_refused(churn: float, message: str) -> None:
    """There is no silent deterministic sampler."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 1, 2)))
    with pytest.raises(ValueError, match=message):
        heun(teacher, torch.randn(1, 1, 1, 2), churn=churn)


def _small_edm(size: int, classes: int, model_type: str, preconditioning: str) -> edm.EDMDenoiser:
    """Return a network of few channels that is like a published one in all that is looked at."""
    kind = {"model_type": model_type, "preconditioning": preconditioning}
    shape = {"img_resolution": size, "img_channels": 3, "label_dim": classes}
    small = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    return edm.build(edm.Config.model_validate(kind | shape | small))


def _small_edm2(size: int) -> edm2.EDM2Denoiser:
    shape = {"img_resolution": size, "img_channels": 3, "label_dim": 1000}
    return edm2.build(edm2.Config(**shape, model_channels=8, channel_mult=(1,), num_blocks=1))


_IMAGENET = Settings(256, 0.002, 80.0, 7.0, 40.0, 0.05, 50.0, 1.003)


@pytest.mark.parametrize(
    ("denoiser", "expected"),
    [
        (_small_edm(32, 10, "SongUNet", "EDM"), Settings(steps=18)),
        (_small_edm(32, 0, "SongUNet", "VP"), Settings(steps=18)),
        (_small_edm(32, 0, "SongUNet", "VE"), Settings(steps=18)),
        (_small_edm(64, 0, "SongUNet", "EDM"), Settings(steps=40)),
        (_small_edm(64, 1000, "DhariwalUNet", "EDM"), _IMAGENET),
        (_small_edm(64, 1000, "DhariwalUNet", "iDDPM"), _IMAGENET._replace(churn=80.0)),
        (_small_edm(64, 10, "DhariwalUNet", "EDM"), Settings(steps=40)),
        (_small_edm2(64), Settings(steps=32)),
        (gaussian.build(gaussian.Config(image_shape=(1, 28, 28))), Settings(steps=18)),
        (gaussian.build(gaussian.Config(image_shape=(1, 64, 64))), Settings(steps=40)),
    ],
    ids=[
        *("cifar10", "baseline-cifar10-vp", "baseline-cifar10-ve", "ffhq and afhqv2"),
        *("imagenet", "baseline-imagenet", "ten classes", "edm2-img64", "small", "large"),
    ],
)
def test_a_teacher_is_sampled_as_its_authors_did(denoiser: Denoiser, expected: Settings) -> None:
    """Steps and churn follow from size, classes and network; what a recipe gives goes on top."""
    assert published_settings(denoiser) == expected
    assert settings_for(denoiser, Config()) == expected
    assert settings_for(denoiser, Config(steps=7)) == expected._replace(steps=7)
    assert settings_for(denoiser, Config(churn=0)) == expected._replace(churn=0)
    assert settings_for(denoiser, Config(rho=3, sigma_max=50)).sigma_max == 50


def test_every_setting_of_a_recipe_is_one_of_the_sampler() -> None:
    """The three lists of settings have the same names, and `heun` the same defaults."""
    arguments = inspect.signature(heun).parameters
    assert tuple(Config.model_fields) == Settings._fields
    assert {name: arguments[name].default for name in Settings._fields} == Settings()._asdict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min 2.0 is above sigma_max 1.0"),
        ({"churn_sigma_min": 5, "churn_sigma_max": 1}, "churn_sigma_min 5.0 is above churn_sigma"),
        ({"churn": -1}, "churn"),
        ({"steps": 0}, "steps"),
        ({"rho": 0}, "rho"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, float], message: str) -> None:
    """A recipe hears of it before any weights are read."""
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma_min": 100.0}, "no noise levels from sigma_min 100.0 up to sigma_max 80.0"),
        ({"churn_sigma_min": 60.0}, "churn_sigma_min 60.0 is above churn_sigma_max 50.0"),
    ],
)
def test_settings_that_do_not_fit_the_teacher_are_refused(
    given: dict[str, float], message: str
) -> None:
    """Half of a pair may fit the recipe and not what the other half is for this teacher."""
    denoiser = _small_edm(64, 1000, "DhariwalUNet", "EDM")
    with pytest.raises(UserError, match=message):
        settings_for(denoiser, Config.model_validate(given))


def test_sample_takes_its_noise_where_there_is_churn() -> None:
    """`sample` is `heun` with the settings for the denoiser."""
    teacher = gaussian.build(gaussian.Config(image_shape=(1, 2, 2)))
    latents, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    found = sample(teacher, latents, None, lambda _: noise, config=Config(steps=5, churn=2))
    assert torch.equal(found, heun(teacher, latents, steps=5, churn=2, noise=lambda _: noise))
