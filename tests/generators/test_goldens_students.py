"""Students and custom operations compute what the published networks and operations compute."""

import json

import numpy as np
import pytest
import torch

from custom_ops.bias_act import bias_act
from custom_ops.upfirdn2d import upfirdn2d
from repository import GOLDENS
from student_goldens import STUDENTS, load_student

CUSTOM_OPS = np.load(GOLDENS / "custom-ops.npz")
CASES = sorted(
    {key.split("/")[0] for key in CUSTOM_OPS if key.startswith(("bias_act", "upfirdn2d"))}
)


def assert_close(actual, expected):
    """The largest difference is within 1e-4 of the largest expected value."""
    expected = torch.as_tensor(np.asarray(expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", STUDENTS)
def test_images_match_the_published_network(name):
    """w, images and truncated images equal the published ones."""
    student, golden, latents, labels = load_student(name)
    student.eval()
    assert_close(student.mapping(latents, labels), golden["out/w"])
    assert_close(student(latents, labels), golden["out/image"])
    assert_close(student(latents, labels, truncation=0.7), golden["out/image_psi0.7"])


@pytest.mark.parametrize("name", STUDENTS)
def test_gradients_match_the_published_network(name):
    """In train mode the image and the gradients of a probed sum equal the published ones."""
    student, golden, latents, labels = load_student(name)
    image = student.train()(latents, labels)
    assert_close(image, golden["out/image_train"])
    (image * torch.as_tensor(golden["in/probe"])).sum().backward()
    gradients = dict(student.named_parameters())
    for key in golden:
        if key.startswith("grad/"):
            assert_close(gradients[key[5:]].grad, golden[key])


@pytest.mark.parametrize("case", CASES)
def test_custom_ops_match_the_published_operations(case):
    """Output and gradients of every recorded call equal the published ones."""
    meta = json.loads(str(CUSTOM_OPS[f"{case}/meta"]))
    x = torch.as_tensor(CUSTOM_OPS[f"{case}/in/x"]).requires_grad_()
    probe = torch.as_tensor(CUSTOM_OPS[f"{case}/in/probe"])
    if meta["op"] == "bias_act":
        b = torch.as_tensor(CUSTOM_OPS[f"{case}/in/b"]).requires_grad_()
        out = bias_act(x, b, **meta["kwargs"])
    else:
        b = None
        out = upfirdn2d(x, torch.as_tensor(CUSTOM_OPS[f"{case}/in/f"]), **meta["kwargs"])
    assert_close(out, CUSTOM_OPS[f"{case}/out"])
    (out * probe).sum().backward()
    assert_close(x.grad, CUSTOM_OPS[f"{case}/grad/x"])
    if b is not None:
        assert_close(b.grad, CUSTOM_OPS[f"{case}/grad/b"])
