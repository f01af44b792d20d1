"""The custom operations compute what they define."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from custom_ops.filtered_lrelu import filtered_lrelu

GOLDENS = np.load(Path(__file__).parent / "goldens" / "custom-ops.npz")
CASES = sorted({key.split("/")[0] for key in GOLDENS if key.startswith("filtered_lrelu")})


def assert_close(actual, expected):
    """The largest difference is within 1e-4 of the largest expected value."""
    expected = torch.as_tensor(np.asarray(expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_filtered_lrelu_matches_the_published_operation(case):
    """Output and gradients of every recorded call equal the published ones."""
    given = {
        key.split("/")[-1]: torch.as_tensor(GOLDENS[key])
        for key in GOLDENS
        if key.startswith(f"{case}/in/")
    }
    x, b = given["x"].requires_grad_(), given["b"].requires_grad_()
    kwargs = json.loads(str(GOLDENS[f"{case}/meta"]))["kwargs"]
    out = filtered_lrelu(x, given.get("fu"), given.get("fd"), b, **kwargs)
    assert_close(out, GOLDENS[f"{case}/out"])
    (out * given["probe"]).sum().backward()
    assert_close(x.grad, GOLDENS[f"{case}/grad/x"])
    assert_close(b.grad, GOLDENS[f"{case}/grad/b"])
