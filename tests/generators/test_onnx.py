"""generators._onnx: a student's ONNX file makes the student's images."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import UserError
from custom_ops import backend
from generators import _onnx, one_step_edm
from generators._onnx import export_onnx
from teachers import gaussian
from tiny_networks import small_stylegan2

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _onnx._PACKAGES),
    reason="onnx, onnxscript and onnxruntime are not all installed",
)
PSI = 0.6


@pytest.fixture(scope="module", params=[0, 3], ids=["unconditional", "conditional"])
def exported(request, tmp_path_factory) -> tuple[nn.Module, Path]:
    """Give a student in training, channels last, and its file."""
    small = {"img_resolution": 8, "mapping": {"num_layers": 2}}
    student = small_stylegan2(c_dim=request.param, conv_clamp=4.0, **small)
    student.mapping.w_avg.normal_(generator=torch.Generator().manual_seed(1))
    student.train().to(memory_format=torch.channels_last)
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    assert export_onnx(student, path, truncation=PSI) <= 1e-4
    return student, path


def run(path: Path, latents: torch.Tensor, labels: torch.Tensor | None) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {"latents": latents.numpy()}
    if labels is not None:
        inputs["labels"] = labels.numpy()
    (images,) = session.run(["images"], inputs)
    return images


@needs_onnx
@pytest.mark.parametrize("count", [1, 5])
def test_images_are_the_students_at_this_truncation(exported, count):
    """onnxruntime and PyTorch agree to 1e-4 for any batch size and label; psi has an effect."""
    student, path = exported
    latents = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
    labels = torch.arange(count) % 3 if student.num_classes else None
    with torch.no_grad(), backend.using("reference"):
        expected = student(latents, labels, truncation=PSI)
        untruncated = student(latents, labels)
    images = torch.from_numpy(run(path, latents, labels))
    assert images.dtype == torch.float32 and images.shape == expected.shape
    assert (images - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (images - untruncated).abs().max() > 0.01


@needs_onnx
def test_labels_are_an_input_of_conditional_students(exported):
    """Another label makes another image; without classes there is no such input."""
    import onnx

    student, path = exported
    names = [value.name for value in onnx.load(path).graph.input]
    if not student.num_classes:
        assert names == ["latents"]
        return
    assert names == ["latents", "labels"]
    latents = torch.ones(2, 8)
    one, other = run(path, latents, torch.tensor([0, 2]))
    assert np.abs(one - other).max() > 0.01


@needs_onnx
def test_the_file_says_what_it_is_and_nothing_of_this_machine(exported):
    """Family and truncation are in its metadata, and no path of a source file anywhere."""
    import onnx

    _, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "family": "stylegan2",
        "truncation": "0.6",
    }
    assert str(Path(_onnx.__file__).parent.parent).encode() not in path.read_bytes()
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@needs_onnx
def test_the_student_itself_stays_as_it_was(exported):
    """It trains on, in its mode and layout, after it was exported."""
    student, _ = exported
    assert student.training and all(p.requires_grad for p in student.parameters())
    weight = student.synthesis.b8.conv0.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@needs_onnx
def test_a_file_that_makes_other_images_does_not_appear(tmp_path, monkeypatch):
    """What is not the student's image is refused, and nothing is left."""
    monkeypatch.setattr(_onnx, "_largest_difference", lambda fixed, path: float("nan"))
    with pytest.raises(UserError, match="its images differ from PyTorch's by nan"):
        export_onnx(
            small_stylegan2(mapping={"num_layers": 1}, img_resolution=4), tmp_path / "student.onnx"
        )
    assert not any(tmp_path.iterdir())


@needs_onnx
def test_a_student_without_truncation_takes_none(tmp_path):
    """Where a family has no psi, any but 1 is refused by the family's name."""
    denoiser = gaussian.build(gaussian.Config(image_shape=(1, 4, 4)))
    student = one_step_edm.OneStepEDM(denoiser, config=one_step_edm.Config())
    with pytest.raises(UserError, match="a one_step_edm student has no truncation: expected 1"):
        export_onnx(student, tmp_path / "student.onnx", truncation=0.5)


@pytest.mark.parametrize("missing", _onnx._PACKAGES)
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    """Without one of the packages one sentence says which, and how to get it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else n or found)
    with pytest.raises(UserError, match=f"needs {missing}: run `pip install {missing}`"):
        export_onnx(nn.Identity(), tmp_path / "student.onnx")
