"""A diffusion network at one noise level, as a student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import generators
from core.errors import UserError
from generators import one_step_edm
from pretrained import networks
from teachers import edm, gaussian
from tiny_networks import songunet_config

LATENTS = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def edm_teacher() -> nn.Module:
    torch.manual_seed(0)
    teacher = edm.build(songunet_config(label_dim=3, augment_dim=2))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.2)  # a fresh one's output is next to zero
    return teacher.eval()


def test_it_is_the_teacher_at_one_noise_level() -> None:
    """G(z, c) = D(sigma z; sigma, c), with the teacher's shapes and classes."""
    teacher = edm_teacher()
    student = one_step_edm.from_teacher(teacher, one_step_edm.Config(init_sigma=2.5)).eval()
    expected = teacher(2.5 * LATENTS, torch.full((5,), 2.5), LABELS)
    torch.testing.assert_close(student(LATENTS, LABELS), expected, rtol=0, atol=0)
    assert student.latent_shape == student.image_shape == (1, 8, 8)
    assert student.num_classes == 3


def test_it_learns_and_the_teacher_does_not() -> None:
    """The weights are a copy that can be trained, also of a frozen teacher."""
    teacher = edm_teacher().requires_grad_(False)
    student = one_step_edm.from_teacher(teacher, one_step_edm.Config())
    student(LATENTS, LABELS).sum().backward()
    moved = [p for p in student.parameters() if p.grad is not None]
    assert moved and all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        moved[0].add_(1.0)
    torch.testing.assert_close(list(teacher.parameters()), list(edm_teacher().parameters()))


@pytest.mark.parametrize(
    "teacher", [edm_teacher(), gaussian.build(gaussian.Config(image_shape=(1, 8, 8)))]
)
def test_a_saved_one_needs_no_teacher(tmp_path: Path, teacher: nn.Module) -> None:
    """generators.load makes the same images from the file alone, whatever family it was."""
    student = one_step_edm.from_teacher(teacher, one_step_edm.Config(init_sigma=0.7)).eval()
    networks.save(tmp_path / "student.safetensors", student)
    loaded = generators.load(tmp_path / "student.safetensors")
    latents = torch.randn(4, *student.latent_shape)
    labels = torch.arange(4) % student.num_classes if student.num_classes else None
    assert torch.equal(loaded(latents, labels), student(latents, labels))


def test_what_it_cannot_be_is_refused() -> None:
    """Settings that name no network, and a noise level that the teacher does not know."""
    with pytest.raises(UserError, match="a teacher to copy, or both family and network"):
        one_step_edm.build(one_step_edm.Config(family="edm"))
    with pytest.raises(UserError, match=r"init_sigma 100.0 is outside .* 0.002 to 80.0"):
        one_step_edm.from_teacher(
            gaussian.build(gaussian.Config(image_shape=(1, 8, 8))),
            one_step_edm.Config(init_sigma=100),
        )
