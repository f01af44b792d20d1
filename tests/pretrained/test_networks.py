"""pretrained.networks: a file becomes a network of ours, or a sentence names its damage."""

from pathlib import Path

import pytest
import torch

import generators
import teachers
from core.errors import UserError
from generators import stylegan2
from pretrained import networks
from teachers import gaussian


def _student() -> torch.nn.Module:
    return stylegan2.build(
        stylegan2.Config(
            z_dim=8, w_dim=8, img_resolution=8, img_channels=1, channel_base=64, channel_max=8
        )
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["mapping.w_avg", "mapping.fc0.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, tensor: str, value: float) -> None:
    """One bad value, in a weight or a moving average, is refused by file, tensor and network."""
    network = _student()
    network.state_dict()[tensor].view(-1)[-1] = value
    networks.save(tmp_path / "bad.safetensors", network)
    with pytest.raises(UserError, match=rf"bad\.safetensors: {tensor} of its stylegan2 network"):
        generators.load(tmp_path / "bad.safetensors")


def test_a_teacher_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """The teacher's file is checked as the student's is; further tensors are counted."""
    network = gaussian.build(gaussian.Config(image_shape=(1, 2, 2)))
    for value in network.state_dict().values():
        value.fill_(torch.nan)
    networks.save(tmp_path / "bad.safetensors", network)
    with pytest.raises(UserError, match=r"and \d more of its gaussian network"):
        teachers.load(tmp_path / "bad.safetensors")


def test_finite_weights_load(tmp_path: Path) -> None:
    """The largest float16 is a value like any other."""
    network = _student()
    network.state_dict()["mapping.w_avg"].fill_(65504)
    networks.save(tmp_path / "good.safetensors", network)
    assert generators.load(tmp_path / "good.safetensors").mapping.w_avg[0] == 65504
