"""Diff-Instruct on Gaussians, where student, score and teacher have closed forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from core.distributed import World
from core.randomness import Draws
from core.roles import LossOutput, Networks
from core.run_folder import RunFolder
from gaussians import (
    PIXELS,
    SHAPE,
    STUDENT_MEAN,
    STUDENT_STD,
    TEACHER_MEAN,
    TEACHER_STD,
    AffineDenoiser,
    AffineStudent,
    DiagonalStudent,
    batch,
    denoiser,
    exact_networks,
)
from objectives._noise import LogNormal, add_noise, column, edm_weight
from objectives._student import make, score_loss
from objectives.diff_instruct import (
    Config,
    Weighting,
    build,
    ikl_gradient,
    shared_loss,
    student_loss,
)
from teachers import edm, gaussian
from tiny_networks import songunet_config
from training import state as training_state
from training import trainer

WEIGHTS = {
    "sigma_squared": lambda sigma: sigma.square(),
    "edm": lambda sigma: sigma.square() * (sigma.square() + 0.25) / (0.5 * sigma).square(),
    "uniform": torch.ones_like,
}
"""w(sigma) on the difference of scores, at sigma_data 0.5."""


class Draw(NamedTuple):
    """What the student phase drew for each image of a batch."""

    images: Tensor
    sigma: Tensor
    noisy: Tensor


def drawn(networks: Networks, samples: Draws, config: Config) -> Draw:
    images = make(networks, samples).images.detach()
    sigma = config.sigma.draw(samples, "sigma")
    return Draw(images, sigma, add_noise(images, sigma, samples, "noise"))


def score(network: gaussian.GaussianMixture, noisy: Tensor, sigma: Tensor) -> Tensor:
    """Return grad log p(noisy; sigma) by autograd of the density, not through the denoiser."""
    noisy = noisy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network.log_density(noisy, sigma).sum(), noisy)
    return gradient


# The gradient


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_pull_is_the_weighted_difference_of_scores(weighting: Weighting) -> None:
    """For each image the loss's gradient by the image is w(sigma) (s_student - s_teacher)."""
    networks, samples, config = exact_networks(), batch(64), Config(weighting=weighting)
    draw = drawn(networks, samples, config)
    loss = student_loss(networks, samples, config=config).per_image
    difference = score(networks.score, draw.noisy, draw.sigma) - score(
        networks.teacher, draw.noisy, draw.sigma
    )
    pull = column(WEIGHTS[weighting](draw.sigma)) * difference
    for index in (0, 17, 63):
        (gradient,) = torch.autograd.grad(
            loss[index], networks.student.mean, retain_graph=True
        )  # dx / dmean = 1
        torch.testing.assert_close(gradient, pull[index].flatten(), rtol=1e-3, atol=1e-4)


def test_dmd_weighting_divides_by_the_mean_distance_to_the_teacher() -> None:
    """Its pull is (D_score - D_teacher) / mean |x - D_teacher| over each image's pixels."""
    networks, samples, config = exact_networks(), batch(64), Config(weighting="dmd")
    images, sigma, noisy = drawn(networks, samples, config)
    teacher_denoised = networks.teacher(noisy, sigma)
    difference = networks.score(noisy, sigma) - teacher_denoised
    distance = (images - teacher_denoised).flatten(1).abs().mean(1)
    student_loss(networks, samples, config=config).per_image.sum().backward()
    expected = (difference.flatten(1) / distance[:, None]).sum(0)
    torch.testing.assert_close(networks.student.mean.grad, expected, rtol=1e-4, atol=1e-4)


def test_dmd_weighting_is_finite_where_the_teacher_agrees_with_the_image() -> None:
    """No division by zero: an image that the teacher returns as it is gets no infinite pull."""
    images = torch.zeros(2, *SHAPE)
    pull = ikl_gradient(images, images, images, torch.ones(2), weighting="dmd")
    assert torch.equal(pull, torch.zeros_like(images))


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_average_gradient_is_that_of_the_integral_kl(weighting: Weighting) -> None:
    """By mean and std it is the autograd gradient of E_sigma w KL(student_sigma || teacher_sigma).

    To 5 standard errors of 40,000 draws.
    """
    networks = exact_networks()
    samples, config = batch(40_000), Config(weighting=weighting)
    student_loss(networks, samples, config=config).per_image.mean().backward()
    draw = drawn(networks, samples, config)
    pull = ikl_gradient(
        draw.images,
        networks.score(draw.noisy, draw.sigma),
        networks.teacher(draw.noisy, draw.sigma),
        draw.sigma,
        weighting=weighting,
    ).flatten(1)
    mean, std = STUDENT_MEAN.clone().requires_grad_(), STUDENT_STD.clone().requires_grad_()
    level = draw.sigma[:, None]  # [N, 1]
    kl = kl_divergence(
        Normal(mean, (std.square() + level.square()).sqrt()),
        Normal(TEACHER_MEAN, (TEACHER_STD.square() + level.square()).sqrt()),
    )
    expected = torch.autograd.grad((WEIGHTS[weighting](draw.sigma) * kl.sum(1)).mean(), (mean, std))
    student = networks.student
    for found, wanted, terms in (
        (student.mean.grad, expected[0], pull),
        (student.std.grad, expected[1], pull * samples.normal("latents", (PIXELS,))),
    ):
        error = terms.std(0) / len(terms) ** 0.5
        assert ((found - wanted).abs() < 5 * error).all(), (found, wanted, error)
        assert (wanted.abs() > 10 * error).any(), "the test must be able to fail"


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_a_student_that_is_the_teacher_feels_no_pull(weighting: Weighting) -> None:
    """Where score and teacher are equal networks, every gradient is exactly zero."""
    torch.manual_seed(0)
    teacher = edm.build(songunet_config()).eval()
    student = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
    networks = Networks(_Unlabelled(student), copy.deepcopy(teacher), teacher)
    samples = batch(4)
    output = student_loss(networks, samples, config=Config(weighting=weighting))
    output.per_image.sum().backward()
    assert all(not parameter.grad.any() for parameter in student.parameters())
    assert output.stats["ikl_gradient"] == 0


class _Unlabelled(nn.Module):
    """A student from any network of three latents."""

    latent_shape, num_classes = (3,), 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(latents)


# The score phase


def test_exact_denoiser_has_the_loss_of_the_closed_form() -> None:
    """A Gaussian of std sigma_data has E lambda |x - D|^2 = 1 a pixel, at every noise level."""
    std = torch.full((PIXELS,), 0.5)
    networks = Networks(
        DiagonalStudent(STUDENT_MEAN, std), denoiser(STUDENT_MEAN, std), nn.Identity()
    )
    loss = score_loss(networks, batch(40_000), sigma=LogNormal()).per_image / PIXELS
    assert (loss.mean() - 1).abs() < 5 * loss.std() / len(loss) ** 0.5


@pytest.mark.parametrize("name", ["means", "log_stds"])
@pytest.mark.parametrize("step", [-0.1, 0.1])
def test_score_loss_is_least_at_the_exact_denoiser(name: str, step: float) -> None:
    """On the same draws, moving any of its parameters either way makes the loss larger."""
    networks, samples = exact_networks(), batch(20_000)
    least = score_loss(networks, samples, sigma=LogNormal()).per_image.mean()
    for pixel in range(PIXELS):
        moved = copy.deepcopy(networks)
        with torch.no_grad():
            getattr(moved.score, name)[0, pixel] += step
        assert score_loss(moved, samples, sigma=LogNormal()).per_image.mean() > least


def test_edm_weight_is_the_one_of_table_1() -> None:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; it is 8 at sigma = 0.5."""
    sigma = torch.tensor([0.5, 2.0])
    expected = torch.tensor([8.0, (4 + 0.25) / 1.0])
    torch.testing.assert_close(edm_weight(sigma, sigma_data=0.5), expected)


# Who learns, from what


@pytest.mark.parametrize(("phase", "learner"), [("score", "score"), ("student", "student")])
def test_a_phase_gives_gradients_to_its_network_alone(phase: str, learner: str) -> None:
    """The score phase never touches the student, the student phase neither score nor teacher."""
    networks = exact_networks()
    (chosen,) = (found for found in build(Config()).phases if found.name == phase)
    chosen.loss(networks, batch(8)).per_image.sum().backward()
    touched = {
        name
        for name in ("student", "score", "teacher")
        if any(p.grad is not None for p in getattr(networks, name).parameters())
    }
    assert touched == {learner} == set(chosen.trains)


def test_a_shared_batch_gives_each_network_the_gradient_of_its_own_loss() -> None:
    """The sum of both losses moves the student as the student loss does, and the score likewise."""
    samples, config = batch(64), Config(shared_batch=True)

    def gradients(loss: Callable[..., LossOutput]) -> list[list[Tensor | None]]:
        networks = exact_networks()
        loss(networks, samples, config=config).per_image.sum().backward()
        members = (networks.student, networks.score, networks.teacher)
        return [[p.grad for p in network.parameters()] for network in members]

    student, score, teacher = gradients(shared_loss)
    torch.testing.assert_close(student, gradients(student_loss)[0])
    of_score = gradients(lambda *given, config: score_loss(*given, sigma=config.sigma))
    torch.testing.assert_close(score, of_score[1])
    assert set(teacher) == {None}


@pytest.mark.parametrize("score_steps", [1, 3])
def test_a_shared_batch_takes_as_many_score_steps(score_steps: int) -> None:
    """Before the head start ends and after it, the score steps a round are those asked for."""
    config = Config(shared_batch=True, score_steps=score_steps, head_start_kimg=1)
    for images_seen, student_steps in ((0, 0), (999, 0), (1000, 1), (5000, 1)):
        steps = {"score": 0, "student": 0}
        for phase in build(config).phases:
            for name in phase.trains:
                steps[name] += phase.repeats_at(images_seen)
        assert steps == {"score": score_steps, "student": student_steps}


def test_a_shared_batch_has_one_law_of_sigma() -> None:
    """Two different laws are refused; the score's follows the student's where none is given."""
    law = LogNormal(mean=0.0)
    with pytest.raises(ValidationError, match="leave score_sigma out"):
        Config(shared_batch=True, sigma=law, score_sigma=LogNormal())
    assert Config(shared_batch=True, sigma=law, score_sigma=law).sigma == law


def test_loss_is_one_number_an_image_and_stats_are_means() -> None:
    """[N] each with graph, so the loop alone averages; stats are detached scalars."""
    networks, samples = exact_networks(), batch(8)
    for phase in build(Config()).phases:
        output = phase.loss(networks, samples)
        assert output.per_image.shape == (8,) and output.per_image.requires_grad
        for value in output.stats.values():
            assert value.shape == () and not value.requires_grad


def test_images_of_a_batch_do_not_meet() -> None:
    """The losses of a part of the samples are that part of the losses of all."""
    networks, whole = exact_networks(), batch(8)
    part = whole.part(3, 6)
    for phase in build(Config()).phases:
        all_losses = phase.loss(networks, whole).per_image
        torch.testing.assert_close(phase.loss(networks, part).per_image, all_losses[3:6])


def test_every_network_is_given_the_labels() -> None:
    """With classes at opposite means, all three agree only if each knows the class."""
    means = torch.stack([torch.full((PIXELS,), -5.0), torch.full((PIXELS,), 5.0)])
    config = gaussian.Config(
        image_shape=SHAPE, means=tuple(map(tuple, means.tolist())), std=0.5, num_classes=2
    )
    teacher = gaussian.build(config)

    class Student(DiagonalStudent):
        num_classes = 2

        def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
            return (means[labels] + 0.5 * latents).view(-1, *SHAPE) + 0 * self.mean.view(SHAPE)

    networks = Networks(
        Student(STUDENT_MEAN, STUDENT_STD), copy.deepcopy(teacher), copy.deepcopy(teacher)
    )
    samples = batch(4000)
    # At this noise no network could see the class in the image.
    settings = Config(sigma=LogNormal(mean=4, std=0), score_sigma=LogNormal(mean=4, std=0))
    loss = score_loss(networks, samples, sigma=settings.sigma).per_image / PIXELS
    assert (loss.mean() - 1).abs() < 5 * loss.std() / len(loss) ** 0.5
    blind = partial(teacher.forward, labels=None)
    assert not student_loss(networks, samples, config=settings).per_image.any()
    networks.teacher.forward = lambda noisy, sigma, labels: blind(noisy, sigma)
    assert student_loss(networks, samples, config=settings).per_image.all()


def test_score_steps_and_head_start_are_the_phases_numbers() -> None:
    """score_steps repeats the score phase; the student starts after the head start."""
    score_phase, student_phase = build(Config(score_steps=3, head_start_kimg=0.5)).phases
    assert (score_phase.name, score_phase.repeats, score_phase.starts_at) == ("score", 3, 0)
    assert (student_phase.name, student_phase.repeats, student_phase.starts_at) == (
        "student",
        1,
        500,
    )


# The whole


@pytest.mark.parametrize("shared_batch", [False, True])
def test_a_gaussian_student_becomes_its_teacher(tmp_path: Path, shared_batch: bool) -> None:
    """Trained by the real loop, its mean and full covariance end at the teacher's.

    Tolerance 0.05 at standard deviations of up to 0.85; it starts 0.3 and more away.
    """
    torch.manual_seed(1)
    factor = 0.35 * torch.randn(PIXELS, PIXELS)
    networks = Networks(
        AffineStudent(STUDENT_MEAN, torch.diag(STUDENT_STD)),
        AffineDenoiser(TEACHER_MEAN, factor),
        AffineDenoiser(TEACHER_MEAN, factor),
    )
    config = trainer.Config(
        duration_kimg=90,
        batch_size=128,
        student_lr=5e-3,
        score_lr=2e-2,
        ema_halflife_kimg=10,
    )
    state = training_state.start(
        networks,
        student_lr=config.student_lr,
        score_lr=config.score_lr,
        optimizer=config.optimizer,
    )
    settings = Config(weighting="edm", head_start_kimg=5, shared_batch=shared_batch)
    objective = build(settings)
    folder = RunFolder.create(tmp_path, "gaussian")
    trainer.Trainer(state, objective, config, folder=folder, world=World.single()).train()
    ema, covariance = state.student_ema, factor @ factor.t()
    began = torch.diag(STUDENT_STD.square())
    assert (STUDENT_MEAN - TEACHER_MEAN).abs().max() > 0.3
    assert (began - covariance).abs().max() > 0.3
    torch.testing.assert_close(ema.mean, networks.teacher.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(ema.factor @ ema.factor.t(), covariance, atol=0.05, rtol=0)
