"""The native kernels on a GPU equal the reference there."""

from functools import partial

import pytest
import torch

from custom_ops import backend
from custom_ops.bias_act import ACTIVATIONS, bias_act
from custom_ops.filtered_lrelu import filtered_lrelu
from custom_ops.group_norm import folds_bias, group_norm
from custom_ops.upfirdn2d import fir_filter, upfirdn2d
from teachers._layers import Block, BlockStyle, Init

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
            probe = torch.arange(out.numel(), device="cuda").reshape(out.shape).sin()
            probe = probe.to(x.dtype).to(dtype)
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


def normalized(x, weight, bias, scale, shift, pre_bias, *, groups, silu):
    terms = {"scale": scale, "shift": shift, "pre_bias": pre_bias}
    return group_norm(x, groups, weight, bias, silu=silu, **terms)


def some_terms(x):
    """Return weight, bias, scale, shift and pre_bias for x."""
    n, c = x.shape[:2]
    shapes = [(c,), (c,), (n, c), (n, c), (n, c)]
    return [torch.randn(shape, device="cuda").to(x.dtype) for shape in shapes]


def test_group_norm(images):
    """Sizes that fit no pack of samples, with all terms."""
    for silu in (False, True):
        operation = partial(normalized, groups=1, silu=silu)
        assert_equal_to_the_reference(operation, images, *some_terms(images))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((8, 128, 32, 32), 32),
        ((2, 256, 64, 64), 32),  # slices of an image
        ((16, 192, 16, 16), 32),  # groups that end within a pack
        ((4, 1024, 8, 8), 32),
        ((2, 1536, 4, 4), 32),
    ],
)
def test_group_norm_in_the_shapes_of_networks(shape, groups, layout, dtype):
    """Packs of samples, blocks of many threads: output and all gradients."""
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    operation = partial(normalized, groups=groups, silu=True)
    assert_equal_to_the_reference(operation, x, *some_terms(x))
    with backend.using("native"):
        assert operation(x, *some_terms(x)).stride() == x.stride()


def test_group_norm_of_a_large_mean(images):
    """Mean 1000 and standard deviation 1: as right as x itself is, in float32 and float64."""
    if images.dtype.itemsize < 4:
        pytest.skip("16 bits do not resolve 1 beside 1000")
    x = images + 1000
    with backend.using("native"):
        out = group_norm(x, 1)
    expected = torch.nn.functional.group_norm(x.double().contiguous(), 1)
    assert (out.double() - expected).abs().max() < 3e-4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_group_norm_is_the_same_in_every_run(layout):
    """A full batch of CIFAR-10's network has the same bits again, output and gradients."""
    torch.manual_seed(0)
    x = torch.randn(128, 256, 32, 32, device="cuda", dtype=torch.bfloat16)
    leaves = [x.contiguous(memory_format=layout), *some_terms(x)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    probe, results = torch.randn_like(leaves[0]), []
    for _ in range(2):
        with backend.using("native"):
            out = normalized(*leaves, groups=32, silu=True)
            results.append((out, *torch.autograd.grad(out, leaves, probe)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("is_adaptive", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_block_of_a_u_net(resample, is_adaptive):
    """Output and gradients of all parameters; conv0's bias is added by the normalization."""
    torch.manual_seed(0)
    init = Init("kaiming_normal", bias_scale=1.0)
    style = BlockStyle(64, 0.0, (1, 1), init, init, init, 1, 0.7, 1e-6, True, is_adaptive)
    block = Block(64, 128, style=style, attention=True, resample=resample)
    block.to("cuda", torch.float64, memory_format=torch.channels_last)
    features = torch.randn(4, 64, 16, 16, device="cuda", dtype=torch.float64)
    features = features.contiguous(memory_format=torch.channels_last)
    embedding, results = torch.randn(4, 64, device="cuda", dtype=torch.float64), {}
    for policy in ("native", "reference"):
        with backend.using(policy):
            assert folds_bias(features) == (policy == "native")
            leaves = [features.clone().requires_grad_(), *block.parameters()]
            out = block(leaves[0], embedding)
            results[policy] = (out, *torch.autograd.grad(out.square().sum(), leaves))
    for actual, expected in zip(*results.values(), strict=True):
        assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-9


def test_group_norm_is_captured_in_a_cuda_graph():
    """Forward and backward allocate and launch nothing that a graph cannot replay."""
    x = torch.randn(4, 64, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    x.requires_grad_()
    stream = torch.cuda.Stream()
    with backend.using("native"):
        with torch.cuda.stream(stream):
            torch.autograd.grad(group_norm(x, 8, silu=True).sum(), x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (gradient,) = torch.autograd.grad(group_norm(x, 8, silu=True).square().sum(), x)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        (expected,) = torch.autograd.grad(group_norm(x, 8, silu=True).square().sum(), x)
    assert torch.equal(gradient, expected)


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
        assert group_norm(x, 33)[0, -1, -1, -1] > 300  # 1 / sqrt(eps): all others are 0
