"""A denoiser as EDM's pickle: their programs rebuild it from its arguments, and ours read it."""

from __future__ import annotations

import math
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import teachers
import teachers.__main__ as command
from pretrained import networks
from teachers import _edm_pickle, edm, gaussian
from tiny_networks import songunet_config


class Published(nn.Module):
    """Stands for EDM's class: its constructor's arguments, the state dict of ours."""

    def __init__(self, *, use_fp16: bool, **arguments: object) -> None:
        super().__init__()
        if arguments["sigma_max"] == math.inf:
            arguments["sigma_max"] = None
        network = edm.build(edm.Config.model_validate(arguments))
        for name, child in network.named_children():
            self.add_module(name, child)
        self.arguments = arguments


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the names that EDM's checkout has, with what a pickle asks of them."""

    def reconstruct(meta: dict) -> object:
        assert (meta["type"], meta["version"]) == ("class", 6)
        module = types.ModuleType("of_the_pickle")
        exec(meta["module_src"], module.__dict__)
        kind = module.__dict__[meta["class_name"]]
        network = kind.__new__(kind)
        network.__setstate__(meta["state"])
        return network

    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = reconstruct
    published = types.ModuleType("training.networks")
    published.EDMPrecond = Published
    package = types.ModuleType("training")
    package.networks = published
    for name, module in {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "training": package,
        "training.networks": published,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return network.state_dict()


def _written(path: Path, network: nn.Module) -> Path:
    networks.save(path / "teacher.safetensors", network)
    out = path / "teacher.pkl"
    result = CliRunner().invoke(command.main, ["edm", str(path / "teacher.safetensors"), str(out)])
    assert result.exit_code == 0, result.output
    return out


def test_edm_s_programs_rebuild_the_network(tmp_path: Path, checkout: None) -> None:
    """From the recorded arguments, with every tensor; in eval mode and without gradients."""
    torch.manual_seed(0)
    network = edm.build(songunet_config(label_dim=3, sigma_max=50.0))
    with _written(tmp_path, network).open("rb") as file:
        rebuilt = pickle.load(file)["ema"]
    assert isinstance(rebuilt, Published) and not rebuilt.training
    assert rebuilt.arguments["sigma_max"] == 50.0 and rebuilt.arguments["label_dim"] == 3
    expected = _tensors(network)
    assert rebuilt.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in rebuilt.state_dict().items())
    assert not any(parameter.requires_grad for parameter in rebuilt.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"sigma_max": None},
        {"preconditioning": "VP", "beta_min": 0.2},
        {"preconditioning": "VE"},
        {"preconditioning": "iDDPM", "M": 500},
    ],
)
def test_the_pickle_is_read_back(tmp_path: Path, settings: dict) -> None:
    """Every column of EDM's Table 1 is the same network after a way through the pickle."""
    network = edm.build(songunet_config(**settings))
    back = teachers.load(_written(tmp_path, network))
    assert back.config == network.config
    expected = _tensors(network)
    assert all(torch.equal(value, expected[name]) for name, value in _tensors(back).items())


def test_arguments_are_those_of_the_constructor() -> None:
    """Of its own column and model alone; no limit is infinity."""
    arguments = _edm_pickle.constructor_arguments(songunet_config())
    assert arguments["sigma_max"] == math.inf and arguments["channel_mult"] == [1, 2]
    assert not {"preconditioning", "beta_d", "C_1", "M"} & arguments.keys()


def test_other_families_have_no_pickle_of_edm_s(tmp_path: Path) -> None:
    network = gaussian.build(gaussian.Config(image_shape=(1, 8, 8)))
    networks.save(tmp_path / "g.safetensors", network)
    arguments = ["edm", str(tmp_path / "g.safetensors"), str(tmp_path / "out.pkl")]
    result = CliRunner().invoke(command.main, arguments)
    assert result.exit_code == 2 and "only networks of the family edm" in result.stderr
