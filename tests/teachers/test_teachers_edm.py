"""EDM denoisers against the published numbers, and the identities of their preconditioning."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from core.errors import UserError
from edm_goldens import NAMES, assert_close, denoise, load, read_golden
from pretrained.nvidia_pickle import NetworkRecord
from teachers._layers import Block, BlockStyle, Conv, Init
from teachers.edm import Config, EDMDenoiser, build, from_record

TINY = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "num_blocks": 1}
TINY_SONG = Config.model_validate(
    TINY | {"model_type": "SongUNet", "channel_mult": (1, 2), "attn_resolutions": (4,)}
)


def tiny_denoiser(**settings: object) -> EDMDenoiser:
    """Return a small denoiser whose every weight matters, none near zero."""
    torch.manual_seed(0)
    denoiser = build(Config.model_validate(TINY_SONG.model_dump() | settings)).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser


def published(**arguments: object) -> NetworkRecord:
    """Return the record of an EDMPrecond with these constructor arguments."""
    return NetworkRecord("EDMPrecond", arguments=arguments)


# Goldens


@pytest.mark.parametrize("name", NAMES)
def test_state_keys_and_shapes_are_the_published_ones(name: str) -> None:
    """A built denoiser has exactly the published tensors, buffers included."""
    golden = read_golden(name)
    ours = {key: tensor.shape for key, tensor in build(golden.config).state_dict().items()}
    assert ours == {key: tensor.shape for key, tensor in golden.state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_denoised_matches_the_published_implementation(name: str) -> None:
    """D(x; sigma, labels) equals the golden image."""
    golden = read_golden(name)
    with torch.no_grad():
        assert_close(denoise(load(golden), golden.inputs), golden.denoised)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_gradients_match_the_published_implementation(name: str) -> None:
    """The gradients of (denoised * probe).sum() equal the golden ones."""
    golden = read_golden(name)
    denoiser = load(golden)
    (denoise(denoiser, golden.inputs) * golden.inputs["probe"]).sum().backward()
    parameters = dict(denoiser.named_parameters())
    assert golden.gradients
    for key, expected in golden.gradients.items():
        gradient = parameters[key].grad
        assert gradient is not None
        assert_close(gradient, expected)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_changes_nothing(name: str) -> None:
    """The faster memory layout gives the same image."""
    golden = read_golden(name)
    denoiser = load(golden).to(memory_format=torch.channels_last)
    inputs = golden.inputs | {"x": golden.inputs["x"].to(memory_format=torch.channels_last)}
    with torch.no_grad():
        assert_close(denoise(denoiser, inputs), golden.denoised)


def test_precision_argument_of_published_pickles_changes_nothing() -> None:
    """use_fp16 is accepted and has no effect on the Config."""
    arguments = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}
    assert from_record(published(**arguments, use_fp16=True)) == Config.model_validate(arguments)


def test_positional_arguments_of_published_pickles_are_read_by_their_place() -> None:
    """EDMPrecond(64, 3, 1000) is resolution, channels and classes; too many are refused."""
    expected = Config(img_resolution=64, img_channels=3, label_dim=1000)
    assert from_record(NetworkRecord("EDMPrecond", positional=(64, 3, 1000))) == expected
    with pytest.raises(UserError, match="9 arguments without a name, expected at most 8"):
        from_record(NetworkRecord("EDMPrecond", positional=(0,) * 9))


# Layers: the short ways


@pytest.mark.parametrize("kernel", [1, 3])
def test_fused_upsampling_equals_upsampling_then_convolving(kernel: int) -> None:
    """Spreading the kernel's box sum equals convolving nearest-neighbour upsampled features."""
    torch.manual_seed(0)
    conv = Conv(3, 5, kernel=kernel, init=Init("kaiming_uniform", bias_scale=1.0), resample="up")
    features = torch.randn(2, 3, 6, 6)
    finer = features.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert conv.weight is not None
    expected = F.conv2d(finer, conv.weight, conv.bias, padding=kernel // 2)
    torch.testing.assert_close(conv(features), expected)


@pytest.mark.parametrize("resample", ["up", "down"])
def test_box_resampling_equals_the_general_filter(resample: str) -> None:
    """Pooling and repeating equal the depthwise convolutions with taps 1, 1."""
    init = Init("kaiming_normal")
    short = Conv(3, 3, kernel=0, init=init, resample=resample, resample_filter=(1, 1))
    general = Conv(3, 3, kernel=0, init=init, resample=resample, resample_filter=(2, 2))
    features = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(short(features), general(features))


def test_attention_averages_values_by_the_softmax_of_scaled_products() -> None:
    """Two heads of 64 channels attend as written out, in the published channel order."""
    init = Init("kaiming_normal", bias_scale=1.0)
    style = BlockStyle(4, 0.0, (1, 1), init, init, init, None, 1.0, 1e-5, False, True)
    torch.manual_seed(0)
    block = Block(128, 128, style=style, attention=True)
    features = torch.randn(2, 128, 3, 3)
    qkv = block.qkv(block.norm2(features)).reshape(2 * 2, 64, 3, 9)
    query, key, value = qkv.unbind(2)
    weights = (torch.einsum("ncq,nck->nqk", query, key) / math.sqrt(64)).softmax(dim=2)
    expected = torch.einsum("nqk,nck->ncq", weights, value).reshape(features.shape)
    torch.testing.assert_close(block._attended(features), expected)


@pytest.mark.parametrize("encoder_type", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder_type", ["standard", "skip"])
def test_every_parameter_of_every_song_variant_matters(
    encoder_type: str, decoder_type: str
) -> None:
    """No encoder or decoder type leaves a parameter without gradient, over three resolutions."""
    denoiser = tiny_denoiser(
        encoder_type=encoder_type, decoder_type=decoder_type, channel_mult=(1, 2, 3)
    )
    denoiser(torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])).square().sum().backward()
    idle = [
        name
        for name, parameter in denoiser.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert idle == []


# Preconditioning


def test_fresh_network_returns_its_skip() -> None:
    """Output weights start near zero, so D = sigma_data^2 / (sigma^2 + sigma_data^2) noisy."""
    torch.manual_seed(0)
    denoiser = build(TINY_SONG).eval()
    noisy, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 5.0])
    expected = 0.25 / (sigma[:, None, None, None] ** 2 + 0.25) * noisy
    torch.testing.assert_close(denoiser(noisy, sigma), expected, atol=1e-3, rtol=0)


def test_denoising_without_noise_returns_the_input() -> None:
    """D(x; sigma) goes to x with sigma, whatever the network."""
    noisy = torch.randn(2, 1, 8, 8)
    denoised = tiny_denoiser()(noisy, torch.full((2,), 1e-6))
    torch.testing.assert_close(denoised, noisy, atol=1e-4, rtol=0)


def test_images_do_not_see_each_other() -> None:
    """Each image of a batch is denoised at its own level with its own label."""
    denoiser = tiny_denoiser(label_dim=3)
    noisy, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    labels = torch.tensor([2, 0, 1])
    together = denoiser(noisy, sigma, labels)
    alone = [denoiser(noisy[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_label_changes_the_image() -> None:
    """A conditional denoiser depends on its label, and no label is another case still."""
    denoiser = tiny_denoiser(label_dim=2)
    noisy, sigma = torch.randn(1, 1, 8, 8), torch.ones(1)
    images = [denoiser(noisy, sigma, label) for label in (torch.tensor([0]), torch.tensor([1]))]
    images.append(denoiser(noisy, sigma))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (images[first] - images[second]).abs().max() > 1e-3


def test_label_dropout_of_one_hides_every_label_while_training_only() -> None:
    """In train mode all labels are dropped; in eval mode none is."""
    denoiser = tiny_denoiser(label_dim=2, label_dropout=1.0, dropout=0.0)
    noisy, sigma, labels = torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([1])
    unlabelled = denoiser(noisy, sigma)
    assert (denoiser(noisy, sigma, labels) - unlabelled).abs().max() > 1e-3
    torch.testing.assert_close(denoiser.train()(noisy, sigma, labels), unlabelled)


def test_augment_labels_change_the_image_and_zeros_do_not() -> None:
    """Zero augment labels mean none, as in training."""
    denoiser = tiny_denoiser(augment_dim=3)
    noisy, sigma = torch.randn(1, 1, 8, 8), torch.ones(1)
    plain = denoiser(noisy, sigma)
    torch.testing.assert_close(denoiser(noisy, sigma, augment_labels=torch.zeros(1, 3)), plain)
    turned = denoiser(noisy, sigma, augment_labels=torch.ones(1, 3))
    assert (turned - plain).abs().max() > 1e-3


def test_input_gradient_is_the_directional_derivative() -> None:
    """Backpropagation to the noisy image agrees with a central finite difference."""
    denoiser = tiny_denoiser()
    noisy, direction = torch.randn(2, 1, 8, 8, requires_grad=True), torch.randn(2, 1, 8, 8)
    sigma, step = torch.tensor([0.5, 2.0]), 1e-3
    (gradient,) = torch.autograd.grad(denoiser(noisy, sigma).sum(), noisy)
    with torch.no_grad():
        ahead = denoiser(noisy + step * direction, sigma).double().sum()
        behind = denoiser(noisy - step * direction, sigma).double().sum()
    slope = (gradient * direction).double().sum()
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("noisy", "sigma", "labels", "expected"),
    [
        (
            torch.zeros(2, 3, 8, 8),
            torch.ones(2),
            None,
            r"noisy has shape .*expected \[2, 1, 8, 8\]",
        ),
        (torch.zeros(2, 1, 8, 8), torch.ones(1), None, r"sigma has shape \[1\], expected \[2\]"),
        (torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(3).long(), r"labels has shape \[3\]"),
        (torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2), "expected class numbers as int64"),
    ],
)
def test_wrong_inputs_are_named(
    noisy: Tensor, sigma: Tensor, labels: Tensor | None, expected: str
) -> None:
    """A wrong shape or type says which input, what came, and what was expected."""
    with pytest.raises(ValueError, match=expected):
        tiny_denoiser(label_dim=2)(noisy, sigma, labels)


def test_labels_are_refused_by_an_unconditional_denoiser() -> None:
    """Labels that nothing would look at are an error."""
    with pytest.raises(ValueError, match="unconditional"):
        tiny_denoiser()(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.zeros(2).long())


def test_augment_labels_are_refused_by_a_denoiser_trained_without() -> None:
    """Augment labels that nothing would look at are an error."""
    with pytest.raises(ValueError, match="augment_labels"):
        tiny_denoiser()(torch.zeros(2, 1, 8, 8), torch.ones(2), augment_labels=torch.zeros(2, 9))


# Config


def test_config_defaults_follow_the_model_type() -> None:
    """What a published pickle leaves out has the published default of its network."""
    size = {"img_resolution": 64, "img_channels": 3}
    adm, song = (
        Config.model_validate(size | {"model_type": m}) for m in ("DhariwalUNet", "SongUNet")
    )
    assert (adm.model_channels, adm.channel_mult, adm.num_blocks) == (192, (1, 2, 3, 4), 3)
    assert (song.model_channels, song.channel_mult, song.num_blocks) == (128, (1, 2, 2, 2), 4)
    assert (adm.attn_resolutions, song.attn_resolutions) == ((32, 16, 8), (16,))
    assert Config.model_validate(size) == adm


@pytest.mark.parametrize("config", [TINY_SONG, Config.model_validate(TINY)])
def test_config_survives_json(config: Config) -> None:
    """A Config written as JSON reads back equal, and JSON has no infinity."""
    assert Config.model_validate_json(config.model_dump_json()) == config
    plain = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert Config.model_validate(json.loads(plain)) == config


def test_published_infinite_sigma_max_is_no_limit() -> None:
    """An EDMPrecond record with sigma_max = infinity is the one without sigma_max."""
    arguments = {"img_resolution": 64, "img_channels": 3}
    unlimited = from_record(published(**arguments, sigma_max=math.inf))
    assert unlimited == from_record(published(**arguments))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "DhariwalUNet", "encoder_type": "residual"}, "encoder_type: only for Song"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, "not a multiple of 16"),
        ({"resample_filter": (1, 2, 1)}, "resample_filter has 3 taps"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min 3.0 is not below"),
        ({"channels": 8}, "Extra inputs"),
    ],
)
def test_impossible_configs_are_refused(settings: dict[str, object], expected: str) -> None:
    """Settings that no network can have together say why."""
    with pytest.raises(ValidationError, match=expected):
        Config.model_validate(TINY_SONG.model_dump() | settings)


def test_noise_range_is_the_sampling_range_where_the_published_one_is_open() -> None:
    """sigma_min 0 and sigma_max infinity become 0.002 and 80; other limits are kept."""
    opened, closed = build(TINY_SONG), tiny_denoiser(sigma_min=0.01, sigma_max=100.0)
    assert (opened.sigma_min, opened.sigma_max) == (0.002, 80.0)
    assert (closed.sigma_min, closed.sigma_max) == (0.01, 100.0)


@pytest.mark.parametrize(
    ("preconditioning", "sigma_min", "sigma_max"),
    [("VP", 9.8e-4, 152.17), ("VE", 0.02, 100.0), ("iDDPM", 6.42e-3, 20291.2)],
)
def test_noise_ranges_are_those_of_table_1(
    preconditioning: str, sigma_min: float, sigma_max: float
) -> None:
    """VP: sigma(epsilon_t) to sigma(1). VE: 0.02 to 100. iDDPM: u_{M-1} to u_0 (appendix C)."""
    own = {"sigma_min": 0.02, "sigma_max": 100.0} if preconditioning == "VE" else {}
    denoiser = tiny_denoiser(preconditioning=preconditioning, **own)
    assert denoiser.sigma_min == pytest.approx(sigma_min, rel=1e-2)
    assert denoiser.sigma_max == pytest.approx(sigma_max, rel=1e-4)


def test_iddpm_knows_its_own_noise_levels_alone() -> None:
    """round_sigma gives the nearest u_j, and the network sees equal inputs at both."""
    denoiser = tiny_denoiser(preconditioning="iDDPM")
    level = denoiser.u[500]
    near = (level * 1.0001)[None]
    assert torch.equal(denoiser.round_sigma(near), level[None])
    assert torch.equal(denoiser.round_sigma(denoiser.u), denoiser.u)
    x = torch.randn(1, 1, 8, 8)
    difference = denoiser(x, near) - denoiser(x, level[None])
    assert 0 < difference.abs().max() < 1e-3 * x.abs().max()  # c_in and c_out move, c_noise not
    assert torch.equal(tiny_denoiser().round_sigma(near), near)


def test_records_of_other_classes_are_left_to_other_families() -> None:
    """An EDM2 pickle (Precond), or a class named like a column alone, is not an EDM network."""
    assert from_record(NetworkRecord("Precond", positional=(32, 3))) is None
    assert from_record(NetworkRecord("VP", positional=(32, 3))) is None


def test_record_with_foreign_arguments_is_a_user_error() -> None:
    """An EDMPrecond record that EDM's constructor would refuse names the argument."""
    with pytest.raises(UserError, match="img_channels"):
        from_record(published(img_resolution=32))


def test_copy_is_independent() -> None:
    """A deep copy, such as the score network, computes the same and shares no weights."""
    denoiser = tiny_denoiser()
    score = copy.deepcopy(denoiser)
    noisy, sigma = torch.randn(1, 1, 8, 8), torch.ones(1)
    before = denoiser(noisy, sigma)
    torch.testing.assert_close(score(noisy, sigma), before, rtol=0, atol=0)
    with torch.no_grad():
        next(score.parameters()).add_(1.0)
    torch.testing.assert_close(denoiser(noisy, sigma), before, rtol=0, atol=0)


def test_channels_that_cannot_be_normalised_are_refused() -> None:
    """24 channels times 2 and 4 meet in the decoder as 144, which 32 groups do not divide."""
    config = Config(
        img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=24,
        channel_mult=(1, 2, 4), num_blocks=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"model_channels 24 times .*a multiple of 16 or 32"):
        build(config)


@pytest.mark.parametrize(
    ("preconditioning", "setting"),
    [
        ("EDM", {"beta_d": 20.0}),
        ("VP", {"sigma_data": 0.3}),
        ("VP", {"sigma_min": 0.1}),
        ("VE", {"C_1": 0.1}),
        ("iDDPM", {"epsilon_t": 0.1}),
    ],
)
def test_a_setting_of_another_column_is_refused(
    preconditioning: str, setting: dict[str, float]
) -> None:
    """What a column of Table 1 does not know would be ignored: it is named instead."""
    shape = {"img_resolution": 8, "img_channels": 1, "model_channels": 8}
    (name,) = setting
    with pytest.raises(ValidationError, match=f"{name}: not for preconditioning {preconditioning}"):
        Config(**shape, preconditioning=preconditioning, **setting)
