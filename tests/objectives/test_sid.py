"""SiD and SIM: gradients in closed form on Gaussians, and a run from both ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cli_runs import call, contents, tiny_recipe
from core.roles import Networks
from core.run_folder import RunFolder
from gaussians import (
    FIXED,
    SHAPE,
    SIGMA,
    STUDENT_MEAN,
    STUDENT_STD,
    TEACHER_MEAN,
    TEACHER_STD,
    DiagonalStudent,
    batch,
    denoiser,
    exact_networks,
)
from objectives import sid


def _gradients(networks: Networks, config: sid.Config, count: int = 200_000) -> dict[str, Tensor]:
    """Return the mean gradient by the student's parameters."""
    loss = sid.student_loss(networks, batch(count), config=config).per_image.mean()
    names, parameters = zip(*networks.student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def _distance(mean: Tensor, std: Tensor) -> Tensor:
    """Return E |T - F|^2 with the exact F of a student N(mean, std^2), in float64.

    T(y) - F(y) is linear in y ~ N(mean, std^2 + sigma^2), pixel by pixel.
    """
    mean, std = mean.double(), std.double()
    noise = SIGMA**2
    gain_t = TEACHER_STD.double() ** 2 / (TEACHER_STD.double() ** 2 + noise)
    gain_f = std**2 / (std**2 + noise)
    at_mean = TEACHER_MEAN.double() + gain_t * (mean - TEACHER_MEAN.double()) - mean
    spread = (gain_t - gain_f) ** 2 * (std**2 + noise)
    return (at_mean**2 + spread).sum()


def test_alpha_one_half_is_the_gradient_of_the_distance_of_scores() -> None:
    """With a perfect score network: half of d E |T - F|^2, where F moves with the student."""
    config = sid.Config(alpha=0.5, normalizer="none", sigma=FIXED)
    found = _gradients(exact_networks(), config)
    mean = STUDENT_MEAN.clone().requires_grad_()
    std = STUDENT_STD.clone().requires_grad_()
    expected = torch.autograd.grad(_distance(mean, std), (mean, std))
    for name, value in zip(("mean", "std"), expected, strict=True):
        torch.testing.assert_close(2 * found[name], value.float(), atol=0.02, rtol=0.03)


def test_alpha_one_freezes_the_density_of_the_noisy_images() -> None:
    """SIM's theorem: half the gradient of E |T - F|^2 where F moves with the student and the
    samples y are those of the student as it was.
    """
    config = sid.Config(alpha=1.0, normalizer="none", sigma=FIXED)
    found = _gradients(exact_networks(), config)
    mean, std = STUDENT_MEAN.double().requires_grad_(), STUDENT_STD.double().requires_grad_()
    noise = SIGMA**2
    gain_t = TEACHER_STD.double() ** 2 / (TEACHER_STD.double() ** 2 + noise)
    gain_f = std**2 / (std**2 + noise)
    # at y = m + v with m, v of the student as it was: T - F = a + b v, of mean and variance below
    frozen_mean, frozen_std = STUDENT_MEAN.double(), STUDENT_STD.double()
    teacher_at = TEACHER_MEAN.double() + gain_t * (frozen_mean - TEACHER_MEAN.double())
    score_at = mean + gain_f * (frozen_mean - mean)
    variance = frozen_std**2 + noise
    distance = ((teacher_at - score_at) ** 2 + (gain_t - gain_f) ** 2 * variance).sum()
    expected = torch.autograd.grad(distance, (mean, std))
    for name, value in zip(("mean", "std"), expected, strict=True):
        torch.testing.assert_close(2 * found[name], value.float(), atol=0.02, rtol=0.03)


def test_sim_with_a_squared_distance_is_sid_with_alpha_one() -> None:
    """<T - F, (T - x) - (T - F)> = <T - F, F - x>."""
    x, f, t = torch.randn(3, 5, *SHAPE).unbind()
    expected = ((t - f) * (f - x)).flatten(1).sum(1)
    torch.testing.assert_close(sid.identity_loss(x, f, t, alpha=1.0), expected)


def test_normalizers_divide_each_image_by_its_own_size() -> None:
    """SiD's is detached; the gradient flows through that of pseudo-Huber."""
    x, f, t = (part.requires_grad_() for part in torch.randn(3, 5, *SHAPE).unbind())
    plain = sid.identity_loss(x, f, t, alpha=1.2)
    by_l1 = sid.identity_loss(x, f, t, alpha=1.2, normalizer="l1")
    torch.testing.assert_close(by_l1 * (x - t).abs().mean((1, 2, 3)), plain)
    (gradient,) = torch.autograd.grad(by_l1.sum(), x, retain_graph=True)
    size = (x - t).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, -(t - f) / size)
    huber = sid.identity_loss(x, f, t, alpha=1.2, normalizer="pseudo_huber", huber_c=0.5)
    size = ((t - f).square().sum((1, 2, 3)) + 0.25 * x[0].numel()).sqrt()
    torch.testing.assert_close(huber * size, plain)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_a_student_like_its_teacher_stays(alpha: float) -> None:
    """Where T = F no image moves."""
    networks = Networks(
        DiagonalStudent(TEACHER_MEAN, TEACHER_STD),
        denoiser(TEACHER_MEAN, TEACHER_STD),
        denoiser(TEACHER_MEAN, TEACHER_STD),
    )
    gradients = _gradients(networks, sid.Config(alpha=alpha), count=1000)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients.values())


def test_only_the_student_learns_in_its_phase() -> None:
    """Score network and teacher pass the gradient on, and get none; they can learn afterwards."""
    networks = exact_networks()
    for parameter in networks.score.parameters():
        parameter.requires_grad_(True)
    assert list(networks.score.parameters())
    sid.student_loss(networks, batch(8), config=sid.Config()).per_image.sum().backward()
    assert all(parameter.grad is not None for parameter in networks.student.parameters())
    assert all(p.grad is None and p.requires_grad for p in networks.score.parameters())


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SiD under the loop: resumed, it ends as if it had not been stopped."""
    objective = "objective={name: sid, alpha: 1.0, normalizer: pseudo_huber}"
    for name, kimg in (("whole", "0.08"), ("cut", "0.04")):
        arguments = (objective, f"training.duration_kimg={kimg}", "--outdir", tmp_path / name)
        outcome = call("--gan", tiny_recipe(tmp_path), *arguments, "training.export=last")
        assert outcome.code == 0, outcome.stderr
    cut = tmp_path / "cut" / "00000-tiny"
    assert call("--resume", cut, "training.duration_kimg=0.08").code == 0
    whole = contents(tmp_path / "whole" / "00000-tiny")
    assert contents(cut)["student.safetensors"] == whole["student.safetensors"]
    rows = RunFolder(cut).log.rows()
    assert any("score_difference" in getattr(row, "values", {}) for row in rows)
