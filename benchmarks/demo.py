"""The embedded default, `python refine.py --gan`, from its start to its report.

    python -m benchmarks.demo
    python -m benchmarks.demo training.duration_kimg=1     with settings of the recipe

The seconds of its parts and the metrics before and after are those of the run's report.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@click.command()
@click.argument("settings", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def main(settings: tuple[str, ...]) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "refine.py", "--gan", "--outdir", runs, *settings]
        started = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT).returncode
        seconds = time.perf_counter() - started
        found = sorted(Path(runs).rglob("report.json"))
        if code or not found:
            raise UserError(f"refine.py ended with exit code {code} and {len(found)} reports")
        report = json.loads(found[0].read_text())
    click.echo("| of the demo | value |")
    click.echo("|---|---:|")
    click.echo(f"| in all, s | {seconds:.1f} |")
    for row in rows(report):
        click.echo(row)


def rows(report: Mapping[str, dict]) -> Iterator[str]:
    """Yield a row for each part's seconds and each metric, before and after."""
    for part, seconds in report["durations_seconds"].items():
        yield f"| {part}, s | {seconds:.1f} |"
    images, training = report.get("timed_images"), report["durations_seconds"].get("training")
    if images and training:
        yield f"| images/s while training | {images / training:.0f} |"
    for metric, before in report["before"].items():
        after = report["after"][metric]
        yield f"| {metric} before | {before['mean']:.4g} +- {before['std']:.2g} |"
        yield f"| {metric} after | {after['mean']:.4g} +- {after['std']:.2g} |"


if __name__ == "__main__":
    main()
