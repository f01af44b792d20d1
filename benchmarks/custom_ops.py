"""The custom operations, native against plain PyTorch: time of forward and backward together.

    python -m benchmarks.custom_ops                  on the CPU
    python -m benchmarks.custom_ops --device cuda

Shapes are those of StyleGAN2 and StyleGAN3 layers. "stuffed" is the definition taken literally:
zeros between the pixels, a convolution over all of them, most results dropped. Each line is the
median of alternating runs, so that a busy machine slows all columns alike.

On a GPU there is a second table, of group normalization in the shapes of EDM's and ADM's U-Nets
(on a CPU it has no kernel). Passes are replayed from CUDA graphs, so that no launch is waited for;
GB/s counts the tensors that the kernels read and write: 3 forward, 5 more backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops import backend
from custom_ops.bias_act import bias_act
from custom_ops.filtered_lrelu import filtered_lrelu
from custom_ops.group_norm import group_norm
from custom_ops.upfirdn2d import fir_filter, upfirdn2d

Operation = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """One operation at one shape."""

    name: str
    shape: tuple[int, int, int, int]
    ours: Operation
    stuffed: Operation


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--runs", default=7, show_default=True, help="Alternating runs of each column.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(device: str, runs: int, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with backend.using("native"):
        backend.choose("native", device)
    click.echo("| operation | shape | layout | native ms | native : reference : stuffed |")
    click.echo("|---|---|---|---:|---|")
    for case in _cases(device):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(case.shape, device=device).to(memory_format=layout).requires_grad_()
            native, reference, stuffed = _medians(case, x, runs=runs)
            ratios = f"1 : {reference / native:.1f} : {stuffed / native:.1f}"
            name = "NHWC" if layout == torch.channels_last else "NCHW"
            shape = "x".join(map(str, case.shape))
            click.echo(f"| {case.name} | {shape} | {name} | {native * 1e3:.2f} | {ratios} |")
    if torch.device(device).type == "cuda":
        click.echo("\n| group_norm | type | layout | pass | native us | GB/s | native : PyTorch |")
        click.echo("|---|---|---|---|---:|---:|---|")
        for line in _norm_lines(device, runs=runs):
            click.echo(line)


def _cases(device: str) -> list[Case]:
    taps = {count: torch.hann_window(count + 2, device=device)[1:-1] for count in (12, 24)}
    lines = {count: line / line.sum() for count, line in taps.items()}
    plane = fir_filter((1, 3, 3, 1)).to(device)
    disc = torch.outer(lines[12], lines[12])
    wide, narrow = (torch.randn(count, device=device) for count in (512, 128))

    def lrelu(name: str, size: int, fu: Tensor, fd: Tensor, up: int, padding: list[int]) -> Case:
        settings = {"up": up, "down": 2, "padding": padding, "clamp": 256.0}
        return Case(
            f"filtered_lrelu {name}",
            (4, 128, size, size),
            lambda x: filtered_lrelu(x, fu, fd, narrow, **settings),
            lambda x: _stuffed_lrelu(x, fu, fd, narrow, **settings),
        )

    def fir(name: str, shape: tuple[int, int, int, int], **settings: object) -> Case:
        ours, stuffed = (partial(call, f=plane, **settings) for call in (upfirdn2d, _stuffed))
        return Case(f"upfirdn2d {name}", shape, ours, stuffed)

    def activation(shape: tuple[int, int, int, int]) -> Case:
        return Case(
            "bias_act lrelu",
            shape,
            lambda x: bias_act(x, wide, act="lrelu", clamp=256.0),
            lambda x: (F.leaky_relu(x + wide[:, None, None], 0.2) * 2**0.5).clamp(-256, 256),
        )

    return [
        lrelu("up 2, down 2", 84, lines[12], lines[12], 2, [11, 10, 11, 10]),
        lrelu("up 4, down 2", 52, lines[24], lines[12], 4, [-3, -6, -3, -6]),
        lrelu("up 2, down 2", 36, lines[12], lines[12], 2, [11, 10, 11, 10]),
        lrelu("up 2, down 2, 2-D filter", 84, lines[12], disc, 2, [11, 10, 11, 10]),
        fir("blur 4x4", (16, 512, 33, 33), padding=(1, 1), gain=4.0),
        fir("up 2, 4x4", (16, 3, 16, 16), up=2, padding=(2, 1, 2, 1), gain=4.0),
        fir("blur 4x4", (4, 64, 257, 257), padding=(1, 1), gain=4.0),
        activation((16, 512, 32, 32)),
        activation((16, 512, 4, 4)),
    ]


NORM_SHAPES = [
    (128, 128, 32, 32),
    (128, 256, 32, 32),
    (128, 512, 32, 32),
    (128, 256, 16, 16),
    (128, 512, 16, 16),
    (128, 256, 8, 8),
    (64, 192, 64, 64),
    (64, 384, 32, 32),
    (64, 768, 8, 8),
]
"""Of CIFAR-10's DDPM++ and ImageNet-64's ADM; all normalize in 32 groups."""


def _norm_lines(device: str, *, runs: int) -> Iterator[str]:
    """Yield a row for each shape, type, layout and pass, as it is measured."""
    for shape in NORM_SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for layout in (torch.channels_last, torch.contiguous_format):
                images = torch.randn(shape, device=device, dtype=dtype)
                images = images.contiguous(memory_format=layout)
                name = "NHWC" if layout == torch.channels_last else "NCHW"
                start = f"{'x'.join(map(str, shape))} | {str(dtype)[6:]} | {name}"
                for label, tensors, is_backward in (("forward", 3, False), ("both", 8, True)):
                    native, reference = _norm_medians(images, is_backward=is_backward, runs=runs)
                    rate = tensors * images.nbytes / native / 1e9
                    times = f"{native * 1e6:.1f} | {rate:.0f} | 1 : {reference / native:.1f}"
                    yield f"| {start} | {label} | {times} |"


def _norm_medians(images: Tensor, *, is_backward: bool, runs: int) -> tuple[float, float]:
    """Return seconds of a block's second normalization with SiLU: native, plain PyTorch."""
    count, channels = images.shape[:2]
    x, probe = images.clone().requires_grad_(is_backward), torch.randn_like(images)
    weight, bias = (
        torch.randn(channels, device=x.device).requires_grad_(is_backward) for _ in range(2)
    )
    pre_bias = torch.randn(count, channels, device=x.device).requires_grad_(is_backward)

    def normalize() -> object:
        y = group_norm(x, 32, weight, bias, pre_bias=pre_bias, silu=True)
        return torch.autograd.grad(y, (x, weight, bias, pre_bias), probe) if is_backward else y

    graphs = []
    for policy in ("native", "reference"):
        with backend.using(policy):
            graphs.append(_captured(normalize))
    times = [[_replay_seconds(graph) for graph in graphs] for _ in range(runs + 1)]
    native, reference = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return native, reference


def _captured(operation: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return the kernels of an operation, to be replayed; it has run before, to choose them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            operation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operation()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, *, repeats: int = 10) -> float:
    """Return the seconds of one replay, as the GPU's own clock counts them."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(repeats):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / 1e3 / repeats


def _medians(case: Case, x: Tensor, *, runs: int) -> list[float]:
    """Return seconds of forward and backward: native, reference, stuffed."""
    columns = [_under("native", case.ours), _under("reference", case.ours), case.stuffed]
    probe = torch.randn_like(case.ours(x))
    times: list[list[float]] = [[] for _ in columns]
    for run in range(runs + 1):
        for column, operation in enumerate(columns):
            started = _now(x)
            operation(x).backward(probe)
            if run:  # the first warms up
                times[column].append(_now(x) - started)
    return [statistics.median(column) for column in times]


def _under(policy: backend.KernelPolicy, operation: Operation) -> Operation:
    def run(x: Tensor) -> Tensor:
        with backend.using(policy):
            return operation(x)

    return run


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _stuffed(
    x: Tensor,
    f: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, ...] | list[int] = (0, 0, 0, 0),
    gain: float = 1.0,
) -> Tensor:
    """Return upfirdn2d by its definition: zeros between, pad, filter, drop."""
    count, channels, height, width = x.shape
    x = F.pad(x.reshape(count, channels, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
    x = x.reshape(count, channels, height * up, width * up)
    x0, x1, y0, y1 = padding if len(padding) == 4 else (*padding, *padding)
    x = F.pad(x, (x0, x1, y0, y1))
    flipped = f.flip(tuple(range(f.ndim)))
    passes = (flipped,) if f.ndim == 2 else (flipped[None, :], flipped[:, None])
    for kernel in passes:
        x = F.conv2d(x, kernel.expand(channels, 1, *kernel.shape), groups=channels)
    return x[:, :, ::down, ::down] * gain


def _stuffed_lrelu(
    x: Tensor,
    fu: Tensor,
    fd: Tensor,
    b: Tensor,
    *,
    up: int,
    down: int,
    padding: list[int],
    clamp: float,
) -> Tensor:
    x = _stuffed(x + b[:, None, None], fu, up=up, padding=padding, gain=float(up**2))
    x = (F.leaky_relu(x, 0.2) * 2**0.5).clamp(-clamp, clamp)
    return _stuffed(x, fd, down=down)


if __name__ == "__main__":
    main()
