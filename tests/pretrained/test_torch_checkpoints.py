"""Checkpoints of torch.save: rosinality's and bare state dicts, as data, and back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import generators
from cli_runs import call, tiny_recipe
from core.errors import UserError
from core.run_folder import RunFolder
from pretrained import torch_checkpoint
from repository import GOLDENS
from tiny_networks import inputs, small_stylegan2

GOLDEN = np.load(GOLDENS / "rosinality-32.npz")


def _of(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.tensor(GOLDEN[k]) for k in GOLDEN if k.startswith(prefix)}


def _checkpoint(path: Path, **more: object) -> Path:
    """Write a checkpoint as rosinality's train.py does."""
    content = {
        "g_ema": _of("state/"),
        "g": _of("state/"),
        "latent_avg": torch.tensor(GOLDEN["in/latent_avg"]),
        "args": argparse.Namespace(size=32, iter=800000),
        "ada_aug_p": 0.25,
        **more,
    }
    torch.save(content, path)
    return path


def _close(actual: Tensor, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert (actual - torch.tensor(expected)).abs().max() <= 1e-4 * np.abs(expected).max()


def test_rosinality_s_network_computes_its_images(tmp_path: Path) -> None:
    """w, images and truncated images are those of the published code."""
    student = generators.load(_checkpoint(tmp_path / "550000.pt"))
    latents = torch.tensor(GOLDEN["in/z"])
    _close(student.mapping(latents, None), GOLDEN["out/w"][:, None].repeat(8, 1))
    _close(student(latents, None), GOLDEN["out/image"])
    _close(student(latents, None, truncation=0.6), GOLDEN["out/image_truncated_0.6"])
    assert student.image_shape == (3, 32, 32) and student.num_classes == 0


def test_rosinality_s_names_and_ours_are_the_same_tensors(tmp_path: Path) -> None:
    """Each of its parameters has one name of ours; constant buffers have none."""
    names = {name: torch_checkpoint.rosinality_name(name) for name in _of("state/")}
    assert all((ours is None) == name.endswith("kernel") for name, ours in names.items())
    known = [name for name in names.values() if name is not None]
    assert len(set(known)) == len(known)
    student = generators.load(_checkpoint(tmp_path / "a.pt"))
    buffers = {n for n in student.state_dict() if n.endswith(("resample_filter", "w_avg"))}
    assert set(known) == set(student.state_dict()) - buffers


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"decoder.{n}": t for n, t in state.items()}, "opts": {}},
        lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    ],
    ids=["bare", "parallel", "encoder", "training"],
)
@pytest.mark.parametrize("names", ["rosinality", "nvidia"])
def test_containers_are_opened(tmp_path: Path, names: str, wrap, legacy: bool) -> None:
    """Settings follow from the shapes, whatever lies around the state dict."""
    torch.manual_seed(0)
    ours = small_stylegan2(c_dim=3)
    state = ours.state_dict() if names == "nvidia" else _of("state/")
    path = tmp_path / "model.pth"
    torch.save(wrap(dict(state)), path, _use_new_zipfile_serialization=not legacy)
    student = generators.load(path)
    if names == "nvidia":
        assert torch.equal(student(*inputs(ours)), ours.eval()(*inputs(ours)))
        assert student.config.c_dim == 3
    else:
        latents = torch.tensor(GOLDEN["in/z"])
        _close(student(latents, None), GOLDEN["out/image"])


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_settings_are_inferred_from_shapes(tmp_path: Path, architecture: str) -> None:
    made = small_stylegan2(
        architecture=architecture, img_resolution=16, channel_base=64, channel_max=8
    )
    torch.save(made.state_dict(), tmp_path / "a.pt")
    found = generators.load(tmp_path / "a.pt").config
    assert (found.architecture, found.img_resolution) == (architecture, 16)
    assert [found.channels(r) for r in (4, 8, 16)] == [made.config.channels(r) for r in (4, 8, 16)]


def test_refined_weights_go_back_into_the_checkpoint(tmp_path: Path) -> None:
    """Under rosinality's names and shapes, with latent_avg; the rest is as it was."""
    original, out = _checkpoint(tmp_path / "a.pt"), tmp_path / "b.pt"
    student = generators.load(original)
    with torch.no_grad():
        for tensor in (*student.parameters(), student.mapping.w_avg):
            tensor.add_(0.125)
    assert generators.save_refined(original, out, student, g_ema_only=True) == ("G_ema",)
    latents = torch.tensor(GOLDEN["in/z"])
    again = generators.load(out)
    assert torch.equal(again(latents, None), student(latents, None))
    assert torch.equal(again(latents, None, truncation=0.5), student(latents, None, truncation=0.5))

    with torch.serialization.safe_globals([argparse.Namespace]):
        before, after = (torch.load(path, weights_only=True) for path in (original, out))
    assert list(before) == list(after) and after["args"] == before["args"]
    assert all(torch.equal(before["g"][name], after["g"][name]) for name in before["g"])
    shapes = {name: tensor.shape for name, tensor in before["g_ema"].items()}
    assert {name: tensor.shape for name, tensor in after["g_ema"].items()} == shapes
    kernel = "convs.0.conv.blur.kernel"
    assert torch.equal(before["g_ema"][kernel], after["g_ema"][kernel])


def test_a_run_on_a_checkpoint_ends_with_that_checkpoint_refined(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = small_stylegan2(c_dim=0, img_resolution=8, img_channels=1, channel_max=8)
    torch.save({"g_ema": made.state_dict(), "note": "mine"}, tmp_path / "mine.pt")
    outcome = call(
        "--gan", tiny_recipe(tmp_path), f"student={{weights: {tmp_path / 'mine.pt'}}}",
        "--outdir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    folder = RunFolder(tmp_path / "runs" / "00000-tiny")
    refined = generators.load(folder.path / "refined.pt")
    expected = generators.load(folder.student).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in refined.state_dict().items())
    assert json.loads((folder.report / "report.json").read_text())["student"]["sha256"]


class Code:
    """An object of code, as torch.save of a whole module has."""


def test_a_checkpoint_with_code_in_it_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    """The sentence names the object, and what to save."""
    torch.save({"g_ema": _of("state/"), "trainer": Code()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"it asks for .*Code.* torch\.save\(network\.state_dict"):
        generators.load(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_program_is_told_what_it_is(tmp_path: Path) -> None:
    """It is refused before any of it runs."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(UserError, match="it is a TorchScript program"):
        generators.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3}, "without a generator: expected a state dict"),
        ([1, 2], "holds no dict of tensors"),
        ({"g_ema": {"a": torch.ones(2)}}, "which none of generators/ knows"),
    ],
)
def test_other_checkpoints_are_named(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=says):
        generators.load(tmp_path / "a.pt")


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_checkpoint_that_is_cut_off_is_named(tmp_path: Path, keep: float) -> None:
    path = _checkpoint(tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"a\.pt is a checkpoint of torch\.save .* cut off"):
        generators.load(path)


def test_widths_of_no_stylegan2_are_refused(tmp_path: Path) -> None:
    state = dict(small_stylegan2(img_resolution=16).state_dict())
    state["synthesis.b8.conv1.weight"] = torch.ones(5, 5, 3, 3)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match="channels: no StyleGAN2's"):
        generators.load(tmp_path / "a.pt")
