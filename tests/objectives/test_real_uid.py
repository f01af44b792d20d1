"""RealUID: what real images change, on Gaussians; what is refused; a run with real images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_runs import call, tiny_recipe
from core.errors import UserError
from core.roles import Networks
from core.run_folder import RunFolder
from gaussians import (
    FIXED,
    SHAPE,
    SIGMA,
    TEACHER_MEAN,
    TEACHER_STD,
    AffineDenoiser,
    DiagonalStudent,
    batch,
    exact_networks,
)
from objectives import real_uid, sid
from objectives._noise import edm_weight


class Real:
    """Images of the teacher's distribution, as if they were real."""

    def drawn(self, draws):
        noise = draws.normal("real", (TEACHER_MEAN.numel(),))
        return (TEACHER_MEAN + TEACHER_STD * noise).view(-1, *SHAPE), None


def test_without_real_images_it_is_sid_with_alpha_one_half() -> None:
    """Twice its loss: |T - x|^2 - |F - x|^2 = 2 (<T - F, T - x> - |T - F|^2 / 2)."""
    networks, samples = exact_networks(), batch(500)
    config = real_uid.Config(images="none", alpha=0.5, beta_over_alpha=1.0, sigma=FIXED)
    found = real_uid.student_loss(networks, samples, config=config).per_image
    plain = sid.Config(alpha=0.5, normalizer="none", sigma=FIXED)
    weight = 0.5 * edm_weight(torch.tensor([SIGMA]), sigma_data=0.5)
    expected = 2 * weight * sid.student_loss(networks, samples, config=plain).per_image
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("alpha", "ratio"), [(0.94, 0.98), (0.9, 1.02), (0.5, 1.3)])
def test_the_score_step_ends_at_the_teacher_where_the_student_is_real(
    alpha: float, ratio: float
) -> None:
    """Its gradient at F = T is zero for any alpha and beta, and is not for another F."""
    factor = torch.diag(TEACHER_STD)
    student = DiagonalStudent(TEACHER_MEAN, TEACHER_STD)
    config = real_uid.Config(images="none", alpha=alpha, beta_over_alpha=ratio, sigma=FIXED)

    def gradient(score: AffineDenoiser) -> float:
        networks = Networks(student, score, torch.nn.Identity())
        loss = real_uid.score_loss(networks, batch(200_000), real=Real(), config=config)
        parameters = tuple(score.parameters())
        parts = torch.autograd.grad(loss.per_image.mean(), parameters)
        return float(torch.cat([part.flatten() for part in parts]).norm())

    settled = gradient(AffineDenoiser(TEACHER_MEAN, factor))
    moved = gradient(AffineDenoiser(TEACHER_MEAN + 0.3, factor))
    assert settled < 0.05 * moved


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="must be below 1"):
        real_uid.Config(images="x", alpha=0.99, beta_over_alpha=1.02)


def _images(folder: Path, size: int = 8) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_a_run_says_that_it_used_real_images(tmp_path: Path) -> None:
    images = _images(tmp_path / "images")
    outcome = call(
        "--gan", tiny_recipe(tmp_path), f"objective={{name: real_uid, images: {images}}}",
        "--outdir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    folder = RunFolder(tmp_path / "runs" / "00000-tiny")
    document = json.loads((folder.report / "report.json").read_text())
    assert "Real images were used in training: 12 images, 8x8 grey" in str(document["notes"])


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    images = _images(tmp_path / "images", size=16)
    outcome = call(
        "--gan", tiny_recipe(tmp_path), f"objective={{name: real_uid, images: {images}}}",
        "--outdir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 2 and "the student makes [1, 8, 8]" in outcome.stderr
    with pytest.raises(UserError):
        real_uid.build(real_uid.Config(images=str(tmp_path / "none")))
