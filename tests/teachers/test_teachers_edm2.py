"""EDM2 denoisers against the published numbers, their magnitudes, and a copy in training."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

import teachers
from core.distributed import World
from core.errors import UserError
from core.roles import Networks
from core.run_folder import RunFolder
from edm_goldens import assert_close, read_arrays
from generators import one_step_edm
from objectives import diff_instruct
from pretrained import networks
from pretrained.nvidia_pickle import NetworkRecord
from repository import GOLDENS
from teachers._mp_layers import MPConv, mp_cat, mp_silu, mp_sum, resampled
from teachers.edm2 import Block, Config, EDM2Denoiser, build, from_record
from training import checkpoint, trainer
from training.state import TrainState, start

NAME = "edm2-cond10-16"
TINY = Config(
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=8,
)
LEVELS = torch.tensor([0.1, 1.0, 10.0])


def tiny_denoiser(**settings: object) -> EDM2Denoiser:
    """Return a small denoiser whose every weight matters, in eval mode."""
    torch.manual_seed(0)
    denoiser = build(Config.model_validate(TINY.model_dump() | settings)).eval()
    for name, parameter in denoiser.named_parameters():
        if name.endswith("gain"):
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return denoiser


def noisy_images(channels: int = 1) -> Tensor:
    """Return images with noise of LEVELS [3, channels, 8, 8]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, channels, 8, 8, generator=generator) * LEVELS[:, None, None, None].add(1)


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in module.state_dict().items()}


def layers(denoiser: nn.Module) -> list[MPConv]:
    return [module for module in denoiser.modules() if isinstance(module, MPConv)]


def stored_rms(layer: MPConv) -> Tensor:
    """Return the root mean square of each output's stored weights."""
    return layer.weight.detach().flatten(1).square().mean(1).sqrt()


def rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


# Goldens


class Golden(NamedTuple):
    """The golden network with its weights, its inputs, and what it computes."""

    denoiser: EDM2Denoiser
    inputs: dict[str, Tensor]
    denoised: Tensor

    def denoise(self) -> Tensor:
        labels = self.inputs["labels"].argmax(dim=1)
        return self.denoiser(self.inputs["x"], self.inputs["sigma"], labels)


@pytest.fixture
def golden() -> Golden:
    with np.load(GOLDENS / f"{NAME}.npz") as archive:
        arguments = json.loads(str(archive["meta"]))["kwargs"]
    denoiser = build(Config.model_validate(arguments)).eval()
    denoiser.load_state_dict(read_arrays(NAME, "state"), strict=True)
    return Golden(denoiser, read_arrays(NAME, "in"), read_arrays(NAME, "out")["denoised"])


def test_state_keys_and_shapes_are_the_published_ones(golden: Golden) -> None:
    """A built denoiser has exactly the published tensors, buffers and unused head included."""
    ours = {key: tensor.shape for key, tensor in golden.denoiser.state_dict().items()}
    assert ours == {key: tensor.shape for key, tensor in read_arrays(NAME, "state").items()}


def test_denoised_matches_the_published_implementation(golden: Golden) -> None:
    """D(x; sigma, labels) equals the golden image."""
    with torch.no_grad():
        assert_close(golden.denoise(), golden.denoised)


def test_parameter_gradients_match_the_published_implementation(golden: Golden) -> None:
    """The gradients of (denoised * probe).sum() equal the golden ones."""
    (golden.denoise() * golden.inputs["probe"]).sum().backward()
    parameters = dict(golden.denoiser.named_parameters())
    expected = read_arrays(NAME, "grad")
    assert expected
    for key, gradient in expected.items():
        found = parameters[key].grad
        assert found is not None
        assert_close(found, gradient)


def test_channels_last_changes_nothing(golden: Golden) -> None:
    """The faster memory layout gives the same image."""
    golden.denoiser.to(memory_format=torch.channels_last)
    golden.inputs["x"] = golden.inputs["x"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(golden.denoise(), golden.denoised)


# Magnitudes


def test_silu_keeps_the_mean_square() -> None:
    """The mean square of mp_silu over the unit normal law is 1, to the constant's three digits."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    values = mp_silu(torch.from_numpy(points)).square()
    mean_square = float((values * torch.from_numpy(weights)).sum()) / math.sqrt(2 * math.pi)
    assert mean_square == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9])
def test_sums_and_concatenations_keep_magnitude_and_balance(t: float) -> None:
    """Unit inputs give unit outputs, with shares of the mean square as (1 - t)^2 to t^2."""
    torch.manual_seed(0)
    first, second = torch.randn(4, 96, 32, 32), torch.randn(4, 32, 32, 32)
    share = t**2 / ((1 - t) ** 2 + t**2)
    assert rms(mp_sum(first[:, :32], second, t=t)) == pytest.approx(1.0, abs=0.01)
    both = mp_cat(first, second, t=t)
    assert rms(both) == pytest.approx(1.0, abs=0.01)
    assert rms(both[:, 96:]) ** 2 * 32 / 128 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 300.0])
def test_layers_keep_the_magnitude_whatever_the_weights(
    kernel: tuple[int, ...], scale: float
) -> None:
    """Unit normal inputs come out at the gain, however large the stored weights have become."""
    torch.manual_seed(0)
    layer = MPConv(64, 256, kernel=kernel).eval()
    with torch.no_grad():
        layer.weight.mul_(scale * torch.rand(256, *[1] * (layer.weight.ndim - 1)).add(0.5))
    inputs = torch.randn(512, 64) if kernel == () else torch.randn(8, 64, 16, 16)
    outputs = layer(inputs, gain=torch.tensor(3.0))
    inner = outputs if kernel == () else outputs[:, :, 1:-1, 1:-1]
    assert rms(inner) == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("kind", ["up", "down"])
def test_box_resampling_equals_the_general_filter(kind: str) -> None:
    """Pooling and repeating equal the depthwise convolutions with taps 2, 2."""
    features = torch.randn(2, 3, 6, 6)
    short, general = (resampled(features, kind, taps=taps) for taps in ((1, 1), (2, 2)))
    torch.testing.assert_close(short, general)


def test_attention_is_between_directions() -> None:
    """Two heads attend as written out, from queries and keys of RMS 1, in the published order."""
    torch.manual_seed(0)
    block = Block(16, 16, config=TINY, kind="dec", attention=True)
    features = torch.randn(2, 16, 3, 3)
    qkv = block.attn_qkv(features).reshape(2 * 2, 8, 3, 9)
    query, key, value = (part / part.square().mean(1, True).sqrt() for part in qkv.unbind(2))
    weights = (torch.einsum("ncq,nck->nqk", query, key) / math.sqrt(8)).softmax(dim=2)
    expected = torch.einsum("nqk,nck->ncq", weights, value).reshape(features.shape)
    torch.testing.assert_close(block._attended(features), expected, rtol=1e-3, atol=1e-3)


def test_blocks_clip_what_they_let_out() -> None:
    """No feature leaves a block above clip_act."""
    config = TINY.model_copy(update={"clip_act": 0.5})
    features = Block(8, 8, config=config, kind="enc")(torch.randn(2, 8, 8, 8), torch.randn(2, 16))
    assert features.abs().max() == 0.5


# Denoising


def test_fresh_network_returns_its_skip() -> None:
    """The output gain starts at 0, so D = sigma_data^2 / (sigma^2 + sigma_data^2) noisy."""
    denoiser, noisy = build(TINY).eval(), noisy_images()
    expected = 0.25 / (LEVELS[:, None, None, None] ** 2 + 0.25) * noisy
    torch.testing.assert_close(denoiser(noisy, LEVELS), expected)


def test_denoising_without_noise_returns_the_input() -> None:
    """D(x; sigma) goes to x with sigma, whatever the network."""
    denoised = tiny_denoiser()(noisy_images(), torch.full((3,), 1e-6))
    torch.testing.assert_close(denoised, noisy_images(), atol=1e-4, rtol=0)


def test_images_do_not_see_each_other() -> None:
    """Each image of a batch is denoised at its own level with its own label."""
    denoiser, noisy, labels = tiny_denoiser(label_dim=3), noisy_images(), torch.tensor([2, 0, 1])
    alone = [denoiser(noisy[i : i + 1], LEVELS[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(denoiser(noisy, LEVELS, labels), torch.cat(alone))


def test_label_changes_the_image_and_none_is_the_zero_vector() -> None:
    """Images differ by label; without one the embedding is the noise level's share alone."""
    denoiser, noisy = tiny_denoiser(label_dim=2), noisy_images()
    images = [denoiser(noisy, LEVELS, torch.full((3,), label)) for label in (0, 1)]
    assert (images[0] - images[1]).abs().max() > 1e-3
    unlabelled = denoiser(noisy, LEVELS)
    with torch.no_grad():
        denoiser.unet.emb_label.weight.zero_()
    torch.testing.assert_close(denoiser(noisy, LEVELS, torch.zeros(3).long()), unlabelled)


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    [
        (torch.zeros(3).long(), 0, "unconditional"),
        (torch.zeros(3, 2), 2, r"labels has shape \[3, 2\], expected \[3\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    labels: Tensor, num_classes: int, expected: str
) -> None:
    """Labels for an unconditional denoiser, and one-hot vectors, are errors."""
    with pytest.raises(ValueError, match=expected):
        tiny_denoiser(label_dim=num_classes)(noisy_images(), LEVELS, labels)


# Modes


@pytest.mark.parametrize(
    "settings",
    [{}, {"label_dim": 3}, {"channel_mult": (1, 2, 3), "num_blocks": 2}, {"channels_per_head": 16}],
)
def test_every_parameter_has_a_gradient(settings: dict[str, object]) -> None:
    """No parameter is idle: training on several processes waits for the gradient of each."""
    denoiser = tiny_denoiser(**settings)
    labels = torch.tensor([0, 1, 2]) if "label_dim" in settings else None
    denoiser(noisy_images(), LEVELS, labels).square().sum().backward()
    idle = [n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_eval_mode_writes_nothing() -> None:
    """Neither a forward pass with graph nor its backward changes a stored bit."""
    denoiser = tiny_denoiser()
    with torch.no_grad():
        for layer in layers(denoiser):
            layer.weight.mul_(3.0)
    before = state_bytes(denoiser)
    denoiser(noisy_images(), LEVELS).square().sum().backward()
    assert state_bytes(denoiser) == before


def test_train_mode_normalises_the_stored_weights_first() -> None:
    """A forward pass in train mode leaves RMS 1 in every layer of the U-Net, and the same image."""
    denoiser = tiny_denoiser()
    with torch.no_grad():
        for layer in layers(denoiser):
            layer.weight.mul_(3.0)
    expected = denoiser(noisy_images(), LEVELS)
    head = denoiser.logvar_linear.weight.clone()
    found = denoiser.train()(noisy_images(), LEVELS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for layer in layers(denoiser):
        torch.testing.assert_close(
            stored_rms(layer), torch.ones(len(layer.weight)), atol=2e-4, rtol=0
        )
    assert torch.equal(denoiser.logvar_linear.weight, head)


def take_steps(denoiser: EDM2Denoiser, after_step: Callable[[], None] = lambda: None) -> None:
    """Take three Adam steps, at a rate that moves the weights far."""
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.1, betas=(0.0, 0.999))
    for _ in range(3):
        optimizer.zero_grad()
        denoiser(noisy_images(), LEVELS).square().sum().backward()
        optimizer.step()
        after_step()


def test_normalising_after_each_step_in_eval_mode_is_the_published_training() -> None:
    """Weights end with the bytes of train mode, whose forward pass normalises; drifting, not."""
    ours, drifting = tiny_denoiser(), tiny_denoiser()
    for denoiser in (ours, drifting):
        denoiser.normalize_weights()
    take_steps(ours, ours.normalize_weights)
    take_steps(drifting)
    drifting.normalize_weights()
    published = tiny_denoiser().train()
    take_steps(published)
    published.normalize_weights()
    assert state_bytes(ours) == state_bytes(published)
    pairs = zip(ours.parameters(), drifting.parameters(), strict=True)
    assert max((p - q).abs().max() for p, q in pairs) > 0.01


# A copy in training


ALONE = World.single()
BATCH = 4
TRAINING = trainer.Config(
    duration_kimg=6 * BATCH / 1000,
    batch_size=BATCH,
    micro_batch_size=3,
    student_lr=0.05,
    score_lr=0.05,
)


def begin() -> TrainState:
    """Return a distillation before its first image: the student too is a copy of the teacher."""
    teacher = tiny_denoiser(label_dim=3)
    student = one_step_edm.from_teacher(teacher, one_step_edm.Config())
    return start(
        Networks(student, copy.deepcopy(teacher), teacher),
        student_lr=TRAINING.student_lr,
        score_lr=TRAINING.score_lr,
        optimizer=TRAINING.optimizer,
    )


def normalising(state: TrainState) -> TrainState:
    """Return the state whose score network is normalised after each of its steps."""
    score = state.networks.score
    state.optimizers["score"].register_step_post_hook(lambda *_: score.normalize_weights())
    return state


def go(
    state: TrainState, path: Path, *, stop_requested: Callable[[], bool] = lambda: False
) -> RunFolder:
    """Train with one score pass for both networks; return the run's folder."""
    objective = diff_instruct.build(diff_instruct.Config(shared_batch=True, score_steps=2))
    folder = RunFolder.create(path, "run")
    trainer.Trainer(
        state, objective, TRAINING, folder=folder, world=ALONE, stop_requested=stop_requested
    ).train()
    return folder


def everything(state: TrainState) -> dict[str, bytes]:
    """Return the bytes of all weights and of all moments of the optimizers."""
    modules = nn.ModuleList((state.networks.student, state.networks.score, state.student_ema))
    found = state_bytes(modules)
    for name, optimizer in state.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            for key, tensor in moments.items():
                found[f"{name}/{index}/{key}"] = tensor.numpy().tobytes()
    return found


def test_training_keeps_effective_weights_at_unit_norm(tmp_path: Path) -> None:
    """After steps that moved every weight far, each output's effective weights still have norm 1.

    So have those of the moving average, whose stored weights are a mean of others.
    """
    state = begin()
    go(state, tmp_path)
    for network in (state.networks.student, state.networks.score, state.student_ema):
        for layer in layers(network):
            norms = layer.effective_weight().detach().flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=0)
    for layer, untouched in zip(
        layers(state.networks.score), layers(state.networks.teacher), strict=True
    ):
        directions = F.cosine_similarity(layer.weight.flatten(1), untouched.weight.flatten(1))
        assert (directions < 0.999).any()


def test_normalising_after_steps_keeps_stored_weights_at_unit_norm(tmp_path: Path) -> None:
    """With the hook stored norms stay 1, where they drift without."""
    kept, drifting = normalising(begin()), begin()
    go(kept, tmp_path / "kept")
    go(drifting, tmp_path / "drifting")
    drift = [(stored_rms(layer) - 1).abs().max() for layer in layers(kept.networks.score)]
    assert max(drift) < 2e-4
    assert min((stored_rms(x) - 1).abs().max() for x in layers(drifting.networks.score)) > 0.01


@pytest.mark.parametrize("prepared", [lambda state: state, normalising])
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, prepared: Callable[[TrainState], TrainState]
) -> None:
    """Stopped half-way and restored: every weight, average and moment, with and without hook."""
    whole = prepared(begin())
    go(whole, tmp_path / "whole")
    answers = iter([False, False, True])
    with pytest.raises(trainer.Interrupted):
        go(prepared(begin()), tmp_path / "half", stop_requested=lambda: next(answers))
    resumed = prepared(begin())
    path = checkpoint.newest(RunFolder(tmp_path / "half" / "00000-run"))
    assert path is not None
    checkpoint.restore(resumed, path)
    assert resumed.images_seen == 3 * BATCH and everything(resumed) != everything(whole)
    go(resumed, tmp_path / "rest")
    found, expected = everything(resumed), everything(whole)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert found.keys() == expected.keys()


# Files and Config


def published(*positional: object, **arguments: object) -> NetworkRecord:
    """Return the record of a Precond with these constructor arguments."""
    return NetworkRecord("Precond", positional=positional, arguments=arguments)


def test_defaults_are_those_of_the_published_64_pixel_networks() -> None:
    """Resolution, channels, classes and the base width are all that edm2-img64-s names."""
    config = from_record(published(64, 3, 1000, True, model_channels=192))
    assert config == Config(img_resolution=64, img_channels=3, label_dim=1000)
    assert config.levels == [(64, 192), (32, 384), (16, 576), (8, 768)]
    assert (config.noise_channels, config.emb_channels) == (192, 768)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config).parameters())
    assert parameters == pytest.approx(280e6, rel=2e-3)  # EDM2, Table 2: 280 million


def test_networks_on_latents_are_refused() -> None:
    """Four channels are an autoencoder's, and the sentence says what to give instead."""
    with pytest.raises(UserError, match=r"latents of an autoencoder .* works on pixels"):
        from_record(published(64, 4, 1000))


def test_records_of_other_classes_are_left_to_other_families() -> None:
    """An EDMPrecond pickle is not an EDM2 network."""
    assert from_record(NetworkRecord("EDMPrecond", positional=(32, 3))) is None


def test_record_with_foreign_arguments_is_a_user_error() -> None:
    """A record that EDM2's constructor would refuse names the argument."""
    with pytest.raises(UserError, match="img_channels: Field required"):
        from_record(published(img_resolution=32))
    with pytest.raises(UserError, match="width: Extra inputs"):
        from_record(published(64, 3, 1000, width=3))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"channel_mult": (1, 1, 1, 1, 1)}, "not a multiple of 16"),
        ({"resample_filter": (1, 2, 1)}, "an even number of taps"),
        ({"model_channels": 10, "channels_per_head": 6}, "20 channels .* into 3 heads"),
        ({"channels": 8}, "Extra inputs"),
    ],
)
def test_impossible_configs_are_refused(settings: dict[str, object], expected: str) -> None:
    """Settings that no network can have together say why."""
    with pytest.raises(ValidationError, match=expected):
        Config.model_validate(TINY.model_dump() | settings)


def test_a_saved_one_comes_back(tmp_path: Path) -> None:
    """teachers.load makes the same images from our file, with no limit on activations as null."""
    denoiser = tiny_denoiser(label_dim=3, clip_act=None)
    networks.save(tmp_path / "teacher.safetensors", denoiser)
    loaded = teachers.load(tmp_path / "teacher.safetensors")
    assert state_bytes(loaded) == state_bytes(denoiser) and loaded.config == denoiser.config
    assert (loaded.sigma_min, loaded.sigma_max) == (0.002, 80.0)


class Persistent:
    """Pickles like a module under the published decorator, with half-precision weights."""

    def __init__(self, module: nn.Module, class_name: str = "Layer", **arguments: object) -> None:
        children = {name: Persistent(child) for name, child in module.named_children()}
        self.meta = {
            **{"type": "class", "version": 6, "module_src": "", "class_name": class_name},
            "state": {
                "_init_args": (),
                "_init_kwargs": arguments,
                "_parameters": {n: nn.Parameter(p.half()) for n, p in module._parameters.items()},
                "_buffers": {name: tensor.half() for name, tensor in module._buffers.items()},
                "_modules": children,
            },
        }

    def __reduce__(self) -> tuple[object, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def phema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Give a function that writes a network as a phema snapshot and returns its path."""
    loader = ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise AssertionError", loader.__dict__)
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, loader.__name__, loader)

    def written(denoiser: EDM2Denoiser, **arguments: object) -> Path:
        network = Persistent(denoiser, "Precond", **arguments)
        path = tmp_path / "edm2-0.050.pkl"
        path.write_bytes(pickle.dumps({"encoder": None, "dataset_kwargs": {}, "ema": network}))
        return path

    return written


def test_a_phema_snapshot_is_plain_float32_weights(phema: Callable[..., Path]) -> None:
    """The half-precision tensors of a pickle's ema come out as float32, the same numbers."""
    denoiser = tiny_denoiser(label_dim=3)
    arguments = denoiser.config.model_dump() | {"use_fp16": True, "channel_mult": [1, 2]}
    loaded = teachers.load(phema(denoiser, **arguments))
    assert loaded.config == denoiser.config and not loaded.training
    assert state_bytes(loaded) == state_bytes(denoiser.half().float())


def test_a_snapshot_on_latents_is_refused_with_its_file(phema: Callable[..., Path]) -> None:
    """The sentence names the file that holds a network on latents."""
    denoiser = tiny_denoiser(img_channels=4)
    with pytest.raises(UserError, match=r"edm2-0.050.pkl: this EDM2 .* latents"):
        teachers.load(phema(denoiser, **denoiser.config.model_dump()))
