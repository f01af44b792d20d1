"""The native kernels on a GPU equal the reference there."""

from functools import partial

import pytest
import torch

from custom_ops import backend
from custom_ops.bias_act import ACTIVATIONS, bias_act
from custom_ops.filtered_lrelu import filtered_lrelu
from custom_ops.upfirdn2d import fir_filter, upfirdn2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Of the largest value: the reference rounds between its steps, the kernels do not."""
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def assert_equal_to_the_reference(operation, x, *others):
    """Output and gradients of the kernels equal those of float64 plain PyTorch."""
    results = []
    for policy, dtype in (("native", x.dtype), ("reference", torch.float64)):
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, *others)]
        with backend.using(policy):
            out = operation(*leaves)
            probe = torch.arange(out.numel(), device="cuda").reshape(out.shape).sin().to(dtype)
            results.append((out, *torch.autograd.grad(out, leaves, probe)))
    for actual, expected in zip(*results, strict=True):
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[x.dtype] * expected.abs().max()


@pytest.fixture(params=[str(dtype) for dtype in TOLERANCES])
def dtype(request):
    return next(dtype for dtype in TOLERANCES if str(dtype) == request.param)


@pytest.fixture(params=LAYOUTS, ids=str)
def images(request, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 45, 39, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=request.param)


def test_bias_act(images):
    """Every activation, with bias and clamp."""
    b = torch.randn(5, device="cuda", dtype=images.dtype)
    for act in ACTIVATIONS:
        operation = partial(bias_act, act=act, clamp=1.5)
        assert_equal_to_the_reference(operation, images, b)


def test_upfirdn2d(images):
    """Four and twelve taps, planes and lines, at several rates."""
    for up, down in [(1, 1), (2, 1), (1, 2), (3, 2)]:
        for f in (fir_filter([1, 3, 3, 1]), torch.rand(12) / 12, torch.rand(5, 7) / 35):
            settings = {"up": up, "down": down, "padding": [7, 5, 6, 3]}
            operation = partial(upfirdn2d, f=f.to("cuda", torch.float64), **settings)
            assert_equal_to_the_reference(operation, images)


def test_filtered_lrelu(images):
    """The rates and filters of StyleGAN3, T and R."""
    b = torch.randn(5, device="cuda", dtype=images.dtype)
    for up, down, taps_up, taps_down in [
        (2, 2, 12, 12),
        (4, 2, 24, 12),
        (2, 2, 12, (12, 12)),
        (1, 1, 1, 1),
    ]:
        fu = torch.rand(taps_up, device="cuda", dtype=torch.float64)
        fd = torch.rand(taps_down, device="cuda", dtype=torch.float64)
        settings = {"up": up, "down": down, "padding": [11, 10, 9, 12]}
        operation = partial(biased_lrelu, fu=fu / fu.sum(), fd=fd / fd.sum(), **settings)
        assert_equal_to_the_reference(operation, images, b)


def biased_lrelu(x, b, **settings):
    return filtered_lrelu(x, b=b, **settings)


def test_kernels_run_on_the_current_stream():
    """What the stream does before and after is seen in that order."""
    x = torch.zeros(4, 64, 256, 256, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), backend.using("native"):
        out = bias_act(x.add_(1), act="relu", gain=2.0).add_(1)
    stream.synchronize()
    assert (out == 3).all()


def test_more_than_two_gigabytes_are_indexed():
    """Samples beyond 2^31 are reached, where memory allows."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    x = torch.zeros(1, 33, 8192, 8192, device="cuda", dtype=torch.float16)
    x[0, -1, -1, -1] = 1
    with backend.using("native"):
        assert bias_act(x, act="relu", gain=2.0)[0, -1, -1, -1] == 2
        assert upfirdn2d(x, torch.ones(2, device="cuda"), padding=(1, 0))[0, -1, -1, -1] == 1
