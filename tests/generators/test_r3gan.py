"""R3GAN: the published network's images and gradients, its pickle by reference, and back."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import generators
from core.errors import UserError
from generators import r3gan
from pretrained import networks
from pretrained.nvidia_pickle import NetworkRecord
from pretrained.torch_checkpoint import STATE_DICT
from repository import GOLDENS

GOLDEN = np.load(GOLDENS / "r3gan-cond10-16.npz")
STATE = {k[6:]: torch.tensor(GOLDEN[k]) for k in GOLDEN if k.startswith("state/")}
CLASSES = {
    "R3GAN": "training.networks.Generator",
    "_Model": "R3GAN.Networks.Generator",
    "_Stage": "R3GAN.Networks.GeneratorStage",
    "_Basis": "R3GAN.Networks.GenerativeBasis",
    "_Upsample": "R3GAN.Networks.UpsampleLayer",
    "_Resampler": "R3GAN.Resamplers.InterpolativeUpsamplerCUDA",
    "_Block": "R3GAN.Networks.ResidualBlock",
    "_BiasedActivation": "R3GAN.FusedOperators.BiasedActivationCUDA",
    "_Convolution": "R3GAN.Networks.Convolution",
}
"""Class here -> the published class of the same tensors."""


def _golden() -> r3gan.R3GAN:
    config = r3gan.from_record(NetworkRecord(STATE_DICT, tensors=STATE))
    assert config is not None
    student = r3gan.build(config)
    student.load_state_dict(STATE, strict=True)
    return student


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.tensor(GOLDEN["in/z"]), torch.tensor(GOLDEN["in/c"]).argmax(1)


def _close(actual: Tensor, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert (actual - torch.tensor(expected)).abs().max() <= 1e-4 * np.abs(expected).max()


def _published(module: nn.Module) -> nn.Module:
    """Return a module as an instance of its published class, which is pickled by reference."""
    name = CLASSES.get(type(module).__name__)
    if name is None and not list(module.children()):
        return module  # torch's own
    copy = nn.ModuleList() if name is None else _instance(name)
    copy._parameters, copy._buffers = dict(module._parameters), dict(module._buffers)
    copy._modules = {key: _published(child) for key, child in module._modules.items()}
    if name == "R3GAN.Networks.GeneratorStage":
        copy.DataType = torch.bfloat16
    return copy


def _instance(full_name: str) -> nn.Module:
    module_name, _, name = full_name.rpartition(".")
    module = sys.modules.setdefault(module_name, types.ModuleType(module_name))
    if not hasattr(module, name):
        kind = type(name, (nn.Module,), {"__module__": module_name, "__qualname__": name})
        setattr(module, name, kind)
    return getattr(module, name)()


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pickle as R3GAN's train.py writes it."""
    for name in {full.rpartition(".")[0] for full in CLASSES.values()}:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType("package"))
    network = _published(_golden())
    network.z_dim, network.c_dim, network.img_resolution = 16, 10, 16
    content = {
        "G": _published(_golden()),
        "D": None,
        "G_ema": network,
        "cur_nimg": 1000,
        "G_opt_state": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
    }
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def test_images_and_gradients_are_those_of_the_published_network() -> None:
    student = _golden()
    image = student(*_inputs())
    _close(image, GOLDEN["out/image"])
    (image * torch.tensor(GOLDEN["in/probe"])).sum().backward()
    parameters = dict(student.named_parameters())
    for key in GOLDEN:
        if key.startswith("grad/"):
            _close(parameters[key[5:]].grad, GOLDEN[key])


def test_a_snapshot_is_read_without_its_classes(snapshot: Path) -> None:
    """Settings follow from the shapes; optimizer states are no networks."""
    for name in [name for name in sys.modules if name.startswith(("R3GAN", "training.networks"))]:
        del sys.modules[name]
    student = generators.load(snapshot)
    assert student.image_shape == (3, 16, 16) and student.num_classes == 10
    _close(student(*_inputs()), GOLDEN["out/image"])


def test_refined_weights_go_back_into_the_snapshot(snapshot: Path, tmp_path: Path) -> None:
    """The tools that opened the original open the copy."""
    student, out = generators.load(snapshot), tmp_path / "refined.pkl"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    assert generators.save_refined(snapshot, out, student) == ("G_ema", "G")
    assert torch.equal(generators.load(out)(*_inputs()), student(*_inputs()))
    with out.open("rb") as file:
        content = pickle.load(file)
    assert content["cur_nimg"] == 1000
    expected = student.state_dict()
    found = content["G_ema"].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_it_is_kept_in_our_own_format_and_trains(tmp_path: Path) -> None:
    """Every parameter gets a gradient; a saved student is the same."""
    student = r3gan.build(
        r3gan.Config(
            noise_dimension=8, width_per_stage=(8, 6), cardinality_per_stage=(2, 3),
            blocks_per_stage=(1, 2), img_channels=1,
        )
    )  # fmt: skip
    latents = torch.randn(3, 8)
    student(latents).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    networks.save(tmp_path / "a.safetensors", student)
    again = generators.load(tmp_path / "a.safetensors")
    assert again.config == student.config and torch.equal(again(latents), student(latents))


def test_labels_are_for_classes_alone() -> None:
    with pytest.raises(ValueError, match="labels are for 10 classes"):
        _golden()(_inputs()[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width_per_stage": (8, 8)}, "as many of each"),
        (
            {"width_per_stage": (8,), "cardinality_per_stage": (3,), "blocks_per_stage": (1,)},
            "no multiple of 3 groups",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        r3gan.Config(**settings)


def test_stages_that_are_missing_are_named() -> None:
    state = {name: tensor for name, tensor in STATE.items() if "MainLayers.1." not in name}
    record = NetworkRecord(STATE_DICT, tensors=state)
    with pytest.raises(UserError, match="stages without a block"):
        r3gan.from_record(record)
