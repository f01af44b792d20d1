"""The generators: images per second and peak memory, kernel policies side by side.

    python -m benchmarks.generators                              on the CPU
    python -m benchmarks.generators --device cuda --precision bfloat16 --precision float16
    python -m benchmarks.generators --published PATH             beside the published code

PATH is a checkout of the published StyleGAN3 repository, which holds StyleGAN2 too; it runs
unmodified in this process, in float32, on the same weights and latents. Each number is the median
of alternating runs, so that a busy machine slows all columns alike. A column whose images differ
from the first one's by more than 1e-3 of their largest value (in lower precision: 0.05) stops the
program.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn

from benchmarks._memory import in_use, reset_peak
from benchmarks._published import on_path
from core.errors import UserError
from core.precision import DTYPES, Precision, compute_precision
from custom_ops import backend
from generators import stylegan2, stylegan3

Network = Callable[[Tensor], Tensor]
TOLERANCE = 1e-3
"""Of the largest value: far above rounding, far below another network."""
LOWER_TOLERANCE = 0.05
"""The same for bfloat16 and float16."""
PASSES = ("forward", "forward+backward")
_MAPPING = {"num_layers": 2}
_SHAPE = {"z_dim": 512, "w_dim": 512, "img_channels": 3, "mapping": _MAPPING}
_ALIAS_FREE = {**_SHAPE, "img_resolution": 64, "channel_base": 16384}
_RADIAL = {"conv_kernel": 1, "use_radial_filters": True}


class Case(NamedTuple):
    """A named generator at a batch size."""

    family: ModuleType
    batch: int
    settings: dict[str, object]


CASES = {
    "stylegan2-32": Case(stylegan2, 16, {**_SHAPE, "img_resolution": 32, "channel_base": 32768}),
    "stylegan3-t-64": Case(stylegan3, 4, _ALIAS_FREE),
    "stylegan3-r-64": Case(stylegan3, 4, {**_ALIAS_FREE, **_RADIAL}),
}


class Run(NamedTuple):
    """Time and memory of one run."""

    seconds: float
    mebibytes: float | None
    """Peak above the memory in use before; None if the system does not tell."""


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Runs each.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Default: all."
)
@click.option("--passes", multiple=True, type=click.Choice(PASSES), help="Default: both.")
@click.option("--batch", type=click.IntRange(1), help="Images a batch, instead of the case's.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["bfloat16", "float16"]),
    help="A column of it too.",
)
@click.option("--published", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(
    device: str,
    runs: int,
    threads: int,
    names: tuple[str, ...],
    passes: tuple[str, ...],
    batch: int | None,
    precisions: tuple[Precision, ...],
    published: Path | None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    backend.choose("native", device)
    click.echo(
        "| generator | pass | column | images/s | peak MiB | time, native = 1 | difference |"
    )
    click.echo("|---|---|---|---:|---:|---:|---:|")

    # one case after the other
    for name in names or CASES:
        case = CASES[name]
        torch.manual_seed(0)
        latents = torch.randn(batch or case.batch, 512, device=device)
        columns = _columns(case, device, precisions, published)
        differences = _differences(columns, latents)

        # a row for each pass and column
        for kind in passes or PASSES:
            found = _measured(columns, latents, backward=kind == PASSES[1], runs=runs)
            base = _median_seconds(found["native"])
            for column, results in found.items():
                seconds = _median_seconds(results)
                click.echo(
                    f"| {name} | {kind} | {column} | {len(latents) / seconds:.3g} "
                    f"| {_peak(results)} | {seconds / base:.2f} | {differences[column]:.1e} |"
                )


def _columns(
    case: Case, device: str, precisions: tuple[Precision, ...], published: Path | None
) -> dict[str, Network]:
    """Return the implementations under comparison, with one and the same weights."""
    student = case.family.build(case.family.Config.model_validate(case.settings))
    student = student.to(device).eval()
    columns = {policy: _under(policy, student) for policy in ("native", "reference")}
    columns |= {precision: _lowered(precision, student) for precision in precisions}
    if published is not None:
        theirs = _published(case, published).to(device).eval()
        theirs.load_state_dict(student.state_dict(), strict=True)
        columns["published"] = lambda z: theirs(
            z, z.new_zeros(len(z), 0), noise_mode="const", force_fp32=True
        )
    return columns


def _under(policy: backend.KernelPolicy, student: nn.Module) -> Network:
    def run(latents: Tensor) -> Tensor:
        with backend.using(policy):
            return student(latents)

    return run


def _lowered(precision: Precision, student: nn.Module) -> Network:
    native = _under("native", student)

    def run(latents: Tensor) -> Tensor:
        with compute_precision(precision, [student]):
            return native(latents)

    return run


def _published(case: Case, checkout: Path) -> nn.Module:
    """Return the published network of this shape."""
    with on_path(checkout):
        module = f"training.networks_{case.family.__name__.rpartition('.')[2]}"
        generator = importlib.import_module(module).Generator
    settings = dict(case.settings)
    return generator(c_dim=0, mapping_kwargs=settings.pop("mapping"), **settings)


@torch.no_grad()
def _differences(columns: dict[str, Network], latents: Tensor) -> dict[str, float]:
    """Return how far each column's image is from the first one's, over its largest value.

    It is of one latent, and warms up. Raises UserError above the tolerance.
    """
    images = {column: network(latents[:1]) for column, network in columns.items()}
    first = next(iter(images.values()))
    found = {
        column: ((image - first).abs().max() / first.abs().max()).item()
        for column, image in images.items()
    }
    for column, difference in found.items():
        if not difference <= (LOWER_TOLERANCE if column in DTYPES else TOLERANCE):
            raise UserError(f"the images of {column} are not the same: {difference:.1e} apart")
    return found


def _measured(
    columns: dict[str, Network], latents: Tensor, *, backward: bool, runs: int
) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {column: [] for column in columns}
    for network in columns.values():
        _run(network, latents[:1], backward=backward)  # warms up
    for _ in range(runs):
        for column, network in columns.items():
            found[column].append(_run(network, latents, backward=backward))
    return found


def _run(network: Network, latents: Tensor, *, backward: bool) -> Run:
    """Return time and memory of one pass; gradients are of the weights, and accumulate."""
    before = reset_peak(latents.device)
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        images = network(latents)
        if backward:
            images.square().mean().backward()
    if latents.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = in_use(latents.device, peak=True)
    return Run(seconds, None if peak is None or before is None else peak - before)


def _median_seconds(results: list[Run]) -> float:
    return statistics.median(result.seconds for result in results)


def _peak(results: list[Run]) -> str:
    known = [result.mebibytes for result in results if result.mebibytes is not None]
    return f"{statistics.median(known):.0f}" if known else "unknown"


if __name__ == "__main__":
    main()
