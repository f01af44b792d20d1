"""The EDM golden networks: read, and rebuilt with their weights."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrained.nvidia_pickle import NetworkRecord
from repository import GOLDENS
from teachers.edm import Config, EDMDenoiser, build, from_record

NAMES = (
    *("edm-ddpmpp-cond10-16", "edm-ncsnpp-16", "edm-adm-cond7-16"),
    *("vp-ddpmpp-16", "ve-ncsnpp-16", "iddpm-adm-16"),
)
TOLERANCE = 1e-4
"""Largest difference, as a fraction of the largest expected value."""


class Golden(NamedTuple):
    """One network of the published implementation: how it is built, and what it computes."""

    config: Config
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    denoised: Tensor
    gradients: dict[str, Tensor]


def read_arrays(name: str, group: str) -> dict[str, Tensor]:
    """Return the tensors of one group: state, in, out or grad."""
    with np.load(GOLDENS / f"{name}.npz") as archive:
        keys = [key for key in archive.files if key.startswith(f"{group}/")]
        return {key.removeprefix(f"{group}/"): torch.from_numpy(archive[key]) for key in keys}


def read_golden(name: str) -> Golden:
    """Return a golden network; its one-hot labels as class numbers."""
    with np.load(GOLDENS / f"{name}.npz") as archive:
        meta = json.loads(str(archive["meta"]))
    config = from_record(NetworkRecord(meta["network"], arguments=meta["kwargs"]))
    assert config is not None
    inputs = read_arrays(name, "in")
    if "labels" in inputs:
        inputs["labels"] = inputs["labels"].argmax(dim=1)
    denoised = read_arrays(name, "out")["denoised"]
    return Golden(config, read_arrays(name, "state"), inputs, denoised, read_arrays(name, "grad"))


def load(golden: Golden) -> EDMDenoiser:
    """Return the golden's denoiser in eval mode."""
    denoiser = build(golden.config).eval()
    denoiser.load_state_dict(golden.state, strict=True)
    return denoiser


def denoise(denoiser: EDMDenoiser, inputs: dict[str, Tensor]) -> Tensor:
    """Return the denoised golden input, with graph."""
    return denoiser(
        inputs["x"],
        inputs["sigma"],
        inputs.get("labels"),
        augment_labels=inputs.get("augment_labels"),
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()
