"""Objectives side by side on the embedded digits: equal images, and the minutes that they took.

    python -m benchmarks.objectives                             those that need no image
    python -m benchmarks.objectives --images digits.zip --held-out test.zip --seeds 3
    python -m benchmarks.objectives diff_instruct sid training.duration_kimg=24

Each row is a run of `refine.py --gan` per seed; its metrics are those of its report. The held-out
FID is of images that no training saw, by features of another network (random-conv-v1).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import click

from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = {
    "diff_instruct": "{name: diff_instruct, shared_batch: true, head_start_kimg: 2}",
    "diff_instruct-dmd": "{name: diff_instruct, weighting: dmd, head_start_kimg: 2}",
    "sid": "{name: sid, alpha: 1.2, head_start_kimg: 2}",
    "sim": "{name: sid, alpha: 1.0, normalizer: pseudo_huber, head_start_kimg: 2, "
    "sigma: {law: lognormal}}",
}
"""Name of a row -> the objective of its recipe."""
WITH_IMAGES = {
    "real_uid": "{{name: real_uid, images: {images}, score_steps: 2, head_start_kimg: 2}}",
}
"""The same for objectives that learn from real images too."""
SHORT = (
    "training.duration_kimg=8",
    "training.anneal_kimg=3",
    "training.divergence.metric_factor=null",
    "evaluation.metrics=[fid,precision,recall]",
    "evaluation.images=5000",
    "evaluation.seeds=1",
    "evaluation.teacher=null",
)
"""Settings of all runs: a third of the default's length, to be overridden."""


@click.command()
@click.argument("arguments", nargs=-1, metavar="[ROW]... [KEY.PATH=VALUE]...")
@click.option("--images", type=click.Path(exists=True, path_type=Path), help="Real digits.")
@click.option("--held-out", type=click.Path(exists=True, path_type=Path), help="Digits kept apart.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1))
def main(
    arguments: tuple[str, ...], images: Path | None, held_out: Path | None, seeds: int
) -> None:
    """Print the table, a row when its runs are done."""
    settings = [argument for argument in arguments if "=" in argument]
    known = dict(OBJECTIVES)
    if images is not None:
        known |= {name: text.format(images=images) for name, text in WITH_IMAGES.items()}
    chosen = [argument for argument in arguments if "=" not in argument] or list(known)
    if unknown := sorted(set(chosen) - set(known)):
        raise UserError(
            f"no row {unknown[0]}: expected {', '.join(known)}; real_uid needs --images"
        )
    click.echo("| objective | FID | precision, % | recall, % | held-out FID | minutes |")
    click.echo("|---|---:|---:|---:|---:|---:|")
    for name in chosen:
        runs = [_run(known[name], seed, settings, held_out) for seed in range(seeds)]
        click.echo(row(name, runs))


def row(name: str, runs: Sequence[Mapping[str, float]]) -> str:
    """Return the row of an objective: mean and standard deviation over its seeds."""
    cells = []
    columns = (("fid", 2), ("precision", 1), ("recall", 1), ("held_out", 3), ("minutes", 1))
    for key, digits in columns:
        values = [run[key] for run in runs if key in run]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{fmean(values):.{digits}f}{spread}" if values else "")
    return f"| {name} | {' | '.join(cells)} |"


def _run(
    objective: str, seed: int, settings: Sequence[str], held_out: Path | None
) -> dict[str, float]:
    """Return metrics and minutes of one run."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "refine.py", "--gan", "--outdir", runs, *SHORT]
        given = (f"objective={objective}", f"training.seed={seed}", *settings)
        done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True)
        reports = sorted(Path(runs).rglob("report.json"))
        if done.returncode or not reports:
            raise UserError(f"a run ended with exit code {done.returncode}: {done.stderr[-500:]}")
        found = dict(_metrics(json.loads(reports[0].read_text())))
        if held_out is not None:
            found["held_out"] = _held_out(reports[0].parents[1], held_out)
    return found


def _metrics(report: Mapping[str, dict]) -> Iterator[tuple[str, float]]:
    yield "fid", report["after"]["fid"]["mean"]
    for name in ("precision", "recall"):
        if name in report["after"]:
            yield name, 100 * report["after"][name]["mean"]
    yield "minutes", report["durations_seconds"]["training"] / 60


def _held_out(run: Path, images: Path) -> float:
    """Return the FID of a run's student against images, by features of random convolutions."""
    command = [sys.executable, "-m", "eval", "fid", str(run), "--reference", str(images)]
    options = ["--extractor", "random-conv-v1", "--images", "5000", "--json"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout)["metrics"]["fid"]["mean"])


if __name__ == "__main__":
    main()
