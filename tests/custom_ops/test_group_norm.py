"""The fused group normalization computes its definition: the reference, and the bodies of the GPU
kernels, emulated on a CPU.
"""

import ctypes
import random
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from custom_ops import _build, backend
from custom_ops import group_norm as module
from custom_ops.group_norm import folds_bias, group_norm
from teachers._layers import Block, BlockStyle, Init

NAMES = ("x", "weight", "bias", "scale", "shift", "pre_bias")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""Of the largest value: about two roundings to the type."""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library of the GPU kernels' bodies that runs on a CPU."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    source = str(_build._SOURCES / "emulated.cpp")
    subprocess.run(["c++", *flags, source, "-o", str(path)], check=True)
    return _build.declared(ctypes.CDLL(str(path)))


@pytest.fixture
def emulated(library, monkeypatch):
    """Run the GPU kernels' bodies for tensors on a CPU, in every dtype."""
    monkeypatch.setattr(_build, "library", lambda device: library)
    monkeypatch.setattr(module, "NATIVE_DEVICES", {"cpu"})
    monkeypatch.setitem(backend._COVERED, "cpu", set(TOLERANCES))
    with backend.using("native"):
        yield library


def definition(tensors, groups, *, eps, silu):
    """Return the docstring's formula written out, from F.group_norm and F.silu."""
    x, over_pixels = tensors["x"], [1] * (tensors["x"].ndim - 2)
    given = {
        name: t
        if t is None or name in ("x", "weight", "bias")
        else t.reshape(*t.shape, *over_pixels)
        for name, t in tensors.items()
    }
    u = x if given["pre_bias"] is None else x + given["pre_bias"]
    y = F.group_norm(u, groups, given["weight"], given["bias"], eps)
    y = y if given["scale"] is None else y * (1 + given["scale"])
    y = y if given["shift"] is None else y + given["shift"]
    return F.silu(y) if silu else y


def ours(tensors, groups, *, eps, silu):
    x, weight, bias, *rest = (tensors[name] for name in NAMES)
    terms = dict(zip(NAMES[3:], rest, strict=True))
    return group_norm(x, groups, weight, bias, eps=eps, silu=silu, **terms)


def outputs_and_gradients(operation, tensors, groups, *, probe_dtype, **settings):
    """Return y and the gradients of all tensors for a sum weighted by a probe, by name."""
    leaves = {
        name: None if t is None else t.detach().clone().requires_grad_()
        for name, t in tensors.items()
    }
    y = operation(leaves, groups, **settings)
    probe = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape).sin()
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(y, list(present.values()), probe.to(probe_dtype).to(y.dtype))
    return {"y": y.detach()} | dict(zip(present, gradients, strict=True))


def assert_equal_to_the_definition(tensors, groups, *, tolerance, eps=1e-5, silu=True):
    """Output and gradients equal those of the definition in float64, and have their dtypes."""
    settings = {"eps": eps, "silu": silu, "probe_dtype": tensors["x"].dtype}
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    actual = outputs_and_gradients(ours, tensors, groups, **settings)
    expected = outputs_and_gradients(definition, wide, groups, **settings)
    for name, value in expected.items():
        dtype = tensors["x" if name == "y" else name].dtype
        assert (actual[name].dtype, actual[name].shape) == (dtype, value.shape), name
        # the gradient of pre_bias is a sum of those of x, exactly 0 for a group of one channel
        scale = expected["x"] if name == "pre_bias" else value
        largest = torch.maximum(value.abs().max(), scale.abs().max())
        error = (actual[name].double() - value).abs().max()
        assert error <= tolerance * largest + 1e-30, (name, float(error))
    return actual


def some_tensors(shape, *, dtype, layout="contiguous", leave_out=(), pre_bias_of_channels=False):
    """Return x in dtype and all terms in the type that is computed with, some of them None."""
    terms = torch.float64 if dtype == torch.float64 else torch.float32
    n, c = shape[:2]
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    tensors = {
        "x": x,
        "weight": 1 + 0.3 * torch.randn(c, dtype=terms),
        "bias": torch.randn(c, dtype=terms),
        "scale": 0.5 * torch.randn(n, c, dtype=terms),
        "shift": torch.randn(n, c, dtype=terms),
        "pre_bias": torch.randn((c,) if pre_bias_of_channels else (n, c), dtype=terms),
    }
    return {name: None if name in leave_out else t for name, t in tensors.items()}


# The reference


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_equals_the_definition(layout, silu):
    """Output and gradients of every term, in float64."""
    torch.manual_seed(0)
    tensors = some_tensors((2, 6, 5, 4), dtype=torch.float64, layout=layout)
    assert_equal_to_the_definition(tensors, 3, tolerance=1e-12, silu=silu)


@pytest.mark.parametrize("leave_out", [(), ("scale",), ("shift",), ("pre_bias",), NAMES[1:]])
def test_the_reference_is_differentiable_twice(leave_out):
    """Finite differences of values and of gradients agree, with and without each term."""
    torch.manual_seed(0)
    tensors = some_tensors((2, 4, 2, 3), dtype=torch.float64, leave_out=leave_out)
    present = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}

    def operation(*leaves):
        given = tensors | dict(zip(present, leaves, strict=True))
        return ours(given, 2, eps=1e-5, silu=True)

    assert torch.autograd.gradcheck(operation, tuple(present.values()))
    assert torch.autograd.gradgradcheck(operation, tuple(present.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_has_the_bits_of_separate_steps(dtype):
    """It is add, F.group_norm, addcmul and F.silu, in the dtype of x."""
    torch.manual_seed(0)
    tensors = some_tensors((2, 8, 5, 5), dtype=dtype)
    x, weight, bias, scale, shift, pre_bias = (t.to(dtype) for t in tensors.values())
    u = x + pre_bias[:, :, None, None]
    normed = F.group_norm(u, 2, weight, bias, 1e-6)
    modulated = torch.addcmul(shift[:, :, None, None], normed, scale[:, :, None, None] + 1)
    expected = F.silu(modulated)
    assert torch.equal(ours(tensors, 2, eps=1e-6, silu=True), expected)


# The bodies of the kernels


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_equal_the_definition_for_odd_arguments(layout, dtype, emulated):
    """Any sizes, groups and terms: output and gradients, in the layout of x."""
    if not hasattr(emulated, f"group_norm_{module._native._SUFFIXES[dtype]}"):
        pytest.skip("the C++ compiler has no half precision")
    draws = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        groups = draws.choice([1, 2, 3, 5])
        channels = groups * draws.choice([1, 2, 4, 7, 8])
        shape = (draws.randint(1, 3), channels, draws.randint(1, 19), draws.randint(2, 21))
        tensors = some_tensors(
            shape,
            dtype=dtype,
            layout=layout,
            leave_out=[name for name in NAMES[1:] if draws.random() < 0.3],
            pre_bias_of_channels=draws.random() < 0.5,
        )
        settings = {"eps": draws.choice([1e-6, 1e-5]), "silu": draws.random() < 0.7}
        actual = assert_equal_to_the_definition(
            tensors, groups, tolerance=TOLERANCES[dtype], **settings
        )
        for name in ("y", "x"):
            assert actual[name].stride() == tensors["x"].stride()


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 64, 24, 24), 16),  # packs of 16 bytes, several slices
        ((2, 320, 8, 8), 32),  # more packs in a row than a block has columns
        ((1, 24, 40, 16), 6),  # groups that end within a pack
        ((3, 32, 5, 5), 8),  # packs along channels, none along pixels
        ((2, 528, 3, 8), 22),  # a last range that is not full
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_equal_the_definition_in_packs(shape, groups, layout, dtype, emulated):
    """The widths of U-Nets: vectors of samples, many blocks."""
    torch.manual_seed(0)
    tensors = some_tensors(shape, dtype=dtype, layout=layout)
    assert_equal_to_the_definition(tensors, groups, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cases_cut_images_into_slices(layout, emulated):
    """The shapes above reach sums over slices; a large batch has one for each image."""

    def slices(*shape):
        sizes = module._native._Grouped(shape[0], shape[1], shape[2], 4, layout == "channels-last")
        return emulated.group_norm_slices(ctypes.byref(sizes))

    assert slices(1, 64, 24 * 24) > 1
    assert slices(4096, 256, 24 * 24) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(layout, emulated):
    """Mean 1000 and standard deviation 1: float32 is right to what x itself resolves."""
    torch.manual_seed(0)
    tensors = some_tensors((2, 16, 24, 24), dtype=torch.float32, layout=layout)
    tensors["x"] = tensors["x"] + 1000.0
    tensors["pre_bias"] = tensors["pre_bias"] - 500.0
    # an ulp of x is 6e-5
    assert_equal_to_the_definition(tensors, 4, tolerance=3e-4)


@pytest.mark.parametrize("shape", [(3, 8), (2, 12, 7), (2, 6, 2, 3, 4)])
def test_kernels_take_any_number_of_dimensions(shape, emulated):
    """No pixels, a line, a volume."""
    torch.manual_seed(0)
    tensors = some_tensors(shape, dtype=torch.float32)
    assert_equal_to_the_definition(tensors, 2, tolerance=TOLERANCES[torch.float32])


def test_terms_are_read_as_they_stand(emulated):
    """Halves of one tensor, every other channel, and one row for all images."""
    torch.manual_seed(0)
    modulation, wide = torch.randn(3, 16), torch.randn(3, 16)
    tensors = some_tensors((3, 8, 4, 4), dtype=torch.float32)
    tensors["scale"], tensors["shift"] = modulation.chunk(2, dim=1)
    tensors["pre_bias"] = wide[:1, ::2].expand(3, -1)
    assert_equal_to_the_definition(tensors, 4, tolerance=TOLERANCES[torch.float32])


def test_strided_views_are_read_as_they_stand(emulated):
    """An input that is dense in no layout, and a gradient in another layout than x."""
    torch.manual_seed(0)
    tensors = some_tensors((2, 16, 9, 10), dtype=torch.float32)
    tensors["x"] = tensors["x"][:, ::2, 1:, ::3]
    tensors |= {name: tensors[name][..., ::2] for name in NAMES[1:]}
    assert_equal_to_the_definition(tensors, 4, tolerance=TOLERANCES[torch.float32])


def test_an_address_between_packs_is_read(emulated):
    """A view that begins 4 bytes after a multiple of 16 gives what its copy gives."""
    torch.manual_seed(0)
    x = torch.randn(1 + 2 * 8 * 4 * 4)[1:].reshape(2, 8, 4, 4)
    assert x.data_ptr() % 16
    assert torch.allclose(group_norm(x, 2), group_norm(x.clone(), 2), atol=1e-6)


def test_results_are_the_same_in_every_run(emulated):
    """Output and gradients have the same bits again."""
    torch.manual_seed(0)
    tensors = some_tensors((2, 64, 24, 24), dtype=torch.float32, layout="channels-last")
    first, second = (
        outputs_and_gradients(ours, tensors, 8, eps=1e-5, silu=True, probe_dtype=torch.float32)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_not_a_number_spoils_its_group_alone(emulated):
    """No kernel hides a number that the loop would stop at."""
    x = torch.randn(2, 8, 5, 5)
    x[1, 2, 3, 3] = torch.nan
    is_spoilt = group_norm(x, 4, silu=True).isnan().flatten(2).all(2)
    assert is_spoilt.nonzero().tolist() == [[1, 2], [1, 3]]
    assert group_norm(x, 4, silu=True).isnan().sum() == 2 * 25


def test_gradients_are_only_of_those_that_need_them(emulated):
    """A frozen network gets none; its input does."""
    tensors = some_tensors((2, 8, 4, 4), dtype=torch.float32)
    tensors["x"].requires_grad_()
    ours(tensors, 4, eps=1e-5, silu=True).sum().backward()
    assert tensors["x"].grad is not None
    assert all(tensors[name].grad is None for name in NAMES[1:])


def test_a_second_derivative_of_a_native_kernel_names_the_setting(emulated):
    """It is an error that says what to set, not a wrong number."""
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(group_norm(x, 2).pow(3).sum(), x, create_graph=True)
    with pytest.raises(
        UserError, match=r"group_norm is differentiated once only.*kernels: reference"
    ):
        gradient.sum().backward()


# Where it runs


@needs_compiler
def test_a_cpu_takes_the_reference_under_every_policy(monkeypatch):
    """Nothing is compiled for it there, and no bias is left to it."""
    monkeypatch.setattr(_build, "library", lambda device: pytest.fail("kernels were asked for"))
    for policy in ("auto", "native", "reference"):
        with backend.using(policy):
            assert not folds_bias(torch.ones(1, 4, 2, 2))
            assert group_norm(torch.randn(1, 4, 2, 2), 2).shape == (1, 4, 2, 2)


def test_more_channels_than_fit_take_the_reference(emulated, monkeypatch):
    """Sums of a whole image are kept in shared memory."""
    monkeypatch.setattr(module._native, "group_norm", lambda *_: pytest.fail("a kernel ran"))
    assert group_norm(torch.randn(1, 4096, 1, 2), 2).shape == (1, 4096, 1, 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"groups": 3}, "4 channels, not a multiple of 3 groups"),
        ({"groups": 2, "weight": torch.ones(1)}, r"weight has shape \[1\], expected \[4\]"),
        ({"groups": 2, "scale": torch.ones(4)}, r"scale has shape \[4\], expected \[2, 4\]"),
        (
            {"groups": 2, "pre_bias": torch.ones(1, 4)},
            r"pre_bias has shape \[1, 4\], expected \[4\] or \[2, 4\]",
        ),
    ],
)
def test_wrong_shapes_are_refused(settings, expected):
    """Nothing is broadcast, and no kernel reads beyond a term."""
    with pytest.raises(ValueError, match=expected):
        group_norm(torch.zeros(2, 4, 3, 3), **settings)


def test_a_block_is_traced_whole_as_plain_pytorch(emulated):
    """torch.compile meets neither a kernel nor a break where kernels would run otherwise."""
    torch.manual_seed(0)
    init = Init("kaiming_normal", bias_scale=1.0)
    style = BlockStyle(6, 0.0, (1, 1), init, init, init, 1, 0.7, 1e-6, True, True)
    block = Block(8, 8, style=style)
    features, embedding = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
    traced = torch.compile(block, backend="eager", fullgraph=True)(features, embedding)
    with backend.using("reference"):
        assert torch.equal(traced, block(features, embedding))


@pytest.mark.parametrize("is_adaptive", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_on_kernels_equals_the_reference(layout, resample, is_adaptive, emulated):
    """Output and all gradients, with conv0's bias folded into the normalization after it."""
    torch.manual_seed(0)
    init = Init("kaiming_normal", bias_scale=1.0)
    style = BlockStyle(6, 0.0, (1, 1), init, init, init, 1, 0.7, 1e-6, True, is_adaptive)
    block = Block(8, 16, style=style, attention=True, resample=resample)
    features = torch.randn(2, 8, 6, 6).contiguous(memory_format=LAYOUTS[layout])
    embedding, results = torch.randn(2, 6), {}
    for policy in ("native", "reference"):
        with backend.using(policy):
            assert folds_bias(features) == (policy == "native")
            leaves = [features.clone().requires_grad_(), *block.parameters()]
            out = block(leaves[0], embedding)
            results[policy] = (out, *torch.autograd.grad(out.square().sum(), leaves))
    for actual, expected in zip(*results.values(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_auto_takes_plain_pytorch_until_a_gpu_ran_the_kernels(emulated, monkeypatch):
    """The kernels are asked for by name (`kernels: native`); IN_AUTO is the switch."""
    x = torch.randn(2, 8, 4, 4)
    with backend.using("auto"):
        assert not folds_bias(x)
        monkeypatch.setattr(module, "IN_AUTO", True)
        assert folds_bias(x)
