"""Share of an iteration that the loop itself takes, by part.

    python -m benchmarks.loop_overhead                      CIFAR-10's DDPM++, on the CPU
    python -m benchmarks.loop_overhead --device cuda --batch 128 --column "bfloat16, shared batch"

`training.trainer.train` runs as in a run, with a row of stats after every round. The networks'
forward passes, backward passes and the optimizers are timed as they are called; what is left of the
time from one round's end to the next is the loop's: draws, noise and losses, gradient norms and
their check, the moving average, stats. On a GPU the device is waited for around each part, so
that its work counts if it was asked for.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import click
import torch
from torch import Tensor

from benchmarks.step import COLUMNS, SHAPES, state_of
from core.distributed import World
from core.randomness import Draws
from core.run_folder import RunFolder
from objectives import diff_instruct
from training import step, trainer
from training.config import Config

NETWORKS = ("forward", "backward", "optimizer")
LOOP = ("draws", "gradient norms and check", "moving average")
"""Parts of the loop that are timed by themselves; the rest of it is `other`."""
_EAGER = [name for name, column in COLUMNS.items() if column.compile is None]
"""Compiled networks are others than those whose calls are timed."""


class Stopwatch:
    """Seconds by part; a part timed within another counts for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._is_running = device, False
        self.seconds: Counter[str] = Counter()

    def now(self) -> float:
        """Return the time after synchronizing the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, part: str, function: Callable) -> Callable:
        """Return the function, timed."""

        def timed(*args: object, **options: object) -> object:
            if self._is_running:
                return function(*args, **options)
            self._is_running, started = True, self.now()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += self.now() - started  # pyright: ignore[reportArgumentType]
                self._is_running = False

        return timed


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="cifar10", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--column", type=click.Choice(_EAGER), default="float32", show_default=True)
def main(device: str, shape: str, batch: int, rounds: int, threads: int, column: str) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    found = measured(SHAPES[shape], column, batch=batch, rounds=rounds, device=device)
    total = statistics.median(each.total() for each in found)
    click.echo(f"{shape}, {column}, batch {batch}, {device}: {total:.3g} s a round\n")
    click.echo("| part | share of a round |\n|---|---:|")
    for part in (*NETWORKS, *LOOP, "other"):
        click.echo(f"| {part} | {_share(found, part):.2%} |")
    click.echo(f"| the loop itself | {sum(_share(found, p) for p in (*LOOP, 'other')):.2%} |")


def measured(
    network: dict[str, object], column: str, *, batch: int, rounds: int, device: str
) -> list[Counter[str]]:
    """Return the seconds by part of each round but the first."""
    state = state_of(network, device)
    settings = COLUMNS[column]
    config = Config(
        duration_kimg=(rounds + 1) * batch / 1000,
        batch_size=batch,
        precision=settings.precision,
        stats_every_kimg=batch / 1000,
        checkpoint_every_kimg=0,
    )
    objective = diff_instruct.build(diff_instruct.Config(shared_batch=settings.shared_batch))
    watch, found = Stopwatch(torch.device(device)), []
    started = watch.now()

    def at_the_end_of_a_round() -> bool:
        nonlocal started
        now, seconds = watch.now(), watch.seconds
        found.append(Counter({**seconds, "other": now - started - seconds.total()}))
        watch.seconds, started = Counter(), now
        return False

    with tempfile.TemporaryDirectory() as folder, _timed(state, watch):
        trainer.Trainer(
            state,
            objective,
            config,
            folder=RunFolder.create(Path(folder), "overhead"),
            world=World.single(device),
            stop_requested=at_the_end_of_a_round,
        ).train()
    return found[1:]


@contextmanager
def _timed(state: trainer.TrainState, watch: Stopwatch) -> Iterator[None]:
    """Run the body with networks, optimizers and parts of the loop timed."""
    networks = (state.networks.student, state.networks.score, state.networks.teacher)
    patches = [
        mock.patch.object(n, "forward", watch.around("forward", n.forward)) for n in networks
    ]
    patches += [
        mock.patch.object(each, "step", watch.around("optimizer", each.step))
        for each in state.optimizers.values()
    ]

    # parts of the loop and of autograd
    patches += [
        mock.patch.object(owner, name, watch.around(part, getattr(owner, name)))
        for owner, name, part in (
            (Tensor, "backward", "backward"),
            (Draws, "_words", "draws"),
            (Draws, "normal", "draws"),
            (Draws, "uniform", "draws"),
            (step, "_checked_norms", "gradient norms and check"),
            (step, "update_ema", "moving average"),
        )
    ]

    # time them within the body
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _share(found: list[Counter[str]], part: str) -> float:
    """Return the median over rounds of a part's share."""
    return statistics.median(seconds[part] / seconds.total() for seconds in found)


if __name__ == "__main__":
    main()
