"""A round of Diff-Instruct, score and student step: images per second and peak memory by setting.

    python -m benchmarks.step                               CIFAR-10's DDPM++, on the CPU
    python -m benchmarks.step --device cuda --batch 128 --shape ffhq-64 --shape imagenet-64
    python -m benchmarks.step --published PATH              beside the official code's step
    python -m benchmarks.step --published PATH --in-turns   on a machine that is busy

The student is the teacher at one noise level (`--distill`), all weights are drawn. A round holds
both steps, both optimizers and the moving average. Each column runs in a process of its own, so
that its peak memory is its own, and one is in memory at a time: its row is printed when it has
been measured. With `--in-turns` all of them are held at once and play their rounds in turns, so
that a busy machine slows all alike. Speeds are in units of the first row's, which is the official
code's if it is there. The device's rate is measured too, after the rounds.

PATH is a checkout of the official Diff-Instruct code. Its networks and losses run unmodified, in
the order and with the settings of its training loop: train mode with dropout, contiguous float32.
Augmentation and the code for several GPUs are left out, which spares it time. It saves the state of
CUDA's random numbers in between, in whose place it is given the CPU's if there is no CUDA.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, cast

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._memory import in_use
from benchmarks._published import on_path
from core.distributed import World
from core.errors import UserError
from core.precision import DTYPES, Precision
from core.roles import Networks
from generators import one_step_edm
from objectives import diff_instruct
from teachers import edm
from training import state as training_state
from training import step
from training.compilation import Mode, compiled_networks
from training.config import Config
from training.state import TrainState

_DDPMPP = {"img_channels": 3, "model_type": "SongUNet", "augment_dim": 9}
SHAPES = {
    "cifar10": {**_DDPMPP, "img_resolution": 32, "channel_mult": (2, 2, 2), "dropout": 0.13},
    "ffhq-64": {**_DDPMPP, "img_resolution": 64, "dropout": 0.05},
    "imagenet-64": {"img_channels": 3, "img_resolution": 64, "label_dim": 1000},
    "tiny": {**_DDPMPP, "img_resolution": 8, "model_channels": 16, "channel_mult": (1,)},
}
"""The published networks: DDPM++ of 55.7 M and 61.8 M weights, ADM of 295.9 M. And a tiny one, to
try the command out.
"""
PUBLISHED = "official code"


class Column(NamedTuple):
    """A setting of our round."""

    precision: Precision
    shared_batch: bool
    compile: Mode | None = None


COLUMNS = {
    "float32": Column("float32", False),
    "float32, shared batch": Column("float32", True),
    "bfloat16": Column("bfloat16", False),
    "bfloat16, shared batch": Column("bfloat16", True),
    "tf32, shared batch": Column("tf32", True),
    "float16, shared batch": Column("float16", True),
    "float32, shared batch, compiled": Column("float32", True, "default"),
    "bfloat16, shared batch, compiled": Column("bfloat16", True, "default"),
    "bfloat16, shared batch, CUDA graphs": Column("bfloat16", True, "reduce-overhead"),
}
FOR_A_CPU = tuple(COLUMNS)[:4]
"""A CPU rounds no products to tf32, is slow in float16, and has no graphs to replay."""


class Task(NamedTuple):
    """Task of a process."""

    column: str
    network: dict[str, object]
    """Settings of teachers/edm.py, in its authors' words."""
    batch: int
    device: str
    threads: int
    published: Path | None


class Report(NamedTuple):
    """Measurements of a process."""

    mebibytes: float | None
    """Peak of the process, or of the GPU's memory in use."""
    flops: float
    """Multiply and add of the convolutions and matrix products of one round."""
    rate: float
    """FLOP/s of the device, at best, in the column's precision."""


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), default=["cifar10"]
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--column",
    "names",
    multiple=True,
    type=click.Choice(list(COLUMNS)),
    help="Default: all; on a CPU, the first four.",
)
@click.option("--in-turns", is_flag=True, help="Hold all columns at once, one round each in turns.")
@click.option("--published", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(
    device: str,
    shapes: tuple[str, ...],
    batch: int,
    rounds: int,
    threads: int,
    names: tuple[str, ...],
    in_turns: bool,
    published: Path | None,
) -> None:
    """Print the table."""
    usual = FOR_A_CPU if device == "cpu" else COLUMNS
    columns = [*([PUBLISHED] if published else []), *(names or usual)]
    click.echo(
        "| network | column | s a round | images/s | peak MiB | of device rate "
        f"| speed, {columns[0]} = 1 |"
    )
    click.echo("|---|---|---:|---:|---:|---:|---:|")
    failures: list[str] = []
    for shape in shapes:
        tasks = [Task(name, SHAPES[shape], batch, device, threads, published) for name in columns]
        base = None
        for held in [tasks] if in_turns else [[task] for task in tasks]:
            try:
                measured = _measured(held, rounds=rounds)
            except UserError as error:
                failures.append(f"{shape}, {error}")
                continue
            for task, (seconds, report) in zip(held, measured, strict=True):
                if task is tasks[0]:
                    base = statistics.median(seconds)
                row = _row(task.column, seconds, report, batch=batch, base=base)
                click.echo(f"| {shape} {row}")
    if failures:
        raise UserError("; ".join(failures))


def _row(name: str, seconds: list[float], report: Report, *, batch: int, base: float | None) -> str:
    """Return the row of a column, without its network. base: the first column's median seconds."""
    median = statistics.median(seconds)
    peak = "unknown" if report.mebibytes is None else f"{report.mebibytes:.0f}"
    speed = "unknown" if base is None else f"{base / median:.2f}"
    return (
        f"| {name} | {median:.3g} | {batch / median:.3g} | {peak} "
        f"| {report.flops / median / report.rate:.0%} | {speed} |"
    )


def _measured(tasks: list[Task], *, rounds: int) -> list[tuple[list[float], Report]]:
    """Return the seconds of each column's rounds, taken in turns, and its report."""
    spawn = multiprocessing.get_context("spawn")
    seconds: list[list[float]] = [[] for _ in tasks]
    with contextlib.ExitStack() as stack:
        lines = []
        for task in tasks:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(task, theirs), daemon=True)
            process.start()
            stack.callback(process.join)  # its memory is free before the next one starts
            stack.callback(process.kill)
            theirs.close()
            lines.append(ours)
        for line, task in zip(lines, tasks, strict=True):
            _asked(line, "warm up", task)
        for _ in range(rounds):
            for line, task, taken in zip(lines, tasks, seconds, strict=True):
                taken.append(_asked(line, "round", task))
        reports = [_asked(line, "report", task) for line, task in zip(lines, tasks, strict=True)]
    return list(zip(seconds, reports, strict=True))


def _asked(line: Connection, request: str, task: Task):
    line.send(request)
    try:
        return line.recv()
    except (EOFError, ConnectionError):
        raise UserError(f"the process of {task.column} ended; what it said is above") from None


def _serve(task: Task, line: Connection) -> None:
    """Answer "warm up", "round" (with its seconds) and "report" until the line is closed."""
    torch.set_num_threads(task.threads)
    official = task.column == PUBLISHED
    device = torch.device(task.device)
    with (
        contextlib.nullcontext(_official(task)) if official else _ours(task) as play,
        contextlib.suppress(EOFError),
    ):
        while request := line.recv():
            if request == "report":
                peak = in_use(device, peak=True)
                line.send(Report(peak, _flops(play), _device_rate(task)))
                continue
            started = time.perf_counter()
            play()
            if device.type == "cuda":
                torch.cuda.synchronize()
            line.send(time.perf_counter() - started)


@contextlib.contextmanager
def _ours(task: Task) -> Iterator[Callable[[], object]]:
    """Yield a function that runs one iteration of ours."""
    device, column = torch.device(task.device), COLUMNS[task.column]
    state = state_of(task.network, task.device)
    config = Config(batch_size=task.batch, precision=column.precision, compile=column.compile)
    settings = diff_instruct.Config(shared_batch=column.shared_batch)
    objective, alone = diff_instruct.build(settings), World.single(device)
    with compiled_networks(state.networks, column.compile, device) as networks:
        yield lambda: list(
            step.training_iteration(state, objective, config, trained=networks, world=alone)
        )


def state_of(
    network: dict[str, object],
    device: str,
    *,
    shard: Sequence[str] = (),
    world: World | None = None,
) -> TrainState:
    """Return the start of `--distill`: teacher, score and student of one shape, weights drawn."""
    torch.manual_seed(0)
    teacher = edm.build(edm.Config.model_validate(network))
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    student = one_step_edm.from_teacher(teacher, one_step_edm.Config())
    config = Config()
    return training_state.start(
        Networks(student, copy.deepcopy(teacher), teacher),
        student_lr=config.student_lr,
        score_lr=config.score_lr,
        optimizer=config.optimizer,
        shard=shard,
        world=world,
    )


def _official(task: Task) -> Callable[[], object]:
    """Return a function that runs one iteration of the official code, in its order."""
    assert task.published is not None
    with on_path(task.published):
        from training.di_loss import DI_EDMLoss  # pyright: ignore
        from training.networks import EDMPrecond  # pyright: ignore
    if task.device == "cpu":
        torch.cuda.get_rng_state, torch.cuda.set_rng_state = (
            torch.get_rng_state,
            torch.set_rng_state,
        )
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    shape = dict(task.network)
    classes, resolution = (
        cast(int, shape.pop("label_dim", 0)),
        cast(int, shape.pop("img_resolution")),
    )
    torch.manual_seed(0)
    net = EDMPrecond(resolution, shape.pop("img_channels"), label_dim=classes, **shape)
    net = net.to(task.device).eval().requires_grad_(False)
    score, student = (copy.deepcopy(net).train().requires_grad_(True) for _ in range(2))
    average = copy.deepcopy(student).eval().requires_grad_(False)
    score_adam, student_adam = (
        torch.optim.Adam(module.parameters(), lr=1e-5, betas=(0.0, 0.999), eps=1e-8)
        for module in (score, student)
    )
    loss_of = DI_EDMLoss()

    def made():
        latents = torch.randn(task.batch, 3, resolution, resolution, device=task.device)
        labels = torch.eye(max(classes, 1), classes, device=task.device)[:1].expand(task.batch, -1)
        sigma = torch.ones(task.batch, 1, 1, 1, device=task.device)
        augment = torch.zeros(task.batch, 9, device=task.device)
        return student(latents, sigma, labels, augment_labels=augment), labels

    def stepped(adam, module, loss) -> None:
        adam.zero_grad(set_to_none=True)
        loss.sum().mul(1 / task.batch).backward()
        for parameter in module.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        adam.step()

    def play() -> None:
        student.eval()
        with torch.no_grad():
            images, labels = made()
        student.train()
        stepped(score_adam, score, loss_of(net=score, images=images, labels=labels))
        images, labels = made()
        stepped(student_adam, student, loss_of.gloss(net, score, images, labels))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), student.parameters(), strict=True):
                slow.copy_(fast.detach().lerp(slow, 0.999))

    return play


def _flops(play: Callable[[], object]) -> int:
    """Return the multiplications and additions of a round, compiled or not."""
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), counter:
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        play()
    return counter.get_total_flops()


def _device_rate(task: Task) -> float:
    """Return FLOP/s in the precision of a column, at best: of a product of matrices, or of a
    convolution, which some processors do faster.
    """
    column, device = COLUMNS.get(task.column), task.device
    dtype = torch.float32 if column is None else DTYPES[column.precision]
    allows_tf32 = column is not None and column.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allows_tf32
    size = 2048 if device == "cpu" else 8192
    first, second = torch.randn(2, size, size, device=device).to(dtype)
    images = torch.randn(8, 256, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    product = _at_best(lambda: torch.mm(first, second), device)
    convolution = _at_best(lambda: torch.conv2d(images, kernel, padding=1), device)
    return max(2 * size**3 / product, 2 * images.numel() * kernel[:, 0].numel() / convolution)


def _at_best(run: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest run within one second."""
    seconds: list[float] = []
    while sum(seconds) < 1:
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
