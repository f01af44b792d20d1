"""Properties of the StyleGAN3 students beyond the published numbers, and how their files load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import generators
from core.errors import UserError
from custom_ops import backend
from generators import stylegan2, stylegan3
from generators.stylegan3 import Config, StyleGAN3
from pretrained import networks
from pretrained.nvidia_pickle import NetworkRecord
from tiny_networks import Generator, assert_close, inputs, write

SMALL = {
    "z_dim": 8,
    "c_dim": 0,
    "w_dim": 6,
    "img_resolution": 16,
    "img_channels": 3,
    "channel_max": 6,
    "num_layers": 4,
    "margin_size": 4,
}
RADIAL = {"conv_kernel": 1, "use_radial_filters": True}
SHAPES = {
    "T": {},
    "R": RADIAL,
    "conditional": {"c_dim": 3},
    "grey": {"img_channels": 1},
    "no critical layer": {"num_critical": 0},
    "no margin": {"margin_size": 0},
    "no finer ReLU": {"lrelu_upsampling": 1},
    "no clamp, 4 taps": {"conv_clamp": None, "filter_size": 4, **RADIAL},
}


def built(**settings: object) -> StyleGAN3:
    """Return a small student in eval mode, its affine layers and biases not as in a fresh one."""
    torch.manual_seed(0)
    student = stylegan3.build(Config.model_validate(SMALL | settings)).eval()
    with torch.no_grad():
        student.synthesis.input.affine.weight.normal_()
        for name, buffer in student.named_buffers():
            if name.endswith("magnitude_ema"):
                buffer.fill_(0.6)
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return student


def magnitudes(student: StyleGAN3) -> dict[str, Tensor]:
    state = student.state_dict()
    return {name: state[name].clone() for name in state if name.endswith("magnitude_ema")}


# Images


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_matters(shape: str) -> None:
    """Each configuration gives images of its shape, and a finite gradient to every parameter."""
    student = built(**SHAPES[shape])
    images = student(*inputs(student))
    assert images.shape == (4, SHAPES[shape].get("img_channels", 3), 16, 16)
    assert images.dtype == torch.float32
    images.square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_native_kernels_and_reference_agree(shape: str) -> None:
    """Images are the same under both kernel policies."""
    student = built(**SHAPES[shape])
    with backend.using("reference"):
        expected = student(*inputs(student))
    assert_close(student(*inputs(student)), expected)


@pytest.mark.parametrize("settings", [{}, RADIAL])
def test_images_do_not_see_each_other(settings: dict[str, object]) -> None:
    """A row of a batch is the image of that latent and label alone; other rows have others."""
    student = built(c_dim=3, **settings)
    latents, labels = inputs(student)
    together = student(latents, labels)
    for row in range(len(latents)):
        assert_close(student(latents[row : row + 1], labels[row : row + 1])[0], together[row])
    for other in (student(latents.roll(1, 0), labels), student(latents, (labels + 1) % 3)):
        assert (other - together).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_translation_moves_the_image() -> None:
    """The transform two pixels to the right: the image of before, there, to a tenth."""
    student = built()
    latents, _ = inputs(student)
    before = student(latents)
    student.synthesis.input.transform[0, 2] = -2 / 16
    moved = student(latents)
    apart = (moved - before).std()
    assert (moved[..., 2:] - before[..., :-2]).std() < 0.1 * apart
    assert (moved[..., :-2] - before[..., 2:]).std() > apart


# The moving average of magnitudes


@pytest.mark.parametrize("training", [False, True])
def test_images_are_a_function_of_latents(training: bool) -> None:
    """In either mode a plain call repeats exactly and changes no buffer."""
    student = built().train(training)
    latents, _ = inputs(student)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    first = student(latents)
    torch.rand(3)
    assert torch.equal(student(latents), first)
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_magnitudes_move_when_asked() -> None:
    """beta 1 keeps them; beta 0 takes this batch's mean square, before the layer divides by it."""
    kept, taken = (built(magnitude_ema_beta=beta).train() for beta in (1.0, 0.0))
    latents, _ = inputs(kept)
    before = magnitudes(kept)
    kept(latents, update_magnitudes=True)
    assert magnitudes(kept) == before
    seen: dict[str, Tensor] = {}
    for name in taken.synthesis.layers:
        layer = taken.synthesis.get_submodule(name)
        layer.register_forward_hook(
            lambda _, given, __, name=name: seen.update({name: given[0].square().mean()})
        )
    taken(latents, update_magnitudes=True)
    for name, mean_square in seen.items():
        assert_close(magnitudes(taken)[f"synthesis.{name}.magnitude_ema"], mean_square.detach())
    assert len(seen) == SMALL["num_layers"] + 1


# Files


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_student_loads_again(tmp_path: Path, shape: str) -> None:
    """`generators.load` gives the same images, in eval mode, from the file alone."""
    student = built(**SHAPES[shape]).train()
    networks.save(tmp_path / "student.safetensors", student)
    loaded = generators.load(tmp_path / "student.safetensors")
    assert not loaded.training and loaded.config == student.config
    assert torch.equal(loaded(*inputs(student)), student(*inputs(student)))


@pytest.mark.parametrize("settings", [{}, RADIAL])
def test_a_published_pickle_loads(tmp_path: Path, settings: dict[str, object]) -> None:
    """G_ema gives the images of the network it was made from; arguments about speed are left."""
    student = built(c_dim=3, mapping={"num_layers": 2}, **settings)
    arguments = SMALL | settings | {"c_dim": 3, "num_fp16_res": 4, "mapping_kwargs": {}}
    published = Generator(student.state_dict(), **arguments)
    loaded = generators.load(write(tmp_path / "network.pkl", G=None, G_ema=published))
    assert torch.equal(loaded(*inputs(student)), student(*inputs(student)))


def record(tensor: str, **settings: object) -> NetworkRecord:
    arguments = SMALL | settings
    return NetworkRecord("Generator", arguments=arguments, tensors={tensor: torch.zeros(1)})


def test_each_family_takes_its_own() -> None:
    """The tensors tell: arguments and class name can be the same."""
    ours, other = record("synthesis.input.freqs"), record("synthesis.b4.const")
    assert stylegan3.from_record(ours) is not None and stylegan2.from_record(ours) is None
    assert stylegan3.from_record(other) is None
    discriminator = NetworkRecord("Discriminator", arguments=SMALL, tensors=ours.tensors)
    assert stylegan3.from_record(discriminator) is None


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"magic": 1}, "magic"),
        ({"img_resolution": 24}, "24 is not a power of two"),
        ({"num_critical": 4}, "num_critical"),
    ],
)
def test_arguments_that_no_stylegan3_has_are_refused(
    settings: dict[str, object], complaint: str
) -> None:
    """Nothing that might change images is dropped in silence."""
    with pytest.raises(UserError, match=complaint):
        stylegan3.from_record(record("synthesis.input.freqs", **settings))
