"""A student of larger images, or of other colours, than its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import generators
from cli_runs import call, tiny_recipe
from core.errors import UserError
from core.run_folder import RunFolder
from refinement.adapter import downsample


def test_shrinking_keeps_what_is_flat_and_what_is_slow() -> None:
    """A constant stays, a slow wave stays close, one that is too fine nearly vanishes."""
    shrink = downsample((1, 64, 64), (1, 16, 16))
    flat = torch.full((1, 1, 64, 64), 0.3)
    torch.testing.assert_close(shrink(flat), torch.full((1, 1, 16, 16), 0.3))
    x = (torch.arange(64) + 0.5) / 64
    slow, fine = (torch.sin(2 * torch.pi * waves * x).expand(1, 1, 64, 64) for waves in (1, 31))
    expected = torch.sin(2 * torch.pi * (torch.arange(16) + 0.5) / 16).expand(1, 1, 16, 16)
    torch.testing.assert_close(shrink(slow), expected, atol=0.05, rtol=0)
    assert shrink(fine).abs().max() < 0.1 < fine[..., ::4].abs().max()


def test_colours_become_grey_and_grey_becomes_colours() -> None:
    """Grey is the luminance of BT.601; three equal channels have that luminance again."""
    colours = torch.rand(2, 3, 8, 8)
    grey = downsample((3, 8, 8), (1, 8, 8))(colours)
    torch.testing.assert_close(grey[:, 0], torch.einsum(
        "nchw,c->nhw", colours, torch.tensor([0.299, 0.587, 0.114])
    ))  # fmt: skip
    again = downsample((1, 8, 8), (3, 8, 8))(grey)
    torch.testing.assert_close(downsample((3, 8, 8), (1, 8, 8))(again), grey)


def test_the_gradient_is_that_of_the_shrinking() -> None:
    """Checked against finite differences, colours and size at once."""
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(downsample((3, 6, 6), (1, 3, 3)), images)


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        ((3, 32, 32), (3, 64, 64), "smaller than the teacher's 64x64"),
        ((3, 64, 128), (3, 32, 32), "another aspect"),
        ((4, 64, 64), (3, 64, 64), "no way from 4 channels to 3"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(student: tuple, teacher: tuple, says: str) -> None:
    """Larger teachers, other aspects and unknown channels are each a sentence."""
    with pytest.raises(UserError, match=says):
        downsample(student, teacher)


def test_a_larger_student_in_colour_is_refined(tmp_path: Path) -> None:
    """Refused without the adapter, with its name; trained with it, at the student's own size."""
    recipe = tiny_recipe(tmp_path)
    larger = ["student.config.img_resolution=16", "student.config.img_channels=3"]
    unmeasured = ["evaluation.reference=", "evaluation.extractor=pixels"]
    outdir = ("--outdir", tmp_path / "runs")
    refused = call("--gan", recipe, *larger, *unmeasured, *outdir)
    assert refused.code == 2 and "teacher.adapter=downsample" in refused.stderr
    done = call("--gan", recipe, *larger, *unmeasured, "teacher.adapter=downsample", *outdir)
    assert done.code == 0, done.stderr
    folder = RunFolder(tmp_path / "runs" / "00000-tiny")
    assert generators.load(folder.student).image_shape == (3, 16, 16)
    assert "8x8" in (folder.report / "report.md").read_text()


def test_a_conditional_student_of_an_unconditional_teacher_keeps_its_classes(
    tmp_path: Path,
) -> None:
    """Refused with the name of the setting; trained with it, and said in the report."""
    recipe, outdir = tiny_recipe(tmp_path), ("--outdir", tmp_path / "runs")
    classes = ["student.config.c_dim=3", "evaluation.reference=", "evaluation.extractor=pixels"]
    refused = call("--gan", recipe, *classes, *outdir)
    assert refused.code == 2 and "teacher.labels=ignore" in refused.stderr
    done = call("--gan", recipe, *classes, "teacher.labels=ignore", *outdir)
    assert done.code == 0, done.stderr
    folder = RunFolder(tmp_path / "runs" / "00000-tiny")
    assert generators.load(folder.student).num_classes == 3
    assert "teacher is unconditional" in (folder.report / "report.md").read_text()


def test_a_larger_student_is_not_measured_against_smaller_samples(tmp_path: Path) -> None:
    """The teacher's samples have another size than the student's images: no FID between them."""
    outcome = call(
        "--gan", tiny_recipe(tmp_path), "student.config.img_resolution=16",
        "teacher.adapter=downsample", "--outdir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 2 and "evaluation.reference" in outcome.stderr
    assert not (tmp_path / "runs").exists()
