"""EDM denoisers against the published numbers, and the identities of their preconditioning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from teachers.edm import Config, EDMDenoiser, build, from_record

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("edm-ddpmpp-cond10-16", "edm-ncsnpp-16", "edm-adm-cond7-16")
TOLERANCE = 1e-4
"""Of the largest value."""


class Golden(NamedTuple):
    config: Config
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    denoised: Tensor
    gradients: dict[str, Tensor]


def read_golden(name: str) -> Golden:
    with np.load(GOLDENS / f"{name}.npz") as archive:
        meta = json.loads(str(archive["meta"]))
        groups: dict[str, dict[str, Tensor]] = {"state": {}, "in": {}, "out": {}, "grad": {}}
        for key in archive.files:
            group, _, rest = key.partition("/")
            if rest:
                groups[group][rest] = torch.from_numpy(archive[key])
    config = from_record(meta["network"], meta["kwargs"])
    assert config is not None
    if "labels" in groups["in"]:
        groups["in"]["labels"] = groups["in"]["labels"].argmax(dim=1)
    return Golden(config, groups["state"], groups["in"], groups["out"]["denoised"], groups["grad"])


def load(golden: Golden) -> EDMDenoiser:
    denoiser = build(golden.config).eval()
    denoiser.load_state_dict(golden.state, strict=True)
    return denoiser


def denoise(denoiser: EDMDenoiser, inputs: dict[str, Tensor]) -> Tensor:
    return denoiser(
        inputs["x"],
        inputs["sigma"],
        inputs.get("labels"),
        augment_labels=inputs.get("augment_labels"),
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_state_keys_and_shapes_are_the_published_ones(name: str) -> None:
    """A built denoiser has exactly the published tensors, buffers included."""
    golden = read_golden(name)
    ours = {key: tensor.shape for key, tensor in build(golden.config).state_dict().items()}
    assert ours == {key: tensor.shape for key, tensor in golden.state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_denoised_matches_the_published_implementation(name: str) -> None:
    """D(x; sigma, labels) equals the golden image."""
    golden = read_golden(name)
    with torch.no_grad():
        assert_close(denoise(load(golden), golden.inputs), golden.denoised)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_gradients_match_the_published_implementation(name: str) -> None:
    """The gradients of (denoised * probe).sum() equal the golden ones."""
    golden = read_golden(name)
    denoiser = load(golden)
    (denoise(denoiser, golden.inputs) * golden.inputs["probe"]).sum().backward()
    parameters = dict(denoiser.named_parameters())
    assert golden.gradients
    for key, expected in golden.gradients.items():
        gradient = parameters[key].grad
        assert gradient is not None
        assert_close(gradient, expected)
