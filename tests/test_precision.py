"""bfloat16 and float16 inside the networks: close to float32, float32 outside, and over when
training is.
"""

from __future__ import annotations

import copy
from pathlib import Path

import edm_goldens
import pytest
import torch
from torch import Tensor, nn

from core.distributed import World
from core.precision import Precision, computing_in
from core.protocols import Networks
from core.run_folder import RunFolder
from generators import one_step_edm, stylegan2, stylegan3
from objectives import diff_instruct
from teachers import edm, edm2
from training import loop
from training import state as training_state

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


_LIMITS = {"bfloat16": (0.03, 0.06), "float16": (0.004, 0.008)}
"""Eight and eleven bits: how far images and gradients may be, as a share of their norm."""


@pytest.mark.parametrize("precision", _LIMITS)
@kinds
def test_denoisers_are_close_to_float32(kind: str, precision: Precision) -> None:
    """Images and gradients, which are float32 and not the same."""
    network = denoiser(kind)
    exact, exact_gradient = _image_and_gradient(network)
    with computing_in(precision, [network]):
        found, gradient = _image_and_gradient(network)
    assert found.dtype == gradient.dtype == torch.float32
    of_image, of_gradient = _LIMITS[precision]
    assert 0 < _distance(found, exact) < of_image
    assert 0 < _distance(gradient, exact_gradient) < of_gradient


STUDENTS = {
    "stylegan2": lambda: stylegan2.build(stylegan2.Config(**_SMALL_GAN)),
    "stylegan2, resnet": lambda: stylegan2.build(
        stylegan2.Config(**_SMALL_GAN, architecture="resnet")
    ),
    "stylegan3": lambda: stylegan3.build(stylegan3.Config(**_SMALL_GAN, num_layers=6)),
}
_SMALL_GAN = dict(
    z_dim=16, w_dim=16, c_dim=0, img_resolution=32, img_channels=3, channel_base=512, channel_max=16
)


@pytest.mark.parametrize("precision", _LIMITS)
@pytest.mark.parametrize("kind", STUDENTS)
def test_generators_are_close_to_float32(kind: str, precision: Precision) -> None:
    """Images and gradients, which are float32 and not the same; afterwards all is as it was."""
    torch.manual_seed(0)
    network = STUDENTS[kind]().eval()
    exact, exact_gradient = _made(network)
    with computing_in(precision, [network]):
        found, gradient = _made(network)
    assert found.dtype == gradient.dtype == torch.float32
    of_image, of_gradient = _LIMITS[precision]
    assert 0 < _distance(found, exact) < of_image
    assert 0 < _distance(gradient, exact_gradient) < of_gradient
    assert torch.equal(_made(network)[0], exact)


@pytest.mark.parametrize("kind", STUDENTS)
def test_large_weights_do_not_overflow_float16(kind: str) -> None:
    """Demodulation makes a layer's result independent of its weights' scale; so is float16's."""
    torch.manual_seed(0)
    network = STUDENTS[kind]().eval()
    exact, _ = _made(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and parameter.shape[-1] == 3:
                parameter *= 1e5
                assert "synthesis" in name
    with computing_in("float16", [network]):
        found, _ = _made(network)
    assert _distance(found, exact) < 0.004


def _made(network: nn.Module) -> tuple[Tensor, Tensor]:
    latents = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    image = network(latents)
    network.zero_grad()
    (image * torch.linspace(-1, 1, image.numel()).view_as(image)).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return image.detach(), torch.cat(gradients)


@pytest.mark.parametrize("name", edm_goldens.NAMES)
def test_published_networks_agree_in_bfloat16(name: str) -> None:
    """Each golden, so each preconditioning: images agree to 2 % of their norm and are float32."""
    golden = edm_goldens.read_golden(name)
    network = edm_goldens.load(golden)
    with torch.no_grad(), computing_in("bfloat16", [network]):
        found = edm_goldens.denoise(network, golden.inputs)
    assert found.dtype == torch.float32
    assert 0 < _distance(found, golden.denoised) < 0.02


def test_a_precision_reaches_wrapped_and_shared_networks() -> None:
    """A student's denoiser too, and one that two of the networks share ends as it began."""
    teacher = denoiser("ddpmpp")
    student = one_step_edm.OneStepEDM(teacher, config=one_step_edm.Config())
    exact = student(inputs()[0], inputs()[2])
    with computing_in("bfloat16", [nn.Sequential(student), teacher]):
        assert 0 < _distance(student(inputs()[0], inputs()[2]), exact) < 0.03
        assert student.state_dict().keys() == {f"denoiser.{key}" for key in teacher.state_dict()}
    assert torch.equal(student(inputs()[0], inputs()[2]), exact)


@kinds
def test_the_precision_ends_with_its_block(kind: str) -> None:
    """After the block, also one that failed, the output is float32's bit for bit."""
    network = denoiser(kind)
    before = network(*inputs())
    with pytest.raises(RuntimeError), computing_in("bfloat16", [network]):
        raise RuntimeError
    assert torch.equal(network(*inputs()), before)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def _rounds() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tensor_cores_round_where_it_is_asked_for_and_only_there() -> None:
    """tf32 lets products be rounded, float32 forbids it, whatever held before holds after."""
    before = _rounds()
    with pytest.raises(RuntimeError), computing_in("tf32", []):
        assert _rounds() == (True, True)
        with computing_in("float32", []):
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
    config = loop.Config.model_validate(
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

    loop.train(
        state,
        diff_instruct.build(diff_instruct.Config()),
        config,
        folder=RunFolder.create(path, "precision"),
        world=World(0, 1, 0, torch.device("cpu")),
        measure=measure,
    )
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
