"""bfloat16 and float16 inside the networks: close to float32, float32 outside, and over when
training is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edm_goldens
import generators
from core.distributed import World
from core.precision import DTYPES, Precision, compute_precision
from core.roles import Networks
from core.run_folder import RunFolder
from custom_ops import backend
from custom_ops.bias_act import bias_act
from custom_ops.filtered_lrelu import filtered_lrelu
from custom_ops.upfirdn2d import upfirdn2d
from generators import one_step_edm, stylegan2, stylegan3
from objectives import diff_instruct
from student_goldens import STUDENTS as PUBLISHED_STUDENTS
from student_goldens import load_student
from teachers import edm, edm2
from training import state as training_state
from training import trainer

EMBEDDED = "assets/mnist32/student.safetensors"
SMALL = {"img_resolution": 8, "img_channels": 3, "label_dim": 4}
UNET = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)}
KINDS = {
    "ddpmpp": {"model_type": "SongUNet"},
    "ncsnpp": {"model_type": "SongUNet", "channel_mult_noise": 2, **NCSNPP},
    "adm": {"model_type": "DhariwalUNet", "attn_resolutions": ()},
}


def denoiser(kind: str) -> nn.Module:
    """Return a small denoiser; the layers that begin at zero are drawn, so that all count."""
    torch.manual_seed(0)
    if kind == "edm2":
        small = edm2.Config(**SMALL, model_channels=32, channel_mult=(1, 2), num_blocks=1)
        network: nn.Module = edm2.build(small)
    else:
        network = edm.build(edm.Config.model_validate(SMALL | UNET | KINDS[kind]))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.fill_(0.5)
    return network.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(4, 3, 8, 8, generator=generator)
    return noisy, torch.tensor([0.05, 0.3, 1.0, 5.0]), torch.arange(4)


kinds = pytest.mark.parametrize("kind", [*KINDS, "edm2"])


_DENOISER_LIMITS = {"bfloat16": (0.03, 0.06), "float16": (0.004, 0.008)}
"""Eight and eleven bits: how far images and gradients may be, as a share of their norm."""


@pytest.mark.parametrize("precision", _DENOISER_LIMITS)
@kinds
def test_denoisers_are_close_to_float32(kind: str, precision: Precision) -> None:
    """Images and gradients, which are float32 and not the same."""
    network = denoiser(kind)
    exact, exact_gradient = _image_and_gradient(network)
    with compute_precision(precision, [network]):
        found, gradient = _image_and_gradient(network)
    assert found.dtype == gradient.dtype == torch.float32
    of_image, of_gradient = _DENOISER_LIMITS[precision]
    assert 0 < _distance(found, exact) < of_image
    assert 0 < _distance(gradient, exact_gradient) < of_gradient


STUDENTS: dict[str, Callable[..., nn.Module]] = {
    "stylegan2": lambda **more: stylegan2.build(stylegan2.Config(**_SMALL_GAN, **more)),
    "stylegan2, resnet": lambda **more: stylegan2.build(
        stylegan2.Config(**_SMALL_GAN, architecture="resnet", **more)
    ),
    "stylegan3": lambda **more: stylegan3.build(
        stylegan3.Config(**_SMALL_GAN, **_FROM_4X4, num_layers=6, **more)
    ),
}
_SMALL_GAN = dict(
    z_dim=16, w_dim=16, c_dim=0, img_resolution=32, img_channels=3, channel_base=512, channel_max=16
)
_FROM_4X4 = {"first_cutoff": 1.0, "first_stopband": 2.0}
_LOWERED = {
    "stylegan2": {"b16.conv0", "b16.conv1", "b32.conv0", "b32.conv1"},
    "stylegan2, resnet": {f"b{r}.{part}" for r in (16, 32) for part in ("conv0", "conv1", "skip")},
    "stylegan3": {"L2_36_16", "L3_52_16", "L4_52_16", "L5_32_16"},
}
_LIMITS = {"bfloat16": (0.02, 0.02), "float16": (0.0025, 0.005)}
"""Eight and eleven bits: how far images and gradients may be, as a share of their norm."""
_LIMITS_OF_DIGITS = [("bfloat16", 0.01, 0.04), ("float16", 0.0015, 0.003)]

students = pytest.mark.parametrize("kind", STUDENTS)
precisions = pytest.mark.parametrize("precision", _LIMITS)


def student(kind: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return STUDENTS[kind](**more).eval()


def modulated(network: nn.Module) -> list[nn.Module]:
    """Return the layers whose results are demodulated."""
    kinds = (stylegan2.StyledConvolution, stylegan3.FilteredConvolution)
    return [module for module in network.modules() if isinstance(module, kinds)]


@precisions
@students
def test_generators_are_close_to_float32(kind: str, precision: Precision) -> None:
    """Images and gradients, which are float32 and not the same; afterwards all is as it was."""
    network = student(kind)
    exact, exact_gradient = _made(network)
    with compute_precision(precision, [network]):
        found, gradient = _made(network)
    assert found.dtype == gradient.dtype == torch.float32
    of_image, of_gradient = _LIMITS[precision]
    assert 0 < _distance(found, exact) < of_image
    assert 0 < _distance(gradient, exact_gradient) < of_gradient
    assert torch.equal(_made(network)[0], exact)


@pytest.mark.parametrize(("precision", "of_image", "of_gradient"), _LIMITS_OF_DIGITS)
def test_the_embedded_student_is_close_to_float32(
    precision: Precision, of_image: float, of_gradient: float
) -> None:
    """Images agree to 1 % and 0.15 % of their norm, gradients to 4 % and 0.3 %."""
    network = generators.load(EMBEDDED).eval()
    exact, exact_gradient = _made(network)
    with compute_precision(precision, [network]):
        found, gradient = _made(network)
    assert 0 < _distance(found, exact) < of_image
    assert 0 < _distance(gradient, exact_gradient) < of_gradient


@pytest.mark.parametrize("name", PUBLISHED_STUDENTS)
def test_published_generators_agree_in_bfloat16(name: str) -> None:
    """Each golden: images agree to 2 % of their norm and are float32."""
    network, golden, latents, labels = load_student(name)
    with torch.no_grad(), compute_precision("bfloat16", [network.eval()]):
        found = network(latents, labels)
    assert found.dtype == torch.float32
    assert 0 < _distance(found, torch.as_tensor(golden["out/image"])) < 0.02


@precisions
@students
def test_only_features_from_16x16_on_are_lowered(kind: str, precision: Precision) -> None:
    """Mapping, styles and what is added up to the image stay float32."""
    network, met = student(kind), {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *hooked, name=name: met.update({name: hooked[2]}))
    with torch.no_grad(), compute_precision(precision, [network]):
        network(torch.zeros(1, 16))
    types = {name: out.dtype for name, out in met.items() if isinstance(out, Tensor)}
    low = {name for name, dtype in types.items() if dtype != torch.float32}
    assert low == {f"synthesis.{name}" for name in _LOWERED[kind]}
    assert {types[name] for name in low} == {DTYPES[precision]}


@students
def test_large_weights_and_styles_do_not_overflow_float16(kind: str) -> None:
    """Demodulation makes a layer's result independent of their scale; so is float16's."""
    network = student(kind)
    exact, _ = _made(network)
    with torch.no_grad():
        for layer in modulated(network):
            for parameter in (layer.weight, *layer.affine.parameters()):
                parameter *= 1e5
    with compute_precision("float16", [network]):
        found, _ = _made(network)
    assert _distance(found, exact) < 0.004


@precisions
@pytest.mark.parametrize("kind", ["stylegan2", "stylegan3"])
@pytest.mark.parametrize("dead", ["channel", "style"])
def test_what_is_zero_stays_zero(dead: str, kind: str, precision: Precision) -> None:
    """A channel without weights, a layer without styles: an image as in float32, not NaN.

    Their gradients are 10^4 times larger than others, as demodulation says, so float16's overflow.
    """
    network = student(kind)
    with torch.no_grad():
        for layer in modulated(network)[-2:]:
            for parameter in [layer.weight[0]] if dead == "channel" else layer.affine.parameters():
                parameter.zero_()
            layer.bias.fill_(0.5)
    exact, _ = _made(network)
    with compute_precision(precision, [network]):
        found, gradient = _made(network)
    assert _distance(found, exact) < _LIMITS[precision][0]
    assert precision == "float16" or gradient.isfinite().all()


@pytest.mark.parametrize("clamp", [None, 0.5])
@students
def test_float16_features_end_at_256(kind: str, clamp: float | None) -> None:
    """As in the published half-precision layers; elsewhere only a conv_clamp ends them."""
    network, largest = student(kind, conv_clamp=clamp), []
    layer = modulated(network)[-1]
    with torch.no_grad():
        layer.bias.fill_(1000)
    layer.register_forward_hook(lambda *hooked: largest.append(hooked[2].max().item()))
    for precision in ("float32", "bfloat16", "float16"):
        with torch.no_grad(), compute_precision(precision, [network]):
            network(torch.zeros(1, 16))
    if clamp is None:
        assert min(largest[:2]) > 500 and 150 < largest[2] < 280
    else:
        assert max(largest) < 0.6


def _made(network: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *network.latent_shape, generator=generator)
    image = network(latents, torch.arange(2) if network.num_classes else None)
    network.zero_grad()
    (image * torch.linspace(-1, 1, image.numel()).view_as(image)).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return image.detach(), torch.cat(gradients)


OPERATIONS = {
    "bias_act": lambda x, b, f: bias_act(x, b, act="lrelu", clamp=1.5),
    "upfirdn2d": lambda x, b, f: upfirdn2d(x, f, up=2, padding=5),
    "filtered_lrelu": lambda x, b, f: filtered_lrelu(x, f, f, b, up=2, down=2, padding=9),
}


@pytest.mark.parametrize("policy", ["native", "reference"])
@precisions
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_round_only_their_results(
    operation: str, precision: Precision, policy: backend.KernelPolicy
) -> None:
    """On a CPU they are those of float32, filter and bias included; so are the gradients."""
    torch.manual_seed(0)
    low, b, f = torch.randn(2, 3, 8, 8).to(DTYPES[precision]), torch.randn(3), torch.rand(12) / 6
    results = []
    for x in (low, low.float()):
        leaves = x.clone().requires_grad_(), b.clone().requires_grad_()
        with backend.using(policy):
            out = OPERATIONS[operation](*leaves, f)
            probe = torch.arange(out.numel()).view_as(out).remainder(3).to(out.dtype)
            results.append((out, *torch.autograd.grad(out, leaves, probe, materialize_grads=True)))
    for found, exact in zip(*results, strict=True):
        assert torch.equal(found, exact.to(found.dtype))
    assert [tensor.dtype for tensor in results[0]] == [low.dtype, low.dtype, torch.float32]


@pytest.mark.parametrize("name", edm_goldens.NAMES)
def test_published_networks_agree_in_bfloat16(name: str) -> None:
    """Each golden, so each preconditioning: images agree to 2 % of their norm and are float32."""
    golden = edm_goldens.read_golden(name)
    network = edm_goldens.load(golden)
    with torch.no_grad(), compute_precision("bfloat16", [network]):
        found = edm_goldens.denoise(network, golden.inputs)
    assert found.dtype == torch.float32
    assert 0 < _distance(found, golden.denoised) < 0.02


def test_a_precision_reaches_wrapped_and_shared_networks() -> None:
    """A student's denoiser too, and one that two of the networks share ends as it began."""
    teacher = denoiser("ddpmpp")
    student = one_step_edm.OneStepEDM(teacher, config=one_step_edm.Config())
    exact = student(inputs()[0], inputs()[2])
    with compute_precision("bfloat16", [nn.Sequential(student), teacher]):
        assert 0 < _distance(student(inputs()[0], inputs()[2]), exact) < 0.03
        assert student.state_dict().keys() == {f"denoiser.{key}" for key in teacher.state_dict()}
    assert torch.equal(student(inputs()[0], inputs()[2]), exact)


@kinds
def test_the_precision_ends_with_its_block(kind: str) -> None:
    """After the block, also one that failed, the output is float32's bit for bit."""
    network = denoiser(kind)
    before = network(*inputs())
    with pytest.raises(RuntimeError), compute_precision("bfloat16", [network]):
        raise RuntimeError
    assert torch.equal(network(*inputs()), before)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def _rounds() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tensor_cores_round_where_it_is_asked_for_and_only_there() -> None:
    """tf32 lets products be rounded, float32 forbids it, whatever held before holds after."""
    before = _rounds()
    with pytest.raises(RuntimeError), compute_precision("tf32", []):
        assert _rounds() == (True, True)
        with compute_precision("float32", []):
            assert _rounds() == (False, False)
        assert _rounds() == (True, True)
        raise RuntimeError
    assert _rounds() == before


def test_training_in_bfloat16_leaves_float32_weights_that_are_measured_in_float32(
    tmp_path: Path,
) -> None:
    """The loop computes in it while it trains, not while it measures; the weights move likewise."""
    exact, seen = _trained("float32", tmp_path / "exact")
    lower, seen_lower = _trained("bfloat16", tmp_path / "lower")
    assert seen == seen_lower == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in lower.parameters())
    begun = _vector(one_step(denoiser("ddpmpp")))
    moved, moved_lower = _vector(exact) - begun, _vector(lower) - begun
    assert 0 < float((moved - moved_lower).norm() / moved.norm()) < 0.3


def one_step(teacher: nn.Module) -> nn.Module:
    return one_step_edm.from_teacher(teacher, one_step_edm.Config())


def _trained(precision: str, path: Path) -> tuple[nn.Module, set[torch.dtype]]:
    """Return a distilled student and the precisions that a measurement met."""
    teacher = denoiser("ddpmpp")
    networks = Networks(one_step(teacher), copy.deepcopy(teacher), teacher)
    config = trainer.Config.model_validate(
        {"duration_kimg": 0.016, "batch_size": 4, "student_lr": 1e-3, "precision": precision}
        | {"optimizer": {"name": "SGD"}, "ema_halflife_kimg": 0}
    )
    state = training_state.start(
        networks, student_lr=1e-3, score_lr=1e-3, optimizer=config.optimizer
    )
    met = set()

    def measure(now: training_state.TrainState) -> dict[str, float]:
        met.update({now.student_ema.denoiser.compute_dtype, now.networks.teacher.compute_dtype})
        return {}

    trainer.Trainer(
        state,
        diff_instruct.build(diff_instruct.Config()),
        config,
        folder=RunFolder.create(path, "precision"),
        world=World.single(),
        evaluate=measure,
    ).train()
    return networks.student, met


def _image_and_gradient(network: nn.Module) -> tuple[Tensor, Tensor]:
    noisy, sigma, labels = inputs()
    noisy.requires_grad_()
    image = network(noisy, sigma, labels)
    weights = torch.linspace(-1, 1, image.numel()).view_as(image)
    network.zero_grad()
    (image * weights).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return image.detach(), torch.cat([noisy.grad.flatten(), *gradients])


def _vector(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def _distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()
