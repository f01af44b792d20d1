"""Memory that `training.shard` saves in each process, and time that it costs.

    python -m benchmarks.sharding                           CIFAR-10's DDPM++ on the CPU
    python -m benchmarks.sharding --device cuda --ranks 8 --shape imagenet-64

Each setting plays rounds of `--distill` (weights drawn, a batch of one image a process) in new
processes, one setting after the other. Memory is rank 0's, above its memory with libraries
loaded: between rounds (weights, gradients, moments of Adam), and at most while a round is played.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import click
import torch

from benchmarks._memory import in_use, reset_peak
from benchmarks.step import SHAPES, state_of
from core import distributed
from core.distributed import World
from objectives import diff_instruct
from training import fsdp, step
from training.config import Config

SETTINGS = ("", "score", "score,teacher", "score,teacher,student")


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="cifar10", show_default=True)
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--shard", hidden=True, default=None, help="Play this setting, as one of several.")
def main(device: str, shape: str, ranks: int, rounds: int, shard: str | None) -> None:
    """Print the table."""
    if shard is not None:
        _play(device, shape, rounds, [name for name in shard.split(",") if name])
        return
    click.echo("| sharded | MiB between rounds | peak MiB | s a round |\n|---|---:|---:|---:|")
    for setting in SETTINGS:
        command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        options = [f"--device={device}", f"--shape={shape}", f"--rounds={rounds}"]
        subprocess.run(
            [sys.executable, "-m", *command, __spec__.name, *options, f"--shard={setting}"],
            check=True,
        )


def _play(device: str, shape: str, rounds: int, names: list[str]) -> None:
    """Play the rounds as one of several processes; rank 0 prints its row."""
    with distributed.process_group(device) as world:
        before = _held(world)
        state = state_of(SHAPES[shape], str(world.device), shard=names, world=world)
        config = Config.model_validate({"batch_size": world.size, "shard": names})
        trained, seconds = step.wrap_for_ranks(state.networks, state, world), []
        objective = diff_instruct.build(diff_instruct.Config())
        teachers = [state.networks.teacher] if "teacher" in names else []

        # run, timed, and read the memory
        with fsdp.sharding(teachers, world):
            _held(world)
            for _ in range(rounds):
                started = time.perf_counter()
                list(
                    step.training_iteration(state, objective, config, trained=trained, world=world)
                )
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            peak = (in_use(world.device, peak=True) or 0) - before
            held = _held(world) - before

        # one row of the table
        if world.is_main:
            row = f"| {', '.join(names) or 'none'} | {held:.0f} | {peak:.0f} "
            click.echo(f"{row}| {statistics.median(seconds[1:]):.3g} |")


def _held(world: World) -> float:
    """Return the MiB in use, and begin to look for their peak."""
    return reset_peak(world.device) or 0


if __name__ == "__main__":
    main()
