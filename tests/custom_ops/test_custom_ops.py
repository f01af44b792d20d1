"""The custom operations compute what they define: the reference, the native CPU kernels, and the
bodies of the GPU kernels, emulated on a CPU.
"""

import ctypes
import json
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch

from core.errors import UserError
from custom_ops import _build, _native, _resampling, backend
from custom_ops.bias_act import ACTIVATIONS, bias_act
from custom_ops.filtered_lrelu import filtered_lrelu
from custom_ops.upfirdn2d import fir_filter, upfirdn2d
from repository import GOLDENS as GOLDEN_FILES

GOLDENS = np.load(GOLDEN_FILES / "custom-ops.npz")
CASES = sorted({key.split("/")[0] for key in GOLDENS})
OPERATIONS = {"bias_act": bias_act, "upfirdn2d": upfirdn2d, "filtered_lrelu": filtered_lrelu}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library of the GPU kernels' bodies that runs on a CPU."""
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    source = _build._SOURCES / "emulated.cpp"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
    return _build.declared(ctypes.CDLL(str(library)))


@pytest.fixture(
    params=["reference", *(pytest.param(p, marks=needs_compiler) for p in ("native", "emulated"))]
)
def implementation(request, monkeypatch):
    """Run the operations of a test on each implementation in turn."""
    if request.param == "emulated":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(_build, "library", lambda device: library)
    with backend.using("reference" if request.param == "reference" else "native"):
        yield request.param


def assert_close(actual, expected, tolerance=1e-4):
    """The largest difference is within a fraction of the largest expected value."""
    expected = torch.as_tensor(
        np.asarray(expected.detach()) if torch.is_tensor(expected) else expected
    )
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max() + 1e-30


def outputs_and_gradients(operation, *tensors, **settings):
    """Return what an operation makes of fresh leaves, and the gradients of a probed sum."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = operation(*leaves, **settings)
    probe = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    return out, *torch.autograd.grad(out, leaves, probe)


@pytest.mark.parametrize("case", CASES)
def test_published_operations_are_matched(case, implementation):
    """Output and gradients of every recorded call equal the published ones."""
    given = {
        key.rpartition("/")[2]: torch.as_tensor(GOLDENS[key])
        for key in GOLDENS
        if key.startswith(f"{case}/in/")
    }
    meta = json.loads(str(GOLDENS[f"{case}/meta"]))
    leaves = {name: given.pop(name).requires_grad_() for name in ("x", "b") if name in given}
    probe = given.pop("probe")
    out = OPERATIONS[meta["op"]](**leaves, **given, **meta["kwargs"])
    (out * probe).sum().backward()
    assert_close(out, GOLDENS[f"{case}/out"])
    for name, leaf in leaves.items():
        assert_close(leaf.grad, GOLDENS[f"{case}/grad/{name}"])


def some_filter(draws):
    """Return no filter, a line, an outer product or a plane that is none, in float64."""
    kind = draws.choice(["none", "line", "product", "plane"])
    width, height = draws.randint(1, 13), draws.randint(1, 6)
    if kind == "none":
        return None
    if kind == "line":
        return torch.randn(width, dtype=torch.float64)
    if kind == "plane":
        return torch.randn(height, width, dtype=torch.float64)
    return torch.outer(*torch.randn(2, height, dtype=torch.float64))


def some_images(draws, memory_format):
    shape = (
        draws.randint(1, 2),
        draws.choice([1, 3, 17]),
        draws.randint(1, 20),
        draws.randint(1, 20),
    )
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)


def biased_lrelu(x, b, **settings):
    return filtered_lrelu(x, b=b, **settings)


def expected(operation, *tensors, **settings):
    with backend.using("reference"):
        return outputs_and_gradients(operation, *tensors, **settings)


@pytest.mark.parametrize("implementation", ["native", "emulated"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upfirdn2d_equals_the_reference_for_odd_arguments(layout, implementation):
    """Any rates, filters, paddings and crops: the same output and gradient, in the same layout."""
    draws, compared = random.Random(0), 0
    torch.manual_seed(0)
    while compared < 60:
        x = some_images(draws, LAYOUTS[layout])
        settings = {
            "f": some_filter(draws),
            "up": [draws.randint(1, 5), draws.randint(1, 4)],
            "down": [draws.randint(1, 4), draws.randint(1, 5)],
            "padding": [draws.randint(-4, 9) for _ in range(4)],
            "flip_filter": draws.random() < 0.5,
            "gain": 1.3,
        }
        try:
            ours = outputs_and_gradients(upfirdn2d, x, **settings)
        except ValueError as error:
            assert "nothing is left" in str(error)
            continue
        for actual, value in zip(ours, expected(upfirdn2d, x, **settings), strict=True):
            assert_close(actual, value, tolerance=1e-11)
        assert ours[0].is_contiguous(memory_format=_native._layout(x))
        compared += 1


@pytest.mark.parametrize("implementation", ["native", "emulated"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_filtered_lrelu_equals_the_reference_for_odd_arguments(layout, implementation):
    """Any rates, filters, paddings, crops, slopes and clamps: the same output and gradients."""
    draws, compared = random.Random(1), 0
    torch.manual_seed(0)
    while compared < 60:
        x = some_images(draws, LAYOUTS[layout])
        settings = {
            "fu": some_filter(draws),
            "fd": some_filter(draws),
            "up": draws.randint(1, 4),
            "down": draws.randint(1, 4),
            "padding": [draws.randint(-4, 9) for _ in range(4)],
            "flip_filter": draws.random() < 0.5,
            "slope": draws.choice([0.0, 0.2, 1.5]),
            "clamp": draws.choice([None, 0.5]),
        }
        b = torch.randn(x.shape[1], dtype=torch.float64)
        try:
            ours = outputs_and_gradients(biased_lrelu, x, b, **settings)
        except ValueError as error:
            assert "nothing is left" in str(error)
            continue
        theirs = expected(biased_lrelu, x, b, **settings)
        for actual, value in zip(ours, theirs, strict=True):
            assert_close(actual, value, tolerance=1e-11)
        compared += 1


@pytest.mark.parametrize("implementation", ["native", "emulated"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("up", "down", "taps_up", "taps_down"),
    [(2, 2, 12, 12), (4, 2, 24, 12), (2, 4, 12, 24), (2, 2, 12, (12, 12))],
)
def test_the_unrolled_filters_of_stylegan3_equal_the_reference(
    up, down, taps_up, taps_down, layout, implementation
):
    """Its rates and filters, larger than a tile, in float32."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, 37, 41).contiguous(memory_format=LAYOUTS[layout])
    fu, fd, b = torch.rand(taps_up), torch.rand(taps_down), torch.randn(5)
    settings = {"up": up, "down": down, "padding": [11, 10, 9, 12], "clamp": 1.0}
    settings |= {"fu": fu / fu.sum(), "fd": fd / fd.sum()}
    ours = outputs_and_gradients(biased_lrelu, x, b, **settings)
    theirs = expected(biased_lrelu, x, b, **settings)
    for actual, value in zip(ours, theirs, strict=True):
        assert_close(actual, value, tolerance=1e-4)


@pytest.mark.parametrize("implementation", ["native", "emulated"], indirect=True)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 5, 4, 6), 1), ((2, 16, 3), 1), ((4, 7), -1), ((5,), 0)]
)
def test_every_activation_equals_the_reference(act, shape, dim, implementation):
    """Value and gradients of x and b, clipped and not, along any dimension."""
    torch.manual_seed(0)
    x, b = 3 * torch.randn(shape, dtype=torch.float64), torch.randn(shape[dim], dtype=torch.float64)
    for clamp in (None, 0.7):
        settings = {"dim": dim, "act": act, "gain": 1.3, "clamp": clamp}
        ours = outputs_and_gradients(bias_act, x, b, **settings)
        for actual, value in zip(ours, expected(bias_act, x, b, **settings), strict=True):
            assert_close(actual, value, tolerance=1e-11)


def test_gradients_are_those_of_the_values(implementation):
    """Finite differences agree, in float64."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    fu, fd = torch.randn(5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x: upfirdn2d(x, fd, up=2, down=3, padding=4), x)
    for act in ACTIVATIONS:
        assert check(lambda x, b, act=act: bias_act(x, b, act=act, clamp=2.0), (x, b))
    settings = {"up": 2, "down": 2, "padding": 3, "clamp": 3.0}
    assert check(lambda x, b: filtered_lrelu(x, fu, fd, b, **settings), (x, b))


def test_the_reference_is_differentiable_twice():
    """Finite differences of its gradients agree."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    fu, fd = torch.randn(4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    with backend.using("reference"):
        check = torch.autograd.gradgradcheck
        assert check(lambda x, b: bias_act(x, b, act="swish"), (x, b))
        assert check(lambda x, b: filtered_lrelu(x, fu, fd, b, up=2, down=2, padding=3), (x, b))


@needs_compiler
def test_native_upfirdn2d_is_differentiable_any_number_of_times():
    """It is linear: its gradient is an upfirdn2d."""
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    f = torch.randn(4, dtype=torch.float64)
    with backend.using("native"):
        assert torch.autograd.gradgradcheck(lambda x: upfirdn2d(x, f, up=2, padding=2), x)


@needs_compiler
@pytest.mark.parametrize("operation", [filtered_lrelu, bias_act])
def test_a_second_derivative_of_a_native_kernel_names_the_setting(operation):
    """It is an error that says what to set, not a wrong number."""
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    with backend.using("native"):
        out = operation(x) if operation is filtered_lrelu else operation(x, act="lrelu")
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(UserError, match="kernels: reference"):
            gradient.sum().backward()


def test_not_a_number_passes_through(implementation):
    """No kernel hides a number that the loop would stop at."""
    x = torch.randn(1, 2, 8, 8)
    x[0, 1, 3, 3] = torch.nan
    assert bias_act(x, act="lrelu", clamp=1.0).isnan().sum() == 1
    assert filtered_lrelu(x, clamp=1.0).isnan().sum() == 1
    assert upfirdn2d(x, torch.ones(2), padding=1).isnan().sum() >= 4


def test_strided_views_are_read_as_they_stand(implementation):
    """An input that is dense in no layout gives what its copy gives."""
    x = torch.randn(2, 6, 9, 10)[:, ::2, 1:, ::3]
    f = fir_filter([1, 3, 3, 1])
    assert_close(upfirdn2d(x, f, padding=2), upfirdn2d(x.contiguous(), f, padding=2))
    assert_close(bias_act(x, act="lrelu"), bias_act(x.contiguous(), act="lrelu"))
    assert_close(filtered_lrelu(x, up=2), filtered_lrelu(x.contiguous(), up=2))


def test_long_axes_are_multiplied_in_blocks():
    """The reference cuts an axis beyond 256 pixels and loses nothing at the cuts."""
    torch.manual_seed(0)
    x, f = torch.randn(1, 1, 3, 700, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    with backend.using("reference"):
        out = upfirdn2d(x, f, up=(2, 1), down=(3, 1), padding=(300, -40, 3, 3))
    plane = torch.outer(f, f)
    with backend.using("reference"):
        assert_close(
            out, upfirdn2d(x, plane, up=(2, 1), down=(3, 1), padding=(300, -40, 3, 3)), 1e-12
        )


@needs_compiler
def test_a_changed_filter_is_read_again():
    """What is kept of a filter for the next call is made of its present values only."""
    x, f = torch.randn(1, 1, 6, 6), torch.ones(3)
    with backend.using("native"):
        before = upfirdn2d(x, f)
        f.mul_(2)
        assert_close(upfirdn2d(x, f), 4 * before)
        for _ in range(5):
            upfirdn2d(x, f.mul_(1), flip_filter=True)
    assert len(_resampling._kept[f][1]) == 1


def test_other_types_take_the_reference():
    """bfloat16 on a CPU, and a filter that is trained, have no native kernel."""
    x = torch.randn(1, 2, 6, 6)
    with backend.using("native"):
        assert backend.kernels_for(x.bfloat16()) is None
        assert backend.kernels_for(x, torch.ones(3, requires_grad=True)) is None
        assert backend.kernels_for(x.to("meta")) is None


@pytest.mark.parametrize("operation", [bias_act, filtered_lrelu])
def test_a_bias_of_the_wrong_length_is_refused(operation, implementation):
    """It is not broadcast, and no kernel reads beyond it."""
    with pytest.raises(ValueError, match="bias has shape"):
        operation(torch.zeros(1, 3, 4, 4), b=torch.zeros(1))
