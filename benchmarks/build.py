"""How long the kernels take to compile: ours, and the plug-ins of the published code.

    python -m benchmarks.build                                     for the CPU
    python -m benchmarks.build --device cuda --published PATH      for the GPU, all at once

PATH is a checkout of the published StyleGAN3 repository. Each library is compiled in a process of
its own, all at the same time. One that an earlier program left is loaded, which takes a moment.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import click

from benchmarks._published import on_path
from core.errors import UserError
from custom_ops import backend

PLUGINS = ("bias_act", "upfirdn2d", "filtered_lrelu")


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--published", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(device: str, published: Path | None) -> None:
    """Print the table."""
    click.echo("| kernels | s | outcome |")
    click.echo("|---|---:|---|")
    plugins = PLUGINS if published is not None and device != "cpu" else ()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 + len(plugins), mp_context=spawn) as pool:
        jobs: dict[Future[float], str] = {pool.submit(_ours, device): "ours"}
        if published is not None:
            jobs |= {pool.submit(_theirs, published, name): f"published {name}" for name in plugins}
        failures = []
        for job in as_completed(jobs):
            error = job.exception()
            if error is None:
                click.echo(f"| {jobs[job]} | {job.result():.1f} | loaded |")
                continue
            failures.append(jobs[job])
            reason = " ".join(str(error).split()).replace("|", "/")[:300]
            click.echo(f"| {jobs[job]} | unknown | {type(error).__name__}: {reason} |")
    if failures:
        raise UserError(f"no kernels: {', '.join(failures)}")


def _ours(device: str) -> float:
    """Return the seconds until our kernels are there."""
    started = time.perf_counter()
    backend.choose("native", device)
    return time.perf_counter() - started


def _theirs(checkout: Path, name: str) -> float:
    """Return the seconds until a plug-in of the published code is there."""
    with on_path(checkout):
        module = importlib.import_module(f"torch_utils.ops.{name}")
    started = time.perf_counter()
    module._init()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
