"""A run killed at random moments and resumed each time, beside one that nothing stopped.

    python -m benchmarks.kill_and_resume                    30 times SIGKILL, one process
    python -m benchmarks.kill_and_resume --ranks 2          under torchrun; one of the two is killed

The run is `python refine.py --gan configs/gan/gaussian.yaml`, made short, with a checkpoint every
fourth round. Every third time the kill waits for a checkpoint that is just being written. A run
that gets to its end is compared with the uninterrupted one, the weights by their bytes and the
curve by its numbers, and a new run is begun, until the kills are used up.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import click

from core.errors import UserError
from core.run_folder import RunFolder
from core.run_log import Evaluation
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/gan/gaussian.yaml"
IMAGES = 3200
SETTINGS = (
    f"training.duration_kimg={IMAGES / 1000}",
    "training.batch_size=16",
    "training.ema_halflife_kimg=0.2",
    "training.stats_every_kimg=0.064",
    "training.checkpoint_every_kimg=0.064",
    "evaluation.images=200",
    "evaluation.seeds=1",
    "evaluation.every_kimg=0.8",
    "evaluation.images_while_training=100",
    "evaluation.pairs=4",
    "student.config.channel_base=2048",
    "student.config.channel_max=128",
    "device=cpu",
)
"""200 rounds, 50 checkpoints of 7 MB: some seconds on one core."""
_WAIT_SECONDS = 120
_LOOK_SECONDS = 0.0002


@dataclass
class Tally:
    """Counts of kills and of ends."""

    kills: Counter[str] = field(default_factory=Counter)
    """Point of the run -> number of kills there."""
    ranks: Counter[int] = field(default_factory=Counter)
    damaged: int = 0
    """Checkpoints under their final name that were not whole after a kill."""
    ends: Counter[str] = field(default_factory=Counter)
    """How a run's end compares -> how many."""
    slowest_end: float = 0.0
    """Most seconds from the kill of one rank to the end of all."""


class Kill(NamedTuple):
    """One kill that met the run alive."""

    rank: int
    seconds_to_end: float
    """From the kill of the rank to the end of all processes."""


class _Left(NamedTuple):
    """State of a run's checkpoints."""

    images_saved: int
    partials: frozenset[Path]
    """Folders of checkpoints that were begun."""

    @classmethod
    def of(cls, outdir: Path) -> _Left:
        """Return it, also if there is no run yet."""
        counts = [int(path.stem) for path in outdir.glob("*/checkpoints/*.pt")]
        return cls(max(counts, default=0), frozenset(outdir.glob("*/checkpoints/.*.partial")))


@click.command()
@click.option("--kills", type=click.IntRange(1), default=30, show_default=True)
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the moments.")
def main(kills: int, ranks: int, seed: int) -> None:
    """Print the tally; exit code 1 if a run ended otherwise than the uninterrupted one."""
    draw, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as directory:
        outdir = Path(directory)
        started = time.monotonic()
        expected = _to_its_end(outdir / "whole", ranks)
        seconds = time.monotonic() - started
        click.echo(f"uninterrupted: {seconds:.1f} s")
        runs = 0
        while tally.kills.total() < kills:
            runs += 1
            killed = _until_its_end(outdir / str(runs), ranks, kills, seconds, draw, tally)
            tally.ends[_difference(killed, expected)] += 1
    click.echo(_shown(tally))
    sys.exit(tally.ends.keys() != {"same"} or tally.damaged > 0)


def _until_its_end(
    outdir: Path, ranks: int, kills: int, seconds: float, draw: random.Random, tally: Tally
) -> RunFolder:
    """Return the folder of a run that is killed while kills are left, and resumed each time."""
    while tally.kills.total() < kills:
        waits_for_writing = tally.kills.total() % 3 == 2
        share = draw.uniform(0.3 if waits_for_writing else 0.0, 0.7)  # a resumed run has less to do
        at = time.monotonic() + share * seconds
        before = _Left.of(outdir)

        # run until the moment of the kill
        with _running(outdir, ranks) as process:
            while time.monotonic() < at and process.poll() is None:
                time.sleep(0.01)
            while waits_for_writing and process.poll() is None and not _begun(outdir, before):
                time.sleep(_LOOK_SECONDS)
            kill = _kill_one(process, ranks, draw)
        if kill is None:
            _check(process, outdir)
            return _folder(outdir)

        # count the kill, and the files that it left
        tally.ranks[kill.rank] += 1
        tally.slowest_end = max(tally.slowest_end, kill.seconds_to_end)
        tally.kills[place := _place(outdir, before)] += 1
        tally.damaged += _damaged(outdir)
        saved = _Left.of(outdir).images_saved
        ended = f"{saved} images saved, all ended in {kill.seconds_to_end:.1f} s"
        click.echo(f"kill {tally.kills.total()}: rank {kill.rank} {place}, {ended}", err=True)
    return _to_its_end(outdir, ranks)


def _to_its_end(outdir: Path, ranks: int) -> RunFolder:
    """Return the folder of a run, begun or resumed, after it went through."""
    with _running(outdir, ranks) as process:
        process.wait()
    _check(process, outdir)
    return _folder(outdir)


@contextlib.contextmanager
def _running(outdir: Path, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """Yield the process that begins a run, or resumes the one that is there."""
    outdir.mkdir(exist_ok=True)
    begun = list(outdir.glob("*/recipe.yaml"))
    what = ["--resume", begun[0].parent] if begun else ["--gan", RECIPE, *SETTINGS]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "refine.py", *what]
    with (outdir / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command), "--outdir", str(outdir)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _check(process: subprocess.Popen[bytes], outdir: Path) -> None:
    if process.returncode != 0:
        log = (outdir / "log.txt").read_text()
        raise UserError(f"refine.py ended with {process.returncode}:\n{log[-3000:]}")


def _kill_one(process: subprocess.Popen[bytes], ranks: int, draw: random.Random) -> Kill | None:
    """Kill a rank and return when all have ended; None if they had before."""
    workers = {0: process.pid} if ranks == 1 else _workers(process, ranks)
    if process.poll() is not None:
        return None
    rank, began = draw.randrange(ranks), time.monotonic()
    try:
        os.kill(workers[rank], signal.SIGKILL)
    except ProcessLookupError:  # on its way out
        process.wait(_WAIT_SECONDS)
        return None
    if process.wait(_WAIT_SECONDS) == 0:
        return None
    while any(_is_alive(worker) for worker in workers.values()):
        if time.monotonic() > began + _WAIT_SECONDS:
            raise UserError("a rank outlived torchrun")
        time.sleep(0.01)
    return Kill(rank, time.monotonic() - began)


def _workers(process: subprocess.Popen[bytes], ranks: int) -> dict[int, int]:
    """Return the process id of each rank that torchrun started, once all are there."""
    found: dict[int, int] = {}
    while len(found) < ranks and process.poll() is None:
        time.sleep(0.01)
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                for variable in variables:
                    if variable.startswith(b"RANK="):
                        found[int(variable[5:])] = int(child)
    return found


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _folder(outdir: Path) -> RunFolder:
    (recipe,) = outdir.glob("*/recipe.yaml")
    return RunFolder(recipe.parent)


def _begun(outdir: Path, before: _Left) -> bool:
    """Return whether a checkpoint is just being written."""
    return not _Left.of(outdir).partials <= before.partials


def _place(outdir: Path, before: _Left) -> str:
    """Return the point at which a run was killed, from the files that it left."""
    if not any(outdir.glob("*/recipe.yaml")):
        return "before there was a run"
    if _begun(outdir, before):
        return "while a checkpoint was written"
    saved = _Left.of(outdir).images_saved
    if saved == IMAGES:
        return "after the last checkpoint"
    return "between checkpoints" if saved > before.images_saved else "before its first checkpoint"


def _damaged(outdir: Path) -> int:
    """Return how many checkpoints are not whole."""
    paths = outdir.glob("*/checkpoints/*.pt")
    return sum(checkpoint.damage(path) is not None for path in paths)


def _difference(run: RunFolder, expected: RunFolder) -> str:
    """Return the difference between the ends of two runs."""
    if run.student.read_bytes() != expected.student.read_bytes():
        return "other weights"
    return "same" if _curve(run) == _curve(expected) else "same weights, another curve"


def _curve(folder: RunFolder) -> list[object]:
    rows = folder.log.all(Evaluation)
    return [(row.images_seen, row.metrics) for row in rows if row.when == "training"]


def _shown(tally: Tally) -> str:
    lines = [
        f"{tally.kills.total()} kills, of rank: {_counts(tally.ranks)}",
        *(f"  {count:3d} {place}" for place, count in tally.kills.most_common()),
        f"checkpoints that were not whole: {tally.damaged}",
        f"most seconds from a kill to the end of all processes: {tally.slowest_end:.1f}",
        f"{tally.ends.total()} runs at their end, beside the uninterrupted: {_counts(tally.ends)}",
    ]
    return "\n".join(lines)


def _counts(counter: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


if __name__ == "__main__":
    main()
