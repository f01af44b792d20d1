"""Properties of the StyleGAN2 student beyond the published numbers, and how its files load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generators
import teachers
from core.errors import UserError
from generators import _layers, stylegan2
from generators.stylegan2 import Config, StyleGAN2
from pretrained import networks
from pretrained.nvidia_pickle import NetworkRecord
from tiny_networks import SMALL_ADA, Generator, assert_close, inputs, small_stylegan2, write

ARCHITECTURES = ("skip", "resnet", "orig")


# Images


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("resolution", [4, 16])
def test_every_parameter_matters(architecture: str, c_dim: int, resolution: int) -> None:
    """Each architecture gives images of its shape, and a finite gradient to every parameter."""
    student = small_stylegan2(architecture=architecture, c_dim=c_dim, img_resolution=resolution)
    images = student(*inputs(student))
    assert images.shape == (4, *student.image_shape) == (4, 3, resolution, resolution)
    assert images.dtype == torch.float32
    images.square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_do_not_see_each_other(architecture: str) -> None:
    """A row of a batch is the image of that latent and label alone."""
    student = small_stylegan2(architecture=architecture, c_dim=3)
    latents, labels = inputs(student)
    together = student(latents, labels)
    for row in range(len(latents)):
        assert_close(student(latents[row : row + 1], labels[row : row + 1])[0], together[row])


def test_latents_and_labels_change_the_image() -> None:
    """Neither is ignored."""
    student = small_stylegan2(c_dim=3)
    latents, labels = inputs(student)
    images = student(latents, labels)
    assert (student(latents.roll(1, 0), labels) - images).abs().amax((1, 2, 3)).min() > 1e-2
    assert (student(latents, (labels + 1) % 3) - images).abs().amax((1, 2, 3)).min() > 1e-2


def test_length_of_a_latent_does_not_matter() -> None:
    """Latents are scaled to unit second moment."""
    student = small_stylegan2()
    latents, _ = inputs(student)
    assert_close(student(7 * latents), student(latents))


def test_a_conditional_student_needs_labels() -> None:
    """Without, the sentence says which labels are needed."""
    student = small_stylegan2(c_dim=3)
    with pytest.raises(UserError, match=r"labels in 0\.\.2 are needed"):
        student(inputs(student)[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_last_changes_nothing(architecture: str) -> None:
    """The faster memory layout gives the same images and gradients."""
    student = small_stylegan2(architecture=architecture)
    other = copy.deepcopy(student).to(memory_format=torch.channels_last)
    images, found = (network(inputs(network)[0]) for network in (student, other))
    assert_close(found, images)
    for result in (images, found):
        result.square().mean().backward()
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-5)


# Noise


def test_images_are_a_function_of_latents_and_labels() -> None:
    """By default noise is constant: torch's generator has no say."""
    student = small_stylegan2()
    latents, _ = inputs(student)
    first = student(latents)
    torch.rand(3)
    assert torch.equal(student(latents), first)


def test_random_noise_is_drawn_anew_for_each_image() -> None:
    """Two calls differ, and so do two rows of the same latent."""
    student = small_stylegan2()
    latents = inputs(student)[0][:1].expand(2, -1)
    first, second = (student(latents, noise_mode="random") for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_noise_has_the_strength_of_each_layer() -> None:
    """Without noise the image is another; with strength 0 all noise modes agree."""
    student = small_stylegan2()
    latents, _ = inputs(student)
    assert (student(latents, noise_mode="none") - student(latents)).abs().max() > 1e-2
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("noise_strength"):
                parameter.zero_()
    silent = student(latents, noise_mode="none")
    assert torch.equal(student(latents), silent)
    assert torch.equal(student(latents, noise_mode="random"), silent)


def test_a_student_without_noise_inputs_has_no_noise() -> None:
    """use_noise false leaves out the parameters and constants too."""
    student = small_stylegan2(use_noise=False)
    latents, _ = inputs(student)
    assert torch.equal(student(latents, noise_mode="random"), student(latents))
    assert not any("noise" in name for name in student.state_dict())


# Layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conv_clamp_bounds_every_activation(architecture: str) -> None:
    """No convolution gives more than the bound (times the resnet's gain), and some would."""
    free, clamped = (small_stylegan2(architecture=architecture, conv_clamp=c) for c in (None, 0.5))
    free_peak, clamped_peak = (max(_peaks(student)) for student in (free, clamped))
    assert free_peak > 0.5 + 1e-3 and clamped_peak <= 0.5


def _peaks(student: StyleGAN2) -> list[float]:
    """Return the largest magnitude that each convolution gives."""
    peaks: list[float] = []
    for module in student.modules():
        if isinstance(module, stylegan2.StyledConvolution | stylegan2.ToImage):
            module.register_forward_hook(
                lambda *io: peaks.append(io[2].detach().abs().max().item())
            )
    student(inputs(student)[0])
    return peaks


def test_demodulated_features_have_unit_variance_for_unit_inputs() -> None:
    """The 3x3 convolution of white noise by any style and weights keeps variance 1."""
    torch.manual_seed(0)
    student = small_stylegan2(img_resolution=4, channel_max=32)
    layer = student.synthesis.b4.conv1
    style = layer.affine(torch.randn(2, 6))
    x = torch.randn(2, 32, 64, 64) * style[:, :, None, None]
    y = nn.functional.conv2d(x, 5 * layer.weight)  # the scale of the weights drops out
    y = y * _layers.demodulation(style, 5 * layer.weight)[:, :, None, None]
    assert (y.var((0, 2, 3)) - 1).abs().max() < 0.15


def test_w_is_the_same_for_every_layer_without_truncation() -> None:
    """[N, num_ws, w_dim]: two for each resolution."""
    student = small_stylegan2()
    ws = student.mapping(inputs(student)[0])
    assert ws.shape == (4, 6, 6) and torch.equal(ws, ws[:, :1].expand_as(ws))


class _Largest(TorchDispatchMode):
    """Notes the most elements that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


def test_no_sample_has_weights_of_its_own() -> None:
    """Forward and backward never make a tensor of N weights, [N, out, in, 3, 3], nor half of it."""
    count, channels = 16, 64
    student = small_stylegan2(img_resolution=8, channel_max=channels)
    latents, _ = inputs(student, count)
    with _Largest() as largest:
        student(latents).square().sum().backward()
    weights = channels * channels * 9
    assert weights <= largest.elements < count * weights / 2


# Truncation


def test_truncation_moves_w_towards_the_average() -> None:
    """w_avg + psi (w - w_avg): 1 is no change, and 0 gives every latent the average's image."""
    student = small_stylegan2()
    student.mapping.w_avg.copy_(torch.randn(6))
    latents, _ = inputs(student)
    average = student.synthesis(student.mapping.w_avg.expand(1, 6, 6))
    truncated = student(latents, truncation=0.0)
    assert_close(truncated, average.expand_as(truncated))
    assert torch.equal(student(latents, truncation=1.0), student(latents))
    full, half = (student.mapping(latents, truncation=psi) for psi in (1.0, 0.5))
    assert_close(half, (full + student.mapping.w_avg) / 2)


def test_truncation_can_spare_the_finer_layers() -> None:
    """With truncated_ws 2 the first two of the ws are truncated, the others not."""
    student = small_stylegan2()
    latents, _ = inputs(student)
    full = student.mapping(latents)
    some = student.mapping(latents, truncation=0.5, truncated_ws=2)
    assert_close(some[:, :2], full[:, :2] / 2)  # w_avg is 0 in a fresh student
    assert torch.equal(some[:, 2:], full[:, 2:])


@pytest.mark.parametrize("c_dim", [0, 3])
def test_settling_sets_the_average_to_the_mean_w(c_dim: int) -> None:
    """w_avg is the mean over other latents too, to 5 standard errors, and twice the same."""
    student = small_stylegan2(c_dim=c_dim)
    student.update_w_avg()
    settled = student.mapping.w_avg.clone()
    with torch.no_grad():
        w = student.mapping.one(*inputs(student, 9000))
    assert ((settled - w.mean(0)).abs() < 5 * w.std(0) * (2 / 9000) ** 0.5).all()
    torch.rand(3)
    student.update_w_avg()
    assert torch.equal(student.mapping.w_avg, settled)


# Files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_student_loads_again(tmp_path: Path, architecture: str) -> None:
    """`generators.load` gives the same images, in eval mode, from the file alone."""
    student = small_stylegan2(
        architecture=architecture, c_dim=3, conv_clamp=256.0, mapping={"num_layers": 2}
    ).train()
    path = tmp_path / "student.safetensors"
    networks.save(path, student)
    loaded = generators.load(path)
    assert not loaded.training and loaded.config == student.config
    assert torch.equal(loaded(*inputs(student)), student(*inputs(student)))


def test_a_student_is_no_teacher(tmp_path: Path) -> None:
    """A file of one kind given as the other is refused by the name of its family."""
    networks.save(tmp_path / "student.safetensors", small_stylegan2())
    with pytest.raises(UserError, match="stylegan2"):
        teachers.load(tmp_path / "student.safetensors")


CONST = {"synthesis.b4.const": torch.zeros(8, 4, 4)}
"""What tells StyleGAN2 from the other generators."""
PUBLISHED_ADA = {
    "z_dim": 512,
    "w_dim": 512,
    "mapping_kwargs": {"num_layers": 2, "w_avg_beta": 0.995},
    "synthesis_kwargs": {
        "channel_base": 16384,
        "channel_max": 512,
        "num_fp16_res": 4,
        "conv_clamp": 256,
    },
    "c_dim": 0,
    "img_resolution": 256,
    "img_channels": 3,
}
"""As StyleGAN2-ADA (PyTorch) writes them, where keyword arguments of the synthesis are nested."""


def record(
    arguments: dict[str, object], *, tensors: dict[str, Tensor] = CONST, class_name="Generator"
) -> NetworkRecord:
    return NetworkRecord(class_name, arguments=arguments, tensors=tensors)


def test_published_ada_arguments_are_understood() -> None:
    """Sizes, clamp and mapping depth are taken; what is about speed or training is left."""
    expected = Config(
        z_dim=512,
        w_dim=512,
        c_dim=0,
        img_resolution=256,
        img_channels=3,
        channel_base=16384,
        channel_max=512,
        conv_clamp=256,
        mapping=stylegan2.MappingConfig(num_layers=2),
    )
    assert stylegan2.from_record(record(PUBLISHED_ADA)) == expected


def test_arguments_of_the_stylegan3_repository_are_understood() -> None:
    """There the synthesis arguments stand beside the others."""
    flat = {k: v for k, v in PUBLISHED_ADA.items() if k != "synthesis_kwargs"}
    flat |= {**PUBLISHED_ADA["synthesis_kwargs"], "fused_modconv_default": "inference_only"}
    assert stylegan2.from_record(record(flat)) == stylegan2.from_record(record(PUBLISHED_ADA))


def test_positional_arguments_are_understood() -> None:
    """Generator(z_dim, c_dim, w_dim, img_resolution, img_channels)."""
    found = stylegan2.from_record(
        NetworkRecord("Generator", positional=(64, 10, 32, 16, 1), tensors=CONST)
    )
    assert found == Config(z_dim=64, c_dim=10, w_dim=32, img_resolution=16, img_channels=1)


@pytest.mark.parametrize(
    ("class_name", "tensors"),
    [
        ("Generator", {"synthesis.input.weight": torch.zeros(8, 8)}),  # StyleGAN3
        ("Generator", {"Model.MainLayers.0.Layers.0.Basis": torch.zeros(8, 4, 4)}),  # R3GAN
        ("Discriminator", CONST),
    ],
)
def test_other_networks_are_left_to_their_families(
    class_name: str, tensors: dict[str, Tensor]
) -> None:
    """Arguments that would fit StyleGAN2 do not make a network one: its tensors do."""
    given = record(PUBLISHED_ADA, tensors=tensors, class_name=class_name)
    assert stylegan2.from_record(given) is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"synthesis_kwargs": {"magic": 1}}, "magic"),
        ({"img_resolution": 24}, "24 is not a power of two"),
        ({"mapping_kwargs": {"num_layers": 0}}, "num_layers"),
    ],
)
def test_arguments_that_no_stylegan2_has_are_refused(
    arguments: dict[str, object], complaint: str
) -> None:
    """Nothing that might change images is dropped in silence."""
    with pytest.raises(UserError, match=complaint):
        stylegan2.from_record(record(PUBLISHED_ADA | arguments))


def test_a_published_pickle_loads(tmp_path: Path) -> None:
    """G_ema of a network-snapshot gives the images of the network it was made from."""
    student = small_stylegan2(c_dim=3)
    published = Generator(student.state_dict(), **SMALL_ADA)
    path = write(tmp_path / "network-snapshot.pkl", G=None, G_ema=published)
    loaded = generators.load(path)
    assert torch.equal(loaded(*inputs(student)), student(*inputs(student)))


def test_the_trained_generator_is_taken_where_there_is_no_average(tmp_path: Path) -> None:
    """A pickle with G alone loads; with both, G_ema is the one."""
    trained, average = small_stylegan2(c_dim=3), small_stylegan2(c_dim=3)
    average.synthesis.b4.const.data.add_(1)
    state = {name: network.state_dict() for name, network in (("G", trained), ("A", average))}
    alone = write(tmp_path / "alone.pkl", G=Generator(state["G"], **SMALL_ADA))
    both = write(
        tmp_path / "both.pkl",
        G=Generator(state["G"], **SMALL_ADA),
        G_ema=Generator(state["A"], **SMALL_ADA),
    )
    for path, expected in ((alone, trained), (both, average)):
        assert torch.equal(generators.load(path).synthesis.b4.const, expected.synthesis.b4.const)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"img_resolution": 32}, "its tensors are not those of a stylegan2 network.*b32"),
        ({"c_dim": 4}, "its tensors are not those of a stylegan2 network.*embed"),
        ({"magic": 1}, "snapshot.pkl: its Generator has 1 to correct"),
    ],
)
def test_a_published_pickle_that_does_not_fit_itself_is_named(
    tmp_path: Path, changed: dict[str, object], complaint: str
) -> None:
    """Arguments and tensors that disagree give one sentence with the path."""
    published = Generator(small_stylegan2(c_dim=3).state_dict(), **SMALL_ADA | changed)
    path = write(tmp_path / "snapshot.pkl", G_ema=published)
    with pytest.raises(UserError, match=complaint) as error:
        generators.load(path)
    assert str(path) in str(error.value)


def test_a_generator_of_no_known_family_is_named(tmp_path: Path) -> None:
    """A published network whose tensors no family knows lists the families there are."""
    other = Generator({"Model.MainLayers.0.Layers.0.Basis": torch.zeros(8, 4, 4)})
    path = write(tmp_path / "other.pkl", G_ema=other)
    with pytest.raises(
        UserError, match=r"class Generator, which none of generators/ knows: .*gan2"
    ):
        generators.load(path)
